"""
One training script for everything: from scratch, LayerNorm removal, its control, evaluation.

    python train.py config/demo_remove_ln.py                    one process, CPU or GPU
    python train.py config/remove_ln.py --batch_size=8          any key of Config can be overridden
    python train.py config/remove_ln.py config/control.py       its control: config files stack
    python train.py config/remove_ln.py --init_from=resume      goes on from out_dir/ckpt.pt
    torchrun --nproc_per_node=8 train.py config/remove_ln.py    the paper's run on 8 GPUs

A run is a pure function of its config: which site loses its LayerNorm when, the learning rate and
the batch follow from the iteration number. So any number of processes sees the same global batch,
and a resumed run continues as if never stopped. out_dir holds ckpt.pt, log.jsonl (one JSON object
a line) and, after a removal, hf/: the LN-free model. The keys are the fields of Config.
"""
import ast
import atexit
import difflib
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

from model import (BOS, EOT, KINDS, TOKEN, GPT2, GPT2Config, UserError, check, command, companions,
                   load_checkpoint, one_line, probe, save_checkpoint, trouble, write)
from prepare import fingerprint, vocabulary

RANK, LOCAL_RANK = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
WORLD = int(os.environ.get('WORLD_SIZE', 1))
RESTARTS = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')

@dataclass
class Config:
    # in and out
    out_dir: str = 'out'
    dataset: str = 'openwebtext'    # data/NAME/{train,val}.bin, which prepare.py writes
    init_from: str = 'scratch'      # 'scratch', 'resume', a hub id, a Hugging Face folder, out_dir
    control: str = ''               # out_dir of the run that kept LN; in an evaluation, any model
    eval_interval: int = 100        # iterations; a checkpoint is written after each evaluation
    eval_iters: int = 400           # windows of block_size tokens, spread over val.bin; 0: all
    eval_only: bool = False         # evaluate init_from, write nothing
    log_interval: int = 10
    wandb_log: bool = False
    wandb_project: str = 'remove-ln'
    wandb_run_name: str = ''        # '': out_dir
    # model; from scratch only, but for dropout and a block_size that crops a loaded model's context
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 0             # 0: the data's
    dropout: float = 0.0
    ln_mode: str = 'real'           # 'real' or 'none'; remove_ln makes it 'fake'
    # batch
    batch_size: int = 12            # sequences of a micro-step; changes no loss, if dropout is 0
    batch_tokens: int = 480 * 1024  # tokens of an iteration, over all processes and micro-steps
    seed: int = 1337
    # AdamW, warm-up, cosine
    max_iters: int = 600000
    learning_rate: float = 6e-4
    min_lr: float = 6e-5
    warmup_iters: int = 2000
    lr_decay_iters: int = 0         # 0: max_iters
    decay_lr: bool = True
    weight_decay: float = 1e-1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0          # 0: off
    # removal, in iterations: layer i loses ln_2 at start_ln2 + i * gap_ln2, and so on; -1: never
    remove_ln: bool = False
    start_ln2: int = 200
    gap_ln2: int = 20
    start_ln1qk: int = 440
    gap_ln1qk: int = 20
    start_ln1v: int = 680
    gap_ln1v: int = 30
    start_lnf: int = 1040
    start_eot: int = 0              # when end-of-text takes the ordinary constants; 0: always
    start_bos: int = 0              # position 0
    taper_iters: int = 0            # how long a site takes to fade, and a merge; 0: abrupt
    aux_loss_weight: float = 0.0    # holds the std before ln_f near its mean; in a removal only
    # machine
    device: str = 'auto'            # 'cuda' if there is one, else 'cpu'; 'mps'
    dtype: str = 'auto'             # of the forward pass: bfloat16 where CUDA has it, else float32
    compile: bool | None = None     # None: on CUDA
    gradient_checkpointing: bool = False    # less memory, a third slower
    # a loss guard_nats above its lowest level, for guard_patience iterations or at the end, has
    # diverged: the run stops and the last checkpoint is kept
    guard_nats: float = 2.0         # 0: off
    guard_patience: int = 50

    @property
    def n_micro(self):
        """Micro-batches of an iteration, over all ranks."""
        return self.batch_tokens // (self.batch_size * self.block_size)

KEYS = {f.name: f for f in fields(Config)}

def load_config(argv):
    """Config files and --key=value, the later one wins -> Config; its `given` names what they set.

    A config file is Python that assigns keys; it knows the defaults and what files before it
    assigned. Modules, functions and names with an underscore in front are its own.
    """
    given = {}
    for arg in argv:
        known = {name: key.default for name, key in KEYS.items()} | given
        if arg.startswith('--'):
            name, eq, value = arg[2:].partition('=')
            check(eq, f"{arg}: expected --key=value")
            if name in KEYS and KEYS[name].type is not str:
                with suppress(ValueError, SyntaxError):     # what is no literal stays a text
                    value = ast.literal_eval(value)
            found = {name: value}
        else:
            found = {'__file__': os.path.abspath(arg), **known}
            try:
                with open(arg, encoding='utf-8-sig') as f:
                    exec(compile(f.read(), arg, 'exec'), found)
            except Exception as e:      # it is a program, and may fail in any way
                raise UserError(f"{arg}: {type(e).__name__}: {one_line(e)}")
            found = {name: value for name, value in found.items()
                     if (name not in known or value is not known[name])
                     and not (name.startswith('_') or callable(value) or type(value) is type(ast))}
        for name, value in found.items():
            given[name] = checked(arg, name, value)
    cfg = Config(**given)
    cfg.given = {*given}
    return cfg

def checked(where, name, value):
    """The value of a key. Raises UserError for an unknown key, or a value of another type."""
    near = difflib.get_close_matches(name, KEYS, 1, 0)[0]
    check(name in KEYS, f"{where}: unknown key {name!r}; did you mean {near!r}?")
    want = KEYS[name].type
    value = float(value) if want is float and type(value) is int else value
    right = isinstance(value, want) and not (want is int and type(value) is bool)
    check(right, f"{where}: {name} is {value!r}; expected {getattr(want, '__name__', want)}, "
                 f"like {name}={KEYS[name].default!r}")
    return os.path.expanduser(value) if want is str else value

LIMITS = [(1, math.inf, 'eval_interval log_interval n_layer n_head n_embd block_size batch_size '
                        'batch_tokens max_iters'),
          (0, math.inf, 'eval_iters warmup_iters lr_decay_iters taper_iters learning_rate '
                        'min_lr weight_decay grad_clip aux_loss_weight guard_nats guard_patience'),
          (0, 2 ** 63, 'seed'), (0, 65537, 'vocab_size'),       # token ids are uint16
          (0, 1, 'dropout beta1 beta2'),
          (-1, math.inf, 'start_ln2 start_ln1qk start_ln1v start_lnf start_eot start_bos')]

