"""
GPT-2 whose LayerNorm can be taken out. The whole model, in one file: the LayerNorm switch first, then the transformer
around it, then folding, loading and saving.

    model = GPT2.from_pretrained('gpt2', ln_mode='fake')   # a hub id, a Hugging Face folder, or a run's out_dir
    logits, loss = model(idx, targets)                     # idx, targets: (B, T) int64

    python model.py MODEL FOLDER [--folded] [--float16]    # writes MODEL as a new Hugging Face folder
        --folded     an LN-free model with its constants folded into the weights
        --float16    the same, in numbers that fit float16 (epsilon 1e8: see save_pretrained)

`ln_mode` says what stands where GPT-2 has a LayerNorm:
    'real'   LayerNorm, numerically GPT-2's
    'fake'   LayerNorm with a gate at every site: 0 divides by the token's own std, 1 by a frozen constant
    'none'   nothing: the constants are folded into the weights; no LN operation and no LN parameter is left

The method: Heimersheim 2024, arXiv 2409.13710, and Baroni et al. 2025, arXiv 2507.02559.
"""
import errno
import functools
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """What a person can mend. The scripts print it as one line and exit with status 2 (`command`, at the end)."""


def check(ok, message):
    if not ok:
        raise UserError(message)


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
    tie_word_embeddings: bool = True    # lm_head shares wte's weight ('none' never: folding unties it)
    eot_token_id: int | None = None     # end-of-text; None: the last token, as in GPT-2
    hf: dict = field(default_factory=dict)  # the rest of the config.json it came from (special ids, ...)

    def __post_init__(self):
        modes = ('real', 'fake', 'none')
        check(self.ln_mode in modes, f"ln_mode is {self.ln_mode!r}; expected one of {modes}")
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            n = getattr(self, name)
            check(type(n) is int and n >= 1, f"{name} is {n!r}; expected a whole number of at least 1")
        check(self.n_embd % self.n_head == 0, f"n_embd is {self.n_embd}, n_head {self.n_head}; "
                                              f"expected n_embd to be a multiple of n_head")
        check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected a number from 0 up to 1")
        if self.ln_mode == 'none':
            self.tie_word_embeddings = False
        if self.eot_token_id is None:
            self.eot_token_id = self.vocab_size - 1

# -----------------------------------------------------------------------------
# The LayerNorm switch.
#
#   real LN      y = (x - mean(x)) / sigma(x) * w + b      sigma(x) = sqrt(var(x) + eps), one number a token
#   removed LN   y = (x - mean(x)) / s        * w + b      s: a frozen constant, so y is affine in x
#   in between   y = (1-g) real + g removed                g in [0, 1]: the gate of the site
#
# s depends on the kind of token, because trained GPT-2s park a giant vector at position 0 and at end-of-text. A merge
# sets the special constants equal to the ordinary one; only then is the map affine, and the LayerNorm foldable.
#
# ln_1 is read twice, by queries/keys and by values, and the two are removed at different times: two gates.
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
        if self.mode == 'fake':
            self.register_buffer('gate', torch.zeros(len(sides)))
            self.register_buffer('std', torch.ones(len(KINDS)))

    def real(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def frozen(self, x, kind):
        """What replaces `real`. For another replacement edit this line (experiments/dyt.py does)."""
        scale = self.weight / self.std[kind].unsqueeze(-1)                          # (B, T, C)
        return torch.addcmul(self.bias, x - x.mean(-1, keepdim=True), scale)

    def forward(self, x, kind=None):
        """x (B, T, C), kind (B, T) -> ([(B, T, C) for each side that reads it], sigma(x) (B, T))."""
        if self.mode == 'none':
            return [x] * len(self.sides), None
        sigma = (x.var(-1, correction=0) + self.eps).sqrt()
        y = self.real(x)
        if self.mode == 'real':
            return [y] * len(self.sides), sigma
        frozen = self.frozen(x, kind)
        return [torch.lerp(y, frozen, g) for g in self.gate], sigma     # exact at 0 and at 1

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
        else:   # each side's version of ln_1 meets its own rows of the projection: the same work, cut in two
            (w_qk, w_v), (b_qk, b_v) = (p.split([2 * C, C]) for p in (self.c_attn.weight, self.c_attn.bias))
            q, k = F.linear(x_qk, w_qk, b_qk).split(C, dim=2)
            v = F.linear(x_v, w_v, b_v)
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (q, k, v))    # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
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

    def forward(self, x, kind):
        (x_qk, x_v), std_1 = self.ln_1(x, kind)
        x = x + self.attn(x_qk, x_v)
        (y,), std_2 = self.ln_2(x, kind)
        return x + self.mlp(y), [std_1, std_2]


