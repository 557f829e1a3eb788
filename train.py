"""
One training script for everything: from scratch, a control that keeps LayerNorm, LayerNorm removal, evaluation.

    python train.py config/demo_remove_ln.py                        one process, CPU or GPU
    python train.py config/remove_ln.py --batch_size=8 --out_dir=x  any key of Config can be overridden
    torchrun --nproc_per_node=8 train.py config/remove_ln.py        the paper's run on 8 GPUs
    python train.py config/remove_ln.py --init_from=resume          goes on from out_dir/ckpt.pt
    python train.py --help                                          every key with its default

A run is a pure function of its config: which site loses its LayerNorm when, the learning rate and the batch all follow
from the iteration number, so any number of processes sees the same global batch, and a resumed run continues as if
never stopped. out_dir holds ckpt.pt, log.jsonl (one JSON object a line) and, after a removal, hf/: the LN-free model.
"""
import ast
import difflib
import fcntl
import gc
import glob
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import report
from model import BOS, EOT, KINDS, TOKEN, BadInput, GPT2, GPT2Config, export, first_bad_token, load_checkpoint, save_checkpoint
from prepare import get_tokenizer, tokenizer_files

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))


@dataclass
class Config:
    # in and out
    out_dir: str = 'out'
    dataset: str = 'openwebtext'        # data/NAME/{train,val}.bin, which prepare.py writes
    init_from: str = 'scratch'          # 'scratch', 'resume', a hub id ('gpt2'), a Hugging Face folder, a run's out_dir
    control: str = ''                   # the model that kept LN, to compare with: a removal's summary takes a run's out_dir,
                                        # an evaluation a hub id, a folder or an out_dir
    eval_interval: int = 100            # iterations; a checkpoint is written after each evaluation
    eval_iters: int = 400               # windows of block_size tokens, evenly spaced over val.bin; 0: all of it
    eval_only: bool = False             # evaluate once, write nothing
    bench: bool = False                 # time max_iters steps on synthetic tokens (with eval_only: forward passes), write nothing
    versus: str = ''                    # a second setting to time in turns with the first: 'ln_mode=real compile=False'
    log_interval: int = 10
    wandb_log: bool = False
    wandb_project: str = 'remove-ln'
    wandb_run_name: str = ''
    # model; all but dropout only from scratch (otherwise they are the loaded model's, and a smaller block_size crops it)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    dropout: float = 0.0
    ln_mode: str = 'real'               # 'real' or 'none'; remove_ln makes it 'fake'
    # batch
    batch_size: int = 12                # sequences of a micro-step on one process
    batch_tokens: int = 480 * 1024      # tokens of an iteration, over all processes and micro-steps
    seed: int = 1337
    # AdamW, warm-up, cosine
    max_iters: int = 600000
    learning_rate: float = 6e-4
    min_lr: float = 6e-5
    warmup_iters: int = 2000
    lr_decay_iters: int = 0             # 0: max_iters
    decay_lr: bool = True
    weight_decay: float = 1e-1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0              # 0: off
    # LayerNorm removal, in iterations: layer i's ln_2 goes at start_ln2 + i * gap_ln2, and so on; a start of -1: never
    remove_ln: bool = False
    start_ln2: int = 200
    gap_ln2: int = 20
    start_ln1qk: int = 440
    gap_ln1qk: int = 20
    start_ln1v: int = 680
    gap_ln1v: int = 30
    start_lnf: int = 1040
    start_eot: int = 1060               # end-of-text's constants become the ordinary ones
    start_bos: int = 1160               # position 0's too
    taper_iters: int = 0                # a gate's way from 0 to 1, and a special constant's to the ordinary one; 0: abrupt
    measure_once: bool = False          # all constants when the first site goes, not each when its own does
    aux_loss_weight: float = 0.0        # holds the std before ln_f near its mean; in a removal only
    # machine
    device: str = 'auto'                # 'cuda' if there is one, else 'cpu'
    dtype: str = 'auto'                 # of the forward pass: 'bfloat16' on CUDA where it is native, else 'float32'
    compile: bool | str | None = None   # 'blocks': each block by itself, which is sooner compiled; None: on CUDA
    gradient_checkpointing: bool = False    # keep one activation a block and compute the rest again: less memory, a third slower
    # a guard against divergence: a loss that stays guard_nats above its lowest level for guard_patience iterations ends the run
    guard_nats: float = 2.0             # 0: off
    guard_patience: int = 50


KEYS = {f.name: f for f in fields(Config)}
RANGES = [('eval_interval log_interval n_layer n_head n_embd block_size batch_size batch_tokens max_iters', 1, math.inf),
          ('eval_iters seed warmup_iters lr_decay_iters taper_iters', 0, math.inf),
          ('learning_rate min_lr weight_decay grad_clip aux_loss_weight guard_nats guard_patience', 0, math.inf),
          ('dropout beta1 beta2', 0, 1),
          ('start_ln2 start_ln1qk start_ln1v start_lnf start_eot start_bos', -1, math.inf)]


def load_config(argv):
    """A config file's assignments, then --key=value in order -> (Config, the keys that were given).

    A config file is read, not executed: each line is `name = value`, where value may be arithmetic on numbers and on
    names assigned above it. Raises BadInput for anything else.
    """
    values = {}

    def put(where, name, value):
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1, 0)
            raise BadInput(f"{where}: unknown key {name!r}; the nearest known one is {near[0]!r}")
        want = KEYS[name].type
        if want is float and type(value) is int:
            value = float(value)
        if not isinstance(value, want) or (want is int and isinstance(value, bool)):
            kind = getattr(want, '__name__', want)
            raise BadInput(f"{where}: {name} is {value!r}; expected {kind}, like {name}={KEYS[name].default!r}")
        values[name] = value

    for arg in argv:
        if arg.startswith('--'):
            name, eq, text = arg[2:].partition('=')
            if not eq:
                raise BadInput(f"{arg}: expected --key=value")
            try:
                value = text if name in KEYS and KEYS[name].type is str else ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            put(arg, name, value)
            continue
        try:
            with open(arg) as f:
                statements = ast.parse(f.read()).body
        except OSError:
            raise BadInput(f"no config file {arg}; there are: {', '.join(sorted(glob.glob('config/*.py')))}")
        except (SyntaxError, ValueError) as e:
            raise BadInput(f"{arg}: not a config file: {e}")
        for s in statements:
            if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant):   # the docstring
                continue
            if not (isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name) and all(
                    isinstance(n, (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Name, ast.operator, ast.unaryop, ast.Load))
                    for n in ast.walk(s.value))):
                raise BadInput(f"{arg}, line {s.lineno}: expected `name = value`, got {ast.unparse(s)!r}")
            try:
                value = eval(compile(ast.Expression(s.value), arg, 'eval'), {'__builtins__': {}}, values)
            except Exception as e:
                raise BadInput(f"{arg}, line {s.lineno}: {ast.unparse(s)!r}: {e}")
            put(f'{arg}, line {s.lineno}', s.targets[0].id, value)
    cfg = Config(**values)
    for names, low, high in RANGES:
        for name in names.split():
            if not low <= getattr(cfg, name) < high:
                raise BadInput(f"{name} is {getattr(cfg, name)}; expected at least {low}" + f" and less than {high}" * (high < math.inf))
    for name, good in (('dtype', ('auto', 'float32', 'bfloat16')), ('compile', (True, False, None, 'blocks')),
                       ('ln_mode', ('real', 'none', 'fake') if cfg.bench else ('real', 'none'))):
        if getattr(cfg, name) not in good:
            raise BadInput(f"{name} is {getattr(cfg, name)!r}; expected one of {', '.join(map(str, good))}"
                           + (" ('fake' comes with --remove_ln=True)" if cfg.ln_mode == 'fake' else ''))
    return cfg, set(values)

