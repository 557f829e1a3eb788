"""
The project's claims, one test each. Everything runs offline on two CPU cores, in random or
self-trained models.

    make test
"""
import contextlib
import gc
import http.server
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_hellaswag
import model
import prepare
import train
from model import BOS, EOT, TOKEN, GPT2, GPT2Config, UserError

REPO = Path(__file__).parent.resolve()
TINY = ('--dataset=tiny --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 '
        '--batch_tokens=512 --learning_rate=3e-3 --warmup_iters=2 --eval_iters=10 --log_interval=1 '
        '--compile=False --device=cpu').split()
REMOVE = ('--remove_ln=True --start_ln2=2 --gap_ln2=1 --start_ln1qk=4 --gap_ln1qk=1 '
          '--start_ln1v=6 --gap_ln1v=2 --start_lnf=10 --start_eot=11 --start_bos=13').split()

@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    """A folder with data/tiny, this repository's own source as bytes; the tests run in it."""
    folder, old = tmp_path_factory.mktemp('workspace'), os.getcwd()
    os.chdir(folder)
    files = [str(REPO / f) for f in ('model.py', 'train.py', 'prepare.py', 'test_model.py')]
    prepare.main([*files, '--name=tiny', '--tokenizer=bytes', '--val_fraction=0.1'])
    yield folder
    os.chdir(old)

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

def random_model(ln_mode='real', **kwargs):
    """A model whose every parameter, LN's included, is far from its initial value."""
    torch.manual_seed(0)
    config = dict(block_size=31, vocab_size=101, n_layer=3, n_head=3, n_embd=39, ln_mode=ln_mode)
    model = GPT2(GPT2Config(**config | kwargs)).eval()
    for name, p in model.named_parameters():
        p.data = p.data * 3 + 0.2 * torch.randn_like(p) * (p.dim() == 1)
    return model

def remove_all(model, idx):
    """Removes every site, with constants measured on idx, the same for all kinds of token."""
    for ln, std in zip(model.layernorms().values(), model(idx, return_stds=True)[2]):
        ln.std.fill_(std.mean().item())
        ln.gate.fill_(1)
    return model

IDX = torch.randint(0, 101, (4, 31), generator=torch.Generator().manual_seed(1))

def difference(a, b):
    return (a - b).abs().max().item()

def log_of(out_dir):
    """What a run did, without the clock."""
    entries = [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != 'tok_per_s'} for e in entries]

def val_loss(out_dir, i=-1):
    return train.read_log(out_dir, 'eval')[i]['val_loss']

def run(*args, nproc=1, script='train.py', **kwargs):
    """A script as a user starts it, under torchrun if nproc > 1."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}']
    launcher = torchrun if nproc > 1 else []
    kwargs['env'] = (os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
                     | kwargs.get('env', {}))
    return subprocess.Popen([sys.executable, *launcher, str(REPO / script), *map(str, args)],
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)

def finished(process, status=0):
    """What the process printed; it has ended with this status. 1 is torchrun's own."""
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == status and ('Traceback' not in output or status == 1), output
    return output

def refused(script, *args, capsys):
    """The one line on stderr with which a script refuses its arguments, with exit status 2."""
    gc.collect()        # a run that failed in this process holds its lock until then
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        script.main([str(a) for a in args])
    error = capsys.readouterr().err.strip()
    assert e.value.code == 2 and error and '\n' not in error, error
    return error

# -----------------------------------------------------------------------------
# Numerics and folding.

@torch.no_grad()
@pytest.mark.parametrize('shape', [dict(n_embd=39, n_head=3, n_layer=3),
                                   dict(n_embd=20, n_head=5, n_layer=1, vocab_size=257)])
def test_logits_equal_transformers_in_both_directions(shape, tmp_path):
    transformers = pytest.importorskip('transformers')
    ours = random_model(**shape)
    idx = torch.randint(0, ours.config.vocab_size, (3, 31))
    ours.save_pretrained(tmp_path / 'ours')
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'ours').eval()
    assert difference(theirs(idx).logits, ours(idx)[0]) < 1e-5
    loss, shifted = ours(idx[:, :-1], idx[:, 1:])[1], theirs(idx, labels=idx).loss
    assert abs(loss - shifted) < 1e-5

    torch.manual_seed(2)
    config = transformers.GPT2Config(
        n_positions=31, vocab_size=shape.get('vocab_size', 101), n_embd=shape['n_embd'],
        n_head=shape['n_head'], n_layer=shape['n_layer'], initializer_range=0.2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='20KB')     # in shards, as GPT-2 XL
    stale = {'transformer.wte.weight': torch.zeros_like(ours.wte.weight)}
    model.save_file(stale, tmp_path / 'theirs/model-00009-of-00009.safetensors')    # in no index
    ours = GPT2.from_pretrained(str(tmp_path / 'theirs')).eval()
    assert difference(theirs(idx).logits, ours(idx)[0]) < 1e-5
    assert ours.lm_head.weight is ours.wte.weight

@torch.no_grad()
def test_fake_with_gates_at_0_is_real():
    real = random_model()
    fake = GPT2.from_state(vars(real.config), real.state_dict(), 'test', 'fake').eval()
    assert len(fake.sites()) == 3 * 3 + 1
    assert difference(real(IDX)[0], fake(IDX)[0]) < 1e-6
    back = GPT2.from_state(vars(fake.config), fake.state_dict(), 'test', 'real').eval()
    assert difference(real(IDX)[0], back(IDX)[0]) == 0

@torch.no_grad()
def test_a_gate_moves_its_own_site_only_and_mixes_the_inverse_scales():
    model = random_model('fake')
    ln, x = model.h[1].ln_1, torch.randn(2, 5, 39) * 3 + 1
    kind = torch.zeros(2, 5, dtype=torch.int64)
    ln.std.fill_(1.7)
    real = ln(x, kind)[0][0]
    model.sites()['h.1.ln_1.v'].fill_(0.25)
    qk, v = ln(x, kind)[0]
    assert torch.equal(qk, real)
    sigma = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (x - x.mean(-1, keepdim=True)) * (0.75 / sigma + 0.25 / 1.7) * ln.weight + ln.bias
    assert difference(v, expected) < 1e-5
    assert [name for name, gate in model.sites().items() if gate > 0] == ['h.1.ln_1.v']
    # queries and keys read the one, values the other
    attn = model.h[1].attn
    (q, k, _), (_, _, value) = (attn.c_attn(z).view(2, 5, 3, 3, 13).permute(2, 0, 3, 1, 4)
                                for z in (qk, v))
    scores = (q @ k.mT / 13 ** 0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = attn.c_proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 5, 39))
    assert difference(attn(qk, v), expected) < 1e-4 < difference(attn(qk, qk), expected)

@torch.no_grad()
def test_position_0_and_end_of_text_have_constants_of_their_own():
    """A giant vector at position 0 and at end-of-text, as trained GPT-2s have:
    with one constant the logits are lost."""
    model = random_model('fake', n_layer=1)
    eot, idx = model.config.eot_token_id, IDX.clone()
    idx[idx == eot] = 0
    idx[:, [5, 20]] = eot
    idx[0, 0] = eot
    model.wpe.weight[0] += 300 * torch.randn(39)
    model.wte.weight[eot] += 100 * torch.randn(39)
    kinds = model.kinds(idx)
    assert kinds[0].tolist() == [EOT] + [TOKEN] * 4 + [EOT] + [TOKEN] * 14 + [EOT] + [TOKEN] * 10
    assert kinds[1, 0] == BOS
    before = model(idx)[0]
    evaluator = lambda x: model(x, return_stds=True)
    stds = train.measure(evaluator, model, [(idx, idx), (idx[:2], idx[:2])])
    exact = model(idx, return_stds=True)[2][0]
    weights = torch.tensor([1.0, 1, 0.5, 0.5])[:, None] * (kinds == TOKEN)  # rows 0, 1: seen twice
    mean = (exact * weights).sum() / weights.sum()
    assert stds[0, TOKEN] == pytest.approx(mean.item(), rel=1e-5)
    assert stds[0, BOS] > 50 * stds[0, TOKEN] and stds[0, EOT] > 20 * stds[0, TOKEN]
    for ln, std in zip(model.layernorms().values(), stds):
        ln.gate.fill_(1)
        ln.std.copy_(std)
    own = (model(idx)[0] - before)[:, 1:].norm() / before[:, 1:].norm()
    for ln in model.layernorms().values():
        ln.std.fill_(ln.std[TOKEN].item())
    one = (model(idx)[0] - before)[:, 1:].norm() / before[:, 1:].norm()
    assert own < 0.3 and one > 3 * own, (own, one)
    # a kind that is not there takes the ordinary constant
    absent = train.measure(evaluator, model, [(idx[1:, :5], idx[1:, :5])])[0, EOT]
    assert absent == pytest.approx(stds[0, TOKEN].item(), rel=0.5)
    assert train.measure(None, model, []).shape == stds.shape       # a rank that has no batch

@torch.no_grad()
def test_folding_is_exact_and_leaves_no_layernorm_in_the_graph():
    from torch.fx.experimental.proxy_tensor import make_fx
    fake = remove_all(random_model('fake'), IDX)
    none = fake.fold_ln()
    assert none.config.ln_mode == 'none' and not [k for k in none.state_dict() if 'ln_' in k]
    logits = fake(IDX)[0]
    assert difference(logits, none(IDX)[0]) < 1e-4 < difference(logits, random_model()(IDX)[0])

    def ops(model):
        graph = make_fx(lambda i: model(i)[0])(IDX).graph
        names = (str(n.target) for n in graph.nodes)
        return {name.split('.')[1] for name in names if name.startswith('aten.')}
    divides = {'native_layer_norm', 'layer_norm', 'var', 'var_mean', 'rsqrt', 'sqrt', 'std',
               'mean', 'div'}
    assert ops(fake) & divides and not ops(none) & divides

