"""
The follow-up's run for GPT-2 medium: 24 layers. What is not here is config/remove_ln_fast.py's.

    torchrun --nproc_per_node=8 train.py config/remove_ln_medium.py
"""
from pathlib import Path as _Path

exec(_Path(__file__).with_name('remove_ln_fast.py').read_text())
out_dir = 'out/remove_ln_medium'
init_from = 'gpt2-medium'
batch_size = 8
max_iters, lr_decay_iters = 500, 500
warmup_iters = 10
(start_ln2, start_ln1qk, start_ln1v, start_lnf,
 gap_ln2, gap_ln1qk, gap_ln1v) = _pace(layers=24, start=20, gap=2)
