"""
The project's claims, one test each. Everything runs offline on two CPU cores, in random or self-trained models.

    make test
"""
import contextlib
import http.server
import importlib.metadata
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
import prepare
import model
import report
import train
from model import BOS, EOT, TOKEN, BadInput, GPT2, GPT2Config

REPO = Path(__file__).parent.resolve()
TINY = ['--dataset=tiny', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--batch_tokens=512',
        '--learning_rate=3e-3', '--warmup_iters=2', '--eval_iters=10', '--log_interval=1', '--compile=False', '--device=cpu']
REMOVE = ['--remove_ln=True', '--start_ln2=2', '--gap_ln2=1', '--start_ln1qk=4', '--gap_ln1qk=1', '--start_ln1v=6', '--gap_ln1v=2',
          '--start_lnf=10', '--start_eot=11', '--start_bos=13']


@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    """A folder with data/tiny, this repository's own source as bytes; the tests run in it."""
    folder = tmp_path_factory.mktemp('workspace')
    old = os.getcwd()
    os.chdir(folder)
    prepare.main([str(REPO / f) for f in ('model.py', 'train.py', 'prepare.py', 'test_model.py')]
                 + ['--name=tiny', '--tokenizer=bytes', '--val_fraction=0.1'])
    yield folder
    os.chdir(old)


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
    return [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]


