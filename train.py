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
import builtins
import contextlib
import difflib
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import (BOS, EOT, KINDS, LOCAL_RANK, RANK, TOKEN, WORLD, GPT2, GPT2Config, UserError,
                   check, command, companions, join_processes, load_checkpoint, one_line,
                   save_checkpoint, trouble, write)

@dataclass
class Config:
    # in and out
    out_dir: str = 'out'
    dataset: str = 'openwebtext'    # data/NAME/{train,val}.bin, which prepare.py writes
    init_from: str = 'scratch'      # 'scratch', 'resume', a hub id, a Hugging Face folder, out_dir
    control: str = ''               # out_dir of the run that kept LN, to compare with at the end
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
    giant_loss_weight: float = 0.0  # shrinks the special tokens' std; in a removal only
    # a teacher that kept its LayerNorm
    teacher: str = ''               # a hub id, a folder, an out_dir; 'init_from': what that names
    distil: float = 0.5             # the share of the loss that is KL(teacher || model)
    random_share: float = 0.0       # of the sequences: random ids, taught by the teacher alone
    # machine
    device: str = 'auto'            # 'cuda' if there is one, else 'cpu'; 'mps'
    dtype: str = 'auto'             # of the forward pass: bfloat16 where CUDA has it, else float32
    compile: bool | None = None     # None: on CUDA
    gradient_checkpointing: bool = False    # less memory, a third slower
    guard_nats: float = 2.0         # stop where the loss stays so far above its lowest; 0: off
    guard_patience: int = 50        # for so many iterations, or at the end

KEYS = {f.name: f for f in fields(Config)}

def load_config(argv):
    """Config files and --key=value, the later one wins -> Config; its `given` names what they set.
    Modules, functions and names with an underscore in front are a config file's own."""
    given = {}
    for arg in argv:
        if arg.startswith('--'):
            name, eq, value = arg[2:].partition('=')
            check(eq, f"{arg}: expected --key=value")
            if name in KEYS and KEYS[name].type is not str:
                with contextlib.suppress(ValueError, SyntaxError):  # what is no literal is a text
                    value = ast.literal_eval(value)
            found = {name: value}
        else:
            # it knows all keys, as builtins: so its own names are those that it assigns
            known = {name: key.default for name, key in KEYS.items()} | given
            own = {'__file__': os.path.abspath(arg), '__builtins__': vars(builtins) | known}
            try:
                exec(compile(Path(arg).read_text('utf-8-sig'), arg, 'exec'), own)
            except Exception as e:      # it is a program, and may fail in any way
                raise UserError(f"{arg}: {type(e).__name__}: {one_line(e)}")
            found = {name: value for name, value in own.items() if name[0] != '_'
                     and not callable(value) and type(value) is not type(ast)}
        for name, value in found.items():
            near = difflib.get_close_matches(name, KEYS, 1, 0)
            check(name in KEYS, f"{arg}: unknown key {name!r}; did you mean {near}?")
            want = KEYS[name].type
            value = float(value) if want is float and type(value) is int else value
            check(isinstance(value, want) and not (want is int and type(value) is bool),
                  f"{arg}: {name} is {value!r}; expected {getattr(want, '__name__', want)}")
            given[name] = os.path.expanduser(value) if want is str else value
    cfg = Config(**given)
    if cfg.teacher == 'init_from':
        cfg.teacher = cfg.init_from
    cfg.given = {*given}
    return cfg

def check_config(cfg):
    """Raises UserError for values that nobody else would refuse."""
    positive = 'eval_interval log_interval batch_size batch_tokens max_iters n_layer'.split()
    high = {'vocab_size': (1 << 16) + 1, 'dropout': 1, 'beta1': 1, 'beta2': 1, 'random_share': 1}
    for name, key in KEYS.items():
        value, low = getattr(cfg, name), int(name in positive)
        check(key.type not in (int, float) or name.startswith(('start_', 'gap_'))
              or low <= value < high.get(name, 2 ** 63), f"{name} is {value}; expected at least "
              f"{low}, and less than {high.get(name, 2 ** 63)}")
    check(cfg.dtype in ('auto', 'float32', 'bfloat16'), f"dtype is {cfg.dtype!r}: try --dtype=auto")
    check(not cfg.decay_lr or cfg.min_lr <= cfg.learning_rate, f"min_lr={cfg.min_lr:g} is above "
          f"learning_rate={cfg.learning_rate:g}: give both, or --decay_lr=False")
    check(cfg.distil <= 1, f"distil is {cfg.distil}; expected 0 to 1")
    check(cfg.out_dir, "out_dir is empty")
    check(cfg.teacher or not cfg.random_share, "random_share needs a --teacher=")

# -----------------------------------------------------------------------------
# The removal: a table of gates, one pure function of the iteration. Edit it, print it, plot it.

