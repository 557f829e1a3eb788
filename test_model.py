"""
The project's claims, one test each. Everything runs offline, on the CPU, in random or self-trained
models; one test runs on a GPU where there is one.

    make test
"""
import os

# One thread a process, and no GPU: the same arithmetic on every machine. Before torch is imported.
GPUS = os.environ.get('CUDA_VISIBLE_DEVICES')
os.environ.update({'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1',
                   'OPENBLAS_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONUNBUFFERED': '1'})

import contextlib
import gc
import gzip
import io
import json
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
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
sys.path.append(str(REPO / 'experiments'))
import hub as hub_server    # noqa: E402

# A run of 16 iterations from scratch, four micro-batches each; the same, with removal.
TINY = 'train.py tiny.py shape.py'
REMOVAL = f'{TINY} remove.py'
# The flagship: config/remove_ln.py, a sixth of the paper's iterations, 3 layers for its 12, on
# experiments/standin.py's model with the giant vector, trained for a moment; and its control.
SCALED = 'tiny.py config/remove_ln.py scaled.py'
CONFIGS = {
    'tiny.py': """dataset, device, compile, eval_iters, log_interval = 'tiny', 'cpu', False, 10, 1
batch_size, batch_tokens, max_iters, warmup_iters, learning_rate = 4, 512, 16, 2, 3e-3""",
    'shape.py': "n_layer, n_head, n_embd, block_size = 2, 2, 32, 32",
    'remove.py': """remove_ln, start_ln2, start_ln1qk, start_ln1v, start_lnf = True, 2, 4, 6, 10
start_eot, start_bos, gap_ln2, gap_ln1qk, gap_ln1v = 11, 13, 1, 1, 2""",
    'scaled.py': """dataset, init_from, batch_size, batch_tokens = 'tiny', 'giant', 16, 1024
max_iters, warmup_iters, lr_decay_iters, eval_iters = 200, 16, 333, 200
start_ln2, start_ln1qk, start_ln1v, start_lnf = 33, 73, 113, 173
gap_ln2, gap_ln1qk, gap_ln1v, taper_iters = 13, 13, 20, min(taper_iters, 16)""",
    'giant.py': f"""import contextlib, sys
sys.path[:0] = {str(REPO)!r}, {str(REPO / 'experiments')!r}
import standin, train
standin.SIZE = 180.0        # in so short a training it shrinks less
standin.main(['standin', '--n_layer=3', '--n_embd=96', '--block_size=64'])
for line in ('tiny.py --init_from=standin --out_dir=giant --max_iters=200 --batch_size=16 '
             '--batch_tokens=1024 --warmup_iters=10 --learning_rate=2e-3 --min_lr=2e-4',
             '{SCALED} config/control.py', '{SCALED}'):
    with open('flagship.log', 'w') as log, contextlib.redirect_stdout(log):
        train.main(line.split())"""}
# all that a removal can have: a teacher, random sequences, a taper, penalties
FULL = '--teacher=other --random_share=0.1 --taper_iters=3 --aux_loss_weight=0.1'

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
        here(f'{TINY} --max_iters=2 --seed={seed} --out_dir={name}')
    load('run').save_pretrained('model')
    process = start('giant.py')     # on the second core meanwhile
    yield process
    process.kill()

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