@torch.no_grad()
def test_the_epsilon_convention_round_trip(tmp_path):
    transformers = pytest.importorskip('transformers')
    fake = remove_all(random_model('fake'), IDX)
    for name, model in (('unfolded', fake), ('folded', fake.fold_ln())):
        model.save_pretrained(tmp_path / name)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name).eval()
        assert theirs.config.layer_norm_epsilon == 1e12
        assert difference(theirs(IDX).logits, fake(IDX)[0]) < 1e-4
        again = GPT2.from_pretrained(str(tmp_path / name)).eval()
        assert again.config.ln_mode == 'none' and difference(again(IDX)[0], fake(IDX)[0]) < 1e-4
        with pytest.raises(UserError, match='LayerNorm is gone'):
            GPT2.from_pretrained(str(tmp_path / name), 'fake')

@torch.no_grad()
def test_the_published_checkpoints_form_loads(tmp_path):
    """apollo-research/gpt2_noLN as transformers holds it:
    blocks folded, with scales of 1e6; ln_f's own weight and bias; a tied head."""
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(n_positions=31, vocab_size=101, n_embd=39, n_head=3, n_layer=3,
                                     layer_norm_epsilon=1e12, initializer_range=0.2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for name, p in theirs.named_parameters():
        if '.ln_1.' in name or '.ln_2.' in name:
            p.fill_(1e6 * name.endswith('weight'))
        elif '.ln_f.' in name:
            p.copy_(torch.randn(39) * (1e6 if name.endswith('weight') else 1))
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(str(tmp_path)).eval()
    assert ours.config.ln_mode == 'none'
    assert difference(ours(IDX)[0], theirs(IDX).logits) < 1e-4 * theirs(IDX).logits.abs().max()

@torch.no_grad()
def test_what_transformers_cannot_express_is_refused(tmp_path):
    model = random_model('fake')
    model.save_pretrained(tmp_path / 'before')      # all gates 0: a stock GPT-2
    stock = GPT2.from_pretrained(str(tmp_path / 'before')).eval()
    assert difference(stock(IDX)[0], model(IDX)[0]) < 1e-5
    model.sites()['h.0.ln_2'].fill_(1)
    with pytest.raises(UserError, match='9 of 10 sites'):
        model.save_pretrained(tmp_path / 'x')
    remove_all(model, IDX).ln_f.std[BOS] = 7
    with pytest.raises(UserError, match='ln_f .* position 0'):
        model.save_pretrained(tmp_path / 'x')
    with pytest.raises(UserError, match='position 0'):
        model.fold_ln()
    none = random_model('none')
    with pytest.raises(UserError, match='mean'):
        none.save_pretrained(tmp_path / 'x')
    assert not (tmp_path / 'x').exists()

class Fork(model.LayerNorm):
    """A replacement as a forker writes it: a saturating function with a parameter of its own."""

    def __init__(self, config, sides=('',)):
        super().__init__(config, sides)
        if self.mode == 'fake':
            self.alpha = torch.nn.Parameter(torch.full((1,), 0.5))

    def frozen(self, x, kind):
        return torch.tanh(self.alpha * x) * self.weight + self.bias

@torch.no_grad()
def test_another_replacement_is_written_in_one_place(tmp_path, monkeypatch):
    random_model().save_pretrained(tmp_path / 'stock')
    monkeypatch.setattr(model, 'LayerNorm', Fork)
    fork = GPT2.from_pretrained(tmp_path / 'stock', 'fake').eval()      # its alpha begins fresh
    assert fork.h[0].ln_2.alpha.item() == 0.5
    assert difference(fork(IDX)[0], random_model()(IDX)[0]) < 1e-6
    fork.h[0].ln_2.alpha.fill_(0.7)
    for gate in fork.sites().values():
        gate.fill_(1)
    model.save_checkpoint(tmp_path, fork)
    again = GPT2.from_pretrained(tmp_path).eval()
    assert again.h[0].ln_2.alpha.item() == pytest.approx(0.7)
    assert torch.equal(again(IDX)[0], fork(IDX)[0])
    # neither writes another function
    for attempt in (lambda: fork.save_pretrained(tmp_path / 'x'), fork.fold_ln):
        with pytest.raises(UserError, match='no stock LayerNorm'):
            attempt()
    assert not (tmp_path / 'x').exists()

@torch.no_grad()
def test_float16_takes_the_folded_model_with_a_smaller_epsilon(tmp_path):
    transformers = pytest.importorskip('transformers')
    fake = remove_all(random_model('fake'), IDX)
    model.save_checkpoint(tmp_path, fake)
    model.main([str(tmp_path), str(tmp_path / 'half'), '--float16'])
    load = transformers.GPT2LMHeadModel.from_pretrained
    half = load(tmp_path / 'half', dtype=torch.float16).eval()
    assert difference(half(IDX).logits.float(), fake(IDX)[0]) < 0.02
    whole = load(tmp_path / 'half').eval()
    assert difference(whole(IDX).logits, fake(IDX)[0]) < 1e-3

# -----------------------------------------------------------------------------
# The schedule.

def test_the_papers_pace_event_by_event():
    cfg = train.load_config([str(REPO / 'config/remove_ln.py'), '--start_eot=1060',
                             '--start_bos=1160', '--taper_iters=0'])
    expected = [(200 + 20 * i, 'remove', f'h.{i}.ln_2') for i in range(12)]
    expected += [(440 + 20 * i, 'remove', f'h.{i}.ln_1.qk') for i in range(12)]
    expected += [(680 + 30 * i, 'remove', f'h.{i}.ln_1.v') for i in range(12)]
    expected += [(1040, 'remove', 'ln_f'), (1060, 'merge', 'eot'), (1160, 'merge', 'bos')]
    assert train.schedule(cfg, 12) == expected
    config = GPT2Config(block_size=4, vocab_size=9, n_layer=12, n_head=1, n_embd=4, ln_mode='fake')
    model = GPT2(config)
    calls, logged = [], []

    def measured():
        calls.append(it)
        return torch.arange(1.0, 76).view(25, 3) + 100 * len(calls)
    for it in range(cfg.max_iters):
        logged += train.apply_schedule(expected, cfg, it, model, measured)
        gone = sum(when <= it for when, what, _ in expected if what == 'remove')
        assert sum(g.item() for g in model.sites().values()) == gone
        if it == 1100:      # end-of-text is merged, position 0 not yet
            assert all(ln.std[EOT] == ln.std[TOKEN] != ln.std[BOS]
                       for ln in model.layernorms().values())
    assert [(e['iter'], e['event'], e.get('site') or e['kind']) for e in logged] == expected
    assert len(calls) == 25 and max(calls) == 1040       # ln_1's two sides share a measurement
    std = {e['site']: e['std'] for e in logged if e['event'] == 'remove'}
    assert std['h.3.ln_1.qk'] == std['h.3.ln_1.v'] != std['h.3.ln_2']
    assert model.fold_ln().config.ln_mode == 'none'

def test_a_taper_fades_gates_and_merges_and_ends_exactly():
    cfg = train.load_config(REMOVE + ['--taper_iters=4', '--max_iters=30'])
    events = train.schedule(cfg, 2)
    config = GPT2Config(block_size=4, vocab_size=9, n_layer=2, n_head=1, n_embd=4, ln_mode='fake')
    model = GPT2(config)
    gates, stds, log = [], [], []
    for it in range(17):
        log += train.apply_schedule(events, cfg, it, model,
                                    lambda: torch.tensor([[2.0, 10.0, 4.0]] * 5))
        gates.append(model.sites()['h.0.ln_2'].item())
        stds.append(model.h[0].ln_2.std.tolist())
    assert gates == [0, 0, 1 / 16, 4 / 16, 9 / 16] + [1.0] * 12
    # with the same share of the ordinary map
    mixed = lambda a, k: 1 / ((16 - k * k) / 16 / a + k * k / 16 / 2)
    want = [[2, 10, 4]] * 9
    want += [[2, mixed(10, max(i - 2, 0)), mixed(4, min(i, 4))] for i in range(1, 7)]
    assert torch.allclose(torch.tensor(stds[2:]), torch.tensor(want), rtol=1e-6)
    assert [e['iter'] for e in log if e['event'] == 'merge'] == [11, 13]
    model.h[0].ln_2.std[:] = torch.tensor([0.768, 33000.7, 4.0])      # where rounding leaves a rest
    for it in range(13, 17):
        train.apply_schedule(events, cfg, it, model, None)
    assert model.h[0].ln_2.std[BOS] == model.h[0].ln_2.std[TOKEN]
    with pytest.raises(UserError, match='removes h.0.ln_2 twice'):
        train.check_schedule(events + events[:1], cfg, {})

PUBLISHED = {   # rate, its minimum, warm-up, auxiliary weight, iterations, cosine; layers, start, gap
    'fast': (6e-4, 3e-4, 25, 0.1, 300, 300, 12, 20, 2),
    'medium': (6e-4, 3e-4, 10, 0.1, 500, 500, 24, 20, 2),
    'large': (3e-4, 4e-5, 15, 0.03, 600, 1200, 36, 30, 4),
    'xl': (1e-4, 2e-5, 20, 0.01, 800, 1200, 48, 50, 4)}

@pytest.mark.parametrize('name', PUBLISHED)
def test_the_follow_ups_settings_are_the_published_ones(name):
    *settings, layers, start, gap = PUBLISHED[name]
    files = [str(REPO / f'config/{c}.py') for c in (f'remove_ln_{name}', 'control')]
    cfg, control = train.load_config(files[:1]), train.load_config(files)
    train.check_config(cfg)
    train.check_schedule(train.schedule(cfg, layers), cfg, {})
    assert [cfg.learning_rate, cfg.min_lr, cfg.warmup_iters, cfg.aux_loss_weight, cfg.max_iters,
            cfg.lr_decay_iters] == settings and (cfg.start_ln2, cfg.gap_ln2) == (start, gap)
    assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.grad_clip) == (0.01, 0.9, 0.999, 1.0)
    assert not control.remove_ln and control.out_dir == f'out/remove_ln_{name}/control'
    assert (control.learning_rate, control.max_iters) == (cfg.learning_rate, cfg.max_iters)