def run(*args, nproc=1, **kwargs):
    """train.py as a user starts it, under torchrun if nproc > 1."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}'] if nproc > 1 else []
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    return subprocess.Popen([sys.executable, *launcher, str(REPO / 'train.py'), *args], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


def finished(process):
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output

# -----------------------------------------------------------------------------
# The model.

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
    real = ln(x, kind)[0]
    model.sites()['h.1.ln_1.v'].fill_(0.25)
    qk, v = ln(x, kind)
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
        with pytest.raises(BadInput, match='none left to remove'):
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
    with pytest.raises(BadInput, match='9 of 10 sites still divide by the token'):
        model.save_pretrained(tmp_path / 'x')
    remove_all(model, IDX).ln_f.std[BOS] = 7
    with pytest.raises(BadInput, match='ln_f still has constants of its own'):
        model.save_pretrained(tmp_path / 'x')
    with pytest.raises(BadInput, match='cannot be folded'):
        model.fold_ln()
    none = random_model('none')
    with pytest.raises(BadInput, match='reads the mean of the residual stream'):
        none.save_pretrained(tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


@pytest.fixture
def hub(tmp_path):
    """A server on localhost that speaks the hub's protocol -> (its repositories, to be filled; environment; requests).

    The numbers in repos['drop'] count GET requests for files that will break off in the middle.
    """
    repos, requests = {'drop': set()}, []       # {('models' or 'datasets', name): {revision: {file name: bytes}}}

    files = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self):
            """(status, body) of a request for /api/KIND/NAME[/tree/REVISION[/FOLDER]] or [/datasets]/NAME/resolve/REVISION/FILE."""
            path = urllib.parse.unquote(self.path.split('?')[0])
            for (kind, name), revisions in ((k, v) for k, v in repos.items() if k != 'drop'):
                prefix = f'/{name}/resolve/' if kind == 'models' else f'/datasets/{name}/resolve/'
                for i, (revision, files) in enumerate(revisions.items()):
                    self.sha = f'{i:040x}'
                    for r in (revision, self.sha):
                        if path == f'/api/{kind}/{name}/revision/{r}' or path == f'/api/{kind}/{name}' and i == 0:
                            return 200, json.dumps({'id': name, 'sha': self.sha, 'siblings': [{'rfilename': f} for f in files]}).encode()
                        if path.startswith(f'/api/{kind}/{name}/tree/{r}'):
                            folder = path.removeprefix(f'/api/{kind}/{name}/tree/{r}').strip('/')
                            tree = [{'type': 'file', 'path': f, 'oid': f, 'size': len(b)} for f, b in files.items()]
                            tree += [{'type': 'directory', 'path': str(d), 'oid': str(d)} for d in {d for f in files for d in list(Path(f).parents)[:-1]}]
                            return 200, json.dumps(tree if 'recursive=true' in self.path.lower() else
                                                   [t for t in tree if os.path.dirname(t['path']) == folder]).encode()
                        if path.startswith(f'{prefix}{r}/') and path.removeprefix(f'{prefix}{r}/') in files:
                            return 200, files[path.removeprefix(f'{prefix}{r}/')]
            return 404, b''

        def do_GET(self):
            requests.append(self.path)
            self.sha = ''
            status, body = self.answer()
            headers = {'ETag': f'"{len(body)}"', 'X-Repo-Commit': self.sha, 'Accept-Ranges': 'bytes'}
            if status == 404:
                headers = {'X-Error-Code': 'EntryNotFound' if '/resolve/' in self.path else 'RepoNotFound'}
            elif part := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
                first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
                headers['Content-Range'] = f'bytes {first}-{last}/{len(body)}'
                status, body = 206, body[first:last + 1]
            self.send_response(status)
            for header in (*headers.items(), ('Content-Length', str(len(body)))):
                self.send_header(*header)
            self.end_headers()
            if self.command == 'GET':
                files.append(self.path) if '/resolve/' in self.path else None
                drop = '/resolve/' in self.path and len(files) in repos['drop']
                self.wfile.write(body[:len(body) // 2] if drop else body)
                self.close_connection = drop
        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield repos, os.environ | {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(tmp_path / 'cache'),
                               'PYTHONPATH': str(REPO)}, requests
    server.shutdown()


def test_from_pretrained_downloads_from_a_hub(hub, tmp_path):
    repos, env, requests = hub
    model = random_model()
    model.save_pretrained(tmp_path / 'repo')
    files = {n: (tmp_path / 'repo' / n).read_bytes() for n in ('config.json', 'model.safetensors')}
    repos['models', 'me/tiny'] = {'main': files | {'pytorch_model.bin': b'a pickle'}}
    code = ("import sys; from model import GPT2; import torch; m = GPT2.from_pretrained(sys.argv[1]).eval(); "
            "print(m(torch.arange(31)[None])[0].double().sum().item())")
    out = subprocess.run([sys.executable, '-c', code, 'me/tiny'], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) == pytest.approx(model(torch.arange(31)[None])[0].double().sum().item(), rel=1e-4)
    assert not any('pytorch_model.bin' in r for r in requests if 'resolve' in r)    # never a pickle
    out = subprocess.run([sys.executable, '-c', code, 'me/nothing'], env=env, capture_output=True, text=True)
    assert 'BadInput: me/nothing names nothing' in out.stderr


def test_prepare_streams_from_a_hub_also_what_has_a_dataset_script(hub, tmp_path):
    import pyarrow.parquet
    repos, env, _ = hub
    pyarrow.parquet.write_table(pyarrow.table({'text': [f'document {i}' for i in range(300)]}), tmp_path / 'p')
    parquet = (tmp_path / 'p').read_bytes()
    repos['datasets', 'me/rows'] = {'main': {'data/train-00000-of-00001.parquet': parquet}}
    repos['datasets', 'me/script'] = {'main': {'script.py': b'import os'}, 'refs/convert/parquet': {'default/train/0000.parquet': parquet}}
    for name in ('rows', 'script'):
        out = subprocess.run([sys.executable, str(REPO / 'prepare.py'), f'me/{name}', '--tokenizer=bytes', '--max_tokens=1000', '--val_fraction=0'],
                             env=env, cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        ids = np.fromfile(tmp_path / f'data/{name}/train.bin', np.uint16)
        expected = np.concatenate([[*f'document {i}'.encode(), 256] for i in range(300)])
        assert len(ids) == 1000 and ids[-1] == 256 and (ids[:-1] == expected[:999]).all()
    ids = np.random.default_rng(0).integers(50257, size=(200, 256))
    pyarrow.parquet.write_table(pyarrow.table({'input_ids': list(ids)}), tmp_path / 'p')
    repos['datasets', 'lucabaroni/apollo-pile-filtered-10k'] = {'main': {'data/train-00000-of-00001.parquet': (tmp_path / 'p').read_bytes()}}
    out = subprocess.run([sys.executable, str(REPO / 'prepare.py'), 'pile_filtered'], env=env, cwd=tmp_path, capture_output=True, text=True)
    if out.returncode == 0 or 'BPE files cannot be had' not in out.stderr:
        assert out.returncode == 0 and 'took 200 windows of pile_filtered' in out.stdout, out.stderr
        assert (np.fromfile(tmp_path / 'data/pile_filtered/val.bin', np.uint16) == ids.ravel()).all()

    expected_all = np.concatenate([[*f'document {i}'.encode(), 256] for i in range(300)])
    repos['datasets', 'me/shards'] = {'main': {f'data/train-{k:05d}-of-00002.parquet': parquet for k in range(2)}}
    repos['drop'] = set(range(1, 400, 3))      # one request in three breaks off in the middle
    out = subprocess.run([sys.executable, str(REPO / 'prepare.py'), 'me/shards', '--tokenizer=bytes', '--val_fraction=0'],
                         env=env, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and 'etrying' in out.stderr, out.stderr
    assert (np.fromfile(tmp_path / 'data/shards/train.bin', np.uint16) == np.concatenate([expected_all] * 2)).all()
    out = subprocess.run([sys.executable, str(REPO / 'prepare.py'), 'me/nothing', '--tokenizer=bytes'], env=env, cwd=tmp_path,
                         capture_output=True, text=True)
    assert out.returncode == 2 and 'me/nothing is no file or folder here, no preset' in out.stderr and not (tmp_path / 'data/nothing').exists()

# -----------------------------------------------------------------------------
# The schedule.

def test_the_papers_schedule_event_by_event():
    cfg, _ = train.load_config([str(REPO / 'config/remove_ln.py')])
    expected = [(200 + 20 * i, 'remove', f'h.{i}.ln_2') for i in range(12)]
    expected += [(440 + 20 * i, 'remove', f'h.{i}.ln_1.qk') for i in range(12)]
    expected += [(680 + 30 * i, 'remove', f'h.{i}.ln_1.v') for i in range(12)]
    expected += [(1040, 'remove', 'ln_f'), (1060, 'merge', 'eot'), (1160, 'merge', 'bos')]
    events = train.schedule(cfg, 12)
    assert events == expected

    # and the gates and constants that follow from it, on a model of 12 layers
    model = GPT2(GPT2Config(block_size=4, vocab_size=9, n_layer=12, n_head=1, n_embd=4, ln_mode='fake'))
    calls = []

    def measured():
        calls.append(it)
        return torch.arange(1.0, 76).view(25, 3) + 100 * len(calls)
    logged = []
    for it in range(cfg.max_iters):
        logged += train.apply_schedule(events, cfg, it, model, measured)
        assert sum(g.item() for g in model.sites().values()) == sum(when <= it for when, what, _ in events if what == 'remove')
        if it == 1100:      # end-of-text is merged, position 0 not yet
            assert all(ln.std[EOT] == ln.std[TOKEN] != ln.std[BOS] for ln in model.layernorms().values())
    assert [(e['iter'], e['event'], e.get('site') or e['kind']) for e in logged] == expected
    assert len(calls) == 25 and max(calls) == 1040       # ln_1's two sides share what was measured for the first
    std = {e['site']: e['std'] for e in logged if e['event'] == 'remove'}
    assert std['h.3.ln_1.qk'] == std['h.3.ln_1.v'] != std['h.3.ln_2']
    assert model.fold_ln().config.ln_mode == 'none'

    # measure_once: every constant from the first removal's iteration, also of what the schedule does not have yet
    model, cfg.measure_once, calls[:] = GPT2(GPT2Config(block_size=4, vocab_size=9, n_layer=12, n_head=1, n_embd=4, ln_mode='fake')), True, []
    for it in range(1050):
        train.apply_schedule(events if it > 1000 else [e for e in events if e[2] != 'ln_f'], cfg, it, model, measured)
    assert calls == [200] and model.ln_f.std.tolist() == [173, 174, 175] and model.ln_f.gate == 1

    # a model that lost one side in an earlier run keeps that side's constant when the other goes
    model = GPT2(GPT2Config(block_size=4, vocab_size=9, n_layer=1, n_head=1, n_embd=4, ln_mode='fake'))
    model.sites()['h.0.ln_1.qk'].fill_(1)
    model.h[0].ln_1.std.fill_(5)
    train.apply_schedule([(0, 'remove', 'h.0.ln_1.v')], cfg, 0, model, lambda: torch.ones(3, 3))
    assert model.h[0].ln_1.std.tolist() == [5, 5, 5] and model.h[0].ln_1.gate.tolist() == [1, 1]


def test_taper():
    cfg, _ = train.load_config(REMOVE + ['--taper_iters=4', '--max_iters=30'])
    events = train.schedule(cfg, 2)
    model = GPT2(GPT2Config(block_size=4, vocab_size=9, n_layer=2, n_head=1, n_embd=4, ln_mode='fake'))
    gates, stds, log = [], [], []
    for it in range(17):
        log += train.apply_schedule(events, cfg, it, model, lambda: torch.tensor([[2.0, 10.0, 4.0]] * 5))
        gates.append(model.sites()['h.0.ln_2'].item())
        stds.append(model.h[0].ln_2.std.tolist())
    assert gates == [0, 0, 0.25, 0.5, 0.75] + [1.0] * 12
    assert stds[2:] == [[2, 10, 4]] * 9 + [[2, 10, 3.5], [2, 10, 3], [2, 8, 2.5], [2, 6, 2], [2, 4, 2], [2, 2, 2]]     # the merges too
    assert [e['iter'] for e in log if e['event'] == 'merge'] == [11, 13]
    model.h[0].ln_2.std[:] = torch.tensor([0.1, 33000.7, 4.0])      # where rounding would leave a difference
    for it in range(13, 17):
        train.apply_schedule(events, cfg, it, model, None)
    assert model.h[0].ln_2.std[BOS] == model.h[0].ln_2.std[TOKEN]
    with pytest.raises(BadInput, match='removes h.0.ln_2 twice'):
        train.check_schedule(events + events[:1], cfg, {})
    with pytest.raises(BadInput, match='outside the run of max_iters=13'):
        train.check_schedule(events, train.load_config(REMOVE + ['--taper_iters=4', '--max_iters=13'])[0], {})

# -----------------------------------------------------------------------------
# Training runs.

def test_one_training_graph_and_one_evaluation_graph_over_a_whole_removal(workspace):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    train.main(TINY + REMOVE + ['--out_dir=compiled', '--max_iters=16', '--eval_interval=4', '--compile=True', '--aux_loss_weight=0.1',
                                '--taper_iters=2', '--n_layer=1'])
    assert counters['stats']['unique_graphs'] == 2 and not counters['graph_break'] and not counters['recompiles'], counters
    assert [e['event'] for e in log_of('compiled')].count('remove') == 4


@pytest.mark.parametrize('how', ['False', 'True', '"blocks"'])
def test_gradient_checkpointing_changes_no_loss(how, workspace):
    args = TINY + REMOVE + ['--max_iters=16', '--dropout=0.1', '--aux_loss_weight=0.1', f'--compile={how}', '--n_layer=1', '--log_interval=5']
    for on in (False, True):
        train.main(args + [f'--out_dir=gc{on}{how.strip(chr(34))}', f'--gradient_checkpointing={on}'])
    assert_close(*(steps_of(f'gc{on}{how.strip(chr(34))}') for on in (False, True)))


def test_cross_entropy_in_bfloat16_a_sequence_at_a_time():
    logits, targets = torch.randn(5, 7, 11) * 3, torch.randint(11, (5, 7))
    targets[2], targets[3, 2:] = -1, -1
    results = []
    for z in (logits.bfloat16().float(), logits.bfloat16()):
        z.requires_grad_(True)
        loss = model.cross_entropy(z, targets)
        loss.backward()
        results.append((loss, z.grad.float()))
    assert results[1][0].dtype == torch.float32 and difference(results[0][0], results[1][0]) < 1e-6
    assert difference(results[0][1], results[1][1]) < 1e-3


def test_bench_times_two_settings_in_turns_and_computes_memory(workspace, capsys):
    tiny = [str(REPO / 'config/bench.py'), '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_tokens=16', '--max_iters=3', '--device=cpu']
    train.main(tiny + ['--compile=False', '--versus=ln_mode=real batch_tokens=32'])
    out = capsys.readouterr().out
    assert re.search(r'this setting: [\d,]+ parameters, cpu, float32\n +[\d,]+ tokens/s; a step of 16 tokens: median .*\(3 steps\)\n    peak memory .* 0 graphs', out)
    assert 'ln_mode=real batch_tokens=32: ' in out and re.search(r'step by step: median \d\.\d+', out)
    gib = lambda **keys: train.peak_memory(train.Config(**keys)) / 2 ** 30
    small, checkpointed, plain = gib(batch_size=2), gib(batch_size=2, gradient_checkpointing=True), gib(batch_size=2, ln_mode='fake')
    weights = 124.4e6 * 4 * 4 / 2 ** 30     # parameters, gradients, two moments
    assert weights < checkpointed < small < weights + 3 and small <= plain < small * 1.1


def test_no_device_synchronisation_in_a_plain_step(workspace, monkeypatch):
    """Only the logged iterations (0, 50, 99) and the evaluations (0, 100) may read a value back."""
    seen = []
    for name in ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__'):
        def spy(self, *args, original=getattr(torch.Tensor, name), **kwargs):
            seen.append(name)
            return original(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, spy)
    steps, step = [], torch.optim.AdamW.step

    def counted(self):
        seen.append('step')
        return step(self)
    monkeypatch.setattr(torch.optim.AdamW, 'step', counted)
    train.main(TINY + ['--out_dir=nosync', '--max_iters=100', '--eval_interval=100', '--log_interval=50'])
    steps = ' '.join(seen).split('step')
    assert len(steps) == 101 and [i for i, s in enumerate(steps) if s.strip()] == [0, 1, 51, 100]


def test_evaluation_predicts_every_token_once_whatever_the_batch(workspace):
    train.main(TINY + ['--out_dir=short', '--max_iters=2'])
    model = GPT2.from_pretrained('short').eval()
    tokens = torch.from_numpy(np.fromfile('data/tiny/val.bin', np.uint16).astype(np.int64))
    with torch.no_grad():
        expected = torch.cat([torch.nn.functional.cross_entropy(model(w[None, :-1])[0][0], w[1:], reduction='none')
                              for w in (tokens[i:i + 33] for i in range(0, len(tokens) - 1, 32))]).numpy()
    assert len(expected) == len(tokens) - 1
    for batch_size in (3, 7):
        cfg, _ = train.load_config(['--dataset=tiny', '--block_size=32', f'--batch_size={batch_size}', '--eval_iters=0'])
        data = train.Data(cfg, 'cpu')
        data.open(257, ['val'])
        losses = train.token_losses(model, data)
        assert np.abs(losses[~np.isnan(losses)] - expected).max() < 1e-5
        cfg.eval_iters = 10
        assert train.token_losses(model, data).shape == (10, 32)
        # of windows that were cut elsewhere, the first token is not predicted from the text before it
        cfg.eval_iters, data.meta['window'] = 0, 40
        fewer = train.token_losses(model, data).ravel()[:len(expected)]
        assert np.flatnonzero(np.isnan(fewer)).tolist() == list(range(39, len(expected), 40))
        assert np.nanmax(np.abs(fewer - expected)) < 1e-5


def test_statistics_of_an_evaluation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 100)) + rng.normal(size=(400, 1)) * 2 + 5     # what all tokens of a window share
    a[-1, 70:] = np.nan
    mean, error = report.mean_and_error(a)
    assert mean == pytest.approx(np.nanmean(a)) and error == pytest.approx(2 / 20, rel=0.1)        # not 2.2 / 200
    b = a - 0.25 + rng.normal(size=a.shape) * 0.1
    table = [line.split() for line in report.loss_table({'a': a, 'b': b}, 'token').splitlines()]
    assert table[2][:2] == ['all', '39,970'] and table[2][2] == f'{mean:.4f}' and table[2][-1] == f'{np.nanmax(a):.4f}'
    assert table[2][4:6] == [f'{np.nanquantile(a, q):.4f}' for q in (0.5, 0.999)]
    assert [int(row[-6].replace(',', '')) for row in table[3:6]] == [400, 63 * 400, 36 * 400 - 30]
    assert table[12][:2] == ['all', '39,970'] and float(table[12][2]) == pytest.approx(0.25, abs=2e-3) and float(table[12][3]) < 1e-3


def test_variants_over_seeds_are_compared_with_the_control_of_their_seed(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    for name, gaps in {'control': (0, 0), 'small': (0.01, 0.03), 'large': (0.2, 0.4), 'half': (0.5, 1), 'burst': (1, 1)}.items():
        for seed, gap in enumerate(gaps, 1):
            (tmp_path / f'{name}.{seed}').mkdir()
            log = [dict(event='eval', iter=0, val_loss=2.0, tokens=0)] + [dict(event='train', iter=i, loss=2 + 0.1 * seed * i + gap * (1 + (i == 6))) for i in range(30)]
            log += [dict(event='remove', iter=5, site='h.0.ln_1.qk', std={})] * (name != 'control')
            log += [dict(event='eval', iter=30, val_loss=1.5 * seed + gap, tokens=900)] * (name != 'burst' and gap < 1)
            (tmp_path / f'{name}.{seed}' / 'log.jsonl').write_text('\n'.join(map(json.dumps, log)))
    report.main([str(tmp_path), 'large', 'half'])
    assert [[c.strip() for c in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ['control', '2', '2.2500', '+0.0000', '+0.0000 to +0.0000', ''],
        ['half', '1 of 2', '2.0000', '+0.5000', '+0.5000 to +0.5000', '+1.00 at 6'],
        ['small', '2', '2.2700', '+0.0200', '+0.0100 to +0.0300', '+0.06 at 6'],
        ['large', '2', '2.5500', '+0.3000', '+0.2000 to +0.4000', '+0.80 at 6'],
        ['burst', '0 of 2', 'stopped before the end', '', '', '']]
    assert all((tmp_path / f'{name}.png').stat().st_size > 40_000 for name in ('large', 'half'))

    def refused(*args):
        with pytest.raises(SystemExit) as e:
            report.main([*map(str, args)])
        assert e.value.code == 2
        return capsys.readouterr().err
    assert 'no run called larg.SEED; there are burst, control' in refused(tmp_path, 'small', 'larg') and not (tmp_path / 'small.png').exists()
    assert 'no run of burst reached the end' in refused(tmp_path, 'burst')
    (tmp_path / 'control.2/log.jsonl').write_text((tmp_path / 'burst.2/log.jsonl').read_text())
    assert 'holds no control.2 that reached the end' in refused(tmp_path)
    shutil.rmtree(tmp_path / 'control.2')
    assert 'holds no control.2' in refused(tmp_path)


def test_evaluation_compares_two_models_on_any_number_of_processes(workspace, capsys):
    for seed in (1, 2):
        train.main(TINY + [f'--out_dir=pair{seed}', '--max_iters=2', f'--seed={seed}'])
    args = [str(REPO / 'config/eval.py'), '--init_from=pair1', '--control=pair2', '--dataset=tiny', '--device=cpu', '--batch_size=3']
    capsys.readouterr()
    train.main(args)
    one = capsys.readouterr().out
    two = finished(run(*args, nproc=2))
    assert one.strip() in two and 'difference, token by token' in one
    val = {s: report.evals(f'pair{s}')[-1][1] for s in (1, 2)}      # of ten windows; here are all
    cfg, _ = train.load_config(['--dataset=tiny', '--block_size=32', '--eval_iters=0'])
    data = train.Data(cfg, 'cpu')
    data.open(257, ['val'])
    means = [np.nanmean(train.token_losses(GPT2.from_pretrained(f'pair{s}').eval(), data), dtype=np.float64) for s in (1, 2)]
    assert f'val loss {means[0]:.4f} nats per byte' in one and means[0] == pytest.approx(val[1], abs=0.2)
    difference = [line.split() for line in one.splitlines() if line.startswith('  all')][2]
    assert float(difference[2]) == pytest.approx(means[0] - means[1], abs=1.1e-4)


def test_batches_are_a_function_of_seed_and_iteration_however_they_are_cut(workspace):
    def batches(it, **keys):
        cfg, _ = train.load_config(TINY + [f'--{k}={v}' for k, v in keys.items()])
        data = train.Data(cfg, 'cpu')
        data.open(257, ['train'])
        rows = [torch.cat(data.batch(it, m), 1) for m in range(512 // 32 // cfg.batch_size)]
        assert all(torch.equal(r[:, 1:32], r[:, 32:-1]) for r in rows)      # targets are the inputs, one on
        return torch.cat(rows)
    assert torch.equal(batches(3), batches(3, batch_size=8))
    assert not torch.equal(batches(3), batches(4)) and not torch.equal(batches(3), batches(3, seed=2))
    assert len({tuple(r) for r in batches(3).tolist()}) > 12


def steps_of(out_dir):
    """What a run did, without the clock."""
    return [{k: v for k, v in e.items() if k != 'tok_per_s'} for e in log_of(out_dir)]


def assert_close(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert {k: v for k, v in x.items() if not isinstance(v, (float, dict))} == {k: v for k, v in y.items() if not isinstance(v, (float, dict))}
        for k in ('loss', 'val_loss'):
            assert x.get(k, 0) == pytest.approx(y.get(k, 0), rel=2e-5)
        assert x.get('std', {}) == pytest.approx(y.get('std', {}), rel=1e-4)


LONG = TINY + REMOVE + ['--max_iters=40', '--eval_interval=8', '--dropout=0.1']


@pytest.fixture(scope='session')
def whole(workspace):
    """What an uninterrupted run of one process did."""
    finished(run(*LONG, '--out_dir=whole'))
    return steps_of('whole')


def wait_for(out_dir, n, process):
    """Until the run has logged n training steps."""
    while len([e for e in log_of(out_dir) if e['event'] == 'train'] if os.path.exists(f'{out_dir}/log.jsonl') else []) < n:
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
    assert_close(steps_of('three'), whole)
    shutil.copytree('killed', 'killed2')
    one, two = run(*LONG, '--out_dir=killed', '--init_from=resume'), run(*LONG, '--out_dir=killed2', '--init_from=resume', nproc=2)
    assert 'LN-free' in finished(one)
    finished(two)
    assert steps_of('killed') == whole      # to the last bit
    assert_close(steps_of('killed2'), whole)
    assert difference(GPT2.from_pretrained('killed/hf').lm_head.weight, GPT2.from_pretrained('whole/hf').lm_head.weight) == 0
    assert 'trained from scratch' in Path('killed/hf/README.md').read_text()
    Path('killed/hf/README.md').write_text('my own words')      # resumed once more, after its end: they are kept
    assert 'killed/hf was there already and is now killed/hf.1' in finished(run(*LONG, '--out_dir=killed', '--init_from=resume'))
    assert Path('killed/hf.1/README.md').read_text() == 'my own words' and 'scratch' in Path('killed/hf/README.md').read_text()


# -----------------------------------------------------------------------------
# What goes wrong in a night.

@pytest.mark.parametrize('kills', [3, pytest.param(40, marks=pytest.mark.torture)])
def test_killed_at_random_moments(kills, whole):
    """SIGKILL, again and again, with a checkpoint every other iteration; then what was logged is an uninterrupted run's."""
    rng, out_dir = np.random.default_rng(kills), f'random{kills}'
    frequent = [a for a in LONG if 'eval_interval' not in a] + [f'--out_dir={out_dir}', '--eval_interval=2', '--guard_nats=0']
    resume = lambda: frequent + ['--init_from=resume'] * os.path.exists(f'{out_dir}/ckpt.pt')
    for _ in range(kills):
        process = run(*resume())
        before = os.path.getmtime(f'{out_dir}/log.jsonl') if os.path.exists(f'{out_dir}/log.jsonl') else 0
        while process.poll() is None and (not os.path.exists(f'{out_dir}/log.jsonl') or os.path.getmtime(f'{out_dir}/log.jsonl') == before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.4 if kills < 10 else 0.1))
        process.kill()
        process.communicate()
        if os.path.exists(f'{out_dir}/ckpt.pt'):
            model.load_checkpoint(out_dir)
            if model.load_checkpoint(out_dir)['iter'] == 40:
                break
    finished(run(*resume()))
    train_steps = [e for e in steps_of(out_dir) if e['event'] != 'eval']
    assert train_steps == [e for e in whole if e['event'] != 'eval']
    assert [e['iter'] for e in steps_of(out_dir) if e['event'] == 'eval'] == list(range(0, 41, 2))
    assert {f for f in os.listdir(out_dir) if 'tmp' in f} <= set()


