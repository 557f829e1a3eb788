"""
All that is to be measured on a GPU, without a network. Parts that train side by side keep one H100
busy while others compile; all then takes ten minutes:

    G="python experiments/gpu.py"
    $G data & $G exact; $G speed; wait; $G pretrain
    $G remove hand_over & $G paper & $G resume & wait; $G more

    python experiments/gpu.py --tiny        all parts in turn, on a CPU, in two minutes

The model is a stand-in of GPT-2 small's shape, trained on the Python files of this machine's
packages. A part that fails does not stop the others; the table at the end has what they found.
Tokens are GPT-2's (set TIKTOKEN_CACHE_DIR), or with --tokenizer=bytes bytes. Writes data/gpu and
out/gpu. --seconds=N: stop then.
"""
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from losses import measured                                             # noqa: E402
from model import GPT2, GPT2Config, check, command, load_checkpoint     # noqa: E402
from prepare import get_tokenizer                                       # noqa: E402
from train import read_log                                              # noqa: E402

OPTIONS = dict(a[2:].partition('=')[::2] for a in sys.argv[1:] if a.startswith('--'))
TINY = 'tiny' in OPTIONS
NAME = 'gpu_tiny' if TINY else 'gpu'
DATA, OUT = Path('data', NAME), Path('out', NAME)
CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
FAST = 'config/remove_ln_fast.py'
SHAPE = (dict(n_layer=2, n_head=2, n_embd=32, block_size=32) if TINY else
         dict(n_layer=12, n_head=12, n_embd=768, block_size=1024))
BATCH, PRETRAIN, TEXT = (4, 50, 1e6) if TINY else (16, 600, 240e6)     # rows, iterations, bytes
TOKENS = 128 if TINY else 16384     # of a micro-step
ROWS = []

def tell(what, value):
    ROWS.append((what, value))
    print(f"{what}: {value}", flush=True)

def python(*argv):
    """Runs a script to its end -> what it printed. RuntimeError with its last line if it fails."""
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return done.stdout

def train(name, *argv):
    shutil.rmtree(OUT / name, ignore_errors=True)
    python('train.py', *argv, f'--dataset={NAME}', f'--batch_size={BATCH}',
           f'--out_dir={OUT}/{name}')

def removal(name, *argv, tokens=2 * TOKENS):
    """A run of a recipe from the pre-trained model."""
    train(name, *argv, f'--init_from={OUT}/pretrained', f'--batch_tokens={tokens}',
          '--log_interval=1', '--eval_interval=10_000', '--guard_nats=0')

def speed():
    """What a step costs: LayerNorm kept, removed, with a teacher, with a padded vocabulary."""
    vocab, padded = (257, 320) if TINY else (50257, 50304)
    shape = [f'--{key}={value}' for key, value in SHAPE.items()]
    for line in python('experiments/bench.py', *shape, f'--batch_size={BATCH}',
                       '--ln_mode=real,fake,fake,fake', '--teacher=,,fresh,', f'--compile={CUDA}',
                       f'--vocab_size={vocab},{vocab},{vocab},{padded}').splitlines():
        told = line.split(': ', 1)[0].split()
        setting = ' '.join(a for a in told if a.startswith(('--ln', '--teacher=f', '--vocab')))
        tell(f'step: {setting}', line.split('; ', 1)[1])

def data():
    """The Python files of this machine's packages, in data/gpu."""
    if not (DATA / 'meta.json').exists():
        paths = sysconfig.get_paths()
        files = sorted({*Path(paths['purelib']).rglob('*.py'), *Path(paths['stdlib']).glob('*.py')})
        random.Random(0).shuffle(files)
        n = 0
        with open(OUT / 'python.jsonl', 'w') as f:
            for path in files:
                n += f.write(json.dumps({'text': path.read_text(errors='replace')}) + '\n')
                if n > TEXT:
                    break
        print(python('prepare.py', OUT / 'python.jsonl', f'--name={NAME}',
                     f"--tokenizer={OPTIONS.get('tokenizer', 'gpt2')}"))
    tell('data', f"{meta()['train']['tokens']:,} tokens of {meta()['tokenizer']}")

def meta():
    return json.loads((DATA / 'meta.json').read_text())

def pretrain():
    """A stand-in, trained on them."""
    shape = SHAPE | {'vocab_size': meta()['vocab_size']}
    shutil.rmtree(OUT / 'standin', ignore_errors=True)
    python('experiments/standin.py', OUT / 'standin', *(f'--{k}={v}' for k, v in shape.items()))
    train('pretrained', f'--init_from={OUT}/standin', f'--batch_tokens={4 * TOKENS}',
          f'--max_iters={PRETRAIN}', '--eval_interval=10_000', f'--warmup_iters={PRETRAIN // 10}')
    before, after = (e['val_loss'] for e in read_log(OUT / 'pretrained', 'eval'))
    tell('pre-training', f'{before:.3f} -> {after:.4f} nats; {tokens_per_second("pretrained")}')

