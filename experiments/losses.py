"""
One model on a val.bin, or two token by token: what a mean hides.

    python experiments/losses.py DATASET MODEL [ANOTHER]        DATASET as for train.py

Prints for each model the losses in nats by place in the window, with quantiles, the expected
calibration error (arXiv 1706.04599) and the prediction's entropy. Of two it adds the difference of
the losses and how near the second is to the first: KL(first || second) and the Jensen-Shannon
divergence in nats per token, and the share of tokens with the same likeliest next token. A model's
windows are the first one's, whole and without overlap; 80 bytes a token are kept.
"""
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from model import GPT2, check, command          # noqa: E402

@torch.no_grad()
def measured(models, ids, most=None, batch=8):
    """One or two models on token ids (n,) -> {name: (windows, T) float32}.

    For each model i: 'loss i', 'entropy i', 'confidence i' (the largest probability), 'right i'
    (whether that token came). For two also 'kl', 'jsd' and 'same'.
    """
    T, found = models[0].config.block_size, {}
    device = models[0].wte.weight.device
    starts = np.arange((len(ids) - 1) // T)[:most] * T
    for some in np.split(starts, range(batch, len(starts), batch)):
        rows = torch.from_numpy(np.stack([ids[s:s + T + 1] for s in some]).astype(np.int64))
        x, y = rows[:, :-1].to(device), rows[:, 1:].to(device)
        logs = [model(x)[0].float().log_softmax(-1) for model in models]        # (B, T, vocab)
        part = {}
        for i, log in enumerate(logs):
            top = log.max(-1)
            part |= {f'loss {i}': -log.gather(-1, y[..., None])[..., 0],
                     f'entropy {i}': -(log.exp() * log).sum(-1),
                     f'confidence {i}': top.values.exp(), f'right {i}': (top.indices == y).float()}
        if len(logs) == 2:
            a, b = logs
            mean = torch.logaddexp(a, b) - np.log(2)
            part['kl'] = (a.exp() * (a - b)).sum(-1)
            part['jsd'] = (a.exp() * (a - mean) + b.exp() * (b - mean)).sum(-1) / 2
            part['same'] = (a.argmax(-1) == b.argmax(-1)).float()
        for name, values in part.items():
            found.setdefault(name, []).append(values.cpu().numpy())
    return {name: np.concatenate(values) for name, values in found.items()}

def mean_and_error(table):
    """(windows, T) -> (mean, its standard error). A window, not a token, is one draw."""
    means = table.mean(1, dtype=np.float64)
    return means.mean(), means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else np.nan

def calibration(confidence, right):
    """The expected calibration error, over 15 bins of the largest probability."""
    bins = np.minimum((confidence * 15).astype(int), 14).ravel()
    return np.abs(np.bincount(bins, (confidence - right).ravel(), 15)).sum() / bins.size

def row(name, part):
    numbers = [*mean_and_error(part), *np.quantile(part, (0.5, 0.999)), part.max()]
    return f'  {name:<28}{part.size:>12,}' + ''.join(f'{n:>12.4f}' for n in numbers)

@command
def main(argv):
    check(2 <= len(argv) <= 3, f"got {' '.join(argv)}; expected DATASET MODEL [ANOTHER]")
    dataset, *names = argv
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    models = [GPT2.from_pretrained(name).eval().to(device) for name in names]
    ids = np.fromfile(os.path.join('data', dataset, 'val.bin'), np.uint16)
    check(len({m.config.vocab_size for m in models}) == 1, "the models have unlike vocabularies")
    check(len(ids) > models[0].config.block_size, f"data/{dataset}/val.bin is no longer than a "
                                                  f"window")
    found = measured(models, ids)
    head = ('tokens', 'mean', 'std. error', 'median', '99.9%', 'max')
    print(f"{'nats per token':<30}" + ''.join(f'{h:>12}' for h in head))
    losses = {name: found[f'loss {i}'] for i, name in enumerate(names)}
    if len(names) == 2:
        losses['second minus first'] = found['loss 1'] - found['loss 0']
        losses['KL(first || second)'] = found['kl']
        losses['Jensen-Shannon divergence'] = found['jsd']
    for name, table in losses.items():
        print(f'{name}\n' + row('all', table))
        for place, part in (('the first of a window', table[:, :1]),
                            ('2nd to 64th', table[:, 1:64]), ('from the 65th on', table[:, 64:])):
            if part.size and name in names:
                print(row(place, part))
    for i, name in enumerate(names):
        ece = calibration(found[f'confidence {i}'], found[f'right {i}'])
        print(f"{name}: calibration error {ece:.4f}, entropy {found[f'entropy {i}'].mean():.4f}")
    if len(names) == 2:
        print(f"same likeliest next token: {found['same'].mean():.2%}")

if __name__ == '__main__':
    main()
