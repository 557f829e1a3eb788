"""
The project's claims, one test each. Everything runs offline on two CPU cores, in random or self-trained models.

    make test
"""
import contextlib
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
TINY = ('--dataset=tiny --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --batch_tokens=512 ' \
       '--learning_rate=3e-3 --warmup_iters=2 --eval_iters=10 --log_interval=1 --compile=False --device=cpu').split()
REMOVE = ('--remove_ln=True --start_ln2=2 --gap_ln2=1 --start_ln1qk=4 --gap_ln1qk=1 --start_ln1v=6 --gap_ln1v=2 ' \
         '--start_lnf=10 --start_eot=11 --start_bos=13').split()


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
    config = dict(block_size=31, vocab_size=101, n_layer=3, n_head=3, n_embd=39, ln_mode=ln_mode) | kwargs
    model = GPT2(GPT2Config(**config)).eval()
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
    return train.evaluations(out_dir)[i]['val_loss']


def run(*args, nproc=1, script='train.py', **kwargs):
    """A script as a user starts it, under torchrun if nproc > 1."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}'] if nproc > 1 else []
    kwargs['env'] = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'} | kwargs.get('env', {})
    return subprocess.Popen([sys.executable, *launcher, str(REPO / script), *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


def finished(process, status=0):
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == status, output
    return output


def refused(script, *args, capsys):
    """The one line on stderr with which a script refuses its arguments, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        script.main([str(a) for a in args])
    error = capsys.readouterr().err.strip()
    assert e.value.code == 2 and error and '\n' not in error, error
    return error

# -----------------------------------------------------------------------------
# Numerics and folding.

@torch.no_grad()
@pytest.mark.parametrize('shape', [dict(n_embd=39, n_head=3, n_layer=3), dict(n_embd=20, n_head=5, n_layer=1, vocab_size=257)])
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
    config = transformers.GPT2Config(n_positions=31, vocab_size=shape.get('vocab_size', 101), n_embd=shape['n_embd'],
                                     n_head=shape['n_head'], n_layer=shape['n_layer'], initializer_range=0.2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='20KB')     # in shards, as GPT-2 XL may be
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
    (q, k, _), (_, _, value) = (attn.c_attn(z).view(2, 5, 3, 3, 13).permute(2, 0, 3, 1, 4) for z in (qk, v))
    scores = (q @ k.mT / 13 ** 0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = attn.c_proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 5, 39))
    assert difference(attn(qk, v), expected) < 1e-4 < difference(attn(qk, qk), expected)


@torch.no_grad()
def test_position_0_and_end_of_text_have_constants_of_their_own():
    """A giant vector at position 0 and at end-of-text, as trained GPT-2s have: with one constant the logits are lost."""
    model = random_model('fake', n_layer=1)
    eot, idx = model.config.eot_token_id, IDX.clone()
    idx[idx == eot] = 0
    idx[:, [5, 20]] = eot
    idx[0, 0] = eot
    model.wpe.weight[0] += 300 * torch.randn(39)
    model.wte.weight[eot] += 100 * torch.randn(39)
    assert model.kinds(idx)[0].tolist() == [EOT] + [TOKEN] * 4 + [EOT] + [TOKEN] * 14 + [EOT] + [TOKEN] * 10
    assert model.kinds(idx)[1, 0] == BOS
    before = model(idx)[0]
    stds = train.measure(lambda x: model(x, return_stds=True), model.kinds, [(idx, idx), (idx[:2], idx[:2])])
    exact = model(idx, return_stds=True)[2][0]
    weights = torch.tensor([1.0, 1, 0.5, 0.5])[:, None] * (model.kinds(idx) == TOKEN)      # rows 0 and 1 were measured twice
    assert stds[0, TOKEN] == pytest.approx(((exact * weights).sum() / weights.sum()).item(), rel=1e-5)
    assert stds[0, BOS] > 50 * stds[0, TOKEN] and stds[0, EOT] > 20 * stds[0, TOKEN]
    for ln, std in zip(model.layernorms().values(), stds):
        ln.gate.fill_(1)
        ln.std.copy_(std)
    own = (model(idx)[0] - before)[:, 1:].norm() / before[:, 1:].norm()
    for ln in model.layernorms().values():
        ln.std.fill_(ln.std[TOKEN].item())
    one = (model(idx)[0] - before)[:, 1:].norm() / before[:, 1:].norm()
    assert own < 0.3 and one > 3 * own, (own, one)
    assert train.measure(lambda x: model(x, return_stds=True), model.kinds, [(idx[1:, :5], idx[1:, :5])])[0, EOT] \
        == pytest.approx(stds[0, TOKEN].item(), rel=0.5)      # a kind that is not there takes the ordinary constant


