"""The demo's pace in the opposite order:
ln_f, value, query/key, ln_2, each from the last layer down."""
start_lnf, start_ln1v, start_ln1qk, start_ln2 = 20, 50, 76, 100
gap_ln1v, gap_ln1qk, gap_ln2 = -8, -6, -6
