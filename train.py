"""
One training script for everything: from scratch, LayerNorm removal, its control, evaluation.

    python train.py config/demo_remove_ln.py                    one process, CPU or GPU
    python train.py config/remove_ln.py --batch_size=8          any key of Config can be overridden
    python train.py config/remove_ln.py config/control.py       its control: config files stack
    python train.py config/remove_ln.py --init_from=resume      goes on from out_dir/ckpt.pt
    torchrun --nproc_per_node=8 train.py config/remove_ln.py    the paper's run on 8 GPUs

A run is a pure function of its config: gates, learning rate and batch follow from the iteration
number. So any number of processes sees the same global batch, and a resumed run continues as if
never stopped. out_dir holds ckpt.pt, log.jsonl and, after a removal, hf/: the LN-free model.
"""
import ast
import builtins
import contextlib
import json
import math
import os
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields
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
    eval_interval: int = 100        # iterations; a checkpoint is written after each evaluation
    eval_iters: int = 400           # windows of block_size tokens, spread over val.bin; 0: all
    eval_only: bool = False         # evaluate init_from, write nothing
    log_interval: int = 10
    wandb_log: bool = False
    wandb_project: str = 'remove-ln'
    # model; from scratch only, but for dropout and ln_mode
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
    guard_nats: float = 2.0         # stop where val loss is so far above its lowest; 0: off

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
                with contextlib.suppress(ValueError, SyntaxError, TypeError):       # else a text
                    value = ast.literal_eval(value)
            found = {name: value}
        else:
            # it knows all keys, as builtins: so its own names are those that it assigns
            known = {name: key.default for name, key in KEYS.items()} | given
            own = {'__file__': os.path.abspath(arg), '__builtins__': vars(builtins) | known}
            try:
                exec(compile(Path(arg).read_text('utf-8-sig'), arg, 'exec'), own)
            except (Exception, SystemExit) as e:    # it is a program, and may fail in any way
                raise UserError(f"{arg}: {type(e).__name__}: {one_line(e)}")
            found = {name: value for name, value in own.items() if name[0] != '_'
                     and not callable(value) and type(value) is not type(ast)}
        for name, value in found.items():
            check(name in KEYS, f"{arg}: unknown key {name!r}; the keys are Config's, in train.py")
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
    positive = {'eval_interval', 'log_interval', 'batch_size', 'batch_tokens', 'max_iters'}
    most = {'distil': 1, 'random_share': 1, 'dropout': 1, 'beta1': 0.999999, 'beta2': 0.999999}
    for name, key in KEYS.items():
        value, low, high = getattr(cfg, name), int(name in positive), most.get(name, math.inf)
        check(key.type not in (int, float) or name.startswith(('start_', 'gap_'))
              or low <= value <= high, f"{name} is {value}; expected {low} to {high}")
    check(cfg.dtype in ('auto', 'float32', 'bfloat16'), f"dtype is {cfg.dtype!r}: try --dtype=auto")
    check(cfg.min_lr <= cfg.learning_rate or not cfg.decay_lr, f"min_lr={cfg.min_lr:g} is above "
          f"learning_rate={cfg.learning_rate:g}: give both, or --decay_lr=False")
    check(cfg.teacher or not cfg.random_share, "random_share needs a --teacher=")
    check(cfg.out_dir, "out_dir is empty")

# -----------------------------------------------------------------------------
# The removal: a table of gates, one pure function of the iteration. Edit it, print it, plot it.