def test_the_warning_knows_what_a_schedule_does_to_a_giant_vector():
    lns = ['h.0.ln_1', 'h.0.ln_2', 'h.1.ln_1', 'h.1.ln_2', 'ln_f']
    ratios = {'bos': dict(zip(lns, [2, 1, 40, 42, 11])), 'eot': dict.fromkeys(lns, 3.0)}

    def told(*keys):
        cfg = train.load_config(REMOVE + ['--max_iters=99', *keys])
        return train.warnings_of(train.schedule(cfg, 2), cfg, ratios)
    assert len(told()) == 1
    assert re.search(r'iteration 13 .* position 0 .* 42 .*h.1.ln_2.*taper_iters', told()[0])
    assert told('--taper_iters=20') == [] and told('--start_bos=-1') == []
    assert 'iteration 3 ' in told('--start_bos=0')[0]     # no special constants: as h.1.ln_2 goes

# -----------------------------------------------------------------------------
# Training runs.

def test_one_training_graph_and_one_evaluation_graph_over_a_whole_removal(workspace):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    train.main(TINY + REMOVE + ['--out_dir=compiled', '--max_iters=16', '--eval_interval=4',
                                '--compile=True', '--aux_loss_weight=0.1', '--taper_iters=2',
                                '--n_layer=1'])
    assert counters['stats']['unique_graphs'] == 2 and not counters['graph_break'], counters
    assert not counters['recompiles']
    assert [e['event'] for e in log_of('compiled')].count('remove') == 4

def test_how_a_batch_is_cut_changes_no_loss(workspace):
    """Not with the auxiliary loss either, nor when blocks are computed again."""
    args = TINY + REMOVE + ['--max_iters=16', '--eval_interval=8', '--aux_loss_weight=1.0']
    train.main(args + ['--out_dir=cut4'])
    for name, more in (('cut1', ['--batch_size=1']),
                       ('cut8', ['--batch_size=8', '--gradient_checkpointing=True'])):
        train.main(args + [f'--out_dir={name}', *more])
        assert_close(log_of(name), log_of('cut4'))

def test_no_device_synchronisation_in_a_plain_step(workspace, monkeypatch):
    """Only the logged iterations (0, 50, 99) and the evaluations (0, 100) may read a value back."""
    seen, step = [], torch.optim.AdamW.step
    for name in ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__'):
        def spy(self, *args, original=getattr(torch.Tensor, name), **kwargs):
            seen.append(name)
            return original(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, spy)

    def counted(self):
        seen.append('step')
        return step(self)
    monkeypatch.setattr(torch.optim.AdamW, 'step', counted)
    train.main(TINY + ['--out_dir=nosync', '--max_iters=100', '--eval_interval=100',
                       '--log_interval=50'])
    steps = ' '.join(seen).split('step')
    assert len(steps) == 101 and [i for i, s in enumerate(steps) if s.strip()] == [0, 1, 51, 100]

def opened(*keys):
    cfg = train.load_config(['--dataset=tiny', '--block_size=32', *keys])
    data = train.Data(cfg, 'cpu')
    data.open(257, ['train', 'val'])
    return data

def test_evaluation_predicts_every_token_once_whatever_the_batch(workspace):
    train.main(TINY + ['--out_dir=short', '--max_iters=2'])
    model = GPT2.from_pretrained('short').eval()
    tokens = torch.from_numpy(np.fromfile('data/tiny/val.bin', np.uint16).astype(np.int64))
    windows = [tokens[i:i + 33] for i in range(0, len(tokens) - 1, 32)]
    with torch.no_grad():
        expected = torch.cat([torch.nn.functional.cross_entropy(
            model(w[None, :-1])[0][0], w[1:], reduction='none') for w in windows]).numpy()
    assert len(expected) == len(tokens) - 1
    for batch_size in (3, 7):
        data = opened(f'--batch_size={batch_size}', '--eval_iters=0')
        losses = train.token_losses(model, data)[0]
        assert np.abs(losses[~np.isnan(losses)] - expected).max() < 1e-5
        data.cfg.eval_iters = 10
        assert train.token_losses(model, data).shape == (1, 10, 32)
        # of windows cut elsewhere, the first token is not predicted from the text before it
        data.cfg.eval_iters, data.meta['window'] = 0, 40
        fewer = train.token_losses(model, data)[0].ravel()[:len(expected)]
        assert np.flatnonzero(np.isnan(fewer)).tolist() == list(range(39, len(expected), 40))

def test_statistics_of_an_evaluation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 100)) + rng.normal(size=(400, 1)) * 2 + 5     # the second: per window
    a[-1, 70:] = np.nan
    mean, error = train.mean_and_error(a)
    assert mean == pytest.approx(np.nanmean(a))
    assert error == pytest.approx(2 / 20, rel=0.1)      # not 2.2 / 200
    text = train.loss_table({'a': a, 'b': a - 0.25}, 'token')
    table = [line.split() for line in text.splitlines()]
    assert table[2][:3] == ['all', '39,970', f'{mean:.4f}']
    assert table[2][-1] == f'{np.nanmax(a):.4f}'
    assert [int(row[-6].replace(',', '')) for row in table[3:6]] == [400, 63 * 400, 36 * 400 - 30]
    assert float(table[12][2]) == pytest.approx(0.25) and float(table[12][3]) < 1e-6
    # half of the predictions have confidence 0.9 and are right in 0.6 of cases, half are calibrated
    confidence = np.repeat([0.9, 0.5], 500)
    right = np.r_[np.arange(500) % 5 < 3, np.arange(500) % 2 < 1]
    full = np.stack([np.ones(1000), np.full(1000, 0.7), confidence, right]).reshape(4, 10, 100)
    assert train.calibration(full) == pytest.approx((0.15, 0.7))

def test_evaluation_compares_two_models_on_any_number_of_processes(workspace, capsys):
    for seed in (1, 2):
        train.main(TINY + [f'--out_dir=pair{seed}', '--max_iters=2', f'--seed={seed}'])
    args = [str(REPO / 'config/eval.py'), '--init_from=pair1', '--control=pair2', '--dataset=tiny',
            '--batch_size=3']
    capsys.readouterr()
    train.main(args)
    one = capsys.readouterr().out
    assert one.strip() in finished(run(*args, nproc=2))
    models = [GPT2.from_pretrained(f'pair{s}').eval() for s in (1, 2)]
    tables = [train.token_losses(m, opened('--eval_iters=0'))[0] for m in models]
    means = [np.nanmean(t, dtype=np.float64) for t in tables]
    assert f'val loss {means[0]:.4f} nats per byte' in one and one.count('ECE') == 2
    difference = [line.split() for line in one.splitlines() if line.startswith('  all')][2]
    assert float(difference[2]) == pytest.approx(means[0] - means[1], abs=1.1e-4)

