"""no_aux.py in 200 iterations: base.py's numbers times 1/2."""
max_iters = eval_interval = 200
warmup_iters, lr_decay_iters, taper_iters = 16, 334, 10
start_ln2, start_ln1qk, start_ln1v, start_lnf = 34, 74, 114, 174
gap_ln2, gap_ln1qk, gap_ln1v = 10, 10, 15