@pytest.mark.parametrize('where', ['write', 'fsync', 'link', 'replace', 'second replace'])
def test_killed_while_a_checkpoint_is_written(where, tmp_path):
    models = [random_model(n_layer=1) for _ in range(3)]
    for it in (0, 1):
        model.save_checkpoint(tmp_path, models[it], iter=it)
    if (pid := os.fork()) == 0:
        def die(*args, left=[where == 'second replace'], original=os.replace, **kwargs):
            if left[0]:
                left[0] = False
                return original(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        if where == 'write':
            torch.save = lambda obj, f: (f.write(b'PK half a checkpoint'), f.flush(), die())
        else:
            setattr(os, where.split()[-1], die)
        model.save_checkpoint(tmp_path, models[2], iter=2)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert model.load_checkpoint(tmp_path)['iter'] == 1 and model.load_checkpoint(tmp_path, model.PREVIOUS)['iter'] == (1 if where == 'second replace' else 0)
    model.save_checkpoint(tmp_path, models[2], iter=2)
    assert model.load_checkpoint(tmp_path)['iter'] == 2 and model.load_checkpoint(tmp_path, model.PREVIOUS)['iter'] == 1
    assert sorted(os.listdir(tmp_path)) == ['ckpt.prev.pt', 'ckpt.pt']


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path):
    a, b = tmp_path / 'ckpt.pt', tmp_path / 'ckpt.prev.pt'
    for it in (1, 2):
        model.save_checkpoint(tmp_path, random_model(), iter=it)
    whole = a.read_bytes()
    for damaged in (whole[:-100], whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:], b''):
        a.write_bytes(damaged)
        with pytest.raises(BadInput, match=f'{a} is damaged .* of iteration 1, is intact: type mv {b} {a} to go back'):
            GPT2.from_pretrained(str(tmp_path))
    b.write_bytes(b'also')
    with pytest.raises(BadInput, match='damaged .*; and so is'):
        model.load_checkpoint(tmp_path)