@torch.no_grad()
def test_folding_is_exact_and_leaves_no_layernorm_in_the_graph():
    from torch.fx.experimental.proxy_tensor import make_fx
    fake = remove_all(random_model('fake'), IDX)
    none = fake.fold_ln()
    assert none.config.ln_mode == 'none' and not [k for k in none.state_dict() if 'ln_' in k]
    assert difference(fake(IDX)[0], none(IDX)[0]) < 1e-4 < difference(fake(IDX)[0], random_model()(IDX)[0])

    def ops(model):
        graph = make_fx(lambda i: model(i)[0])(IDX).graph
        return {name.split('.')[1] for name in (str(n.target) for n in graph.nodes) if name.startswith('aten.')}
    divides = {'native_layer_norm', 'layer_norm', 'var', 'var_mean', 'rsqrt', 'sqrt', 'std', 'mean', 'div'}
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
        with pytest.raises(UserError, match='without LayerNorm'):
            GPT2.from_pretrained(str(tmp_path / name), 'fake')


@torch.no_grad()
def test_the_published_checkpoints_form_loads(tmp_path):
    """apollo-research/gpt2_noLN as transformers holds it: blocks folded, with scales of 1e6; ln_f's own weight and bias; a tied head."""
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(n_positions=31, vocab_size=101, n_embd=39, n_head=3, n_layer=3, layer_norm_epsilon=1e12, initializer_range=0.2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for name, p in theirs.named_parameters():
        if '.ln_1.' in name or '.ln_2.' in name:
            p.fill_(1e6 * name.endswith('weight'))
        elif '.ln_f.' in name:
            p.copy_(torch.randn(39) * (1e6 if name.endswith('weight') else 1))
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(str(tmp_path)).eval()
    assert ours.config.ln_mode == 'none' and difference(ours(IDX)[0], theirs(IDX).logits) < 1e-4 * theirs(IDX).logits.abs().max()


@torch.no_grad()
def test_what_transformers_cannot_express_is_refused(tmp_path):
    model = random_model('fake')
    model.save_pretrained(tmp_path / 'before')      # all gates 0: a stock GPT-2
    assert difference(GPT2.from_pretrained(str(tmp_path / 'before')).eval()(IDX)[0], model(IDX)[0]) < 1e-5
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
    fork = GPT2.from_pretrained(tmp_path / 'stock', 'fake').eval()      # its own parameter begins fresh
    assert fork.h[0].ln_2.alpha.item() == 0.5
    assert difference(fork(IDX)[0], random_model()(IDX)[0]) < 1e-6
    fork.h[0].ln_2.alpha.fill_(0.7)
    for gate in fork.sites().values():
        gate.fill_(1)
    model.save_checkpoint(tmp_path, fork)
    again = GPT2.from_pretrained(tmp_path).eval()
    assert again.h[0].ln_2.alpha.item() == pytest.approx(0.7) and torch.equal(again(IDX)[0], fork(IDX)[0])
    for attempt in (lambda: fork.save_pretrained(tmp_path / 'x'), fork.fold_ln):    # neither writes another function
        with pytest.raises(UserError, match='no stock LayerNorm'):
            attempt()
    assert not (tmp_path / 'x').exists()


@torch.no_grad()
def test_float16_takes_the_folded_model_with_a_smaller_epsilon(tmp_path):
    transformers = pytest.importorskip('transformers')
    fake = remove_all(random_model('fake'), IDX)
    model.save_checkpoint(tmp_path, fake)
    model.main([str(tmp_path), str(tmp_path / 'half'), '--float16'])
    half = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'half', dtype=torch.float16).eval()
    assert difference(half(IDX).logits.float(), fake(IDX)[0]) < 0.02
    whole = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'half').eval()
    assert difference(whole(IDX).logits, fake(IDX)[0]) < 1e-3

# -----------------------------------------------------------------------------
# The schedule.

