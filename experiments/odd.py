"""
Does a model without LayerNorm explode on rare inputs? Evaluates runs on text that they were not
trained on.

    python experiments/odd.py [--original=MODEL] RUN [RUN ...]

The runs are models of bytes: the demo's, or those of the evidence. Prints for each kind of text the
mean loss in nats per byte, by its place in the window, the 99.9th percentile and the largest of a
byte, the expected calibration error and the prediction's entropy. With an original it adds
KL(original || run), the Jensen-Shannon divergence and the share of bytes with the same likeliest
next byte. Means over the runs of one NAME.SEED; the largest of all.
"""
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from losses import calibration, measured        # noqa: E402
from model import GPT2, check, command          # noqa: E402

def texts(n=50_000):
    """{kind: (n,) uint16 bytes}; the standard library's validation split is what models know."""
    rng = np.random.default_rng(0)
    headers = sorted(Path(sysconfig.get_paths()['include']).glob('*.h'))
    code = b''.join(path.read_bytes() for path in headers)
    check(code, "this Python has no C headers: install its -dev package")
    chinese = ''.join(map(chr, rng.integers(0x4e00, 0x9fa5, n // 3))).encode()
    texts = {'bytes, at random': rng.bytes(n), 'C headers': code,
             'Chinese characters, at random': chinese, 'one character, repeated': b'a' * n,
             'a line, repeated': b'for i in range(10):\n' * (n // 20),
             'ASCII, at random': bytes(rng.integers(32, 127, n).tolist())}
    known = np.fromfile('data/stdlib/val.bin', np.uint16, n)
    begun = known.copy()
    begun[::128] = 256      # end-of-text, as TransformerLens does
    return {'the validation split': known, 'each window begins with end-of-text': begun} | {
        kind: np.frombuffer(text[:n], np.uint8).astype(np.uint16) for kind, text in texts.items()}

def numbers(run, original, ids):
    """{column: number} of a run on token ids."""
    models = [GPT2.from_pretrained(m).eval() for m in (original, run) if m]
    found, i = measured(models, ids), len(models) - 1
    loss = found[f'loss {i}']
    parts = {'mean': loss, 'first': loss[:, :1], '2nd to 64th': loss[:, 1:64],
             'rest': loss[:, 64:], 'entropy': found[f'entropy {i}']}
    if original:
        parts |= {'KL': found['kl'], 'JSD': found['jsd'], 'same': found['same']}
    return {name: part.mean(dtype=np.float64) for name, part in parts.items()} | {
        '99.9%': np.quantile(loss, 0.999), 'max': loss.max(),
        'ECE': calibration(found[f'confidence {i}'], found[f'right {i}'])}

@command
def main(argv):
    original = ''.join(a.partition('=')[2] for a in argv if a.startswith('--original='))
    seeds = {}      # {name: runs}
    for run in (a for a in argv if not a.startswith('--original=')):
        seeds.setdefault(os.path.basename(os.path.normpath(run)).split('.')[0], []).append(run)
    check(seeds, "expected [--original=MODEL] RUN [RUN ...]")
    columns = ['mean', 'first', '2nd to 64th', 'rest', '99.9%', 'max', 'ECE', 'entropy']
    columns += ['KL', 'JSD', 'same'] if original else []
    print(f"| text | run | {' | '.join(columns)} |\n{'|---' * (len(columns) + 2)}|")
    for kind, ids in texts().items():
        for name, runs in seeds.items():
            table = [numbers(run, original, ids) for run in runs]
            cells = [(max if c == 'max' else np.mean)([row[c] for row in table]) for c in columns]
            print(f"| {kind} | {name} | {' | '.join(f'{x:.3f}' for x in cells)} |", flush=True)

if __name__ == '__main__':
    main()
