"""
The project's claims, one test each. Everything runs offline on two CPU cores, in random or
self-trained models.

    make test
"""
import contextlib
import gc
import gzip
import http.server
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import eval_hellaswag
import model
import prepare
import train
from model import BOS, EOT, TOKEN, GPT2, GPT2Config, UserError

REPO = Path(__file__).parent.resolve()
TINY = 'tiny.py shape.py'       # config files in the workspace; remove.py is a third
LONG = f'{TINY} remove.py --max_iters=40 --eval_interval=8 --dropout=0.1'

CONFIGS = {
    'tiny.py': """dataset, device, compile, eval_iters, log_interval = 'tiny', 'cpu', False, 10, 1
batch_size, batch_tokens, max_iters, warmup_iters, learning_rate = 4, 512, 16, 2, 3e-3""",
    'shape.py': "n_layer, n_head, n_embd, block_size = 2, 2, 32, 32",
    'remove.py': """remove_ln, start_ln2, start_ln1qk, start_ln1v, start_lnf = True, 2, 4, 6, 10
start_eot, start_bos, gap_ln2, gap_ln1qk, gap_ln1v = 11, 13, 1, 1, 2"""}

@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    """The folder in which the tests run: data/tiny, pieces of the standard library as bytes, short
    so that there is end-of-text in each batch; two models of two iterations, run and other; and
    run in Hugging Face layout, model."""
    os.chdir(tmp_path_factory.mktemp('workspace'))
    os.symlink(REPO / 'config', 'config')
    files = (Path(path).read_text(errors='replace') for path in prepare.stdlib_files())
    pieces = (piece for text in files for piece in text.split('\n\n') if piece.strip())
    rows = [json.dumps({'text': piece}) for piece, _ in zip(pieces, range(9000))]
    put(CONFIGS | {'tiny.jsonl': '\n'.join(rows)})
    here('prepare.py tiny.jsonl --tokenizer=bytes --val_fraction=0.01')
    for seed, name in enumerate(('run', 'other')):
        here(f'train.py {TINY} --max_iters=2 --seed={seed} --out_dir={name}')
    load('run').save_pretrained('model')

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)

def put(files):
    """Writes {path: text or bytes}."""
    for path, content in files.items():
        model.write(path, content.encode() if isinstance(content, str) else content)

def here(line):
    """A command, as a user types it, in this process."""
    script, *args = line.split()
    sys.modules[script.removesuffix('.py')].main(args)

def start(line, nproc=1, env={}, **kwargs):
    """A command in a process of its own, under torchrun if nproc > 1."""
    script, *args = line.split()
    script = script if os.path.exists(script) else REPO / script
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}']
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'} | env
    return subprocess.Popen([sys.executable, *torchrun * (nproc > 1), script, *args], text=True,
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)

def finished(process, status=0):
    """What the process printed; it has ended with this status. 1 is torchrun's own."""
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == status and ('Traceback' not in output or status == 1), output
    return output

def refused(line, capsys):
    """The one line on stderr with which a command refuses its arguments, with exit status 2."""
    gc.collect()        # a run that failed in this process holds its lock until then
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        here(line)
    error = capsys.readouterr().err.strip()
    assert e.value.code == 2 and error and '\n' not in error, error
    return error

def random_model(ln_mode='real', **kwargs):
    """A model whose every parameter, LN's included, is far from its initial value."""
    torch.manual_seed(0)
    config = dict(block_size=31, vocab_size=101, n_layer=3, n_head=3, n_embd=39, ln_mode=ln_mode)
    model = GPT2(GPT2Config(**config | kwargs)).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(p * 3 + 0.2 * torch.randn_like(p) * (p.dim() == 1))
    return model

def stock_model(**kwargs):
    """transformers' GPT-2 of the same shape."""
    config = dict(n_positions=31, vocab_size=101, n_layer=3, n_head=3, n_embd=39)
    config = transformers.GPT2Config(**config | kwargs, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)

def load_stock(folder, **kwargs):
    return transformers.GPT2LMHeadModel.from_pretrained(folder, **kwargs).eval()

def load(folder):
    return GPT2.from_pretrained(folder).eval().requires_grad_(False)

def read_json(path):
    return json.loads(Path(path).read_text())

def remove_all(model):
    """Removes every site, with constants measured on IDX, the same for all kinds of token."""
    for ln, std in zip(model.layernorms().values(), model(IDX, return_stds=True)[2]):
        ln.std.fill_(std.mean().item())
        ln.gate.fill_(1)
    return model

IDX = torch.randint(0, 101, (4, 31), generator=torch.Generator().manual_seed(1))

def difference(a, b):
    return (a - b).abs().max().item()

def fails(said, function, *args):
    """It raises a UserError that says so."""
    with pytest.raises(UserError, match=said):
        function(*args)

def log_of(out_dir):
    """What a run did, without the clock."""
    entries = map(json.loads, Path(out_dir, 'log.jsonl').read_text().splitlines())
    return [{k: v for k, v in e.items() if k != 'tok_per_s'} for e in entries]

# -----------------------------------------------------------------------------
# Numerics and folding.

@pytest.mark.parametrize('shape', [{}, dict(n_embd=20, n_head=5, n_layer=1, vocab_size=257)])
def test_logits_equal_transformers_in_both_directions(shape, folder):
    ours = random_model(**shape)
    ours.save_pretrained('ours')
    theirs = load_stock('ours')
    assert difference(theirs(IDX).logits, ours(IDX)[0]) < 1e-5
    assert abs(ours(IDX[:, :-1], IDX[:, 1:])[1] - theirs(IDX, labels=IDX).loss) < 1e-5
    theirs = stock_model(**shape)
    theirs.save_pretrained('theirs', max_shard_size='20KB')     # in shards, as GPT-2 XL
    stale = {'transformer.wte.weight': torch.zeros_like(ours.wte.weight)}
    model.save_file(stale, 'theirs/model-00009-of-00009.safetensors')       # in no index
    ours = load('theirs')
    assert difference(theirs(IDX).logits, ours(IDX)[0]) < 1e-5
    assert ours.lm_head.weight is ours.wte.weight

def test_fake_with_gates_at_0_is_real():
    real = random_model()
    fake = GPT2.from_state(vars(real.config), real.state_dict(), 'test', 'fake').eval()
    assert len(fake.sites()) == 3 * 3 + 1
    assert difference(real(IDX)[0], fake(IDX)[0]) < 1e-6
    back = GPT2.from_state(vars(fake.config), fake.state_dict(), 'test', 'real').eval()
    assert difference(real(IDX)[0], back(IDX)[0]) == 0

def test_a_gate_moves_its_own_site_only_and_mixes_the_inverse_scales():
    model = random_model('fake')
    ln, x = model.h[1].ln_1, torch.randn(2, 5, 39) * 3 + 1
    kind = torch.tensor([[BOS, TOKEN, EOT, TOKEN, TOKEN]] * 2)
    ln.std[:] = torch.tensor([1.7, 5, 0.6])
    real = ln(x, kind)[0][0]
    model.sites()['h.1.ln_1.v'].fill_(0.25)
    qk, v = ln(x, kind)[0]
    assert torch.equal(qk, real)
    sigma = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    s = torch.tensor([5, 1.7, 0.6, 1.7, 1.7])[:, None]
    expected = (x - x.mean(-1, keepdim=True)) * (0.75 / sigma + 0.25 / s) * ln.weight + ln.bias
    assert difference(v, expected) < 1e-5
    # queries and keys read the one, values the other
    attn = model.h[1].attn
    (q, k, _), (_, _, value) = (attn.c_attn(z).view(2, 5, 3, 3, 13).permute(2, 0, 3, 1, 4)
                                for z in (qk, v))
    y = F.scaled_dot_product_attention(q, k, value, is_causal=True)
    expected = attn.c_proj(y.transpose(1, 2).reshape(2, 5, 39))
    assert difference(attn(qk, v), expected) < 1e-4 < difference(attn(qk, qk), expected)

