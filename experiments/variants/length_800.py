"""no_aux.py in 800 iterations: base.py's numbers times 2."""
max_iters = eval_interval = 800
warmup_iters, lr_decay_iters, taper_iters = 66, 1334, 40
start_ln2, start_ln1qk, start_ln1v, start_lnf = 134, 294, 454, 694
gap_ln2, gap_ln1qk, gap_ln1v = 40, 40, 60
