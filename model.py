"""
GPT-2 whose LayerNorm can be taken out: the LayerNorm switch first, then the transformer around it,
then folding, loading and saving.

    model = GPT2.from_pretrained('gpt2', ln_mode='fake')    # a hub id, a folder or a run's out_dir
    logits, loss = model(idx, targets)                      # idx, targets: (B, T) int64
    model.fold_ln().save_pretrained(folder)                 # Hugging Face layout, LN folded away

The method: Heimersheim 2024, arXiv 2409.13710, and Baroni et al. 2025, arXiv 2507.02559.
"""
import atexit
import errno
import gc
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

class UserError(ValueError):
    """What a person can mend: `command`, below, prints it as one line and exits with status 2."""

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
    ln_mode: str = 'real'   # LayerNorm; 'fake': with gates and constants; 'none': folded away
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True    # lm_head shares wte's weight; folding unties it
    eot_token_id: int | None = None     # end-of-text; None: GPT-2's, or the last token
    hf: dict = field(default_factory=dict)  # the rest of the config.json it came from

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            n = getattr(self, name)
            check(type(n) is int and n >= 1, f"{name} is {n!r}; expected a whole number from 1")
        check(self.n_embd % self.n_head == 0, f"n_embd is {self.n_embd}; n_head must divide it")
        check(self.ln_mode in ('real', 'fake', 'none'), f"ln_mode is {self.ln_mode!r}: type real")
        self.tie_word_embeddings &= self.ln_mode != 'none'
        if self.eot_token_id is None:
            self.eot_token_id = min(50256, self.vocab_size - 1)

# -----------------------------------------------------------------------------
# The LayerNorm switch.
#
#   real LN      y = (x - mean(x)) / sigma(x) * w + b      sigma(x) = sqrt(var(x) + eps)
#   removed LN   y = (x - mean(x)) / s        * w + b      s: a frozen constant: y is affine in x
#   in between   y = (1-g) real + g removed                g in [0, 1]: the gate of the site
#
# s depends on the kind of token, because trained GPT-2s park a giant vector at position 0 and at
# end-of-text. A merge fades the special constants into the ordinary one; only then is the map
# affine, and can be folded. Queries/keys and values read ln_1, and are removed at different times:
# two gates. All these are buffers: they travel in the state dict, and moving one changes no graph.

TOKEN, BOS, EOT = 0, 1, 2       # ordinary; position 0; end-of-text, also at position 0
KINDS = ('token', 'bos', 'eot')
HF_EPS = 1e12                   # of the published LN-free models: sqrt(var + 1e12) is just 1e6

class LayerNorm(nn.Module):
    def __init__(self, config, sides=('',)):
        super().__init__()
        self.mode, self.eps, self.sides = config.ln_mode, config.layer_norm_epsilon, sides
        if self.mode != 'none':
            self.weight = nn.Parameter(torch.ones(config.n_embd))
            self.bias = nn.Parameter(torch.zeros(config.n_embd))
        if self.mode == 'fake':
            self.register_buffer('gate', torch.zeros(len(sides)))
            self.register_buffer('std', torch.ones(len(KINDS)))     # s, as measured
            self.register_buffer('merge', torch.zeros(len(KINDS)))  # 1: the ordinary s instead

    def frozen(self, x, kind):
        """What replaces LayerNorm: edit this for another (experiments/variants/dyt.py does)."""
        inverse = torch.lerp(1 / self.std, 1 / self.std[TOKEN], self.merge)         # (3,)
        scale = self.weight * inverse[kind].unsqueeze(-1)                           # (B, T, C)
        return torch.addcmul(self.bias, x - x.mean(-1, keepdim=True), scale)

    def forward(self, x, kind=None):
        """x (B, T, C), kind (B, T) -> ([(B, T, C) for each side], sigma(x) (B, T))."""
        if self.mode == 'none':
            return [x] * len(self.sides), None
        sigma = (x.var(-1, correction=0) + self.eps).sqrt()
        y = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if self.mode == 'real':
            return [y] * len(self.sides), sigma
        frozen = self.frozen(x, kind)
        return [torch.lerp(y, frozen, g) for g in self.gate], sigma     # exact at 0 and at 1