def test_constants_are_the_means_over_tokens_of_a_kind():
    model = random_model('fake')
    eot, idx = model.config.eot_token_id, IDX % 100
    idx[:, [5, 20]] = idx[0, 0] = eot
    kinds = model.kinds(idx)
    assert kinds[0].tolist() == [EOT] + [TOKEN] * 4 + [EOT] + [TOKEN] * 14 + [EOT] + [TOKEN] * 10
    assert kinds[1, 0] == BOS
    forward, targets = lambda x: model(x, return_stds=True), idx.clone()
    targets[3, 7:] = -1     # these do not count
    stds = train.measure(forward, model, [(idx, targets), (idx[:1], idx[:1])])
    times = torch.tensor([2, 1, 1, 1])[:, None] * (targets != -1)
    for measured, exact in zip(stds, forward(idx)[2], strict=True):
        for kind in (TOKEN, BOS, EOT):
            weights = times * (kinds == kind)
            mean = (exact * weights).sum() / weights.sum()
            assert measured[kind].item() == pytest.approx(mean.item(), rel=1e-5)
    absent = train.measure(forward, model, [(idx[1:, :5], idx[1:, :5])])
    assert torch.equal(absent[:, EOT], absent[:, TOKEN])
    assert train.measure(forward, model, []).shape == stds.shape        # a rank has no batch

def test_folding_is_exact_and_leaves_no_layernorm_in_the_graph():
    from torch.fx.experimental.proxy_tensor import make_fx
    fake = remove_all(random_model('fake'))
    none = fake.fold_ln()
    assert none.config.ln_mode == 'none' and not [k for k in none.state_dict() if 'ln_' in k]
    logits = fake(IDX)[0]
    assert difference(logits, none(IDX)[0]) < 1e-4 < difference(logits, random_model()(IDX)[0])

    def ops(model):
        nodes = make_fx(lambda idx: model(idx)[0])(IDX).graph.nodes
        return {str(n.target).split('.')[1] for n in nodes if str(n.target).startswith('aten.')}
    divides = {'native_layer_norm', 'layer_norm', 'var', 'var_mean', 'rsqrt', 'sqrt', 'std',
               'mean', 'div'}
    assert ops(fake) & divides and not ops(none) & divides

@pytest.mark.parametrize('flag, dtype, eps, error', [
    ('', torch.float32, 1e12, 1e-4), ('--folded', torch.float32, 1e12, 1e-4),
    ('--float16', torch.float16, 1e8, 0.02)])
def test_a_model_without_layernorm_goes_through_transformers(flag, dtype, eps, error, folder):
    fake = remove_all(random_model('fake'))
    model.save_checkpoint('run', fake)
    here(f'model.py run hf {flag}')
    theirs = load_stock('hf', dtype=dtype)
    assert theirs.config.layer_norm_epsilon == eps
    assert difference(theirs(IDX).logits.float(), fake(IDX)[0]) < error
    ours = load('hf')
    assert ours.config.ln_mode == 'none' and difference(ours(IDX)[0], fake(IDX)[0]) < 1e-3
    fails('LayerNorm is gone', GPT2.from_pretrained, 'hf', 'fake')

def test_the_published_checkpoints_form_loads(folder):
    """apollo-research/gpt2_noLN as transformers holds it:
    blocks folded, with scales of 1e6; ln_f's own weight and bias; a tied head."""
    theirs = stock_model(layer_norm_epsilon=1e12)
    for name, p in theirs.named_parameters():
        scale = 1e6 if name.endswith('weight') else 1
        if '.ln_' in name:
            p.copy_(scale * (torch.randn(39) if 'ln_f' in name else p))
    theirs.save_pretrained('published')
    ours, logits = load('published'), theirs(IDX).logits
    assert ours.config.ln_mode == 'none'
    assert difference(ours(IDX)[0], logits) < 1e-4 * logits.abs().max()

def test_what_transformers_cannot_express_is_refused(folder):
    model = random_model('fake')
    model.save_pretrained('before')     # all gates 0: a stock GPT-2
    assert difference(load('before')(IDX)[0], model(IDX)[0]) < 1e-5
    model.sites()['h.0.ln_2'].fill_(1)
    fails('9 of 10 sites', model.save_pretrained, 'x')
    remove_all(model).ln_f.std[BOS] = 7
    fails('ln_f .* position 0', model.save_pretrained, 'x')
    fails('ln_f .* position 0', model.fold_ln)
    fails('mean', random_model('none').save_pretrained, 'x')
    assert not os.path.exists('x')

def test_another_replacement_is_a_subclass_in_a_config_file(folder, monkeypatch):
    random_model().save_pretrained('stock')
    monkeypatch.setattr(model, 'LayerNorm', model.LayerNorm)    # is put back
    train.load_config([str(REPO / 'experiments/variants/dyt.py')])
    fork = GPT2.from_pretrained('stock', 'fake').eval().requires_grad_(False)
    assert fork.h[0].ln_2.alpha == 0.5      # it begins fresh
    assert difference(fork(IDX)[0], random_model()(IDX)[0]) < 1e-6
    fork.h[0].ln_2.alpha.fill_(0.75)
    for gate in fork.sites().values():
        gate.fill_(1)
    model.save_checkpoint('run', fork)
    again = load('run')
    assert again.h[0].ln_2.alpha == 0.75 and torch.equal(again(IDX)[0], fork(IDX)[0])
    fails('no stock LayerNorm', fork.save_pretrained, 'x')      # that would be another function
    fails('no stock LayerNorm', fork.fold_ln)
    assert not os.path.exists('x')

# -----------------------------------------------------------------------------
# The schedule.

def small_fake(n_layer):
    return GPT2(GPT2Config(4, 9, n_layer, n_head=1, n_embd=4, ln_mode='fake'))

def test_the_papers_pace_event_by_event(workspace):
    cfg = train.load_config('config/remove_ln.py --start_eot=1060 --start_bos=1160 '
                            '--taper_iters=0'.split())
    expected = [*[(200 + 20 * i, 'remove', f'h.{i}.ln_2') for i in range(12)],
                *[(440 + 20 * i, 'remove', f'h.{i}.ln_1.qk') for i in range(12)],
                *[(680 + 30 * i, 'remove', f'h.{i}.ln_1.v') for i in range(12)],
                (1040, 'remove', 'ln_f'), (1060, 'merge', 'eot'), (1160, 'merge', 'bos')]
    assert train.schedule(cfg, 12) == expected
    model, logged = small_fake(12), []
    measured = iter(torch.rand(25, 25, 3) + 1)      # one for each LN: ln_1's two sides share it
    for it in range(cfg.max_iters):
        logged += train.apply_schedule(expected, cfg, it, model, lambda: next(measured))
        removed = sum(when <= it for when, what, _ in expected if what == 'remove')
        assert sum(gate.item() for gate in model.sites().values()) == removed
        if it == 1100:      # end-of-text is merged, position 0 not yet
            stds = torch.stack([ln.std for ln in model.layernorms().values()]).T
            assert torch.equal(stds[EOT], stds[TOKEN]) and (stds[BOS] != stds[TOKEN]).all()
    assert [(e['iter'], e['event'], e.get('site') or e['kind']) for e in logged] == expected
    std = {e['site']: e['std'] for e in logged if e['event'] == 'remove'}
    assert std['h.3.ln_1.qk'] == std['h.3.ln_1.v'] != std['h.3.ln_2']
    assert next(measured, None) is None and model.fold_ln().config.ln_mode == 'none'

def test_a_taper_fades_gates_and_merges_and_ends_exactly(workspace):
    cfg = train.load_config(['remove.py', '--taper_iters=4'])
    events, model = train.schedule(cfg, 2), small_fake(2)
    gates, stds = [], []
    for it in range(17):
        train.apply_schedule(events, cfg, it, model, lambda: torch.tensor([[2.0, 10, 4]] * 5))
        gates.append(model.sites()['h.0.ln_2'].item())
        stds.append(model.h[0].ln_2.std.tolist())
    assert gates == [0, 0, 1 / 16, 4 / 16, 9 / 16] + [1] * 12
    # a merge mixes the inverses, in the same shares: eot's from iteration 11, bos's from 13
    mixed = lambda std, k: 1 / ((16 - k * k) / 16 / std + k * k / 16 / 2)
    expected = [[2, mixed(10, min(max(it - 12, 0), 4)), mixed(4, min(max(it - 10, 0), 4))]
                for it in range(2, 17)]
    assert torch.allclose(torch.tensor(stds[2:]), torch.tensor(expected), rtol=1e-6)
    model.h[0].ln_2.std[:] = torch.tensor([0.768, 33000.7, 4.0])    # where rounding leaves a rest
    for it in range(13, 17):
        train.apply_schedule(events, cfg, it, model, None)
    assert model.h[0].ln_2.std[BOS] == model.h[0].ln_2.std[TOKEN]
    fails('removes h.0.ln_2 twice', train.check_schedule, events + events[:1], cfg, {})

