"""
Loss curves of runs, with the removals of the first one marked.

    python plot.py out.png RUN [RUN ...]        RUN: an out_dir with a log.jsonl
"""
import json
import os
import sys

import numpy as np

COLOURS = {'ln_2': 'tab:orange', 'ln_1.qk': 'tab:green', 'ln_1.v': 'tab:red', 'ln_f': 'tab:purple', 'merge': 'tab:gray'}


def plot(path, runs):
    """Draws the runs' training losses (thin, smoothed) and validation losses (dots) into `path`."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    marked, values = set(), []
    for run in runs:
        with open(os.path.join(run, 'log.jsonl')) as f:
            log = [json.loads(line) for line in f]
        train = [(e['iter'], e['loss']) for e in log if e['event'] == 'train']
        evals = [(e['iter'], e['val_loss']) for e in log if e['event'] == 'eval']
        removes = [e for e in log if e['event'] == 'remove']
        label = 'LayerNorm removed' if removes else 'LayerNorm kept'
        width = max(len(train) // 6, 1)    # a moving average: one batch's loss says more of the batch than of the model
        smooth = [np.convolve(z, np.ones(width) / width, 'valid') for z in zip(*train)]
        line, = ax.plot(*smooth, lw=1, alpha=0.6, label=f'{label}: training, mean of {width} logged iterations')
        ax.plot(*zip(*evals), 'o-', ms=4, color=line.get_color(), label=f'{label}: validation ({run})')
        values += [v for _, v in evals] + list(smooth[1])
        for e in log:
            if run == runs[0] and e['event'] in ('remove', 'merge'):
                kind = 'merge' if e['event'] == 'merge' else e['site'].split('.', 2)[-1]
                label = {'merge': 'special constants merged'}.get(kind, f'{kind} removed')
                ax.axvline(e['iter'], color=COLOURS[kind], lw=0.8, alpha=0.7, ls=':', label=None if kind in marked else label)
                marked.add(kind)
    low, high = min(values), np.quantile(values, 0.95)      # the start of a run from scratch would flatten the rest
    ax.set(xlabel='iteration', ylabel='cross-entropy (nats)', ylim=(low - 0.05 * (high - low), high + 0.3 * (high - low)))
    fig.legend(loc='outside lower center', ncols=2, fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == '__main__':
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    plot(sys.argv[1], sys.argv[2:])