def tokens_per_second(name):
    return f"{np.median([e['tok_per_s'] for e in read_log(OUT / name, 'train')]):,.0f} tokens/s"

def compare(name, control):
    """Tells a removal's gap, worst moment and giant vector."""
    runs = (OUT / name, OUT / control)
    gap = np.subtract(*(read_log(run, 'eval')[-1]['val_loss'] for run in runs))
    worst = np.subtract(*([e['loss'] for e in read_log(run, 'train')] for run in runs))
    looks = read_log(runs[0], 'giant')
    giants = ', '.join(f"{kind} {max(looks[0][kind].values()):.1f} -> "
                       f"{max(looks[-1][kind].values()):.1f}"
                       for kind in ('bos', 'eot') if looks)
    tell(name, f'gap {gap:+.4f}, worst moment {worst.max():+.2f} at {worst.argmax()}, giant '
               f'{giants}; {tokens_per_second(name)}')

def rare():
    """{kind: (n,) token ids} that the model has not met."""
    rng, encode = np.random.default_rng(0), get_tokenizer(meta()['tokenizer']).encode
    headers = sorted(Path(sysconfig.get_paths()['include']).glob('*.h'))
    chinese = ''.join(map(chr, rng.integers(0x4e00, 0x9fa5, 20_000)))
    return {'random ids': rng.integers(meta()['vocab_size'], size=40_000),
            'random Chinese': encode(chinese), 'one character': encode('a ' * 40_000),
            'C headers': encode(''.join(p.read_text(errors='replace') for p in headers))}

def near(name):
    """Tells how near a run is to the model that it began from, and its losses on rare input."""
    models = [GPT2.from_pretrained(OUT / run).to(DEVICE).eval() for run in ('pretrained', name)]
    found = measured(models, np.fromfile(DATA / 'val.bin', np.uint16), most=64)
    tell(f'{name} beside the original', f"KL {found['kl'].mean():.4f}, 99.9% of it "
         f"{np.quantile(found['kl'], 0.999):.2f}, JSD {found['jsd'].mean():.4f}, same next token "
         f"{found['same'].mean():.1%}")
    losses = {kind: measured(models, ids, most=32) for kind, ids in rare().items()}
    tell(f'{name}, nats on rare input (the original)', ', '.join(
        f"{kind} {found['loss 1'].mean():.2f} ({found['loss 0'].mean():.2f})"
        for kind, found in losses.items()))

def remove():
    """remove_ln_fast.py: its control, itself, with distil.py."""
    removal('control', FAST, 'config/control.py')
    near('control')
    for name, more in (('fast', []), ('distil', ['config/distil.py'])):
        removal(name, FAST, *more)
        compare(name, 'control')
        near(name)

def more():
    """A teacher alone; a control with half the learning rate; another seed."""
    removal('distil_1', FAST, 'config/distil.py', '--distil=1')
    compare('distil_1', 'control')
    near('distil_1')
    removal('control_half', FAST, 'config/control.py', '--learning_rate=3e-4', '--min_lr=1.5e-4')
    compare('control_half', 'control')
    near('control_half')
    for name, *argv in (('control.2', 'config/control.py'), ('fast.2',),
                        ('distil_1.2', 'config/distil.py', '--distil=1')):
        removal(name, FAST, *argv, '--seed=2')
        compare(name, 'control.2')
        near(name)

def paper():
    """remove_ln.py and its control."""
    removal('control_paper', 'config/remove_ln.py', 'config/control.py', tokens=TOKENS)
    removal('paper', 'config/remove_ln.py', tokens=TOKENS)
    compare('paper', 'control_paper')

def hand_over():
    """hf/, loaded here and by transformers, against the run's checkpoint."""
    ids = np.fromfile(DATA / 'val.bin', np.uint16, 2 * SHAPE['block_size'])
    x = torch.from_numpy(ids.astype(np.int64)).view(2, -1).to(DEVICE)
    torch.set_float32_matmul_precision('highest')
    with torch.no_grad():
        wanted = GPT2.from_pretrained(OUT / 'fast').to(DEVICE).eval()(x)[0]
        folded = GPT2.from_pretrained(OUT / 'fast/hf').to(DEVICE).eval()(x)[0]
        tell('hf/ folded, logits', f'{difference(folded, wanted):.1e}')
        from transformers import AutoModelForCausalLM
        stock = AutoModelForCausalLM.from_pretrained(OUT / 'fast/hf').to(DEVICE).eval()
        tell('hf/ by transformers, logits', f'{difference(stock(x).logits, wanted):.1e}')