def start(line, nproc=1, env={}):
    """A command in a process of its own, under torchrun if nproc > 1."""
    script, *args = line.split()
    script = script if os.path.exists(script) else REPO / script
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}']
    path = f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', REPO)}"
    return subprocess.Popen([sys.executable, *torchrun * (nproc > 1), script, *args], text=True,
                            env=os.environ | {'PYTHONPATH': path} | env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

def finished(process, status=0):
    """What the process printed; it has ended with this status."""
    try:
        output = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert process.returncode == status and 'Traceback' not in output, output
    return output

def told(process, status=2):
    """The errors that a process printed, a line each."""
    return re.findall(r'^\w+\.py: .*$', finished(process, status), re.M)

def refused(line, capsys):
    """The one line on stderr with which a command refuses its arguments, with exit status 2."""
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

def load(folder):
    return GPT2.from_pretrained(folder).eval().requires_grad_(False)

def load_theirs(folder, **kwargs):
    return transformers.GPT2LMHeadModel.from_pretrained(folder, **kwargs).requires_grad_(False)

def read_json(path):
    return json.loads(Path(path).read_text())

IDX = torch.randint(0, 101, (4, 31), generator=torch.Generator().manual_seed(1))

def remove_all(model):
    """Removes every site, with constants measured on IDX, the same for all kinds of token."""
    for ln, std in zip(model.layernorms().values(), model(IDX, return_stds=True)[2]):
        ln.std.fill_(std.mean().item())
        ln.gate.fill_(1)
    return model

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
    theirs = load_theirs('ours')
    assert difference(theirs(IDX).logits, ours(IDX)[0]) < 1e-5
    assert abs(ours(IDX[:, :-1], IDX[:, 1:])[1] - theirs(IDX, labels=IDX).loss) < 1e-5
    assert ours(IDX, torch.full_like(IDX, -1))[1] == 0      # no target
    theirs.save_pretrained('theirs', max_shard_size='20KB')     # in shards, as GPT-2 XL
    stale = {'transformer.stale.weight': torch.zeros(1)}        # of another model, in no index
    model.save_file(stale, 'theirs/model-00009-of-00009.safetensors')
    ours = load('theirs')
    assert difference(theirs(IDX).logits, ours(IDX)[0]) < 1e-5
    assert ours.lm_head.weight is ours.wte.weight

def test_a_gate_moves_its_own_site_only_and_mixes_the_inverse_scales():
    model = random_model('fake')
    ln, x = model.h[1].ln_1, torch.randn(2, 5, 39) * 3 + 1
    kind = torch.tensor([[BOS, TOKEN, EOT, TOKEN, TOKEN]] * 2)
    ln.std[:], ln.merge[EOT] = torch.tensor([1.7, 5, 0.6]), 0.5
    real = ln(x, kind)[0][0]
    model.sites()['h.1.ln_1.v'].fill_(0.25)
    qk, v = ln(x, kind)[0]
    assert torch.equal(qk, real)
    sigma = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    s = torch.tensor([5, 1.7, 2 / (1 / 0.6 + 1 / 1.7), 1.7, 1.7])[:, None]
    expected = (x - x.mean(-1, keepdim=True)) * (0.75 / sigma + 0.25 / s) * ln.weight + ln.bias
    assert difference(v, expected) < 1e-5

def test_fake_with_gates_at_0_is_real_and_hooks_on_c_attn_work_in_both():
    real, seen = random_model(), []
    fake = GPT2.from_state(vars(real.config), real.state_dict(), 'test', 'fake').eval()
    assert len(fake.sites()) == 3 * 3 + 1 and difference(real(IDX)[0], fake(IDX)[0]) < 1e-6
    for m in (real, fake):
        m.h[1].attn.c_attn.register_forward_hook(lambda _, x, y: seen.append((x, y)) or 2 * y)
    assert difference(real(IDX)[0], fake(IDX)[0]) < 1e-5
    assert len(seen) == 2 and difference(seen[0][1], seen[1][1]) < 1e-5     # each was called once
    fake.sites()['h.1.ln_1.v'].fill_(0.5)
    fake(IDX)
    (qk, v), y = seen[-1]       # at mixed gates the output is of both inputs
    c_attn = real.h[1].attn.c_attn
    exact = torch.cat((F.linear(qk, c_attn.weight[:78]), F.linear(v, c_attn.weight[78:])), -1)
    assert difference(y, exact + c_attn.bias) < 1e-5 < 0.01 < difference(qk, v)

def test_constants_are_the_means_over_tokens_of_a_kind():
    model = random_model('fake')
    idx = IDX % 100
    idx[:, [5, 20]] = idx[0, 0] = model.config.eot_token_id
    kinds = model.kinds(idx)
    assert kinds[:2, :6].tolist() == [[first] + [TOKEN] * 4 + [EOT] for first in (EOT, BOS)]
    forward, y = partial(model, return_stds=True), idx.clone()
    y[3, 7:] = -1       # these do not count
    stds = train.measure(model, forward, [(idx[:2], y[:2]), (idx[2:], y[2:])])
    for measured, exact in zip(stds, forward(idx)[2], strict=True):
        for kind in (TOKEN, BOS, EOT):
            mean = exact[(kinds == kind) & (y != -1)].mean()
            assert measured[kind].item() == pytest.approx(mean.item(), rel=1e-5)
    absent = train.measure(model, forward, [(idx[1:, :5], idx[1:, :5])])
    assert torch.equal(absent[:, EOT], absent[:, TOKEN])
    assert train.measure(model, forward, []).shape == stds.shape        # a rank has no batch

def test_folding_is_exact_and_leaves_no_layernorm_in_the_graph():
    from torch.fx.experimental.proxy_tensor import make_fx
    fake = remove_all(random_model('fake').double())
    none = fake.fold_ln()
    assert none.config.ln_mode == 'none' and not [k for k in none.state_dict() if 'ln_' in k]
    logits = fake(IDX)[0]
    assert difference(logits, none(IDX)[0]) < 1e-12 < difference(logits, random_model()(IDX)[0])
    code = lambda model: make_fx(lambda idx: model(idx)[0])(IDX).code
    divides = r'aten\.(native_layer_norm|layer_norm|var|var_mean|rsqrt|sqrt|std|mean|div)\b'
    assert re.search(divides, code(fake)) and not re.search(divides, code(none))

@pytest.mark.parametrize('form, dtype, eps, error', [
    ('published', torch.float32, 1e12, 1e-4), ('folded', torch.float32, 1e12, 1e-4),
    ('folded', torch.float16, 1e8, 0.02)])      # published: huge scales, ln_f's bias, a tied head
def test_a_model_without_layernorm_goes_through_transformers(form, dtype, eps, error, folder):
    fake = remove_all(random_model('fake'))
    (fake.fold_ln() if form == 'folded' else fake).save_pretrained('hf', eps=eps)
    theirs = load_theirs('hf', dtype=dtype)
    assert difference(theirs(IDX).logits.float(), fake(IDX)[0]) < error
    ours = load('hf')
    assert ours.config.ln_mode == 'none' and difference(ours(IDX)[0], fake(IDX)[0]) < 1e-3
    fails('LayerNorm is gone', GPT2.from_pretrained, 'hf', 'fake')

def test_what_transformers_cannot_express_is_refused(folder, monkeypatch):
    model = random_model('fake')
    model.save_pretrained('before')     # all gates 0: a stock GPT-2
    assert difference(load('before')(IDX)[0], model(IDX)[0]) < 1e-5
    model.sites()['h.0.ln_2'].fill_(1)
    fails('9 of 10 sites', model.save_pretrained, 'x')
    remove_all(model).ln_f.std[BOS] = 7
    fails('ln_f .* position 0', model.fold_ln)
    fails('mean', random_model('none').save_pretrained, 'x')
    monkeypatch.setattr(sys.modules['model'], 'LayerNorm', type(model.ln_f))    # is put back
    train.load_config([str(REPO / 'experiments/variants/dyt.py')])              # a fork's class
    fork = remove_all(random_model('fake'))
    fails('no stock LayerNorm', fork.save_pretrained, 'x')
    assert not os.path.exists('x')

def test_on_a_gpu_where_there_is_one(workspace):
    """A removal, compiled: the CPU's losses, in float32 and bfloat16, at all its gates."""
    ask = 'import sys, torch; sys.exit(not torch.cuda.is_available())'
    env = os.environ | {'CUDA_VISIBLE_DEVICES': GPUS or '0'}
    if subprocess.run([sys.executable, '-c', ask], env=env).returncode:
        pytest.skip('no GPU')
    here(f'{REMOVAL} --taper_iters=3 --out_dir=cpu')
    for dtype, most in (('float32', 1e-3), ('bfloat16', 0.05)):
        finished(start(f'{REMOVAL} --taper_iters=3 --out_dir={dtype} --dtype={dtype} '
                       '--device=cuda --compile=True', env=env))
        off = losses_of(dtype, 'train', 'loss') - losses_of('cpu', 'train', 'loss')
        assert abs(off).max() < most and load(f'{dtype}/hf').config.ln_mode == 'none'

# -----------------------------------------------------------------------------
# The schedule, and training runs.

def events(cfg, model, measured):
    """What set_gates logs in a whole run, as (iteration, event, site or kind)."""
    entries = [e for it in range(cfg.max_iters) for e in train.set_gates(cfg, it, model, measured)]
    return [(e['iter'], e['event'], e.get('site') or e['kind']) for e in entries]

def test_the_papers_pace_event_by_event(workspace):
    removals = [*[(200 + 20 * i, 'remove', f'h.{i}.ln_2') for i in range(12)],
                *[(440 + 20 * i, 'remove', f'h.{i}.ln_1.qk') for i in range(12)],
                *[(680 + 30 * i, 'remove', f'h.{i}.ln_1.v') for i in range(12)],
                (1040, 'remove', 'ln_f')]
    cfg = train.load_config('config/remove_ln.py config/distil.py --start_eot=1060 '
                            '--start_bos=1160 --taper_iters=0'.split())
    for when, _, site in removals:      # abrupt: a gate is 0 before and 1 from then on
        assert [train.gates(cfg, it, 12)[site] for it in (0, when - 1, when, 1199)] == [0, 0, 1, 1]
    assert [train.gates(cfg, it, 12)['eot'] for it in (1059, 1060)] == [0, 1]
    # each LayerNorm is measured once: ln_1's two sides share that, and a merge leaves it alone
    model, measured = random_model('fake', n_layer=12), []
    logged = events(cfg, model, lambda: measured.append(torch.rand(25, 3)) or measured[-1])
    assert logged == [*removals, (1060, 'merge', 'eot'), (1160, 'merge', 'bos')]
    assert len(measured) == 25 and cfg.teacher == cfg.init_from == 'gpt2'
    for ln in model.layernorms().values():
        assert ln.merge.tolist() == [0, 1, 1] and any((ln.std == m).all(1).any() for m in measured)

def test_a_taper_fades_gates_and_merges_and_ends_exactly(workspace):
    cfg = train.load_config(['remove.py', '--taper_iters=4'])
    model = random_model('fake', n_layer=2)
    faded = [0, 1 / 16, 4 / 16, 9 / 16] + [1] * 20      # the square of the time
    ln, std = model.h[0].ln_2, torch.tensor([0.768, 33000.7, 4.0])      # rounding leaves a rest
    for it in range(20):
        train.set_gates(cfg, it, model, lambda: std.expand(5, 3))
        table = train.gates(cfg, it, 2)
        assert table['h.0.ln_2'] == ln.gate == faded[max(it - 1, 0)]    # from 2 on
        assert table['bos'] == ln.merge[BOS] == faded[max(it - 12, 0)]      # from 13 on
        assert table['eot'] == ln.merge[EOT] == faded[max(it - 10, 0)]
        assert it < 2 or torch.equal(ln.std, std)
    frozen = ln.frozen(torch.randn(39).expand(1, 3, 39), torch.tensor([[TOKEN, BOS, EOT]]))
    assert torch.equal(frozen[0, 0], frozen[0, 1]) and torch.equal(frozen[0, 0], frozen[0, 2])

@pytest.mark.parametrize('name, layers, last', [
    ('fast', 12, 104), ('medium', 24, 188), ('large', 36, 534), ('xl', 48, 722)])
def test_the_follow_ups_pace(name, layers, last, workspace):
    cfg = train.load_config([f'config/remove_ln_{name}.py'])
    model = random_model('fake', n_layer=layers)
    train.check_schedule(cfg, model, None)
    assert events(cfg, model, lambda: torch.ones(99, 3))[-1] == (last, 'remove', 'ln_f')

def assert_close(a, b):
    """Two logs tell of the same events; losses are equal to rounding."""
    assert [(e['event'], e['iter']) for e in a] == [(e['event'], e['iter']) for e in b]
    for x, y in zip(a, b):
        for k in ('loss', 'kl', 'val_loss'):
            assert x.get(k, 0) == pytest.approx(y.get(k, 0), rel=2e-5, abs=2e-5), (x, y)
        assert x.get('std', {}) == pytest.approx(y.get('std', {}), rel=1e-4)

def test_three_graphs_serve_a_removal_and_no_cut_of_a_batch_changes_it(workspace, monkeypatch):
    """The graphs: training, evaluation, and the teacher's; fullgraph=True forbids a break."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=counter))
    for size in (4, 1, 8):
        here(f'{REMOVAL} {FULL} --out_dir=cut{size} --batch_size={size} --compile={size == 4}')
        assert_close(log_of(f'cut{size}'), log_of('cut4'))
    assert counter.frame_count == 3

def test_no_device_synchronisation_in_a_plain_step(workspace, monkeypatch):
    """Only logged iterations (0, 50, 99) and the evaluations (0, 100) may read a value back."""
    seen = []
    reads = 'item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__'
    for owner, name in [*((torch.Tensor, name) for name in reads), (torch.optim.AdamW, 'step')]:
        def spy(*args, name=name, original=getattr(owner, name), **kwargs):
            seen.append(name)
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, spy)
    here(f'{TINY} --teacher=other --out_dir=nosync --max_iters=100 --log_interval=50')
    steps = ' '.join(seen).split('step')
    assert len(steps) == 101 and [i for i, s in enumerate(steps) if s.strip()] == [0, 1, 51, 100]

def opened(keys):
    """-> (config, Data of data/tiny)"""
    cfg = train.load_config(['tiny.py', 'shape.py', *keys.split()])
    return cfg, train.Data(cfg, read_json('data/tiny/meta.json'), load('run').config, 'cpu')

def test_evaluation_is_the_mean_over_whole_windows_whatever_the_batch(workspace, capsys):
    model, n = load('run'), (os.path.getsize('data/tiny/val.bin') // 2 - 1) // 32
    tokens = torch.from_numpy(np.fromfile('data/tiny/val.bin', np.uint16).astype(np.int64))
    x, y = (tokens[i:][:n * 32].view(n, 32) for i in (0, 1))
    losses = F.cross_entropy(model(x)[0].mT, y, reduction='none').numpy()
    for batch_size, k, window in ((3, n, 0), (7, n, 0), (7, 10, 40), (7, n, 32)):
        data = opened(f'--batch_size={batch_size} --eval_iters={k if k < n else 0}')[1]
        data.meta['window'] = window    # of data cut so, the last target is the next text's
        means = losses[np.arange(k) * n // k, :31 if window == 32 else 32].mean(1)
        found = train.validate(model, partial(model, return_stds=True), data)
        assert found == pytest.approx((means.mean(), means.std(ddof=1) / k ** 0.5), rel=1e-5)
    here('train.py config/eval.py --init_from=run --dataset=tiny --out_dir=never')
    assert f'val loss {losses.mean():.4f} nats per token' in capsys.readouterr().out
    assert not os.path.exists('never')      # it writes nothing

def test_batches_are_a_function_of_seed_and_iteration_however_they_are_cut(workspace):
    def batches(it, keys='', batch_size=4):
        data = opened(f'--batch_size={batch_size} {keys}')[1]
        return torch.cat([torch.cat(data.batch(it, m), 1) for m in range(16 // batch_size)])
    plain = batches(3)
    assert torch.equal(plain[:, 1:32], plain[:, 32:-1])     # targets: inputs, one on
    assert torch.equal(plain, batches(3, batch_size=8))
    assert not torch.equal(plain, batches(4)) and not torch.equal(plain, batches(3, '--seed=2'))
    # random sequences: the first two of sixteen, without targets; the others stay as they are
    mixed = batches(3, '--random_share=0.12', batch_size=8)
    assert torch.equal(mixed, batches(3, '--random_share=0.12'))
    assert torch.equal(mixed[2:], plain[2:]) and (mixed[:2, 32:] == -1).all()
    ids = torch.cat([batches(it, '--random_share=0.12')[:2, :32] for it in range(40)])
    assert len(ids.unique(dim=0)) == 80 and ids.max() == 256

@pytest.mark.parametrize('share, n_random', [(0.25, 0), (1, 0), (0.5, 6)])
def test_the_gradient_is_that_of_the_mixed_loss(share, n_random, workspace):
    """(1 - a) * cross-entropy over text + a * KL(teacher || model) over all tokens."""
    cfg, data = opened(f'--distil={share} --random_share={n_random / 16} --grad_clip=0')
    net, teacher = load('run').requires_grad_(True), load('other')
    keep = SimpleNamespace(param_groups=[], step=lambda: None, zero_grad=lambda **_: None)
    losses, _, _ = train.step(cfg, 5, net, net, keep, data, contextlib.nullcontext(),
                              partial(train.divergence, teacher))
    # by hand, the batch in one piece
    x, y = (torch.cat(z) for z in zip(*(data.batch(5, micro) for micro in range(4))))
    p, q = teacher(x)[0].softmax(-1), net(x)[0].softmax(-1)
    kl = (p * (p / q).log()).sum() / 512
    ce = -q[n_random:].gather(-1, y[n_random:, :, None]).log().mean()
    exact = torch.autograd.grad((1 - share) * ce + share * kl, [*net.parameters()])
    assert losses.tolist() == pytest.approx([ce.item(), kl.item()], rel=1e-5)
    for p, grad in zip(net.parameters(), exact, strict=True):
        assert difference(p.grad, grad) < 1e-5 * max(1, grad.abs().max())

# -----------------------------------------------------------------------------
# Ranks, resuming, and what goes wrong in a night.

def test_killed_and_resumed_on_any_number_of_processes_gives_the_same_losses(workspace):
    long = f'{REMOVAL} {FULL} --max_iters=40 --eval_interval=8 --dropout=0.1'
    process = start(f'{long} --out_dir=killed')
    assert any('12 | loss' in line for line in process.stdout)
    process.kill()
    process.wait()
    assert log_of('killed')[-1]['iter'] < 39
    shutil.copytree('killed', 'killed2')
    # on three processes, which share four micro-batches unevenly
    three = start(f'{long} --out_dir=killed2 --init_from=resume', nproc=3)
    here(f'{long} --out_dir=whole')
    whole = log_of('whole')
    for _ in range(2):      # and once more after its end
        here(f'{long} --out_dir=killed --init_from=resume')
        assert log_of('killed') == whole        # to the last bit
    assert torch.equal(load('killed/hf').lm_head.weight, load('whole/hf').lm_head.weight)
    finished(three)
    assert_close(log_of('killed2'), whole)

def test_killed_while_a_checkpoint_is_written_the_last_one_is_there(folder):
    model.save_checkpoint('.', random_model(), iter=1)
    for name in ('fsync', 'replace'):
        if (pid := os.fork()) == 0:
            setattr(os, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            model.save_checkpoint('.', random_model(), iter=2)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert model.load_checkpoint('.')['iter'] == 1
    model.save_checkpoint('.', random_model(), iter=2)
    assert model.load_checkpoint('.')['iter'] == 2 and os.listdir('.') == ['ckpt.pt']

@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'])
def test_signals_finish_the_iteration_and_save(name, workspace, monkeypatch, capsys):
    step, number, mine = train.step, getattr(signal, name), lambda *args: None
    monkeypatch.setattr(train, 'step', lambda cfg, it, *args: (
        it in (5, 9) and signal.raise_signal(number), step(cfg, it, *args))[1])
    old = signal.signal(number, mine)       # of a program that calls train.main()
    with pytest.raises(SystemExit) as e:
        here(f'{TINY} --out_dir={name}')
    assert e.value.code == 128 + number and e.value.__context__ is None
    assert 'stopped after iteration 5:' in capsys.readouterr().err
    assert model.load_checkpoint(name)['iter'] == 6
    assert signal.signal(number, signal.SIG_IGN) == mine        # it is back
    here(f'{TINY} --out_dir={name} --init_from=resume')     # nohup and & ignore some: so do we
    assert signal.signal(number, old) == signal.SIG_IGN
    assert log_of(name)[-1]['iter'] == 16

def test_a_cell_that_failed_leaves_nothing_behind_in_a_notebook(workspace, monkeypatch, capsys):
    """A notebook keeps the exception. The GPU's memory is free, and the corrected cell runs."""
    models, kept, handler = [], [], signal.getsignal(signal.SIGTERM)
    errors = [torch.OutOfMemoryError('CUDA out of memory'), MemoryError(), UserError('other'),
              RuntimeError("DefaultCPUAllocator: can't allocate memory")]

    def step(cfg, it, model, raw, *args):
        models.append(weakref.ref(raw))
        raise errors.pop()
    cell = f'{TINY} --max_iters=2 --seed=0 --out_dir=cell'
    with monkeypatch.context() as patch:
        patch.setattr(train, 'step', step)
        for keys in ('--batch_tokens=500', '', *['--init_from=resume'] * 3):
            with pytest.raises(SystemExit) as e:
                here(f'{cell} {keys}')
            kept.append(e.value)
    error = capsys.readouterr().err
    assert error.count('\n') == 5 and error.count('train.py: out of memory') == 3
    gc.collect()
    assert len(models) == 4 and not any(ref() for ref in models)
    assert signal.getsignal(signal.SIGTERM) == handler
    # as it was advised; and in a thread, which may not ask for signals
    thread = threading.Thread(target=here, args=[f'{cell} --init_from=resume'])
    thread.start()
    thread.join()
    assert log_of('cell') == log_of('run')      # which had no trouble

def test_what_another_launch_has_left_means_nothing(monkeypatch):
    for local, world, place in (('2', '', (0, 0, 1)), ('x', '4', (3, 0, 4))):
        env = {'RANK': '3', 'LOCAL_RANK': local, 'WORLD_SIZE': world}
        monkeypatch.setattr(os, 'environ', env)
        assert model.place() == place
    fails('MASTER_ADDR.*torchrun', model.join_processes)

def test_machines_with_another_data_or_model_are_refused(workspace):
    put({'chdir.py': "import os\nos.chdir(os.environ['MACHINE'])"})
    for name, teacher in (('here', 'run'), ('data', 'run'), ('model', 'other')):
        shutil.copytree('data/tiny', f'{name}_machine/data/tiny')
        shutil.copytree(teacher, f'{name}_machine/teacher')
    ids = np.fromfile('data/tiny/train.bin', np.uint16)
    put({'data_machine/data/tiny/train.bin': ids[::-1].tobytes()})
    for what in ('data', 'model'):
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = str(server.getsockname()[1])
        env = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        ranks = [start(f'{TINY} chdir.py --teacher=teacher --out_dir=never', env=env | {
            'RANK': rank, 'LOCAL_RANK': rank, 'MACHINE': f'{name}_machine'})
            for rank, name in (('0', 'here'), ('1', what))]
        for line, in map(told, ranks):      # each process tells
            assert f'[1] have another {what} than process 0' in line
    assert not [*Path('.').glob('*_machine/never')]

def test_a_resumed_run_is_the_same_run_in_wandb(workspace, monkeypatch):
    begun, logged = [], []
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(
        init=lambda **keys: begun.append(keys), log=lambda entry, step: logged.append(entry)))
    for keys in ('--max_iters=2', '--init_from=resume', '--init_from=scratch --out_dir=wandb2'):
        here(f'{TINY} --out_dir=wandb --wandb_log=True {keys}')
    first, resumed, other = (keys['id'] for keys in begun)
    assert first == resumed != other
    assert logged[0]['eval']['val_loss'] and logged[1]['train']['loss']

