"""
The follow-up's run (arXiv 2507.02559) for GPT-2 XL, as published: 48 layers, 800 iterations
of 0.5M tokens.

    torchrun --nproc_per_node=8 train.py config/remove_ln_xl.py

Ours: each site fades over 20 iterations instead of going at once; dropout is off (theirs: 0.1).
"""
out_dir = 'out/remove_ln_xl'
init_from = 'gpt2-xl'
dataset = 'openwebtext'
batch_size = 2
batch_tokens = 512 * 1024
max_iters = 800
lr_decay_iters = 1200
learning_rate = 1e-4
min_lr = 2e-5
warmup_iters = 20
weight_decay = 0.01
beta2 = 0.999
eval_interval = 50

remove_ln = True
start_ln2 = 50
gap_ln2 = gap_ln1qk = 4
start_ln1qk = start_ln2 + 48 * gap_ln2
start_ln1v = start_ln1qk + 48 * gap_ln1qk
gap_ln1v = 6
start_lnf = start_ln1v + 48 * gap_ln1v
taper_iters = 20
aux_loss_weight = 0.01