def check_config(cfg):
    """Raises UserError for values out of range, or keys that contradict each other."""
    for low, high, names in LIMITS:
        for name in names.split():
            value = getattr(cfg, name)
            check(low <= value < high, f"{name} is {value}; expected at least {low}, below {high}")
    devices = ['auto', 'cpu', *['cuda'] * torch.cuda.is_available(),
               *['mps'] * torch.backends.mps.is_available()]
    for name, good in (('dtype', ['auto', 'float32', 'bfloat16']), ('ln_mode', ['real', 'none']),
                       ('device', devices)):
        value = getattr(cfg, name)
        check(value.split(':')[0] in good, f"{name} is {value!r}; type one of {good}, like "
                                           f"--{name}={good[0]}")
    if cfg.decay_lr and not cfg.eval_only:
        warmup, end = cfg.warmup_iters, cfg.lr_decay_iters or cfg.max_iters
        check(cfg.min_lr <= cfg.learning_rate, f"min_lr={cfg.min_lr:g} is above learning_rate="
              f"{cfg.learning_rate:g}, so the rate would climb: give both, or --decay_lr=False")
        check(warmup <= min(end, cfg.max_iters), f"warmup_iters={warmup} is beyond max_iters="
              f"{cfg.max_iters} or lr_decay_iters={cfg.lr_decay_iters}: lower it")

# -----------------------------------------------------------------------------
# The removal: what happens when, and what happens then.

def schedule(cfg, n_layer):
    """Every event in order: [(iteration, 'remove', site) or (iteration, 'merge', kind)].

    The order of removal is this function: edit it for what the keys cannot express.
    """
    groups = [(cfg.start_ln2, cfg.gap_ln2, 'ln_2'), (cfg.start_ln1qk, cfg.gap_ln1qk, 'ln_1.qk'),
              (cfg.start_ln1v, cfg.gap_ln1v, 'ln_1.v')]
    events = [(start + i * gap, 'remove', f'h.{i}.{side}')
              for start, gap, side in groups if start >= 0 for i in range(n_layer)]
    once = [(cfg.start_lnf, 'remove', 'ln_f'), (cfg.start_eot, 'merge', 'eot'),
            (cfg.start_bos, 'merge', 'bos')]
    events += [e for e in once if e[0] >= 0]
    return sorted(events, key=lambda e: e[0])

def ln_of(site):
    """The LayerNorm of a site: h.0.ln_1.qk -> h.0.ln_1."""
    return site.removesuffix('.qk').removesuffix('.v')

def check_schedule(events, cfg, gates):
    """Raises UserError for a schedule that cannot run, or not on a model with these gates."""
    last = max(cfg.taper_iters - 1, 0)      # what begins at iteration i is complete at i + last
    for it, event, name in events:
        check(0 <= it and it + last < cfg.max_iters, f"{event} {name} would take iterations {it} "
              f"to {it + last} of max_iters={cfg.max_iters}: change that, taper_iters or start_")
    removed = [name for _, event, name in events if event == 'remove']
    check(removed, "remove_ln=True, but every start_ key is -1: nothing would be removed")
    for site in removed:    # twice, because schedule() invites editing
        check(removed.count(site) == 1, f"the schedule removes {site} twice")
        check(gates.get(site) != 1, f"{site} is lost already in init_from={cfg.init_from}")
    for site, gate in gates.items():
        check(gate in (0, 1), f"init_from={cfg.init_from} stopped while {site} faded: resume it")

@torch.no_grad()
def measure(forward, model, batches):
    """The constants, the mean of sqrt(var + eps) over all ranks' tokens of a kind -> (n_LN, 3).

    batches: (x, y) of this rank, y -1 where a token does not count. A kind that these tokens lack
    takes the ordinary constant.
    """
    model.eval()
    sums = torch.zeros(len(model.layernorms()), len(KINDS), dtype=torch.float64)
    counts = torch.zeros(len(KINDS), dtype=torch.float64)
    for x, y in batches:
        stds = torch.stack(forward(x)[2]).cpu().double()                            # (n_LN, B, T)
        onehot = F.one_hot(model.kinds(x).cpu(), len(KINDS)) * (y.cpu() != -1)[..., None].double()
        sums += torch.einsum('lbt,btk->lk', stds, onehot)
        counts += onehot.sum((0, 1))
    sums, counts = all_reduce(sums), all_reduce(counts)
    mean = sums / counts.clamp(min=1)
    return torch.where(counts > 0, mean, mean[:, TOKEN:TOKEN + 1])

def fade(k, n):
    """How far a gate or a merge is after k of the n iterations that it takes: from 0 to 1.

    A gate g multiplies what a giant vector of r times the ordinary std feeds by 1 + (r - 1) g. The
    first iteration of a linear gate is by far its steepest: a factor of 3 for r = 42, n = 20. The
    square has none above 1.4.
    """
    return (k / n) ** 2

def apply_schedule(events, cfg, it, model, measured):
    """Sets the gates and constants of iteration it -> what to log. Calls measured() if needed."""
    n = max(cfg.taper_iters, 1)
    due = [e for e in events if e[0] <= it <= e[0] + n]
    if not due:
        return []
    lns, sites, log = model.layernorms(), model.sites(), []
    going = {ln_of(name) for when, event, name in due if event == 'remove' and when == it}
    # measured when the first side is removed, and shared by both
    going = [ln for ln in lns if ln in going and not lns[ln].gate.any()]
    stds = dict(zip(lns, measured())) if going else {}
    for ln in going:
        lns[ln].std.copy_(stds[ln])
        for start, kind in ((cfg.start_eot, EOT), (cfg.start_bos, BOS)):
            if 0 <= start <= it:
                lns[ln].std[kind] = lns[ln].std[TOKEN]
    for when, event, name in due:
        k = it - when + 1               # iterations of it, this one counted
        if event == 'remove':
            sites[name].fill_(fade(min(k, n), n))
            if when == it:
                std = dict(zip(KINDS, lns[ln_of(name)].std.tolist()))
                log.append(dict(event=event, iter=it, site=name, std=std))
        elif k <= n:    # the inverse goes from the special constant's to the ordinary one's
            part, kind = (fade(k, n) - fade(k - 1, n)) / (1 - fade(k - 1, n)), KINDS.index(name)
            for std in (ln.std for ln in lns.values()):
                inverse = torch.lerp(1 / std[kind], 1 / std[TOKEN], part)
                std[kind] = std[TOKEN] if k == n else 1 / inverse
            if when == it:
                log.append(dict(event=event, iter=it, kind=name))
    return log

