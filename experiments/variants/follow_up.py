"""The follow-up's pace, abrupt, with its auxiliary loss;
gaps of 2, 2, 3 for 12 layers are 6, 6, 9 for 4."""
start_ln2 = 20
gap_ln2 = 6
start_ln1qk = 44
gap_ln1qk = 6
start_ln1v = 68
gap_ln1v = 9
start_lnf = 104
taper_iters = 0
aux_loss_weight = 0.1