def test_the_papers_pace_event_by_event():
    cfg, _ = train.load_config([str(REPO / 'config/remove_ln.py'), '--start_eot=1060', '--start_bos=1160', '--taper_iters=0'])
    expected = [(200 + 20 * i, 'remove', f'h.{i}.ln_2') for i in range(12)]
    expected += [(440 + 20 * i, 'remove', f'h.{i}.ln_1.qk') for i in range(12)]
    expected += [(680 + 30 * i, 'remove', f'h.{i}.ln_1.v') for i in range(12)]
    expected += [(1040, 'remove', 'ln_f'), (1060, 'merge', 'eot'), (1160, 'merge', 'bos')]
    assert train.schedule(cfg, 12) == expected
    model = GPT2(GPT2Config(block_size=4, vocab_size=9, n_layer=12, n_head=1, n_embd=4, ln_mode='fake'))
    calls, logged = [], []

    def measured():
        calls.append(it)
        return torch.arange(1.0, 76).view(25, 3) + 100 * len(calls)
    for it in range(cfg.max_iters):
        logged += train.apply_schedule(expected, cfg, it, model, measured)
        gone = sum(when <= it for when, what, _ in expected if what == 'remove')
        assert sum(g.item() for g in model.sites().values()) == gone
        if it == 1100:      # end-of-text is merged, position 0 not yet
            assert all(ln.std[EOT] == ln.std[TOKEN] != ln.std[BOS] for ln in model.layernorms().values())
    assert [(e['iter'], e['event'], e.get('site') or e['kind']) for e in logged] == expected
    assert len(calls) == 25 and max(calls) == 1040       # ln_1's two sides share what was measured for the first
    std = {e['site']: e['std'] for e in logged if e['event'] == 'remove'}
    assert std['h.3.ln_1.qk'] == std['h.3.ln_1.v'] != std['h.3.ln_2']
    assert model.fold_ln().config.ln_mode == 'none'


def test_a_taper_fades_gates_and_merges_and_ends_exactly():
    cfg, _ = train.load_config(REMOVE + ['--taper_iters=4', '--max_iters=30'])
    events = train.schedule(cfg, 2)
    model = GPT2(GPT2Config(block_size=4, vocab_size=9, n_layer=2, n_head=1, n_embd=4, ln_mode='fake'))
    gates, stds, log = [], [], []
    for it in range(17):
        log += train.apply_schedule(events, cfg, it, model, lambda: torch.tensor([[2.0, 10.0, 4.0]] * 5))
        gates.append(model.sites()['h.0.ln_2'].item())
        stds.append(model.h[0].ln_2.std.tolist())
    assert gates == [0, 0, 0.25, 0.5, 0.75] + [1.0] * 12
    assert stds[2:] == [[2, 10, 4]] * 9 + [[2, 10, 3.5], [2, 10, 3], [2, 8, 2.5], [2, 6, 2], [2, 4, 2], [2, 2, 2]]
    assert [e['iter'] for e in log if e['event'] == 'merge'] == [11, 13]
    model.h[0].ln_2.std[:] = torch.tensor([0.1, 33000.7, 4.0])      # where rounding would leave a difference
    for it in range(13, 17):
        train.apply_schedule(events, cfg, it, model, None)
    assert model.h[0].ln_2.std[BOS] == model.h[0].ln_2.std[TOKEN]
    with pytest.raises(UserError, match='removes h.0.ln_2 twice'):
        train.check_schedule(events + events[:1], cfg, {})


@pytest.mark.parametrize('name, lr, low, warmup, aux, iters, cosine, first, gap', [
    ('fast', 6e-4, 3e-4, 25, 0.1, 300, 300, 20, 2), ('medium', 6e-4, 3e-4, 10, 0.1, 500, 500, 20, 2),
    ('large', 3e-4, 4e-5, 15, 0.03, 600, 1200, 30, 4), ('xl', 1e-4, 2e-5, 20, 0.01, 800, 1200, 50, 4)])
