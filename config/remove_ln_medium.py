"""
The follow-up's run (arXiv 2507.02559) for GPT-2 medium, as published: 24 layers, 500 iterations
of 0.5M tokens.

    torchrun --nproc_per_node=8 train.py config/remove_ln_medium.py

Ours: each site fades over 20 iterations instead of going at once; dropout is off (theirs: 0.1).
"""
out_dir = 'out/remove_ln_medium'
init_from = 'gpt2-medium'
dataset = 'openwebtext'
batch_size = 8
batch_tokens = 512 * 1024
max_iters = 500
lr_decay_iters = 500
learning_rate = 6e-4
min_lr = 3e-4
warmup_iters = 10
weight_decay = 0.01
beta2 = 0.999
eval_interval = 50

remove_ln = True
start_ln2 = 20
gap_ln2 = gap_ln1qk = 2
start_ln1qk = start_ln2 + 24 * gap_ln2
start_ln1v = start_ln1qk + 24 * gap_ln1qk
gap_ln1v = 3
start_lnf = start_ln1v + 24 * gap_ln1v
taper_iters = 20
aux_loss_weight = 0.1
