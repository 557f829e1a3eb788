"""
Loss curves of runs, with the removals of the first one marked.

    python plot.py out.png RUN [RUN ...]        RUN: an out_dir with a log.jsonl
"""
import json
import os
import sys

COLOURS = {'ln_2': 'tab:orange', 'qk': 'tab:green', 'v': 'tab:red', 'ln_f': 'tab:purple', 'merge': 'tab:gray'}


def plot(path, runs):
    """Draws the runs' training losses (thin, smoothed) and validation losses (dots) into `path`."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    marked, lowest, highest = set(), [], []
    for run in runs:
        with open(os.path.join(run, 'log.jsonl')) as f:
            log = [json.loads(line) for line in f]
        train = [(e['iter'], e['loss']) for e in log if e['event'] == 'train']
        evals = [(e['iter'], e['val_loss']) for e in log if e['event'] == 'eval']
        removes = [e for e in log if e['event'] == 'remove']
        label = 'LayerNorm removed' if removes else 'LayerNorm kept'
        smooth, average = [], None
        for i, loss in train:
            average = loss if average is None else 0.9 * average + 0.1 * loss
            smooth.append(average)
        line, = ax.plot([i for i, _ in train], smooth, lw=1, alpha=0.6, label=f'{label}: training, smoothed ({run})')
        ax.plot(*zip(*evals), 'o-', ms=4, color=line.get_color(), label=f'{label}: validation')
        lowest.append(min(v for _, v in evals))
        highest.append(evals[0][1])
        for e in log:
            if run == runs[0] and e['event'] in ('remove', 'merge'):
                kind = 'merge' if e['event'] == 'merge' else e['site'].split('.')[-1]
                label = {'merge': 'special constants merged'}.get(kind, f'{kind} removed')
                ax.axvline(e['iter'], color=COLOURS[kind], lw=0.8, alpha=0.7, ls=':', label=None if kind in marked else label)
                marked.add(kind)
    room = max(max(highest) - min(lowest), 0.05)
    ax.set(xlabel='iteration', ylabel='cross-entropy (nats)', ylim=(min(lowest) - 0.3 * room, max(highest) + 0.6 * room))
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == '__main__':
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    plot(sys.argv[1], sys.argv[2:])
