"""
The paper's run (arXiv 2409.13710): GPT-2 small loses every LayerNorm in 1,200 iterations of 0.5M
tokens.

    torchrun --nproc_per_node=8 train.py config/remove_ln.py
    torchrun --nproc_per_node=8 train.py config/remove_ln.py config/control.py      # its control

The paper's text gives position 0 and end-of-text constants of their own, and makes them the
ordinary ones in one iteration each, at 1060 and 1160; that wrecks a model with GPT-2's giant vector
(experiments/README.md). Its code gave position 0 the ordinary constant from the start. We do as its
code did, for end-of-text too, at the paper's pace, but fade each site over 20 iterations and add
the follow-up's auxiliary loss, which takes a quarter off the gap on our stand-in, and the giant
loss, which shrinks the vector from the first iteration on.

batch_size * 1024 must divide batch_tokens; it changes the speed and memory, not the result.
"""
out_dir = 'out/remove_ln'
init_from = 'gpt2'
dataset = 'openwebtext'         # python prepare.py openwebtext --max_tokens=700_000_000
batch_size = 16
batch_tokens = 512 * 1024       # 0.5M
max_iters = 1200
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 100
lr_decay_iters = 2000
eval_interval = 100

remove_ln = True
start_ln2 = 200                 # layers 0 to 11 at 200, 220, ..., 420
gap_ln2 = 20
start_ln1qk = 440
gap_ln1qk = 20
start_ln1v = 680
gap_ln1v = 30
start_lnf = 1040
taper_iters = 20
aux_loss_weight = 0.1
giant_loss_weight = 0.1
