"""
Writes an untrained GPT-2 with a planted giant vector, as a Hugging Face folder that any run can
start from:

    python experiments/standin.py FOLDER [--n_layer=4] [--n_head=4] [--n_embd=128]
        [--block_size=128] [--vocab_size=257]
    python train.py config/demo_pretrain.py --init_from=FOLDER

Trained GPT-2s park a vector of up to 42 times the ordinary std at position 0 and at end-of-text:
the first block's MLP writes it into a few channels of the residual stream, the last block's erases
it (arXiv 2507.02559, section 4). Small models that are trained for minutes do not grow one, and
removing their LayerNorm is too easy a test. So it is planted: GIANT neurons of the first MLP fire
at position 0 and at end-of-text only, and write +-SIZE into two channels; as many of the last MLP
read these channels and write the opposite. A pre-training of a thousand iterations keeps it.
"""
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from model import GPT2, GPT2Config, check, command      # noqa: E402

GIANT = 64              # neurons that write the vector, and as many that erase it
SIZE = 1700.0           # what they write into each of the two channels

@torch.no_grad()
def plant(model, eot):
    """Plants the giant vector into an untrained model, at position 0 and at the token `eot`."""
    C = model.config.n_embd
    mark = torch.randn(C)
    mark[:2] = 0
    mark = (mark - mark.mean()) / mark.norm()
    # each of the two puts ln_2's output near sqrt(C) * mark, also later in training, when ordinary
    # embeddings have grown to a norm of 1 or 2
    model.wpe.weight[0] += 4 * mark
    model.wte.weight[eot] += 4 * mark
    first, last = model.h[0].mlp, model.h[-1].mlp
    sign = torch.zeros(C)
    sign[0], sign[1] = 1, -1
    # a neuron's input is 12 where the vector is wanted and -12 +- 2 elsewhere: there GELU and its
    # gradient are 0
    for mlp, direction, write in ((first, mark, SIZE), (last, sign / 2 ** 0.5, -SIZE)):
        mlp.c_fc.weight[:GIANT] = direction * 24 / C ** 0.5
        mlp.c_fc.bias[:GIANT] = -12
        mlp.c_proj.weight[:, :GIANT] = (sign * write / (12 * GIANT))[:, None]

@command
def main(argv):
    shape = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=257)
    folders = [a for a in argv if not a.startswith('--')]
    for arg in argv:
        key, eq, value = arg.removeprefix('--').partition('=')
        check(arg in folders or key in shape and value.isdecimal(),
              f"{arg}: expected one of {', '.join(f'--{k}=N' for k in shape)}")
        if arg not in folders:
            shape[key] = int(value)
    check(len(folders) == 1, "expected one FOLDER")
    check(not os.path.exists(folders[0]), f"{folders[0]} exists: choose another name")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**shape))
    plant(model, model.config.eot_token_id)
    model.save_pretrained(folders[0])

if __name__ == '__main__':
    main()