# -----------------------------------------------------------------------------
# The transformer: GPT-2, with nanoGPT's names.

class QKV(nn.Linear):
    """The projection to queries, keys and values; values may read another input, x_v. It is called
    once, whatever the ln_mode, so that hooks and adapters on c_attn see it."""
    def forward(self, x_qk, x_v=None):
        if x_v is None:
            return super().forward(x_qk)
        # each side of ln_1 meets its own rows: the same work, cut in two
        C = self.in_features
        qk = F.linear(x_qk, self.weight[:2 * C], self.bias[:2 * C])
        return torch.cat((qk, F.linear(x_v, self.weight[2 * C:], self.bias[2 * C:])), -1)

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = QKV(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x_qk, x_v):
        B, T, C = x_qk.shape
        qkv = self.c_attn(x_qk) if x_qk is x_v else self.c_attn(x_qk, x_v)
        q, k, v = qkv.split(C, dim=2)
        # (B, T, C) -> (B, nh, T, hs)
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # GPT-2 uses the tanh form of GELU; with the exact one, as in nanoGPT, its logits are off
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config, sides=('.qk', '.v'))
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, kind):
        (x_qk, x_v), std_1 = self.ln_1(x, kind)
        x = x + self.drop(self.attn(x_qk, x_v))
        (y,), std_2 = self.ln_2(x, kind)
        return x + self.drop(self.mlp(y)), [std_1, std_2]

class GPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config)
        # a bias on the unembedding only where ln_f's has been folded into it
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.ln_mode == 'none')
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():     # GPT-2's initialisation
            if p.dim() == 2:    # 2 * n_layer of the c_proj add up in the residual stream
                n = 2 * config.n_layer if name.endswith('c_proj.weight') else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(n))
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def kinds(self, idx):
        """The kind of each token, TOKEN, BOS or EOT: idx (B, T) -> (B, T) int64."""
        first = torch.arange(idx.shape[1], device=idx.device) == 0
        return torch.where(idx == self.config.eot_token_id, EOT, torch.where(first, BOS, TOKEN))

    def forward(self, idx, targets=None, return_stds=False):
        """idx (B, T) int64 -> logits (B, T, vocab), cross-entropy in nats (None without targets).
        Targets of -1 are left out of its mean (0 without any other). `return_stds` adds sigma of
        the input of each of `layernorms()`, (B, T)."""
        T, most = idx.shape[1], self.config.block_size
        check(T <= most, f"got {T} tokens; the model's context is {most}")
        kind = self.kinds(idx) if self.config.ln_mode == 'fake' else None
        x, stds = self.drop(self.wte(idx) + self.wpe.weight[:T]), []        # (B, T, C)
        for block in self.h:
            x, std = block(x, kind)
            stds += std
        (y,), std = self.ln_f(x, kind)
        logits, loss = self.lm_head(y), None
        if targets is not None:
            flat, n = logits.float().flatten(0, 1), (targets != -1).sum().clamp(min=1)
            loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-1, reduction='sum') / n
        return (logits, loss, stds + [std]) if return_stds else (logits, loss)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> (B, T + max_new_tokens), sampled; temperature 0 is greedy."""
        k = 1 if temperature == 0 else min(top_k or math.inf, self.config.vocab_size)
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1].float()
            best, ids = logits.topk(k)                                              # (B, k)
            new = torch.multinomial(F.softmax(best / (temperature or 1), -1), 1)    # (B, 1)
            idx = torch.cat((idx, ids.gather(1, new)), 1)
        return idx

    # -------------------------------------------------------------------------
    # Sites: one for each reader of an LN, 3 * n_layer + 1 in all. Folding, loading, saving.

    def layernorms(self):
        """{name: LayerNorm}, in the order in which the forward pass meets them."""
        return {name: m for name, m in self.named_modules() if isinstance(m, LayerNorm)}

    def sites(self):
        """{site: its gate}, in the same order: h.0.ln_1.qk, h.0.ln_1.v, h.0.ln_2, ..., ln_f. The
        gate is a 0-d view of the buffer, `.fill_(1)` removes it; or 0 in `real`, 1 in `none`."""
        return {name + side: ln.gate[i] if ln.mode == 'fake' else int(ln.mode == 'none')
                for name, ln in self.layernorms().items() for i, side in enumerate(ln.sides)}

    def sites_left(self):
        """The sites that still divide, at least in part, by the token's own std."""
        return [site for site, gate in self.sites().items() if gate != 1]

    @staticmethod
    def reader(ln):
        """The linear layer that reads an LN, by name: h.0.ln_1 -> h.0.attn.c_attn."""
        return (ln.replace('ln_1', 'attn.c_attn').replace('ln_2', 'mlp.c_fc')
                  .replace('ln_f', 'lm_head'))

    @torch.no_grad()
    def fold_ln(self):
        """The same function as a new 'none' model: the linear layer (W, c) after an LN absorbs it.

            W ((x - mean(x)) / s * w + b) + c  =  W' x + c'
            W' = (W * w / s) minus its row mean (which subtracts x's mean),   c' = c + W b

        Raises UserError unless every gate is 1 and every LN has one constant."""
        sd, eps = self._stock(HF_EPS)
        check(eps >= 1e6, "cannot fold: each LayerNorm still divides by the token's own std")
        for name in self.layernorms():
            reader = self.reader(name)
            w, b = (sd.pop(f'{name}.{p}').double() for p in ('weight', 'bias'))
            W = sd[f'{reader}.weight']
            Ws = W * (w / math.sqrt(eps))
            sd[f'{reader}.weight'] = (Ws - Ws.mean(1, keepdim=True)).to(W.dtype)
            sd[f'{reader}.bias'] = sd.get(f'{reader}.bias', 0) + W.double() @ b
        with torch.device('meta'):
            model = type(self)(replace(self.config, ln_mode='none'))
        model.load_state_dict({k: v.clone() for k, v in sd.items()}, assign=True)
        return model.to(self.wte.weight).train(self.training)

    @torch.no_grad()
    def _stock(self, eps):
        """-> (state dict on the CPU, epsilon) of stock LayerNorms that compute the same, or else
        UserError. Where LN is gone, by so huge an `eps` that each divides by a constant, s."""
        c, sites, left = self.config, self.sites(), len(self.sites_left())
        intact = not any(sites.values())
        check(intact or not left, f"{left} of {len(sites)} sites divide by the token's own std")
        eps = c.layer_norm_epsilon if intact else eps
        s = math.sqrt(eps)      # the constant
        sd = {k: v.cpu() for k, v in self.state_dict().items() if k.endswith(('weight', 'bias'))}
        x = torch.randn(1, 3, c.n_embd).to(self.wte.weight) + 1
        kind = torch.tensor([[TOKEN, BOS, EOT]], device=x.device)
        for name, ln in self.layernorms().items():
            if ln.mode == 'none':
                w, b = x.new_full((c.n_embd,), s), x.new_zeros(c.n_embd)
            else:
                w, b = ln.weight if intact else ln.weight * (s / ln.std[TOKEN]), ln.bias
            sd[f'{name}.weight'], sd[f'{name}.bias'] = w.cpu(), b.cpu()
            # compare outputs, since forks may have edited the class
            W = sd[f'{self.reader(name)}.weight']
            stock = F.layer_norm(x, x.shape[-1:], w, b, eps)
            error = (torch.stack(ln(x, kind)[0]) - stock).cpu() @ W.T
            check(abs(error).max() <= 1e-4 * abs(stock.cpu() @ W.T).max(), f"{name} is no stock "
                  f"LayerNorm: edited, or position 0 has its own s, or its reader sees the mean")
        if c.ln_mode == 'none':
            # A stock lm_head has no bias. Its rows have mean zero and meet vectors of mean zero: u
            # added to a row changes nothing, until ln_f adds 1 to each of C entries: then C u.
            u = sd.pop('lm_head.bias')[:, None] / c.n_embd
            sd['lm_head.weight'], sd['ln_f.bias'] = sd['lm_head.weight'] + u, sd['ln_f.bias'] + 1
        return sd, eps

    @classmethod
    def from_pretrained(cls, name_or_dir, ln_mode=None, dropout=0.0):
        """Loads a hub id ('gpt2', 'gpt2-medium', ...), a Hugging Face folder, or a run's out_dir.
        ln_mode None keeps what is there; the LN-free convention (epsilon 1e12) is 'none'."""
        folder = local_folder(name_or_dir)
        if os.path.exists(os.path.join(folder, 'ckpt.pt')):
            ckpt = load_checkpoint(folder)
            return cls.from_state(ckpt['model_args'], ckpt['model'], folder, ln_mode, dropout)
        return cls.from_state(*_read_folder(folder), folder, ln_mode, dropout)

    @classmethod
    def from_state(cls, model_args, sd, source, ln_mode=None, dropout=0.0):
        """A float32 model of GPT2Config's fields and a state dict, in ln_mode if that is exact."""
        try:
            config = GPT2Config(**model_args | {'dropout': dropout})
            free = config.ln_mode == 'real' and config.layer_norm_epsilon >= 1e6    # LN is gone
            if config.tie_word_embeddings:      # stored under either name, or both
                wte = sd.setdefault('wte.weight', sd.get('lm_head.weight'))
                head = sd.setdefault('lm_head.weight', wte)
                check(wte is not None and torch.allclose(wte, head, 0, 0, equal_nan=True),
                      "wte.weight and lm_head.weight, which are tied, are missing or differ")
            with torch.device('meta'):      # no memory is filled with random numbers first
                model = cls(config)
            sd = {k: v.float().contiguous() for k, v in sd.items()}
            model.load_state_dict(sd, assign=True)
        except (ValueError, RuntimeError, TypeError, AttributeError) as e:
            raise UserError(f"{source} is not a GPT-2's: {one_line(e)}")
        if config.tie_word_embeddings:      # assigning gave each a parameter of its own
            model.lm_head.weight = model.wte.weight
        if free or ln_mode == 'none' != config.ln_mode:
            model = model.fold_ln()
        if ln_mode in (None, model.config.ln_mode):
            return model
        check(not any(model.sites().values()),
              f"{source} cannot become {ln_mode!r}, for its LayerNorm is gone")
        model.config = replace(config, ln_mode=ln_mode)
        for name, ln in model.layernorms().items():     # what is not LayerNorm's own begins fresh
            new = LayerNorm(model.config, ln.sides)
            new.weight, new.bias = ln.weight, ln.bias
            model.set_submodule(name, new)
        return model

    def save_pretrained(self, folder, files={}, eps=HF_EPS):
        """Writes a folder that transformers' GPT2LMHeadModel loads, and `files`, {name: bytes}.
        Without LayerNorm the modules stay: by an epsilon of 1e12 each divides by 1e6. A folded
        model's weights fit float16 with eps=1e8, at a relative error of var / 2e8."""
        c = self.config
        sd, eps = self._stock(eps)
        sd = {k if k.startswith('lm_head') else f'transformer.{k}':
              (v.t() if CONV1D.search(k) else v).contiguous() for k, v in sd.items()}
        if c.tie_word_embeddings:
            del sd['lm_head.weight']
        config = {
            'bos_token_id': c.eot_token_id, 'eos_token_id': c.eot_token_id, **c.hf,
            'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'dtype': 'float32',
            'activation_function': 'gelu_new', 'n_positions': c.block_size, 'n_ctx': c.block_size,
            **{f'{part}_pdrop': c.dropout for part in ('resid', 'embd', 'attn')},
            **{k: getattr(c, k) for k in SAME}, 'layer_norm_epsilon': eps}
        files = {**files,
                 'model.safetensors': lambda tmp: save_file(sd, tmp, metadata={'format': 'pt'}),
                 'config.json': json.dumps(config, indent=2).encode()}  # last: now it is a model
        for name, content in files.items():
            write(os.path.join(folder, name), content)

