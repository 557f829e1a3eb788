"""
GPT-2 whose LayerNorm can be taken out. The whole model, in one file: the LayerNorm switch first, then the
transformer around it, then folding, loading and saving.

    model = GPT2.from_pretrained('gpt2', ln_mode='fake')   # a hub id, a Hugging Face folder, or a run's out_dir
    logits, loss = model(idx, targets)                     # idx, targets: (B, T) int64

    python model.py MODEL FOLDER [--folded]     # writes it as a new Hugging Face folder, its LayerNorm folded away if asked
                                                # (a folder without LayerNorm is folded as it is loaded, asked or not)

`ln_mode` says what stands where GPT-2 has a LayerNorm:
    'real'   LayerNorm, numerically GPT-2's
    'fake'   LayerNorm with a gate at every site: 0 divides by the token's own std, 1 by a frozen constant
    'none'   nothing. The constants are folded into the weights; no LN operation and no LN parameter is left

The method: Heimersheim 2024, arXiv 2409.13710, and Baroni et al. 2025, arXiv 2507.02559.
"""
import json
import math
import os
import re
import shlex
import shutil
import sys
import zipfile
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class BadInput(ValueError):
    """Something a person can mend. The scripts print it as one line and exit with status 2."""


@dataclass
class GPT2Config:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    ln_mode: str = 'real'               # 'real', 'fake' or 'none'
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True    # lm_head shares wte's weight ('none' never does: folding unties it)
    eot_token_id: int | None = None     # end-of-text; None: the vocabulary's last token, as in GPT-2

    def __post_init__(self):
        if self.ln_mode not in ('real', 'fake', 'none'):
            raise BadInput(f"ln_mode is {self.ln_mode!r}; expected 'real', 'fake' or 'none'")
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise BadInput(f"{name} is {value!r}; expected a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd is {self.n_embd}, n_head {self.n_head}; expected n_embd to be a multiple of n_head")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is {self.dropout}; expected a number from 0 up to 1")
        if self.ln_mode == 'none':
            self.tie_word_embeddings = False
        if self.eot_token_id is None:
            self.eot_token_id = self.vocab_size - 1

# -----------------------------------------------------------------------------
# The LayerNorm switch.
#
#   real LN      y = (x - mean(x)) / sigma(x) * w + b          sigma(x) = sqrt(var(x) + eps), one number a token
#   removed LN   y = (x - mean(x)) / s        * w + b          s: a frozen constant, so y is affine in x
#   in between   y = (x - mean(x)) * ((1-g)/sigma(x) + g/s) * w + b                 g in [0, 1]: the site's gate
#
# The third line, with the first one's y called LN(x), is  y = b + r (LN(x) - b),  r = (1-g) + g sigma(x)/s: PyTorch's
# own LayerNorm once, whoever reads it, then one number a token. At g = 0 r is 1 and y is LN(x) to the last bit.
#
# s depends on the kind of token. Trained GPT-2s park a huge vector at position 0 and at end-of-text; one constant
# for all tokens would break them. Late in a removal the special constants are set equal to the ordinary one.
#
# ln_1 is read twice, by queries/keys and by values, and the two sides are removed at different times: two gates.
# Gates and constants are buffers: they travel in the state dict, and torch.compile treats them as data, so that
# moving a gate changes no graph.

TOKEN, BOS, EOT = 0, 1, 2           # kinds of token: ordinary; position 0; end-of-text (also at position 0)
KINDS = ('token', 'bos', 'eot')
HF_EPS = 1e12                       # the published LN-free models' layer_norm_epsilon: sqrt(var + 1e12) is just 1e6