def fade(x):
    """A gate, after the fraction x of its taper_iters. A gate g multiplies what a giant vector of r
    times the ordinary std feeds by 1 + (r - 1) g: for r = 42 and 20 iterations the first of a
    linear gate by 3, none of the square's by more than 1.4."""
    return min(max(x, 0.0), 1.0) ** 2

def gates(cfg, it, n_layer):
    """{site: its gate in iteration it}, and how far the constants of 'eot' and 'bos' have become
    the ordinary ones. All from 0, before anything is removed, to 1. Empty without remove_ln."""
    def gate(start, later=0):
        return fade((it + 1 - start - later) / max(cfg.taper_iters, 1)) if start >= 0 else 0.0
    table = {}
    if cfg.remove_ln:
        for i in range(n_layer):
            table[f'h.{i}.ln_2'] = gate(cfg.start_ln2, i * cfg.gap_ln2)
            table[f'h.{i}.ln_1.qk'] = gate(cfg.start_ln1qk, i * cfg.gap_ln1qk)
            table[f'h.{i}.ln_1.v'] = gate(cfg.start_ln1v, i * cfg.gap_ln1v)
        table['ln_f'] = gate(cfg.start_lnf)
        table['eot'] = gate(cfg.start_eot) if cfg.start_eot else 1.0
        table['bos'] = gate(cfg.start_bos) if cfg.start_bos else 1.0
    return table

def set_gates(cfg, it, model, measured):
    """Moves the model's gates to those of iteration it -> what to log. A LayerNorm is measured, by
    measured() -> (n_LN, 3), when the gate of its first side leaves 0."""
    was, now = (gates(cfg, i, model.config.n_layer) for i in (it - 1, it))
    moving = [name for name in now if now[name] != was[name]]   # sites, 'bos', 'eot'
    lns, sites = model.layernorms(), model.sites()
    ln_of = {name + side: name for name, ln in lns.items() for side in ln.sides}
    fresh = {ln_of[name] for name in moving if name in sites and not lns[ln_of[name]].gate.any()}
    for (name, ln), std in zip(lns.items(), measured() if fresh else ()):
        if name in fresh:
            ln.std.copy_(std)
    for name in moving:
        if name in sites:
            sites[name].fill_(now[name])
        for ln in [lns[ln_of[name]]] if name in sites else lns.values():
            ln.merge[BOS], ln.merge[EOT] = now['bos'], now['eot']
    begun = [name for name in moving if was[name] == 0]
    std = {name: dict(zip(KINDS, lns[ln_of[name]].std.tolist())) for name in begun if name in sites}
    return [dict(event='remove', iter=it, site=name, std=std[name]) if name in std else
            dict(event='merge', iter=it, kind=name) for name in begun]

@torch.no_grad()
def measure(model, forward, batches):
    """The constants: the mean of sqrt(var + eps) over all ranks' tokens of a kind -> (n_LN, 3). Of
    a kind without tokens: the ordinary one. batches: this rank's x, y; y is -1 where a token does
    not count."""
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

def std_losses(stds, kinds):
    """-> (auxiliary loss, giant loss), from sigma (B, T) of each LN's input and kinds (B, T). The
    first: how far the std before ln_f is from its mean over ordinary tokens, squared. The second,
    summed over the special tokens: the squared logarithm of their std over that mean, where it is
    above. Means are a sequence's own, so that batch_size and ranks do not change them."""
    std, ordinary = torch.stack(stds), kinds == TOKEN           # (n_LN, B, T), (B, T)
    n = ordinary.sum(-1).clamp(min=1)
    mean = (std.detach() * ordinary).sum(-1) / n                # (n_LN, B)
    mean = mean.masked_fill(mean == 0, 1)       # of a sequence without ordinary tokens
    spread = (std[-1] - mean[-1, :, None]).square() * ordinary
    giant = (std / mean[..., None]).log().clamp(min=0).square() * ~ordinary
    return (spread.sum(-1) / n).mean(), giant.sum(-1).mean()

# -----------------------------------------------------------------------------
# Data.