class GPT2(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False     # in training, keep a block's input and compute the rest again
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
        `layernorms()` sigma of its input, (B, T), differentiable. Raises UserError if T exceeds block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise UserError(f"got {T} tokens; the model's context (block_size) is {self.config.block_size}")
        kind = self.kinds(idx) if self.config.ln_mode == 'fake' else None
        stds = []
        x = self.drop(self.wte(idx) + self.wpe.weight[:T])      # (B, T, C)
        for block in self.h:
            if self.gradient_checkpointing and self.training:
                x, std = checkpoint(block, x, kind, use_reentrant=False)
            else:
                x, std = block(x, kind)
            stds += std
        (y,), std = self.ln_f(x, kind)
        logits = self.lm_head(y)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return (logits, loss, stds + [std]) if return_stds else (logits, loss)

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
        """FLOPs of a training step per token, forward and backward: 6N + 12LCT (PaLM, arXiv 2204.02311, app. B).

        N: the parameters that multiply, so the embeddings only where they unembed.
        """
        c = self.config
        n = self.num_params() - self.wpe.weight.numel()
        n -= 0 if c.tie_word_embeddings else self.wte.weight.numel()
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size):
        """Shortens the context to block_size tokens, by dropping the last position embeddings."""
        n = self.config.block_size
        check(block_size <= n, f"block_size is {block_size}; the model's context is {n} tokens: "
                               f"type --block_size={n} or less")
        self.config.block_size = self.wpe.num_embeddings = block_size
        self.wpe.weight = nn.Parameter(self.wpe.weight[:block_size].detach().clone())

    # -------------------------------------------------------------------------
    # Sites: one for each reader of an LN, 3 * n_layer + 1 in all; and folding.

    def layernorms(self):
        """{name: LayerNorm}, in the order in which the forward pass meets them."""
        return {name: m for name, m in self.named_modules() if isinstance(m, LayerNorm)}

    def sites(self):
        """{site: its gate}, in the same order: h.0.ln_1.qk, h.0.ln_1.v, h.0.ln_2, ..., ln_f.

        A gate is a 0-d view of the LN's buffer, so `.fill_(1)` removes the site. Needs ln_mode 'fake'.
        """
        if self.config.ln_mode != 'fake':
            raise UserError(f"a model with ln_mode {self.config.ln_mode!r} has no gates; load it with ln_mode='fake'")
        return {name + side: ln.gate[i] for name, ln in self.layernorms().items()
                for i, side in enumerate(ln.sides)}

    def sites_left(self):
        """The sites at which a LayerNorm still divides, wholly or in part, by the token's own std."""
        if self.config.ln_mode == 'fake':
            return [site for site, gate in self.sites().items() if gate != 1]
        mode = self.config.ln_mode
        return [name + side for name, ln in self.layernorms().items() for side in ln.sides if mode == 'real']

    @torch.no_grad()
    def _as_stock(self, eps):
        """(epsilon, {LN: weight}) with which stock LayerNorms compute what this model's LayerNorms do.

        Dividing by sqrt(var + eps) with a huge eps is dividing by a constant. Raises UserError where no stock
        LayerNorm does it: some sites removed and others not, special constants, a replacement that is not affine.
        """
        lns, left, eps = self.layernorms(), self.sites_left(), float(eps)
        if self.config.ln_mode == 'real' or not any(self.sites().values()):
            eps, weights = self.config.layer_norm_epsilon, {name: ln.weight for name, ln in lns.items()}
        else:
            check(not left, f"{len(left)} of {len(self.sites())} sites still divide by the token's own std: "
                            f"{' '.join(left[:3])} ...")
            special = [name for name, ln in lns.items() if (ln.std != ln.std[TOKEN]).any()]
            check(not special, f"{' '.join(special[:1])} still has constants of its own for position 0 or end-of-text")
            weights = {name: ln.weight * (math.sqrt(eps) / ln.std[TOKEN]) for name, ln in lns.items()}
        x = torch.randn(len(KINDS), 8, self.config.n_embd, device=self.wte.weight.device) + 1
        kind = torch.arange(len(KINDS), device=x.device)[:, None].expand(-1, 8)     # a row of each kind
        for name, ln in lns.items():    # our code may have been edited: believe the numbers
            stock = F.layer_norm(x, x.shape[-1:], weights[name], ln.bias, eps)
            for y in ln(x, kind)[0]:
                if (y - stock).abs().max() > 1e-3 * stock.abs().max():
                    raise UserError(f"{name} computes what no stock LayerNorm computes")
        return eps, weights

    @torch.no_grad()
    def fold_ln(self):
        """The same function as a new 'none' model: every LN absorbed by the linear layer (W, c) that reads it.

            W ((x - mean(x)) / s * w + b) + c  =  W' x + c'
            W' = (W * w / s) minus its row mean,   c' = c + W b

        (Taking out W's row mean is subtracting x's mean.) Computed in float64, returned in the weights' own dtype.
        Raises UserError while a gate is below 1 or a LN has more than one constant.
        """
        mode = self.config.ln_mode
        check(mode == 'fake', f"this model cannot be folded: its ln_mode is {mode!r}, expected 'fake' with all gates at 1")
        eps, weights = self._as_stock(HF_EPS)
        check(eps == HF_EPS, "this model cannot be folded: all its sites still divide by the token's own std")
        sd = {k: v.clone() for k, v in self.state_dict().items()}
        for name, reader in self._readers():
            w, b, s = (sd.pop(f'{name}.{p}').double() for p in ('weight', 'bias', 'std'))
            del sd[f'{name}.gate']
            W = sd[f'{reader}.weight'].double()
            Ws = W * (w / s[TOKEN])
            c = sd.get(f'{reader}.bias', W.new_zeros(len(W))).double()
            dtype = sd[f'{reader}.weight'].dtype
            sd[f'{reader}.weight'] = (Ws - Ws.mean(1, keepdim=True)).to(dtype)
            sd[f'{reader}.bias'] = (c + W @ b).to(dtype)
        return self._build(replace(self.config, ln_mode='none'), sd, 'the folded model').train(self.training)

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
    PREFIXES = re.compile(r'^(module\.|_orig_mod\.|transformer\.)+')    # of DDP, torch.compile, GPT2LMHeadModel

    @classmethod
    def from_pretrained(cls, name_or_dir, ln_mode=None, dropout=0.0):
        """Loads a hub id ('gpt2', 'gpt2-medium', ...), a folder in Hugging Face layout, or a run's out_dir.

        ln_mode None keeps what is there. A folder in the published LN-free convention (layer_norm_epsilon 1e12, LN
        weights scaled to match) has no LayerNorm, whatever its modules are called: it loads as 'none'. Weights come as
        float32, and nothing that is loaded can run code: safetensors, or torch.load with weights_only.
        Raises UserError if there is no such model, it is not a GPT-2, or it cannot be had in that ln_mode.
        """
        source = os.path.expanduser(os.fspath(name_or_dir))
        if os.path.exists(os.path.join(source, 'ckpt.pt')):
            ckpt = load_checkpoint(source)
            return cls.from_state(ckpt['model_args'], ckpt['model'], source, ln_mode, dropout)
        folder = _local_folder(source)
        args, sd = _read_config(folder), _read_weights(folder)
        sd = {cls.PREFIXES.sub('', k): v for k, v in sd.items()}
        sd = {k: v for k, v in sd.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}   # causal masks
        sd = {k: v.t() if cls.CONV1D.search(k) and v.dim() == 2 else v for k, v in sd.items()}
        if args['tie_word_embeddings']:     # stored under either name, or both
            both = [sd[k] for k in ('wte.weight', 'lm_head.weight') if k in sd]
            check(both and (both[0].shape == both[-1].shape and torch.equal(both[0], both[-1])),
                  f"{folder}: expected one matrix as wte.weight and lm_head.weight, since config.json ties them")
            sd['wte.weight'] = sd['lm_head.weight'] = both[0]
        if args['layer_norm_epsilon'] < 1e6:
            return cls.from_state(args, sd, folder, ln_mode, dropout)
        # dividing by sqrt(var + 1e12) is dividing by the constant 1e6: a removed LN, ready to be folded
        std = math.sqrt(args.pop('layer_norm_epsilon'))
        check(ln_mode in (None, 'none'), f"{name_or_dir} holds a model without LayerNorm (layer_norm_epsilon {std ** 2:g}): "
                                         f"none is left to remove or restore; load it with ln_mode='none'")
        model = cls.from_state(args, sd, folder, 'fake', dropout)
        for ln in model.layernorms().values():
            ln.gate.fill_(1)
            ln.std.fill_(std)
        return model.fold_ln()

    @classmethod
    def from_state(cls, model_args, sd, source, ln_mode=None, dropout=0.0):
        """A model from GPT2Config's fields and a state dict, turned into ln_mode where that changes no logit."""
        try:
            config = GPT2Config(**{**model_args, 'dropout': dropout})
        except TypeError as e:
            raise UserError(f"{source} is a checkpoint of another program: {e}")
        sd = {k: v.float() for k, v in sd.items()}
        here, want = config.ln_mode, ln_mode or config.ln_mode
        if here == 'fake' and want == 'real' and not any(v.any() for k, v in sd.items() if k.endswith('.gate')):
            sd = {k: v for k, v in sd.items() if not k.endswith(('.gate', '.std'))}
        elif here == 'fake' and want == 'none':
            return cls._build(config, sd, source).fold_ln()
        elif here != want and (here, want) != ('real', 'fake'):
            raise UserError(f"{source} has ln_mode {here!r} and cannot be loaded as {want!r}")
        config = replace(config, ln_mode=want)
        if here == 'real':      # gates, constants and whatever else a LayerNorm of ours has of its own begin fresh
            sd = {f'{name}.{k}': v for i in range(config.n_layer) for name, sides in
                  ((f'h.{i}.ln_1', ('.qk', '.v')), (f'h.{i}.ln_2', ('',)), ('ln_f', ('',)))
                  for k, v in LayerNorm(config, sides).state_dict().items()} | sd if want == 'fake' else sd
        return cls._build(config, sd, source)

    @classmethod
    def _build(cls, config, sd, source):
        """A model with the tensors of sd, without first filling as much memory with random numbers."""
        last = f'h.{config.n_layer - 1}.attn.c_attn.weight'     # before a billion layers are made of a config
        check(last in sd, f"{source}: the weights lack {last}, but the config says n_layer {config.n_layer}")
        try:
            with torch.device('meta'):
                model = cls(config)
            model.load_state_dict({k: v.contiguous() for k, v in sd.items()}, assign=True)
        except (RuntimeError, TypeError) as e:      # torch lists what is missing, unexpected or of another shape
            raise UserError(f"{source}: {' '.join(str(e).split())[:400]}")
        model.requires_grad_(True)
        model._tie()        # assigning gave wte and lm_head a parameter each
        return model

    @torch.no_grad()
    def save_pretrained(self, folder, files={}, eps=HF_EPS):
        """Writes a folder that transformers' GPT2LMHeadModel loads as it is: config.json, model.safetensors, `files`.

        files: {name: bytes} to write beside them, such as the tokenizer's. Without LayerNorm the LN modules stay, in
        the published convention: epsilon 1e12, so that each divides by 1e6 whatever the token, and weights scaled by
        1e6 / s. These do not fit float16; a folded model's do with eps=1e8, at a relative error of var / 2e8.
        transformers has one epsilon for the whole model and no extra parameters: what it cannot express (a removal
        half done, another replacement, a 'none' model that reads the residual stream's mean) raises UserError.
        """
        c, sd = self.config, {k: v.detach().cpu() for k, v in self.state_dict().items()}
        where = f"cannot be written in Hugging Face layout (ckpt.pt holds any stage): "
        if c.ln_mode == 'none':
            for name, reader in self._readers():
                W = sd[f'{reader}.weight'].double()
                check((W.sum(1).abs() <= 1e-4 * W.norm(dim=1) * math.sqrt(c.n_embd)).all(), where +
                      f"{reader} reads the mean of the residual stream, which transformers' LayerNorm subtracts")
                sd[f'{name}.weight'] = torch.full((c.n_embd,), math.sqrt(eps))
                sd[f'{name}.bias'] = torch.zeros(c.n_embd)
            # transformers' lm_head has no bias. Its rows have mean zero and meet vectors of mean zero, so a constant u
            # added to a row changes nothing, until ln_f adds 1 to each of the C entries: then it adds C u. u = bias / C.
            sd['ln_f.bias'] = torch.ones(c.n_embd)
            sd['lm_head.weight'] = sd['lm_head.weight'] + sd.pop('lm_head.bias')[:, None] / c.n_embd
        else:
            try:
                eps, weights = self._as_stock(eps)
            except UserError as e:
                raise UserError(where + str(e))
            sd |= {f'{name}.weight': w.cpu() for name, w in weights.items()}
        sd = {k: v for k, v in sd.items() if not k.endswith(('.gate', '.std'))}
        with torch.device('meta'):
            extra = sd.keys() - GPT2(replace(c, ln_mode='real')).state_dict().keys()
        check(not extra, where + f"transformers' GPT-2 has no {' '.join(sorted(extra)[:3])}")
        if c.tie_word_embeddings:
            del sd['lm_head.weight']
        sd = {k if k == 'lm_head.weight' else f'transformer.{k}': (v.t() if self.CONV1D.search(k) else v).contiguous()
              for k, v in sd.items()}
        config = {
            'bos_token_id': c.eot_token_id, 'eos_token_id': c.eot_token_id, **c.hf,
            'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'activation_function': 'gelu_new',
            'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd, 'n_positions': c.block_size,
            'vocab_size': c.vocab_size, 'layer_norm_epsilon': eps,
            'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout, 'attn_pdrop': c.dropout,
            'tie_word_embeddings': c.tie_word_embeddings, 'dtype': 'float32'}
        ids = {k: config[k] for k in ('bos_token_id', 'eos_token_id', 'pad_token_id') if k in config}
        files = {'generation_config.json': json.dumps(ids, indent=2).encode(), **files}
        os.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            write(os.path.join(folder, name), content)
        write(os.path.join(folder, 'model.safetensors'), lambda tmp: save_file(sd, tmp, metadata={'format': 'pt'}))
        write(os.path.join(folder, 'config.json'), json.dumps(config, indent=2).encode())   # last: now it is a model

