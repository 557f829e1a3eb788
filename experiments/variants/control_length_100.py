"""The control of length_100.py."""
max_iters = eval_interval = 100
warmup_iters = 8
lr_decay_iters = 167
remove_ln = False