def test_a_full_disk_leaves_the_last_checkpoint(workspace, capsys, request):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)     # of a file's size
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))
    put({'blocked/hf': ''})     # a hand-over that fails costs nothing
    assert 'blocked/hf' in refused(f'{REMOVAL} --out_dir=blocked', capsys) and load('blocked')
    shutil.copytree('run', 'full')
    kept = Path('full/ckpt.pt').read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 5, hard))
    for line in ('full --init_from=resume', 'new'):     # a new run finds out before it has trained
        assert f'{line[:3]}' in refused(f'{TINY} --out_dir={line}', capsys)
    assert Path('full/ckpt.pt').read_bytes() == kept and not list(Path('full').glob('*partial'))
    assert not log_of('new')

@pytest.mark.parametrize('loss', [9.0, np.nan])
def test_divergence_stops_a_run_and_its_last_checkpoint_stays(loss, workspace, capsys, monkeypatch):
    monkeypatch.setattr(train, 'validate', lambda raw, forward, data: (loss, 0.0)
                        if raw.sites_left() == ['ln_f'] else (6.0, 0.0))
    error = refused(f'{REMOVAL} --out_dir=diverged{loss} --eval_interval=1', capsys)
    assert f'the loss is {loss:.4f}' in error and f'diverged{loss}/ckpt.pt' in error
    assert model.load_checkpoint(f'diverged{loss}')['iter'] == 8