# -----------------------------------------------------------------------------
# The removal: what happens when, and what happens then.

def schedule(cfg, n_layer):
    """Every event of a removal, in order: [(iteration, 'remove', site) or (iteration, 'merge', kind)].

    The order of removal is this function: edit it for an order that the start_ and gap_ keys cannot express.
    """
    groups = [(cfg.start_ln2, cfg.gap_ln2, 'ln_2'), (cfg.start_ln1qk, cfg.gap_ln1qk, 'ln_1.qk'), (cfg.start_ln1v, cfg.gap_ln1v, 'ln_1.v')]
    events = [(start + i * gap, 'remove', f'h.{i}.{side}') for start, gap, side in groups if start >= 0 for i in range(n_layer)]
    events += [(cfg.start_lnf, 'remove', 'ln_f'), (cfg.start_eot, 'merge', 'eot'), (cfg.start_bos, 'merge', 'bos')]
    return sorted((e for e in events if e[0] != -1), key=lambda e: e[0])


def check_schedule(events, cfg, gates):
    """Raises BadInput for a schedule that cannot run, or not on a model with these gates, {site: float}."""
    length = max(cfg.taper_iters - 1, 0)        # a site that starts at i is fully removed at i + length
    removals = {}
    for it, event, name in events:
        if event == 'remove' and name in removals:      # schedule() is there to be edited
            raise BadInput(f"the schedule removes {name} twice, at iterations {removals[name]} and {it}")
        if it < 0 or it + length >= cfg.max_iters:
            raise BadInput(f"the schedule has {event} {name} at iteration {it}{f' to {it + length}' if length else ''}, outside "
                           f"the run of max_iters={cfg.max_iters}: change max_iters or the start_ and gap_ keys")
        if event == 'remove':
            removals[name] = it
    if not removals:
        raise BadInput("remove_ln=True, but every start_ key is -1: nothing would be removed")
    for site, gate in gates.items():
        if gate > 0 and site in removals:
            raise BadInput(f"the schedule asks for {site}, which the model of init_from={cfg.init_from} has lost already")
        if 0 < gate < 1:
            raise BadInput(f"the model of init_from={cfg.init_from} was left in the taper of {site}: resume that run instead")


def check_resume(cfg, ckpt, n_layer):
    """Raises BadInput unless the run that wrote the checkpoint and this one agree on what has happened so far."""
    it, old = ckpt['iter'], Config(**{k: v for k, v in ckpt['config'].items() if k in KEYS})
    past, now = ([e for e in schedule(c, n_layer) if e[0] < it] for c in (old, cfg))
    if cfg.remove_ln and (past != now or past and (old.taper_iters, old.measure_once) != (cfg.taper_iters, cfg.measure_once)):
        e = next((e for e in past + now if e not in past or e not in now), past[0])
        raise BadInput(f"the checkpoint of iteration {it} was written under another schedule ({e[1]} {e[2]} at {e[0]} is in one of them "
                       f"only, or the taper or measure_once differs): resume with the start_, gap_ and taper_ keys of the run itself")
    if cfg.max_iters < it:
        raise BadInput(f"max_iters is {cfg.max_iters}, but the checkpoint is of iteration {it}: type --max_iters={it} or more")


@torch.no_grad()
def measure(evaluator, kinds, batches):
    """The constants: for each LN and kind of token, the mean over tokens of sqrt(var + eps) -> (n_LN, 3) float64.

    batches: (x, y) micro-batches of this rank. The average is over the tokens of all ranks. A kind that these tokens
    lack takes the ordinary constant.
    """
    sums = counts = 0
    for x, y in batches:
        stds = torch.stack(evaluator(x)[2]).cpu().double()                          # (n_LN, B, T)
        onehot = (kinds(x).cpu()[..., None] == torch.arange(len(KINDS))).double()   # (B, T, 3)
        sums, counts = sums + torch.einsum('lbt,btk->lk', stds, onehot), counts + onehot.sum((0, 1))
    sums, counts = all_reduce(sums), all_reduce(counts)
    mean = sums / counts.clamp(min=1)
    return torch.where(counts > 0, mean, mean[:, TOKEN:TOKEN + 1])


