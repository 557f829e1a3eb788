"""no_aux.py in 100 iterations: all of base.py's numbers times 0.25."""
max_iters = eval_interval = 100
warmup_iters = 8
lr_decay_iters = 167
start_ln2 = 17
gap_ln2 = 5
start_ln1qk = 37
gap_ln1qk = 5
start_ln1v = 57
gap_ln1v = 8
start_lnf = 87
taper_iters = 5