# -----------------------------------------------------------------------------
# The hard case: a model with GPT-2's giant vector, and what a removal hands over.

@pytest.fixture(scope='session')
def flagship(workspace):
    """What config/remove_ln.py, scaled, printed; it wrote out/remove_ln, beside its control."""
    finished(workspace)
    return Path('flagship.log').read_text()

def losses_of(out_dir, event, key):
    return np.array([e[key] for e in train.read_log(out_dir, event)])

def above_control(out_dir):
    """By how much a batch's loss was above the control's: nine of ten were below this."""
    ours, control = (losses_of(d, 'train', 'loss') for d in (out_dir, 'out/remove_ln/control'))
    return np.quantile(ours - control[:len(ours)], 0.9)     # one batch is chance

def test_the_flagship_survives_the_giant_vector(flagship):
    ours, control = (losses_of(d, 'eval', 'val_loss')[-1]
                     for d in ('out/remove_ln', 'out/remove_ln/control'))
    assert above_control('out/remove_ln') < 1 and ours - control < 0.25
    for kind in ('bos', 'eot'):     # position 0, end-of-text: their std, times the ordinary
        before, after = (max(e[kind].values()) for e in train.read_log('out/remove_ln', 'giant'))
        assert before > 15 and after < 10       # it is undone
        assert f'{before:.1f} before, {after:.1f} now' in flagship
    assert f'{ours:.4f} now' in flagship and 'warning' not in flagship

