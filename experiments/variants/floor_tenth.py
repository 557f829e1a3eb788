"""The demo's pace with a floor of a tenth: the learning rate ends at 0.1 of its peak."""
start_ln2 = 20
gap_ln2 = 6
start_ln1qk = 44
gap_ln1qk = 6
start_ln1v = 68
gap_ln1v = 8
start_lnf = 100
min_lr = 1e-4
lr_decay_iters = 0
