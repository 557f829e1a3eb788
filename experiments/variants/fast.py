"""config/remove_ln_fast.py in all that it sets, its 300 iterations and 12 layers as 400 and 4."""
min_lr = 5e-4               # half the peak
lr_decay_iters = 400
weight_decay = 0.01
beta2 = 0.999
start_ln2, start_ln1qk, start_ln1v, start_lnf = 27, 59, 91, 139
gap_ln2, gap_ln1qk, gap_ln1v = 8, 8, 12
aux_loss_weight = 0.1