def apply_schedule(events, cfg, it, model, measured):
    """Brings the gates and constants to where they belong in iteration it; returns the events to log.

    measured: a function that gives the constants, called only in an iteration that needs them.
    """
    if not any(when <= it <= when + cfg.taper_iters for when, _, _ in events):
        return []
    lns, sites, log = model.layernorms(), model.sites(), []
    removals = [(when, name.removesuffix('.qk').removesuffix('.v')) for when, event, name in events if event == 'remove']
    going = {ln for when, ln in removals if when == it}
    if cfg.measure_once:
        going = set(lns) if it == min(removals)[0] else set()
    going = [ln for ln in going if not lns[ln].gate.any()]      # measured when its first side goes, and shared by both
    stds = dict(zip(lns, measured())) if going else {}
    for ln in going:
        lns[ln].std.copy_(stds[ln])
        for start, kind in ((cfg.start_eot, EOT), (cfg.start_bos, BOS)):
            if 0 <= start <= it:
                lns[ln].std[kind] = lns[ln].std[TOKEN]
    for when, event, name in events:
        if event == 'remove':
            if when == it:
                std = lns[name.removesuffix('.qk').removesuffix('.v')].std
                log.append(dict(event='remove', iter=it, site=name, std=dict(zip(KINDS, std.tolist()))))
            if when <= it <= when + cfg.taper_iters:
                sites[name].fill_(min(1.0, (it - when + 1) / max(cfg.taper_iters, 1)))
        elif when <= it < when + max(cfg.taper_iters, 1):       # an equal part of the way in each iteration, the last one to the end
            left = when + max(cfg.taper_iters, 1) - it
            for ln in lns.values():
                kind = KINDS.index(name)
                ln.std[kind] = ln.std[TOKEN] if left == 1 else ln.std[kind] + (ln.std[TOKEN] - ln.std[kind]) / left
            if when == it:
                log.append(dict(event='merge', iter=it, kind=name))
    return log


def spread(std, mask):
    """The auxiliary loss: how far std (B, T) lies from its mean over the tokens of the mask, squared, on average."""
    n = mask.sum()
    mean = (std.detach() * mask).sum() / n
    return ((std - mean).square() * mask).sum() / n

# -----------------------------------------------------------------------------
# Data.

class Data:
    """data/NAME/{train,val}.bin, mapped, not read. Batches are a pure function of (seed, iteration)."""

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.dir = os.path.join('data', cfg.dataset)
        try:
            with open(os.path.join(self.dir, 'meta.json')) as f:
                self.meta = json.load(f)
        except FileNotFoundError:
            self.meta = {}      # bins that somebody else's script wrote: their tokenizer is not known
            return
        except ValueError as e:
            raise BadInput(f"{self.dir}/meta.json is not JSON ({e}): run prepare.py again")
        try:
            ok = self.meta['tokenizer'] in ('gpt2', 'bytes') and 0 <= self.meta['eot'] < self.meta['vocab_size']
            ok = ok and all(self.meta[split]['tokens'] >= 0 for split in ('train', 'val')) and type(self.meta.get('window', 2)) is int and self.meta.get('window', 2) > 1
        except (TypeError, KeyError):
            ok = False
        if not ok:
            raise BadInput(f"{self.dir}/meta.json does not name the tokenizer and the counts as prepare.py does: run it again")

    @property
    def unit(self):
        return 'byte' if self.meta.get('tokenizer') == 'bytes' else 'token'

    def open(self, vocab_size, splits):
        """Maps the splits, for a model with vocab_size tokens. Raises BadInput if they do not fit it."""
        known, T = self.meta.get('vocab_size', vocab_size), self.cfg.block_size
        if not known <= vocab_size < known + 128:       # some pad the vocabulary to a multiple of 64 or 128
            raise BadInput(f"{self.dir} was written with the {self.meta['tokenizer']!r} tokenizer ({known} tokens), "
                           f"but the model has {vocab_size}: prepare the data with the model's own tokenizer")
        self.vocab_size = vocab_size
        for split in splits:
            path = os.path.join(self.dir, f'{split}.bin')
            if not os.path.exists(path):
                raise BadInput(f"no {path}: make it with `python prepare.py {self.cfg.dataset}`")
            size = os.path.getsize(path)
            if size % 2:
                raise BadInput(f"{path} has an odd number of bytes ({size}), expected uint16 tokens: run prepare.py again")
            if size // 2 != self.meta.get(split, {}).get('tokens', size // 2):
                raise BadInput(f"{path} has {size // 2} tokens, meta.json says {self.meta[split]['tokens']}: run prepare.py again")
            if size // 2 < T + 1:
                raise BadInput(f"{path} has {size // 2} tokens, less than one window of block_size + 1 = {T + 1}: "
                               f"prepare more text, with a larger --val_fraction if it is val.bin")
            setattr(self, split, np.memmap(path, dtype=np.uint16, mode='r'))
            self._check(getattr(self, split)[:1 << 20])     # a look at the beginning; every batch is checked too

    def _check(self, ids):
        if ids.max() >= self.vocab_size:
            raise BadInput(f"{self.dir} holds token id {ids.max()}, but the model's vocabulary ends at {self.vocab_size - 1}: "
                           f"prepare the data with the model's own tokenizer")

    def _to_device(self, rows):
        self._check(rows)
        rows = rows.astype(np.int64)
        # contiguous, because a graph is compiled for its inputs' strides too
        x, y = (torch.from_numpy(np.ascontiguousarray(r)) for r in (rows[:, :-1], rows[:, 1:]))
        if self.device.startswith('cuda'):
            x, y = (t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))
        return x, y

    def batch(self, it, micro):
        """Micro-batch number `micro` of iteration it, counted over all ranks: x, y (batch_size, block_size)."""
        B, T = self.cfg.batch_size, self.cfg.block_size
        starts = np.random.default_rng([self.cfg.seed, it]).integers(len(self.train) - T, size=self.cfg.batch_tokens // T)
        return self._to_device(np.stack([self.train[s:s + T + 1] for s in starts[micro * B:(micro + 1) * B]]))

    def starts(self):
        """The first token of each validation window."""
        n = math.ceil((len(self.val) - 1) / self.cfg.block_size)
        k = min(self.cfg.eval_iters or n, n)
        return np.arange(k) * n // k * self.cfg.block_size

    def windows(self):
        """The validation windows: their number, and this rank's share of them as (first, x, y), y being -1 beyond the end.

        Windows start at multiples of block_size, so that each token is predicted once; the last may be partial. If the
        bin is made of windows that were cut elsewhere (prepare.py), the first token of each is not predicted: what
        stands before it is another text. (With a block_size that does not divide theirs, contexts still span a cut.)
        """
        B, T, starts = self.cfg.batch_size, self.cfg.block_size, self.starts()

        def share():
            for i in range(RANK * B, len(starts), WORLD * B):
                rows = np.zeros((B, T + 1), np.uint16)      # always B rows: one shape, one graph
                pad = np.ones((B, T), bool)
                for r, s in enumerate(starts[i:i + B]):
                    row = self.val[s:s + T + 1]
                    rows[r, :len(row)], pad[r, :len(row) - 1] = row, False
                    if window := self.meta.get('window'):
                        pad[r] |= np.arange(s + 1, s + T + 1) % window == 0
                x, y = self._to_device(rows)
                yield i, x, y.masked_fill(torch.from_numpy(pad).to(self.device), -1)
        return len(starts), share()


def all_reduce(x, op=dist.ReduceOp.SUM):
    """The sum (or other op) over ranks of a CPU tensor."""
    if WORLD > 1:
        dist.all_reduce(x, op)
    return x


@torch.no_grad()
def token_losses(evaluator, data):
    """The cross-entropy in nats of each token of the validation windows -> (windows, T) float32 array, on all ranks.

    NaN where nothing is predicted; infinite where the model gave a NaN or an infinite logit.
    """
    k, share = data.windows()
    losses = torch.zeros(k, data.cfg.block_size)
    for first, x, y in share:
        logits = evaluator(x)[0]
        for r in range(min(len(x), k - first)):     # a row at a time: all logits in float32 would be the largest tensor of a run
            z = logits[r].float()
            loss = F.cross_entropy(z, y[r], ignore_index=-1, reduction='none')
            loss = loss.masked_fill(~z.sum(-1).isfinite(), math.inf).masked_fill(y[r] == -1, math.nan)
            losses[first + r] = loss.cpu()
    return all_reduce(losses).numpy()

# -----------------------------------------------------------------------------

def learning_rate(cfg, it):
    """Linear warm-up, then cosine down to min_lr."""
    end = cfg.lr_decay_iters or cfg.max_iters
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= end:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (end - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)


def load_model(cfg, given, data):
    """The model to train and, for init_from='resume', the checkpoint to go on from. Sets cfg.block_size."""
    ckpt, mode = None, 'fake' if cfg.remove_ln else None
    shape = ('n_layer', 'n_head', 'n_embd')
    if cfg.init_from == 'scratch':
        torch.manual_seed(cfg.seed)
        return GPT2(GPT2Config(**{k: getattr(cfg, k) for k in (*shape, 'block_size', 'dropout')}, ln_mode=mode or cfg.ln_mode,
                               vocab_size=data.meta.get('vocab_size', 50257))), None
    if cfg.init_from == 'resume':
        ckpt = load_checkpoint(cfg.out_dir)
        if lacking := {'iter', 'config', 'optimizer', 'log_bytes', 'evaluated', 'base'} - ckpt.keys():
            raise BadInput(f"{cfg.out_dir}/ckpt.pt cannot be resumed: it lacks {', '.join(sorted(lacking))}")
        if (ckpt['model_args']['ln_mode'] == 'fake') != cfg.remove_ln:
            raise BadInput(f"{cfg.out_dir}/ckpt.pt is of a run with remove_ln={not cfg.remove_ln}: resume it with the same config")
        model = GPT2.from_state(ckpt['model_args'], ckpt['model'], cfg.out_dir, dropout=cfg.dropout)
    else:
        model = GPT2.from_pretrained(cfg.init_from, mode, cfg.dropout)
    for key in (*shape, 'ln_mode'):
        if key in given and getattr(cfg, key) != getattr(model.config, key) and not (key == 'ln_mode' and cfg.remove_ln):
            raise BadInput(f"{key} is {getattr(cfg, key)}, but the model of init_from={cfg.init_from} has "
                           f"{getattr(model.config, key)}: leave {key} out, or start from scratch")
    if 'block_size' in given and ckpt and cfg.block_size != model.config.block_size:
        raise BadInput(f"block_size is {cfg.block_size}, but {cfg.out_dir}/ckpt.pt has {model.config.block_size}: leave it out to resume")
    if 'block_size' in given:
        model.crop_block_size(cfg.block_size)
    cfg.block_size = model.config.block_size
    return model, ckpt


def peak_flops():
    """The GPU's dense bf16 peak in FLOPs a second, by its datasheet; None if it is not in this list."""
    table = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12, 'L40S': 362e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}
    return next((v for k, v in table.items() if k in torch.cuda.get_device_name()), None)


