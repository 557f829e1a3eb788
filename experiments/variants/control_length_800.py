"""The control of length_800.py."""
max_iters = eval_interval = 800
warmup_iters = 66
lr_decay_iters = 1334
remove_ln = False