class LayerNorm(nn.Module):

    def __init__(self, config, sides=('',)):
        super().__init__()
        self.mode, self.eps, self.sides = config.ln_mode, config.layer_norm_epsilon, sides
        if self.mode != 'none':
            self.weight = nn.Parameter(torch.ones(config.n_embd))
            self.bias = nn.Parameter(torch.zeros(config.n_embd))
        if self.mode == 'fake':         # on the CPU even where the parameters are made on 'meta' (see _build)
            self.register_buffer('gate', torch.zeros(len(sides), device='cpu'))
            self.register_buffer('std', torch.ones(len(KINDS), device='cpu'))

    def sigma(self, x):
        return (x.var(-1, correction=0) + self.eps).sqrt()

    def forward(self, x, kind=None, stds=None):
        """x (B, T, C) -> a list with one (B, T, C) tensor for each side that reads this LN.

        kind (B, T), the kinds of token, is needed by 'fake' only. stds: a list to which sigma(x) (B, T) is added.
        """
        if stds is not None and self.mode != 'none':
            stds.append(self.sigma(x))
        if self.mode == 'none':
            return [x] * len(self.sides)
        if self.mode == 'real':
            return [F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)] * len(self.sides)
        y = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)                     # (B, T, C)
        ratio = self.sigma(x) / self.std[kind]                                                  # (B, T)
        return [torch.lerp(self.bias, y, ((1 - g) + g * ratio).unsqueeze(-1)) for g in self.gate]

# -----------------------------------------------------------------------------
# The transformer: GPT-2, with nanoGPT's names.

class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x_qk, x_v):
        B, T, C = x_qk.shape
        if x_qk is x_v:
            q, k, v = self.c_attn(x_qk).split(C, dim=2)
        else:   # each side's own version of ln_1 meets its own rows of the projection: the same work, cut in two
            (w_qk, w_v), (b_qk, b_v) = (p.split([2 * C, C]) for p in (self.c_attn.weight, self.c_attn.bias))
            q, k = F.linear(x_qk, w_qk, b_qk).split(C, dim=2)
            v = F.linear(x_v, w_v, b_v)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        # GPT-2 uses the tanh form of GELU; the exact one is off by up to 5e-4 a unit, which its logits show
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config, sides=('.qk', '.v'))
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, kind, stds):
        x = x + self.attn(*self.ln_1(x, kind, stds))
        x = x + self.mlp(*self.ln_2(x, kind, stds))
        return x


def cross_entropy(logits, targets):
    """The mean over targets that are not -1: logits (B, T, vocab), targets (B, T) -> a scalar, in float32.

    Logits in bfloat16 are turned into float32 one sequence at a time, and again in the backward pass: all of them at
    once would be the largest tensors of a step. (Compiled, the conversion is fused into the kernels that read them.)
    """
    if logits.dtype == torch.float32 or torch.compiler.is_compiling():
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    row = lambda z, y: F.cross_entropy(z.float(), y, ignore_index=-1, reduction='sum')
    return sum(checkpoint(row, z, y, use_reentrant=False) for z, y in zip(logits, targets)) / (targets != -1).sum()


