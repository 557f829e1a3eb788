"""
The follow-up's schedule (arXiv 2507.02559) for GPT-2 XL: 48 layers, 1200 iterations.

    torchrun --nproc_per_node=8 train.py config/remove_ln_xl.py
    torchrun --nproc_per_node=8 train.py config/remove_ln_xl.py --remove_ln=False --out_dir=out/remove_ln_xl_control

The published schedule, learning rate and auxiliary weight; warm-up and decay are ours: a tenth of the run, then cosine
to a tenth of the learning rate at its end.
"""
out_dir = 'out/remove_ln_xl'
init_from = 'gpt2-xl'
dataset = 'openwebtext'
batch_size = 2
batch_tokens = 512 * 1024
max_iters = 1200
learning_rate = 1e-4
min_lr = 1e-5
warmup_iters = 120
eval_interval = 100

remove_ln = True
start_ln2 = 50
gap_ln2 = 4
start_ln1qk = 242           # right after the last ln_2
gap_ln1qk = 4
start_ln1v = 434
gap_ln1v = 6
start_lnf = 722
start_eot = 724
start_bos = 734
aux_loss_weight = 0.01
