"""The follow-up's pace, abrupt, with its auxiliary loss;
gaps of 2, 2, 3 for 12 layers are 6, 6, 9 for 4."""
start_ln2, start_ln1qk, start_ln1v, start_lnf = 20, 44, 68, 104
gap_ln2, gap_ln1qk, gap_ln1v = 6, 6, 9
taper_iters = 0
aux_loss_weight = 0.1