class GPT2(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False     # in training, keep a block's input only and compute the rest of it again
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config)
        # a bias on the unembedding only where ln_f's has been folded into it
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.ln_mode == 'none')
        self._tie()
        for name, p in self.named_parameters():     # GPT-2's initialisation
            if name.endswith('c_proj.weight'):      # 2 * n_layer branches add up in the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def _tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    def kinds(self, idx):
        """The kind of each token, TOKEN, BOS or EOT: idx (B, T) -> (B, T) int64."""
        first = torch.arange(idx.shape[1], device=idx.device) == 0
        return torch.where(idx == self.config.eot_token_id, EOT, torch.where(first, BOS, TOKEN))

    def forward(self, idx, targets=None, return_stds=False):
        """idx (B, T) int64 -> logits (B, T, vocab) and the mean cross-entropy in nats, None without targets.

        Targets of -1 are left out of the mean. With `return_stds`, a third value: for each LN in the order of
        `layernorms()`, sigma of its input, (B, T), differentiable (in training with gradient_checkpointing, ln_f's only).
        Raises BadInput if T exceeds block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise BadInput(f"got {T} tokens; the model's context (block_size) is {self.config.block_size}")
        kind = self.kinds(idx) if self.config.ln_mode == 'fake' else None
        stds = [] if return_stds else None
        x = self.drop(self.wte(idx) + self.wpe.weight[:T])      # (B, T, C)
        for block in self.h:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, kind, None, use_reentrant=False)
            else:
                x = block(x, kind, stds)
        logits = self.lm_head(*self.ln_f(x, kind, stds))
        loss = None
        if targets is not None:
            loss = cross_entropy(logits, targets)
        return (logits, loss, stds) if return_stds else (logits, loss)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Samples max_new_tokens after idx (B, T) int64 -> (B, T + max_new_tokens); temperature 0 is greedy."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1].float()
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = -math.inf
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, -1), 1)
            idx = torch.cat((idx, new), 1)
        return idx

    def num_params(self):
        """Parameters, the tied unembedding counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """FLOPs of one training step per token, forward and backward: 6N + 12LCT (PaLM, arXiv 2204.02311, app. B).

        N: the parameters that multiply, so the embeddings only where they unembed.
        """
        c = self.config
        n = self.num_params() - self.wpe.weight.numel() - (0 if c.tie_word_embeddings else self.wte.weight.numel())
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size):
        """Shortens the context to block_size tokens, by dropping the last position embeddings."""
        if block_size > self.config.block_size:
            raise BadInput(f"block_size is {block_size}; the model's context is {self.config.block_size} tokens: "
                           f"type --block_size={self.config.block_size} or less")
        self.config.block_size = self.wpe.num_embeddings = block_size
        self.wpe.weight = nn.Parameter(self.wpe.weight[:block_size].detach().clone())

    # -------------------------------------------------------------------------
    # Sites: one for each reader of an LN, 3 * n_layer + 1 in all.

    def layernorms(self):
        """{name: LayerNorm}, in the order in which the forward pass meets them."""
        return {name: m for name, m in self.named_modules() if isinstance(m, LayerNorm)}

    def sites(self):
        """{site: its gate}, in the same order: h.0.ln_1.qk, h.0.ln_1.v, h.0.ln_2, ..., ln_f.

        A gate is a 0-d view of the LN's buffer, so `.fill_(1)` removes the site. Needs ln_mode 'fake'.
        """
        if self.config.ln_mode != 'fake':
            raise BadInput(f"a model with ln_mode {self.config.ln_mode!r} has no gates; load it with ln_mode='fake'")
        return {name + side: ln.gate[i] for name, ln in self.layernorms().items() for i, side in enumerate(ln.sides)}

    def _obstacle(self):
        """Why this 'fake' model is not LN-free yet, or ''."""
        left = [site for site, gate in self.sites().items() if gate != 1]
        if left:
            return f"{len(left)} of {len(self.sites())} sites still divide by the token's own std, {left[0]} first"
        special = [name for name, ln in self.layernorms().items() if (ln.std != ln.std[TOKEN]).any()]
        if special:
            return f"{special[0]} still has constants of its own for position 0 or end-of-text"
        return ''

    @torch.no_grad()
    def fold_ln(self):
        """The same function as a new 'none' model: every LN absorbed by the linear layer (W, c) that reads it.

            W ((x - mean(x)) / s * w + b) + c  =  W' x + c'
            W' = (W * w / s) minus its row mean,   c' = c + W b

        (Taking out W's row mean is subtracting x's mean.) Computed in float64, returned in the weights' own dtype.
        Raises BadInput while a gate is below 1 or a LN has more than one constant.
        """
        why = 'it has LayerNorm (ln_mode real)' if self.config.ln_mode == 'real' else \
              'it is folded already' if self.config.ln_mode == 'none' else self._obstacle()
        if why:
            raise BadInput(f'this model cannot be folded: {why}')
        sd = {k: v.clone() for k, v in self.state_dict().items()}
        for name, reader in self._readers():
            w, b, std, _ = (sd.pop(f'{name}.{p}').double() for p in ('weight', 'bias', 'std', 'gate'))
            W = sd[f'{reader}.weight'].double()
            Ws = W * (w / std[TOKEN])
            c = sd.get(f'{reader}.bias', W.new_zeros(len(W))).double()
            dtype = sd[f'{reader}.weight'].dtype
            sd[f'{reader}.weight'] = (Ws - Ws.mean(1, keepdim=True)).to(dtype)
            sd[f'{reader}.bias'] = (c + W @ b).to(dtype)
        return self._build(replace(self.config, ln_mode='none'), sd, 'the model').train(self.training)

    def _readers(self):
        """(LN, the linear layer that reads it), by name."""
        for i in range(self.config.n_layer):
            yield f'h.{i}.ln_1', f'h.{i}.attn.c_attn'
            yield f'h.{i}.ln_2', f'h.{i}.mlp.c_fc'
        yield 'ln_f', 'lm_head'

    # -------------------------------------------------------------------------
    # Loading and saving. A Hugging Face folder is config.json + model.safetensors, under OpenAI's names, which are
    # ours, with the four projections of a block transposed (there a Conv1D, here a Linear).

    CONV1D = re.compile(r'(c_attn|c_proj|c_fc)\.weight$')

    @classmethod
    def from_pretrained(cls, name_or_dir, ln_mode=None, dropout=0.0):
        """Loads a hub id ('gpt2', 'gpt2-medium', ...), a folder in Hugging Face layout, or a run's out_dir.

        ln_mode None keeps what is there. A folder in the published LN-free convention (layer_norm_epsilon 1e12, LN
        weights scaled to match) has no LayerNorm, whatever its modules are called: it loads as 'none'.
        Nothing that is loaded can run code: safetensors, or torch.load with weights_only.
        Raises BadInput if there is nothing of that name, or it is not a GPT-2, or it cannot be had in that ln_mode.
        """
        name_or_dir = os.fspath(name_or_dir)
        if os.path.exists(os.path.join(name_or_dir, 'ckpt.pt')):
            ckpt = load_checkpoint(name_or_dir)
            return cls.from_state(ckpt['model_args'], ckpt['model'], os.path.join(name_or_dir, 'ckpt.pt'), ln_mode, dropout)
        folder = name_or_dir if os.path.isdir(name_or_dir) else _from_hub(name_or_dir)
        args = _read_config(folder)
        sd = _read_safetensors(folder)
        ln_free = args['layer_norm_epsilon'] >= 1e6
        sd = {k.removeprefix('transformer.'): v for k, v in sd.items()}
        sd = {k: v for k, v in sd.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}   # causal masks
        sd = {k: v.t() if cls.CONV1D.search(k) and v.dim() == 2 else v for k, v in sd.items()}
        if args['tie_word_embeddings'] and 'wte.weight' in sd:
            sd['lm_head.weight'] = sd['wte.weight']
        if not ln_free:
            return cls.from_state(args, sd, folder, ln_mode, dropout)
        # dividing by sqrt(var + 1e12) is dividing by the constant 1e6: a removed LN, ready to be folded
        std = math.sqrt(args.pop('layer_norm_epsilon'))
        model = cls.from_state(args, sd, folder, 'fake', dropout)
        for ln in model.layernorms().values():
            ln.gate.fill_(1)
            ln.std.fill_(std)
        if ln_mode in ('real', 'fake'):
            raise BadInput(f"{name_or_dir} holds a model without LayerNorm (layer_norm_epsilon {std ** 2:g}): there is "
                           f"none left to remove or restore; load it with ln_mode='none'")
        return model.fold_ln()

    @classmethod
    def from_state(cls, model_args, sd, source, ln_mode=None, dropout=0.0):
        """A model from GPT2Config's fields and a state dict, turned into ln_mode where that changes no logit."""
        try:
            config = GPT2Config(**{**model_args, 'dropout': dropout})
        except TypeError as e:
            raise BadInput(f"{source} is a checkpoint of another architecture: {e}")
        sd = {k: v.float() for k, v in sd.items()}
        here, want = config.ln_mode, ln_mode or config.ln_mode
        if here == 'fake' and want == 'real' and not any(v.any() for k, v in sd.items() if k.endswith('.gate')):
            sd = {k: v for k, v in sd.items() if not k.endswith(('.gate', '.std'))}
        elif here == 'fake' and want == 'none':
            return cls._build(config, sd, source).fold_ln()
        elif here != want and (here, want) != ('real', 'fake'):
            raise BadInput(f"{source} has ln_mode {here!r} and cannot be loaded as {want!r}")
        return cls._build(replace(config, ln_mode=want), sd, source, fresh_gates=here == 'real')

    @classmethod
    def _build(cls, config, sd, source, fresh_gates=False):
        """A model with the tensors of sd, and no memory spent before every name and shape has been checked."""
        last = f'h.{config.n_layer - 1}.attn.c_attn.weight'
        if last not in sd:      # before a billion layers are made of a config that says so
            raise BadInput(f"{source}: the weights lack {last}, but the config says n_layer {config.n_layer}")
        try:
            with torch.device('meta'):
                model = cls(config)
        except (RuntimeError, TypeError) as e:
            raise BadInput(f"{source}: no model can have this configuration: {str(e).splitlines()[0]}")
        sd, expected = sd | (dict(model.named_buffers()) if fresh_gates else {}), model.state_dict()
        if missing := sorted(expected.keys() - sd.keys()):
            raise BadInput(f"{source}: the weights lack {missing[0]} ({len(missing)} tensors missing)")
        if unexpected := sorted(sd.keys() - expected.keys()):
            raise BadInput(f"{source}: unexpected tensor {unexpected[0]}: not a GPT-2 of this configuration")
        for name, t in expected.items():
            if sd[name].shape != t.shape:
                raise BadInput(f"{source}: {name} has shape {list(sd[name].shape)}, expected {list(t.shape)}")
        model.load_state_dict({k: v.contiguous() for k, v in sd.items()}, assign=True)
        model.requires_grad_(True)
        model._tie()        # assigning gave wte and lm_head a parameter each
        return model

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Writes config.json, generation_config.json and model.safetensors, which transformers' GPT2LMHeadModel loads as it is.

        Without LayerNorm it keeps its LN modules, in the published convention: epsilon 1e12, so that each divides by
        1e6 whatever the token, and weights scaled by 1e6 / s. There is one epsilon for the whole model, so a model
        with some sites removed and others not cannot be written; nor can a 'none' model that was trained after
        folding, because it may read the residual stream's mean, which those modules subtract: BadInput says so.
        """
        c, sd = self.config, {k: v.detach().cpu() for k, v in self.state_dict().items()}
        ones, ln_free = torch.ones(c.n_embd), c.ln_mode == 'none'
        if c.ln_mode == 'fake' and any(self.sites().values()):
            if why := self._obstacle():
                raise BadInput(f"cannot be written in Hugging Face layout: {why}, and transformers has one epsilon for "
                               f"all LayerNorms. Finish the removal first; ckpt.pt holds any stage")
            ln_free = True
            for name in self.layernorms():
                sd[f'{name}.weight'] = sd[f'{name}.weight'] * (math.sqrt(HF_EPS) / sd[f'{name}.std'][TOKEN])
        if c.ln_mode == 'none':
            for name, reader in self._readers():
                W = sd[f'{reader}.weight'].double()
                if (W.sum(1).abs() > 1e-4 * W.norm(dim=1) * math.sqrt(c.n_embd)).any():
                    raise BadInput(f"cannot be written in Hugging Face layout: {reader} reads the mean of the residual "
                                   f"stream, which transformers' LayerNorm subtracts; ckpt.pt holds it")
                sd[f'{name}.weight'], sd[f'{name}.bias'] = ones * math.sqrt(HF_EPS), ones * 0
            # transformers' lm_head has no bias. Its rows have mean zero and meet vectors of mean zero, so a constant u
            # added to a row changes nothing, until ln_f adds 1 to each of the C entries: then it adds C u. u = bias / C.
            sd['ln_f.bias'] = ones
            sd['lm_head.weight'] = sd['lm_head.weight'] + sd.pop('lm_head.bias')[:, None] / c.n_embd
        if c.tie_word_embeddings:
            del sd['lm_head.weight']
        sd = {k if k == 'lm_head.weight' else f'transformer.{k}': (v.t() if self.CONV1D.search(k) else v).contiguous()
              for k, v in sd.items() if not k.endswith(('.gate', '.std'))}
        config = {
            'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'activation_function': 'gelu_new',
            'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd, 'n_positions': c.block_size,
            'vocab_size': c.vocab_size, 'layer_norm_epsilon': HF_EPS if ln_free else c.layer_norm_epsilon,
            'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout, 'attn_pdrop': c.dropout,
            'bos_token_id': c.eot_token_id, 'eos_token_id': c.eot_token_id,
            'tie_word_embeddings': c.tie_word_embeddings, 'dtype': 'float32'}
        from safetensors.torch import save_file
        os.makedirs(folder, exist_ok=True)
        tmp = os.path.join(folder, 'tmp')   # a name means a complete file: write aside, then rename
        save_file(sd, tmp, metadata={'format': 'pt'})
        os.replace(tmp, os.path.join(folder, 'model.safetensors'))
        generation = {k: config[k] for k in ('bos_token_id', 'eos_token_id')}
        for name, content in (('generation_config.json', generation), ('config.json', config)):
            with open(tmp, 'w') as f:
                json.dump(content, f, indent=2)
            os.replace(tmp, os.path.join(folder, name))


TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.json', 'merges.txt')


def export(model, folder, files={}):
    """save_pretrained into a new folder, with `files` {name: bytes} beside: all of it, or nothing.

    Raises BadInput if the folder is there already: somebody may have uploaded or edited it.
    """
    from safetensors import SafetensorError
    if os.path.exists(folder):
        raise BadInput(f"{folder} exists already: choose another name, or move it away first")
    tmp = f"{folder.rstrip('/')}.{os.getpid()}.partial"
    try:
        os.makedirs(tmp)
        model.save_pretrained(tmp)
        for name, content in files.items():
            with open(os.path.join(tmp, name), 'wb') as f:
                f.write(content)
        os.rename(tmp, folder)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{folder} cannot be written: {e}")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@torch.no_grad()
def first_bad_token(model, ids):
    """The index of the first token of ids (T,) with which a logit is NaN or infinite; None if all are finite.

    Attention multiplies what is to come by zero, and zero times NaN is NaN: one bad token shows at every position
    before it too. So prefixes are tried, by bisection.
    """
    bad = lambda n: not model(ids[None, :n])[0].float().isfinite().all()
    if not bad(len(ids)):
        return None
    low, high = 0, len(ids)     # a prefix of low tokens is good, one of high is bad
    while high - low > 1:
        low, high = (low, (low + high) // 2) if bad((low + high) // 2) else ((low + high) // 2, high)
    return low


CHECKPOINT, PREVIOUS = 'ckpt.pt', 'ckpt.prev.pt'


def save_checkpoint(out_dir, model, **extra):
    """Writes out_dir/ckpt.pt: `model_args`, `model` and what else is given; tensors and plain values only.

    The checkpoint that was there stays as ckpt.prev.pt. At any instant ckpt.pt is a complete file, the old or the new.
    Raises BadInput if it cannot be written.
    """
    path, previous, tmp, link = (os.path.join(out_dir, n) for n in (CHECKPOINT, PREVIOUS, '.ckpt.tmp', '.ckpt.link'))
    try:
        for leftover in filter(os.path.exists, (tmp, link)):    # of a run that was killed here
            os.remove(leftover)
        with open(tmp, 'wb') as f:
            torch.save({'model_args': asdict(model.config), 'model': model.state_dict(), **extra}, f)
            f.flush()
            os.fsync(f.fileno())    # on the disk before it has the name
        if os.path.exists(path):
            try:
                os.link(path, link)     # a second name first, so that the first is never without a file
                os.replace(link, previous)
            except OSError:             # a file system without links
                os.replace(path, previous)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:    # torch tells of a full disk by either
        raise BadInput(f"{path} cannot be written ({str(e).splitlines()[0]}); what was there before is intact")
    finally:
        for leftover in filter(os.path.exists, (tmp, link)):
            os.remove(leftover)


def load_checkpoint(out_dir, name=CHECKPOINT):
    """The dictionary that save_checkpoint wrote, on the CPU. Raises BadInput if it is missing or damaged."""
    path, other = os.path.join(out_dir, name), os.path.join(out_dir, PREVIOUS)
    try:
        with zipfile.ZipFile(path) as z:
            if damaged := z.testzip():      # torch does not look at the checksums itself
                raise zipfile.BadZipFile(damaged)
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
        if not all(torch.is_tensor(v) for v in ckpt['model'].values()) or not isinstance(ckpt['model_args'], dict):
            raise TypeError
        return ckpt
    except FileNotFoundError:
        problem = f"no checkpoint {path}: expected an out_dir in which train.py saved one"
    except Exception as e:      # damage has many names: BadZipFile, RuntimeError, EOFError, UnpicklingError, KeyError
        problem = f"{path} is damaged or not a checkpoint of this project ({type(e).__name__})"
    if name == CHECKPOINT and os.path.exists(other):
        try:
            it = load_checkpoint(out_dir, PREVIOUS).get('iter')
            problem += f"; the one before it, of iteration {it}, is intact: type mv {shlex.quote(other)} {shlex.quote(path)} to go back to it"
        except BadInput:
            problem += f"; and so is {other}"
    raise BadInput(problem)


def _from_hub(name):
    """Downloads a hub model's config and weights into the Hugging Face cache; returns the folder."""
    from huggingface_hub import snapshot_download
    nothing = f"{name} names nothing: no folder here"
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
        raise BadInput(f"{nothing}, and not a hub id")
    try:
        return snapshot_download(name, allow_patterns=['config.json', 'model*.safetensors*', *TOKENIZER_FILES])
    except Exception as e:      # the many ways of not being there: offline, unknown, private, a typing error
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise BadInput(f"{nothing}, and not to be had from the Hugging Face hub ({reason})")


