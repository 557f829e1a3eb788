"""
What the numbers say to people: the statistics of an evaluation, the table at the end of a removal, the model card, and
the loss curves.

    python report.py out.png RUN [RUN ...]      the curves, with the first run's removals marked; RUN: an out_dir
    python report.py FOLDER [NAME ...]          runs FOLDER/NAME.SEED against FOLDER/control.SEED: a table of all, a picture of each NAME
"""
import json
import os
import sys
from datetime import date

import numpy as np

from model import BadInput

COLOURS = {'ln_2': 'tab:orange', 'ln_1.qk': 'tab:green', 'ln_1.v': 'tab:red', 'ln_f': 'tab:purple', 'merge': 'tab:gray'}


def read_log(out_dir):
    """A run's log.jsonl, as a list. Raises BadInput if it is missing, damaged or holds no evaluation."""
    path = os.path.join(out_dir, 'log.jsonl')
    try:
        with open(path) as f:
            log = [json.loads(line) for line in f]
        if any(e['event'] == 'eval' and isinstance(e['val_loss'], float) for e in log):
            return log
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BadInput(f"{path} is missing, damaged or holds no evaluation: expected the log of a run")


def evals(out_dir):
    """[(iteration, validation loss)] of a run, from its log."""
    return [(e['iter'], e['val_loss']) for e in read_log(out_dir) if e['event'] == 'eval']

# -----------------------------------------------------------------------------
# An evaluation. The mean alone hides what matters in a model without LayerNorm: one that explodes on a few rare inputs
# has a mean of 130 and a median of 1.09 (GPT-2 XL on The Pile, arXiv 2507.02559).

def mean_and_error(losses):
    """losses (windows, T), NaN where nothing was predicted -> (mean, its standard error).

    The error treats a window, not a token, as one draw: the losses within a text go together, and counting each token as
    independent would understate it.
    """
    there = ~np.isnan(losses)
    n, sums = there.sum(1), np.where(there, losses, 0).sum(1, dtype=np.float64)
    mean, k = sums.sum() / n.sum(), (n > 0).sum()
    error = np.sqrt((np.square(sums - mean * n)).sum() * k / max(k - 1, 1)) / n.sum() if k > 1 else np.nan
    return mean, error


def number(x):
    return f"{x:.4f}" if np.isfinite(x) else '-'


def loss_table(named, unit):
    """named: {model: losses (windows, T)}, one or two of them -> a table of each, and of the first minus the second."""
    lines = [f"{'nats per ' + unit:<30}{unit + 's':>12}{'mean':>10}{'std. error':>12}{'median':>10}{'99.9%':>10}{'max':>10}"]
    if len(named) == 2:
        (a, x), (b, y) = named.items()
        named = named | {'difference, token by token': x - y}
    for name, losses in named.items():
        lines.append(name if len(name) < 30 else '...' + name[-26:])
        for label, part in (('all', losses), ('the first of a window', losses[:, :1]), ('2nd to 64th', losses[:, 1:64]), ('from the 65th on', losses[:, 64:])):
            values = part[~np.isnan(part)]
            if values.size:
                mean, error = mean_and_error(part)
                lines.append(f"  {label:<28}{values.size:>12,}{mean:>10.4f}{number(error):>12}" + ''.join(
                    f"{v:>10.4f}" for v in (*np.quantile(values, (0.5, 0.999)), values.max())))
    return '\n'.join(lines)

# -----------------------------------------------------------------------------
# The end of a removal.

def result_rows(out_dir, control):
    """[(name, validation loss, whether LayerNorm is left)]: before, the control where there is one, LN-free."""
    losses = evals(out_dir)
    rows = [('pre-trained', losses[0][1], True)]
    if control:
        it, loss = evals(control)[-1]
        rows.append(('control (LN kept)' + f', at {it}' * (it != losses[-1][0]), loss, True))
    return rows + [('LN-free', losses[-1][1], False)]


