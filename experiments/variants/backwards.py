"""The demo's pace in the opposite order:
ln_f, value, query/key, ln_2, each from the last layer down."""
start_lnf = 20
start_ln1v = 50
gap_ln1v = -8
start_ln1qk = 76
gap_ln1qk = -6
start_ln2 = 100
gap_ln2 = -6
