"""
The follow-up's run for GPT-2 large: 36 layers. What is not here is config/remove_ln_fast.py's.

    torchrun --nproc_per_node=8 train.py config/remove_ln_large.py
"""
from pathlib import Path as _Path

exec(_Path(__file__).with_name('remove_ln_fast.py').read_text())
out_dir = 'out/remove_ln_large'
init_from = 'gpt2-large'
batch_size = 4
max_iters, lr_decay_iters = 600, 1200
learning_rate, min_lr, warmup_iters = 3e-4, 4e-5, 15
aux_loss_weight = 0.03
(start_ln2, start_ln1qk, start_ln1v, start_lnf,
 gap_ln2, gap_ln1qk, gap_ln1v) = _pace(layers=36, start=30, gap=4)
