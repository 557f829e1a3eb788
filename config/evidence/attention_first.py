"""Query/key, value, ln_2, ln_f."""
start_ln1qk = 20
start_ln1v = 32
start_ln2 = 50
