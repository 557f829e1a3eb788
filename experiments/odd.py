"""
Does a model without LayerNorm explode on rare inputs? Evaluates runs on text that they were not
trained on.

    python experiments/odd.py RUN [RUN ...]     bytes models: the demo's, or those of the evidence

Prints, for each kind of text: the mean loss in nats per byte, the 99.9th percentile and the largest
of a byte, the expected calibration error and the mean entropy of the prediction; for the first byte
of a window the mean, too.
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


def main(runs):
    block_size = GPT2.from_pretrained(runs[0]).config.block_size
    known = np.fromfile('data/stdlib/val.bin', np.uint16, 50_000)
    random = np.random.default_rng(1).integers(0, 256, 50_000).astype(np.uint16)
    bins = {'the validation split': known, 'bytes, at random': random}
    bins |= {kind: prepare.Bytes().encode(text) for kind, text in texts().items()}
    print('| text | run | mean | first of a window | 99.9% | max | calibration error | entropy |')
    print('|---|---|---|---|---|---|---|---|')
    for kind, ids in bins.items():
        with tempfile.TemporaryDirectory() as folder:
            ids.tofile(os.path.join(folder, 'val.bin'))
            for run in runs:
                cfg, _ = train.load_config(['--dataset=' + os.path.abspath(folder),
                                            f'--block_size={block_size}', '--eval_iters=0'])
                data = train.Data(cfg, 'cpu')
                data.open(257, ['val'])
                model = GPT2.from_pretrained(run).eval()
                model.config.eot_token_id = 256
                table = train.token_losses(model, data, full=True)
                loss = table[0][~np.isnan(table[0])]
                error, entropy = train.calibration(table)
                name, first = os.path.basename(os.path.normpath(run)), np.nanmean(table[0][:, 0])
                print(f'| {kind} | {name} | {loss.mean():.3f} | {first:.3f} | '
                      f'{np.quantile(loss, 0.999):.1f} | {loss.max():.1f} | {error:.3f} | '
                      f'{entropy:.3f} |', flush=True)


if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