# what a model's folder brings beside config.json and weights
COMPANIONS = ('*token*.json', 'vocab.*', 'merges.txt', '*.model', 'chat_template*', 'generation_config.json')


def companions(source):
    """{file name: bytes}: the tokenizer's files, the chat template and generation config of a MODEL.

    A run keeps those of the model it began from in out_dir/tokenizer, and hands them on.
    """
    source = os.path.expanduser(source)
    run = os.path.exists(os.path.join(source, 'ckpt.pt'))
    folder, found = os.path.join(source, 'tokenizer') if run else _local_folder(source), {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if any(fnmatch(name, pattern) for pattern in COMPANIONS) and os.path.isfile(os.path.join(folder, name)):
            with open(os.path.join(folder, name), 'rb') as f:
                found[name] = f.read()
    return found


def _local_folder(name):
    """The folder itself, or that into which the Hugging Face library downloads a hub model of this name."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    is_file = os.path.isfile(name)
    check(not is_file and re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name), f"{name} is " + (
        "a file: name the folder that it lies in" if is_file else "no folder here, and not a hub id like 'gpt2' or 'me/model'"))
    try:
        wanted = ['config.json', *COMPANIONS, 'model*.safetensors*']
        folder = snapshot_download(name, allow_patterns=wanted)
        if not any('.safetensors' in f for f in os.listdir(folder)):
            folder = snapshot_download(name, allow_patterns=wanted + ['pytorch_model*.bin*'])
        return folder
    except Exception as e:      # the many ways of not being there: offline, unknown, private, a typing error
        raise UserError(f"{name} is no folder here, and the Hugging Face hub gives no model of this name ({one_line(e)})")


def _read_config(folder):
    """GPT2Config's fields from a folder's config.json, with the defaults that transformers has for what is not there."""
    path = os.path.join(folder, 'config.json')
    check(os.path.exists(path), f"{folder} has no config.json (nor a ckpt.pt): expected a Hugging Face folder or a run's out_dir")
    try:
        with open(path, encoding='utf-8-sig') as f:
            hf = json.load(f)
        for ours, theirs in (('n_embd', 'hidden_size'), ('n_positions', 'max_position_embeddings'),
                             ('n_head', 'num_attention_heads'), ('n_layer', 'num_hidden_layers')):
            if theirs in hf:    # transformers knows both names
                hf[ours] = hf.pop(theirs)
        hf = {'n_positions': hf.get('n_ctx', 1024), 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'vocab_size': 50257,
              'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True, 'bos_token_id': 50256, 'eos_token_id': 50256} | hf
        args = {k: hf.pop(k) for k in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'layer_norm_epsilon', 'tie_word_embeddings')}
        args['block_size'] = hf.pop('n_positions')
        GPT2Config(**args)
        assert args['layer_norm_epsilon'] > 0 and isinstance(args['tie_word_embeddings'], bool)
    except (ValueError, TypeError, AttributeError, AssertionError) as e:
        raise UserError(f"{path} is not the config.json of a GPT-2 ({type(e).__name__}: {one_line(e)})")
    # what would change the computation, with the values that this model has
    for key, good in [('model_type', ('gpt2',)), ('activation_function', ('gelu_new', 'gelu_pytorch_tanh')),
                      ('n_inner', (None, 4 * args['n_embd'])), ('scale_attn_weights', (True,)),
                      ('scale_attn_by_inverse_layer_idx', (False,)), ('add_cross_attention', (False,))]:
        check(hf.get(key, good[0]) in good, f"{path}: {key} is {hf.get(key)!r}; this is another architecture, "
                                            f"expected {good[0]!r}")
    eot = hf['eos_token_id'][:1] if isinstance(hf['eos_token_id'], list) else [hf['eos_token_id']]
    args['eot_token_id'] = next((i for i in eot if type(i) is int and 0 <= i < args['vocab_size']), None)
    args['hf'] = {k: v for k, v in hf.items() if k not in ('n_ctx', 'n_inner', 'torch_dtype', 'transformers_version')}
    return args


def _read_weights(folder):
    """{name: tensor} of model.safetensors or else pytorch_model.bin, in one file or in the shards that an index lists."""
    for stem in ('model.safetensors', 'pytorch_model.bin'):
        path = os.path.join(folder, stem)
        if not os.path.exists(path) and not os.path.exists(path + '.index.json'):
            continue
        try:
            names, sd = [stem], {}
            if not os.path.exists(path):
                with open(path + '.index.json') as f:
                    names = sorted({os.path.basename(name) for name in json.load(f)['weight_map'].values()})
            for name in names:
                part = os.path.join(folder, name)
                sd |= load_file(part) if stem.endswith('s') else torch.load(part, map_location='cpu', weights_only=True)
            check(all(torch.is_tensor(v) for v in sd.values()), "expected {name: tensor}")
            return sd
        except Exception as e:      # each library has its own types, and the index may be any JSON
            raise UserError(f"{path} is damaged or not a model's weights ({type(e).__name__}: {one_line(e)})")
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin: expected a Hugging Face folder")

# -----------------------------------------------------------------------------
# Checkpoints, and what the scripts share.

def write(path, content):
    """Writes bytes, or what content(a path) writes, to `path`: whole or not at all. A link there is followed."""
    path = os.path.realpath(path)
    tmp = path + '.partial'
    try:
        if callable(content):
            content(tmp)
        else:
            with open(tmp, 'wb') as f:
                f.write(content)
        with open(tmp, 'rb') as f:
            try:
                os.fsync(f.fileno())    # on the disk before it has the name
            except OSError as e:        # some file systems have no fsync
                if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        os.replace(tmp, path)
    except (OSError, RuntimeError, SafetensorError) as e:   # torch and safetensors tell of a full disk in their own types
        raise UserError(f"{path} cannot be written ({one_line(e)}); what was there before is intact")
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def save_checkpoint(out_dir, model, **extra):
    """Writes out_dir/ckpt.pt: `model_args`, `model` and `extra`; tensors and plain values only.

    At any instant ckpt.pt is a complete file, the old or the new. Raises UserError if it cannot be written.
    """
    ckpt = {'model_args': asdict(model.config), 'model': model.state_dict(), **extra}
    write(os.path.join(out_dir, 'ckpt.pt'), lambda tmp: torch.save(ckpt, tmp))


def load_checkpoint(out_dir):
    """The dictionary that save_checkpoint wrote, on the CPU. Raises UserError if it is missing or damaged."""
    path = os.path.join(out_dir, 'ckpt.pt')
    check(os.path.exists(path), f"no checkpoint {path}: expected an out_dir in which train.py saved one")
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
        names = ckpt['model'].keys()
    except Exception as e:      # damage has many names: RuntimeError, EOFError, UnpicklingError, KeyError
        raise UserError(f"{path} is damaged or not a checkpoint of this project ({type(e).__name__})")
    theirs = any(k.removeprefix('_orig_mod.').startswith('transformer.') for k in names) or 'iter_num' in ckpt
    check(not theirs, f"{path} is a checkpoint of nanoGPT, whose GELU is not GPT-2's: it computes another function and "
                      f"cannot be loaded; expected an out_dir of this project or a Hugging Face folder")
    check(isinstance(ckpt.get('model_args'), dict), f"{path} is not a checkpoint of this project: it lacks model_args")
    return ckpt


def one_line(e):
    """An exception's message on one line."""
    return ' '.join(str(e).split())[:300] or type(e).__name__


def trouble(e):
    """What to tell a person of an exception, on one line; None if it is a fault of the program."""
    text, kind = one_line(e), type(e).__module__
    if isinstance(e, UserError):
        return ' '.join(str(e).split())
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"out of memory ({text[:120]}): try a smaller --batch_size, or --gradient_checkpointing=True"
    if kind.startswith(('torch._inductor', 'torch._dynamo')):
        return f"torch.compile failed ({text}): type --compile=False, or install a C++ compiler if that is what is missing"
    if isinstance(e, OSError):
        return f"{e.strerror or text}{f': {e.filename}' if e.filename else ''}"
    return None


def command(main):
    """Decorates a script's main(argv): trouble that a person can mend is one line on stderr and exit status 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, 'reconfigure'):      # a terminal that cannot print a character must not end a run
                stream.reconfigure(errors='backslashreplace')
        argv = sys.argv[1:] if argv is None else argv
        if '--help' in argv or '-h' in argv:
            return print(main.__globals__['__doc__'])
        name = os.path.basename(main.__code__.co_filename)
        try:
            main(argv)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as e:
            if trouble(e) is None:
                raise
            print(f"{name}: {trouble(e)}", file=sys.stderr)
            sys.exit(2)
    return wrapped


@command
def main(argv):
    flags = {a for a in argv if a.startswith('--')}
    names = [a for a in argv if a not in flags]
    if len(names) != 2 or flags - {'--folded', '--float16'}:
        raise UserError(f"expected MODEL FOLDER [--folded] [--float16], got {' '.join(argv)}")
    source, folder = map(os.path.expanduser, names)
    check(not os.path.exists(folder), f"{folder} exists already: choose another name, or move it away first")
    model = GPT2.from_pretrained(source, 'none' if flags else None)
    model.save_pretrained(folder, companions(source), 1e8 if '--float16' in flags else HF_EPS)
    n = len(model.sites_left())
    print(f"{folder}: {model.num_params():,} parameters, {f'{n} LayerNorm sites' if n else 'no LayerNorm left'}")


if __name__ == '__main__':
    main()
