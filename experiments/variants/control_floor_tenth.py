"""The control of floor_tenth."""
remove_ln = False
min_lr = 1e-4
lr_decay_iters = 0