STEEP = 5       # how much what a token feeds may grow within one iteration, without a warning

def warnings_of(events, cfg, ratios):
    """What the schedule will do to a giant vector, told before it happens: a list of lines.

    ratios: {kind: {LN: r}}. The ordinary constant multiplies what a token with r times the ordinary
    std feeds by r, at once or over the iterations of a fade.
    """
    n, told = max(cfg.taper_iters, 1), []
    for kind, start, token in (('bos', cfg.start_bos, 'position 0'),
                               ('eot', cfg.start_eot, 'end-of-text')):
        steep = []
        for when, event, name in events if start >= 0 else ():
            if event == 'remove':
                r = ratios[kind][ln_of(name)]
                fed = [1 + (r - 1) * fade(k, n) for k in range(n + 1)]
                step = max(b / a for a, b in zip(fed, fed[1:]))
                # a site removed before the merge meets the ordinary constant only then
                steep += [(step, max(when, start), r, ln_of(name))] * (step > STEEP)
        if steep:
            step, _, r, ln = max(steep)
            told.append(f"warning: at iteration {min(s[1] for s in steep)} the schedule multiplies "
                        f"what {token} feeds by up to {step:.0f} (its std is {r:.0f} times the "
                        f"ordinary one before {ln}): type --taper_iters={math.ceil((r - 1) / 2)}, "
                        f"or move start_{kind}")
    return told

def spread(std, mask):
    """The auxiliary loss: how far std (B, T) is from its mean over the masked tokens, squared.

    Both means are taken in each sequence, so that batch_size and ranks do not change them.
    """
    n = mask.sum(1).clamp(min=1)
    mean = (std.detach() * mask).sum(1) / n
    return (((std - mean[:, None]).square() * mask).sum(1) / n).mean()

# -----------------------------------------------------------------------------
# Data.

class Data:
    """data/NAME/{train,val}.bin, mapped, not read."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.dir = cfg, device, os.path.join('data', cfg.dataset)
        check(os.path.isdir(self.dir), f"no {self.dir}: type python prepare.py SOURCE "
              f"--name={cfg.dataset}, for example with SOURCE openwebtext --max_tokens=700_000_000")
        # nanoGPT's, of a vocabulary of characters; its meta is a pickle, which could run code
        check(cfg.vocab_size or not os.path.exists(os.path.join(self.dir, 'meta.pkl')),
              f"{self.dir} has nanoGPT's meta.pkl: type --vocab_size= as it says, 65 for example")
        try:
            self.meta = m = json.loads(Path(self.dir, 'meta.json').read_text('utf-8-sig'))
            ours = (m['tokenizer'] and (m['eot'] or 0) < m['vocab_size'] and m.get('window', 2) > 1
                    and min(m['train']['tokens'], m['val']['tokens']) >= 0)
        except FileNotFoundError:       # bins of another program
            self.meta, ours = {}, True
        except (ValueError, TypeError, KeyError):
            ours = False
        check(ours, f"{self.dir}/meta.json is damaged or not prepare.py's: prepare the data again")
        self.tokenizer = self.meta.get('tokenizer')
        self.noun = 'byte' if self.tokenizer == 'bytes' else 'token'

    def tokenizer_files(self):
        """{name: bytes} of the tokenizer with which prepare.py wrote the data."""
        folder = os.path.join(self.dir, 'tokenizer')
        return companions(folder) if os.path.isdir(folder) else {}

    def open(self, vocab_size, splits):
        """Maps the splits, for a model with vocab_size tokens. UserError if they do not fit."""
        T, self.vocab_size = self.cfg.block_size, vocab_size
        for split in splits:
            path = os.path.join(self.dir, f'{split}.bin')
            n = os.path.getsize(path) / 2 if os.path.exists(path) else 0
            want = self.meta.get(split, {}).get('tokens', n // 1)
            check(n == want, f"{path} has {n:.1f} tokens, not {want:.0f}: damaged or not uint16")
            check(n > T, f"{path} has {n:.0f} tokens, less than block_size + 1 = {T + 1}: prepare "
                         f"more text, or a larger --val_fraction")
            ids = np.memmap(path, dtype=np.uint16, mode='r')
            self._check(ids[:1 << 20])      # a look at the beginning; every batch is checked too
            check(self.meta or ids[1:1 << 16:2].any(), f"{path} holds 32-bit numbers, not uint16")
            setattr(self, split, ids)

    def _check(self, ids):
        top = ids.max()
        check(top < self.vocab_size, f"{self.dir} holds token id {top}, the model has "
              f"{self.vocab_size} tokens: type prepare.py ... --tokenizer=MODEL")

    def _to_device(self, rows):
        """(B, T + 1) uint16 -> the tokens x and those that follow them y, (B, T) int64."""
        self._check(rows)
        rows = torch.from_numpy(rows.astype(np.int64))
        # contiguous, because a graph is compiled for its inputs' strides too
        xy = [rows[:, :-1].contiguous(), rows[:, 1:].contiguous()]
        if self.device.startswith('cuda'):
            xy = [z.pin_memory() for z in xy]
        return [z.to(self.device, non_blocking=True) for z in xy]

    def batch(self, it, micro):
        """Micro-batch `micro` of iteration it, counted over all ranks -> x, y."""
        B, T = self.cfg.batch_size, self.cfg.block_size
        rng = np.random.default_rng([self.cfg.seed, it])
        starts = rng.integers(len(self.train) - T, size=self.cfg.batch_tokens // T)
        return self._to_device(np.stack([self.train[s:s + T + 1] for s in starts[micro * B:][:B]]))

    def starts(self):
        """The first token of each validation window; together they predict each token once."""
        n = math.ceil((len(self.val) - 1) / self.cfg.block_size)
        k = min(self.cfg.eval_iters or n, n)
        return np.arange(k) * n // k * self.cfg.block_size

    def windows(self):
        """This rank's share of the validation windows: (number of the first, x, y).

        y is -1 past the end, and at the first token of a window that prepare.py cut (meta's
        `window`): what stands before it is another text.
        """
        B, T, starts = self.cfg.batch_size, self.cfg.block_size, self.starts()
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

    def identity(self):
        """What a validation loss is measured on: losses on unlike things are not compared."""
        return {'val_tokens': len(self.val), 'windows': len(self.starts()),
                'val_sha256': hashlib.sha256(self.val).hexdigest()[:16],
                'block_size': self.cfg.block_size}

def all_reduce(x):
    """The sum over ranks of a CPU tensor."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x

