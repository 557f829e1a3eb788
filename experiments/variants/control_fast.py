"""The control of fast.py."""
remove_ln = False
min_lr = 5e-4
lr_decay_iters = 400
weight_decay = 0.01
beta2 = 0.999