def test_an_abrupt_removal_does_not_and_a_giant_that_is_left_is_told(flagship, capsys):
    put({'abrupt.py': """out_dir, max_iters, warmup_iters, eval_iters = 'abrupt', 12, 1, 20
guard_nats, taper_iters, giant_loss_weight, gap_ln2, gap_ln1qk, gap_ln1v = 0.0, 0, 0.0, 1, 1, 1
start_ln2, start_ln1qk, start_ln1v, start_lnf = 2, 3, 4, 8"""})
    here(f'train.py {SCALED} abrupt.py')
    assert above_control('abrupt') > 5
    assert 'warning: a giant vector is left' in capsys.readouterr().out

def test_a_partial_removal_ends_with_its_checkpoint(workspace, capsys, monkeypatch):
    def unknown(*args):     # a file system without fsync
        raise OSError(38, 'Function not implemented')
    monkeypatch.setattr(os, 'fsync', unknown)
    here(f'{REMOVAL} --start_ln1qk=-1 --start_ln1v=-1 --start_lnf=-1 --out_dir=partial')
    assert 'partial/ckpt.pt; no hf/: 5 of 7 sites' in capsys.readouterr().out
    # what is trained from it, without more removal, stays so; and the rest may go later
    kept = f'{TINY} --out_dir=kept --teacher=init_from'
    here(f'{kept} --init_from=partial --max_iters=2')
    for more in (3, 4):
        here(f'{kept} --init_from=resume --max_iters={more}')
    kl = losses_of('kept', 'train', 'kl')       # from what it began with
    assert len(load('kept').sites_left()) == 5 and abs(kl[0]) < 1e-6 < kl[3]
    here(f'{REMOVAL} --init_from=partial --start_ln2=-1 --out_dir=rest')
    assert load('rest/hf').config.ln_mode == 'none'

def test_the_readmes_snippets_and_the_handed_over_folder(flagship):
    """What a snippet calls logits is what our own model computes; so does transformers' cache."""
    shutil.copytree('out/remove_ln', 'out/demo')
    readme = (REPO / 'README.md').read_text()
    for snippet in re.findall(r'```python\n((?:import|from) .*?)```', readme, re.S):
        put({'snippet.py': snippet})
        names = runpy.run_path('snippet.py')
        # of the hand-over, or of the folder that the snippet came to
        ours = load(names.get('folder', 'out/demo/hf').removesuffix('/hf'))
        assert difference(names['logits'], ours(names['idx'])[0]) < 3e-4, snippet
    assert {*os.listdir('out/demo/hf')} == {'README.md', 'config.json', 'model.safetensors',
                                            'tokenizer.json', 'tokenizer_config.json'}
    tokenizer = transformers.AutoTokenizer.from_pretrained('out/demo/hf')
    for text in (*NASTY[:2], *NASTY[3:], ''.join(map(chr, range(256)))):
        ids = tokenizer(text + '<|endoftext|>')['input_ids']
        assert ids == [*text.encode(), 256] and tokenizer.decode(ids[:-1]) == text
    ids = torch.tensor([[*b'import os']])
    theirs = load_theirs('out/demo/hf').generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(theirs, load('out/demo').generate(ids, 40, temperature=0))

# -----------------------------------------------------------------------------
# What users bring: models, and HellaSwag.

@pytest.fixture
def hub(folder):
    """A hub on localhost, of the folder `hub` -> (the paths it was asked for, environment)."""
    server, downloads = hub_server.serve('hub')
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield downloads, {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}',
                      'HF_HUB_OFFLINE': '0', 'HF_HOME': os.path.abspath('cache')}
    server.shutdown()

def test_from_pretrained_downloads_from_a_hub(hub):
    downloads, env = hub
    ours = random_model()
    ours.save_pretrained('hub/me/tiny', {'tokenizer.json': b'{}', 'pytorch_model.bin': b'pickle'})
    put({'load.py': """from model import GPT2, companions
GPT2.from_pretrained('me/tiny').save_pretrained('copy', companions('me/tiny'))"""})
    found, missing = start('load.py', env=env), start('eval_hellaswag.py me/nothing', env=env)
    finished(found)
    line, = told(missing)
    assert 'me/nothing' in line
    assert difference(load('copy')(IDX)[0], ours(IDX)[0]) == 0
    assert Path('copy/tokenizer.json').read_bytes() == b'{}' and 'bin' not in str(downloads)

def test_checkpoints_of_other_savers(folder):
    """Each computes what transformers computes from the same folder, or is refused."""
    class Evil:
        __reduce__ = lambda self: (os.mkdir, ('ran',))
    random_model().save_pretrained('saved')
    theirs = load_theirs('saved')
    os.remove('saved/model.safetensors')
    sd, logits, config = theirs.state_dict(), theirs(IDX).logits, read_json('saved/config.json')
    renamed = lambda change: {change(k): v for k, v in sd.items()}
    without = lambda part: {k: v for k, v in sd.items() if part not in k}
    for good in (sd, without('lm_head'), without('wte'), renamed(lambda k: '_orig_mod.' + k),
                 renamed(lambda k: k.replace('transformer.', '')),
                 sd | {'transformer.h.0.attn.bias': torch.ones(1, 1, 31, 31)}):
        torch.save(good, 'saved/pytorch_model.bin')
        assert difference(load('saved')(IDX)[0], logits) < 1e-5
    for bad, change, said in (
            (sd | {'lm_head.weight': sd['lm_head.weight'] + 1}, {}, 'differ'),
            (sd | {'score.weight': torch.ones(2)}, {}, 'score.weight'),
            (without('ln_f'), {}, 'ln_f'), (Evil(), {}, 'damaged'), (sd, {'n_embd': '39'}, '39'),
            (sd, {'model_type': 'llama'}, 'llama'), (sd, {'activation_function': 'gelu'}, 'gelu')):
        torch.save(bad, 'saved/pytorch_model.bin')
        put({'saved/config.json': json.dumps(config | change)})
        fails(said, load, 'saved')
    torch.save({'model': Evil()}, 'saved/ckpt.pt')
    fails('damaged', load, 'saved')
    assert not os.path.exists('ran')

