"""
The follow-up's run (arXiv 2507.02559) for GPT-2 small, as published: 12 layers, 300 iterations of
0.5M tokens. remove_ln_medium.py, _large.py and _xl.py change what differs.

    torchrun --nproc_per_node=8 train.py config/remove_ln_fast.py

Ours: each site fades over 20 iterations instead of going at once; dropout is off (theirs: 0.1). No
giant loss: with it and the auxiliary loss this pace diverged at GPT-2 small's size
(experiments/README.md).
"""
out_dir = 'out/remove_ln_fast'
init_from = 'gpt2'
dataset = 'openwebtext'
batch_size = 16
batch_tokens = 512 * 1024
max_iters = lr_decay_iters = 300
learning_rate = 6e-4
min_lr = 3e-4
warmup_iters = 25
weight_decay = 0.01
beta2 = 0.999
eval_interval = 50

remove_ln = True
taper_iters = 20
aux_loss_weight = 0.1

def _pace(layers, start, gap):
    """One side after the other, a layer every `gap` iterations; the value side takes 1.5 times."""
    qk, v = start + layers * gap, start + 2 * layers * gap
    return start, qk, v, v + layers * gap * 3 // 2, gap, gap, gap * 3 // 2

(start_ln2, start_ln1qk, start_ln1v, start_lnf,
 gap_ln2, gap_ln1qk, gap_ln1v) = _pace(layers=12, start=20, gap=2)