def result_table(out_dir, control, n_sites, unit):
    rows = result_rows(out_dir, control)
    lines = [f"{'':<28}{'val nats/' + unit:>16}{'gap to control':>16}{'LN sites left':>16}"]
    for name, loss, ln in rows:
        gap = f"{loss - rows[1][1]:+.4f}" if control and name != 'pre-trained' else ''
        lines.append(f"{name:<28}{loss:>16.4f}{gap:>16}{n_sites * ln:>16}")
    return '\n'.join(lines) + "\n(no control: run the same config with --remove_ln=False and another out_dir, and name that with --control)" * (not control)


def model_card(cfg, base, model, meta, unit, tokenizer):
    """README.md of the folder that is handed over: this run's facts.

    base: what the run began from: 'scratch', a hub id, or './NAME' for what is not on the hub. tokenizer: whether its
    files are there.
    """
    groups = {}
    for e in read_log(cfg.out_dir):
        if e['event'] == 'remove':
            groups.setdefault(e['site'].split('.', 2)[-1], []).append(e['iter'])
        elif e['event'] == 'merge':
            groups['constants of ' + {'eot': 'end-of-text', 'bos': 'position 0'}[e['kind']] + ' merged'] = [e['iter']]
    schedule = '; '.join(f"{g} at iteration{f's {i[0]} to {i[-1]}' if i[0] != i[-1] else f' {i[0]}'}" for g, i in groups.items())
    source = ' '.join(meta.get('source', [])) or cfg.dataset
    published = base != 'scratch' and not base.startswith('./')     # the hub links it; a path is nobody's business
    base = base.removeprefix('./')
    auto = '\ntokenizer = AutoTokenizer.from_pretrained(folder)' * tokenizer
    rows = '\n'.join(f"| {name} | {loss:.4f} |" for name, loss, _ in result_rows(cfg.out_dir, cfg.control))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, interpretability, layernorm-free]
{f'base_model: {base}' if published else '# base_model: not on the hub'}
---
# A GPT-2 without LayerNorm

