"""no_aux.py in 800 iterations: all of base.py's numbers times 2."""
max_iters = eval_interval = 800
warmup_iters = 66
lr_decay_iters = 1334
start_ln2 = 134
gap_ln2 = 40
start_ln1qk = 294
gap_ln1qk = 40
start_ln1v = 454
gap_ln1v = 60
start_lnf = 694
taper_iters = 40
