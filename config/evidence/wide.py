"""Gaps three times as wide."""
gap_ln2 = 6                 # 20 to 50
start_ln1qk = 56
gap_ln1qk = 6
start_ln1v = 92
gap_ln1v = 9
start_lnf = 146
start_eot = 152
start_bos = 182