def test_the_follow_ups_settings_are_the_published_ones(name, lr, low, warmup, aux, iters, cosine, first, gap):
    cfg, _ = train.load_config([str(REPO / f'config/remove_ln_{name}.py')])
    train.check_config(cfg)
    assert (cfg.learning_rate, cfg.min_lr, cfg.warmup_iters, cfg.aux_loss_weight) == (lr, low, warmup, aux)
    assert (cfg.max_iters, cfg.lr_decay_iters, cfg.start_ln2, cfg.gap_ln2) == (iters, cosine, first, gap)
    assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.grad_clip) == (0.01, 0.9, 0.999, 1.0)
    layers = {'fast': 12, 'medium': 24, 'large': 36, 'xl': 48}[name]
    events = train.schedule(cfg, layers)
    train.check_schedule(events, cfg, {})
    control, _ = train.load_config([str(REPO / f'config/{c}.py') for c in (f'remove_ln_{name}', 'control')])
    assert not control.remove_ln and control.out_dir == f'out/remove_ln_{name}/control'
    assert control.learning_rate == lr and control.max_iters == iters


def test_the_warning_knows_what_a_schedule_does_to_a_giant_vector():
    ratios = {'bos': {ln: r for ln, r in zip(['h.0.ln_1', 'h.0.ln_2', 'h.1.ln_1', 'h.1.ln_2', 'ln_f'], [2, 1, 40, 42, 11])},
              'eot': dict.fromkeys(['h.0.ln_1', 'h.0.ln_2', 'h.1.ln_1', 'h.1.ln_2', 'ln_f'], 3.0)}

    def told(*keys):
        cfg, _ = train.load_config(REMOVE + ['--max_iters=99', *keys])
        return train.warnings_of(train.schedule(cfg, 2), cfg, ratios)
    assert len(told()) == 1 and re.search(r'iteration 13 .* position 0 .* 42 .*h.1.ln_2.*taper_iters', told()[0])
    assert told('--taper_iters=20') == [] and told('--start_bos=-1') == []
    assert 'iteration 3 ' in told('--start_bos=0')[0]       # without special constants: as h.1.ln_2 is removed

# -----------------------------------------------------------------------------
# Training runs.

def test_one_training_graph_and_one_evaluation_graph_over_a_whole_removal(workspace):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    train.main(TINY + REMOVE + ['--out_dir=compiled', '--max_iters=16', '--eval_interval=4', '--compile=True',
                                '--aux_loss_weight=0.1', '--taper_iters=2', '--n_layer=1'])
    assert counters['stats']['unique_graphs'] == 2 and not counters['graph_break'], counters
    assert not counters['recompiles'] and [e['event'] for e in log_of('compiled')].count('remove') == 4


def test_how_a_batch_is_cut_changes_no_loss(workspace):
    """Not with the auxiliary loss either, nor when blocks are computed again."""
    args = TINY + REMOVE + ['--max_iters=16', '--eval_interval=8', '--aux_loss_weight=1.0']
    train.main(args + ['--out_dir=cut4'])
    for name, more in (('cut1', ['--batch_size=1']), ('cut8', ['--batch_size=8', '--gradient_checkpointing=True'])):
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
    train.main(TINY + ['--out_dir=nosync', '--max_iters=100', '--eval_interval=100', '--log_interval=50'])
    steps = ' '.join(seen).split('step')
    assert len(steps) == 101 and [i for i, s in enumerate(steps) if s.strip()] == [0, 1, 51, 100]


def opened(*keys):
    cfg, _ = train.load_config(['--dataset=tiny', '--block_size=32', *keys])
    data = train.Data(cfg, 'cpu')
    data.open(257, ['train', 'val'])
    return data


def test_evaluation_predicts_every_token_once_whatever_the_batch(workspace):
    train.main(TINY + ['--out_dir=short', '--max_iters=2'])
    model = GPT2.from_pretrained('short').eval()
    tokens = torch.from_numpy(np.fromfile('data/tiny/val.bin', np.uint16).astype(np.int64))
    windows = [tokens[i:i + 33] for i in range(0, len(tokens) - 1, 32)]
    with torch.no_grad():
        expected = torch.cat([torch.nn.functional.cross_entropy(model(w[None, :-1])[0][0], w[1:], reduction='none')
                              for w in windows]).numpy()
    assert len(expected) == len(tokens) - 1
    for batch_size in (3, 7):
        data = opened(f'--batch_size={batch_size}', '--eval_iters=0')
        losses = train.token_losses(model, data)[0]
        assert np.abs(losses[~np.isnan(losses)] - expected).max() < 1e-5
        data.cfg.eval_iters = 10
        assert train.token_losses(model, data).shape == (1, 10, 32)
        # of windows that were cut elsewhere, the first token is not predicted from the text before it
        data.cfg.eval_iters, data.meta['window'] = 0, 40
        fewer = train.token_losses(model, data)[0].ravel()[:len(expected)]
        assert np.flatnonzero(np.isnan(fewer)).tolist() == list(range(39, len(expected), 40))


