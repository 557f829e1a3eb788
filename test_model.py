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


