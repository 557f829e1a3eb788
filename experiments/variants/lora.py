"""
LoRA (arXiv 2106.09685), as a fork in a config file: fast.py, but all weights are frozen, and beside
each linear layer of the blocks an adapter of rank LORA_RANK (environment; 64) is trained.

The model holds W = W0 + 2 B A, so ckpt.pt and hf/ are merged, and W's gradient gives A and B
theirs. The optimizer's state keeps A, B and W0: a run resumes exactly.
"""
import os as _os
from pathlib import Path as _Path

import __main__ as _train       # train.py
import torch as _torch

exec(_Path(__file__).with_name('fast.py').read_text())

class _LoRA(_torch.optim.AdamW):

    def __init__(self, cfg, model):
        self.model, self.layers = model, []
        _torch.manual_seed(cfg.seed)
        for W in (m.weight for m in model.h.modules() if isinstance(m, _torch.nn.Linear)):
            A = W.new_empty(int(_os.environ.get('LORA_RANK', 64)), W.shape[1])
            _torch.nn.init.uniform_(A, -W.shape[1] ** -0.5, W.shape[1] ** -0.5)
            self.layers.append((W, W.detach().clone(), A, W.new_zeros(len(W), len(A))))
        adapters = [x for _, _, A, B in self.layers for x in (A, B)]
        super().__init__(adapters, cfg.learning_rate, (cfg.beta1, cfg.beta2), weight_decay=0)

    @_torch.no_grad()
    def step(self):
        for W, W0, A, B in self.layers:
            A.grad, B.grad = 2 * B.T @ W.grad, 2 * W.grad @ A.T
        super().step()
        for W, W0, A, B in self.layers:
            W.copy_(W0 + 2 * B @ A)
            self.state[A] |= {'W0': W0, 'A': A, 'B': B}

    @_torch.no_grad()
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for _, *own in self.layers if self.state else ():
            for x, name in zip(own, ('W0', 'A', 'B')):
                x.copy_(self.state[own[1]][name])

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad()

_train.make_optimizer = _LoRA