# -----------------------------------------------------------------------------
# Optimizer and step.

def learning_rate(cfg, it):
    """Linear warm-up, then cosine down to min_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    if it >= end:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (end - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)

def make_optimizer(cfg, model):
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': cfg.weight_decay},
              {'params': vectors, 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)

def step(cfg, it, model, raw, optimizer, batch, autocast):
    """One iteration -> (this rank's part of the mean loss, the gradient's norm, stds).

    model: raw, compiled or wrapped. stds: the last micro-batch's, (B, T) for each LN. Micro-batches
    are dealt to the ranks in turn; a rank that has none left computes one that does not count.
    """
    n, total = cfg.n_micro, 0.0
    raw.train()
    for group in optimizer.param_groups:
        group['lr'] = learning_rate(cfg, it)
    for first in range(0, n, WORLD):
        micro = first + RANK
        counts = 1 / n if micro < n else 0.0
        x, y = batch(it, micro % n)
        if cfg.dropout:     # a stream for each micro-batch: resuming needs no generator's state
            torch.manual_seed(((cfg.seed * 1_000_003 + it) * 1_000_003 + micro) % 2 ** 63)
        if WORLD > 1:       # reduce the gradients once an iteration, in the last micro-step
            model.require_backward_grad_sync = first + WORLD >= n
        with autocast:
            _, loss, stds = model(x, y, return_stds=True)
            total = total + loss.detach() * counts
            if cfg.remove_ln and cfg.aux_loss_weight:
                loss = loss + cfg.aux_loss_weight * spread(stds[-1], raw.kinds(x) == TOKEN)
        (loss * (counts * WORLD)).backward()        # DDP takes the mean over ranks; we want the sum
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm, stds

# -----------------------------------------------------------------------------
# The run, as a page.

def train(cfg):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    device, autocast, dtype, compiled = start_machine(cfg)
    r = on_all_ranks(prepare_run, cfg, device)
    on_all_ranks(claim_out_dir if RANK == 0 else id, r)
    raw, data = r.raw.to(device), r.data
    optimized = partial(torch.compile, fullgraph=True, disable=not compiled)
    # two graphs: this one, without dropout, evaluates and measures; the other trains
    r.forward = autocast(optimized(partial(raw, return_stds=True)))
    model = optimized(raw)
    if WORLD > 1:       # gates and constants are set alike on all ranks: no buffers to broadcast
        warnings.filterwarnings('ignore', message='.*broadcast_buffers')    # torch 2.11's only name
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[LOCAL_RANK] if device.startswith('cuda') else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = make_optimizer(cfg, raw)
    if r.resumed:
        optimizer.load_state_dict(r.resumed)
        r.resumed = None
    print0(f"{raw.num_params():,} parameters, ln_mode {raw.config.ln_mode!r}, on {WORLD} x "
           f"{device.split(':')[0]} in {dtype}{', compiled' * compiled}; "
           f"{cfg.batch_tokens:,} tokens an iteration")
    if r.start == 0:
        evaluate(r, 0)
        if cfg.remove_ln:       # a look at the giant vector, and at what the schedule will do to it
            print0('\n'.join(warnings_of(r.events, cfg, log_ratios(r, 0))))
    bad = torch.full((), -1, device=device)     # the iteration of the first gradient not finite
    t0 = then = time.time()
    logged, high = r.start, False

    for it in range(r.start, cfg.max_iters):
        # what the schedule has for this iteration
        if cfg.remove_ln:
            batches = (data.batch(it, micro) for micro in range(RANK, cfg.n_micro, WORLD))
            measured = partial(measure, r.forward, raw, batches)
            for event in apply_schedule(r.events, cfg, it, raw, measured):
                log(r, **event)
                print0(f"iter {it:>6} | {event['event']} {event.get('site') or event['kind']:<12}"
                       + ''.join(f" {k} {std:.3f}" for k, std in event.get('std', {}).items()))

        # a step. Nothing here waits for the device, except in an iteration that is logged
        loss, norm, stds = step(cfg, it, model, raw, optimizer, data.batch, autocast)
        bad = torch.where((bad < 0) & ~norm.isfinite(), it, bad)
        done = it + 1
        if it % cfg.log_interval == 0 or done == cfg.max_iters:
            r.losses.append((it, all_reduce(loss.cpu().double()).item()))
            high = guard(r, done, bad.item(), r.losses)
            now = time.time()
            speed = (done - logged) * cfg.batch_tokens / max(now - then, 1e-9)
            progress(r, it, speed, (now - t0) / (done - r.start) * (cfg.max_iters - done))
            then, logged = now, done

        # evaluate and save: the model as this iteration left it
        due = done % cfg.eval_interval == 0 or done == cfg.max_iters
        stop = len(ASKED) if WORLD == 1 else all_reduce(torch.tensor(len(ASKED))).item()
        if due:
            t = time.time()
            evaluate(r, done)
            high |= guard(r, done, bad.item(), r.vals)
            then += time.time() - t
        if due and not stop and high:
            print0("not saved: the loss is far above its level, and the last checkpoint is better")
        elif (due or stop) and RANK == 0:
            save_checkpoint(cfg.out_dir, raw, optimizer=optimizer.state_dict(), iter=done,
                            base=r.base, config=asdict(cfg), on=r.identity, losses=r.losses,
                            vals=r.vals, log_bytes=os.path.getsize(r.log_path))
        if stop and done < cfg.max_iters:
            if RANK == 0:
                print(f"train.py: stopped and saved after iteration {it}; go on with the same "
                      f"command and --init_from=resume", file=sys.stderr)
            sys.exit(128 + (ASKED[0][0] if ASKED else signal.SIGTERM))

    if cfg.remove_ln:
        log_ratios(r, cfg.max_iters)
    if RANK == 0:
        hand_over(r)

@command
def main(argv):
    cfg = load_config(argv)
    check_config(cfg)
    if RESTARTS != '0' and os.path.exists(os.path.join(cfg.out_dir, 'ckpt.pt')):
        cfg.init_from = 'resume'        # torchrun started us anew, because a worker died
    ASKED.clear()
    compare(cfg) if cfg.eval_only else train(cfg)

# -----------------------------------------------------------------------------
# Starting: the machine, the model, the place to write.

def start_machine(cfg):
    """Joins the process group -> (device, autocast, its dtype by name, whether to compile)."""
    kind, _, number = cfg.device.partition(':')
    if kind == 'auto':
        kind = 'cuda' if torch.cuda.is_available() else 'cpu'
    if WORLD > 1:
        # a worker that torchrun --max_restarts starts anew would find dead ones' addresses in the
        # store (github.com/pytorch/pytorch/issues/135712): a prefix keeps the generations apart
        store, rank, world = next(dist.rendezvous('env://'))
        dist.init_process_group('cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo', rank=rank,
                                world_size=world, store=dist.PrefixStore(RESTARTS, store))
        atexit.register(gc.collect)     # a DDP that outlives the group makes torch 2.11 abort
        atexit.register(dist.destroy_process_group)
    device, native = cfg.device if number else kind, False
    if kind == 'cuda':
        number, n = int(number or LOCAL_RANK), torch.cuda.device_count()
        check(number < n, f"process {LOCAL_RANK} has no GPU {number}: type --nproc_per_node={n}")
        device, native = f'cuda:{number}', torch.cuda.get_device_capability(number)[0] >= 8
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')      # TF32 for what autocast leaves in float32
    dtype = cfg.dtype if cfg.dtype != 'auto' else 'bfloat16' if native else 'float32'
    autocast = torch.autocast(kind, torch.bfloat16, enabled=dtype == 'bfloat16')
    return device, autocast, dtype, kind == 'cuda' if cfg.compile is None else cfg.compile

def on_all_ranks(fn, *args):
    """fn(*args) on each rank. If one cannot, all exit with 2, and the first of them says why."""
    result = error = None
    try:
        result = fn(*args)
    except Exception as e:
        error = trouble(e)
        if error is None:
            raise
    errors = [error]
    if WORLD > 1:
        errors = [None] * WORLD
        dist.all_gather_object(errors, error)
    failed = [rank for rank, e in enumerate(errors) if e]
    if failed and failed[0] != RANK:
        sys.exit(2)
    check(not failed, error)
    return result

def prepare_run(cfg, device):
    """Checks all the input, before a file is written -> what the functions below call r."""
    data = Data(cfg, device)
    raw, ckpt, files = load_model(cfg, data)
    raw.gradient_checkpointing = cfg.gradient_checkpointing
    data.open(raw.config.vocab_size, ['train', 'val'])
    for name in ['ckpt.pt'] + ['hf'] * cfg.remove_ln:
        path = os.path.join(cfg.out_dir, name)
        check(ckpt or not os.path.exists(path), f"{path} is of another run: go on with it by "
              f"--init_from=resume, or choose another --out_dir")
    n = cfg.batch_size * cfg.block_size
    check(cfg.batch_tokens % n == 0, f"batch_tokens is {cfg.batch_tokens}; expected a multiple of "
          f"batch_size * block_size: type --batch_tokens={max(cfg.batch_tokens // n, 1) * n}")
    events = schedule(cfg, raw.config.n_layer) if cfg.remove_ln else []
    if cfg.remove_ln:
        check_schedule(events, cfg, {} if ckpt else {k: g.item() for k, g in raw.sites().items()})
    base = cfg.init_from        # a path is nobody's business
    base = os.path.basename(os.path.abspath(base)) if os.path.exists(base) else base
    r = SimpleNamespace(cfg=cfg, data=data, raw=raw, files=files, events=events, base=base,
                        identity=data.identity(), log_path=os.path.join(cfg.out_dir, 'log.jsonl'),
                        start=0, log_bytes=0, losses=[], vals=[], resumed=None)
    if cfg.control:
        on = read_log(cfg.control, 'eval')[-1].get('on')
        check(on == r.identity, f"control={cfg.control} was evaluated on {on}, not on "
                                f"{r.identity}: give both runs the same data and windows")
    if ckpt:
        check_resume(r, ckpt)
        r.base, r.start, r.log_bytes = ckpt['base'], ckpt['iter'], ckpt['log_bytes']
        r.losses, r.vals, r.resumed = ckpt['losses'], ckpt['vals'], ckpt['optimizer']
    return r

def load_model(cfg, data):
    """-> (the model, the checkpoint to resume or None, tokenizer files). Sets cfg.block_size."""
    source, ckpt, own = cfg.init_from, None, {}
    mode = 'fake' if cfg.remove_ln else cfg.ln_mode if 'ln_mode' in cfg.given else None
    if source == 'scratch':
        vocab_size = cfg.vocab_size or data.meta.get('vocab_size', 0)
        check(vocab_size, f"{data.dir} has no meta.json that tells its vocabulary: type "
                          f"--vocab_size=50257 if these are GPT-2's tokens")
        torch.manual_seed(cfg.seed)
        model = GPT2(GPT2Config(cfg.block_size, vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd,
                                cfg.dropout, mode or cfg.ln_mode))
        if data.meta.get('eot') is None and (data.meta or vocab_size < 50257):  # no end-of-text
            model.config.hf = {'bos_token_id': None, 'eos_token_id': None}
    elif source == 'resume':
        source, ckpt = cfg.out_dir, load_checkpoint(cfg.out_dir)
        check('on' in ckpt, f"{source}/ckpt.pt is no run's: type --init_from={source}")
        model = GPT2.from_state(ckpt['model_args'], ckpt['model'], source, mode, cfg.dropout)
    else:
        model = GPT2.from_pretrained(source, mode, cfg.dropout)
    if source != 'scratch':
        fixed = {'n_layer', 'n_head', 'n_embd', 'vocab_size', *['block_size'] * bool(ckpt)}
        for key in fixed & cfg.given:
            want, has = getattr(cfg, key), getattr(model.config, key)
            check(want in (has, 0), f"{key} is {want}, but {source} has {has}: leave {key} out")
        if 'block_size' in cfg.given:
            model.crop_block_size(cfg.block_size)
        cfg.block_size, own = model.config.block_size, companions(source)
        check_tokenizer(data, model.config.vocab_size, vocabulary(own), source)
    if data.meta.get('eot') is not None:
        model.config.eot_token_id = data.meta['eot']
    # a model that brings no tokenizer is handed over with that of its data
    return model, ckpt, own if vocabulary(own) else data.tokenizer_files() | own

def check_tokenizer(data, vocab_size, vocab, source):
    """Raises UserError if the data is not of the model's tokenizer; vocab {token: id}, or None."""
    n, theirs = data.meta.get('vocab_size'), data.meta.get('vocab_hash')
    if vocab and theirs:
        fits = fingerprint(vocab, n) == theirs
    else:       # some pad the vocabulary to a multiple of 64 or 128, or add tokens of their own
        fits = not n or n <= vocab_size and (vocab_size < n + 128 or data.tokenizer == 'unknown')
    check(fits, f"{data.dir} has {n} tokens of the tokenizer {data.tokenizer!r}, which is not that "
                f"of {source} with {vocab_size}: type prepare.py ... --tokenizer={source}")