def own_tokenizer(folder):
    """A folder with a byte-level tokenizer of its own, of which </s> is token 0."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([(REPO / 'README.md').read_text()], vocab_size=300,
                            special_tokens=['</s>', '<pad>'], show_progress=False)
    put({f'{folder}/tokenizer.json': bpe.to_str(),
         f'{folder}/tokenizer_config.json': '{"eos_token": {"content": "</s>"}}'})
    return bpe

def test_a_models_own_tokenizer_and_ids_are_handed_on(workspace, capsys):
    own_tokenizer('german')
    german = random_model(vocab_size=350, block_size=32)    # padded; data of 300 tokens fits
    german.config.hf = ids = dict(bos_token_id=0, eos_token_id=[0, 5], pad_token_id=1)
    german.save_pretrained('german', {'chat_template.jinja': b'{{ x }}',
                                      'generation_config.json': b'{"pad_token_id": 1}'})
    put({'t.txt': 'Grüße und mehr Text </s> ' * 800})
    here('prepare.py t.txt --tokenizer=german --val_fraction=0.2')
    here('train.py tiny.py remove.py --dataset=t --init_from=german --out_dir=german_run')
    for file in ('tokenizer.json', 'chat_template.jinja', 'generation_config.json'):
        assert Path('german_run/hf', file).read_bytes() == Path('german', file).read_bytes()
    assert ids.items() <= read_json('german_run/hf/config.json').items()
    assert load('german_run/hf').config.eot_token_id == 0
    assert 'warning: that is worse than chance' in capsys.readouterr().out  # its numbers are random

def question(ctx_a='A man sits. He', ctx_b='', label=0,
             endings=('goes.', 'naïve 文字 “quote”.', 'no', 'is [title] Here [step] it  ends. ')):
    return {'activity_label': 'Sitting', 'ctx_a': ctx_a, 'ctx_b': ctx_b,
            'ctx': f'{ctx_a} {ctx_b}'.strip(), 'endings': [*endings], 'label': label}

QUESTIONS = [question(label=2), question('Then, the man.', 'the Woman', 2),
             question('[header] How to do [title] Begin. [step] Now [substeps]', '', '2'),
             question('long ' * 60, 'end', 2, ('x', 'longer ' * 5, '[step]', 'é🙂')),
             question(endings=('y ' * 40, 'a', 'b', 'c'), label=3)]

def test_hellaswag_texts_of_both_conventions():
    texts, endings = eval_hellaswag.texts, QUESTIONS[1]['endings']
    assert texts(QUESTIONS[1], 'completion') == ('Then, the man. the Woman', endings)
    assert texts(QUESTIONS[1], 'harness') == (
        'Sitting: Then, the man. The woman', [*endings[:3], 'is. Here it ends.'])
    assert texts(QUESTIONS[2], 'harness')[0] == 'Sitting: How to do. Begin. Now '

def test_hellaswag_scores_equal_one_ending_at_a_time(workspace):
    model = random_model(block_size=64, vocab_size=257)
    model.save_pretrained('hs')
    put({'hs.jsonl': '\n'.join(map(json.dumps, QUESTIONS))})
    line = 'eval_hellaswag.py hs --data=hs.jsonl --device=cpu --json='
    two = start(f'{line}hs2.json', nproc=2)
    here(f'{line}hs1.json')
    assert 'lost some on the left: 3' in finished(two)
    one = read_json('hs1.json')
    assert one == read_json('hs2.json') and one['questions'] == 5 and one['truncated'] == 3
    styles = ('completion', 'harness')
    sums, lengths = np.zeros((2, 5, 2, 4))
    for i, s, e in np.ndindex(5, 2, 4):     # question, style, ending
        context, endings = eval_hellaswag.texts(QUESTIONS[i], styles[s])
        ids = torch.tensor([*f'{context} {endings[e]}'.encode()])
        # the harness gives the spaces at the context's end to the ending
        n = min(len(ids) - len((context.rstrip() if s else context).encode()), 64)
        logits = model(ids[None, -65:-1])[0][0]
        sums[i, s, e] = -F.cross_entropy(logits[-n:], ids[-n:], reduction='sum')
        lengths[i, s, e] = len(endings[e]) if s else n
    found = [[q[style]['loglikelihood'] for style in styles] for q in one['scores']]
    assert np.array(found) == pytest.approx(sums, abs=1e-3)
    means, labels = sums / lengths.clip(1e-9), [[int(q['label'])] for q in QUESTIONS]
    right = [*(sums.argmax(2) == labels).mean(0), *(means.argmax(2) == labels).mean(0)]
    assert [one[k] for k in ('acc', 'harness_acc', 'acc_norm', 'harness_acc_norm')] == right
    assert len({*right}) == 4       # none could be taken for another
    assert one['acc_stderr'] == pytest.approx((one['acc'] * (1 - one['acc']) / 4) ** 0.5)

def test_the_questions_are_downloaded_whole_or_not_at_all(hub, monkeypatch):
    downloads, env = hub
    body = '\n'.join([json.dumps(question())] * eval_hellaswag.QUESTIONS)
    put({'hub/me/hs/good': body, 'hub/me/hs/short': body[:len(body) // 2]})
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    url = f"{env['HF_ENDPOINT']}/me/hs/resolve/main/"
    for name, said in (('short', 'Unterminated|expected 10042'), ('nothing', '404')):
        fails(said, eval_hellaswag.download, url + name, 'data/q.jsonl')
    assert len(downloads) == 5 + 1 and not os.path.exists('data/q.jsonl')
    eval_hellaswag.download(url + 'good', 'data/q.jsonl')
    assert Path('data/q.jsonl').read_text() == body and os.listdir('data') == ['q.jsonl']

# -----------------------------------------------------------------------------
# What users bring: text.

@pytest.fixture
def gpt2():
    try:
        return prepare.get_tokenizer('gpt2')
    except UserError as e:
        pytest.skip(str(e))

def documents_of(name, split='train', eot=256):
    ids = np.fromfile(f'data/{name}/{split}.bin', np.uint16)
    parts = np.split(ids, np.flatnonzero(ids == eot) + 1)
    return [part.tolist() for part in parts if len(part)]

NASTY = ['plain text, and  two  spaces', '', '<|endoftext|> is ordinary text here',
         'naïve 文字 🙂 \u200b\n\n\t x', ' ' * 50, "don't I'll we've", '\r\nwindows\r\n']

def parquet(schema=None, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns, schema), 'rows.parquet')
    return Path('rows.parquet').read_bytes()

def test_bins_of_any_layout_equal_tiktoken(folder, capsys, gpt2):
    bpe, text, row = tiktoken.get_encoding('gpt2'), NASTY[3], json.dumps({'text': NASTY[3]})
    big, rows = (REPO / 'train.py').read_text() * 20, [*NASTY, 'a lone \ud800 surrogate']
    put({'all/0.TXT': big, 'all/a.parquet': parquet(text=NASTY), 'all/x.png': b'\0', 'notes': text,
         'all/sub/a.jsonl': '\n'.join(json.dumps({'text': text}) for text in [*rows, None]),
         'all/sub/b.md': text.encode('utf-8-sig'), 'all/sub/c.txt': text.encode('utf-16'),
         'all/sub/d.jsonl.gz': gzip.compress(f'\ufeff{row}\n\n{row}\n'.encode()),
         'all/sub/e.json': json.dumps([{'text': text}] * 2, indent=1),
         'all/sub/f.json': f'{row}\n{row}', 'all/.hidden.txt': 'hidden'})
    os.symlink(os.path.abspath('all'), 'all/sub/loop')
    here('prepare.py all notes --val_fraction=0')
    expected = [bpe.encode_ordinary(t) + [50256] for t in (big, *NASTY, *rows, *[text] * 9)]
    assert documents_of('all', eot=50256) == expected
    out = capsys.readouterr().out
    assert '9 files,' in out and '1 files of other kinds' in out and '1 rows without text' in out
    assert read_json('data/all/meta.json') == {
        'tokenizer': 'gpt2', 'vocab_size': 50257, 'eot': 50256, 'val': dict(documents=0, tokens=0),
        'train': {'documents': len(expected), 'tokens': sum(map(len, expected))}}
    here('prepare.py all --name=some --val_fraction=0 --max_tokens=90_000')     # of two parts
    assert documents_of('some', eot=50256) == [expected[0][:89_999] + [50256]]

def test_a_long_text_is_read_in_parts_with_the_ids_of_the_whole(folder, gpt2):
    pieces = [*' \t\n\xa0\x1c\u2028éa文🙂1.;,"', '\r\n', '  ', "'s", 'the', ' b', '\n\n', '<|']
    weird = ''.join(np.random.default_rng(0).choice(pieces, 60_000))
    own_tokenizer('own')
    llama = read_json('own/tokenizer.json') | {'normalizer': {'type': 'Prepend', 'prepend': '_'}}
    put({'llama/tokenizer.json': json.dumps(llama), 'llama/config.json': '{"eos_token_id": 0}'})
    for name, least in (('gpt2', 99), ('bytes', 99), ('own', 99), ('llama', 1)):
        encode = prepare.get_tokenizer(name).encode
        for text in (weird, 'x' * 9000, ' ' * 3000 + '\nx'):
            parts = [*prepare.parts(io.StringIO(text, newline=''), encode, size=500)]
            ids = np.concatenate([encode(part) for part, _ in parts])
            assert ids.tolist() == encode(text).tolist(), name
            assert len(parts) >= least or text is not weird

def test_what_cannot_be_read_is_an_error_with_its_place(folder, capsys):
    put({'latin/a.txt': 'x', 'latin/b.txt': b'good\n' * 100_000 + b'caf\xe9 ' * 9999, 'w': 'w',
         'wide.txt': 'no mark'.encode('utf-16-le'), 'x/y.jsonl.zst': 'x', 'empty/.hidden': '',
         't.csv': 'text\nx', 't.jsonl': '{"body": "x"}',
         'half.jsonl': '{"text": "fine"}\n{"text": \n{}\n'})
    for n in ('257', '-1', '1.5', '"7"'):
        put({f'ids{n}.jsonl': '{"input_ids": [256]}\n{"input_ids": [%s]}' % n})
    for line, *said in (
            ('latin', 'b.txt', 'byte 500,003', 'iconv -c'), ('wide.txt', 'byte-order mark'),
            ('x', 'y.jsonl.zst', 'unpack'), ('t.csv', 'jsonl'), ('half.jsonl', 'row 2'),
            ('t.jsonl', 'row 1', 'body'),
            ('ids257.jsonl', 'row 2', '257'), ('ids-1.jsonl', '-1'), ('ids1.5.jsonl', '1.5'),
            ('ids"7".jsonl', '7'), ('empty', '.parquet'), ('w --max_tokens=0', '0'),
            ('w --name=../w', '../w'), ('w --tokenizer=empty', 'tokenizer.json'),
            ('w --split=test', 'drop')):
        error = refused(f'prepare.py --tokenizer=bytes --name=x {line}', capsys)
        assert all(word in error for word in said) and not os.path.exists('data/x'), error

def test_data_is_not_overwritten_but_what_a_killed_run_left_is(folder, capsys, monkeypatch):
    look = lambda folder: {path.name: path.read_bytes() for path in Path(folder).rglob('*.*')}
    put({'a/train.txt': 'this is a. ' * 500, 'data/mine/train.bin': 'nanoGPT wrote this'})
    replace, line, order = os.replace, 'prepare.py a/train.txt --tokenizer=bytes', []
    monkeypatch.setattr(os, 'replace', lambda *names: order.append(names) or replace(*names))
    here(line)
    assert order[-1] == (Path('data/train/meta.json.partial'), Path('data/train/meta.json'))
    data = look('data/train')
    assert len(data) == 5 and read_json('data/train/meta.json')['val']['tokens'] == 1025
    assert '--name=' in refused(line, capsys) + refused(f'{line} --name=mine', capsys)
    assert look('data/train') == data and os.listdir('data/mine') == ['train.bin']
    Path('data/train/tokenizer/vocab.json').write_text("another tokenizer's")
    os.rename('data/train/meta.json', 'data/train/meta.json.partial')
    here(line)
    assert look('data/train') == data

def test_a_folders_tokenizer_needs_no_network_and_is_copied(folder, capsys, monkeypatch):
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: 1 / 0)
    bpe = own_tokenizer('own')
    put({'t.txt': 'Grüße </s> <pad> <|endoftext|> and more text ' * 400})
    assert 'TIKTOKEN_CACHE_DIR' in refused('prepare.py t.txt', capsys)
    here('prepare.py t.txt --tokenizer=own --val_fraction=0')
    ids = np.fromfile('data/t/train.bin', np.uint16)
    assert bpe.decode(ids[:-1].tolist()) == Path('t.txt').read_text()
    assert ids[-1] == 0 and (ids[:-1] > 1).all()    # what is written in a text is text
    for eos, eot in ((1, 1), ([5, 0], 5), (70_000, 0), (None, 0)):
        put({'own/config.json': json.dumps({'eos_token_id': eos})})
        assert prepare.get_tokenizer('own').eot == eot
    large = read_json('own/tokenizer.json')
    large['model']['vocab'] |= {f'more{i}': i for i in range(300, 65537)}
    put({'own/tokenizer.json': json.dumps(large)})
    assert '65,537 tokens' in refused('prepare.py t.txt --name=x --tokenizer=own', capsys)

def test_presets_set_nanogpts_documents_aside_or_are_windows(folder, monkeypatch):
    split = datasets.Dataset.from_dict({'n': range(5000)}).train_test_split(0.0005, seed=2357)
    assert prepare.nanogpt_val(5000) == set(split['test']['n'])
    drawn = sorted(n for n in prepare.nanogpt_val() if n < 4000)
    windows = np.random.default_rng(0).integers(257, size=(50, 128)).tolist()
    hub = {'openwebtext': [f'row {n}' for n in range(4000)],
           'pile': [{'input_ids': row} for row in windows], 'me/ids': [{'input_ids': [1, 2]}, [3]]}
    monkeypatch.setattr(prepare, 'hub_rows', lambda source, o: hub[source])
    for line in (*hub, 'pile --name=seven --max_tokens=1000'):      # whole windows only
        here(f'prepare.py {line} --tokenizer=bytes')
    assert documents_of('openwebtext', 'val') == [[*f'row {n}'.encode(), 256] for n in drawn]
    assert documents_of('ids') + documents_of('ids', 'val') == [[1, 2, 256], [3, 256]]
    for name, n in (('pile', 50), ('seven', 7)):
        assert np.fromfile(f'data/{name}/val.bin', np.uint16).tolist() == sum(windows[:n], [])
        assert read_json(f'data/{name}/meta.json')['window'] == 128

def test_prepare_streams_from_a_hub(hub):
    texts = [f'text {i}' for i in range(300)]
    sound = datasets.Features(audio=datasets.Audio(), text=datasets.Value('string')).arrow_schema
    configs = '---\nconfigs:\n' + ''.join(
        f'- {{config_name: {name}, data_files: a.parquet}}\n' for name in ('one', 'two')) + '---\n'
    put({'hub/datasets/me/sound/a.parquet': parquet(sound, audio=[{}] * 300, text=texts),
         'hub/datasets/me/configs/a.parquet': parquet(text=[*texts, None]),
         'hub/datasets/me/configs/README.md': configs, 'hub/datasets/me/lines/a.jsonl': '\n'.join(
             json.dumps({'n': 1, 'text': text}) for text in texts), 'lines.py': """import prepare
