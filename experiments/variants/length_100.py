"""no_aux.py in 100 iterations: base.py's numbers times 1/4."""
max_iters = eval_interval = 100
warmup_iters, lr_decay_iters, taper_iters = 8, 167, 5
start_ln2, start_ln1qk, start_ln1v, start_lnf = 17, 37, 57, 87
gap_ln2, gap_ln1qk, gap_ln1v = 5, 5, 8