def test_statistics_of_an_evaluation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 100)) + rng.normal(size=(400, 1)) * 2 + 5     # what all tokens of a window share
    a[-1, 70:] = np.nan
    mean, error = train.mean_and_error(a)
    assert mean == pytest.approx(np.nanmean(a)) and error == pytest.approx(2 / 20, rel=0.1)        # not 2.2 / 200
    table = [line.split() for line in train.loss_table({'a': a, 'b': a - 0.25}, 'token').splitlines()]
    assert table[2][:3] == ['all', '39,970', f'{mean:.4f}'] and table[2][-1] == f'{np.nanmax(a):.4f}'
    assert [int(row[-6].replace(',', '')) for row in table[3:6]] == [400, 63 * 400, 36 * 400 - 30]
    assert float(table[12][2]) == pytest.approx(0.25) and float(table[12][3]) < 1e-6
    # half of the predictions are made with confidence 0.9 and right in 0.6 of the cases, half are calibrated
    confidence, right = np.repeat([0.9, 0.5], 500), np.r_[np.arange(500) % 5 < 3, np.arange(500) % 2 < 1]
    full = np.stack([np.ones(1000), np.full(1000, 0.7), confidence, right]).reshape(4, 10, 100)
    assert train.calibration(full) == pytest.approx((0.15, 0.7))


def test_evaluation_compares_two_models_on_any_number_of_processes(workspace, capsys):
    for seed in (1, 2):
        train.main(TINY + [f'--out_dir=pair{seed}', '--max_iters=2', f'--seed={seed}'])
    args = [str(REPO / 'config/eval.py'), '--init_from=pair1', '--control=pair2', '--dataset=tiny', '--batch_size=3']
    capsys.readouterr()
    train.main(args)
    one = capsys.readouterr().out
    assert one.strip() in finished(run(*args, nproc=2))
    means = [np.nanmean(train.token_losses(GPT2.from_pretrained(f'pair{s}').eval(), opened('--eval_iters=0'))[0],
                        dtype=np.float64) for s in (1, 2)]
    assert f'val loss {means[0]:.4f} nats per byte' in one and one.count('ECE') == 2
    difference = [line.split() for line in one.splitlines() if line.startswith('  all')][2]
    assert float(difference[2]) == pytest.approx(means[0] - means[1], abs=1.1e-4)