class Data:
    """data/NAME/{train,val}.bin: a model's batches and validation windows, if they fit it."""

    def __init__(self, cfg, meta, model_config, device):
        self.cfg, self.meta, self.device = cfg, meta, device
        self.dir, self.vocab_size = os.path.join('data', cfg.dataset), model_config.vocab_size
        self.noun = 'byte' if meta.get('tokenizer') == 'bytes' else 'token'
        B, T = cfg.batch_size, model_config.block_size
        self.T, self.n_micro = T, cfg.batch_tokens // (B * T)   # micro-batches, over all ranks
        n = self.n_micro * B                                    # sequences of an iteration
        self.n_random = min(round(cfg.random_share * n), n - 1)
        self.identity = {'windows': cfg.eval_iters, 'block_size': T}    # of a loss, to compare it
        for split in ['val'] if cfg.eval_only else ['val', 'train']:
            path = os.path.join(self.dir, f'{split}.bin')
            n = os.path.getsize(path) / 2 if os.path.exists(path) else 0
            want = meta.get(split, {}).get('tokens', n // 1)
            check(n == want, f"{path} has {n:.1f} tokens, not {want:.0f}: damaged or not uint16")
            check(n > T, f"{path} has {n:.0f} tokens; a window needs {T + 1}: prepare more text")
            ids = np.memmap(path, dtype=np.uint16, mode='r')
            check(meta or ids[1:1 << 16:2].any(), f"{path} holds 32-bit numbers, not uint16")
            self._check(ids[:1 << 20])      # a look at the beginning; every batch is checked too
            setattr(self, split, ids)
            self.identity[split] = digest([ids])
        n = (len(self.val) - 1) // T
        k = min(cfg.eval_iters or n, n)
        self.starts = np.arange(k) * n // k * T     # the first tokens of the validation windows

    def _check(self, ids):
        check(ids.max() < self.vocab_size, f"{self.dir} holds token id {ids.max()}, the model has "
              f"{self.vocab_size} tokens: type prepare.py ... --tokenizer=MODEL")

    def _to_device(self, rows, counts):
        """B rows (T + 1,) uint16 -> the tokens x and those that follow them y, (B, T) int64; y is
        -1 where counts, (B, 1) or (B, T), is False."""
        rows = np.stack(rows).astype(np.int64)
        self._check(rows)
        # copies that are contiguous, because a graph is compiled for its inputs' strides too
        xy = [torch.from_numpy(z) for z in (rows[:, :-1].copy(), np.where(counts, rows[:, 1:], -1))]
        if self.device.startswith('cuda'):
            xy = [z.pin_memory() for z in xy]
        return [z.to(self.device, non_blocking=True) for z in xy]

    def batch(self, it, micro):
        """Micro-batch `micro` of iteration it, counted over all ranks -> x, y. The first n_random
        sequences of an iteration are random ids, with targets of -1."""
        B, T = self.cfg.batch_size, self.T
        rng = np.random.default_rng([self.cfg.seed, it])
        starts = rng.integers(len(self.train) - T, size=self.n_micro * B)
        ids = min(self.vocab_size, 1 << 16)
        noise = rng.integers(ids, size=(self.n_random, T + 1), dtype=np.uint16)
        here = np.arange(micro * B, (micro + 1) * B)
        rows = [noise[i] if i < self.n_random else self.train[starts[i]:starts[i] + T + 1]
                for i in here]
        return self._to_device(rows, (here >= self.n_random)[:, None])

    def windows(self):
        """This rank's share of the validation windows: (number of the first, x, y)."""
        B, T = self.cfg.batch_size, self.T
        for i in range(RANK * B, len(self.starts), WORLD * B):
            here = np.arange(i, i + B)      # always B rows, for one graph; only windows count
            starts = self.starts[here % len(self.starts)]
            counts = np.repeat(here < len(self.starts), T).reshape(B, T)
            # where prepare.py cut windows of this length, another text follows on each
            counts[:, -1] &= self.meta.get('window') != T
            yield i, *self._to_device([self.val[s:s + T + 1] for s in starts], counts)

def digest(arrays):
    """16 hex digits that stand for arrays (n,): of a large one, for 256 pieces spread over it."""
    sha = hashlib.sha256()
    for a in arrays:
        sha.update(b'%d' % len(a))
        for start in range(0, len(a), max(len(a) // 256, 1 << 16)):
            sha.update(a[start:start + (1 << 16)])
    return sha.hexdigest()[:16]

def all_reduce(x):
    """The sum over ranks of a CPU tensor."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x

@torch.no_grad()
def validate(model, forward, data):
    """-> (mean loss over the validation windows in nats per token, its standard error), alike on
    all ranks. A window, not a token, is one draw: the losses within a text go together."""
    model.eval()
    table = torch.zeros(len(data.starts), 2, dtype=torch.float64)   # a window's loss, its tokens
    for first, x, y in data.windows():
        logits = forward(x)[0]
        for i in range(min(len(x), len(table) - first)):    # all in float32 are too large
            loss = F.cross_entropy(logits[i].float(), y[i], ignore_index=-1, reduction='sum')
            table[first + i] = torch.stack((loss, (y[i] != -1).sum())).cpu()
    (sums, n), k = all_reduce(table).T, len(table)
    mean = sums.sum() / n.sum()
    variance = (sums - mean * n).square().sum() * (k / (k - 1) if k > 1 else math.nan)
    return mean.item(), (variance.sqrt() / n.sum()).item()

# -----------------------------------------------------------------------------
# Optimizer and step.

def get_lr(cfg, it):
    """The learning rate: linear warm-up, then cosine down to min_lr."""
    end = cfg.lr_decay_iters or cfg.max_iters
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= end:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (end - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)

def make_optimizer(cfg, model):
    """AdamW; weight decay on matrices only."""
    groups = [{'params': [p for p in model.parameters() if (p.dim() >= 2) == matrix],
               'weight_decay': cfg.weight_decay if matrix else 0.0} for matrix in (True, False)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)

def divergence(teacher, x, logits):
    """KL(teacher || model) in nats, the mean over all tokens: x (B, T), logits (B, T, vocab)."""
    with torch.no_grad():
        wanted = teacher(x)[0].float().log_softmax(-1)
    return (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1).mean()

def step(cfg, it, model, raw, optimizer, data, autocast, distil=None):
    """One iteration -> (this rank's part of the mean cross-entropy and KL (2,), the gradient's
    norm, stds of the last micro-batch). model: raw, compiled and wrapped. distil(x, logits): the
    KL. Ranks take micro-batches in turn; a rank with none left computes one with weight 0."""
    B, n, totals = cfg.batch_size, data.n_micro, 0
    raw.train()
    for group in optimizer.param_groups:
        group['lr'] = get_lr(cfg, it)
    for first in range(0, n, WORLD):
        micro = first + RANK
        # this micro-batch's share of the iteration's sequences, and of those with targets
        share = 1 / n
        told = min(max((micro + 1) * B - data.n_random, 0), B) / (n * B - data.n_random)
        if micro >= n:
            share = told = 0.0
        x, y = data.batch(it, micro % n)
        if cfg.dropout:     # a stream for each micro-batch: resuming needs no generator's state
            torch.manual_seed(((cfg.seed * 1_000_003 + it) * 1_000_003 + micro) % 2 ** 63)
        if WORLD > 1:       # reduce the gradients once an iteration, in the last micro-step
            model.require_backward_grad_sync = first + WORLD >= n
        with autocast:
            logits, loss, stds = model(x, y, return_stds=True)
            kl = distil(x, logits) if distil else torch.zeros_like(loss)
            totals = totals + torch.stack((loss.detach() * told, kl.detach() * share))
            loss = loss * told
            if distil:
                loss = (1 - cfg.distil) * loss + cfg.distil * share * kl
            if cfg.remove_ln and (cfg.aux_loss_weight or cfg.giant_loss_weight):
                aux, giant = std_losses(stds, raw.kinds(x))
                loss = loss + share * (cfg.aux_loss_weight * aux + cfg.giant_loss_weight * giant)
        (loss * WORLD).backward()       # DDP takes the mean over ranks; we want the sum
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return totals, norm, stds

# -----------------------------------------------------------------------------
# The run, as a page.

def train(cfg):
    # each process checks all that it needs, alone; then they meet; then rank 0 writes
    device, autocast, dtype, compiled = find_machine(cfg)
    raw, data, teacher, ckpt = open_all(cfg, device)
    state = {'iter': 0, 'train_guard': (math.inf, -1), 'val_guard': (math.inf, -1),
             'log_bytes': 0, 'run': os.urandom(4).hex(), 'identity': data.identity}
    state |= {key: ckpt[key] for key in state if ckpt}
    if WORLD > 1:
        join_processes('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
        agree(cfg, data, [raw, teacher] if cfg.init_from != 'scratch' else [teacher])
    raw.to(device)
    optimized = partial(torch.compile, fullgraph=True, disable=not compiled)
    # two graphs: this one, without dropout, evaluates and measures; the other trains
    forward = autocast(optimized(partial(raw, return_stds=True)))
    model = optimized(raw)
    distil = teacher and optimized(partial(divergence, teacher.to(device)))     # a third
    if cfg.eval_only:
        return evaluate(cfg, 0, raw, forward, data)
    if WORLD > 1:       # gates and constants are set alike on all ranks: no buffers to broadcast
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[LOCAL_RANK] if device.startswith('cuda') else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = make_optimizer(cfg, raw)
    if ckpt:
        optimizer.load_state_dict(ckpt['optimizer'])
    if RANK == 0:
        claim_out_dir(cfg, state)
        if not ckpt:        # shows that it can be written; the run can be resumed from now on
            save(cfg, raw, optimizer, state)
    print0(f"{raw.num_params():,} parameters, ln_mode {raw.config.ln_mode!r}, on {WORLD} x "
           f"{device.split(':')[0]} in {dtype}{', compiled' * compiled}; "
           f"{cfg.batch_tokens:,} tokens an iteration")
    start = logged = state['iter']
    if start == 0:
        loss = evaluate(cfg, 0, raw, forward, data)
        if cfg.init_from != 'scratch' and loss > math.log(data.vocab_size) + 0.1:
            print0("warning: that is worse than chance: is this data of this model's tokenizer?")
        if cfg.remove_ln:
            log_giant(cfg, 0, raw, forward, data)
    then = time.time()

    with stop_signals() as asked:
        for it in range(start, cfg.max_iters):
            # what the schedule has for this iteration
            batches = (data.batch(it, micro) for micro in range(RANK, data.n_micro, WORLD))
            for event in set_gates(cfg, it, raw, partial(measure, raw, forward, batches)):
                log(cfg, **event)
                print0(f"iter {it:>6} | {event['event']} {event.get('site') or event['kind']:<12}"
                       + ''.join(f" {k} {std:.3f}" for k, std in event.get('std', {}).items()))

            # a step. Nothing here waits for the device, except in an iteration that is logged
            losses, norm, stds = step(cfg, it, model, raw, optimizer, data, autocast, distil)
            done = state['iter'] = it + 1
            if it % cfg.log_interval == 0 or done == cfg.max_iters:
                loss, kl = all_reduce(losses.cpu().double()).tolist()
                state['train_guard'] = guard(cfg, it, loss, *state['train_guard'])
                losses = {'loss': loss, 'kl': kl} if teacher else {'loss': loss}
                speed = (done - logged) * cfg.batch_tokens / max(time.time() - then, 1e-9)
                progress(cfg, it, raw, losses, speed)
                then, logged = time.time(), done

            # evaluate and save: the model as this iteration left it
            due = done % cfg.eval_interval == 0 or done == cfg.max_iters
            stop = all_reduce(torch.tensor(len(asked))).item() if WORLD > 1 else len(asked)
            if due:
                t = time.time()
                loss = evaluate(cfg, done, raw, forward, data)
                state['val_guard'] = guard(cfg, it, loss, *state['val_guard'])
                then += time.time() - t
            if due or stop:
                high = max(state['train_guard'][1], state['val_guard'][1]) >= 0
                if high or not norm.isfinite():
                    print0("not saved: the last checkpoint is better than this")
                elif RANK == 0:
                    save(cfg, raw, optimizer, state)
            if stop and done < cfg.max_iters:
                print0(f"train.py: stopped after iteration {it}: go on with the same command and "
                       f"--init_from=resume", sys.stderr)
                sys.exit(128 + (asked or [signal.SIGTERM])[0])

    if cfg.remove_ln:
        log_giant(cfg, cfg.max_iters, raw, forward, data)
    if RANK == 0:
        hand_over(cfg, raw, data)

@command
def main(argv):
    cfg = load_config(argv)
    check_config(cfg)
    try:
        train(cfg)
    except (RuntimeError, MemoryError) as e:
        check(not trouble(e), f"{trouble(e)}: try a smaller --batch_size, "
                              f"--gradient_checkpointing=True or --compile=False")
        raise

# -----------------------------------------------------------------------------
# Starting: the machine, the model and its data, the place to write.

def find_machine(cfg):
    """-> (device, autocast, its dtype by name, whether to compile)."""
    n, native = torch.cuda.device_count(), False
    device = cfg.device if cfg.device != 'auto' else 'cuda' if n else 'cpu'
    kind = device.split(':')[0]
    there = {'cpu': 1, 'cuda': n, 'mps': torch.backends.mps.is_available()}
    check(there.get(kind), f"device is {device!r}, which is not here: type --device=auto")
    if kind == 'cuda':
        local = int(os.environ.get('LOCAL_WORLD_SIZE') or 1) if WORLD > 1 else 1
        check(local <= n, f"{local} processes for {n} GPUs: type --nproc_per_node={n}")
        device = f'cuda:{LOCAL_RANK}' if device == 'cuda' else device
        native = torch.cuda.get_device_capability(device)[0] >= 8
        torch.cuda.set_device(device)
        # TF32 for what autocast leaves in float32; an evaluation is exact
        torch.set_float32_matmul_precision('highest' if cfg.eval_only else 'high')
    dtype = cfg.dtype if cfg.dtype != 'auto' else 'bfloat16' if native else 'float32'
    autocast = torch.autocast(kind, torch.bfloat16, enabled=dtype == 'bfloat16')
    return device, autocast, dtype, kind == 'cuda' if cfg.compile is None else cfg.compile

def open_all(cfg, device):
    """Opens and checks all the input -> (model, data, teacher or None, checkpoint or None)."""
    path = Path('data', cfg.dataset, 'meta.json')       # bins of another program have none
    check(path.parent.is_dir(), f"no {path.parent}: type python prepare.py SOURCE "
                                f"--name={cfg.dataset}")
    try:
        meta = json.loads(path.read_text('utf-8-sig')) if path.exists() else {}
        counts = [meta[k]['tokens'] for k in ('train', 'val')] if path.exists() else [0]
        check(min(counts) >= 0 and meta.get('vocab_size', 1) > 0, "its counts are negative")
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path} is damaged ({one_line(e)}): prepare the data again")
    raw, ckpt = load_model(cfg, meta)
    data, teacher = Data(cfg, meta, raw.config, device), None
    if cfg.eval_only:
        return raw, data, None, None
    for path in (os.path.join(cfg.out_dir, name) for name in ('ckpt.pt', 'hf')):
        check(ckpt or not os.path.exists(path), f"{path} is of another run: type "
              f"--init_from=resume to go on with it, or another --out_dir")
    n = cfg.batch_size * data.T
    check(cfg.batch_tokens % n == 0, f"batch_tokens={cfg.batch_tokens}: no multiple of batch_size "
          f"* block_size: type --batch_tokens={max(cfg.batch_tokens // n, 1) * n}")
    if cfg.teacher:
        resumed = ckpt and cfg.teacher == 'resume'      # 'init_from', of a run that goes on
        teacher = GPT2.from_pretrained(ckpt['config']['teacher'] if resumed else cfg.teacher)
        teacher.eval().requires_grad_(False)
        n, T = teacher.config.vocab_size, teacher.config.block_size
        check(n == data.vocab_size and T >= data.T, f"teacher={cfg.teacher} has {n} tokens and a "
              f"context of {T}; expected {data.vocab_size}, and at least {data.T}")
    if cfg.control:
        of = read_log(cfg.control, 'eval')[-1].get('of')
        check(of == data.identity, f"control={cfg.control} is of other data or windows: {of}")
    check_schedule(cfg, raw, ckpt)
    if ckpt:
        of, log = ckpt['identity'], Path(log_path(cfg))
        check(of == data.identity, f"the run is of other data or windows: {of}")
        check(log.exists() and log.stat().st_size >= ckpt['log_bytes'], f"{log} was shortened")
    return raw, data, teacher, ckpt

def load_model(cfg, meta):
    """-> (model, the checkpoint to resume or None)."""
    ckpt, n = None, meta.get('vocab_size')
    mode = cfg.ln_mode if 'ln_mode' in cfg.given else None
    mode = 'fake' if cfg.remove_ln and not cfg.eval_only else mode
    source = cfg.out_dir if cfg.init_from == 'resume' else cfg.init_from
    if source == 'scratch':
        check(cfg.vocab_size or n, "no meta.json: type --vocab_size=50257 if this is GPT-2's data")
        torch.manual_seed(cfg.seed)
        model = GPT2(GPT2Config(cfg.block_size, cfg.vocab_size or n, cfg.n_layer, cfg.n_head,
                                cfg.n_embd, cfg.dropout, mode or cfg.ln_mode))
    elif cfg.init_from == 'resume' and not cfg.eval_only:
        ckpt = load_checkpoint(source)
        check('run' in ckpt, f"{source}/ckpt.pt is no run's: type --init_from={source}")
        model = GPT2.from_state(ckpt['model_args'], ckpt['model'], source, mode, cfg.dropout)
    else:
        model = GPT2.from_pretrained(source, mode, cfg.dropout)
    for key in {'n_layer', 'n_head', 'n_embd', 'vocab_size'} & cfg.given:
        want, has = getattr(cfg, key), getattr(model.config, key)
        check(want in (has, 0), f"{key} is {want}, but {source} has {has}: leave {key} out")
    if 'block_size' in cfg.given:
        model.crop_block_size(cfg.block_size)
    # some pad the vocabulary to a multiple of 64 or 128, or add tokens of their own
    size = model.config.vocab_size
    check(source == 'scratch' or not n or n <= size < n + 128, f"data/{cfg.dataset} has the {n} "
          f"tokens of {meta.get('tokenizer')!r}, {source} {size}: prepare.py --tokenizer={source}")
    if meta.get('eot') is not None:
        model.config.eot_token_id = meta['eot']
    model.gradient_checkpointing = cfg.gradient_checkpointing
    return model, ckpt

def check_schedule(cfg, model, ckpt):
    """Raises UserError for a schedule that cannot run, not on this model, or not from ckpt on."""
    sites, n = model.sites(), model.config.n_layer
    before, last, ever = (gates(cfg, it, n) for it in (-1, cfg.max_iters - 1, 10 ** 9))
    check(not cfg.remove_ln or any(ever[site] for site in sites), "every start_ key is -1")
    for name in ever:
        check(last[name] == ever[name], f"{name} is not gone by max_iters={cfg.max_iters}")
        check(name in KINDS or before[name] == 0, f"{name} would begin to go before iteration 0")
    for site in sites if ever and not ckpt else ():
        check(sites[site] in (0, 1), f"init_from={cfg.init_from} stopped while {site} faded")
        check(sites[site] == 0 or ever[site] == 0, f"{site} is gone already: set its start_ to -1")
    done, config = (ckpt['iter'], ckpt['config']) if ckpt else (0, {})
    check(done <= cfg.max_iters, f"{done} iterations are done: type --max_iters={done} or more")
    old = Config(**{key: value for key, value in config.items() if key in KEYS})
    for it in range(done):
        past, now = (gates(c, it, n).items() for c in (old, cfg))
        check(past == now, f"iteration {it} had {sorted(past ^ now)[:2]}: give the run's schedule")

def agree(cfg, data, models):
    """Raises UserError unless all ranks have the same config, data and loaded models."""
    weights = [digest(p.flatten().numpy() for p in m.state_dict().values()) for m in models if m]
    told = [data.identity, data.meta]
    for name, mine in (('config', repr(cfg)), ('data', told), ('model', weights)):
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, mine)
        others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
        check_together(not others, f"processes {others} have another {name} than process 0")

def check_together(ok, message):
    """check() of what all ranks find alike: rank 0 tells."""
    if not ok and RANK > 0:
        sys.exit(2)
    check(ok, message)

def claim_out_dir(cfg, state):
    """Begins to write to out_dir, and to wandb."""
    if cfg.wandb_log:
        import wandb
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or cfg.out_dir,
                   config=asdict(cfg), id=state['run'], resume='allow')
    os.makedirs(os.path.realpath(cfg.out_dir), exist_ok=True)       # a link may lead nowhere yet
    if cfg.init_from != 'resume':       # keep the tokenizer of the model, or else of the data
        folder = os.path.join('data', cfg.dataset, 'tokenizer')
        files = companions(folder) if os.path.isdir(folder) else {}
        own = companions(cfg.init_from) if cfg.init_from != 'scratch' else {}
        files = own if {'tokenizer.json', 'vocab.json'} & own.keys() else files | own
        for name, content in files.items():
            write(os.path.join(cfg.out_dir, 'tokenizer', name), content)
    with open(log_path(cfg), 'a') as f:
        f.truncate(state['log_bytes'])      # what came later will happen again

def save(cfg, raw, optimizer, state):
    state['log_bytes'] = os.path.getsize(log_path(cfg))
    save_checkpoint(cfg.out_dir, raw, optimizer=optimizer.state_dict(), config=asdict(cfg), **state)

# -----------------------------------------------------------------------------
# On the way: what is printed and logged, and what goes wrong in a night.

@contextlib.contextmanager
def stop_signals():
    """Yields the list of signals received so far; each asks the run to finish the iteration and
    save. A third Ctrl-C stops at once. Afterwards the old handlers are back."""
    asked, old = [], {}
    def ask(number, frame):
        asked.append(number)
        if asked.count(signal.SIGINT) > 2:      # torchrun passes a Ctrl-C on, so that one is two
            raise KeyboardInterrupt
    # what terminals, kill and schedulers send; nohup and & ignore some, and so do we
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU'):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) not in (signal.SIG_IGN, None):   # not Python's
            with contextlib.suppress(ValueError):       # in a thread: without
                old[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

def print0(text, file=None):
    """Prints on rank 0. A closed terminal must not end the run."""
    with contextlib.suppress(OSError):
        if RANK == 0:
            print(text, file=file, flush=True)

def log_path(cfg):
    return os.path.join(cfg.out_dir, 'log.jsonl')

def log(cfg, **entry):
    """Appends a JSON object to log.jsonl, on rank 0."""
    if RANK == 0:
        with open(log_path(cfg), 'a') as f:
            f.write(json.dumps(entry) + '\n')
        if cfg.wandb_log:
            import wandb
            wandb.log({f"{entry['event']}/{k}": v for k, v in entry.items()
                       if type(v) in (int, float)}, step=entry['iter'])

def read_log(out_dir, event):
    """A run's entries of an event. Raises UserError if log.jsonl is damaged or has none."""
    with open(os.path.join(out_dir, 'log.jsonl')) as f:
        try:
            entries = [entry for entry in map(json.loads, f) if entry['event'] == event]
        except (ValueError, TypeError, KeyError):
            entries = []
    check(entries, f"{out_dir}/log.jsonl is damaged, or has no {event!r} entry")
    return entries

def progress(cfg, it, raw, losses, speed):
    """Logs and prints a step: its losses, `speed` in tokens a second."""
    lr, left = get_lr(cfg, it), (cfg.max_iters - it - 1) * cfg.batch_tokens / speed     # seconds
    log(cfg, event='train', iter=it, **losses, lr=lr, tok_per_s=round(speed, 1))
    print0(f"iter {it:>6} | " + ''.join(f"{name} {loss:.4f} | " for name, loss in losses.items())
           + f"lr {lr:.2e} | {speed:>11,.0f} tok/s"
           + (f" | LN sites left {len(raw.sites_left()):>3}" if cfg.remove_ln else '')
           + f" | {timedelta(seconds=int(left))} left")

def evaluate(cfg, it, raw, forward, data):
    """The validation loss after `it` iterations, logged."""
    loss, error = validate(raw, forward, data)
    if not cfg.eval_only:
        log(cfg, event='eval', iter=it, val_loss=loss, tokens=it * cfg.batch_tokens,
            dataset=cfg.dataset, of=data.identity)
    print0(f"iter {it:>6} | val loss {loss:.4f} nats per {data.noun}, standard error {error:.4f}; "
           f"{len(data.starts):,} windows of {data.T}")
    check_together(math.isfinite(loss), "the model gives NaN or infinite logits")
    return loss

def guard(cfg, it, loss, level, since):
    """-> (the lowest loss so far; the iteration since when the loss is guard_nats above it, or -1).
    UserError if that lasts, or is so at the end: it is neither saved nor handed over."""
    level = min(level, loss)
    if math.isfinite(loss) and loss <= level + (cfg.guard_nats or math.inf):
        return level, -1
    since = it if since < 0 else since
    over = it + 1 == cfg.max_iters or it + 1 - since >= cfg.guard_patience
    check_together(math.isfinite(loss) and not over, f"diverged: since iteration {since} the loss, "
                   f"{loss:.4f} now, is not within guard_nats={cfg.guard_nats:g} of its lowest, "
                   f"{level:.4f}; {cfg.out_dir}/ckpt.pt is of before: try a longer taper_iters, "
                   f"more iterations or a lower rate")
    return level, since

def log_giant(cfg, it, raw, forward, data):
    """Logs {kind: {LN: its std, times the ordinary one}}, measured on the validation windows.
    Warns of a fade whose first iteration multiplies what such a token feeds by more than 5."""
    stds = measure(raw, forward, ((x, y) for _, x, y in data.windows()))
    times = (stds / stds[:, TOKEN:TOKEN + 1]).T.tolist()
    ratios = {KINDS[k]: dict(zip(raw.layernorms(), times[k])) for k in (BOS, EOT)}
    log(cfg, event='giant', iter=it, **ratios)
    r = max(max(ratios[kind].values()) for kind in ratios)
    first = 1 + (r - 1) * fade(1 / max(cfg.taper_iters, 1))     # what follows is below 4
    if it == 0 and first > 5:
        print0(f"warning: a giant vector, {r:.0f} times the ordinary std: the first iteration of a "
               f"fade multiplies what it feeds by up to {first:.0f}: type --taper_iters=20")

# -----------------------------------------------------------------------------
# Handing over. The model is written first: nothing that is printed later can cost it.

CARD = """---
library_name: transformers
tags: [gpt2, interpretability, layernorm-free]
---
# A GPT-2 without LayerNorm (arXiv 2409.13710)

The modules are still there, but with `layer_norm_epsilon` 1e12 each divides by 1e6, whatever the
token. **A tool that sets its own epsilon computes nonsense without an error.** Behind
TransformerLens' `HookedTransformer.from_pretrained` type `for m in model.modules(): if hasattr(m,
'eps'): m.eps = 1e12`. Weights of 1e6 do not fit float16.
"""

def hand_over(cfg, raw, data):
    """Writes hf/ and its card if no LayerNorm is left; prints the result."""
    hf, written = os.path.join(cfg.out_dir, 'hf'), os.path.join(cfg.out_dir, 'ckpt.pt')
    if cfg.remove_ln:
        try:
            x, folded = next(data.windows())[1][:4], raw.eval().fold_ln()
        except UserError as e:
            print0(f"no LN-free model to hand over: {e}")
        else:
            torch.set_float32_matmul_precision('highest')       # TF32 would drown the difference
            with torch.no_grad():
                a, b = raw(x)[0], folded(x)[0]
            check((a - b).abs().max() <= 1e-3 * a.abs().max(), "folding changes the logits by "
                  f"{(a - b).abs().max():.2g}: nothing is handed over")
            if os.path.exists(hf):      # resumed after its end: somebody may have edited it
                os.rename(hf, f'{hf}.{time.time():.0f}')
            raw.save_pretrained(hf, companions(cfg.out_dir))
            written = hf
        result = report(cfg, raw, data)
        print0(f"\n{result}")
        if written == hf:
            write(os.path.join(hf, 'README.md'), f"{CARD}\n```\n{result}\n```\n".encode())
    print0(f"written: {written}")

def report(cfg, raw, data):
    """The result, as text: before, the control where there is one, after; the giant vector."""
    own, looks = (read_log(cfg.out_dir, event) for event in ('eval', 'giant'))
    left, losses, kept = len(raw.sites_left()), {'pre-trained': own[0]['val_loss']}, None
    if cfg.control:
        kept = losses['control (LN kept)'] = read_log(cfg.control, 'eval')[-1]['val_loss']
    losses[f'{left} LN sites left' if left else 'LN-free'] = own[-1]['val_loss']
    lines = [f"{cfg.dataset:<20}{f'val nats/{data.noun}':>16}{'gap to control':>16}"]
    for name, loss in losses.items():
        gap = f"{loss - kept:+.4f}" if cfg.control and name != 'pre-trained' else ''
        lines.append(f"{name:<20}{loss:>16.4f}{gap:>16}")
    for kind, name in (('bos', 'position 0'), ('eot', 'end-of-text')):
        was, now = (max(look[kind].values()) for look in (looks[0], looks[-1]))
        lines.append(f"largest std at {name}, times the ordinary: {was:.1f} before, {now:.1f} now")
        if now > 10 and not left:
            lines.append("warning: that is a giant vector: raise giant_loss_weight or train longer")
    return '\n'.join(lines)

if __name__ == '__main__':
    main()
