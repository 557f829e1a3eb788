"""The demo's pace with the follow-up's floor: the learning rate ends at half its peak."""
start_ln2 = 20
gap_ln2 = 6
start_ln1qk = 44
gap_ln1qk = 6
start_ln1v = 68
gap_ln1v = 8
start_lnf = 100
min_lr = 5e-4
lr_decay_iters = 0
