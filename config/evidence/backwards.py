"""The whole order the other way round: ln_f, value, query/key, ln_2, each from the last layer down."""
start_lnf = 20
start_ln1v = 37
gap_ln1v = -3
start_ln1qk = 50
gap_ln1qk = -2
start_ln2 = 62
gap_ln2 = -2