# -----------------------------------------------------------------------------
# Files. A Hugging Face folder is config.json + model.safetensors. Its names are ours; the four
# projections of a block are transposed (there Conv1D, here Linear).

CONV1D = re.compile(r'(c_attn|c_proj|c_fc)\.weight$')
PREFIXES = re.compile(r'^((module|_orig_mod|transformer)\.)+|\b_orig_mod\.')    # wrappers' names
SAME = ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'layer_norm_epsilon', 'tie_word_embeddings')
COMPANIONS = ('*token*.json', 'vocab.*', 'merges.txt', '*.model', 'chat_template*',
              'generation_config.json')

def local_folder(name):
    """The folder itself, or that into which the hub's library downloads a model of this name."""
    name = os.path.expanduser(os.fspath(name))
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    wanted = ['config.json', *COMPANIONS, 'model*.safetensors*']
    try:
        folder = snapshot_download(name, allow_patterns=wanted)
        if not any(Path(folder).glob('*.safetensors')):
            folder = snapshot_download(name, allow_patterns=[*wanted, 'pytorch_model*.bin*'])
        return folder
    except Exception as e:      # the many ways of not being there: offline, unknown, private
        raise UserError(f"{name} is no folder here, and no model on the hub ({one_line(e)})")

def companions(source):
    """{file name: bytes}: a MODEL's tokenizer files, chat template and generation config."""
    folder = Path(local_folder(source))
    if (folder / 'ckpt.pt').exists():   # a run keeps those of the model that it began from
        folder /= 'tokenizer'
    return {f.name: f.read_bytes() for pattern in COMPANIONS
            for f in sorted(folder.glob(pattern)) if f.is_file()}