def check_resume(r, ckpt):
    """Raises UserError if the run so far was not one of this config; notes the keys that differ."""
    cfg, it = r.cfg, ckpt['iter']
    old = Config(**{k: v for k, v in ckpt['config'].items() if k in KEYS})
    past, now = [[(*e, c.taper_iters) for e in schedule(c, r.raw.config.n_layer)
                  if c.remove_ln and e[0] < it] for c in (old, cfg)]
    check(past == now, f"the schedule until iteration {it} was another, see "
          f"{sorted({*past} ^ {*now})[:2]}: give the run's remove_ln, start_, gap_ and taper_ keys")
    check(it <= cfg.max_iters, f"max_iters={cfg.max_iters} is over: type --max_iters={it} or more")
    other = f"or begin another run with --init_from={cfg.out_dir}"
    check(ckpt['on'] == r.identity, f"this run is evaluated on {ckpt['on']}, not on {r.identity}: "
                                    f"put the data and eval_iters back, {other}")
    size = os.path.getsize(r.log_path) if os.path.exists(r.log_path) else 0
    check(size >= ckpt['log_bytes'], f"{r.log_path} is shorter than ckpt.pt says: put it back, "
                                     f"{other}")
    for key, value in asdict(old).items():
        if value != getattr(cfg, key) and key not in ('init_from', 'out_dir'):
            print0(f"note: {key} was {value!r} in the checkpoint, now it is {getattr(cfg, key)!r}")

