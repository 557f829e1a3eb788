"""All sites in one iteration, and no constants of their own for position 0 and end-of-text."""
gap_ln2 = 0
start_ln1qk = 20
gap_ln1qk = 0
start_ln1v = 20
gap_ln1v = 0
start_lnf = 20
start_eot = 0
start_bos = 0