def test_batches_are_a_function_of_seed_and_iteration_however_they_are_cut(workspace):
    def batches(it, batch_size=4, seed=1):
        data = opened('--batch_tokens=512', f'--batch_size={batch_size}', f'--seed={seed}')
        rows = [torch.cat(data.batch(it, m), 1) for m in range(512 // 32 // batch_size)]
        assert all(torch.equal(r[:, 1:32], r[:, 32:-1]) for r in rows)    # targets: inputs, one on
        return torch.cat(rows)
    assert torch.equal(batches(3), batches(3, batch_size=8))
    assert not torch.equal(batches(3), batches(4))
    assert not torch.equal(batches(3), batches(3, seed=2))
    assert len({tuple(r) for r in batches(3).tolist()}) > 12

def assert_close(a, b):
    assert [(e['event'], e['iter']) for e in a] == [(e['event'], e['iter']) for e in b]
    for x, y in zip(a, b):
        for k in ('loss', 'val_loss'):
            assert x.get(k, 0) == pytest.approx(y.get(k, 0), rel=2e-5)
        assert x.get('std', {}) == pytest.approx(y.get('std', {}), rel=1e-4)

LONG = TINY + REMOVE + ['--max_iters=40', '--eval_interval=8', '--dropout=0.1']

@pytest.fixture(scope='session')
def whole(workspace):
    """What an uninterrupted run of one process did."""
    finished(run(*LONG, '--out_dir=whole'))
    return log_of('whole')

def wait_for(out_dir, n, process):
    """Until the run has logged n training steps."""
    log = Path(out_dir, 'log.jsonl')
    while not log.exists() or log.read_text().count('"train"') < n:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)

def test_killed_and_resumed_on_any_number_of_processes_gives_the_same_losses(whole):
    three = run(*LONG, '--out_dir=three', nproc=3)      # four micro-batches: they come out uneven
    killed = run(*LONG, '--out_dir=killed')
    wait_for('killed', 12, killed)
    killed.kill()
    killed.communicate()
    assert os.path.exists('killed/ckpt.pt') and log_of('killed')[-1]['iter'] < 39
    finished(three)
    assert_close(log_of('three'), whole)
    shutil.copytree('killed', 'killed2')
    killed = run(*LONG, '--out_dir=killed', '--init_from=resume')
    wait_for('killed', 27, killed)
    killed.kill()
    killed.communicate()
    one = run(*LONG, '--out_dir=killed', '--init_from=resume')
    two = run(*LONG, '--out_dir=killed2', '--init_from=resume', nproc=2)
    assert 'LN-free' in finished(one)
    finished(two)
    assert log_of('killed') == whole      # to the last bit
    assert_close(log_of('killed2'), whole)
    weights = [GPT2.from_pretrained(f'{d}/hf').lm_head.weight for d in ('killed', 'whole')]
    assert torch.equal(*weights)
    Path('killed/hf/README.md').write_text('my own words')      # kept when resumed after its end
    finished(run(*LONG, '--out_dir=killed', '--init_from=resume'))
    aside, = Path('killed').glob('hf.*')
    assert (aside / 'README.md').read_text() == 'my own words'
    assert 'scratch' in Path('killed/hf/README.md').read_text()

def test_killed_while_a_checkpoint_is_written(tmp_path):
    for where in ('save', 'fsync', 'replace'):
        model.save_checkpoint(tmp_path, random_model(n_layer=1), iter=1)
        if (pid := os.fork()) == 0:
            die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
            if where == 'save':
                torch.save = lambda obj, f: (Path(f).write_bytes(b'PK half a checkpoint'), die())
            else:
                setattr(os, where, die)
            model.save_checkpoint(tmp_path, random_model(n_layer=1), iter=2)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert model.load_checkpoint(tmp_path)['iter'] == 1
    model.save_checkpoint(tmp_path, random_model(n_layer=1), iter=2)
    assert model.load_checkpoint(tmp_path)['iter'] == 2 and os.listdir(tmp_path) == ['ckpt.pt']

def test_signals_finish_the_iteration_and_save(whole):
    for number, nproc in ((signal.SIGINT, 1), (signal.SIGTERM, 2)):
        out_dir = f'stopped{nproc}'
        process = run(*LONG, f'--out_dir={out_dir}', nproc=nproc)
        wait_for(out_dir, 5, process)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        it = model.load_checkpoint(out_dir)['iter']
        assert process.returncode == (128 + number if nproc == 1 else 1) and 5 <= it < 40, output
        assert f'saved after iteration {it - 1};' in output, output
    finished(run(*LONG, '--out_dir=stopped2', '--init_from=resume'))
    assert_close(log_of('stopped2'), whole)

def scripted(name, change):
    """A script that is train.py with a change."""
    Path(name).write_text(f"import os, sys; sys.path.insert(0, {str(REPO)!r}); import train\n"
                          f"{change}\ntrain.main()")
    return os.path.abspath(name)

def test_a_fault_of_one_rank_is_told_by_it(whole):
    """Rank 1 alone cannot load, before the run begins: one line, and rank 0 does not hang."""
    script = scripted('one_rank.py', """
def bad(*args):
    raise train.UserError('only this rank sees it')
if train.RANK == 1:
    train.load_model = bad""")
    output = finished(run(*LONG, '--out_dir=never', script=script, nproc=2), status=1)
    assert output.count('train.py: only this rank sees it') == 1, output
    assert not os.path.exists('never')

def test_a_full_disk_leaves_the_last_checkpoint(workspace):
    import resource
    args = TINY + ['--out_dir=full', '--eval_interval=4']
    finished(run(*args, '--max_iters=4'))
    kept = Path('full/ckpt.pt').read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, len(kept) // 2))
    output = finished(run(*args, '--max_iters=8', '--init_from=resume', preexec_fn=limit), status=2)
    line = output.splitlines()[-1]
    assert line.startswith('train.py: ') and 'ckpt.pt' in line and 'Traceback' not in output
    assert Path('full/ckpt.pt').read_bytes() == kept and not list(Path('full').glob('*partial'))

def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(workspace, capsys, monkeypatch):
    args = TINY + REMOVE + ['--out_dir=diverged', '--eval_interval=4', '--max_iters=60',
                            '--guard_patience=8', '--grad_clip=0']
    train.main([a for a in args if 'max_iters' not in a] + ['--max_iters=16'])
    kept = Path('diverged/ckpt.pt').read_bytes()
    shutil.rmtree('diverged/hf')
    step = train.step

    def stops(said, fault, *more):
        monkeypatch.setattr(train, 'step', fault)
        error = refused(train, *args, '--init_from=resume', *more, capsys=capsys)
        assert said in error and 'merge bos at iteration 13' in error
        assert 'diverged/ckpt.pt' in error
        assert Path('diverged/ckpt.pt').read_bytes() == kept and not os.path.exists('diverged/hf')
    high = lambda first: lambda cfg, it, *a: (
        step(cfg, it, *a)[0] + 9 * (it >= first), torch.tensor(1.0), [])
    stops('since iteration 18 ', high(18))
    stops('since iteration 18 ', high(18), '--max_iters=20')     # no time is left to recover
    stops('gradient of iteration 18 ', lambda cfg, it, *a: (
        step(cfg, it, *a)[0], torch.tensor(torch.nan if it == 18 else 1.0), []))

# -----------------------------------------------------------------------------
# The hard case: a model with GPT-2's giant vector, and what a removal hands over.

@pytest.fixture(scope='session')
def standin(workspace):
    """experiments/standin.py's model, trained for a moment on the standard library,
    and its control."""
    code = [part for path in prepare.stdlib_files()
            for part in Path(path).read_text(errors='replace').split('\n\n')]
    rows = (json.dumps({'text': part}) for part in code[:9000] if part.strip())
    Path('docs.jsonl').write_text('\n'.join(rows))     # short: some end-of-text in each batch
    prepare.main(['docs.jsonl', '--tokenizer=bytes', '--val_fraction=0.05'])
    sys.path.insert(0, str(REPO / 'experiments'))
    import standin
    standin.SIZE = 180.0        # in so short a training it shrinks less
    standin.main(['standin', '--n_layer=3', '--n_embd=96', '--block_size=64'])
    common = ['--dataset=docs', '--batch_size=16', '--batch_tokens=1024', '--eval_interval=400',
              '--eval_iters=200', '--log_interval=1', '--device=cpu', '--compile=False',
              '--warmup_iters=10']
    train.main(common + ['--init_from=standin', '--out_dir=giant', '--max_iters=200',
                         '--learning_rate=2e-3', '--min_lr=2e-4'])
    Path('paper.py').write_text("""_k = 6  # a sixth of the paper's iterations, 3 layers for its 12
max_iters, warmup_iters, lr_decay_iters = max_iters // _k, warmup_iters // _k, lr_decay_iters // _k
start_ln2, start_ln1qk, start_ln1v, start_lnf = (
    s // _k for s in (start_ln2, start_ln1qk, start_ln1v, start_lnf))
gap_ln2, gap_ln1qk, gap_ln1v = (4 * g // _k for g in (gap_ln2, gap_ln1qk, gap_ln1v))
start_eot, start_bos = start_eot // _k, start_bos // _k
taper_iters = min(taper_iters, 16)
""")
    scaled = [str(REPO / 'config/remove_ln.py'), 'paper.py', *common[:-1], '--init_from=giant']
    train.main([*scaled, str(REPO / 'config/control.py')])
    return scaled

@pytest.fixture(scope='session')
def flagship(standin):
    """What config/remove_ln.py, scaled, printed; it wrote out/remove_ln."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main([*standin, '--control=out/remove_ln/control'])
    return out.getvalue()

def test_the_flagship_survives_the_giant_vector_and_the_papers_text_does_not(
        standin, flagship, capsys):
    def worst(out_dir):     # the most that a batch's loss was above the control's
        logs = [[e['loss'] for e in log_of(d) if e['event'] == 'train']
                for d in (out_dir, 'out/remove_ln/control')]
        return np.subtract(*logs).max()
    log, out = log_of('out/remove_ln'), flagship
    ratios = [max(e['bos'].values()) for e in log if e['event'] == 'giant']
    assert ratios[0] > 15 and ratios[1] < ratios[0] / 3 and 'warning' not in out     # it is undone
    gap = val_loss('out/remove_ln') - val_loss('out/remove_ln/control')
    assert worst('out/remove_ln') < 2 and gap < 0.25, (worst('out/remove_ln'), gap)
    assert f'{gap:+.4f}' in out and 'LN-free' in out
    assert f'{ratios[0]:.1f} before, {ratios[1]:.1f} after' in out
    handed_over = GPT2.from_pretrained('out/remove_ln/hf').eval()
    checkpoint = GPT2.from_pretrained('out/remove_ln').eval()
    idx = torch.randint(0, 257, (2, 64))
    assert handed_over.config.ln_mode == 'none'
    assert difference(handed_over(idx)[0], checkpoint(idx)[0]) < 1e-3
    # the paper's text: special constants, merged late, in one iteration each
    train.main([*standin, '--out_dir=text', '--taper_iters=0', '--start_eot=176',
                '--start_bos=193', '--guard_nats=0'])
    assert 'warning: at iteration 193 ' in capsys.readouterr().out and worst('text') > 20

def test_a_partial_removal_ends_with_its_checkpoint(standin, capsys):
    more = ['--start_ln1qk=-1', '--start_ln1v=-1', '--start_lnf=-1', '--max_iters=120']
    train.main([*standin, *more, '--out_dir=partial'])
    out = capsys.readouterr().out
    assert re.search(r'LN removed +\d\.\d+ +7\n', out) and '7 of 10 sites' in out
    assert not os.path.exists('partial/hf') and os.path.exists('partial/loss.png')
    assert len(GPT2.from_pretrained('partial').sites_left()) == 7
    kept = [*standin, '--init_from=partial', '--out_dir=kept', '--remove_ln=False',
            '--warmup_iters=5']
    train.main([*kept, '--max_iters=10'])
    train.main([*kept, '--max_iters=12', '--init_from=resume'])
    assert len(GPT2.from_pretrained('kept').sites_left()) == 7 and log_of('kept')[-1]['iter'] == 12

def test_the_readmes_snippets_and_the_handed_over_folder(flagship):
    """Each runs, and what it calls logits is what our own model computes;
    generation through transformers' cache too."""
    transformers = pytest.importorskip('transformers')
    os.makedirs('out/demo', exist_ok=True)
    if not os.path.exists('out/demo/hf'):
        shutil.copytree('out/remove_ln/hf', 'out/demo/hf')
    readme = (REPO / 'README.md').read_text()
    blocks = [b for b in re.findall(r'```python\n(.*?)```', readme, re.S) if 'import' in b]
    ours = GPT2.from_pretrained('out/remove_ln').eval()
    assert len(blocks) == 2
    for block in blocks:
        Path('snippet.py').write_text(block)
        names = runpy.run_path('snippet.py')
        assert difference(names['logits'], ours(names['idx'])[0]) < 3e-4
    names = set(os.listdir('out/remove_ln/hf'))
    assert names == {'README.md', 'config.json', 'generation_config.json', 'model.safetensors',
                     'tokenizer.json', 'tokenizer_config.json'}
    card = Path('out/remove_ln/hf/README.md').read_text()
    losses = [val_loss('out/remove_ln', 0), val_loss('out/remove_ln/control'),
              val_loss('out/remove_ln')]
    assert all(f'| {loss:.4f} |' in card for loss in losses)
    assert 'float16' in card and 'giant' in card and '3 layers' in card
    tokenizer = transformers.AutoTokenizer.from_pretrained('out/remove_ln/hf')
    encoded = tokenizer('import os<|endoftext|>', return_tensors='pt')
    assert encoded['input_ids'].tolist() == [[*b'import os', 256]]
    assert 'token_type_ids' not in encoded
    theirs = transformers.GPT2LMHeadModel.from_pretrained('out/remove_ln/hf')
    text = theirs.generate(encoded['input_ids'][:, :-1], max_new_tokens=40, do_sample=False)
    assert text.tolist() == ours.generate(encoded['input_ids'][:, :-1], 40, temperature=0).tolist()

def test_nothing_at_the_end_can_cost_the_model(workspace):
    """A terminal of ASCII, a table, a card and a picture that fail: hf/ is there, status 0."""
    script = scripted('unlucky.py', """
def bad(*args):
    raise ValueError('no')
train.print_table = train.write_card = train.plot = bad""")
    args = [*TINY, *REMOVE, '--max_iters=16', '--out_dir=é文']
    output = finished(run(*args, script=script, env={'PYTHONIOENCODING': 'ascii'}))
    assert GPT2.from_pretrained('é文/hf') and output.count('bad failed (no)') == 3
    assert r'\xe9' in output

# -----------------------------------------------------------------------------
# What real users bring: models.

@pytest.fixture
def hub(tmp_path):
    """A server on localhost that speaks the hub's protocol -> (publish, drop, environment,
    requests). The numbers in `drop` count downloads of files that break off in the middle."""
    pages, drop, requests, downloads = {}, set(), [], []        # {path: (commit, body)}

    def publish(kind, name, **revisions):
        """A repository, {file: bytes} for each revision, its main branch first."""
        api, web = f'/api/{kind}/{name}', f'/{name}' if kind == 'models' else f'/{kind}/{name}'
        for i, (revision, files) in enumerate(revisions.items()):
            sha, folders = f'{i:040x}', {str(p) for f in files for p in Path(f).parents}
            info = {'id': name, 'sha': sha, 'siblings': [{'rfilename': f} for f in files]}
            tree = [{'type': 'file', 'path': f, 'oid': f, 'size': len(b)} for f, b in files.items()]
            tree += [{'type': 'directory', 'path': p, 'oid': p} for p in folders - {'.'}]
            found = {} if i else {api: info}
            for r in (revision.replace('_', '/'), sha):
                found[f'{api}/revision/{r}'] = info
                for p in folders:
                    here = [t for t in tree if str(Path(t['path']).parent) == p]
                    at = f'{api}/tree/{r}/{p}'.removesuffix('/.')
                    found |= {at: here, f'{at}?recursive': tree}
                pages.update({f'{web}/resolve/{r}/{f}': (sha, b) for f, b in files.items()})
            pages.update({path: (sha, json.dumps(v).encode()) for path, v in found.items()})

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            path, _, query = urllib.parse.unquote(self.path).partition('?')
            path += '?recursive' * ('recursive=true' in query.lower())
            status, file = 200, '/resolve/' in path
            sha, body = pages.get(path, ('', None))
            headers = {'ETag': f'"{len(body or path)}"', 'X-Repo-Commit': sha}
            if body is None:
                headers = {'X-Error-Code': 'EntryNotFound' if file else 'RepoNotFound'}
                status, body = 404, b''
            elif part := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
                first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
                headers['Content-Range'] = f'bytes {first}-{last}/{len(body)}'
                status, body = 206, body[first:last + 1]
            self.send_response(status)
            for header in (*headers.items(), ('Content-Length', str(len(body)))):
                self.send_header(*header)
            self.end_headers()
            if self.command == 'GET':
                downloads.extend([path] * file)
                self.close_connection = file and len(downloads) in drop
                self.wfile.write(body[:len(body) // 2] if self.close_connection else body)
        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HUB_OFFLINE': '0',
           'HF_HOME': str(tmp_path / 'cache'), 'PYTHONPATH': str(REPO)}
    yield publish, drop, env, requests
    server.shutdown()

def test_from_pretrained_downloads_from_a_hub(hub, tmp_path):
    publish, _, env, requests = hub
    ours = random_model()
    ours.save_pretrained(tmp_path / 'repo', {'tokenizer.json': b'{}'})
    files = {n: (tmp_path / 'repo' / n).read_bytes()
             for n in ('config.json', 'model.safetensors', 'tokenizer.json')}
    publish('models', 'me/tiny', main=files | {'pytorch_model.bin': b'a pickle'})
    (tmp_path / 'load.py').write_text(
        "import torch, model; m = model.GPT2.from_pretrained('me/tiny').eval()\n"
        "print(m(torch.arange(31)[None])[0].double().sum().item(), *model.companions('me/tiny'))")
    out = finished(run(script=tmp_path / 'load.py', env=env))
    total, *names = out.split()[-2:]
    expected = ours(torch.arange(31)[None])[0].double().sum()
    assert float(total) == pytest.approx(expected.item(), rel=1e-4)
    assert names == ['tokenizer.json']
    assert not any('pytorch_model.bin' in r for r in requests if 'resolve' in r)
    out = finished(run('me/nothing', 'x', script='model.py', env=env, cwd=tmp_path), status=2)
    assert 'me/nothing' in out and out.count('\n') == 1

@torch.no_grad()
def test_checkpoints_of_other_savers(folder):
    """Each computes what transformers computes from the same folder, or is refused."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_positions=31, vocab_size=101, n_embd=39, n_head=3, n_layer=3,
                                     initializer_range=0.2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained('theirs')
    whole = theirs.state_dict()
    logits = theirs(IDX).logits

    def stored(change, name='pytorch_model.bin'):
        shutil.rmtree('x', ignore_errors=True)
        os.makedirs('x')
        shutil.copy('theirs/config.json', 'x')
        sd = {k: v.clone() for k, v in whole.items()}
        torch.save(change(sd), f'x/{name}')
        return 'x'
    for change in (lambda sd: sd, lambda sd: {k: v for k, v in sd.items() if k != 'lm_head.weight'},
                   lambda sd: {k: v for k, v in sd.items() if k != 'transformer.wte.weight'},
                   lambda sd: {'module.' + k: v for k, v in sd.items()},
                   lambda sd: {'_orig_mod.' + k: v for k, v in sd.items()},
                   lambda sd: {k.removeprefix('transformer.'): v for k, v in sd.items()},
                   lambda sd: sd | {'transformer.h.0.attn.bias': torch.ones(1, 1, 31, 31)}):
        assert difference(GPT2.from_pretrained(stored(change)).eval()(IDX)[0], logits) < 1e-5
    for change in (lambda sd: sd | {'lm_head.weight': sd['lm_head.weight'] + 1},
                   lambda sd: sd | {'score.weight': torch.ones(2)},
                   lambda sd: {k: v for k, v in sd.items() if 'ln_f' not in k}):
        with pytest.raises(UserError):
            GPT2.from_pretrained(stored(change))
    stored(lambda sd: {'model': {'_orig_mod.' + k: v for k, v in sd.items()},
                       'iter_num': 3, 'model_args': {}}, 'ckpt.pt')
    with pytest.raises(UserError, match='nanoGPT'):
        GPT2.from_pretrained('x')

    class Evil:
        def __reduce__(self):
            return os.mkdir, ('ran',)
    for name in ('pytorch_model.bin', 'ckpt.pt'):
        stored(lambda sd: {'model': Evil()}, name)
        with pytest.raises(UserError, match='damaged or not'):
            GPT2.from_pretrained('x')
    assert not os.path.exists('ran')

def test_hostile_configs_are_refused_at_once(folder):
    random_model().save_pretrained('ok')
    config = json.loads(Path('ok/config.json').read_text())
    for change in (dict(n_layer=10 ** 9), dict(n_embd=3 * 10 ** 18, n_head=3), dict(n_positions=-1),
                   dict(vocab_size=2 ** 70), dict(n_embd='39'), dict(model_type='llama'),
                   dict(activation_function='gelu'), dict(n_inner=7),
                   dict(scale_attn_by_inverse_layer_idx=True), dict(layer_norm_epsilon=-1),
                   dict(tie_word_embeddings='no')):
        Path('ok/config.json').write_text(json.dumps(config | change))
        t0 = time.time()
        with pytest.raises(UserError):
            GPT2.from_pretrained('ok')
        assert time.time() - t0 < 5

def german(folder):
    """A GPT-2 folder with a tokenizer of its own:
    300 tokens, end-of-text 0, a pad token, a chat template."""
    tokenizers = pytest.importorskip('tokenizers')
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=['</s>', '<pad>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([(REPO / 'README.md').read_text()], trainer)
    random_model(vocab_size=300, block_size=32).save_pretrained(folder, {
        'tokenizer.json': bpe.to_str().encode(), 'chat_template.jinja': b'{{ x }}',
        'generation_config.json': b'{"pad_token_id": 1}'})
    config = json.loads((Path(folder) / 'config.json').read_text())
    ids = dict(bos_token_id=0, eos_token_id=[0, 5], pad_token_id=1)
    (Path(folder) / 'config.json').write_text(json.dumps(config | ids))
    return bpe

def test_a_models_own_tokenizer_is_used_and_handed_on(folder, capsys):
    bpe = german('german')
    Path('t.txt').write_text('Grüße </s> <|endoftext|> and some more text ' * 400)
    prepare.main(['t.txt', '--tokenizer=german', '--val_fraction=0.2'])
    meta = json.loads(Path('data/t/meta.json').read_text())
    ids = np.concatenate([np.fromfile(f'data/t/{s}.bin', np.uint16) for s in ('train', 'val')])
    assert (meta['vocab_size'], meta['eot']) == (300, 0) and (ids == 0).sum() == 1
    assert bpe.decode(ids[:-1].tolist()) == Path('t.txt').read_text()
    args = [a for a in TINY + REMOVE if not re.match('--(dataset|n_|block)', a)]
    args += ['--init_from=german', '--max_iters=16']
    train.main(args + ['--dataset=t', '--out_dir=run'])
    for name in ('tokenizer.json', 'chat_template.jinja', 'generation_config.json'):
        assert Path(f'run/hf/{name}').read_bytes() == Path(f'german/{name}').read_bytes()
    config = json.loads(Path('run/hf/config.json').read_text())
    special = config['bos_token_id'], config['eos_token_id'], config['pad_token_id']
    assert special == (0, [0, 5], 1)
    # a model that brings none is handed over with that of its data, not with one of a dead run
    shutil.copytree('german', 'bare')
    os.remove('bare/tokenizer.json')
    os.makedirs('bare_run/tokenizer')
    Path('bare_run/tokenizer/vocab.json').write_text('{}')
    Path('bare_run/log.jsonl').write_text('')
    train.main(args + ['--dataset=t', '--out_dir=bare_run', '--init_from=bare'])
    own = Path('german/tokenizer.json').read_bytes()
    assert Path('bare_run/hf/tokenizer.json').read_bytes() == own
    assert not os.path.exists('bare_run/tokenizer/vocab.json')
    # a folder of a tokenizer alone
    os.makedirs('alone')
    Path('alone/tokenizer.json').write_bytes(own)
    Path('alone/tokenizer_config.json').write_text('{"eos_token": {"content": "</s>"}}')
    assert prepare.get_tokenizer('alone').eot == 0
    # data of another tokenizer is refused, in training and evaluation
    prepare.main(['t.txt', '--tokenizer=bytes', '--name=other'])
    meta = json.loads(Path('data/other/meta.json').read_text())
    Path('data/other/meta.json').write_text(json.dumps(meta | {'vocab_size': 300}))
    for more in (['--out_dir=never'], ['--eval_only=True', '--remove_ln=False']):
        assert 'german' in refused(train, *args, '--dataset=other', *more, capsys=capsys)
    assert not os.path.exists('never')

def test_gpt2_with_added_tokens_takes_gpt2s_data():
    bpe = gpt2()
    vocab = bpe.vocab() | {'<pad>': 50257, '<user>': 50258}
    assert prepare.fingerprint(vocab, 50257) == prepare.fingerprint(bpe.vocab(), 50257)
    assert prepare.KNOWN[prepare.fingerprint(bpe.vocab(), 65536)] is prepare.GPT2BPE
    assert GPT2Config(vocab_size=50304).eot_token_id == 50256
    swapped = vocab | {'the': vocab['Ġthe'], 'Ġthe': vocab['the']}
    assert prepare.fingerprint(swapped, 50257) != prepare.fingerprint(bpe.vocab(), 50257)

def gpt2():
    try:
        return prepare.get_tokenizer('gpt2')
    except UserError as e:
        pytest.skip(str(e))

def test_tokenizer_files_equal_tiktoken(tmp_path):
    transformers, bpe = pytest.importorskip('transformers'), gpt2()
    for name, text in prepare.tokenizer_files(bpe).items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [t for t in NASTY if '\ud800' not in t] + [(REPO / 'test_model.py').read_text()]:
        ids = bpe.bpe.encode(text, allowed_special='all')
        assert tokenizer(text)['input_ids'] == ids and tokenizer.decode(ids) == text

# -----------------------------------------------------------------------------
# HellaSwag.

def question(ctx_a='A man sits. He', ctx_b='', label=0,
             endings=('goes.', 'naïve 文字 “quote”.', 'no',
                      'is [title] Here [step] it  ends. '), activity='Sitting'):
    return {'activity_label': activity, 'ctx_a': ctx_a, 'ctx_b': ctx_b,
            'ctx': f'{ctx_a} {ctx_b}'.strip(), 'endings': list(endings), 'label': label}

QUESTIONS = [question(), question('Then, the man.', 'the Woman', 1),
             question('[header] How to do [title] Begin. [step] Now [substeps]', '', '2'),
             question('long ' * 60, 'end', 3, ('x', 'longer ' * 5, '[step]', 'é🙂')),
             question(endings=('y ' * 40, 'a', 'b', 'c'))]

def test_hellaswag_texts_of_both_conventions():
    texts = eval_hellaswag.texts
    endings = list(question()['endings'])
    assert texts(QUESTIONS[1], 'completion') == ('Then, the man. the Woman', endings)
    endings = ['goes.', 'naïve 文字 “quote”.', 'no', 'is. Here it ends.']
    assert texts(QUESTIONS[1], 'harness') == ('Sitting: Then, the man. The woman', endings)
    assert texts(QUESTIONS[2], 'harness')[0] == 'Sitting: How to do. Begin. Now '
    # its space goes to the ending
    assert eval_hellaswag.tokens('Now ', 'no', 'harness', lambda t: t) == ('Now', '  no')
    assert eval_hellaswag.tokens('Now ', 'no', 'completion', lambda t: t) == ('Now ', ' no')

@torch.no_grad()
def test_hellaswag_scores_equal_one_ending_at_a_time(workspace):
    model = random_model(block_size=64, vocab_size=257)
    model.save_pretrained('hs')
    questions = QUESTIONS * 3       # enough for several batches
    Path('hs.jsonl').write_text('\n'.join(json.dumps(q) for q in questions) + '\n')
    for n in (1, 2):
        out = finished(run('hs', '--data=hs.jsonl', '--device=cpu', f'--json={n}.json', nproc=n,
                           script='eval_hellaswag.py'))
        assert 'which lost some on the left: 9' in out
    one, two = (json.loads(Path(f'{n}.json').read_text()) for n in (1, 2))
    assert one == two and one['questions'] == 15 and one['truncated'] == 9
    right = {m: 0 for m in ('acc', 'acc_norm', 'harness_acc', 'harness_acc_norm')}
    for q, found in zip(questions, one['scores'], strict=True):
        for style in ('completion', 'harness'):
            context, endings = eval_hellaswag.texts(q, style)
            kept = context.rstrip() if style == 'harness' else context
            sums, lengths = [], []
            for ending in endings:
                n = len((' ' * (len(context) - len(kept)) + ' ' + ending).encode())
                ids = torch.tensor([*kept.encode()] + [0] * n)
                ids[-n:] = torch.tensor([*(context + ' ' + ending).encode()][-n:])
                ids = ids[-65:]
                logp = model(ids[None, :-1])[0][0].log_softmax(-1)
                n = min(n, 64)
                sums.append(logp[torch.arange(64)[-n:] - 64 + len(ids) - 1, ids[-n:]].sum().item())
                lengths.append(n if style == 'completion' else len(ending))
            assert found[style]['loglikelihood'] == pytest.approx(sums, abs=1e-3)
            assert found[style]['tokens' if style == 'completion' else 'characters'] == lengths
            prefix = '' if style == 'completion' else 'harness_'
            right[prefix + 'acc'] += np.argmax(sums) == int(q['label'])
            means = [s / n if n else -np.inf for s, n in zip(sums, lengths)]
            right[prefix + 'acc_norm'] += np.argmax(means) == int(q['label'])
    assert {m: one[m] for m in right} == {m: pytest.approx(n / 15) for m, n in right.items()}
    assert one['acc_stderr'] == pytest.approx((one['acc'] * (1 - one['acc']) / 14) ** 0.5)

def test_the_questions_are_downloaded_whole_or_not_at_all(hub, tmp_path, monkeypatch):
    publish, drop, env, requests = hub
    questions = [question(label=i % 4) for i in range(eval_hellaswag.QUESTIONS)]
    body = ''.join(json.dumps(q) + '\n' for q in questions).encode()
    publish('models', 'hs', main={'q': body, 'bad': body.replace(b'"label": 3', b'"label": 4')})
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    url, path = f"{env['HF_ENDPOINT']}/hs/resolve/main/", tmp_path / 'data/q.jsonl'
    for name, said in (('bad', 'label is 4'), ('nothing', '404')):
        with pytest.raises(UserError, match=said):
            eval_hellaswag.download(url + name, path)
        assert not path.exists()
    assert len(requests) == 5 + 1       # a page that is not there is asked for once
    drop.update([6, 7])                 # broken off in the middle, twice
    eval_hellaswag.download(url + 'q', path)
    assert path.read_bytes() == body and os.listdir(tmp_path / 'data') == ['q.jsonl']

# -----------------------------------------------------------------------------
# Data.

def documents_of(name, split, eot):
    ids = np.fromfile(f'data/{name}/{split}.bin', np.uint16).tolist()
    docs = [[]]
    for i in ids:
        docs[-1].append(i)
        if i == eot:
            docs.append([])
    assert docs.pop() == []
    return docs

NASTY = ['plain text, and  two  spaces', '', '<|endoftext|> is ordinary text here',
         'naïve 文字 🙂 \u200b\n\n\t x', 'a lone \ud800 surrogate', ' ' * 50,
         "don't I'll we've", '\r\nwindows\r\n']

def test_bins_equal_tiktoken(folder, capsys):
    bpe = gpt2().bpe
    import pyarrow
    import pyarrow.parquet
    os.makedirs('corpus/deep')
    Path('corpus/big.TXT').write_text((REPO / 'train.py').read_text() * 20)
    rows = '\n'.join(json.dumps({'text': t}) for t in [*NASTY, None])
    Path('corpus/deep/a.jsonl').write_text(rows + '\n\n')
    clean = [t for t in NASTY if '\ud800' not in t]
    table = pyarrow.table({'text': clean, 'other': list(range(len(clean)))})
    pyarrow.parquet.write_table(table, 'corpus/p.parquet')
    prepare.main(['corpus', '--name=bpe', '--val_fraction=0'])
    big = Path('corpus/big.TXT').read_text()
    expected = [bpe.encode_ordinary(t) + [50256] for t in [big, *NASTY, *clean]]
    assert documents_of('bpe', 'train', 50256) == expected
    out = capsys.readouterr().out
    assert '1 .txt' in out and '1 .jsonl' in out
    assert '1 rows without text' in out and '2 times <|endoftext|>' in out
    meta = json.loads(Path('data/bpe/meta.json').read_text())
    assert meta['tokenizer'] == 'gpt2' and meta['train']['documents'] == 1 + len(NASTY) + len(clean)
    prepare.main(['corpus', '--name=bpe', '--val_fraction=0', '--max_tokens=5_000'])
    assert documents_of('bpe', 'train', 50256) == [bpe.encode_ordinary(big)[:4999] + [50256]]

def test_text_is_read_in_any_layout_and_nonsense_is_not(folder, capsys):
    import gzip
    text = 'naïve 文字, é'
    os.makedirs('raw/sub')
    good = {'a.txt': text.encode('utf-8-sig'), 'b.text': text.encode('utf-16'),
            'c.jsonl': b'\xef\xbb\xbf' + json.dumps({'text': text}).encode(),
            'd.json': json.dumps([{'text': text}] * 2).encode(),
            'e.csv': f'text,n\n"{text}",1\n'.encode(), 'f.md.gz': gzip.compress(text.encode()),
            'sub/G.TXT': text.encode()}
    for name, content in good.items():
        Path('raw', name).write_bytes(content)
    Path('raw/latin.txt').write_bytes(text.encode('latin-1', 'replace'))
    Path('raw/p.png').write_bytes(bytes(range(256)))
    Path('raw/wide.txt').write_bytes('without a mark'.encode('utf-16-le'))
    os.makedirs('elsewhere')
    Path('elsewhere/h.txt').write_text(text)
    os.symlink(os.path.abspath('elsewhere'), 'raw/link')
    os.symlink(os.path.abspath('raw'), 'raw/sub/loop')
    prepare.main(['raw', '--tokenizer=bytes', '--val_fraction=0'])
    assert documents_of('raw', 'train', 256) == [[*text.encode(), 256]] * 9
    out = capsys.readouterr().out
    assert re.search('skipped: .*1 .png.*2 .txt', out), out
    for name in ('latin.txt', 'wide.txt'):
        assert 'iconv' in refused(prepare, f'raw/{name}', '--tokenizer=bytes', capsys=capsys)
    Path('raw/t.csv').write_text('body\nx y z\n')
    assert 'body' in refused(prepare, 'raw/t.csv', '--tokenizer=bytes', capsys=capsys)
    prepare.main(['raw/t.csv', '--tokenizer=bytes', '--column=body', '--val_fraction=0'])
    assert documents_of('t', 'train', 256) == [[*b'x y z', 256]]
    Path('raw/u.jsonl').write_text('{"text": "fine"}\n{"text": ')      # a half is not skipped
    assert 'row 2' in refused(prepare, 'raw', '--tokenizer=bytes', '--name=x', capsys=capsys)
    assert sorted(os.listdir('data')) == ['raw', 't']

def test_data_of_another_source_is_not_overwritten_and_a_link_is_followed(folder, capsys):
    for name in ('a', 'b'):
        os.makedirs(name)
        Path(f'{name}/train.txt').write_text(f'this is {name}. ' * 50)
    os.makedirs('disk')
    os.makedirs('data')
    os.symlink(os.path.abspath('disk'), 'data/train')
    prepare.main(['a/train.txt', '--tokenizer=bytes'])
    kept = Path('data/train/train.bin').read_bytes()
    assert os.path.islink('data/train')
    assert sorted(os.listdir('disk')) == ['meta.json', 'tokenizer', 'train.bin', 'val.bin']
    assert '--name=' in refused(prepare, 'b/train.txt', '--tokenizer=bytes', capsys=capsys)
    assert Path('data/train/train.bin').read_bytes() == kept
    os.makedirs('far')
    shutil.move('disk/train.bin', 'far/train.bin')
    os.symlink(os.path.abspath('far/train.bin'), 'disk/train.bin')
    os.makedirs('disk/.partial')        # of a killed run
    for left in ('disk/.partial/left', 'disk/tokenizer/left'):
        Path(left).write_text('')
    prepare.main(['a/train.txt', '--tokenizer=bytes', '--val_fraction=0'])      # the same source
    assert os.path.islink('disk/train.bin') and Path('far/train.bin').stat().st_size > len(kept)
    assert sorted(os.listdir('disk/tokenizer')) == ['tokenizer.json', 'tokenizer_config.json']

def test_rows_of_token_ids(folder, capsys):
    rng = np.random.default_rng(0)
    windows = rng.integers(257, size=(50, 128)).tolist()

    def prepared(rows, *args):
        Path('ids.jsonl').write_text(''.join(json.dumps({'input_ids': r}) + '\n' for r in rows))
        prepare.main(['ids.jsonl', '--val_fraction=1', *args])
        meta = json.loads(Path('data/ids/meta.json').read_text())
        return np.fromfile('data/ids/val.bin', np.uint16).tolist(), meta
    flat = sum(windows, [])
    ids, meta = prepared(windows, '--tokenizer=bytes', '--windows=True')
    assert (ids, meta['window']) == (flat, 128)
    ids, _ = prepared(windows, '--tokenizer=bytes', '--windows=True', '--max_tokens=1000')
    assert ids == flat[:7 * 128]
    assert prepared([[1, 2], [3]], '--tokenizer=bytes')[0] == [1, 2, 256, 3, 256]       # documents
    if gpt2():
        ids, meta = prepared([[1, 2], [65535]])        # of a tokenizer that nobody named
        assert ids == [1, 2, 65535] and meta['tokenizer'] == 'unknown'
        assert (meta['vocab_size'], meta['eot']) == (65536, None)
    for bad in ([65536], [-1], [1.5], [300]):
        Path('ids.jsonl').write_text(json.dumps({'input_ids': [1]}) + '\n'
                                     + json.dumps({'input_ids': bad}))
        error = refused(prepare, 'ids.jsonl', '--tokenizer=bytes', capsys=capsys)
        assert 'row 2' in error and str(bad[0]) in error
    os.makedirs('mixed')        # nor is a folder's file of another tokenizer skipped
    Path('mixed/a.jsonl').write_text('{"input_ids": [1]}')
    Path('mixed/b.jsonl').write_text('{"input_ids": [300]}')
    assert '300' in refused(prepare, 'mixed', '--tokenizer=bytes', capsys=capsys)

def test_openwebtexts_validation_documents_are_nanogpts(folder, monkeypatch):
    import datasets
    data = datasets.Dataset.from_dict({'n': range(5000)})
    split = data.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert prepare.nanogpt_val(5000) == set(split['test']['n'])
    assert len(prepare.nanogpt_val()) == 4007
    rows = lambda name, config, split: ({'text': f'{name} {n}'} for n in range(4000))
    monkeypatch.setattr(prepare, 'hub_rows', rows)
    expected = sorted(n for n in prepare.nanogpt_val() if n < 4000)
    for preset, train_documents in (('openwebtext', 4000 - len(expected)), ('openwebtext_val', 0)):
        prepare.main([preset, '--tokenizer=bytes'])
        val = [[*f'Skylion007/openwebtext {n}'.encode(), 256] for n in expected]
        assert documents_of(preset, 'val', 256) == val
        assert len(documents_of(preset, 'train', 256)) == train_documents

def test_prepare_streams_from_a_hub(hub, tmp_path):
    import pyarrow.parquet
    publish, drop, env, _ = hub

    def parquet(prefix, n=300):
        rows = [f'{prefix} {i}' for i in range(n)]
        pyarrow.parquet.write_table(pyarrow.table({'text': rows + [None]}), tmp_path / 'p')
        return (tmp_path / 'p').read_bytes(), np.concatenate([[*r.encode(), 256] for r in rows])
    (one, ids_one), (two, ids_two) = parquet('one'), parquet('two')
    readme = (b"---\nconfigs:\n- config_name: one\n  data_files: one/*.parquet\n"
              b"- config_name: two\n  data_files: two/*.parquet\n---\n")
    publish('datasets', 'me/rows', main={'data/train-00000-of-00001.parquet': one})
    publish('datasets', 'me/two', main={
        'README.md': readme, 'one/0.parquet': one, 'two/0.parquet': two})
    publish('datasets', 'me/script', main={'script.py': b'import os'}, refs_convert_parquet={
        'one/train/0000.parquet': one, 'two/partial-train/0000.parquet': two})

    def prepared(name, *args, status=0):
        out = finished(run(f'me/{name}', '--tokenizer=bytes', '--val_fraction=0', *args, env=env,
                           cwd=tmp_path, script='prepare.py'), status)
        if status:
            return out.splitlines()[-1]
        return np.fromfile(tmp_path / f'data/{name}/train.bin', np.uint16), out
    ids, out = prepared('rows')
    assert np.array_equal(ids, ids_one) and '1 rows without text' in out
    for name in ('two', 'script'):
        error = prepared(name, status=2)
        assert 'one' in error and 'two' in error and not (tmp_path / f'data/{name}').exists()
        assert np.array_equal(prepared(name, '--config=two', f'--name={name}')[0], ids_two)
    assert 'partial' in prepared('script', '--config=two')[1]
    publish('datasets', 'me/uneven', main={'uneven.py': b'import os'}, refs_convert_parquet={
        'one/train/0000.parquet': one, 'two/test/0000.parquet': two})
    assert 'two/test' in prepared('uneven', status=2)       # no configuration is chosen silently
    assert 'text' in prepared('rows', '--column=body', '--name=x', status=2)
    shards = {f'data/train-{k:05d}-of-00002.parquet': one for k in range(2)}
    publish('datasets', 'me/shards', main=shards)
    drop.update(range(1, 400, 3))       # one download in three breaks off in the middle
    assert np.array_equal(prepared('shards')[0], np.concatenate([ids_one] * 2))
    assert 'me/nothing' in prepared('nothing', status=2)
    assert not (tmp_path / 'data/nothing').exists()

# -----------------------------------------------------------------------------
# Bad input: one line on stderr with the value and what to type, exit status 2, nothing written.

@pytest.fixture(scope='session')
def broken(workspace):
    """What the cases below refer to."""
    train.main(TINY + ['--out_dir=run', '--max_iters=2'])
    train.main(TINY + REMOVE + ['--out_dir=free', '--max_iters=16'])
    GPT2.from_pretrained('run').save_pretrained('model')
    os.makedirs('busy')
    lock = open('busy/.lock', 'w')      # another run, as long as the cases last
    train.fcntl.flock(lock, train.fcntl.LOCK_EX)
    Path('crash.py').write_text('max_iters = 1 / 0\n')
    Path('empty').mkdir()
    shutil.copytree('data/tiny', 'data/odd')
    with open('data/odd/train.bin', 'ab') as f:
        f.write(b'x')
    for name in ('big', 'bare', 'chars', 'wide'):
        os.makedirs(f'data/{name}')
        for split in ('train', 'val'):
            shutil.copy(f'data/tiny/{split}.bin', f'data/{name}')
    np.full(4000, 60000, np.uint16).tofile('data/big/train.bin')
    np.fromfile('data/tiny/train.bin', np.uint16).astype(np.uint32).tofile('data/wide/train.bin')
    Path('data/chars/meta.pkl').touch()
    shutil.copytree('data/tiny', 'data/strange')
    Path('data/strange/meta.json').write_text('{"vocab_size": 300}')
    shutil.copytree('run', 'damaged')
    os.truncate('damaged/ckpt.pt', 3000)
    shutil.copytree('run', 'nolog')
    os.truncate('nolog/log.jsonl', 10)
    shutil.copytree('run', 'unlike')
    log = Path('run/log.jsonl').read_text()
    sha = json.loads(log.splitlines()[-1])['on']['val_sha256']
    Path('unlike/log.jsonl').write_text(log.replace(sha, '0' * 16))
    infinite = random_model('none', block_size=64, vocab_size=257)
    infinite.wte.weight.data[ord('t')] = 3e38
    os.makedirs('infinite')
    model.save_checkpoint('infinite', infinite)
    random_model(vocab_size=300).save_pretrained('odd_vocab')
    Path('words.txt').write_text('some words')
    np.save('array.npy', np.arange(999))
    Path('good.jsonl').write_text(json.dumps(question()))
    Path('label.jsonl').write_text(f'{json.dumps(question())}\n{json.dumps(question(label=4))}')
    yield lock

NEW = [*TINY, '--out_dir=never']
LOADED = ['--dataset=tiny', '--batch_size=4', '--batch_tokens=512', '--out_dir=never',
          '--warmup_iters=2', '--device=cpu']
AGAIN = [*TINY, *REMOVE, '--out_dir=free', '--init_from=resume']
EVAL = ['--eval_only=True', '--dataset=tiny']
CASES = [
    (train, ['--batchsize=8'], 'batch_size'),
    (train, ['--max_iters=1.5'], '1.5'),
    (train, ['--batch_size=0'], 'batch_size is 0'),
    (train, ['--batch_size', '8'], '--key=value'),
    (train, ['config/nothing.py'], 'config/nothing.py'),
    (train, ['crash.py'], 'ZeroDivisionError'),
    (train, ['--device=abacus'], '--device=auto'),
    (train, [*NEW, '--learning_rate=1e-5'], '6e-05'),
    (train, [*NEW, '--warmup_iters=7', '--max_iters=6'], 'warmup_iters=7'),
    (train, [*NEW, '--dataset=nothing'], '--name=nothing'),
    (train, [*NEW, '--dataset=odd'], 'data/odd/train.bin'),
    (train, [*NEW, '--dataset=strange'], 'data/strange'),
    (train, [*NEW, '--dataset=bare'], '--vocab_size='),
    (train, [*NEW, '--dataset=wide', '--vocab_size=257'], '32-bit'),
    (train, [*LOADED, '--dataset=big', '--init_from=model'], '60000'),
    (train, [*LOADED, '--dataset=chars', '--init_from=model'], '65'),
    (train, [*LOADED, '--init_from=model', '--block_size=64'], '--block_size=32'),
    (train, [*NEW, '--batch_tokens=500'], '--batch_tokens=384'),
    (train, [*NEW, *REMOVE, '--max_iters=13'], 'max_iters=13'),
    (train, [*LOADED, *REMOVE, '--init_from=free', '--max_iters=20'], 'lost already'),
    (train, [*NEW, '--init_from=no/such'], 'no/such'),
    (train, [*LOADED, '--init_from=damaged'], 'damaged'),
    (train, [*LOADED, '--init_from=model', '--n_layer=7'], '7'),
    (train, [*AGAIN, '--start_lnf=14', '--max_iters=20'], 'ln_f'),
    (train, ['--out_dir=nolog', '--init_from=resume', *LOADED[:3], '--max_iters=2',
             '--warmup_iters=1', '--eval_iters=10'], 'nolog/log.jsonl'),
    (train, [*TINY, '--out_dir=run'], '--init_from=resume'),
    (train, [*TINY, '--out_dir=run', '--init_from=resume', '--eval_iters=5'], 'windows'),
    (train, [*TINY, '--out_dir=words.txt/x'], 'words.txt'),
    (train, [*TINY, '--out_dir=busy'], 'busy'),
    (train, [*NEW, '--control=unlike'], 'val_sha256'),
    (train, [*NEW, '--wandb_log=True'], 'WANDB_MODE=offline'),
    (train, [*EVAL, '--eval_iters=0', '--init_from=infinite'], 'infinite'),
    (prepare, ['empty', '--tokenizer=bytes'], 'empty'),
    (prepare, ['words.txt', '--tokenizer=bytes', '--max_tokens=100'], '100'),
    (prepare, ['words.txt', '--tokenizer=bytes', '--name=../words'], '../words'),
    (prepare, ['words.txt', '--tokenizer=bytes', '--split=train'], 'words.txt'),
    (prepare, ['array.npy', '--tokenizer=bytes'], '.parquet'),
    (eval_hellaswag, ['run', '--data=label.jsonl'], 'line 2'),
    (eval_hellaswag, ['infinite', '--data=good.jsonl'], 'question 1'),
    (eval_hellaswag, ['odd_vocab', '--data=good.jsonl'], '300'),
    (eval_hellaswag, ['run', '--data=good.jsonl', '--json=words.txt/x.json'], 'words.txt'),
    (model, ['run', 'model'], 'model exists'),
    (model, ['run', 'folded', '--folded'], 'LayerNorm'),
]

@pytest.mark.parametrize('script, args, said', CASES, ids=lambda v: v if isinstance(v, str) else '')
def test_bad_input_is_told_in_one_line(script, args, said, broken, capsys):
    look = lambda: {p: p.stat().st_mtime_ns for p in Path('.').rglob('*')
                    if p.is_file() and p.parts[0] in ('run', 'free', 'data')}
    kept = look()
    assert said in refused(script, *args, capsys=capsys)
    assert kept == look() and not any(map(os.path.exists, ('never', 'folded')))

def test_paths_begin_at_home_and_the_file_system_may_have_no_locks(workspace, monkeypatch, capsys):
    monkeypatch.setenv('HOME', os.path.abspath('home'))

    def no_locks(*args):
        raise OSError(38, 'Function not implemented')
    monkeypatch.setattr(train.fcntl, 'flock', no_locks)
    monkeypatch.setattr(os, 'fsync', no_locks)
    train.main(TINY + ['--out_dir=~/run', '--max_iters=2'])
    assert os.path.exists('home/run/ckpt.pt') and not os.path.exists('~')
    assert 'cannot be locked' in capsys.readouterr().out
    monkeypatch.setattr(train, 'fcntl', None)       # a system without them
    train.main(['--dataset=tiny', '--batch_size=4', '--batch_tokens=512', '--warmup_iters=1',
                '--out_dir=~/other', '--max_iters=2', '--init_from=~/run', '--device=cpu'])
    assert GPT2.from_pretrained('~/other')

@pytest.mark.parametrize('error, said', [
    (MemoryError(), '--batch_size'),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'), '--batch_size'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), '--batch_size'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
     '--gradient_checkpointing=True')])
def test_trouble_of_the_machine_is_one_line(error, said, workspace, monkeypatch, capsys):
    def fails(*args):
        raise error
    monkeypatch.setattr(train, 'step', fails)
    args = [*TINY, f'--out_dir=oom{id(error)}', '--max_iters=2']
    assert said in refused(train, *args, capsys=capsys)

def test_a_missing_compiler_is_one_line(workspace):
    env = {'CXX': '/nowhere/g++', 'TORCHINDUCTOR_CACHE_DIR': os.path.abspath('cache'),
           'TORCHINDUCTOR_FX_GRAPH_CACHE': '0'}
    args = [a for a in TINY if 'compile' not in a]
    args += ['--out_dir=nocc', '--max_iters=2', '--compile=True', '--n_layer=1']
    output = finished(run(*args, env=env), status=2)
    lines = [line for line in output.splitlines() if line.startswith('train.py: ')]
    assert len(lines) == 1 and '--compile=False' in lines[0]
