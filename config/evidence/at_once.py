"""All sites in one iteration."""
gap_ln2 = 0
start_ln1qk = 20
gap_ln1qk = 0
start_ln1v = 20
gap_ln1v = 0
start_lnf = 20
