"""
The follow-up's run for GPT-2 XL: 48 layers. What is not here is config/remove_ln_fast.py's.

    torchrun --nproc_per_node=8 train.py config/remove_ln_xl.py
"""
from pathlib import Path as _Path

exec(_Path(__file__).with_name('remove_ln_fast.py').read_text())
out_dir = 'out/remove_ln_xl'
init_from = 'gpt2-xl'
batch_size = 2
max_iters, lr_decay_iters = 800, 1200
learning_rate, min_lr, warmup_iters = 1e-4, 2e-5, 20
aux_loss_weight = 0.01
(start_ln2, start_ln1qk, start_ln1v, start_lnf,
 gap_ln2, gap_ln1qk, gap_ln1v) = _pace(layers=48, start=50, gap=4)