def find_device(cfg):
    device = cfg.device if cfg.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda':
        device = f'cuda:{LOCAL_RANK}'
    try:
        if device.split(':')[0] not in ('cpu', 'cuda'):
            raise RuntimeError('expected cpu or cuda')
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(f"device is {cfg.device!r}, which cannot be used here ({str(e).splitlines()[0]}); type --device=cpu")
    return device


def start_machine(cfg, device):
    """Joins the process group -> (autocast's context, the forward pass's dtype, whether to compile)."""
    cuda = device.startswith('cuda')
    if WORLD > 1:
        if cuda:
            torch.cuda.set_device(device)
        # under torchrun --max_restarts, workers that were started anew find the addresses of dead ones in the store, and hang
        # (github.com/pytorch/pytorch/issues/135712): a prefix keeps the generations apart
        store, rank, world = next(dist.rendezvous('env://'))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo', store=store, rank=rank, world_size=world)
    native_bf16 = cuda and torch.cuda.get_device_capability()[0] >= 8
    dtype = cfg.dtype if cfg.dtype != 'auto' else 'bfloat16' if native_bf16 else 'float32'
    autocast = torch.autocast(device.split(':')[0], torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
    return autocast, dtype, cuda if cfg.compile is None else cfg.compile


def evaluate(cfg, given):
    """eval_only: the losses of one model, or of two token by token, over val.bin. Writes nothing."""
    if cfg.init_from == 'scratch':
        raise BadInput("nothing to evaluate: name a model, with --init_from=MODEL (a hub id, a folder, a run's out_dir)")
    device = find_device(cfg)
    data = Data(cfg, device)
    model, _ = load_model(cfg, given, data)
    models = {cfg.init_from if cfg.init_from != 'resume' else cfg.out_dir: model}
    data.open(model.config.vocab_size, ['val'])
    if cfg.control:
        models[f'{cfg.control} (control)'] = control = GPT2.from_pretrained(cfg.control)
        if control.config.vocab_size != model.config.vocab_size:
            raise BadInput(f"control={cfg.control} has a vocabulary of {control.config.vocab_size} tokens, init_from={cfg.init_from} of "
                           f"{model.config.vocab_size}: expected two models of one vocabulary")
        control.crop_block_size(cfg.block_size)
    autocast, dtype, compiled = start_machine(cfg, device)
    losses, unit = {}, data.unit
    for name, model in models.items():
        model.eval().to(device)
        model.config.eot_token_id = data.meta.get('eot', model.config.eot_token_id)
        with autocast:
            losses[name] = token_losses(compile_model(model, compiled), data)
        model.cpu()
    if RANK > 0:
        return
    for name, table in losses.items():
        bad = np.argwhere(np.isinf(table))
        if len(bad):
            start = data.starts()[bad[0][0]]
            ids = torch.from_numpy(data.val[start:start + cfg.block_size].astype(np.int64))
            at = first_bad_token(models[name], ids)
            raise BadInput(f"{name} gives NaN or infinite logits" + (f", first at token {start + at:,} (id {ids[at]})" if at is not None else
                           f" in the window from token {start:,} on") + f" of data/{cfg.dataset}/val.bin, and for {len(bad):,} of "
                           f"{np.isfinite(table).sum() + len(bad):,} {unit}s in all; there is no mean to report")
    mean, error = report.mean_and_error(next(iter(losses.values())))
    print(f"val loss {mean:.4f} nats per {unit}, standard error {report.number(error).strip()}; data/{cfg.dataset}/val.bin, {len(table):,} windows of "
          f"{cfg.block_size}, {dtype}\n\n{report.loss_table(losses, unit)}")


def train(cfg, given, held):
    """A run, from the checks of its input to what it hands over. held: an ExitStack, which gets out_dir's lock."""
    master = RANK == 0
    device = find_device(cfg)
    cuda = device.startswith('cuda')

    # everything that can be wrong with the input is looked at here, before anything is written
    if cfg.init_from != 'resume' and os.path.exists(os.path.join(cfg.out_dir, 'ckpt.pt')):
        raise BadInput(f"{cfg.out_dir} holds another run's checkpoint: resume that run with --init_from=resume, "
                       f"or choose another --out_dir")
    data = Data(cfg, device)
    raw, ckpt = load_model(cfg, given, data)
    data.open(raw.config.vocab_size, ['train', 'val'])
    if cfg.control:
        report.evals(cfg.control)
    if cfg.remove_ln and not ckpt and os.path.exists(hf := os.path.join(cfg.out_dir, 'hf')):
        raise BadInput(f"{hf} exists already, and this run would write it: move it away, or choose another --out_dir")
    unit = cfg.batch_size * cfg.block_size
    if cfg.batch_tokens % unit:
        raise BadInput(f"batch_tokens is {cfg.batch_tokens}; expected a multiple of batch_size * block_size = {cfg.batch_size} * {cfg.block_size} = "
                       f"{unit}: type --batch_tokens={max(round(cfg.batch_tokens / unit), 1) * unit}")
    raw.config.eot_token_id = data.meta.get('eot', raw.config.eot_token_id)
    start = ckpt['iter'] if ckpt else 0
    base = ckpt['base'] if ckpt else cfg.init_from if not os.path.exists(cfg.init_from) else './' + os.path.basename(cfg.init_from.rstrip('/'))
    events = schedule(cfg, raw.config.n_layer) if cfg.remove_ln else []
    if cfg.remove_ln:
        check_schedule(events, cfg, {} if ckpt else {k: v.item() for k, v in raw.sites().items()})
    log_path, losses = os.path.join(cfg.out_dir, 'log.jsonl'), []
    if ckpt:
        check_resume(cfg, ckpt, raw.config.n_layer)
        if not os.path.exists(log_path) or os.path.getsize(log_path) < ckpt['log_bytes']:
            raise BadInput(f"{log_path} is shorter than when {cfg.out_dir}/ckpt.pt was written, or missing: put it back, "
                           f"or start another run with --init_from={cfg.out_dir}")
    if ckpt and master:
        for key, old in ckpt['config'].items():
            if old != getattr(cfg, key, old) and key not in ('init_from', 'out_dir'):
                print(f"note: {key} was {old!r} when the checkpoint was written, now it is {getattr(cfg, key)!r}")
    wandb = None
    if cfg.wandb_log and master:
        try:
            import wandb
        except ImportError:
            raise BadInput("wandb_log=True needs wandb: pip install wandb")
    if master:
        try:
            os.makedirs(cfg.out_dir, exist_ok=True)
            held.enter_context(lock(cfg.out_dir))
            with open(log_path, 'a' if ckpt else 'w') as f:
                if ckpt:
                    f.truncate(ckpt['log_bytes'])       # what came after the checkpoint will happen again
        except OSError as e:
            raise BadInput(f"out_dir {cfg.out_dir} cannot be written: {e}")
    if ckpt:
        with open(log_path) as f:
            losses = [(e['iter'], e['loss']) for e in map(json.loads, f.read(ckpt['log_bytes']).splitlines()) if e['event'] == 'train']
    if wandb:
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or cfg.out_dir, config=asdict(cfg))

    autocast, dtype, compiled = start_machine(cfg, device)
    if cuda:
        torch.set_float32_matmul_precision('high')      # TF32 for what autocast leaves in float32
    raw.to(device)

    # Two graphs for the whole run: one to train; one to evaluate, which also measures the constants. (Under DDP, torch
    # cuts the first where its gradient buckets end.)
    model, evaluator = compile_model(raw, compiled), lambda x: raw(x, return_stds=cfg.remove_ln)
    if compiled is True:
        evaluator = torch.compile(evaluator, fullgraph=True)
    if WORLD > 1:   # gates and constants are set alike on all ranks, so there are no buffers to broadcast
        warnings.filterwarnings('ignore', message='.*broadcast_buffers')    # torch 2.11 has no other name for it
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[LOCAL_RANK] if cuda else None, broadcast_buffers=False)
    optimizer = make_optimizer(cfg, raw)
    evaluated = bool(ckpt) and ckpt['evaluated']
    if ckpt:
        optimizer.load_state_dict(ckpt['optimizer'])
        ckpt = None
    n_sites = len(raw.sites()) if cfg.remove_ln else 0
    n_gone = lambda it: sum(e[0] < it and e[1] == 'remove' for e in events)
    peak = peak_flops() if cuda else None
    if master:
        print(f"{raw.num_params():,} parameters, ln_mode {raw.config.ln_mode!r}, on {WORLD} x {device.split(':')[0]} in {dtype}"
              f"{', compiled' if compiled else ''}; {cfg.batch_tokens:,} tokens an iteration")

    def log(**entry):
        if master:
            with open(log_path, 'a') as f:
                f.write(json.dumps(entry) + '\n')
            if wandb:
                wandb.log({f'{entry["event"]}/{k}': v for k, v in entry.items() if k not in ('event', 'iter')}, step=entry['iter'])

    def save(evaluated):
        if master:
            save_checkpoint(cfg.out_dir, raw, optimizer=optimizer.state_dict(), iter=it, evaluated=evaluated,
                            config=asdict(cfg), base=base, log_bytes=os.path.getsize(log_path))

    def give_up(what):
        if not master:      # all ranks come here together; one tells
            sys.exit(2)
        last = max((e for e in events if e[0] < it), default=None, key=lambda e: e[0])
        kept = os.path.join(cfg.out_dir, 'ckpt.pt')
        raise BadInput(f"diverged: {what}; the last event of the removal was " + (f"{last[1]} {last[2]} at iteration {last[0]}" if last else "none yet")
                       + (f"; {kept} of before is kept" if os.path.exists(kept) else "; no checkpoint was written yet")
                       + ". Try a wider gap, --taper_iters=20, --aux_loss_weight=0.1 or a lower learning rate")

    def validate():
        raw.eval()
        with autocast:
            losses = token_losses(evaluator, data)
        raw.train()
        return np.nanmean(losses, dtype=np.float64).item()

    raw.train()
    raw.gradient_checkpointing = cfg.gradient_checkpointing
    n_micro = cfg.batch_tokens // unit
    it, t0 = start, time.time()
    logged_it, logged_t = it, t0
    first_bad = torch.full((), -1, device=device)       # the iteration whose gradient was the first that is not finite
    asked = ask_to_stop()
    while True:
        # 1. evaluate and save: the model as the last iteration left it
        if (it % cfg.eval_interval == 0 or it == cfg.max_iters) and not evaluated:
            t = time.time()
            val_loss = validate()
            if first_bad.item() >= 0 or not math.isfinite(val_loss):
                give_up(f"a gradient that is not finite at iteration {first_bad.item()}" if first_bad.item() >= 0 else
                        f"the validation loss before iteration {it} is {val_loss}")
            log(event='eval', iter=it, val_loss=val_loss, tokens=it * cfg.batch_tokens)
            if master:
                print(f"iter {it:>6} | val loss {val_loss:.4f} nats per {data.unit}")
            if it == cfg.max_iters or it > 0 and high_since(losses, cfg)[0] is None:
                save(evaluated=True)
            elif it > 0 and master:
                print(f"iter {it:>6} | not saved: the loss is far above its level, and the last checkpoint is better")
            logged_t += time.time() - t
        evaluated = False
        if it == cfg.max_iters:
            break

        # 2. what the schedule has for this iteration
        if cfg.remove_ln:
            def measured():
                raw.eval()
                with autocast:
                    stds = measure(evaluator, raw.kinds, (data.batch(it, micro) for micro in range(RANK, n_micro, WORLD)))
                raw.train()
                return stds
            t = time.time()
            for entry in apply_schedule(events, cfg, it, raw, measured):
                log(**entry)
                if master and entry['event'] == 'remove':
                    s = entry['std']
                    print(f"iter {it:>6} | remove {entry['site']:<12} std {s['token']:.3f}, position 0 {s['bos']:.3f}, end-of-text {s['eot']:.3f}")
                elif master:
                    print(f"iter {it:>6} | merge the constants of {'position 0' if entry['kind'] == 'bos' else 'end-of-text'} into the ordinary ones")
                same = torch.cat([b.detach().flatten().cpu().double() for b in raw.buffers()])
                assert torch.equal(all_reduce(same.clone(), dist.ReduceOp.MAX), same), "the ranks' gates or constants differ"
            logged_t += time.time() - t

        # 3. a step. Nothing here waits for the device, except in an iteration that is logged
        lr = learning_rate(cfg, it)
        loss, norm = step(cfg, it, n_micro, model, raw, optimizer, lr, data.batch, autocast)
        first_bad = torch.where((first_bad < 0) & ~norm.isfinite(), it, first_bad)
        it += 1

        if (it - 1) % cfg.log_interval == 0 or it == cfg.max_iters:
            loss = all_reduce(loss.cpu().double()).item()
            if first_bad.item() >= 0 or not math.isfinite(loss):
                give_up(f"a gradient that is not finite at iteration {first_bad.item()}" if first_bad.item() >= 0 else
                        f"the loss of iteration {it - 1} is {loss}")
            losses.append((it - 1, loss))
            since, level = high_since(losses, cfg)
            if since is not None and it - since >= cfg.guard_patience:
                give_up(f"since iteration {since} the loss, {loss:.4f} now, is more than guard_nats={cfg.guard_nats:g} above its lowest level, {level:.4f}")
            now = time.time()
            tok_per_s = (it - logged_it) * cfg.batch_tokens / max(now - logged_t, 1e-9)
            left = int((now - t0) / (it - start) * (cfg.max_iters - it))
            logged_it, logged_t = it, now
            entry = dict(event='train', iter=it - 1, loss=loss, lr=lr, tok_per_s=round(tok_per_s, 1))
            if peak:
                entry['mfu'] = tok_per_s * raw.flops_per_token() / (peak * WORLD)
            log(**entry)
            if master:
                print(f"iter {it - 1:>6} | loss {loss:.4f} | lr {lr:.2e} | {tok_per_s:>11,.0f} tok/s"
                      + (f" | mfu {entry['mfu']:6.1%}" if peak else '')
                      + (f" | sites {n_gone(it):>3}/{n_sites}" if n_sites else '')
                      + f" | {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left", flush=True)

        if it < cfg.max_iters and (all_reduce(torch.tensor(len(asked))) if WORLD > 1 else asked):       # the ranks stop together
            save(evaluated=False)
            raise Stopped(it, asked[0] if asked else signal.SIGTERM)
    if master:
        finish(cfg, raw, data, base)


