"""The control of length_200.py."""
max_iters = eval_interval = 200
warmup_iters = 16
lr_decay_iters = 334
remove_ln = False