@pytest.mark.parametrize('name, layers, start, gap, published', [
    ('fast', 12, 20, 2, [6e-4, 3e-4, 25, 0.1, 300, 300]),
    ('medium', 24, 20, 2, [6e-4, 3e-4, 10, 0.1, 500, 500]),
    ('large', 36, 30, 4, [3e-4, 4e-5, 15, 0.03, 600, 1200]),
    ('xl', 48, 50, 4, [1e-4, 2e-5, 20, 0.01, 800, 1200])])
def test_the_follow_ups_settings_are_the_published_ones(
        name, layers, start, gap, published, workspace):
    for more in (['config/control.py'], []):
        cfg = train.load_config([f'config/remove_ln_{name}.py', *more])
        train.check_config(cfg)
        assert [cfg.learning_rate, cfg.min_lr, cfg.warmup_iters, cfg.aux_loss_weight,
                cfg.max_iters, cfg.lr_decay_iters] == published and cfg.remove_ln == (not more)
        assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.grad_clip) == (0.01, 0.9, 0.999, 1)
    events = train.schedule(cfg, layers)
    train.check_schedule(events, cfg, {})
    when = {site: it for it, event, site in events}
    last = start + 2 * layers * gap     # one side of all layers after the other
    assert [when['h.0.ln_2'], when['h.1.ln_1.qk']] == [start, start + (layers + 1) * gap]
    assert [when['h.2.ln_1.v'], when['ln_f']] == [last + 3 * gap, last + layers * gap * 3 // 2]

def test_the_warning_knows_what_a_schedule_does_to_a_giant_vector(workspace):
    lns = ['h.0.ln_1', 'h.0.ln_2', 'h.1.ln_1', 'h.1.ln_2', 'ln_f']
    ratios = {'bos': dict(zip(lns, [2, 1, 40, 42, 11])), 'eot': dict.fromkeys(lns, 3.0)}

    def warned(key):
        cfg = train.load_config(['remove.py', key])
        return train.warnings_of(train.schedule(cfg, 2), cfg, ratios)
    line, = warned('--taper_iters=0')
    assert re.search(r'iteration 13 .* position 0 .* 42 .*h.1.ln_2.*taper_iters=21', line)
    assert warned('--taper_iters=20') == [] and warned('--start_bos=-1') == []
    assert 'iteration 3 ' in warned('--start_bos=0')[0]     # no special constants: with h.1.ln_2

# -----------------------------------------------------------------------------
# Training runs.

def test_one_training_graph_and_one_evaluation_graph_over_a_whole_removal(workspace):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    here(f'train.py {TINY} remove.py --out_dir=compiled --n_layer=1 --eval_interval=4 '
         '--compile=True --aux_loss_weight=0.1 --taper_iters=2')
    assert counters['stats']['unique_graphs'] == 2 and not counters['graph_break'], counters
    assert not counters['recompiles']
    assert [e['event'] for e in log_of('compiled')].count('remove') == 4

def assert_close(a, b):
    assert [(e['event'], e['iter']) for e in a] == [(e['event'], e['iter']) for e in b]
    for x, y in zip(a, b):
        for k in ('loss', 'val_loss'):
            assert x.get(k, 0) == pytest.approx(y.get(k, 0), rel=2e-5)
        assert x.get('std', {}) == pytest.approx(y.get('std', {}), rel=1e-4)

def test_how_a_batch_is_cut_changes_no_loss(workspace):
    """Not with the auxiliary loss either, nor when blocks are computed again."""
    for name, more in (('cut4', ''), ('cut1', '--batch_size=1'),
                       ('cut8', '--batch_size=8 --gradient_checkpointing=True')):
        here(f'train.py {TINY} remove.py --out_dir={name} --aux_loss_weight=1.0 {more}')
        assert_close(log_of(name), log_of('cut4'))

def test_no_device_synchronisation_in_a_plain_step(workspace, monkeypatch):
    """Only logged iterations (0, 50, 99) and the evaluations (0, 100) may read a value back."""
    seen = []

    def spy_on(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name,
                            lambda *args, **kw: seen.append(name) or original(*args, **kw))
    for name in ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__'):
        spy_on(torch.Tensor, name)
    spy_on(torch.optim.AdamW, 'step')
    here(f'train.py {TINY} --out_dir=nosync --max_iters=100 --eval_interval=100 --log_interval=50')
    steps = ' '.join(seen).split('step')
    assert len(steps) == 101 and [i for i, s in enumerate(steps) if s.strip()] == [0, 1, 51, 100]

def opened(keys):
    data = train.Data(train.load_config(['tiny.py', 'shape.py', *keys.split()]), 'cpu')
    data.open(257, ['train', 'val'])
    return data

def test_evaluation_predicts_every_token_once_whatever_the_batch(workspace):
    model, expected = load('run'), []
    tokens = torch.from_numpy(np.fromfile('data/tiny/val.bin', np.uint16).astype(np.int64))
    for window in (tokens[i:i + 33] for i in range(0, len(tokens) - 1, 32)):
        logits = model(window[None, :-1])[0][0]
        expected += F.cross_entropy(logits, window[1:], reduction='none').tolist()
    assert len(expected) == len(tokens) - 1
    for batch_size in (3, 7):
        data = opened(f'--batch_size={batch_size} --eval_iters=0')
        losses = train.token_losses(model, data)[0]
        assert np.abs(losses[~np.isnan(losses)] - expected).max() < 1e-5
        data.cfg.eval_iters = 10        # spread over all of it
        spread = losses[np.arange(10) * len(losses) // 10]
        assert np.allclose(train.token_losses(model, data)[0], spread, atol=1e-5)
        # of windows cut elsewhere, the first token is not predicted from the text before it
        data.cfg.eval_iters, data.meta['window'] = 0, 40
        fewer = train.token_losses(model, data)[0].ravel()[:len(expected)]
        assert np.flatnonzero(np.isnan(fewer)).tolist() == list(range(39, len(expected), 40))

def test_statistics_of_an_evaluation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 100)) + rng.normal(size=(400, 1)) * 2 + 5     # the 2nd: a window's
    a[-1, 70:] = np.nan
    mean, error = train.mean_and_error(a)
    assert mean == pytest.approx(np.nanmean(a)) and error == pytest.approx(2 / 20, rel=0.1)
    rows = [line.split() for line in train.loss_table({'a': a, 'b': a - 1}, 'token').splitlines()]
    assert rows[2][:3] == ['all', '39,970', f'{mean:.4f}'] and rows[2][-1] == f'{np.nanmax(a):.4f}'
    assert [row[-6] for row in rows[3:6]] == ['400', '25,200', '14,370']    # by place in a window
    assert float(rows[12][2]) == pytest.approx(1) and float(rows[12][3]) < 1e-6
    # half the predictions have confidence 0.9 and are right in 0.6 of cases, half are calibrated
    right = np.r_[np.arange(500) % 5 < 3, np.arange(500) % 2 < 1]
    table = np.stack([np.ones(1000), np.full(1000, 0.7), np.repeat([0.9, 0.5], 500), right])
    assert train.calibration(table.reshape(4, 10, 100)) == pytest.approx((0.15, 0.7))

def test_evaluation_compares_two_models_on_any_number_of_processes(workspace, capsys):
    line = 'train.py config/eval.py --init_from=run --control=other --dataset=tiny --batch_size=3'
    capsys.readouterr()
    here(line)
    one = capsys.readouterr().out
    assert one.strip() in finished(start(line, nproc=2))
    losses = [train.token_losses(load(name), opened('--eval_iters=0'))[0]
              for name in ('run', 'other')]
    means = [np.nanmean(table, dtype=np.float64) for table in losses]
    assert f'val loss {means[0]:.4f} nats per byte' in one and one.count('ECE') == 2
    difference = re.findall(r'  all +[\d,]+ +(\S+)', one)[2]
    assert float(difference) == pytest.approx(means[0] - means[1], abs=1.1e-4)

