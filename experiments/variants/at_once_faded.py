"""All sites at once, faded over 100 iterations."""
start_ln2 = start_ln1qk = start_ln1v = start_lnf = 20
gap_ln2 = gap_ln1qk = gap_ln1v = 0
taper_iters = 100
