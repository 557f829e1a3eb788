"""demo.py with constants E[sigma^2] / E[sigma] instead of E[sigma]: a fork in a config file."""
from pathlib import Path as _Path

import __main__ as _train       # train.py
import torch as _torch

exec(_Path(__file__).with_name('demo.py').read_text())

def _measure(model, forward, batches):
    """One process, constants for ordinary tokens."""
    model.eval()
    with _torch.no_grad():
        stds = [_torch.stack(forward(x)[2])[:, model.kinds(x) == 0].double() for x, _ in batches]
    stds = _torch.cat(stds, 1)                                  # (n_LN, tokens)
    return (stds.square().mean(1) / stds.mean(1))[:, None].expand(-1, 3)

_train.measure = _measure
