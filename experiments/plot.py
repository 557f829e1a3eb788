"""
Draws a run and its control: training losses (lines), validation losses (dots), removals (dotted).
Prints the gap: the difference of their last validation losses, in nats.

    python experiments/plot.py PICTURE.png RUN [CONTROL]        needs matplotlib
"""
import os
import sys

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt                 # noqa: E402

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from model import check, command                # noqa: E402
from train import read_log                      # noqa: E402

@command
def main(argv):
    check(2 <= len(argv) <= 3, f"got {' '.join(argv)}; expected PICTURE.png RUN [CONTROL]")
    picture, *runs = argv
    ends = [read_log(run, 'eval')[-1]['val_loss'] for run in runs]
    for run, loss in zip(runs, ends):
        print(f"{run:<24} val loss {loss:.4f}, gap {loss - ends[-1]:+.4f}")
    fig, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    for run in reversed(runs):
        train, val = (np.array([(e['iter'], e[key]) for e in read_log(run, event)]).T
                      for event, key in (('train', 'loss'), ('eval', 'val_loss')))
        line, = ax.plot(*train, lw=0.8, alpha=0.6, label=run)
        ax.plot(*val, 'o-', ms=4, color=line.get_color(), label=f'{run}: validation')
    for event in read_log(runs[0], 'remove'):
        ax.axvline(event['iter'], color='gray', lw=0.5, ls=':')
    low, high = val[1].min(), np.quantile(train[1], 0.95)       # the start would flatten the rest
    ax.set(xlabel='iteration (dotted: a removal begins)', ylabel='nats',
           ylim=(low - 0.1, high + 0.3 * (high - low)))
    ax.legend()
    fig.savefig(picture, dpi=120)
    print(f"written: {picture}")

if __name__ == '__main__':
    main()
