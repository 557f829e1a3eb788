"""
What does a step cost? Times settings in turns, step by step, since machines are noisy, on random
tokens.

    python experiments/bench.py --ln_mode=real,fake                     plain LN against removal
    python experiments/bench.py --ln_mode=real,fake --compile=False
    python experiments/bench.py --teacher=,fresh --n_layer=4 --block_size=128   a teacher's cost

Any key of train.py's Config; several values with commas between them are the settings. The default
is GPT-2 small's shape, one sequence, compiled; a removal has both of its losses. A teacher is a
fresh model of the same shape. Prints the time of each over the first's; on CUDA the MFU and, above
what stays, the peak memory.
"""
import os
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import train                                        # noqa: E402
from model import GPT2, GPT2Config, check, command  # noqa: E402

PEAK = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}     # FLOPS of bfloat16, dense

def make(argv):
    """A function that takes one step of this setting and waits for it, and what to say of it."""
    cfg = train.load_config(['--batch_size=1', '--batch_tokens=0', '--compile=True', '--seed=0',
                             '--vocab_size=50257', '--ln_mode=fake', '--aux_loss_weight=0.1',
                             '--giant_loss_weight=0.1', *argv])
    cfg.remove_ln = cfg.ln_mode == 'fake'
    cfg.batch_tokens = cfg.batch_tokens or cfg.batch_size * cfg.block_size
    device, autocast, dtype, compiled = train.find_machine(cfg)
    optimized = partial(torch.compile, fullgraph=True, disable=not compiled)
    torch.manual_seed(0)
    shape = {k: getattr(cfg, k) for k in ('block_size', 'vocab_size', 'n_layer', 'n_head',
                                          'n_embd', 'dropout', 'ln_mode')}
    raw, distil = GPT2(GPT2Config(**shape)).to(device), None
    for gate in raw.sites().values() if cfg.remove_ln else []:
        gate.fill_(0.5)
    if cfg.teacher:
        teacher = GPT2(GPT2Config(**shape | {'ln_mode': 'real'})).to(device)
        distil = optimized(partial(train.divergence, teacher.eval().requires_grad_(False)))
    model, optimizer = optimized(raw), train.make_optimizer(cfg, raw)
    xy = torch.randint(cfg.vocab_size, (2, cfg.batch_size, cfg.block_size), device=device)
    data = SimpleNamespace(batch=lambda it, micro: xy, n_random=0,
                           n_micro=cfg.batch_tokens // xy[0].numel())

    def step():
        train.step(cfg, 0, model, raw, optimizer, data, autocast, distil)
        if raw.wte.weight.is_cuda:
            torch.cuda.synchronize()
    # a token's arithmetic: 6 for each weight, 12 LCT for attention's scores; the backward included
    n_params = sum(p.numel() for p in raw.parameters())
    flops = 6 * n_params + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
    return step, cfg.batch_tokens, flops, f"{n_params:,} parameters, {device}, {dtype}"

def settings_of(argv):
    """['--a=1,2', '--b=3'] -> [['--a=1', '--b=3'], ['--a=2', '--b=3']]"""
    n = max((a.count(',') for a in argv), default=0) + 1
    check(all(a.count(',') in (0, n - 1) for a in argv), f"expected 1 or {n} values of each key")
    return [[a if ',' not in a else f"{a.partition('=')[0]}={a.partition('=')[2].split(',')[i]}"
             for a in argv] for i in range(n)]

@command
def main(argv, steps=20):
    settings = settings_of(argv)
    runs, peaks, cuda = [make(s) for s in settings], [], torch.cuda.is_available()
    for step, *_ in runs:       # compile, and make the optimizer's moments
        step()
        stays = torch.cuda.memory_allocated() if cuda else 0
        torch.cuda.reset_peak_memory_stats() if cuda else None
        step()
        peaks.append((torch.cuda.max_memory_allocated() - stays) / 2 ** 30 if cuda else 0)
    seconds = np.zeros((steps, len(runs)))
    for i in range(steps):
        for r in range(len(runs))[::1 if i % 2 else -1]:
            t = time.perf_counter()
            runs[r][0]()
            seconds[i, r] = time.perf_counter() - t
    gpu = torch.cuda.get_device_name() if cuda else ''
    most = next((flops for name, flops in PEAK.items() if name in gpu), None)
    for r, (_, tokens, flops, what) in enumerate(runs):
        t = np.median(seconds[:, r])
        low, ratio, high = np.quantile(seconds[:, r] / seconds[:, 0], (0.25, 0.5, 0.75))
        print(f"{' '.join(settings[r])}: {what}; {tokens / t:,.0f} tokens/s, median step "
              f"{t * 1e3:.1f} ms, over the first's {ratio:.3f} ({low:.3f} to {high:.3f})"
              + (f", MFU {tokens / t * flops / most:.1%}" if most else '')
              + (f", peak {peaks[r]:.2f} GiB" if cuda else ''))

if __name__ == '__main__':
    main()