def compile_model(model, how):
    """The model as a whole or block by block (how: True or 'blocks'); a graph break is an error either way."""
    if how == 'blocks':
        for block in model.h:
            block.compile(fullgraph=True)
    return torch.compile(model, fullgraph=True) if how is True else model


def make_optimizer(cfg, model):
    """AdamW; weight decay on matrices only."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == two_d] for two_d in (True, False))
    return torch.optim.AdamW([{'params': matrices, 'weight_decay': cfg.weight_decay}, {'params': vectors, 'weight_decay': 0.0}],
                             lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)


def step(cfg, it, n_micro, model, raw, optimizer, lr, batch, autocast):
    """One iteration -> (this rank's part of the mean loss, the norm of the whole gradient), 0-d tensors on the device.

    model: raw, compiled or wrapped. batch(it, micro) gives x, y. Micro-batches are dealt to the ranks in turn; where
    they do not come out even, some ranks compute one that does not count, rather than wait.
    """
    for group in optimizer.param_groups:
        group['lr'] = lr
    total = 0.0
    for first in range(0, n_micro, WORLD):
        micro = first + RANK
        counts = 1 / n_micro if micro < n_micro else 0.0
        x, y = batch(it, micro % n_micro)
        if cfg.dropout:     # a stream for each micro-batch: resuming needs no generator's state
            torch.manual_seed(((cfg.seed * 1_000_003 + it) * 1_000_003 + micro) % 2 ** 63)
        if WORLD > 1:       # reduce the gradients once an iteration, in the last micro-step
            model.require_backward_grad_sync = first + WORLD >= n_micro
        with autocast:
            if cfg.remove_ln and cfg.aux_loss_weight:
                _, ce, stds = model(x, y, return_stds=True)
                loss = ce + cfg.aux_loss_weight * spread(stds[-1], raw.kinds(x) == TOKEN)
            else:
                _, ce = model(x, y)
                loss = ce
        (loss * (counts * WORLD)).backward()        # DDP takes the mean over ranks; the sum is wanted
        total = total + ce.detach() * counts
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm

# -----------------------------------------------------------------------------
# What a step costs: config/bench.py.

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive under it, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.seen:
                self.seen.add(key)
                self.now += t.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self.gone, key, t.untyped_storage().nbytes())
        return out

    def gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


def peak_memory(cfg):
    """The bytes that two uncompiled steps in bfloat16 need at most, computed with fake tensors: nothing is executed."""
    with FakeTensorMode(), LiveBytes() as live:
        raw = GPT2(GPT2Config(block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, ln_mode=cfg.ln_mode))
        raw.gradient_checkpointing = cfg.gradient_checkpointing
        optimizer, x = make_optimizer(cfg, raw), torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.int64)
        for _ in range(2):      # the optimizer's moments come with the first
            step(cfg, 0, 1, raw, raw, optimizer, cfg.learning_rate, lambda it, micro: (x, x), torch.autocast('cpu', torch.bfloat16))
        return live.peak


def bench(settings):
    """settings: [(label, cfg)]. Times their steps in turns, because machines are noisy, and prints what they took."""
    if WORLD > 1:
        raise BadInput("config/bench.py times one process; without torchrun: python train.py config/bench.py")
    if settings[0][1].device == 'fake':
        for label, cfg in settings:
            print(f"{label}: peak memory {peak_memory(cfg) / 2 ** 30:.1f} GiB (computed: bfloat16, batch_size {cfg.batch_size}, not compiled)")
        return
    from torch._dynamo.utils import counters

    def memory(device, peak):       # bytes: of the GPU, or of this process where /proc tells (0 elsewhere)
        if device.startswith('cuda'):
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        try:
            with open('/proc/self/status') as f:
                return int(re.search(r'VmHWM:\s*(\d+)' if peak else r'VmRSS:\s*(\d+)', f.read())[1]) * 1024
        except OSError:
            return 0

    def forget_peak(device):
        if device.startswith('cuda'):
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists('/proc/self/clear_refs'):
            with open('/proc/self/clear_refs', 'w') as f:
                f.write('5')

    runs = []
    for label, cfg in settings:
        device = find_device(cfg)
        autocast, dtype, how = start_machine(cfg, device)
        unit = cfg.batch_size * cfg.block_size
        if cfg.batch_tokens % unit:
            raise BadInput(f"batch_tokens is {cfg.batch_tokens}; expected a multiple of batch_size * block_size = {unit}: type --batch_tokens={unit}")
        forget_peak(device)
        before, graphs = memory(device, peak=False), counters['stats']['unique_graphs']
        torch.manual_seed(cfg.seed)
        raw = GPT2(GPT2Config(block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=cfg.dropout,
                              ln_mode=cfg.ln_mode)).to(device)
        raw.gradient_checkpointing = cfg.gradient_checkpointing
        for gate in raw.sites().values() if cfg.ln_mode == 'fake' else []:
            gate.fill_(0.5)
        model, optimizer = compile_model(raw.train(not cfg.eval_only), how), make_optimizer(cfg, raw)
        x, y = (torch.randint(raw.config.vocab_size, (cfg.batch_size, cfg.block_size), device=device) for _ in range(2))

        def one(cfg=cfg, model=model, raw=raw, optimizer=optimizer, x=x, y=y, autocast=autocast, unit=unit):
            if cfg.eval_only:
                with torch.no_grad(), autocast:
                    for _ in range(cfg.batch_tokens // unit):
                        result = model(x)[0]
            else:
                result = step(cfg, 0, cfg.batch_tokens // unit, model, raw, optimizer, cfg.learning_rate, lambda it, micro: (x, y), autocast)[0]
            if x.is_cuda:
                torch.cuda.synchronize()
            return result
        t0 = time.perf_counter()
        one()
        compiling = time.perf_counter() - t0
        one()
        runs.append(dict(label=label, cfg=cfg, one=one, seconds=[], first=compiling, peak=memory(device, peak=True) - before,
                         graphs=counters['stats']['unique_graphs'] - graphs, flops=raw.flops_per_token() / (3 if cfg.eval_only else 1),
                         what=f"{raw.num_params():,} parameters, {device}, {dtype}"))
    for i in range(settings[0][1].max_iters):
        for r in runs if i % 2 else runs[::-1]:
            t0 = time.perf_counter()
            r['one']()
            r['seconds'].append(time.perf_counter() - t0)
    peak = peak_flops() if torch.cuda.is_available() else None
    for r in runs:
        t, tokens = np.array(r['seconds']), r['cfg'].batch_tokens
        print(f"{r['label']}: {r['what']}\n    {tokens / np.median(t):>12,.0f} tokens/s; a step of {tokens:,} tokens: median {np.median(t) * 1e3:.1f} ms, "
              f"middle half {np.quantile(t, 0.25) * 1e3:.1f} to {np.quantile(t, 0.75) * 1e3:.1f} ({len(t)} steps)"
              + (f"; MFU {tokens / np.median(t) * r['flops'] / peak:.1%}" if peak else '')
              + f"\n    peak memory {r['peak'] / 2 ** 30:.2f} GiB; {r['graphs']} graphs; the first step took {r['first']:.1f} s")
    if len(runs) == 2:
        ratio = np.array(runs[0]['seconds']) / np.array(runs[1]['seconds'])
        print(f"time of the first over the second, step by step: median {np.median(ratio):.3f}, middle half {np.quantile(ratio, 0.25):.3f} to {np.quantile(ratio, 0.75):.3f}")

# -----------------------------------------------------------------------------
# What goes wrong in a night.

def high_since(losses, cfg):
    """losses [(iteration, loss)] -> (since when it has been guard_nats above its lowest level, or None; that level).

    The level is the lowest mean of five consecutive logged losses.
    """
    if not losses or not cfg.guard_nats:
        return None, None
    values = np.array([loss for _, loss in losses])
    k = min(5, len(values))
    level = np.convolve(values, np.ones(k) / k, 'valid').min()
    since = None
    for it, loss in reversed(losses):
        if loss <= level + cfg.guard_nats:
            break
        since = it
    return since, level


def lock(out_dir):
    """Raises BadInput if another run writes there. The system lets go of the lock however this process ends."""
    f = open(os.path.join(out_dir, '.lock'), 'w')
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another run is writing to {out_dir} at this moment: choose another --out_dir, or wait for it")
    return f


class Stopped(Exception):
    """(the iteration to go on with, the signal that asked for it)"""


def ask_to_stop():
    """From now on SIGTERM and Ctrl-C finish the step and save. Returns a list: the signals that came."""
    asked, when = [], []

    def handler(number, frame):
        if number == signal.SIGINT and when and time.time() - when[0] > 1:     # torchrun passes the first one on as a second
            raise KeyboardInterrupt
        if not asked and RANK == 0:
            print("\nfinishing this step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)
        asked.append(number)
        when.append(time.time())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return asked

# -----------------------------------------------------------------------------
# The end of a run.

def finish(cfg, model, data, base):
    """After a removal: folds, checks, saves out_dir/hf and prints what came of it."""
    if not cfg.remove_ln:
        print(f"saved {cfg.out_dir}/ckpt.pt")
        return
    model.eval()
    x = next(data.windows()[1])[1][:4]
    torch.set_float32_matmul_precision('highest')       # TF32 would drown what is looked for
    try:
        folded = model.fold_ln()
    except BadInput as e:
        print(f"no LN-free model to hand over: {e}; {cfg.out_dir}/ckpt.pt holds the model as it is")
        return
    with torch.no_grad():
        logits = model(x)[0]
        diff, scale = (folded(x)[0] - logits).abs().max().item(), logits.abs().max().item()
    if not diff <= 1e-3 * max(scale, 1):     # float32 rounding is far below; also where a logit is not a number
        raise BadInput(f"the folded model's logits differ from the unfolded one's by {diff:.2g} (largest logit {scale:.3g}): nothing "
                       f"is handed over; {cfg.out_dir}/ckpt.pt holds the model as it is")
    try:
        if 'tokenizer' not in data.meta:
            raise BadInput(f"{data.dir} has no meta.json, which would name its tokenizer")
        tokenizer = get_tokenizer(data.meta['tokenizer'])
        torch.manual_seed(cfg.seed)
        ids = folded.generate(torch.tensor([[model.config.eot_token_id]], device=x.device), 240, temperature=0.8, top_k=40)[0, 1:].tolist()
        text = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
        sample = "a sample from the LN-free model:\n" + '\n'.join('    ' + line for line in text.splitlines())
        files = tokenizer_files(tokenizer, cfg.block_size)
    except BadInput as e:       # bins of unknown origin, or offline
        sample, files = f"no sample, and no tokenizer beside the model: {e}", {}
    files['README.md'] = report.model_card(cfg, base, model, data.meta, data.unit, bool(files))
    hf = os.path.join(cfg.out_dir, 'hf')
    new = f'{hf}.new.{os.getpid()}'
    export(model, new, {name: text.encode() for name, text in files.items()})
    if os.path.exists(hf):      # the run was resumed after its end, and somebody may have edited what it wrote
        aside = next(f'{hf}.{n}' for n in range(1, 10 ** 6) if not os.path.exists(f'{hf}.{n}'))
        os.rename(hf, aside)
        print(f"note: {hf} was there already and is now {aside}")
    os.rename(new, hf)

    print(f"\n{report.result_table(cfg.out_dir, cfg.control, len(model.sites()), data.unit)}\n\n"
          f"folded and unfolded logits differ by {diff:.1e} at most (largest logit {scale:.1f})\n\n{sample}")
    try:
        picture = os.path.join(cfg.out_dir, 'loss.png')
        report.plot(picture, [cfg.out_dir] + [cfg.control] * bool(cfg.control))
        print(f"\nthe loss curves:     {picture}")
    except ModuleNotFoundError:
        print("\nno picture of the loss curves: matplotlib is not installed (pip install matplotlib)")
    print(f"the LN-free model:   {hf}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(__doc__ + '\n' + '\n'.join(f"    --{f.name}={f.default!r}" for f in KEYS.values()))
        return
    handlers, status = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}, 0
    try:
        cfg, given = load_config(argv)
        if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) and os.path.exists(os.path.join(cfg.out_dir, 'ckpt.pt')):
            cfg.init_from = 'resume'    # torchrun started us anew, because a worker died
        if cfg.bench:
            settings = [('this setting', cfg)]
            if cfg.versus:
                settings.append((cfg.versus, load_config(argv + ['--' + kv for kv in cfg.versus.split()])[0]))
            bench(settings)
        elif cfg.eval_only:
            evaluate(cfg, given)
        else:
            with ExitStack() as held:
                train(cfg, given, held)
    except BadInput as e:
        status = 2
        if LOCAL_RANK == 0 or dist.is_initialized():    # what all find wrong at the start is told once
            print(f"train.py: {e}", file=sys.stderr)
    except OSError as e:
        status = 2
        print(f"train.py: {e.strerror or e}{f': {e.filename}' if e.filename else ''}; --init_from=resume goes on from the last checkpoint", file=sys.stderr)
    except Stopped as e:
        status = 128 + e.args[1]
        if RANK == 0:
            print(f"train.py: stopped and saved before iteration {e.args[0]}; go on with the same command and --init_from=resume", file=sys.stderr)
    except SystemExit as e:     # a rank that leaves the telling to another
        status = e.code
    except KeyboardInterrupt:
        status = 130
        print("train.py: interrupted; --init_from=resume goes on from the last checkpoint in out_dir", file=sys.stderr)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    if WORLD > 1:
        gc.collect()    # a DDP that lives until the process ends, in a cycle, makes torch 2.11 abort there now and then
    if status:
        sys.exit(status)


if __name__ == '__main__':
    main()