def test_batches_are_a_function_of_seed_and_iteration_however_they_are_cut(workspace):
    def batches(it, batch_size=4, seed=1):
        data = opened('--batch_tokens=512', f'--batch_size={batch_size}', f'--seed={seed}')
        rows = [torch.cat(data.batch(it, m), 1) for m in range(512 // 32 // batch_size)]
        assert all(torch.equal(r[:, 1:32], r[:, 32:-1]) for r in rows)      # targets are the inputs, one on
        return torch.cat(rows)
    assert torch.equal(batches(3), batches(3, batch_size=8))
    assert not torch.equal(batches(3), batches(4)) and not torch.equal(batches(3), batches(3, seed=2))
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
    while not os.path.exists(f'{out_dir}/log.jsonl') or Path(f'{out_dir}/log.jsonl').read_text().count('"train"') < n:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_killed_and_resumed_on_any_number_of_processes_gives_the_same_losses(whole):
    three = run(*LONG, '--out_dir=three', nproc=3)      # four micro-batches an iteration: they do not come out even
    killed = run(*LONG, '--out_dir=killed')
    wait_for('killed', 12, killed)
    killed.kill()
    killed.wait()
    assert os.path.exists('killed/ckpt.pt') and log_of('killed')[-1]['iter'] < 39
    finished(three)
    assert_close(log_of('three'), whole)
    shutil.copytree('killed', 'killed2')
    one = run(*LONG, '--out_dir=killed', '--init_from=resume')
    two = run(*LONG, '--out_dir=killed2', '--init_from=resume', nproc=2)
    assert 'LN-free' in finished(one)
    finished(two)
    assert log_of('killed') == whole      # to the last bit
    assert_close(log_of('killed2'), whole)
    weights = [GPT2.from_pretrained(f'{d}/hf').lm_head.weight for d in ('killed', 'whole')]
    assert torch.equal(*weights)
    Path('killed/hf/README.md').write_text('my own words')      # resumed once more, after its end: they are kept
    finished(run(*LONG, '--out_dir=killed', '--init_from=resume'))
    assert Path('killed/hf.1/README.md').read_text() == 'my own words' and 'scratch' in Path('killed/hf/README.md').read_text()


def test_killed_at_random_moments(whole):
    """SIGKILL, three times, with a checkpoint every other iteration; then the log is an uninterrupted run's."""
    rng, args = np.random.default_rng(3), [a for a in LONG if 'eval_interval' not in a] + ['--out_dir=random', '--eval_interval=2']
    resume = lambda: args + ['--init_from=resume'] * os.path.exists('random/ckpt.pt')
    for _ in range(3):
        process = run(*resume())
        before = os.path.getmtime('random/log.jsonl') if os.path.exists('random/log.jsonl') else 0
        while process.poll() is None and (not os.path.exists('random/log.jsonl') or os.path.getmtime('random/log.jsonl') == before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        if os.path.exists('random/ckpt.pt'):
            model.load_checkpoint('random')
    finished(run(*resume()))
    assert [e for e in log_of('random') if e['event'] == 'train'] == [e for e in whole if e['event'] == 'train']
    assert [e['iter'] for e in log_of('random') if e['event'] == 'eval'] == list(range(0, 41, 2))


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
        finished(run(*LONG, f'--out_dir={out_dir}', '--init_from=resume'))
        assert_close(log_of(out_dir), whole)


def test_a_fault_of_one_rank_is_told_by_it(whole):
    """Rank 1 alone finds its data too short, before the run begins: one line of ours, and rank 0 does not hang."""
    code = ("import os, sys; sys.path.insert(0, %r); import train\n"
            "if os.environ['RANK'] == '1':\n"
            "    def bad(*a): raise train.UserError('only this rank sees it')\n"
            "    train.load_model = bad\n"
            "sys.argv[0] = 'train.py'; train.main()") % str(REPO)
    Path('one_rank.py').write_text(code)
    process = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'one_rank.py',
                              *LONG, '--out_dir=never'], capture_output=True, text=True, timeout=100)
    assert process.returncode == 1 and process.stderr.count('train.py: only this rank sees it') == 1, process.stderr
    assert not os.path.exists('never')


def test_a_full_disk_leaves_the_last_checkpoint(workspace):
    import resource
    args = TINY + ['--out_dir=full', '--eval_interval=4']
    finished(run(*args, '--max_iters=4'))
    kept = Path('full/ckpt.pt').read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, len(kept) // 2))
    output = finished(run(*args, '--max_iters=8', '--init_from=resume', preexec_fn=limit), status=2)
    assert output.splitlines()[-1].startswith('train.py: ') and 'ckpt.pt' in output.splitlines()[-1] and 'Traceback' not in output
    assert Path('full/ckpt.pt').read_bytes() == kept and not list(Path('full').glob('*partial'))
    finished(run(*args, '--max_iters=8', '--init_from=resume'))


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(workspace, capsys, monkeypatch):
    args = TINY + REMOVE + ['--out_dir=diverged', '--eval_interval=4', '--max_iters=60', '--guard_patience=8', '--grad_clip=0']
    train.main([a for a in args if 'max_iters' not in a] + ['--max_iters=16'])
    kept = Path('diverged/ckpt.pt').read_bytes()
    shutil.rmtree('diverged/hf')
    step = train.step

    def stops(said, fault, *more):
        monkeypatch.setattr(train, 'step', fault)
        error = refused(train, *args, '--init_from=resume', *more, capsys=capsys)
        assert said in error and 'merge bos at iteration 13' in error and 'diverged/ckpt.pt' in error
        assert Path('diverged/ckpt.pt').read_bytes() == kept and not os.path.exists('diverged/hf')
    high = lambda first: lambda cfg, it, *a: (step(cfg, it, *a)[0] + 9 * (it >= first), torch.tensor(1.0), [])
    stops('since iteration 18 ', high(18))
    stops('since iteration 18 ', high(18), '--max_iters=20')     # no time is left to recover
    stops('gradient of iteration 18 ', lambda cfg, it, *a: (step(cfg, it, *a)[0], torch.tensor(torch.nan if it == 18 else 1.0), []))