def test_batches_are_a_function_of_seed_and_iteration_however_they_are_cut(workspace):
    def batches(it, batch_size=4, seed=1):
        data = opened(f'--batch_size={batch_size} --seed={seed}')
        rows = [torch.cat(data.batch(it, m), 1) for m in range(512 // 32 // batch_size)]
        assert all(torch.equal(r[:, 1:32], r[:, 32:-1]) for r in rows)    # targets: inputs, one on
        return torch.cat(rows)
    assert torch.equal(batches(3), batches(3, batch_size=8))
    assert not torch.equal(batches(3), batches(4))
    assert not torch.equal(batches(3), batches(3, seed=2))
    assert len({tuple(r) for r in batches(3).tolist()}) > 12

# -----------------------------------------------------------------------------
# Ranks, resuming, and what goes wrong in a night.

@pytest.fixture(scope='session')
def whole(workspace):
    """What an uninterrupted run of one process did."""
    finished(start(f'train.py {LONG} --out_dir=whole'))
    return log_of('whole')

def wait_for(out_dir, n, process):
    """Until the run has logged n training steps."""
    log = Path(out_dir, 'log.jsonl')
    while not log.exists() or log.read_text().count('"train"') < n:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)

def kill_after(n, line):
    process = start(line)
    wait_for('killed', n, process)
    process.kill()
    process.wait()

def test_killed_and_resumed_on_any_number_of_processes_gives_the_same_losses(whole):
    three = start(f'train.py {LONG} --out_dir=three', nproc=3)      # four micro-batches: uneven
    kill_after(12, f'train.py {LONG} --out_dir=killed')
    assert os.path.exists('killed/ckpt.pt') and log_of('killed')[-1]['iter'] < 39
    shutil.copytree('killed', 'killed2')
    again = f'train.py {LONG} --init_from=resume --out_dir=killed'
    kill_after(27, again)
    two = start(f'{again}2', nproc=2)
    assert 'LN-free' in finished(start(again)) and log_of('killed') == whole    # to the last bit
    assert torch.equal(load('killed/hf').lm_head.weight, load('whole/hf').lm_head.weight)
    for process, out_dir in ((two, 'killed2'), (three, 'three')):
        finished(process)
        assert_close(log_of(out_dir), whole)
    Path('killed/hf/README.md').write_text('my own words')      # kept when resumed after its end
    finished(start(again))
    aside, = Path('killed').glob('hf.*')
    assert (aside / 'README.md').read_text() == 'my own words'
    assert 'scratch' in Path('killed/hf/README.md').read_text()

@pytest.mark.parametrize('module, name', [(torch, 'save'), (os, 'fsync'), (os, 'replace')])
def test_killed_while_a_checkpoint_is_written_the_last_one_is_there(module, name, folder):
    def die(*args):
        if name == 'save':
            Path(args[1]).write_bytes(b'PK half of it')
        os.kill(os.getpid(), signal.SIGKILL)
    model.save_checkpoint('.', random_model(), iter=1)
    if (pid := os.fork()) == 0:
        setattr(module, name, die)
        model.save_checkpoint('.', random_model(), iter=2)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert model.load_checkpoint('.')['iter'] == 1
    model.save_checkpoint('.', random_model(), iter=2)
    assert model.load_checkpoint('.')['iter'] == 2 and os.listdir('.') == ['ckpt.pt']

def test_signals_finish_the_iteration_and_save(workspace):
    for number, nproc in ((signal.SIGINT, 1), (signal.SIGTERM, 2)):
        out_dir = f'stopped{nproc}'
        process = start(f'train.py {LONG} --out_dir={out_dir}', nproc=nproc)
        wait_for(out_dir, 5, process)
        process.send_signal(number)
        output = finished(process, 128 + number if nproc == 1 else 1)
        it = model.load_checkpoint(out_dir)['iter']
        assert 5 <= it < 40 and f'saved after iteration {it - 1};' in output, output

def test_a_fault_of_one_rank_is_told_by_it(workspace):
    """Rank 1 alone has no data, before the run begins: one line, and rank 0 does not hang."""
    put({'rank.py': "import os\nif os.environ['RANK'] == '1': dataset = 'missing'"})
    process = start(f'train.py {TINY} rank.py --out_dir=never', nproc=2)
    assert finished(process, status=1).count('no data/missing') == 1
    assert not os.path.exists('never')

def test_a_full_disk_leaves_the_last_checkpoint(workspace):
    shutil.copytree('run', 'full')
    kept = Path('full/ckpt.pt').read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, len(kept) // 2))
    process = start(f'train.py {TINY} --out_dir=full --init_from=resume', preexec_fn=limit)
    line = finished(process, status=2).splitlines()[-1]
    assert line.startswith('train.py: ') and 'ckpt.pt' in line
    assert Path('full/ckpt.pt').read_bytes() == kept and not list(Path('full').glob('*partial'))

@pytest.mark.parametrize('max_iters, loss, norm, said', [
    (60, 9, 1, 'since iteration 18 the loss'), (20, 9, 1, 'since iteration 18 the loss'),
    (60, 1, np.nan, 'gradient of iteration 18 is not finite')])
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(
        max_iters, loss, norm, said, workspace, capsys, monkeypatch, tmp_path):
    out, bad = tmp_path / 'out', (torch.tensor(float(loss)), torch.tensor(float(norm)), [])
    line = f'train.py {TINY} remove.py --out_dir={out} --eval_interval=4 --guard_patience=8'
    here(line)
    kept = (out / 'ckpt.pt').read_bytes()
    shutil.rmtree(out / 'hf')
    monkeypatch.setattr(train, 'step', lambda cfg, it, *args: (
        bad if it >= 18 else (torch.tensor(1.0), torch.tensor(1.0), [])))
    error = refused(f'{line} --init_from=resume --max_iters={max_iters}', capsys)
    assert said in error and 'merge bos at iteration 13' in error and f'{out}/ckpt.pt' in error
    assert (out / 'ckpt.pt').read_bytes() == kept and not (out / 'hf').exists()

# -----------------------------------------------------------------------------
# The hard case: a model with GPT-2's giant vector, and what a removal hands over.

@pytest.fixture(scope='session')
def standin(workspace):
    """The command of config/remove_ln.py, scaled, on experiments/standin.py's model, trained for a
    moment; its control is there."""
    sys.path.insert(0, str(REPO / 'experiments'))
    import standin
    standin.SIZE = 180.0        # in so short a training it shrinks less
    standin.main(['standin', '--n_layer=3', '--n_embd=96', '--block_size=64'])
    here('train.py tiny.py --init_from=standin --out_dir=giant --max_iters=200 --batch_size=16 '
         '--batch_tokens=1024 --warmup_iters=10 --learning_rate=2e-3 --min_lr=2e-4')
    # a sixth of the paper's iterations, 3 layers for its 12
    put({'scaled.py': """dataset, init_from, batch_size, batch_tokens = 'tiny', 'giant', 16, 1024
max_iters, warmup_iters, lr_decay_iters, eval_iters = 200, 16, 333, 200
start_ln2, start_ln1qk, start_ln1v, start_lnf = 33, 73, 113, 173
gap_ln2, gap_ln1qk, gap_ln1v, taper_iters = 13, 13, 20, min(taper_iters, 16)"""})
    line = 'train.py tiny.py config/remove_ln.py scaled.py'
    here(f'{line} config/control.py')
    return line

@pytest.fixture(scope='session')
def flagship(standin):
    """What that command printed; it wrote out/remove_ln."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        here(f'{standin} --control=out/remove_ln/control')
    return out.getvalue()

def val_losses(out_dir):
    return np.array([e['val_loss'] for e in train.read_log(out_dir, 'eval')])

def test_the_flagship_survives_the_giant_vector_and_the_papers_text_does_not(
        standin, flagship, capsys):
    def worst(out_dir):     # the most that a batch's loss was above the control's
        logs = [[e['loss'] for e in train.read_log(d, 'train')]
                for d in (out_dir, 'out/remove_ln/control')]
        return np.subtract(*logs).max()
    before, after = (max(e['bos'].values()) for e in train.read_log('out/remove_ln', 'giant'))
    assert before > 15 and after < before / 3 and 'warning' not in flagship     # it is undone
    assert f'{before:.1f} before, {after:.1f} after' in flagship
    gap = val_losses('out/remove_ln')[-1] - val_losses('out/remove_ln/control')[-1]
    assert worst('out/remove_ln') < 2 and gap < 0.25, (worst('out/remove_ln'), gap)
    assert f'{gap:+.4f}' in flagship and 'LN-free' in flagship
    # the paper's text: special constants, merged late, in one iteration each
    here(f'{standin} --out_dir=text --taper_iters=0 --start_eot=176 --start_bos=193 '
         '--guard_nats=0')
    assert 'warning: at iteration 193 ' in capsys.readouterr().out and worst('text') > 20

def test_a_partial_removal_ends_with_its_checkpoint(standin, capsys):
    here(f'{standin} --start_ln1qk=-1 --start_ln1v=-1 --start_lnf=-1 --max_iters=120 '
         '--out_dir=partial')
    out = capsys.readouterr().out
    assert re.search(r'LN removed +\d\.\d+ +7\n', out) and '7 of 10 sites' in out
    assert not os.path.exists('partial/hf') and os.path.exists('partial/loss.png')
    assert len(load('partial').sites_left()) == 7
    # what is trained from it, without more removal, stays so
    kept = f'{standin} --remove_ln=False --out_dir=kept --warmup_iters=5'
    here(f'{kept} --init_from=partial --max_iters=10')
    here(f'{kept} --init_from=resume --max_iters=12')
    assert len(load('kept').sites_left()) == 7 and log_of('kept')[-1]['iter'] == 12

def test_the_readmes_snippets_and_the_handed_over_folder(flagship):
    """Each snippet runs, and what it calls logits is what our own model computes;
    generation through transformers' cache too."""
    shutil.copytree('out/remove_ln/hf', 'out/demo/hf')
    ours = load('out/remove_ln')
    readme = (REPO / 'README.md').read_text()
    snippets = re.findall(r'```python\n((?:import|from) .*?)```', readme, re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        put({'snippet.py': snippet})
        names = runpy.run_path('snippet.py')
        assert difference(names['logits'], ours(names['idx'])[0]) < 3e-4
    assert {*os.listdir('out/demo/hf')} == {
        'README.md', 'config.json', 'generation_config.json', 'model.safetensors',
        'tokenizer.json', 'tokenizer_config.json'}
    card = Path('out/demo/hf/README.md').read_text()
    losses = [*val_losses('out/remove_ln')[[0, -1]], val_losses('out/remove_ln/control')[-1]]
    assert all(f'| {loss:.4f} |' in card for loss in losses)
    assert 'float16' in card and 'giant' in card and '3 layers' in card
    encoded = names['tokenizer']('import os<|endoftext|>', return_tensors='pt')
    assert {*encoded} == {'input_ids', 'attention_mask'}
    assert encoded['input_ids'].tolist() == [[*b'import os', 256]]
    prompt = encoded['input_ids'][:, :-1]
    text = names['model'].generate(prompt, max_new_tokens=40, do_sample=False)
    assert torch.equal(text, ours.generate(prompt, 40, temperature=0))

def test_nothing_at_the_end_can_cost_the_model(workspace, monkeypatch):
    """A terminal of ASCII, a table, a card and a picture that fail: hf/ is there."""
    def bad(*args, **kwargs):
        raise ValueError('no')
    for name in ('print_table', 'write_card', 'plot'):
        monkeypatch.setattr(train, name, bad)
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), 'ascii')) as out:
        here(f'train.py {TINY} remove.py --out_dir=é文')
    text = out.buffer.getvalue().decode()
    assert load('é文/hf') and text.count('report failed (no)') == 3 and r'\xe9' in text