def _read_folder(folder):
    """-> (GPT2Config's fields, state dict under our names); config.json's defaults are ours."""
    folder = Path(folder)
    try:
        hf = {'bos_token_id': 50256, 'eos_token_id': 50256}
        hf.update(json.loads((folder / 'config.json').read_bytes()))
        only = {    # what would change the computation
            'model_type': ['gpt2'], 'activation_function': ['gelu_new', 'gelu_pytorch_tanh'],
            'scale_attn_weights': [True], 'scale_attn_by_inverse_layer_idx': [False],
            'tie_word_embeddings': [True, False], 'n_inner': [None, 4 * hf.get('n_embd', 768)]}
        for key, good in only.items():
            check(hf.get(key, good[0]) in good, f"config.json: {key} is {hf.get(key)!r}")
        args = {k: hf.pop(k) for k in SAME if k in hf}
        args |= {'block_size': hf.pop('n_positions', 1024), 'hf': hf}
        eot = hf['eos_token_id'][0] if isinstance(hf['eos_token_id'], list) else hf['eos_token_id']
        if type(eot) is int and 0 <= eot < args.get('vocab_size', 50257):
            args['eot_token_id'] = eot
        for stale in ('n_ctx', 'n_inner', 'torch_dtype', 'transformers_version'):
            hf.pop(stale, None)
        names = [folder / n for n in ('model.safetensors', 'model.safetensors.index.json',
                                      'pytorch_model.bin', 'pytorch_model.bin.index.json')]
        first = next((path for path in names if path.exists()), None)
        check(first, "it has neither model.safetensors nor pytorch_model.bin")
        shards, sd = {first.name}, {}
        if first.suffix == '.json':
            shards = {*json.loads(first.read_bytes())['weight_map'].values()}
        for path in (folder / shard for shard in shards):
            sd.update(load_file(path) if path.suffix == '.safetensors' else
                      torch.load(path, map_location='cpu', weights_only=True))
        return args, {PREFIXES.sub('', k): v.t() if CONV1D.search(k) else v for k, v in sd.items()
                      if not k.endswith(('.attn.bias', '.attn.masked_bias'))}   # causal masks
    except Exception as e:      # each library has its own types
        raise UserError(f"{folder} is damaged or not the folder of a GPT-2 ({one_line(e)})")