def _read_config(folder):
    """GPT2Config's fields from a Hugging Face folder's config.json."""
    path = os.path.join(folder, 'config.json')
    try:
        with open(path) as f:
            hf = json.load(f)
        args = dict(block_size=hf.get('n_positions', hf.get('n_ctx')), layer_norm_epsilon=hf.get('layer_norm_epsilon', 1e-5),
                    tie_word_embeddings=hf.get('tie_word_embeddings', True), **{k: hf[k] for k in ('vocab_size', 'n_layer', 'n_head', 'n_embd')})
        GPT2Config(**args)
        if not args['layer_norm_epsilon'] > 0 or not isinstance(args['tie_word_embeddings'], bool):
            raise ValueError('layer_norm_epsilon or tie_word_embeddings')
    except FileNotFoundError:
        raise BadInput(f"{folder} has no config.json (nor a ckpt.pt): expected a Hugging Face folder or a run's out_dir")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f"{path} is not a GPT-2's config.json ({type(e).__name__}: {e})")
    # what would change the computation, with the values that this model has
    for key, good in [('model_type', ('gpt2',)), ('activation_function', ('gelu_new', 'gelu_pytorch_tanh')),
                      ('n_inner', (None, 4 * args['n_embd'])), ('scale_attn_weights', (True,)),
                      ('scale_attn_by_inverse_layer_idx', (False,)), ('add_cross_attention', (False,))]:
        if hf.get(key, good[0]) not in good:
            raise BadInput(f"{path}: {key} is {hf[key]!r}; this is a model of another architecture, expected {good[0]!r}")
    eot = hf.get('eos_token_id')
    args['eot_token_id'] = eot if isinstance(eot, int) and 0 <= eot < args['vocab_size'] else None
    return args


