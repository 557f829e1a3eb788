"""config/demo_remove_ln.py's pace: all sites gone after 120 iterations."""
start_ln2 = 20
gap_ln2 = 6
start_ln1qk = 44
gap_ln1qk = 6
start_ln1v = 68
gap_ln1v = 8
start_lnf = 100