def difference(a, b):
    """The largest difference, of the largest value."""
    return ((a.float().cpu() - b.float().cpu()).abs().max() / b.abs().max().cpu()).item()

def resume():
    """A run that is killed by kill -9 in iteration 6 and resumed, against one that is not."""
    starts = [f'--{key}=2' for key in ('start_ln2', 'start_ln1qk', 'start_ln1v', 'start_lnf')]
    gaps = [f'--{key}=0' for key in ('gap_ln2', 'gap_ln1qk', 'gap_ln1v')]
    argv = ['config/remove_ln_fast.py', *starts, *gaps, '--taper_iters=6', '--max_iters=10',
            '--eval_interval=4', '--eval_iters=8', '--log_interval=1', '--guard_nats=0',
            f'--dataset={NAME}', f'--batch_size={BATCH}',
            f'--batch_tokens={2 * BATCH * SHAPE["block_size"]}']
    kill = ('import os, sys, train; lr = train.get_lr; train.get_lr = lambda cfg, it: '
            'os.kill(os.getpid(), 9) if it == 6 else lr(cfg, it); train.main(sys.argv[1:])')
    begin = f'--init_from={OUT}/pretrained'
    for name in ('whole', 'killed'):
        shutil.rmtree(OUT / name, ignore_errors=True)
    python('train.py', *argv, begin, f'--out_dir={OUT}/whole')
    first = [sys.executable, '-c', kill, *argv, begin, f'--out_dir={OUT}/killed']
    check(subprocess.run(first, capture_output=True).returncode == -9, "it was not killed")
    python('train.py', *argv, '--init_from=resume', f'--out_dir={OUT}/killed')
    whole, killed = (load_checkpoint(OUT / name) for name in ('whole', 'killed'))
    losses = [[e['loss'] for e in read_log(OUT / name, 'train')] for name in ('whole', 'killed')]
    tell('killed and resumed', f"weights equal: "
         f"{all(torch.equal(v, killed['model'][k]) for k, v in whole['model'].items())}; losses "
         f"equal to the last bit in iterations "
         f"{[i for i, (a, b) in enumerate(zip(*losses)) if a == b]} of 10")

def exact():
    """The device's forward and backward pass, compiled on CUDA, against float32 on the CPU."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('highest')
    cpu = GPT2(GPT2Config(**SHAPE, vocab_size=50257, ln_mode='fake'))
    x, y = torch.randint(50257, (2, 2, SHAPE['block_size']))
    with torch.no_grad():
        for ln, std in zip(cpu.layernorms().values(), cpu(x, return_stds=True)[2]):
            ln.std.fill_(std.mean())
    raw = copy.deepcopy(cpu).to(DEVICE)
    model = torch.compile(raw, fullgraph=True, disable=not CUDA)

    def run(which, of, x, y):
        of.zero_grad()
        logits, loss = which(x, y)
        loss.backward()
        return logits, torch.cat([p.grad.flatten() for p in of.parameters()])
    for gate in (0, 0.3, 1):
        for m in (cpu, raw):
            for g in m.sites().values():
                g.fill_(gate)
        wanted = run(cpu, cpu, x, y)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
                found = run(model, raw, x.to(DEVICE), y.to(DEVICE))
            errors = [difference(a, b) for a, b in zip(found, wanted)]
            tell(f'{DEVICE}, {str(dtype)[6:]}, gates {gate}',
                 f'logits {errors[0]:.1e}, gradients {errors[1]:.1e}')
    from torch._dynamo.utils import counters
    tell('graphs of the two', counters['stats']['unique_graphs'])

PARTS = {f.__name__: f for f in (data, exact, speed, pretrain, remove, hand_over, resume, paper,
                                 more)}

@command
def main(argv):
    wanted = [a for a in argv if not a.startswith('--')] or [*PARTS]
    check({*wanted} <= PARTS.keys() and OPTIONS.keys() <= {'tiny', 'seconds', 'tokenizer'},
          f"got {' '.join(argv)}; expected parts of {', '.join(PARTS)}")
    began, seconds = time.time(), int(OPTIONS.get('seconds', 3600))

    def over(number, frame):
        raise TimeoutError("no time left")
    signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    OUT.mkdir(parents=True, exist_ok=True)
    tell('machine', f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}")
    for name in wanted:
        start = time.time()
        try:
            if start - began >= seconds:
                raise TimeoutError("no time left")
            PARTS[name]()
        except Exception as e:      # whatever it is, the other parts go on
            tell(f'{name} FAILED', f'{type(e).__name__}: {e}')
        tell(f'time of {name}', f'{time.time() - start:.0f} s')
    signal.alarm(0)
    print(f"\n| {'what':<45} | found |\n|---|---|")
    for what, value in ROWS:
        print(f'| {what:<45} | {value} |')

if __name__ == '__main__':
    main()