def _read_safetensors(folder):
    """{name: tensor} of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    from safetensors.torch import load_file
    index, files = os.path.join(folder, 'model.safetensors.index.json'), ['model.safetensors']
    try:
        if os.path.exists(index):
            with open(index) as f:
                files = sorted({os.path.basename(name) for name in json.load(f)['weight_map'].values()})
        return {k: v for name in files for k, v in load_file(os.path.join(folder, name)).items()}
    except FileNotFoundError as e:
        raise BadInput(f"{folder} has no model.safetensors (pickled weights are not read): {e}")
    except Exception as e:      # safetensors raises a type of its own, and the index may be any JSON
        raise BadInput(f"{folder}: damaged weights: {type(e).__name__} {e}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv or not argv:
        print(__doc__)
        return
    try:
        names = [a for a in argv if a != '--folded']
        if len(names) != 2 or any(a.startswith('--') for a in names):
            raise BadInput(f"expected MODEL FOLDER [--folded], got {' '.join(argv)}")
        source, folder = names
        source = source if os.path.isdir(source) else _from_hub(source)
        model = GPT2.from_pretrained(source, 'none' if '--folded' in argv else None)
        # the tokenizer's files, where the source has them; a run's lie in its hf/, and its model card too
        hf = os.path.join(source, 'hf')
        beside = [os.path.join(d, f) for d in (source, hf) for f in TOKENIZER_FILES] + [os.path.join(hf, 'README.md')]
        files = {}
        for path in filter(os.path.isfile, beside):
            with open(path, 'rb') as f:
                files.setdefault(os.path.basename(path), f.read())
        export(model, folder, files)
        free = model.config.ln_mode == 'none' or model.config.ln_mode == 'fake' and all(model.sites().values())
        print(f"{folder}: {model.num_params():,} parameters, {'no LayerNorm left' if free else 'with LayerNorm'}"
              f"{', folded' if model.config.ln_mode == 'none' else ''}; also written: {', '.join(files) or 'no tokenizer, for none was found'}")
    except (BadInput, OSError) as e:
        print(f"model.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
