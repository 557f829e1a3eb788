"""config/remove_ln_fast.py in all that it sets, its 300 iterations and 12 layers as 400 and 4."""
min_lr = 5e-4               # half the peak
lr_decay_iters = 400
weight_decay = 0.01
beta2 = 0.999
start_ln2 = 27
gap_ln2 = 8
start_ln1qk = 59
gap_ln1qk = 8
start_ln1v = 91
gap_ln1v = 12
start_lnf = 139
aux_loss_weight = 0.1
