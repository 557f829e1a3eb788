"""config/demo_remove_ln.py's pace: all sites gone after 120 iterations."""
start_ln2, start_ln1qk, start_ln1v, start_lnf = 20, 44, 68, 100
gap_ln2, gap_ln1qk, gap_ln1v = 6, 6, 8