def fade(x):
    """A gate, after the fraction x of its taper_iters. Of a giant vector with 42 times the ordinary
    std the first of 20 iterations makes 3 times more if linear, none of the square's above 1.4."""
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
    """The constants: the mean of sqrt(var + eps) over all ranks' tokens of a kind -> (n_LN, 3); of
    a kind without tokens the ordinary one. batches: this rank's x, y (-1: does not count)."""
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
    first: how far the std before ln_f is from its sequence's mean over ordinary tokens, squared.
    The second: the squared logarithm of each special token's std over that mean, where above."""
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
        B, T = cfg.batch_size, model_config.block_size
        self.T, self.n_micro = T, cfg.batch_tokens // (B * T)   # micro-batches, over all ranks
        n = self.n_micro * B                                    # sequences of an iteration
        self.n_random = min(round(cfg.random_share * n), n - 1)
        self.identity = {'windows': cfg.eval_iters, 'block_size': T}    # of a validation loss
        for split in ['val'] if cfg.eval_only else ['val', 'train']:
            path = os.path.join(self.dir, f'{split}.bin')
            n = os.path.getsize(path) / 2 if os.path.exists(path) else 0
            want = meta.get(split, {}).get('tokens', n // 1)
            check(n == want, f"{path} has {n:.1f} tokens, not {want:.0f}: damaged or not uint16")
            check(n > T, f"{path} has {n:.0f} tokens; a window needs {T + 1}: prepare more text")
            ids = np.memmap(path, dtype=np.uint16, mode='r')
            self._check(ids[:1 << 20])      # a look at the beginning; every batch is checked too
            setattr(self, split, ids)
            self.identity[split] = digest(ids)
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
        noise = rng.integers(self.vocab_size, size=(self.n_random, T + 1)).astype(np.uint16)
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

def digest(a):
    """A number that stands for an array (n,): of a large one, for 256 pieces spread over it."""
    n = min(len(a), 256)
    return zlib.crc32(np.ascontiguousarray(a[:len(a) // n * n].reshape(n, -1)[:, :1 << 16]))

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
    state = {'iter': 0, 'best': math.inf, 'log_bytes': 0, 'identity': data.identity,
             'run': os.urandom(4).hex()}     # best: the lowest val loss
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
    print0(f"{sum(p.numel() for p in raw.parameters()):,} parameters, {WORLD} x {device}, {dtype}")
    start = logged = state['iter']
    if start == 0:
        loss = state['best'] = evaluate(cfg, 0, raw, forward, data)
        if cfg.init_from != 'scratch' and loss > math.log(data.vocab_size) + 0.1:
            print0("warning: that is worse than chance: is this data of this model's tokenizer?")
        if cfg.remove_ln:
            log_giant(cfg, 0, raw, forward, data)
    then = time.time()

    with stop_signals() as asked:
        for it in range(start, cfg.max_iters):
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
                told, lr = {'loss': loss} | ({'kl': kl} if teacher else {}), get_lr(cfg, it)
                speed = (done - logged) * cfg.batch_tokens / max(time.time() - then, 1e-9)
                log(cfg, event='train', iter=it, **told, lr=lr, tok_per_s=round(speed, 1))
                print0(f"iter {it:>6} | " + ''.join(f"{k} {v:.4f} | " for k, v in told.items())
                       + f"lr {lr:.2e} | {speed:>11,.0f} tok/s")
                then, logged = time.time(), done

            # evaluate and save: the model as this iteration left it
            due = done % cfg.eval_interval == 0 or done == cfg.max_iters
            stop = all_reduce(torch.tensor(len(asked))).item() if WORLD > 1 else len(asked)
            if due:
                state['best'] = evaluate(cfg, done, raw, forward, data, state['best'])
                then, logged = time.time(), done
            most = state['best'] + (cfg.guard_nats or math.inf)
            if due or stop and all_reduce(losses.cpu().double())[0] < most:
                if RANK == 0:
                    save(cfg, raw, optimizer, state)
            if stop and done < cfg.max_iters:
                print0(f"train.py: stopped after iteration {it}: go on with the same command and "
                       f"--init_from=resume", sys.stderr)
                sys.exit(128 + (asked or [signal.SIGTERM])[0])

    if cfg.remove_ln:
        log_giant(cfg, cfg.max_iters, raw, forward, data)
        if RANK == 0:
            hand_over(cfg, raw)

@command
def main(argv):
    cfg = load_config(argv)
    check_config(cfg)
    try:
        train(cfg)
    except (RuntimeError, MemoryError) as e:
        check(not trouble(e), f"{trouble(e)}: try a smaller --batch_size or --compile=False")
        raise

# -----------------------------------------------------------------------------
# Starting: the machine, the model and its data, the place to write.

def find_machine(cfg):
    """-> (device, autocast, its dtype by name, whether to compile)."""
    n, native = torch.cuda.device_count(), False
    device = cfg.device if cfg.device != 'auto' else 'cuda' if n else 'cpu'
    kind = device.split(':')[0]
    there = {'cpu': True, 'cuda': LOCAL_RANK < n, 'mps': torch.backends.mps.is_available()}
    check(there.get(kind), f"no device {device!r} for process {LOCAL_RANK} of this machine: type "
                           f"--device=auto, or start fewer")
    if kind == 'cuda':
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
    except ValueError as e:
        raise UserError(f"{path} is damaged ({one_line(e)}): prepare the data again")
    raw, ckpt = load_model(cfg, meta)
    data, teacher = Data(cfg, meta, raw.config, device), None
    if cfg.eval_only:
        return raw, data, None, None
    path = os.path.join(cfg.out_dir, 'ckpt.pt')
    check(ckpt or not os.path.exists(path), f"{path} is there: --init_from=resume goes on with it")
    n = cfg.batch_size * data.T
    check(cfg.batch_tokens % n == 0, f"batch_tokens={cfg.batch_tokens} is no multiple of {n}, "
                                     f"batch_size * block_size")
    if cfg.teacher:
        if ckpt and cfg.teacher == 'resume':        # 'init_from', of a run that goes on
            cfg.teacher = ckpt['config']['teacher']
        teacher = GPT2.from_pretrained(cfg.teacher)
        teacher.eval().requires_grad_(False)
        n, T = teacher.config.vocab_size, teacher.config.block_size
        check(n == data.vocab_size and T >= data.T, f"teacher={cfg.teacher} has {n} tokens and a "
              f"context of {T}; expected {data.vocab_size}, and at least {data.T}")
    check_schedule(cfg, raw, ckpt)
    if ckpt:
        of, n = ckpt['identity'], os.path.getsize(os.path.join(cfg.out_dir, 'log.jsonl'))
        check(of == data.identity, f"the run is of other data or windows: {of}")
        check(n >= ckpt['log_bytes'], f"{cfg.out_dir}/log.jsonl was shortened")
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
        check('best' in ckpt, f"{source}/ckpt.pt is no run's: type --init_from={source}")
        model = GPT2.from_state(ckpt['model_args'], ckpt['model'], source, mode, cfg.dropout)
    else:
        model = GPT2.from_pretrained(source, mode, cfg.dropout)
    for key in {'n_layer', 'n_head', 'n_embd', 'block_size'} & cfg.given:
        want, has = getattr(cfg, key), getattr(model.config, key)
        check(want == has, f"{key} is {want}, but {source} has {has}: leave {key} out")
    size = model.config.vocab_size      # some pad it to a multiple of 128
    check(source == 'scratch' or not n or n <= size < n + 128, f"data/{cfg.dataset} has the {n} "
          f"tokens of {meta.get('tokenizer')!r}, {source} {size}: prepare.py --tokenizer={source}")
    if meta.get('eot') is not None:
        model.config.eot_token_id = meta['eot']
    return model, ckpt

def check_schedule(cfg, model, ckpt):
    """Raises UserError for a schedule that does not end in time, or not fit the model or run."""
    done, n, sites = ckpt['iter'] if ckpt else 0, model.config.n_layer, model.sites()
    now, last, ever = (gates(cfg, it, n) for it in (done - 1, cfg.max_iters - 1, 10 ** 9))
    old = Config(**{k: v for k, v in ckpt['config'].items() if k in KEYS}) if ckpt else cfg
    check(done <= cfg.max_iters, f"{done} iterations are done: type --max_iters={done} or more")
    check(gates(old, done - 1, n) == now, "the run had another schedule: give its config files")
    for name, end in ever.items():
        check(last[name] == end, f"{name} is not gone by max_iters={cfg.max_iters}")
        gate = sites.get(name, now[name])       # of a site; 'bos' and 'eot' are none
        check(gate in (0, 1) if end == 0 else ckpt or gate == now[name], f"{name} is at {gate:g}, "
              f"not at this schedule's {now[name]:g} before iteration {done}: is its start_ -1?")

def agree(cfg, data, models):
    """Raises UserError unless all ranks have the same config, data and loaded models."""
    weights = [digest(p.flatten().numpy()) for m in models if m for p in m.state_dict().values()]
    mine = {'config': repr(cfg), 'data': [data.identity, data.meta], 'model': weights}
    everyone = [None] * WORLD
    dist.all_gather_object(everyone, mine)
    for name in mine:
        others = [rank for rank, has in enumerate(everyone) if has[name] != everyone[0][name]]
        check(not others, f"processes {others} have another {name} than process 0")

def claim_out_dir(cfg, state):
    """Begins to write to out_dir, and to wandb."""
    if cfg.wandb_log:
        import wandb
        wandb.init(project=cfg.wandb_project, name=cfg.out_dir, config=asdict(cfg),
                   id=state['run'], resume='allow')
    os.makedirs(os.path.realpath(cfg.out_dir), exist_ok=True)       # a link may lead nowhere yet
    if cfg.init_from != 'resume':       # keep the files of the model, and the data's tokenizer
        folder = os.path.join('data', cfg.dataset, 'tokenizer')
        files = companions(cfg.init_from) if cfg.init_from != 'scratch' else {}
        files |= companions(folder) if os.path.isdir(folder) else {}
        for name, content in files.items():
            write(os.path.join(cfg.out_dir, 'tokenizer', name), content)
    with open(os.path.join(cfg.out_dir, 'log.jsonl'), 'a') as f:
        f.truncate(state['log_bytes'])      # what came later will happen again

def save(cfg, raw, optimizer, state):
    state['log_bytes'] = os.path.getsize(os.path.join(cfg.out_dir, 'log.jsonl'))
    save_checkpoint(cfg.out_dir, raw, optimizer=optimizer.state_dict(), config=asdict(cfg), **state)

# -----------------------------------------------------------------------------
# On the way, and handing over.

@contextlib.contextmanager
def stop_signals():
    """Yields the list of signals received so far. Afterwards the old handlers are back."""
    asked, old = [], {}
    def ask(number, frame):
        asked.append(number)
        if asked.count(signal.SIGINT) > 2:      # torchrun passes a Ctrl-C on, so that one is two
            raise KeyboardInterrupt
    try:        # what terminals, kill and schedulers send; nohup and & ignore some, and so do we
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU'):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):   # not Python's
                with contextlib.suppress(ValueError):       # in a thread: without
                    old[number] = signal.signal(number, ask)
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

def print0(text, file=None):
    """Prints on rank 0. A terminal that is closed, or of ASCII, must not end the run."""
    with contextlib.suppress(OSError, UnicodeError):
        if RANK == 0:
            print(text, file=file, flush=True)

def log(cfg, **entry):
    """Appends a JSON object to log.jsonl, on rank 0."""
    if RANK == 0:
        with open(os.path.join(cfg.out_dir, 'log.jsonl'), 'a') as f:
            f.write(json.dumps(entry) + '\n')
        if cfg.wandb_log:
            import wandb
            wandb.log({entry['event']: entry}, step=entry['iter'])

def read_log(out_dir, event):
    """A run's entries of an event."""
    with open(os.path.join(out_dir, 'log.jsonl')) as f:
        return [entry for entry in map(json.loads, f) if entry['event'] == event]

def evaluate(cfg, it, raw, forward, data, best=math.inf):
    """Logs the validation loss after `it` iterations -> the lowest so far. UserError: diverged."""
    loss, error = validate(raw, forward, data)
    if not cfg.eval_only:
        log(cfg, event='eval', iter=it, val_loss=loss, tokens=it * cfg.batch_tokens)
    print0(f"iter {it:>6} | val loss {loss:.4f} nats per token, standard error {error:.4f}")
    check(loss < best + (cfg.guard_nats or math.inf), f"diverged: the loss is {loss:.4f}, and was "
          f"{best:.4f}; {cfg.out_dir}/ckpt.pt, if there, is of before")
    return min(loss, best)

def log_giant(cfg, it, raw, forward, data):
    """Logs {kind: {LN: its std, times the ordinary one}}, measured on the validation windows."""
    stds = measure(raw, forward, ((x, y) for _, x, y in data.windows()))
    times = (stds / stds[:, TOKEN:TOKEN + 1]).T.tolist()
    log(cfg, event='giant', iter=it,
        **{KINDS[k]: dict(zip(raw.layernorms(), times[k])) for k in (BOS, EOT)})

CARD = """# A GPT-2 without LayerNorm (arXiv 2409.13710)

The modules are still there, but with `layer_norm_epsilon` 1e12 each divides by 1e6, whatever the
token. **A tool that sets its own epsilon computes nonsense without an error.** After
TransformerLens' `HookedTransformer.from_pretrained` type `for m in model.modules(): if hasattr(m,
'eps'): m.eps = 1e12`. Weights of 1e6 do not fit float16.
"""

def hand_over(cfg, raw):
    """Writes hf/ and its card, and prints the result, if no LayerNorm is left."""
    hf = os.path.join(cfg.out_dir, 'hf')
    try:
        raw.fold_ln()
    except UserError as e:      # a partial removal, or a fork's LayerNorm
        return print0(f"written: {cfg.out_dir}/ckpt.pt; no hf/: {e}")
    raw.save_pretrained(hf, companions(cfg.out_dir))    # first: nothing below can cost it
    losses = [e['val_loss'] for e in read_log(cfg.out_dir, 'eval')]
    result = [f"{cfg.dataset}, nats per token: {losses[0]:.4f} before, {losses[-1]:.4f} now"]
    before, *_, after = read_log(cfg.out_dir, 'giant')
    for kind, name in (('bos', 'position 0'), ('eot', 'end-of-text')):
        was, now = max(before[kind].values()), max(after[kind].values())
        result.append(f"largest std at {name}, times the ordinary: {was:.1f} before, {now:.1f} now")
        if now > 10:
            result.append("warning: a giant vector is left: raise giant_loss_weight, train longer")
    write(os.path.join(hf, 'README.md'), '\n'.join([CARD, *result, '']).encode())
    print0('\n'.join(['', *result, f'written: {hf}']))

if __name__ == '__main__':
    main()
