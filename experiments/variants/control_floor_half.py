"""The control of floor_half."""
remove_ln = False
min_lr = 5e-4
lr_decay_iters = 0