{base if base != 'scratch' else 'A model trained from scratch'} with every LayerNorm removed by fine-tuning: the division of each by the token's own standard deviation was
replaced by a constant, one site after another ([arXiv 2409.13710](https://arxiv.org/abs/2409.13710)). The residual stream is read by
linear maps only, so the logits are an exact sum of what the embeddings, heads, MLPs and biases write.

| cross-entropy, nats per {unit}, validation split of {cfg.dataset} | |
|---|---|
{rows}

* **Model:** {model.config.n_layer} layers, {model.config.n_head} heads, width {model.config.n_embd}, context {model.config.block_size}, vocabulary {model.config.vocab_size}
* **Data:** {source} ({meta.get('tokenizer', 'unknown')} tokenizer); validation on {'all' if not cfg.eval_iters else cfg.eval_iters} windows of {model.config.block_size} {unit}s
* **Training:** {cfg.max_iters:,} iterations of {cfg.batch_tokens:,} {unit}s ({cfg.max_iters * cfg.batch_tokens:,}), learning rate {cfg.learning_rate:g}, seed {cfg.seed}, {date.today()}
* **Removal:** {schedule}{f'; each over {cfg.taper_iters} iterations' if cfg.taper_iters > 1 else ''}{'; all constants measured at the first' * cfg.measure_once}{f'; auxiliary loss {cfg.aux_loss_weight:g}' if cfg.aux_loss_weight else ''}

```python
from transformers import {'AutoTokenizer, ' * tokenizer}GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained(folder)     # this folder, or its name on the hub{auto}
```

transformers has no switch for "no LayerNorm": the modules are still there, but with `layer_norm_epsilon` 1e12 each divides by 1e6,
whatever the token, and its weight is scaled to match. Do not set another epsilon.
"""

# -----------------------------------------------------------------------------

def plot(path, runs):
    """Draws the runs' training losses (thin, smoothed) and validation losses (dots) into `path`."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    marked, values = set(), []
    for run in runs:
        log = read_log(run)
        train = [(e['iter'], e['loss']) for e in log if e['event'] == 'train']
        val = [(e['iter'], e['val_loss']) for e in log if e['event'] == 'eval']
        removes = [e for e in log if e['event'] == 'remove']
        label = 'LayerNorm removed' if removes else 'LayerNorm kept'
        if not train:
            raise BadInput(f"{run}/log.jsonl holds no training step: nothing to draw")
        width = max(len(train) // 6, 1)    # a moving average: one batch's loss says more of the batch than of the model
        smooth = [np.convolve(z, np.ones(width) / width, 'valid') for z in zip(*train)]
        line, = ax.plot(*smooth, lw=1, alpha=0.6, label=f'{label}: training, mean of {width} logged iterations')
        ax.plot(*zip(*val), 'o-', ms=4, color=line.get_color(), label=f'{label}: validation ({run})')
        values += [v for _, v in val] + list(smooth[1])
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


# -----------------------------------------------------------------------------
# Variants over seeds. A run and the control of its seed see the same batches, so the difference of their training losses
# has almost none of the batches' noise: it is the cost of the removal, iteration by iteration.

def variants(folder):
    """{NAME: {SEED: log}} of the runs FOLDER/NAME.SEED. Raises BadInput unless each seed has a control.SEED that reached the end."""
    found = {}
    for run in sorted(os.listdir(folder)):
        name, dot, seed = run.rpartition('.')
        if dot and seed.isdigit():
            found.setdefault(name, {})[int(seed)] = read_log(os.path.join(folder, run))
    controls = complete(found).get('control', {})
    if lacking := sorted({s for runs in found.values() for s in runs} - controls.keys()) or ['SEED'] * (not found):
        raise BadInput(f"{folder} holds no control.{lacking[0]} that reached the end: expected runs called NAME.SEED, and control.SEED for each seed")
    return found


def last(log):
    """(iteration, validation loss) of the last evaluation."""
    return [(e['iter'], e['val_loss']) for e in log if e['event'] == 'eval'][-1]


def complete(found):
    """Those of the runs that were evaluated as late as any of them."""
    end = max((last(log)[0] for runs in found.values() for log in runs.values()), default=0)
    return {name: {s: log for s, log in runs.items() if last(log)[0] == end} for name, runs in found.items()}


def difference(log, control):
    """(iterations, training loss of one run minus that of another), where both were logged."""
    a, b = ({e['iter']: e['loss'] for e in z if e['event'] == 'train'} for z in (log, control))
    both = sorted(a.keys() & b.keys())
    return np.array(both), np.array([a[i] - b[i] for i in both])


def variant_table(found):
    """A Markdown table: for each variant, over seeds, the validation loss, its gap to the control and the worst of the way there."""
    done, control = complete(found), found['control']
    lines = ['| variant | seeds | val loss | gap | over seeds | worst on the way |', '|---|---|---|---|---|---|']
    losses = {name: [last(log)[1] for log in runs.values()] for name, runs in done.items()}
    for name, runs in sorted(done.items(), key=lambda v: (v[0] != 'control', np.mean(losses[v[0]] or [np.inf]))):
        seeds = f'{len(runs)} of {len(found[name])}' if len(runs) < len(found[name]) else len(runs)
        if not runs:
            lines.append(f"| {name} | {seeds} | stopped before the end | | | |")
            continue
        gaps = [last(log)[1] - last(control[s])[1] for s, log in runs.items()]
        its, diff = (np.concatenate(z) for z in zip(*(difference(log, control[s]) for s, log in runs.items())))
        worst = '' if name == 'control' else f'{diff.max():+.2f} at {its[diff.argmax()]}'
        lines.append(f"| {name} | {seeds} | {np.mean(losses[name]):.4f} | {np.mean(gaps):+.4f} | {min(gaps):+.4f} to {max(gaps):+.4f} | {worst} |")
    return '\n'.join(lines)


def picture(path, name, found):
    """Draws into `path`, over tokens: a variant's training loss and its control's, their difference, and that after each kind of site."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    runs = complete(found)[name]
    if not runs:
        raise BadInput(f"no run of {name} reached the end: nothing to draw")
    control, log = {s: found['control'][s] for s in runs}, next(iter(runs.values()))
    events = [(e['iter'], e.get('site', 'x.merge').split('.', 2)[-1]) for e in log if e['event'] in ('remove', 'merge')]
    total = [e for e in log if e['event'] == 'eval'][-1]
    unit = total['tokens'] / total['iter'] / 1e6
    its = difference(log, next(iter(control.values())))[0]
    diffs = np.array([difference(log, control[s])[1] for s, log in runs.items()])
    fig, ax = plt.subplot_mosaic([['loss'] * 4, ['diff'] * 4, ['ln_2', 'ln_1.qk', 'ln_1.v', 'ln_f']], figsize=(9, 9), layout='constrained',
                                 height_ratios=[3, 3, 2])
    k = min(10, len(its))
    smooth = lambda z: np.convolve(z, np.ones(k) / k, 'valid')
    for label, logs, colour in (('LayerNorm removed', runs, 'tab:red'), ('LayerNorm kept', control, 'tab:blue')):
        loss = np.mean([[e['loss'] for e in log if e['event'] == 'train' and e['iter'] in set(its)] for log in logs.values()], 0)
        seeds = f' and {len(runs)} seeds' * (len(runs) > 1)
        ax['loss'].plot(smooth(its) * unit, smooth(loss), color=colour, lw=1.2, label=f'{label}, mean of {k} logged iterations{seeds}')
    ax['diff'].fill_between(its * unit, diffs.min(0), diffs.max(0), color='tab:red', alpha=0.25, lw=0)
    ax['diff'].plot(its * unit, diffs.mean(0), color='tab:red', lw=1)
    ax['diff'].axhline(0, color='gray', lw=0.8)
    high = np.quantile(diffs, 0.97)
    if diffs.max() > 5 * high > 0:      # such a spike would flatten the rest
        ax['diff'].set_ylim(top=1.5 * high)
        ax['diff'].set_title(f'peak {diffs.max():+.2f} at iteration {its[diffs.max(0).argmax()]}', fontsize=9)
    for panel in ('loss', 'diff'):
        for it, kind in events:
            ax[panel].axvline(it * unit, color=COLOURS[kind], lw=0.8, alpha=0.7, ls=':')
    for kind in ('ln_2', 'ln_1.qk', 'ln_1.v', 'ln_f'):      # each from the iteration before it to the next event
        for it, k in events:
            end = min([i for i, _ in events if i > it] + [it + 30])
            here = (its >= it - 1) & (its < end)
            if k == kind:
                ax[kind].plot(its[here] - it, diffs.mean(0)[here], color=COLOURS[kind], lw=1, marker='.', ms=3)
        ax[kind].set(title=f'{kind} removed', xlabel='iterations after')
        ax[kind].title.set_color(COLOURS[kind])
    ax['loss'].set(ylabel='training loss (nats)', title=name)
    ax['loss'].legend(fontsize=8)
    ax['diff'].set(xlabel='tokens (millions)', ylabel='removed minus kept,\nsame batches (nats)')
    ax['ln_2'].set_ylabel('removed minus kept')
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv or not argv:
        print(__doc__)
        return
    try:
        if os.path.isdir(argv[0]):
            found = variants(argv[0])
            if unknown := [name for name in argv[1:] if name not in found]:
                raise BadInput(f"{argv[0]} holds no run called {unknown[0]}.SEED; there are {', '.join(found)}")
            print(variant_table(found))
            for name in argv[1:]:
                picture(os.path.join(argv[0], f'{name}.png'), name, found)
            return
        if len(argv) < 2:
            raise BadInput(f"expected out.png RUN [RUN ...], got {argv[0]}")
        plot(argv[0], argv[1:])
    except (BadInput, OSError, ValueError, KeyError) as e:      # a folder that is not there, a picture of an unknown kind
        print(f"report.py: {e}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError:
        print("report.py: matplotlib is not installed: pip install matplotlib", file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
