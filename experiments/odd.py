"""
Does a model without LayerNorm explode on rare inputs? Evaluates runs on text that they were not
trained on.

    python experiments/odd.py RUN [RUN ...]     bytes models: the demo's, or those of the evidence

Prints, for each kind of text: the mean loss in nats per byte, by its place in the window, the
99.9th percentile and the largest of a byte, the expected calibration error and the entropy of the
prediction; means over the runs of one NAME.SEED, and the largest of all.
"""
import os
import sys
import sysconfig
import tempfile

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import prepare                  # noqa: E402
import train                    # noqa: E402
from model import GPT2          # noqa: E402

def texts(n=50_000):
    """{kind: text of about n bytes};
    the standard library's validation split is what the models know."""
    rng = np.random.default_rng(0)
    include = sysconfig.get_paths()['include']
    headers = sorted(name for name in os.listdir(include) if name.endswith('.h'))
    code = ''
    for name in headers:
        with open(os.path.join(include, name), encoding='utf-8', errors='replace') as f:
            code += f.read()
    chinese = ''.join(map(chr, rng.integers(0x4e00, 0x9fa5, n // 3)))
    return {'C headers': code[:n], 'Chinese characters, at random': chinese,
            'one character, repeated': 'a' * n,
            'a line, repeated': 'for i in range(10):\n' * (n // 20),
            'ASCII, at random': ''.join(map(chr, rng.integers(32, 127, n)))}

def measured(run, ids):
    """(losses (windows, T), calibration error, entropy) of a run on token ids."""
    model = GPT2.from_pretrained(run).eval()
    with tempfile.TemporaryDirectory() as folder:
        ids.tofile(os.path.join(folder, 'val.bin'))
        cfg = train.load_config([f'--dataset={os.path.abspath(folder)}', '--eval_iters=0',
                                 f'--block_size={model.config.block_size}'])
        data = train.Data(cfg, 'cpu')
        data.open(257, ['val'])
        model.config.eot_token_id = 256
        table = train.token_losses(model, data, full=True)
    return table[0], *train.calibration(table)

def main(runs):
    known = np.fromfile('data/stdlib/val.bin', np.uint16, 50_000)
    begun = known.copy()
    begun[::GPT2.from_pretrained(runs[0]).config.block_size] = 256      # as TransformerLens does
    random = np.random.default_rng(1).integers(0, 256, 50_000).astype(np.uint16)
    bins = {'the validation split': known, 'each window begins with end-of-text': begun,
            'bytes, at random': random}
    bins |= {kind: prepare.Bytes().encode(text) for kind, text in texts().items()}
    seeds = {}      # {name: runs}
    for run in runs:
        seeds.setdefault(os.path.basename(os.path.normpath(run)).split('.')[0], []).append(run)
    head = 'text', 'run', 'mean', 'first', '2nd to 64th', 'rest', '99.9%', 'max', 'ECE', 'entropy'
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for kind, ids in bins.items():
        for name, its in seeds.items():
            losses, errors, entropies = zip(*(measured(run, ids) for run in its))
            parts = [np.array([np.nanmean(x[:, a:b]) for x in losses]).mean()
                     for a, b in ((0, None), (0, 1), (1, 64), (64, None))]
            high = np.mean([np.nanquantile(x, 0.999) for x in losses])
            cells = [f'{p:.3f}' for p in parts] + [f'{high:.1f}', f'{np.nanmax(losses):.1f}']
            cells += [f'{np.mean(errors):.3f}', f'{np.mean(entropies):.3f}']
            print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)

if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
