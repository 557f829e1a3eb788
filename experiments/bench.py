"""
What does a step cost? Times two settings step by step in turns, since machines are noisy, on
synthetic tokens.

    python experiments/bench.py --ln_mode=fake,real                         removal against plain LN
    python experiments/bench.py --ln_mode=fake,real --compile=False
    python experiments/bench.py --compile=True,False --n_layer=4 --block_size=128

Any key of train.py's Config; two values with a comma between them are the two settings. The default
is GPT-2 small's shape and one sequence. Prints the time of the first over the second, and on CUDA
the peak memory and MFU.
"""
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import train                            # noqa: E402
from model import GPT2, GPT2Config      # noqa: E402

def make(argv):
    """A function that takes one step of this setting and waits for it, and what to say of it."""
    ln_mode = next((a.split('=')[1] for a in argv if a.startswith('--ln_mode=')), 'fake')
    cfg = train.load_config(['--batch_size=1', '--batch_tokens=0', '--compile=True', '--seed=0',
                             *(a for a in argv if not a.startswith('--ln_mode='))])
    cfg.batch_tokens = cfg.batch_tokens or cfg.batch_size * cfg.block_size
    device, autocast, dtype, compiled = train.start_machine(cfg)
    torch.manual_seed(0)
    shape = {k: getattr(cfg, k) for k in ('n_layer', 'n_head', 'n_embd', 'block_size', 'dropout')}
    raw = GPT2(GPT2Config(**shape, vocab_size=cfg.vocab_size or 50257, ln_mode=ln_mode)).to(device)
    raw.gradient_checkpointing = cfg.gradient_checkpointing
    for gate in raw.sites().values() if ln_mode == 'fake' else []:
        gate.fill_(0.5)
    model = torch.compile(raw, fullgraph=True) if compiled else raw
    optimizer = train.make_optimizer(cfg, raw)
    x = torch.randint(raw.config.vocab_size, (2, cfg.batch_size, cfg.block_size), device=device)

    def step():
        train.step(cfg, 0, model, raw, optimizer, lambda it, micro: (x[0], x[1]), autocast)
        if x.is_cuda:
            torch.cuda.synchronize()
    what = f"{raw.num_params():,} parameters, {device}, {dtype}"
    return step, cfg.batch_tokens, raw.flops_per_token(), what

def main(argv, steps=20):
    settings = [[a.replace(f'={v}', f"={v.split(',')[i]}")
                 if ',' in (v := a.partition('=')[2]) else a for a in argv] for i in range(2)]
    runs = [make(s) for s in settings]
    for step, *_ in runs:       # compile, and make the optimizer's moments
        step()
        step()
    seconds = np.zeros((steps, 2))
    for i in range(steps):
        for r in ((0, 1), (1, 0))[i % 2]:
            t = time.perf_counter()
            runs[r][0]()
            seconds[i, r] = time.perf_counter() - t
    cuda = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if cuda else ''
    peak = next((flops for name, flops in train.PEAK.items() if name in gpu), None)
    for r, (_, tokens, flops, what) in enumerate(runs):
        t = np.median(seconds[:, r])
        print(f"{' '.join(settings[r])}: {what}; {tokens / t:,.0f} tokens/s, "
              f"median step {t * 1e3:.1f} ms"
              + (f", MFU {tokens / t * flops / peak:.1%}" if peak else ''))
    low, ratio, high = np.quantile(seconds[:, 0] / seconds[:, 1], (0.25, 0.5, 0.75))
    print(f"time of the first over the second: median {ratio:.3f}, "
          f"middle half {low:.3f} to {high:.3f}")
    if cuda:
        print(f"peak memory of both together {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")

if __name__ == '__main__':
    if '--help' in sys.argv:
        sys.exit(__doc__)
    main(sys.argv[1:])
