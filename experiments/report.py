"""
The table of the evidence: variants over seeds, each run against the control of its seed.

    python experiments/report.py out/evidence [PICTURE.png]     runs called NAME.SEED, and
                                                                control.SEED for each seed

A run and its control see the same batches, so the difference of their training losses has almost
none of the batches' noise: it is the cost of the removal, iteration by iteration. gap: the
difference of the validation losses at the end. worst: the largest difference on the way.
within 0.1: seeds that ended so close.
"""
import json
import os
import sys

import numpy as np

def read_runs(folder):
    """{(name, seed): log} of the runs that reached their end."""
    runs = {}
    for d in sorted(os.listdir(folder)):
        name, _, seed = d.rpartition('.')
        path = os.path.join(folder, d, 'log.jsonl')
        if seed.isdigit() and os.path.exists(path):
            with open(path) as f:
                log = [json.loads(line) for line in f]
            if len([e for e in log if e['event'] == 'eval']) > 1:
                runs[name, seed] = log
    return runs

def control_of(name, seed, runs):
    own = f'control_{name}', seed
    return runs.get(own if own in runs else ('control', seed))

def losses(log, event, key):
    return np.array([e[key] for e in log if e['event'] == event])

def statistics(runs):
    """{name: (gaps, differences (seeds, iterations))} of all but the controls."""
    found = {}
    for (name, seed), log in runs.items():
        control = control_of(name, seed, runs)
        if name.startswith('control') or control is None:
            continue
        gap = losses(log, 'eval', 'val_loss')[-1] - losses(control, 'eval', 'val_loss')[-1]
        difference = losses(log, 'train', 'loss') - losses(control, 'train', 'loss')
        found.setdefault(name, ([], []))
        found[name][0].append(gap)
        found[name][1].append(difference)
    return {name: (np.array(g), np.array(d)) for name, (g, d) in found.items()}

def table(found, tokens):
    """Markdown. tokens: of an iteration."""
    rows = ['| variant | seeds | gap (standard error) | worst moment | within 0.1 | '
            'tokens until within 0.05 |',
            '|---|---|---|---|---|---|']
    for name, (gaps, differences) in sorted(found.items(), key=lambda v: v[1][0].mean()):
        n = len(gaps)
        error = f' ({gaps.std(ddof=1) / n ** 0.5:.4f})' if n > 1 else ''
        mean = differences.mean(0)
        smooth = np.convolve(mean, np.ones(20) / 20, 'valid')       # mean of 20 iterations
        high = np.flatnonzero(smooth >= 0.05)
        until = 0 if not len(high) else high[-1] + 20               # from then on it stays below
        when = 'not reached' if until >= len(mean) else f'{(until + 1) * tokens / 1e3:.0f}k'
        when = when if until else 'never above'
        at = np.unravel_index(differences.argmax(), differences.shape)[1]
        rows.append(f'| {name} | {n} | {gaps.mean():+.4f}{error} | '
                    f'{differences.max():+.2f} at {at} | {(gaps < 0.1).sum()} of {n} | {when} |')
    return '\n'.join(rows)

def picture(path, found, names, tokens):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    for name in names:
        if name in found:
            d = found[name][1]
            smooth = np.array([np.convolve(z, np.ones(5) / 5, 'valid') for z in d])
            x = np.arange(smooth.shape[1]) * tokens / 1e3
            line, = ax.plot(x, smooth.mean(0), lw=1.2, label=f'{name} ({len(d)} seeds)')
            ax.fill_between(x, smooth.min(0), smooth.max(0),
                            color=line.get_color(), alpha=0.2, lw=0)
    ax.set(xlabel='tokens (thousands)', ylabel='LN removed minus LN kept, same batches (nats)')
    ax.set_yscale('symlog', linthresh=0.2)
    ax.axhline(0, color='gray', lw=0.8)
    ax.legend()
    fig.savefig(path, dpi=110)

if __name__ == '__main__':
    if not 2 <= len(sys.argv) <= 3 or not os.path.isdir(sys.argv[1]):
        sys.exit(__doc__)
    runs = read_runs(sys.argv[1])
    if not any(name == 'control' for name, _ in runs):
        sys.exit(f'report.py: {sys.argv[1]} holds no control.SEED that reached its end')
    found = statistics(runs)
    last = [e for e in next(iter(runs.values())) if e['event'] == 'eval'][-1]
    tokens = last['tokens'] / last['iter']
    print(table(found, tokens))
    if len(sys.argv) == 3:
        names = ['paper_text', 'fade_0', 'no_aux', 'shipped', 'follow_up_faded']
        picture(sys.argv[2], found, names, tokens)