def write(path, content):
    """Writes bytes, or what content(path) writes, whole or not at all. Follows links."""
    path = os.path.realpath(path)
    tmp = path + '.partial'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        content(tmp) if callable(content) else Path(tmp).write_bytes(content)
        with open(tmp, 'r+b') as f:     # Windows syncs only what may be written
            try:
                os.fsync(f.fileno())    # flush to disk before the rename
            except OSError as e:        # some file systems have no fsync
                if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        os.replace(tmp, path)
    except Exception as e:      # each library has its own name for a full disk
        raise UserError(f"{path} cannot be written ({one_line(e)}); what was there is intact")
    finally:
        Path(tmp).unlink(missing_ok=True)

def save_checkpoint(out_dir, model, **extra):
    """Writes out_dir/ckpt.pt, whole or not at all. `extra`: tensors and plain values only."""
    ckpt = {'model_args': asdict(model.config), 'model': model.state_dict(), **extra}
    write(os.path.join(out_dir, 'ckpt.pt'), lambda tmp: torch.save(ckpt, tmp))

def load_checkpoint(out_dir):
    """What save_checkpoint wrote, on the CPU. Raises UserError if it is missing or damaged."""
    path = os.path.join(out_dir, 'ckpt.pt')
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
        check({'model', 'model_args'} <= ckpt.keys(), "it lacks model or model_args")
    except Exception as e:      # damage has many names
        raise UserError(f"{path} is missing, damaged or not of train.py ({one_line(e)})")
    return ckpt

# -----------------------------------------------------------------------------
# What all scripts share: their place among torchrun's processes, and the error idiom.

def place():
    """-> torchrun's (RANK, LOCAL_RANK, WORLD_SIZE); a process alone is (0, 0, 1) whatever is set"""
    numbers = [os.environ.get(name, '') for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]
    if not numbers[2].isdecimal() or int(numbers[2]) < 2:
        return 0, 0, 1
    return tuple(int(n) if n.isdecimal() else 0 for n in numbers)

RANK, LOCAL_RANK, WORLD = place()

def join_processes(backend='gloo'):
    """Meets the other processes, until this one ends."""
    missing = {'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'} - os.environ.keys()
    check(not missing, f"WORLD_SIZE is {WORLD} without {sorted(missing)}: start with torchrun")
    dist.init_process_group(backend)
    atexit.register(gc.collect)     # a DDP that outlives the group makes torch 2.11 abort
    atexit.register(dist.destroy_process_group)

def one_line(e, most=300):
    return ' '.join(str(e).split())[:most] or type(e).__name__

def trouble(e):
    """What to tell a person of an exception, on one line; None for a fault of the program."""
    memory = re.search("out of memory|ALLOC_FAILED|can't allocate memory|not enough memory", str(e))
    if isinstance(e, (UserError, OSError, ImportError)):
        return one_line(e, None)
    if isinstance(e, MemoryError) or isinstance(e, RuntimeError) and memory:
        return f"out of memory ({one_line(e)})"
    if type(e).__module__.startswith(('torch._inductor', 'torch._dynamo')):
        return f"torch.compile failed; it needs a C++ compiler and one graph ({one_line(e)})"
    return 'interrupted' if isinstance(e, KeyboardInterrupt) else None

def command(main):
    """Decorates a script's main(argv): --help prints its docstring, trouble one line, status 2."""
    def wrapped(argv=None):
        argv = sys.argv[1:] if argv is None else argv
        if '--help' in argv or '-h' in argv:
            return print(main.__globals__['__doc__'])
        try:
            return main(argv)
        except SystemExit as e:     # of a run that was asked to stop, and has said so
            told, status = None, e.code
        except (Exception, KeyboardInterrupt) as e:
            told, status = trouble(e), 130 if isinstance(e, KeyboardInterrupt) else 2
            if told is None:
                raise
        # Outside of `except`: a notebook would keep the traceback, and the model with it
        if told and LOCAL_RANK > 0:
            time.sleep(3)       # what the first process finds too, it tells: torchrun ends this one
        if told:
            print(f"{Path(main.__code__.co_filename).name}: {told}", file=sys.stderr)
        sys.exit(status)
    return wrapped