# -----------------------------------------------------------------------------
# What users bring: models.

@pytest.fixture
def hub(folder):
    """A server on localhost that speaks the hub's protocol -> (repos, downloads, environment).

    repos: {'/me/model' or '/datasets/me/name': {branch: {file: bytes}}}. downloads: the paths of
    the files that were asked for. If one has 'flaky' in it, the first two break off halfway.
    """
    repos, downloads = {}, []

    def look_up(path):
        """-> (commit, body). Raises KeyError for what is not there."""
        name, what, revision, place = re.fullmatch(
            '(?:/api)?(?:/models)?((?:/datasets)?/[^/]+/[^/]+)'
            '(?:/(revision|tree|resolve)/([^/]+)/?(.*))?', path).groups()
        for n, (branch, files) in enumerate(repos[name].items()):
            commit = f'{n:040x}'
            if unquote(revision or branch) in (branch, commit):
                break
        if what == 'resolve':
            return commit, files[place]
        page = {'id': name, 'sha': commit, 'siblings': [{'rfilename': f} for f in files]}
        if what == 'tree':
            folders = {str(parent) for f in files for parent in Path(f).parents} - {'.'}
            page = [{'type': 'file', 'path': f, 'oid': f, 'size': len(files[f])} for f in files]
            page += [{'type': 'directory', 'path': f, 'oid': f} for f in folders]
        return commit, json.dumps(page).encode()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, status = self.path.partition('?')[0], 200
            if '/resolve/' in path and self.command == 'GET':
                downloads.append(path)
            try:
                commit, body = look_up(path)
            except KeyError:
                commit, body, status = '', b'', 404
            headers = {'ETag': f'"{hash(body)}"', 'X-Repo-Commit': commit,
                       'X-Error-Code': 'EntryNotFound'}     # is read with a 404 only
            part = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
            if part and body:
                first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
                headers['Content-Range'] = f'bytes {first}-{last}/{len(body)}'
                body, status = body[first:last + 1], 206
            self.send_response(status)
            for name, value in (headers | {'Content-Length': str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == 'GET':
                self.close_connection = 'flaky' in path and 1 <= downloads.count(path) <= 2
                self.wfile.write(body[:len(body) // (1 + self.close_connection)])
        do_HEAD = do_GET

    Hub.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield repos, downloads, {
        'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HUB_OFFLINE': '0',
        'HF_HOME': os.path.abspath('cache'), 'PYTHONPATH': str(REPO)}
    server.shutdown()

def test_from_pretrained_downloads_from_a_hub(hub):
    repos, downloads, env = hub
    ours = random_model()
    ours.save_pretrained('repo', {'tokenizer.json': b'{}', 'pytorch_model.bin': b'a pickle'})
    repos['/me/tiny'] = {'main': {f.name: f.read_bytes() for f in Path('repo').iterdir()}}
    finished(start('model.py me/tiny copy', env=env))
    assert difference(load('copy')(IDX)[0], ours(IDX)[0]) == 0
    assert Path('copy/tokenizer.json').read_bytes() == b'{}' and 'bin' not in str(downloads)
    out = finished(start('model.py me/nothing x', env=env), status=2)
    assert 'me/nothing' in out and out.count('\n') == 1

class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)

def test_checkpoints_of_other_savers(folder):
    """Each computes what transformers computes from the same folder, or is refused."""
    theirs = stock_model()
    theirs.save_pretrained('saved')
    os.remove('saved/model.safetensors')
    sd, logits = theirs.state_dict(), theirs(IDX).logits
    renamed = lambda change: {change(k): v for k, v in sd.items()}
    without = lambda part: {k: v for k, v in sd.items() if part not in k}
    for good in (sd, without('lm_head'), without('wte'), renamed(lambda k: 'module.' + k),
                 renamed(lambda k: '_orig_mod.' + k),
                 renamed(lambda k: k.replace('transformer.', '')),
                 sd | {'transformer.h.0.attn.bias': torch.ones(1, 1, 31, 31)}):
        torch.save(good, 'saved/pytorch_model.bin')
        assert difference(load('saved')(IDX)[0], logits) < 1e-5
    for bad, said in ((sd | {'lm_head.weight': sd['lm_head.weight'] + 1}, 'differ'),
                      (sd | {'score.weight': torch.ones(2)}, 'score.weight'),
                      (without('ln_f'), 'ln_f'), (Evil(), 'damaged')):
        torch.save(bad, 'saved/pytorch_model.bin')
        fails(said, load, 'saved')
    for bad, said in (({'model': sd, 'iter_num': 3, 'model_args': {}}, 'nanoGPT'),
                      ({'model': Evil()}, 'damaged')):
        torch.save(bad, 'saved/ckpt.pt')
        fails(said, load, 'saved')
    assert not os.path.exists('ran')

@pytest.mark.parametrize('change', [
    dict(n_layer=10 ** 9), dict(n_embd=3 * 10 ** 18, n_head=3), dict(n_positions=-1),
    dict(vocab_size=2 ** 70), dict(n_embd='39'), dict(model_type='llama'),
    dict(activation_function='gelu'), dict(n_inner=7), dict(tie_word_embeddings='no'),
    dict(scale_attn_by_inverse_layer_idx=True), dict(layer_norm_epsilon=-1)], ids=str)
def test_a_hostile_config_is_refused_at_once(change, folder):
    random_model().save_pretrained('hostile')
    config, t0 = read_json('hostile/config.json') | change, time.time()
    put({'hostile/config.json': json.dumps(config)})
    fails('.', load, 'hostile')
    assert time.time() - t0 < 5

@pytest.fixture
def german(workspace):
    """A GPT-2 folder with a tokenizer of its own:
    300 tokens, end-of-text 0, a pad token, a chat template."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([(REPO / 'README.md').read_text()], vocab_size=300,
                            special_tokens=['</s>', '<pad>'], show_progress=False)
    own = {'tokenizer.json': bpe.to_str().encode(), 'chat_template.jinja': b'{{ x }}',
           'generation_config.json': b'{"pad_token_id": 1}'}
    model = random_model(vocab_size=300, block_size=32)
    model.config.hf = dict(bos_token_id=0, eos_token_id=[0, 5], pad_token_id=1)
    model.save_pretrained('german', own)
    return bpe, own

def test_a_models_own_tokenizer_is_used_and_handed_on(german, capsys):
    bpe, own = german
    put({'t.txt': 'Grüße </s> <|endoftext|> and some more text ' * 400})
    here('prepare.py t.txt --tokenizer=german --val_fraction=0.2')
    meta = read_json('data/t/meta.json')
    ids = np.concatenate([np.fromfile(f'data/t/{s}.bin', np.uint16) for s in ('train', 'val')])
    assert (meta['vocab_size'], meta['eot']) == (300, 0) and (ids == 0).sum() == 1
    assert bpe.decode(ids[:-1].tolist()) == Path('t.txt').read_text()
    # a model that brings none is handed over with that of its data, not with one of a dead run
    shutil.copytree('german', 'bare', ignore=shutil.ignore_patterns('tokenizer.json'))
    put({'bare_run/tokenizer/vocab.json': '{}', 'bare_run/log.jsonl': ''})
    for name in ('german', 'bare'):
        here(f'train.py tiny.py remove.py --dataset=t --init_from={name} --out_dir={name}_run')
        assert own == {file: Path(f'{name}_run/hf', file).read_bytes() for file in own}
    assert not os.path.exists('bare_run/tokenizer/vocab.json')
    ids = {'bos_token_id': 0, 'eos_token_id': [0, 5], 'pad_token_id': 1}
    assert ids.items() <= read_json('german_run/hf/config.json').items()
    # a folder of a tokenizer alone
    put({'alone/tokenizer.json': own['tokenizer.json'],
         'alone/tokenizer_config.json': '{"eos_token": {"content": "</s>"}}'})
    assert prepare.get_tokenizer('alone').eot == 0
    # data of another tokenizer is refused, though it has as many tokens
    shutil.copytree('data/tiny', 'data/foreign')
    meta = read_json('data/tiny/meta.json') | {'vocab_size': 300}
    put({'data/foreign/meta.json': json.dumps(meta)})
    for more in ('--out_dir=never', '--eval_only=True'):
        line = f'train.py tiny.py --dataset=foreign --init_from=german {more}'
        assert '--tokenizer=german' in refused(line, capsys) and not os.path.exists('never')

@pytest.fixture
def gpt2():
    try:
        return prepare.get_tokenizer('gpt2')
    except UserError as e:
        pytest.skip(str(e))

def test_gpt2_with_added_tokens_takes_gpt2s_data(gpt2):
    own = gpt2.vocab()
    more = own | {'<pad>': 50257, '<user>': 50258}
    swapped = own | {'the': own['Ġthe'], 'Ġthe': own['the']}
    hashes = [prepare.fingerprint(vocab, 50257) for vocab in (own, more, swapped)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert prepare.KNOWN[prepare.fingerprint(own, 65536)] is prepare.GPT2BPE

def test_tokenizer_files_equal_tiktoken(folder, gpt2):
    put(prepare.tokenizer_files(gpt2))
    tokenizer = transformers.AutoTokenizer.from_pretrained('.')
    for text in [*NASTY, (REPO / 'test_model.py').read_text()]:
        ids = gpt2.bpe.encode(text, allowed_special='all')
        assert tokenizer(text)['input_ids'] == ids and tokenizer.decode(ids) == text

# -----------------------------------------------------------------------------
# HellaSwag.

def question(ctx_a='A man sits. He', ctx_b='', label=0,
             endings=('goes.', 'naïve 文字 “quote”.', 'no', 'is [title] Here [step] it  ends. ')):
    return {'activity_label': 'Sitting', 'ctx_a': ctx_a, 'ctx_b': ctx_b,
            'ctx': f'{ctx_a} {ctx_b}'.strip(), 'endings': [*endings], 'label': label}

QUESTIONS = [question(label=2), question('Then, the man.', 'the Woman', 2),
             question('[header] How to do [title] Begin. [step] Now [substeps]', '', '2'),
             question('long ' * 60, 'end', 2, ('x', 'longer ' * 5, '[step]', 'é🙂')),
             question(endings=('y ' * 40, 'a', 'b', 'c'), label=3)]

def test_hellaswag_texts_of_both_conventions():
    texts = eval_hellaswag.texts
    endings = ['goes.', 'naïve 文字 “quote”.', 'no']
    assert texts(QUESTIONS[1], 'completion') == (
        'Then, the man. the Woman', [*endings, 'is [title] Here [step] it  ends. '])
    assert texts(QUESTIONS[1], 'harness') == (
        'Sitting: Then, the man. The woman', [*endings, 'is. Here it ends.'])
    assert texts(QUESTIONS[2], 'harness')[0] == 'Sitting: How to do. Begin. Now '

def test_hellaswag_scores_equal_one_ending_at_a_time(workspace):
    model = random_model(block_size=64, vocab_size=257)
    model.save_pretrained('hs')
    put({'hs.jsonl': '\n'.join(map(json.dumps, QUESTIONS))})
    for n in (1, 2):
        line = f'eval_hellaswag.py hs --data=hs.jsonl --device=cpu --json=hs{n}.json'
        assert 'lost some on the left: 3' in finished(start(line, nproc=n))
    one = read_json('hs1.json')
    assert one == read_json('hs2.json') and one['questions'] == 5 and one['truncated'] == 3
    right = dict.fromkeys(('acc', 'acc_norm', 'harness_acc', 'harness_acc_norm'), 0)
    for q, found in zip(QUESTIONS, one['scores'], strict=True):
        for style, prefix, unit in (('completion', '', 'tokens'),
                                    ('harness', 'harness_', 'characters')):
            context, endings = eval_hellaswag.texts(q, style)
            # the harness gives the spaces at the context's end to the ending
            head = context.rstrip() if style == 'harness' else context
            sums, lengths = [], []
            for ending in endings:
                ids = f'{context} {ending}'.encode()
                n = min(len(ids) - len(head.encode()), 64)
                ids = torch.tensor([*ids[-65:]])[:, None]
                logp = model(ids[None, :-1, 0])[0][0].log_softmax(-1).gather(1, ids[1:])
                sums.append(logp[-n:].sum().item())
                lengths.append(n if style == 'completion' else len(ending))
            assert found[style]['loglikelihood'] == pytest.approx(sums, abs=1e-3)
            assert found[style][unit] == lengths
            means = [s / n if n else -np.inf for s, n in zip(sums, lengths)]
            right[prefix + 'acc'] += np.argmax(sums) == int(q['label'])
            right[prefix + 'acc_norm'] += np.argmax(means) == int(q['label'])
    assert {name: one[name] for name in right} == {name: n / 5 for name, n in right.items()}
    assert len({*right.values()}) == 4      # none could be taken for another
    assert one['acc_stderr'] == pytest.approx((one['acc'] * (1 - one['acc']) / 4) ** 0.5)

def test_the_questions_are_downloaded_whole_or_not_at_all(hub, monkeypatch):
    repos, downloads, env = hub
    questions = [question(label=i % 4) for i in range(eval_hellaswag.QUESTIONS)]
    body = '\n'.join(map(json.dumps, questions)).encode()
    repos['/me/hs'] = {'main': {'flaky': body, 'short': json.dumps(question()).encode(),
                                'bad': body.replace(b'"label": 3', b'"label": 4')}}
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    url = f"{env['HF_ENDPOINT']}/me/hs/resolve/main/"
    fails('label is 4', eval_hellaswag.download, url + 'bad', 'data/q.jsonl')
    fails('1 questions, expected 10042', eval_hellaswag.download, url + 'short', 'data/q.jsonl')
    fails('404', eval_hellaswag.download, url + 'nothing', 'data/q.jsonl')
    assert len(downloads) == 5 + 5 + 1      # what is not there is asked for once
    assert not os.path.exists('data/q.jsonl')
    eval_hellaswag.download(url + 'flaky', 'data/q.jsonl')
    assert Path('data/q.jsonl').read_bytes() == body and os.listdir('data') == ['q.jsonl']

# -----------------------------------------------------------------------------
# What users bring: text.

def documents_of(name, split='train', eot=256):
    """The documents in a bin, each with its end-of-text."""
    ids = np.fromfile(f'data/{name}/{split}.bin', np.uint16)
    parts = np.split(ids, np.flatnonzero(ids == eot) + 1)
    assert not len(parts[-1])
    return [part.tolist() for part in parts[:-1]]

NASTY = ['plain text, and  two  spaces', '', '<|endoftext|> is ordinary text here',
         'naïve 文字 🙂 \u200b\n\n\t x', ' ' * 50, "don't I'll we've", '\r\nwindows\r\n']

def parquet(texts):
    f = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), f)
    return f.getvalue()

def test_bins_equal_tiktoken(folder, capsys, gpt2):
    big, rows = (REPO / 'train.py').read_text() * 20, [*NASTY, 'a lone \ud800 surrogate']
    lines = [json.dumps({'text': text}) for text in [*rows, None]]
    put({'corpus/big.TXT': big, 'corpus/deep/a.jsonl': '\n'.join(lines) + '\n\n',
         'corpus/p.parquet': parquet(NASTY)})
    here('prepare.py corpus --name=bpe --val_fraction=0')
    expected = [gpt2.bpe.encode_ordinary(text) + [50256] for text in [big, *rows, *NASTY]]
    assert documents_of('bpe', eot=50256) == expected
    out, meta = capsys.readouterr().out, read_json('data/bpe/meta.json')
    assert '1 .txt' in out and '1 .jsonl' in out
    assert '1 rows without text' in out and '2 times <|endoftext|>' in out
    assert meta['tokenizer'] == 'gpt2' and meta['train']['documents'] == len(expected)
    here('prepare.py corpus --name=bpe --val_fraction=0 --max_tokens=5_000')
    assert documents_of('bpe', eot=50256) == [expected[0][:4999] + [50256]]

def test_text_is_read_in_any_layout_and_nonsense_is_not(folder, capsys):
    text = 'naïve 文字, é'
    put({'raw/a.txt': text.encode('utf-8-sig'), 'raw/b.text': text.encode('utf-16'),
         'raw/c.jsonl': '\ufeff' + json.dumps({'text': text}), 'raw/sub/G.TXT': text,
         'raw/d.json': json.dumps([{'text': text}] * 2, indent=1),
         'raw/e.csv': f'text,n\n"{text}",1\n', 'raw/f.md.gz': gzip.compress(text.encode()),
         'elsewhere/h.txt': text, 'raw/latin.txt': text.encode('latin-1', 'replace'),
         'raw/wide.txt': 'no mark'.encode('utf-16-le'), 'raw/p.png': bytes(range(256))})
    os.symlink(os.path.abspath('elsewhere'), 'raw/link')
    os.symlink(os.path.abspath('raw'), 'raw/sub/loop')
    here('prepare.py raw --tokenizer=bytes --val_fraction=0')
    assert documents_of('raw') == [[*text.encode(), 256]] * 9
    assert re.search('skipped: .*1 .png.*2 .txt', capsys.readouterr().out)
    put({'raw/t.csv': 'body\nx y z\n', 'half/u.jsonl': '{"text": "fine"}\n{"text": '})
    for name, said in (('raw/latin.txt', 'iconv'), ('raw/wide.txt', 'iconv'),
                       ('raw/t.csv', 'body'), ('half', 'row 2')):   # a half is not skipped
        assert said in refused(f'prepare.py {name} --tokenizer=bytes', capsys)
    here('prepare.py raw/t.csv --tokenizer=bytes --column=body --val_fraction=0')
    assert documents_of('t') == [[*b'x y z', 256]] and sorted(os.listdir('data')) == ['raw', 't']

def test_data_of_another_source_is_not_overwritten_and_a_link_is_followed(folder, capsys):
    put({f'{name}/train.txt': f'this is {name}. ' * 50 for name in ('a', 'b')})
    for name in ('data', 'disk', 'far'):
        os.makedirs(name)
    os.symlink(os.path.abspath('disk'), 'data/train')
    here('prepare.py a/train.txt --tokenizer=bytes')
    assert sorted(os.listdir('disk')) == ['meta.json', 'tokenizer', 'train.bin', 'val.bin']
    kept = Path('disk/train.bin').read_bytes()
    assert '--name=' in refused('prepare.py b/train.txt --tokenizer=bytes', capsys)
    assert Path('disk/train.bin').read_bytes() == kept
    # the same source again, over what a killed run left, and with one file on yet another disk
    shutil.move('disk/train.bin', 'far/train.bin')
    os.symlink(os.path.abspath('far/train.bin'), 'disk/train.bin')
    put({'disk/.partial/left': '', 'disk/tokenizer/left': ''})
    here('prepare.py a/train.txt --tokenizer=bytes --val_fraction=0')
    assert os.path.islink('data/train') and os.path.islink('disk/train.bin')
    assert os.path.getsize('far/train.bin') > len(kept)
    assert sorted(os.listdir('disk/tokenizer')) == ['tokenizer.json', 'tokenizer_config.json']

def test_rows_of_token_ids(folder, capsys, gpt2):
    def prepared(rows, keys):
        put({'ids.jsonl': '\n'.join(json.dumps({'input_ids': row}) for row in rows)})
        here(f'prepare.py ids.jsonl --val_fraction=1 {keys}')
        return np.fromfile('data/ids/val.bin', np.uint16).tolist(), read_json('data/ids/meta.json')
    windows = np.random.default_rng(0).integers(257, size=(50, 128)).tolist()
    ids, meta = prepared(windows, '--tokenizer=bytes --windows=True')
    assert (ids, meta['window']) == (sum(windows, []), 128)
    ids, _ = prepared(windows, '--tokenizer=bytes --windows=True --max_tokens=1000')
    assert ids == sum(windows[:7], [])
    assert prepared([[1, 2], [3]], '--tokenizer=bytes')[0] == [1, 2, 256, 3, 256]       # documents
    ids, meta = prepared([[1, 2], [65535]], '')         # of a tokenizer that nobody named
    assert ids == [1, 2, 65535] and meta['tokenizer'] == 'unknown'
    assert (meta['vocab_size'], meta['eot']) == (65536, None)
    for bad in ('65536', '-1', '1.5', '300'):
        put({'ids.jsonl': '{"input_ids": [1]}\n{"input_ids": [%s]}' % bad})
        error = refused('prepare.py ids.jsonl --tokenizer=bytes', capsys)
        assert 'row 2' in error and bad in error
    # nor is a folder's file of another tokenizer skipped
    put({'mixed/a.jsonl': '{"input_ids": [1]}', 'mixed/b.jsonl': '{"input_ids": [300]}'})
    assert '300' in refused('prepare.py mixed --tokenizer=bytes', capsys)

def test_openwebtexts_validation_documents_are_nanogpts(folder, monkeypatch):
    data = datasets.Dataset.from_dict({'n': range(5000)})
    split = data.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert prepare.nanogpt_val(5000) == set(split['test']['n'])
    assert len(prepare.nanogpt_val()) == 4007
    rows = lambda name, config, split: ({'text': f'{name} {n}'} for n in range(4000))
    monkeypatch.setattr(prepare, 'hub_rows', rows)
    drawn = sorted(n for n in prepare.nanogpt_val() if n < 4000)
    for preset, train_documents in (('openwebtext', 4000 - len(drawn)), ('openwebtext_val', 0)):
        here(f'prepare.py {preset} --tokenizer=bytes')
        expected = [[*f'Skylion007/openwebtext {n}'.encode(), 256] for n in drawn]
        assert documents_of(preset, 'val') == expected
        assert len(documents_of(preset)) == train_documents

def test_prepare_streams_from_a_hub(hub):
    repos, _, env = hub
    texts = {name: [f'{name} {i}' for i in range(300)] for name in ('one', 'two')}
    one, two = (parquet([*rows, None]) for rows in texts.values())
    readme = (b"---\nconfigs:\n- config_name: one\n  data_files: one/*.parquet\n"
              b"- config_name: two\n  data_files: two/*.parquet\n---\n")
    repos['/datasets/me/rows'] = {'main': {'data/train-00000-of-00001.parquet': one}}
    repos['/datasets/me/configs'] = {
        'main': {'README.md': readme, 'one/0.parquet': one, 'two/0.parquet': two}}
    repos['/datasets/me/script'] = {'main': {'script.py': b'import os'}, 'refs/convert/parquet': {
        'one/train/0000.parquet': one, 'two/partial-train/0000.parquet': two}}
    repos['/datasets/me/flaky'] = {
        'main': {f'data/train-{k:05d}-of-00002.parquet': one for k in range(2)}}
    put({'lines.py': """import contextlib, prepare
for line in open('lines'):
    with contextlib.suppress(SystemExit):
        prepare.main([*line.split(), '--tokenizer=bytes', '--val_fraction=0'])""",
         'lines': """me/configs
me/script
me/rows --column=body --name=x
me/nothing
me/rows
me/configs --config=two
me/script --config=two
me/flaky"""})
    out = finished(start('lines.py', env=env))
    errors = [line for line in out.splitlines() if line.startswith('prepare.py: ')]
    for error, *words in zip(errors, ('one', 'one/train', 'text', 'me/nothing'),
                             ('two', 'two/partial-train', 'body', ''), strict=True):
        assert all(word in error for word in words)     # no configuration is chosen silently
    assert sorted(os.listdir('data')) == ['configs', 'flaky', 'rows', 'script']
    assert '1 rows without text' in out and 'copy is partial' in out
    for name, rows in (('rows', texts['one']), ('configs', texts['two']), ('script', texts['two']),
                       ('flaky', texts['one'] * 2)):
        assert documents_of(name) == [[*text.encode(), 256] for text in rows]

# -----------------------------------------------------------------------------
# Bad input: one line on stderr with the value and what to type, exit status 2, nothing written.

@pytest.fixture(scope='session')
def broken(workspace):
    """What the cases below refer to."""
    here(f'train.py {TINY} remove.py --out_dir=free')
    for name in ('odd', 'strange', 'big', 'bare', 'chars', 'wide'):
        shutil.copytree('data/tiny', f'data/{name}')
    for name in ('big', 'bare', 'chars', 'wide'):
        os.remove(f'data/{name}/meta.json')
    for name in ('damaged', 'nolog', 'unlike'):
        shutil.copytree('run', name)
    ids, log = np.fromfile('data/tiny/train.bin', np.uint16), Path('run/log.jsonl').read_text()
    put({'empty/.hidden': '', 'words.txt': 'some words', 'crash.py': 'max_iters = 1 / 0',
         'data/odd/train.bin': ids.tobytes() + b'x', 'data/chars/meta.pkl': b'',
         'data/wide/train.bin': ids.astype(np.uint32).tobytes(),
         'data/big/train.bin': np.full(4000, 60000, np.uint16).tobytes(),
         'data/strange/meta.json': '{"vocab_size": 300}', 'nolog/log.jsonl': log[:10],
         'unlike/log.jsonl': re.sub('"val_sha256": "....', '"val_sha256": "0000', log),
         'damaged/ckpt.pt': Path('run/ckpt.pt').read_bytes()[:3000], 'array.npy': b'no text\0',
         'good.jsonl': json.dumps(question()),
         'label.jsonl': '\n' + json.dumps(question(label=4))})
    infinite = random_model('none', block_size=64, vocab_size=257)
    infinite.wte.weight[ord('t')] = 3e38
    model.save_checkpoint('infinite', infinite)
    random_model(vocab_size=300).save_pretrained('odd_vocab')
    put({'busy/.lock': ''})
    lock = open('busy/.lock')       # another run, as long as the cases last
    train.fcntl.flock(lock, train.fcntl.LOCK_EX)
    return lock

NEW = f'train.py {TINY} --out_dir=never'
LOADED = 'train.py tiny.py --out_dir=never --init_from=model'

@pytest.mark.parametrize('line, said', [
    ('train.py --batchsize=8', 'batch_size'),
    ('train.py --max_iters=1.5', '1.5'),
    ('train.py --batch_size=0', 'batch_size is 0'),
    ('train.py --batch_size 8', '--key=value'),
    ('train.py config/nothing.py', 'config/nothing.py'),
    ('train.py crash.py', 'ZeroDivisionError'),
    ('train.py --device=abacus', '--device=auto'),
    (f'{NEW} --learning_rate=1e-5', '6e-05'),
    (f'{NEW} --warmup_iters=7 --max_iters=6', 'warmup_iters=7'),
    (f'{NEW} --dataset=nothing', '--name=nothing'),
    (f'{NEW} --dataset=odd', 'data/odd/train.bin'),
    (f'{NEW} --dataset=strange', 'data/strange'),
    (f'{NEW} --dataset=bare', '--vocab_size='),
    (f'{NEW} --dataset=wide --vocab_size=257', '32-bit'),
    (f'{LOADED} --dataset=big', '60000'),
    (f'{LOADED} --dataset=chars', '65'),
    (f'{LOADED} --block_size=64', '--block_size=32'),
    (f'{NEW} --batch_tokens=500', '--batch_tokens=384'),
    (f'{NEW} remove.py --max_iters=13', 'max_iters=13'),
    (f'{LOADED} remove.py --init_from=free', 'lost already'),
    (f'{NEW} --init_from=no/such', 'no/such'),
    (f'{LOADED} --init_from=damaged', 'damaged'),
    (f'{LOADED} --n_layer=7', '7'),
    (f'{NEW} remove.py --out_dir=free --init_from=resume --start_lnf=14 --max_iters=20', 'ln_f'),
    (f'{NEW} --out_dir=nolog --init_from=resume', 'nolog/log.jsonl'),
    (f'{NEW} --out_dir=run', '--init_from=resume'),
    (f'{NEW} --out_dir=run --init_from=resume --eval_iters=5', 'windows'),
    (f'{NEW} --out_dir=words.txt/x', 'words.txt'),
    (f'{NEW} --out_dir=busy', 'busy'),
    (f'{NEW} --control=unlike', 'val_sha256'),
    (f'{NEW} --wandb_log=True', 'WANDB_MODE=offline'),
    ('train.py config/eval.py --dataset=tiny --init_from=infinite', 'infinite'),
    ('prepare.py empty --tokenizer=bytes', 'empty'),
    ('prepare.py words.txt --tokenizer=bytes --max_tokens=100', '100'),
    ('prepare.py words.txt --tokenizer=bytes --name=../words', '../words'),
    ('prepare.py words.txt --tokenizer=bytes --split=train', 'words.txt'),
    ('prepare.py array.npy --tokenizer=bytes', '.parquet'),
    ('eval_hellaswag.py run --data=label.jsonl', 'line 2'),
    ('eval_hellaswag.py infinite --data=good.jsonl', 'question 1'),
    ('eval_hellaswag.py odd_vocab --data=good.jsonl', '300'),
    ('eval_hellaswag.py run --data=good.jsonl --json=words.txt/x.json', 'words.txt'),
    ('model.py run model', 'model exists'),
    ('model.py run folded --folded', 'LayerNorm')])
def test_bad_input_is_told_in_one_line(line, said, broken, capsys):
    look = lambda: {p: p.stat().st_mtime_ns for folder in ('run', 'free', 'data')
                    for p in Path(folder).rglob('*') if p.is_file()}
    kept = look()
    assert said in refused(line, capsys)
    assert kept == look() and not any(map(os.path.exists, ('never', 'folded')))

def test_paths_begin_at_home_and_the_file_system_may_have_no_locks(workspace, monkeypatch, capsys):
    def unknown(*args):
        raise OSError(38, 'Function not implemented')
    monkeypatch.setenv('HOME', os.path.abspath('home'))
    monkeypatch.setattr(train.fcntl, 'flock', unknown)
    monkeypatch.setattr(os, 'fsync', unknown)
    here(f'train.py {TINY} --out_dir=~/run --max_iters=2')
    assert os.path.exists('home/run/ckpt.pt') and not os.path.exists('~')
    assert 'cannot be locked' in capsys.readouterr().out
    monkeypatch.setattr(train, 'fcntl', None)       # a system without them
    here('train.py tiny.py --init_from=~/run --out_dir=~/other --max_iters=2')
    assert load('~/other')

def test_a_machine_out_of_memory_is_one_line():
    for error in (MemoryError(), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
                  torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')):
        told = model.trouble(error)
        assert '--batch_size' in told and '--gradient_checkpointing=True' in told

def test_a_missing_compiler_is_one_line(workspace):
    env = {'CXX': '/nowhere/g++', 'TORCHINDUCTOR_CACHE_DIR': os.path.abspath('cache'),
           'TORCHINDUCTOR_FX_GRAPH_CACHE': '0'}
    process = start(f'train.py {TINY} --out_dir=nocc --n_layer=1 --compile=True', env=env)
    lines = [line for line in finished(process, 2).splitlines() if line.startswith('train.py: ')]
    assert len(lines) == 1 and '--compile=False' in lines[0]
