"""
The follow-up's schedule (arXiv 2507.02559) for GPT-2 large: 36 layers, 1200 iterations.

    torchrun --nproc_per_node=8 train.py config/remove_ln_large.py
    torchrun --nproc_per_node=8 train.py config/remove_ln_large.py --remove_ln=False --out_dir=out/remove_ln_large_control

The published schedule, learning rate and auxiliary weight; warm-up and decay are ours: a tenth of the run, then cosine
to a tenth of the learning rate at its end.
"""
out_dir = 'out/remove_ln_large'
init_from = 'gpt2-large'
dataset = 'openwebtext'
batch_size = 4
batch_tokens = 512 * 1024
max_iters = 1200
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 120
eval_interval = 100

remove_ln = True
start_ln2 = 30
gap_ln2 = 4
start_ln1qk = 174           # right after the last ln_2
gap_ln1qk = 4
start_ln1v = 318
gap_ln1v = 6
start_lnf = 534
start_eot = 536
start_bos = 546
aux_loss_weight = 0.03