def test_signals_finish_the_step_and_save(whole):
    for number, nproc in ((signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)):
        out_dir = f'stopped{number}{nproc}'
        process = run(*LONG, f'--out_dir={out_dir}', nproc=nproc)
        wait_for(out_dir, 5, process)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        it = model.load_checkpoint(out_dir)['iter']
        assert process.returncode == (128 + number if nproc == 1 else 1) and 5 <= it < 40 and f'stopped and saved before iteration {it};' in output, output
        finished(run(*LONG, f'--out_dir={out_dir}', '--init_from=resume'))
        assert steps_of(out_dir) == whole if nproc == 1 else assert_close(steps_of(out_dir), whole) is None


def test_a_second_ctrl_c_stops_at_once():
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    asked = train.ask_to_stop()
    try:
        for _ in range(2):      # the second comes from torchrun, at the same moment
            os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGINT] * 2
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_torchrun_restarts_a_killed_worker_from_the_last_checkpoint(whole):
    process = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max_restarts=1',
                                str(REPO / 'train.py'), *LONG, '--out_dir=elastic'], env=os.environ | {'OMP_NUM_THREADS': '1'}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for('elastic', 12, process)
    workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert 'LN-free' in finished(process)
    assert_close(steps_of('elastic'), whole)


def test_a_full_disk_leaves_the_last_checkpoint(workspace):
    import resource
    args = TINY + ['--out_dir=full', '--eval_interval=4']
    finished(run(*args, '--max_iters=4'))
    kept = Path('full/ckpt.pt').read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, len(kept) // 2))
    process = run(*args, '--max_iters=8', '--init_from=resume', preexec_fn=limit)
    output = process.communicate()[0]
    assert process.returncode == 2 and output.splitlines()[-1].startswith('train.py: full/ckpt.pt cannot be written (') and 'Traceback' not in output, output
    assert Path('full/ckpt.pt').read_bytes() == kept and sorted(os.listdir('full')) == ['.lock', 'ckpt.pt', 'log.jsonl']
    finished(run(*args, '--max_iters=8', '--init_from=resume'))


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(workspace, capsys, monkeypatch):
    args = TINY + REMOVE + ['--out_dir=diverged', '--eval_interval=4', '--max_iters=60', '--guard_patience=8', '--grad_clip=0']
    train.main([a for a in args if 'max_iters' not in a] + ['--max_iters=16'])
    kept = Path('diverged/ckpt.pt').read_bytes()
    shutil.rmtree('diverged/hf')

    def fails(message, *more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            train.main(args + ['--init_from=resume', *more])
        error = capsys.readouterr().err.strip()
        assert e.value.code == 2 and re.search(message, error) and '\n' not in error, error
        assert 'the last event of the removal was merge bos at iteration 13; diverged/ckpt.pt of before is kept. Try a wider gap' in error
        assert Path('diverged/ckpt.pt').read_bytes() == kept and max(e['iter'] for e in log_of('diverged')) < 30
    step = train.step
    monkeypatch.setattr(train, 'step', lambda cfg, it, *a: (step(cfg, it, *a)[0] + 9 * (it >= 18), torch.tensor(1.0)))
    fails('since iteration 18 the loss, .* is more than guard_nats=2 above its lowest level')
    monkeypatch.setattr(train, 'step', lambda cfg, it, *a: (step(cfg, it, *a)[0], torch.tensor(torch.nan if it == 18 else 1.0)))
    fails('a gradient that is not finite at iteration 18', '--log_interval=7')
    monkeypatch.undo()
    fails('a gradient that is not finite at iteration 1[67]', '--learning_rate=3')      # in earnest


def test_the_guard_lets_a_removals_spikes_pass():
    cfg, _ = train.load_config([str(REPO / 'config/remove_ln.py')])
    rng = np.random.default_rng(0)
    bump = lambda it: sum(3 * 0.9 ** (it - when) for when, _, _ in train.schedule(cfg, 12) if it >= when)      # far worse than the paper's
    losses = []
    for it in range(0, 1200, 10):
        losses.append((it, 3 + bump(it) + rng.normal() * 0.05))
        since, level = train.high_since(losses, cfg)
        assert since is None or it - since < cfg.guard_patience
    assert level == pytest.approx(3, abs=0.1) and train.high_since(losses + [(1200, 5.5)], cfg)[0] == 1200


def test_hostile_files_run_nothing_and_are_told(tmp_path):
    import pickle
    import zipfile
    from safetensors.torch import load_file, save_file
    random_model().save_pretrained(tmp_path / 'ok')

    def refused(change, message):
        shutil.rmtree(tmp_path / 'x', ignore_errors=True)
        shutil.copytree(tmp_path / 'ok', tmp_path / 'x')
        change(tmp_path / 'x')
        t0 = time.time()
        with pytest.raises(BadInput, match=message):
            GPT2.from_pretrained(str(tmp_path / 'x'))
        assert time.time() - t0 < 5
    config = lambda **keys: lambda d: (d / 'config.json').write_text(json.dumps(json.loads((d / 'config.json').read_text()) | keys))
    refused(config(n_layer=10 ** 9), 'the weights lack h.999999999.attn')
    refused(config(n_embd=3 * 10 ** 18, n_head=3), 'shape|no model can have')
    refused(config(n_positions=-1), "block_size is -1")
    refused(config(vocab_size=2 ** 70), 'no model can have|Overflow|shape')

    def header(d):
        body = (d / 'model.safetensors').read_bytes()
        (d / 'model.safetensors').write_bytes((10 ** 15).to_bytes(8, 'little') + body[8:])
    refused(header, 'damaged weights')
    refused(lambda d: (d / 'model.safetensors').write_bytes((d / 'model.safetensors').read_bytes().replace(b'"F32"', b'"F64"', 1)), 'damaged weights')

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    def pickled(d):
        torch.save({'model_args': {}, 'model': Evil()}, d / 'ckpt.pt')
    refused(pickled, 'ckpt.pt is damaged or not a checkpoint of this project')
    assert not (tmp_path / 'ran').exists()


def test_a_document_of_100_mb_on_one_line_and_a_path_with_spaces(workspace):
    text = 'wörds and spaces ' * (6 << 20 if os.environ.get('TORTURE') else 1 << 18)
    os.makedirs('ein Ordner', exist_ok=True)
    Path('ein Ordner/größe 1.jsonl').write_text(json.dumps({'text': text}))
    prepare.main(['ein Ordner/größe 1.jsonl', '--name=größe', '--tokenizer=bytes', '--val_fraction=0'])
    assert Path('data/größe/train.bin').read_bytes() == np.array([*text.encode(), 256], np.uint16).tobytes()
    train.main([a for a in TINY if 'dataset' not in a] + ['--dataset=tiny', '--out_dir=ein Ordner/läuft', '--max_iters=2'])
    assert GPT2.from_pretrained('ein Ordner/läuft')


@pytest.fixture(scope='session')
def mini(workspace):
    """A miniature of the demo -> what its removal printed. The README's paths out/demo/... lead to it."""
    prepare.main(['stdlib', '--tokenizer=bytes'])
    small = ['--dataset=stdlib', '--batch_size=8', '--batch_tokens=1024', '--learning_rate=2e-3', '--min_lr=2e-4', '--warmup_iters=10',
             '--eval_interval=400', '--eval_iters=200', '--log_interval=50', '--device=cpu', '--compile=False']
    train.main(small + ['--n_layer=3', '--n_head=4', '--n_embd=96', '--block_size=128', '--out_dir=mini', '--max_iters=350'])
    tune = small + ['--init_from=mini', '--max_iters=200']
    train.main(tune + ['--out_dir=mini_control'])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main(tune + ['--out_dir=mini_free', '--control=mini_control', '--remove_ln=True', '--start_ln2=10', '--gap_ln2=8', '--start_ln1qk=34',
                           '--gap_ln1qk=8', '--start_ln1v=58', '--gap_ln1v=8', '--start_lnf=84', '--start_eot=90', '--start_bos=95'])
    os.makedirs('out/demo')
    os.symlink(os.path.abspath('mini_free/hf'), 'out/demo/hf')
    os.symlink(os.path.abspath('mini_control'), 'out/demo/control')
    return out.getvalue()


def test_a_miniature_of_the_demo_converges(mini):
    """Remove everything from a model pre-trained for a minute: it must end near the control, and better than it began."""
    before, control, free = (report.evals(d)[-1][1] for d in ('mini', 'mini_control', 'mini_free'))
    assert report.evals('mini_free')[0][1] == pytest.approx(before, rel=1e-6)       # gates at 0: the loaded model
    assert before < 2.6 and free < before - 0.05 and abs(free - control) < 0.08, (before, control, free)
    assert 'LN-free' in mini and f'{free - control:+.4f}' in mini and 'mini_free/hf' in mini
    handed_over, checkpoint = GPT2.from_pretrained('mini_free/hf').eval(), GPT2.from_pretrained('mini_free').eval()
    idx = torch.randint(0, 257, (2, 128))
    assert handed_over.config.ln_mode == 'none'
    with torch.no_grad():
        assert difference(handed_over(idx)[0], checkpoint(idx)[0]) < 1e-3

# -----------------------------------------------------------------------------
# Handing over.

BLOCKS = re.findall(r'```python\n(.*?)```', (REPO / 'README.md').read_text(), re.S)


@pytest.mark.parametrize('block', [b for b in BLOCKS if 'import' in b], ids=lambda b: re.findall(r'from (\S+) import', b)[0])
def test_the_readmes_snippets(block, mini, capsys):
    """Each runs, and what it calls logits, log_probs and resid is what our own model computes."""
    for package in ('transformers', 'transformer_lens', 'nnsight'):
        if f'from {package}' in block:
            pytest.importorskip(package, exc_type=ImportError)
    if 'transformer_lens' in block and importlib.metadata.version('transformer_lens')[0] != ('2' if 'HookedTransformer' in block else '4'):
        pytest.skip('for another major version of TransformerLens')
    Path('snippet.py').write_text(block)
    names = runpy.run_path('snippet.py')
    if 'direct' in names:
        free, control = [float(e) for e in re.findall(r'off by (\S+);', capsys.readouterr().out)]
        assert free < 1e-4 < 1e-2 < control
        return
    model, resid = GPT2.from_pretrained('mini_free').eval(), []
    model.h[1].register_forward_hook(lambda m, x, y: resid.append(y))
    with torch.no_grad():
        logits = model(names['idx'])[0]
    found = {'logits': difference(names['logits'], logits), 'resid': difference(names.get('resid', resid[0]), resid[0]),
             'log_probs': difference(names.get('log_probs', logits.log_softmax(-1)), logits.log_softmax(-1))}
    print({k: f'{v:.1e}' for k, v in found.items()}, f'largest logit {logits.abs().max():.1f}')
    assert max(found.values()) < 3e-4, found


def test_the_handed_over_folder_is_complete(mini):
    transformers = pytest.importorskip('transformers')
    assert sorted(os.listdir('mini_free/hf')) == ['README.md', 'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    card = Path('mini_free/hf/README.md').read_text()
    losses = [report.evals(d)[i][1] for d, i in (('mini_free', 0), ('mini_control', -1), ('mini_free', -1))]
    assert all(f'| {loss:.4f} |' in card for loss in losses)
    for fact in ('stdlib (bytes tokenizer)', '200 iterations of 1,024 bytes (204,800)', 'ln_2 at iterations 10 to 26', 'ln_f at iteration 84',
                 'learning rate 0.002', '3 layers', 'mini'):
        assert fact in card, fact
    tokenizer = transformers.AutoTokenizer.from_pretrained('mini_free/hf')
    encoded = tokenizer('import os<|endoftext|>', return_tensors='pt')
    assert encoded['input_ids'].tolist() == [[*b'import os', 256]] and 'token_type_ids' not in encoded
    theirs = transformers.GPT2LMHeadModel.from_pretrained('mini_free/hf')
    text = theirs.generate(encoded['input_ids'][:, :-1], max_new_tokens=60, do_sample=False)        # through its cache
    ours = GPT2.from_pretrained('mini_free').eval().generate(encoded['input_ids'][:, :-1], 60, temperature=0)
    assert text.tolist() == ours.tolist()


def test_tokenizer_files_equal_tiktoken(tmp_path):
    transformers = pytest.importorskip('transformers')
    try:
        gpt2 = prepare.get_tokenizer('gpt2')
    except BadInput as e:
        pytest.skip(str(e))
    for name, text in prepare.tokenizer_files(gpt2, 1024).items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [t for t in NASTY if '\ud800' not in t] + [(REPO / 'test_model.py').read_text()]:
        ids = gpt2.bpe.encode(text, allowed_special='all')
        assert tokenizer(text)['input_ids'] == ids and tokenizer.decode(ids) == text


def test_the_command_line_converts_a_checkpoint_into_both_forms(mini, capsys):
    x = torch.randint(0, 257, (2, 50))
    logits = GPT2.from_pretrained('mini_free').eval()(x)[0]
    for form in ([], ['--folded']):
        model.main(['mini_free', 'form', *form])
        assert 'no LayerNorm left' + ', folded' * bool(form) in capsys.readouterr().out and os.path.exists('form/tokenizer.json')
        config = json.loads(Path('form/config.json').read_text())
        assert config['tie_word_embeddings'] is not bool(form) and config['layer_norm_epsilon'] == 1e12
        assert difference(GPT2.from_pretrained('form').eval()(x)[0], logits) < 1e-3
        shutil.rmtree('form')
    for args, message in ((['mini_free', 'mini'], 'mini exists already'), (['mini', 'form', '--folded'], "cannot be loaded as 'none'"),
                          (['mini_free'], 'expected MODEL FOLDER'), (['nothing', 'form'], 'names nothing')):
        with pytest.raises(SystemExit) as e:
            model.main(args)
        error = capsys.readouterr().err.strip()
        assert e.value.code == 2 and message in error and '\n' not in error and not os.path.exists('form')

# -----------------------------------------------------------------------------
# HellaSwag.

def question(ctx_a='A man sits. He', ctx_b='', label=0, endings=('goes.', 'naïve 文字 “quote”.', 'no', 'is [title] Here [step] it  ends. '), activity='Sitting'):
    return {'activity_label': activity, 'ctx_a': ctx_a, 'ctx_b': ctx_b, 'ctx': f'{ctx_a} {ctx_b}'.strip(), 'endings': list(endings), 'label': label}


QUESTIONS = [question(), question('Then, the man.', 'the Woman', 1), question('[header] How to do [title] Begin. [step] Now [substeps]', '', '2'),
             question('long ' * 60, 'end', 3, ('x', 'longer ' * 5, '[step]', 'é🙂')), question(endings=('y ' * 40, 'a', 'b', 'c'))]


def test_hellaswag_texts_of_both_conventions():
    texts = eval_hellaswag.texts
    assert texts(QUESTIONS[1], 'completion') == ('Then, the man. the Woman', list(question()['endings']))
    assert texts(QUESTIONS[1], 'harness') == ('Sitting: Then, the man. The woman', ['goes.', 'naïve 文字 “quote”.', 'no', 'is. Here it ends.'])
    assert texts(QUESTIONS[2], 'harness')[0] == 'Sitting: How to do. Begin. Now '
    assert eval_hellaswag.tokens('Now ', 'no', 'harness', lambda t: t) == ('Now', '  no')      # its space goes to the ending
    assert eval_hellaswag.tokens('Now ', 'no', 'completion', lambda t: t) == ('Now ', ' no')


@torch.no_grad()
def test_hellaswag_scores_equal_one_ending_at_a_time(workspace):
    model = random_model(block_size=64, vocab_size=257)
    model.save_pretrained('hs')
    questions = QUESTIONS * 3       # enough for several batches
    Path('hs.jsonl').write_text('\n'.join(json.dumps(q) for q in questions) + '\n')
    command = [sys.executable, str(REPO / 'eval_hellaswag.py'), 'hs', '--data=hs.jsonl', '--device=cpu']
    out = subprocess.run([*command, '--json=1.json'], capture_output=True, text=True)
    assert out.returncode == 0 and 'which lost some on the left: 9' in out.stdout, out.stderr + out.stdout
    out = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *command[1:], '--json=2.json'],
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    one, two = (json.loads(Path(f'{n}.json').read_text()) for n in (1, 2))
    assert one == two and one['questions'] == 15 and one['truncated'] == 9
    right = {m: 0 for m in ('acc', 'acc_norm', 'harness_acc', 'harness_acc_norm')}
    for q, found in zip(questions, one['scores'], strict=True):
        for style in ('completion', 'harness'):
            context, endings = eval_hellaswag.texts(q, style)
            sums, lengths = [], []
            for ending in endings:
                n = len((' ' * (style == 'harness') * (len(context) - len(context.rstrip())) + ' ' + ending).encode())
                ids = torch.tensor([*(context.rstrip() if style == 'harness' else context).encode()] + [0] * n)
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
            right[prefix + 'acc_norm'] += np.argmax([s / n if n else -np.inf for s, n in zip(sums, lengths)]) == int(q['label'])
    assert {m: one[m] for m in right} == {m: pytest.approx(n / 15) for m, n in right.items()}
    assert one['acc_stderr'] == pytest.approx((one['acc'] * (1 - one['acc']) / 14) ** 0.5)


def test_the_questions_are_downloaded_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    body = ''.join(json.dumps(question(label=i % 4)) + '\n' for i in range(eval_hellaswag.QUESTIONS)).encode()
    answers = []

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, sent = answers.pop(0)
            self.send_response(status)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(time, 'sleep', lambda s: capsys.disabled())
    url, path = f'http://127.0.0.1:{server.server_port}/q', str(tmp_path / 'data/q.jsonl')
    answers[:] = [(500, b''), (200, body[:1000]), (200, body.replace(b'"label": 3', b'"label": 4')), (200, body)]
    eval_hellaswag.download(url, path)
    assert Path(path).read_bytes() == body and os.listdir(tmp_path / 'data') == ['q.jsonl'] and not answers
    os.remove(path)
    answers[:] = [(503, b''), (404, b'')]
    with pytest.raises(BadInput, match=r'cannot be downloaded \(404 .*put the official hellaswag_val.jsonl at'):
        eval_hellaswag.download(url, path)
    assert os.listdir(tmp_path / 'data') == []
    server.shutdown()

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


NASTY = ['plain text, and  two  spaces', '', '<|endoftext|> is ordinary text here', 'naïve 文字 🙂 \u200b\n\n\t x', 'a lone \ud800 surrogate', ' ' * 50,
         "don't I'll we've", '\r\nwindows\r\n']


def test_bins_equal_tiktoken(workspace):
    try:
        bpe = prepare.get_tokenizer('gpt2').bpe
    except BadInput as e:
        pytest.skip(str(e))
    import pyarrow
    import pyarrow.parquet
    os.makedirs('corpus/deep', exist_ok=True)
    big = ''.join((REPO / f).read_text() for f in ('model.py', 'train.py', 'prepare.py')) * 45     # over PIECE: read in several pieces
    assert len(big) > 3 * prepare.PIECE
    Path('corpus/big.txt').write_text(big)
    Path('corpus/deep/a.jsonl').write_text('\n'.join(json.dumps({'text': t}) for t in NASTY) + '\n\n')
    clean = [t for t in NASTY if '\ud800' not in t]
    pyarrow.parquet.write_table(pyarrow.table({'text': clean, 'other': list(range(len(clean)))}), 'corpus/p.parquet')
    prepare.main(['corpus', '--name=bpe', '--val_fraction=0'])
    assert documents_of('bpe', 'train', 50256) == [bpe.encode_ordinary(t) + [50256] for t in [big, *NASTY, *clean]]
    meta = json.loads(Path('data/bpe/meta.json').read_text())
    assert meta['tokenizer'] == 'gpt2' and meta['train']['documents'] == 1 + len(NASTY) + len(clean)
    prepare.main(['corpus', '--name=bpe', '--val_fraction=0', '--max_tokens=5000'])
    assert os.path.getsize('data/bpe/train.bin') == 2 * 5000 and documents_of('bpe', 'train', 50256) == [bpe.encode_ordinary(big)[:4999] + [50256]]


def test_bytes_and_what_is_counted(workspace, capsys):
    os.makedirs('raw', exist_ok=True)
    Path('raw/a.txt').write_bytes(b'good \xff\xfe bad')
    Path('raw/b.txt').write_bytes(b'')
    Path('raw/c.txt').write_bytes('é🙂\r\n'.encode())
    prepare.main(['raw', '--tokenizer=bytes', '--val_fraction=0'])
    assert documents_of('raw', 'train', 256) == [[*t.encode(), 256] for t in ('good \ufffd\ufffd bad', '', 'é🙂\r\n')]
    out = capsys.readouterr().out
    assert '1 empty documents, kept' in out and '2 bytes were not UTF-8 and were replaced' in out
    assert prepare.Bytes().decode([*'é🙂'.encode(), 256]) == 'é🙂'


def test_openwebtexts_validation_documents_are_nanogpts(workspace, monkeypatch):
    import datasets
    split = datasets.Dataset.from_dict({'n': range(5000)}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert prepare.nanogpt_val(5000) == set(split['test']['n'])
    assert len(prepare.nanogpt_val()) == 4007       # of 8,013,769
    monkeypatch.setattr(prepare, 'hub_dataset', lambda name, only=None: (f'{name} {n}' for n in range(4000) if only is None or n in only))
    expected = sorted(n for n in prepare.nanogpt_val() if n < 4000)
    for preset, train_documents in (('openwebtext', 4000 - len(expected)), ('openwebtext_val', 0)):
        prepare.main([preset, '--tokenizer=bytes'])
        assert documents_of(preset, 'val', 256) == [[*f'Skylion007/openwebtext {n}'.encode(), 256] for n in expected]
        assert len(documents_of(preset, 'train', 256)) == train_documents


def test_windows_of_token_ids_are_kept_as_they_are(workspace):
    rng = np.random.default_rng(0)
    windows = rng.integers(257, size=(150, 128)).tolist()

    def prepared(rows, *args):
        Path('ids.rows.jsonl').write_text(''.join(json.dumps({'input_ids': r}) + '\n' for r in rows))
        prepare.main(['ids.rows.jsonl', '--name=ids', '--tokenizer=bytes', '--val_fraction=1', *args])
        return np.fromfile('data/ids/val.bin', np.uint16).tolist(), json.loads(Path('data/ids/meta.json').read_text()).get('window')
    flat = sum(windows, [])
    assert prepared(windows) == (flat, 128)
    assert prepared(windows + [windows[0][:50]]) == (flat + windows[0][:50], 128)       # a short last one fits
    assert prepared(windows[:110] + [[1]] + windows[110:])[1] is None                   # one in the middle does not
    assert prepared(windows, '--max_tokens=1000') == (flat[:7 * 128], 128)
    assert prepared(windows[:5] + [windows[5][:50]]) == (flat[:5 * 128 + 50], 128)      # of few rows, too
    assert prepared(windows + [windows[0] + [1]])[1] is None                            # a longer one at the end does not
    assert prepared(windows, '--val_fraction=1e-9')[1] == 128
    assert len(np.fromfile('data/ids/train.bin', np.uint16)) % 128 == 0                 # the end, cut off for validation, is whole windows
    assert prepared([[1, 2], [3]]) == ([1, 2, 256, 3, 256], None)                       # documents


@pytest.mark.torture
def test_prepare_is_faster_than_the_usual_ways_in_little_memory(tmp_path):
    """On the sources of the installed packages, 200 MB at least, GPT-2's BPE. Printed with -s, as `make torture` does."""
    import sysconfig
    files, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()['purelib']).rglob('*')):
        if path.suffix in ('.py', '.txt', '.md', '.rst', '.h', '.hpp', '.json', '.js', '.pyi') and path.is_file():
            files.append(path)
            size += path.stat().st_size
    rows = [p.read_text(errors='replace') for p in files]
    while sum(map(len, rows)) < 200e6:
        rows += rows[:1000]
    with open(tmp_path / 'corpus.jsonl', 'w') as f:
        f.writelines(json.dumps({'text': r}) + '\n' for r in rows)
    rows = None
    common = "import json, sys, time, numpy as np, tiktoken; t0 = time.time(); bpe = tiktoken.get_encoding('gpt2'); "
    one = common + ("f = open('one.bin', 'wb'); "
                    "[f.write(np.array(bpe.encode_ordinary(json.loads(line)['text']) + [50256], np.uint16).tobytes()) for line in open('corpus.jsonl')]")
    two = common + ("from datasets import load_dataset\n"
                    "ds = load_dataset('json', data_files='corpus.jsonl', split='train')\n"
                    "def work(row):\n    ids = bpe.encode_ordinary(row['text']) + [50256]\n    return {'ids': ids, 'len': len(ids)}\n"
                    "ds = ds.map(work, remove_columns=['text'], num_proc=2)\n"
                    "out = np.memmap('two.bin', np.uint16, 'w+', shape=(int(sum(ds['len'])),))\n"
                    "i = 0\nfor k in range(64):\n    b = np.concatenate(ds.shard(64, k, contiguous=True).with_format('numpy')['ids'])\n    out[i:i + len(b)] = b\n    i += len(b)\n"
                    "out.flush()")
    seconds, memory = {}, {}
    for name, args in (('ours', [str(REPO / 'prepare.py'), 'corpus.jsonl', '--val_fraction=0']), ('one', ['-c', one]), ('two', ['-c', two])):
        t0 = time.time()
        process = subprocess.Popen([sys.executable, *args], cwd=tmp_path, env=os.environ | {'HF_HOME': str(tmp_path / 'cache')}, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        seconds[name], memory[name] = time.time() - t0, usage.ru_maxrss / 2 ** 20
    tokens = os.path.getsize(tmp_path / 'one.bin') // 2
    print(f"\n{tokens:,} tokens; " + '; '.join(f"{n}: {s:.1f} s, {tokens / s / 1e6:.2f}M tokens/s, {memory[n]:.2f} GiB resident" for n, s in seconds.items()))
    bins = [(tmp_path / name).read_bytes() for name in ('data/corpus/train.bin', 'one.bin', 'two.bin')]
    assert bins[0] == bins[1] == bins[2]
    assert memory['ours'] < 1 and seconds['one'] / seconds['ours'] > 1.3 and seconds['two'] / seconds['ours'] > 1.5     # of a noisy machine; README has what was measured


def test_the_splits_share_no_document(workspace):
    prepare.main(['stdlib', '--tokenizer=bytes', '--val_fraction=0.2'])
    splits = [{tuple(d) for d in documents_of('stdlib', s, 256) if len(d) > 300} for s in ('train', 'val')]
    assert min(map(len, splits)) > 50 and not splits[0] & splits[1]


def test_the_packages_nearly_identical_files_are_left_out(tmp_path, monkeypatch):
    lines = [f'line {i} of a file\n' for i in range(100)]
    other = [f'{i} otherwise\n' for i in range(100)]
    for name, text in {'a.py': lines, 'b.md': other, 'c.py': lines, 'd.py': ['    ' + s + '\n' for s in lines],
                       'e.py': lines[:30] + other[50:80] + [f'new {i}\n' for i in range(140)],     # 28% of it is old
                       'f.py': lines[:20] + other[50:70] + [f'novel {i}\n' for i in range(160)],   # 18%
                       'g.json': ['x\n'], 'h.py': ['one line\n'], 'i.py': ['one line\n']}.items():
        (tmp_path / name).write_text(''.join(text))
    monkeypatch.setattr(prepare.sysconfig, 'get_paths', lambda: {'purelib': str(tmp_path)})
    assert [os.path.basename(p) for p in prepare.package_files()] == ['a.py', 'b.md', 'f.py', 'h.py']

# -----------------------------------------------------------------------------
# Bad input: one line on stderr that says what to type, exit status 2, nothing written.

@pytest.fixture(scope='session')
def broken(workspace):
    """What the cases below refer to."""
    os.makedirs('busy')
    lock = train.lock('busy')       # another run, as long as the cases last
    train.main(TINY + ['--out_dir=run', '--max_iters=2'])
    train.main(TINY + REMOVE + ['--out_dir=free', '--max_iters=16'])
    GPT2.from_pretrained('run').save_pretrained('model')
    Path('bad.py').write_text('batch_size = 4\nbatchsize = 8\n')
    Path('code.py').write_text('import os\n')
    Path('empty').mkdir()
    for name, change in {'odd': b'x', 'big': np.full(4000, 60000, np.uint16).tobytes(), 'grown': b'xx' * 99, 'novel': b''}.items():
        shutil.copytree('data/tiny', f'data/{name}')
        with open(f'data/{name}/train.bin', 'wb' if name == 'big' else 'ab') as f:
            f.write(change)
        if name == 'big':
            os.remove('data/big/meta.json')
    os.makedirs('data/shortval')
    shutil.copy('data/tiny/train.bin', 'data/shortval')
    Path('data/shortval/val.bin').write_bytes(b'x' * 40)
    meta = json.loads(Path('data/novel/meta.json').read_text())
    Path('data/novel/meta.json').write_text(json.dumps(meta | {'tokenizer': 'gpt2', 'vocab_size': 50257, 'eot': 50256}))
    from safetensors.torch import load_file, save_file
    for name, change in {'missing': lambda sd: sd.pop('transformer.h.0.ln_1.weight'), 'shape': lambda sd: sd.update({'transformer.wpe.weight': torch.zeros(7, 32)}),
                         'llama': None, 'pickled': None, 'cut': None}.items():
        shutil.copytree('model', name)
        sd = load_file('model/model.safetensors')
        if change:
            change(sd)
            save_file(sd, f'{name}/model.safetensors')
    Path('llama/config.json').write_text(json.dumps(json.loads(Path('model/config.json').read_text()) | {'model_type': 'llama'}))
    os.rename('pickled/model.safetensors', 'pickled/pytorch_model.bin')
    os.truncate('cut/model.safetensors', 5000)
    shutil.copytree('run', 'damaged')
    os.truncate('damaged/ckpt.pt', 3000)
    os.makedirs('nanogpt')
    torch.save({'model_args': dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=False, vocab_size=257), 'model': {}}, 'nanogpt/ckpt.pt')
    shutil.copytree('run', 'nolog')
    os.truncate('nolog/log.jsonl', 10)
    shutil.copytree('data/tiny', 'data/strange')
    Path('data/strange/meta.json').write_text('{"vocab_size": 300}')
    shutil.copytree('model', 'strange')
    Path('strange/config.json').write_text(json.dumps(json.loads(Path('model/config.json').read_text()) | {'n_embd': '32'}))
    Path('zipped.jsonl.gz').write_bytes(b'x')
    Path('ids.jsonl').write_text('{"input_ids": [1, 2.5]}')
    Path('bad.jsonl').write_text('{"text": "fine"}\n{"text": 3}\n')
    Path('void.txt').write_text('')
    Path('words.txt').write_text('some words')
    infinite = random_model('none', block_size=64, vocab_size=257)
    infinite.wte.weight.data[ord('~')] = 3e38       # through attention's 0 * NaN it spoils what stands before it too
    os.makedirs('infinite')
    model.save_checkpoint('infinite', infinite)
    shutil.copytree('data/tiny', 'data/tilde')
    val = np.fromfile('data/tiny/val.bin', np.uint16) % 32
    val[[70, 80, 999]] = ord('~')
    val.tofile('data/tilde/val.bin')
    shutil.copytree('data/tilde', 'data/tilde2')
    val[[70, 80, 999, -(-(len(val) - 1) // 64) // 3 * 64 + 5]] = 1, 1, 1, ord('~')      # in the second of three windows
    val.tofile('data/tilde2/val.bin')
    random_model(vocab_size=300).save_pretrained('odd_vocab')
    shutil.copytree('run', 'shown')     # an hf/ that somebody may have edited
    os.makedirs('shown/hf')
    os.remove('shown/ckpt.pt')
    good = json.dumps(question())
    for name, line in {'not_json': good[:50], 'label': json.dumps(question(label=4)), 'endings': json.dumps(question(endings='abc')),
                       'field': good.replace('ctx_b', 'ctxb'), 'tilde': json.dumps(question(ctx_a='a b', endings=('', '1', '2', 'the ~ longest'))), 'list': '[1]'}.items():
        Path(f'{name}.jsonl').write_text(f'{good}\n{line}\n')
    Path('none.jsonl').write_text('')
    yield lock


NEW = ['--out_dir=never']
TRAIN_ERRORS = [
    (['--batchsize=8'], "unknown key 'batchsize'; the nearest known one is 'batch_size'"),
    (['--batch_size=large'], "batch_size is 'large'; expected int, like batch_size=12"),
    (['--max_iters=1.5'], "max_iters is 1.5; expected int"),
    (['--remove_ln=1'], "remove_ln is 1; expected bool"),
    (['--batch_size=0'], "batch_size is 0; expected at least 1"),
    (['--batch_size', '8'], "--batch_size: expected --key=value"),
    (['--dtype=float16'], "expected one of auto, float32, bfloat16"),
    (['--ln_mode=fake'], "'fake' comes with --remove_ln=True"),
    (['config/nothing.py'], "no config file config/nothing.py"),
    (['bad.py'], "bad.py, line 2: unknown key 'batchsize'"),
    (['code.py'], "code.py, line 1: expected `name = value`, got 'import os'"),
    (TINY + NEW + ['--dataset=nothing'], "no data/nothing/train.bin: make it with `python prepare.py nothing`"),
    (TINY + NEW + ['--dataset=odd'], "data/odd/train.bin has an odd number of bytes"),
    (TINY + NEW + ['--dataset=grown'], "run prepare.py again"),
    (TINY + ['--out_dir=toobig', '--dataset=big', '--init_from=model'], "holds token id 60000, but the model's vocabulary ends at 256"),
    (NEW + ['--dataset=novel', '--init_from=model', '--batch_tokens=384'], "written with the 'gpt2' tokenizer (50257 tokens), but the model has 257"),
    (TINY + NEW + ['--dataset=shortval'], "data/shortval/val.bin has 20 tokens, less than one window of block_size + 1 = 33"),
    (NEW + ['--dataset=tiny', '--init_from=model', '--block_size=64'], "block_size is 64; the model's context is 32 tokens: type --block_size=32 or less"),
    (TINY + NEW + ['--batch_tokens=500'], "batch_tokens is 500; expected a multiple of batch_size * block_size = 4 * 32 = 128: type --batch_tokens=512"),
    (TINY + NEW + REMOVE + ['--max_iters=13'], "the schedule has merge bos at iteration 13, outside the run of max_iters=13"),
    (TINY + NEW + ['--max_iters=2000', '--remove_ln=True', '--start_ln2=10', '--gap_ln2=-20'], "at iteration -10, outside the run"),
    (['--dataset=tiny', '--batch_size=4', '--batch_tokens=128'] + NEW + REMOVE + ['--init_from=free', '--max_iters=20'],
     "the schedule asks for h.0.ln_1.qk, which the model of init_from=free has lost already"),
    (TINY + NEW + ['--init_from=no/such'], "no/such names nothing"),
    (TINY + NEW + ['--init_from=./nosuch/model/here'], "names nothing: no folder here, and not a hub id"),
    (TINY + NEW + ['--init_from=empty'], "empty has no config.json"),
    (NEW + ['--dataset=tiny', '--init_from=missing'], "the weights lack h.0.ln_1.weight (1 tensors missing)"),
    (NEW + ['--dataset=tiny', '--init_from=shape'], "wpe.weight has shape [7, 32], expected [32, 32]"),
    (NEW + ['--dataset=tiny', '--init_from=llama'], "model_type is 'llama'; this is a model of another architecture"),
    (NEW + ['--dataset=tiny', '--init_from=pickled'], "no model.safetensors (pickled weights are not read)"),
    (NEW + ['--dataset=tiny', '--init_from=cut'], "cut: damaged weights"),
    (NEW + ['--dataset=tiny', '--init_from=damaged'], "damaged/ckpt.pt is damaged"),
    (NEW + ['--dataset=tiny', '--init_from=nanogpt'], "a checkpoint of another architecture"),
    (NEW + ['--dataset=tiny', '--init_from=model', '--n_layer=7'], "n_layer is 7, but the model of init_from=model has 2"),
    (TINY + ['--out_dir=run', '--init_from=resume', '--n_embd=64'], "n_embd is 64, but the model of init_from=resume has 32"),
    (TINY + ['--out_dir=run', '--init_from=resume', '--remove_ln=True'], "run/ckpt.pt is of a run with remove_ln=False"),
    (TINY + REMOVE + ['--out_dir=free', '--init_from=resume', '--start_lnf=18', '--max_iters=20'], "written under another schedule (remove ln_f at 10 is in one of them only"),
    (TINY + REMOVE + ['--out_dir=free', '--init_from=resume', '--measure_once=True', '--max_iters=16'], "or the taper or measure_once differs): resume with"),
    (TINY + REMOVE + ['--out_dir=free', '--init_from=resume', '--max_iters=14'], "max_iters is 14, but the checkpoint is of iteration 16: type --max_iters=16"),
    (TINY + ['--out_dir=run', '--init_from=resume', '--block_size=16'], "block_size is 16, but run/ckpt.pt has 32"),
    (['--out_dir=nolog', '--init_from=resume', '--dataset=tiny', '--batch_size=4', '--batch_tokens=512', '--max_iters=2'], "nolog/log.jsonl is shorter than"),
    (TINY + NEW + ['--dataset=strange'], "data/strange/meta.json does not name the tokenizer"),
    (NEW + ['--dataset=tiny', '--init_from=strange'], "strange/config.json is not a GPT-2's config.json"),
    (TINY + NEW + ['--dropout=2.0'], "dropout is 2.0; expected at least 0 and less than 1"),
    (TINY + NEW + ['--taper_iters=-1'], "taper_iters is -1; expected at least 0"),
    (TINY + NEW + ['--device=abacus'], "device is 'abacus', which cannot be used here"),
    (TINY + ['--out_dir=empty', '--init_from=resume'], "no checkpoint empty/ckpt.pt"),
    (TINY + ['--out_dir=run'], "run holds another run's checkpoint: resume that run with --init_from=resume, or choose another --out_dir"),
    (TINY + ['--out_dir=words.txt/x'], "out_dir words.txt/x cannot be written"),
    (TINY + ['--out_dir=busy'], "another run is writing to busy at this moment"),
    (TINY + NEW + ['--control=empty'], "empty/log.jsonl is missing, damaged or holds no evaluation"),
    (TINY + REMOVE + ['--out_dir=shown', '--max_iters=16'], "shown/hf exists already, and this run would write it"),
    (['--eval_only=True', '--eval_iters=0', '--dataset=tilde', '--init_from=infinite'], "infinite gives NaN or infinite logits, first at token 70 (id 126) of data/tilde/val.bin, and for 128 of"),
    (['--eval_only=True', '--eval_iters=3', '--dataset=tilde2', '--init_from=infinite'], " (id 126) of data/tilde2/val.bin, and for 64 of 192 bytes"),
    (['--eval_only=True', '--dataset=tiny'], "nothing to evaluate: name a model"),
    (['--eval_only=True', '--dataset=tiny', '--init_from=run', '--control=odd_vocab'], "control=odd_vocab has a vocabulary of 300 tokens, init_from=run of 257"),
    (['--eval_only=True', '--dataset=shortval', '--init_from=run'], "less than one window of block_size + 1 = 33"),
]
HELLASWAG_ERRORS = [
    (['run', '--data=nothing.jsonl'], "cannot read the questions nothing.jsonl: No such file"),
    (['run', '--data=none.jsonl'], "none.jsonl holds no questions"),
    (['run', '--data=not_json.jsonl'], "not_json.jsonl, line 2: not a question as JSON"),
    (['run', '--data=list.jsonl'], "list.jsonl, line 2: not a question as JSON"),
    (['run', '--data=label.jsonl'], "label.jsonl, line 2: label is 4, expected 0, 1, 2 or 3"),
    (['run', '--data=endings.jsonl'], "endings.jsonl, line 2: expected `endings` to be a list of four texts"),
    (['run', '--data=field.jsonl'], "field.jsonl, line 2: the field 'ctx_b' is missing"),
    (['infinite', '--data=tilde.jsonl'], "NaN or infinite logit: question 2, completion style, ending 3, first at token 8 (id 126)"),
    (['odd_vocab', '--data=tilde.jsonl'], "odd_vocab has a vocabulary of 300 tokens; expected GPT-2's (50257) or bytes (257)"),
    (['run', 'free', '--data=tilde.jsonl'], "expected one MODEL, got 2"),
    (['run', '--data=tilde.jsonl', '--limit=0'], "--limit=0: expected a whole number of at least 1"),
    (['run', '--data=tilde.jsonl', '--json=nowhere/x.json'], "--json=nowhere/x.json cannot be written: No such file"),
    (['run', '--dada=q.jsonl'], "--dada=q.jsonl: expected one of --data="),
    (['no/such', '--data=tilde.jsonl'], "no/such names nothing"),
]
PREPARE_ERRORS = [
    (['nothing.txt'], "no such file: nothing.txt"),
    (['./nothing'], "no such file: ./nothing"),
    (['empty', '--tokenizer=bytes'], "nothing to read in empty"),
    (['void.txt', '--tokenizer=bytes'], "nothing to read in void.txt: only empty documents"),
    (['bad.jsonl', '--tokenizer=bytes'], "bad.jsonl, line 2: bad.jsonl: expected rows with a string `text`"),
    (['words.txt', '--tokenizer=bytes', '--max_tokens=100'], "--max_tokens=100 is smaller than a window"),
    (['words.txt', '--tokenizer=words'], "tokenizer is 'words'; expected gpt2 or bytes"),
    (['words.txt', '--tokenizer=bytes', '--val_fraction=2'], "--val_fraction=2.0: expected a number from 0 to 1"),
    (['words.txt', '--tokenizer=bytes', '--max_tokens=1e6'], "'1e6' is not a whole number"),
    (['words.txt', '--tokenizer=bytes', '--name=../words'], "the data would be called '../words'"),
    (['zipped.jsonl.gz', '--tokenizer=bytes'], "cannot tell what zipped.jsonl.gz holds"),
    (['ids.jsonl', '--tokenizer=bytes'], "input_ids are not the bytes tokenizer's"),
    (['words.txt', '--max_token=9'], "--max_token=9: expected one of --name="),
]


@pytest.mark.parametrize('script, args, message', [(train, *e) for e in TRAIN_ERRORS] + [(prepare, *e) for e in PREPARE_ERRORS]
                         + [(eval_hellaswag, *e) for e in HELLASWAG_ERRORS],
                         ids=lambda v: v if isinstance(v, str) else '')
def test_bad_input_is_told_in_one_line(script, args, message, broken, capsys):
    kept = {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file() and p.parts[0] in ('run', 'free', 'data')}
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        script.main(args)
    error = capsys.readouterr().err.strip()
    assert e.value.code == 2 and message in error and '\n' not in error, error
    assert not os.path.exists('never')
    assert kept == {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file() and p.parts[0] in ('run', 'free', 'data')}
