"""no_aux.py in 200 iterations: all of base.py's numbers times 0.5."""
max_iters = eval_interval = 200
warmup_iters = 16
lr_decay_iters = 334
start_ln2 = 34
gap_ln2 = 10
start_ln1qk = 74
gap_ln1qk = 10
start_ln1v = 114
gap_ln1v = 15
start_lnf = 174
taper_iters = 10