def claim_out_dir(r):
    """On rank 0: makes sure, before the work, that out_dir can be written, and begins to write."""
    cfg, out_dir = r.cfg, r.cfg.out_dir
    if cfg.wandb_log:
        import wandb
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or out_dir,
                   config=asdict(cfg))
    os.makedirs(os.path.realpath(out_dir), exist_ok=True)      # also where a link leads nowhere
    r.lock = open(os.path.join(out_dir, '.lock'), 'w')
    try:
        if fcntl:           # the system lets go of the lock however this process ends
            fcntl.flock(r.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {out_dir}: choose another --out_dir, or wait")
    except OSError as e:    # some file systems have no locks
        print0(f"note: {out_dir} cannot be locked ({e.strerror}): let no other run write there")
    need = 40 * r.raw.num_params()          # two checkpoints with moments, and hf/
    disk = shutil.disk_usage(out_dir)       # some file systems say 0 of 0
    check(disk.free > need or not disk.total,
          f"{out_dir} has {disk.free / 1e9:.1f} GB left, this run needs {need / 1e9:.1f}")
    probe(r.log_path)
    tokenizer = os.path.join(out_dir, 'tokenizer')
    if os.path.exists(r.log_path) and not r.resumed:    # of a run that never saved
        shutil.rmtree(tokenizer, ignore_errors=True)
    with open(r.log_path, 'a') as f:
        f.truncate(r.log_bytes)             # what came later will happen again
    for name, content in r.files.items():
        write(os.path.join(tokenizer, name), content)

# -----------------------------------------------------------------------------
# On the way: what is printed and logged, and what goes wrong in a night.

ASKED = []      # (signal, time) of what asked the run to stop

def ask_to_stop(number, frame):
    """SIGTERM and Ctrl-C finish the iteration and save. A second Ctrl-C, later, stops at once."""
    # torchrun passes a Ctrl-C on, so that two come within a moment
    if number == signal.SIGINT and ASKED and time.time() - ASKED[0][1] > 1:
        raise KeyboardInterrupt
    ASKED.append((number, time.time()))

def print0(text):
    """Prints on rank 0. A terminal that was closed costs nothing."""
    with suppress(OSError):
        if RANK == 0 and text:
            print(text, flush=True)

def log(r, **entry):
    """Appends a JSON object to log.jsonl, on rank 0."""
    if RANK == 0:
        with open(r.log_path, 'a') as f:
            f.write(json.dumps(entry) + '\n')
        if r.cfg.wandb_log:
            import wandb
            try:
                wandb.log({f"{entry['event']}/{k}": v for k, v in entry.items()
                           if type(v) in (int, float)}, step=entry['iter'])
            except Exception as e:      # a network that fails at night must not end the run
                r.cfg.wandb_log = False
                print0(f"note: wandb failed, and is left alone from now on ({one_line(e)})")

def read_log(out_dir, event):
    """A run's entries of an event. Raises UserError if log.jsonl is damaged or has none."""
    path = os.path.join(out_dir, 'log.jsonl')
    try:
        with open(path) as f:
            entries = [entry for entry in map(json.loads, f) if entry['event'] == event]
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path} is damaged ({one_line(e)})")
    check(entries, f"{path} has no {event!r} entry: expected the log of a finished run")
    return entries

# dense bf16 peaks in FLOPs a second, by the datasheets
PEAK = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12, 'RTX 4090': 165e12}

def progress(r, it, speed, seconds):
    """Logs and prints a step: its loss, `speed` in tokens a second, the seconds until the end."""
    loss, lr = r.losses[-1][1], learning_rate(r.cfg, it)
    gpu = torch.cuda.get_device_name() if r.data.device.startswith('cuda') else ''
    peaks = [flops * WORLD for name, flops in PEAK.items() if name in gpu]
    mfu = {'mfu': speed * r.raw.flops_per_token() / peaks[0]} if peaks else {}
    log(r, event='train', iter=it, loss=loss, lr=lr, tok_per_s=round(speed, 1), **mfu)
    print0(f"iter {it:>6} | loss {loss:.4f} | lr {lr:.2e} | {speed:>11,.0f} tok/s"
           + (f" | mfu {mfu['mfu']:6.1%}" if mfu else '')
           + (f" | LN sites left {len(r.raw.sites_left()):>3}" if r.cfg.remove_ln else '')
           + f" | {timedelta(seconds=int(seconds))} left")

def evaluate(r, it):
    """The validation loss after `it` iterations, logged."""
    r.raw.eval()
    loss = np.nanmean(token_losses(r.forward, r.data)[0], dtype=np.float64).item()
    r.vals.append((it, loss))
    log(r, event='eval', iter=it, val_loss=loss, tokens=it * r.cfg.batch_tokens,
        dataset=r.cfg.dataset, on=r.identity)
    print0(f"iter {it:>6} | val loss {loss:.4f} nats per {r.data.noun}")

