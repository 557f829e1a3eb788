"""remove_ln.py's schedule, shrunk to 300 iterations and 6 layers: the removal fills the run."""
start_ln2 = 50              # 200 / 4, then every 10: two layers of GPT-2 small for one here
gap_ln2 = 10
start_ln1qk = 110
gap_ln1qk = 10
start_ln1v = 170
gap_ln1v = 15
start_lnf = 260
start_eot = 265
start_bos = 290