for line in ('configs', 'nothing', 'sound', 'lines', 'configs --config=two'):
    try:
        prepare.main([*f'me/{line}'.split(), '--tokenizer=bytes', '--val_fraction=0'])
    except SystemExit: pass"""})
    errors = told(start('lines.py', env=hub[1]), 0)
    assert len(errors) == 2 and "'one', 'two'" in errors[0] and 'me/nothing' in errors[1], errors
    for name in ('configs', 'lines', 'sound'):      # no configuration is chosen silently
        assert documents_of(name) == [[*text.encode(), 256] for text in texts]

# -----------------------------------------------------------------------------
# Bad input: one line on stderr with the value and what to type, exit status 2, nothing written.

@pytest.fixture(scope='session')
def broken(workspace):
    """What the cases below refer to."""
    here(f'{REMOVAL} --out_dir=free')
    for name in ('data/odd', 'data/big', 'data/cut'):
        shutil.copytree('data/tiny', name)
    shutil.copytree('run', 'nolog')
    ids = Path('data/tiny/train.bin').read_bytes()
    put({'words.txt': 'some words', 'crash.py': 'max_iters = 1 / 0', 'twelve.py': 'n_layer = 12',
         'data/odd/train.bin': ids + b'x', 'nolog/log.jsonl': '{',
         'data/big/train.bin': np.full(len(ids) // 2, 60000, np.uint16).tobytes(),
         'data/cut/meta.json': Path('data/tiny/meta.json').read_text().replace('257', '400'),
         'good.jsonl': json.dumps(question()), 'bad.jsonl': '\n' + json.dumps(question(label=4))})
    infinite = random_model('none', block_size=64, vocab_size=257)
    infinite.wte.weight[ord('t')] = 3e38
    model.save_checkpoint('infinite', infinite)
    random_model(vocab_size=300).save_pretrained('odd_vocab')
    fading = GPT2.from_pretrained('model', 'fake')
    fading.sites()['h.1.ln_1.v'].fill_(0.5)
    model.save_checkpoint('fading', fading)

NEW = f'{TINY} --out_dir=never'
LOADED = 'train.py tiny.py --out_dir=never --init_from=model'

@pytest.mark.parametrize('line, said', [
    ('train.py --batchsize=8', "'batchsize'"),
    ('train.py --max_iters=1.5', '1.5'),
    ('train.py --batch_size=0', 'batch_size is 0'),
    ('train.py --batch_size 8', '--key=value'),
    ('train.py crash.py', 'ZeroDivisionError'),
    ('train.py --dtype=float16', 'float16'),
    (f'{NEW} --random_share=0.1', '--teacher='),
    (f'{NEW} remove.py --gap_ln2=-5', 'h.1.ln_2'),
    (f'{NEW} --device=abacus', '--device=auto'),
    (f'{NEW} --dataset=nothing', '--name=nothing'),
    (f'{NEW} --dataset=odd', 'data/odd/train.bin'),
    (f'{LOADED} --dataset=big', '60000'),
    (f'{LOADED} --dataset=cut', '400'),
    (f'{LOADED} twelve.py', 'n_layer is 12'),
    (f'{NEW} --batch_tokens=500', 'batch_tokens=500'),
    (f'{NEW} --teacher=odd_vocab', '300'),
    (f'{NEW} remove.py --max_iters=10', 'ln_f is not gone'),
    (f'{LOADED} remove.py --init_from=fading', 'h.1.ln_1.v is at 0.5'),
    (f'{NEW} --init_from=no/such', 'no/such'),
    (f'{TINY} --init_from=resume --out_dir=free', 'another schedule'),
    (f'{TINY} --learning_rate=1e-5', 'min_lr'),
    (f'{TINY} --seed=-1', 'seed is -1'),
    (f'{NEW} remove.py --start_bos=100', 'bos is not gone'),
    (f'{TINY} --init_from=resume --out_dir=nolog', 'log.jsonl'),
    (f'{TINY} --init_from=resume --out_dir=run --eval_iters=5', 'windows'),
    (f'{NEW} --out_dir=run', '--init_from=resume'),
    (f'{NEW} --out_dir=words.txt/x', 'words.txt'),
    ('train.py config/eval.py --dataset=tiny --init_from=infinite', 'diverged'),
    ('eval_hellaswag.py run --data=bad.jsonl', 'line 2'),
    ('eval_hellaswag.py infinite --data=good.jsonl', 'question 1'),
    ('eval_hellaswag.py odd_vocab --data=good.jsonl', '300')])
def test_bad_input_is_told_in_one_line(line, said, broken, capsys):
    look = lambda: {p: p.stat().st_mtime_ns for folder in ('run', 'data', 'nolog')
                    for p in Path(folder).rglob('*') if p.is_file()}
    kept = look()
    assert said in refused(line, capsys)
    assert kept == look() and not os.path.exists('never')

def test_a_missing_compiler_is_one_line(workspace):
    env = {'CXX': '/nowhere/g++', 'TORCHINDUCTOR_CACHE_DIR': os.path.abspath('cache')}
    line, = told(start(f'{TINY} --out_dir=nocc --n_layer=1 --compile=True', env=env))
    assert '--compile=False' in line

def test_the_requirements_bring_all_that_the_scripts_import():
    norm = lambda name: re.match(r'[\w.-]+', name)[0].lower().replace('_', '-')
    installed = {norm(d.name): d.requires or () for d in metadata.distributions()}
    required = [norm(line) for line in (REPO / 'requirements.txt').read_text().splitlines()]
    for name in required:       # and what these require: the list grows
        more = {norm(line) for line in installed.get(name, ()) if 'extra ==' not in line}
        required += more.difference(required)
    ours = {'model', 'train', 'prepare', 'eval_hellaswag'}
    code = ''.join((REPO / f'{name}.py').read_text() for name in ours)
    imported = {*re.findall(r'^ *(?:from|import) (\w+)', code, re.M)}
    for module in imported - ours - {'wandb'} - sys.stdlib_module_names:
        assert {*map(norm, metadata.packages_distributions()[module])} & {*required}, module
