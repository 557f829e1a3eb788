"""
The table of the evidence: variants over seeds, each run against the control of its seed.

    python experiments/report.py out/evidence [PICTURE.png]     runs called NAME.SEED

A run's control is that control*.SEED that had its learning rates. Both see the same batches, so the
difference of their training losses has almost none of the batches' noise: it is the cost of the
removal, iteration by iteration. gap: the difference of the validation losses at the end. worst: the
largest difference on the way. within 0.1: seeds that ended so close.
"""
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from model import check, command                # noqa: E402
from train import read_log                      # noqa: E402

def read_runs(folder):
    """{(name, seed): {'loss', 'lr': each iteration's, 'val_loss': at the end, 'tokens': of an
    iteration}} of the runs that reached their end."""
    runs = {}
    for log in sorted(Path(folder).glob('*.*/log.jsonl')):
        name, seed = log.parent.name.rsplit('.', 1)
        evals = read_log(log.parent, 'eval')
        if seed.isdigit() and len(evals) > 1:
            steps = read_log(log.parent, 'train')
            run = {key: np.array([e[key] for e in steps]) for key in ('loss', 'lr')}
            last = evals[-1]
            runs[name, seed] = run | {'val_loss': last['val_loss'],
                                      'tokens': last['tokens'] / last['iter']}
    return runs

def statistics(runs):
    """{name: (gaps (seeds,), differences (seeds, iterations))} of all but the controls."""
    found = {}
    for (name, seed), run in runs.items():
        controls = [c for (other, s), c in runs.items() if other.startswith('control')
                    and s == seed and np.array_equal(c['lr'], run['lr'])]
        if controls and not name.startswith('control'):
            gaps, differences = found.setdefault(name, ([], []))
            gaps.append(run['val_loss'] - controls[0]['val_loss'])
            differences.append(run['loss'] - controls[0]['loss'])
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

@command
def main(argv):
    check(1 <= len(argv) <= 2, "expected FOLDER [PICTURE.png]")
    runs = read_runs(argv[0])
    found = statistics(runs)
    check(found, f"{argv[0]} holds no run and control*.SEED that reached their end")
    tokens = next(iter(runs.values()))['tokens']
    print(table(found, tokens))
    if len(argv) == 2:
        names = ['paper_text', 'fade_0', 'no_aux', 'shipped', 'fast', 'distil_random']
        picture(argv[1], found, names, tokens)

if __name__ == '__main__':
    main()