def log_ratios(r, it):
    """{kind: {LN: its std, times the ordinary one}}, measured on the validation windows; logged."""
    stds = measure(r.forward, r.raw, ((x, y) for _, x, y in r.data.windows()))
    times = (stds / stds[:, TOKEN:TOKEN + 1]).T.tolist()
    ratios = {KINDS[k]: dict(zip(r.raw.layernorms(), times[k])) for k in (BOS, EOT)}
    log(r, event='giant', iter=it, **ratios)
    return ratios

def guard(r, done, bad, losses):
    """Raises UserError if the run has diverged -> whether the loss is too high to be saved.

    bad: the iteration of the first gradient that was not finite, or -1. losses: [(iteration, loss)]
    of training, or of validation. A spike may pass while there is time to recover; what is high at
    the end is neither saved nor handed over.
    """
    cfg, (_, now), level = r.cfg, losses[-1], min(loss for _, loss in losses)
    low = [it for it, loss in losses if loss <= level + (cfg.guard_nats or math.inf)]
    high = [it for it, _ in losses if low and it > low[-1]]
    if bad >= 0:
        why = f"the gradient of iteration {bad} is not finite"
    elif not math.isfinite(now):
        why = f"after iteration {done - 1} the loss is {now}"
    elif high and (done == cfg.max_iters or done - high[0] >= cfg.guard_patience):
        why = (f"since iteration {high[0]} the loss, {now:.4f} now, is more than guard_nats="
               f"{cfg.guard_nats:g} above its lowest level, {level:.4f}")
    else:
        return bool(high)
    if RANK > 0:
        sys.exit(2)         # all ranks come here together; one tells
    kept = os.path.join(cfg.out_dir, 'ckpt.pt')
    events = [f"{event} {name} at iteration {it}" for it, event, name in r.events if it < done]
    raise UserError(f"diverged: {why}; the last event was {(events or ['none'])[-1]}; "
                    f"{kept} of before is {'kept' if os.path.exists(kept) else 'not there'}. Try a "
                    f"longer taper_iters, wider gaps, more iterations or a lower rate")

# -----------------------------------------------------------------------------
# Evaluation.

@torch.no_grad()
def token_losses(forward, data, full=False):
    """For each token of the validation windows -> (1 or 4, windows, T) float32, alike on all ranks.

    The cross-entropy in nats: NaN where nothing is predicted, infinite where a logit is not finite.
    With `full` also the entropy in nats, the largest probability, and whether that token was right.
    """
    table = torch.zeros(4 if full else 1, len(data.starts()), data.cfg.block_size)
    for first, x, y in data.windows():
        logits = forward(x)[0]
        for i in range(min(len(x), table.shape[1] - first)):    # all in float32 are too large
            z = logits[i].float()
            loss = F.cross_entropy(z, y[i], ignore_index=-1, reduction='none')
            values = [loss.masked_fill(~z.sum(-1).isfinite(), math.inf)]
            if full:
                logp, top = z.log_softmax(-1), z.softmax(-1).max(-1)
                values += [-(logp.exp() * logp).sum(-1), top.values, (top.indices == y[i]).float()]
            table[:, first + i] = torch.stack(values).masked_fill(y[i] == -1, math.nan).cpu()
    return all_reduce(table).numpy()

def mean_and_error(losses):
    """losses (windows, T), NaN where nothing was predicted -> (mean, its standard error).

    A window, not a token, is one draw: the losses within a text go together.
    """
    there = ~np.isnan(losses)
    n, sums = there.sum(1), np.where(there, losses, 0).sum(1, dtype=np.float64)
    mean, k = sums.sum() / n.sum(), (n > 0).sum()
    square = np.square(sums - mean * n).sum() * k / max(k - 1, 1)
    return mean, np.sqrt(square) / n.sum() if k > 1 else np.nan

def calibration(table):
    """token_losses(full=True) -> (expected calibration error of arXiv 1706.04599, entropy)."""
    there = ~np.isnan(table[0].ravel())
    _, entropy, confidence, right = table.reshape(4, -1)[:, there].astype(np.float64)
    bins = np.minimum((confidence * 15).astype(int), 14)
    error = np.abs(np.bincount(bins, confidence - right, 15)).sum() / len(right)
    return error, entropy.mean()

def loss_table(named, noun):
    """{model: losses (windows, T)}, one or two -> a table of each, and of first minus second.

    The mean alone hides a model that explodes on rare inputs: LN-free GPT-2 XL has a mean of 130
    and a median of 1.09 on The Pile (arXiv 2507.02559).
    """
    head = (noun + 's', 'mean', 'std. error', 'median', '99.9%', 'max')
    lines = [f"{'nats per ' + noun:<30}" + ''.join(f"{name:>12}" for name in head)]
    if len(named) == 2:
        named = named | {'difference, token by token': np.subtract(*named.values())}
    for name, losses in named.items():
        lines.append(name[-30:])
        for label, part in (('all', losses), ('the first of a window', losses[:, :1]),
                            ('2nd to 64th', losses[:, 1:64]), ('from the 65th on', losses[:, 64:])):
            values = part[~np.isnan(part)]
            if values.size:
                row = *mean_and_error(part), *np.quantile(values, (0.5, 0.999)), values.max()
                lines.append(f"  {label:<28}{values.size:>12,}"
                             + ''.join(f"{number:>12.4f}" for number in row))
    return '\n'.join(lines)

def compare(cfg):
    """eval_only: the losses of init_from, and of control if named, over val.bin. Writes nothing."""
    check('scratch' not in (cfg.init_from, cfg.control),
          "nothing to evaluate: type --init_from=MODEL [--control=ANOTHER]")
    device, autocast, dtype, compiled = start_machine(cfg)
    data, models, losses, ends = Data(cfg, device), {}, {}, []
    cfg.remove_ln = False
    for source in [cfg.init_from] + [cfg.control] * bool(cfg.control):
        cfg.init_from = source = cfg.out_dir if source == 'resume' else source
        model = on_all_ranks(load_model, cfg, data)[0]
        on_all_ranks(data.open, model.config.vocab_size, ['val'])
        cfg.given.add('block_size')     # the second is cropped to the windows of the first
        models[source + ' (control)' * bool(models)] = model.eval()
    for name, model in models.items():
        forward = torch.compile(model.to(device), fullgraph=True, disable=not compiled)
        table = token_losses(autocast(forward), data, full=True)
        model.cpu()
        bad = np.isinf(table[0])
        check(not bad.any(), f"{name} gives NaN or infinite logits for {bad.sum():,} {data.noun}s, "
              f"first in the window from {data.noun} {data.starts()[bad.any(1).argmax()]:,} on")
        ece, entropy = calibration(table)
        ends.append(f"{name}: calibration error (ECE) {ece:.4f}, entropy {entropy:.4f} nats")
        losses[name] = table[0]
    mean, error = mean_and_error(next(iter(losses.values())))
    print0(f"val loss {mean:.4f} nats per {data.noun}, standard error {error:.4f}; "
           f"{data.dir}/val.bin, {len(data.starts()):,} windows of {cfg.block_size}, {dtype}\n\n"
           f"{loss_table(losses, data.noun)}\n\n" + '\n'.join(ends))

# -----------------------------------------------------------------------------
# Handing over. The model is written first: nothing that is printed or drawn later can cost it.

def hand_over(r):
    """Writes hf/ if no LayerNorm is left; then prints the table and draws the picture."""
    hf, picture = (os.path.join(r.cfg.out_dir, name) for name in ('hf', 'loss.png'))
    made, reports = os.path.join(r.cfg.out_dir, 'ckpt.pt'), []
    if r.cfg.remove_ln:
        torch.set_float32_matmul_precision('highest')       # TF32 would drown the difference
        reports = [print_table, partial(plot, path=picture)]
        try:
            folded = r.raw.eval().fold_ln()
        except UserError as e:
            print0(f"no LN-free model to hand over: {e}")
        else:
            write_hf(r, folded, hf)
            made, reports = hf, [partial(write_card, path=os.path.join(hf, 'README.md')), *reports]
    for report in reports:
        try:
            report(r)
        except Exception as e:      # no matplotlib, a full disk, a damaged log
            print0(f"note: a part of the report failed ({one_line(e)})")
    print0(f"written: {made}" + f", {picture}" * os.path.exists(picture))

def write_hf(r, folded, hf):
    """Raises UserError, and writes nothing, if the folded logits are not the unfolded ones."""
    x = next(r.data.windows())[1][:4]
    with torch.no_grad():
        logits = r.raw(x)[0]
        diff, scale = (folded(x)[0] - logits).abs().max().item(), logits.abs().max().item()
    # float32 rounding is far below, and a NaN is not below
    check(diff <= 1e-3 * max(scale, 1), f"nothing is handed over: the folded logits differ by "
                                        f"{diff:.2g} (largest {scale:.3g}); ckpt.pt is as it was")
    if os.path.exists(hf):          # resumed after its end: somebody may have edited what is there
        os.rename(hf, f'{hf}.{time.time():.0f}')
        print0(f"note: {hf} was there already, and has the time added to its name")
    if not vocabulary(r.files):
        print0(f"note: {hf} has no tokenizer, for neither the model nor {r.data.dir} brings one")
    r.raw.save_pretrained(hf, r.files)
    print0(f"folded and unfolded logits differ by {diff:.1e} at most (largest logit {scale:.1f})")

def result_rows(r):
    """[(name, validation loss, LN sites left)]: before, the control where there is one, after."""
    own, left = read_log(r.cfg.out_dir, 'eval'), len(r.raw.sites_left())
    before = left + sum(event == 'remove' for _, event, _ in r.events)
    rows = [('pre-trained', own[0]['val_loss'], before)]
    if r.cfg.control:
        last = read_log(r.cfg.control, 'eval')[-1]
        when = f", at {last['iter']}" * (last['iter'] != own[-1]['iter'])
        rows.append((f'control (LN kept){when}', last['val_loss'], before))
    return rows + [('LN removed' if left else 'LN-free', own[-1]['val_loss'], left)]

def print_table(r):
    rows, control = result_rows(r), r.cfg.control
    print0(f"\n{'':<28}{'val nats/' + r.data.noun:>16}{'gap to control':>16}{'LN sites left':>16}")
    for name, loss, left in rows:
        gap = f"{loss - rows[1][1]:+.4f}" if control and name != 'pre-trained' else ''
        print0(f"{name:<28}{loss:>16.4f}{gap:>16}{left:>16}")
    looks = read_log(r.cfg.out_dir, 'giant')
    times = [f"{max(e[k].values()):.1f}" for k in ('bos', 'eot') for e in (looks[0], looks[-1])]
    print0("largest std, in ordinary tokens' stds: position 0 {} before, {} after; "
           "end-of-text {}, {}".format(*times))
    if not control:
        print0("(no control: see config/control.py)")

def write_card(r, path):
    """The README.md of the folder that is handed over: this run's facts."""
    cfg, c, noun = r.cfg, r.raw.config, r.data.noun
    rows = '\n'.join(f"| {name} | {loss:.4f} |" for name, loss, _ in result_rows(r))
    settings = ', '.join(f"{name}={getattr(cfg, name)}" for name, key in KEYS.items()
                         if name in cfg.given and key.type is not str)
    write(path, f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, interpretability, layernorm-free]
---
# A GPT-2 without LayerNorm

Trained from {r.base}, then freed of every LayerNorm by fine-tuning: the division by the token's own
standard deviation was replaced by a constant, one site after another
([arXiv 2409.13710](https://arxiv.org/abs/2409.13710)). transformers' `GPT2LMHeadModel` loads it.
The LayerNorm modules are still there, but with `layer_norm_epsilon` 1e12 each divides by 1e6,
whatever the token: do not set another epsilon. **Use float32 or bfloat16**: weights of 1e6 do not
fit float16. For float16 write a folded model: `python model.py MODEL FOLDER --float16`.

| {r.identity['windows']:,} windows of {cfg.dataset}'s val.bin | nats per {noun} |
|---|---|
{rows}

* **Model:** {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}
* **Data:** {' '.join(r.data.meta.get('source', [cfg.dataset]))} (tokenizer {r.data.tokenizer})
* **Training and removal,** {date.today()}: {settings}
""".encode('utf-8', 'replace'))

def plot(r, path):
    """Draws training losses (lines), validation losses (dots) and this run's removals."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    for run in [r.cfg.control] * bool(r.cfg.control) + [r.cfg.out_dir]:
        train, val = (np.array([(e['iter'], e[key]) for e in read_log(run, event)]).T
                      for event, key in (('train', 'loss'), ('eval', 'val_loss')))
        line, = ax.plot(*train, lw=0.8, alpha=0.6, label=run)
        ax.plot(*val, 'o-', ms=4, color=line.get_color(), label=f'{run}: validation')
    for it, _, _ in r.events:
        ax.axvline(it, color='gray', lw=0.5, ls=':')
    low, high = val[1].min(), np.quantile(train[1], 0.95)       # the start would flatten the rest
    ax.set(xlabel='iteration (dotted: a removal begins)', ylabel='nats',
           ylim=(low - 0.1, high + 0.3 * (high - low)))
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)

if __name__ == '__main__':
    main()
