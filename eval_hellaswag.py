"""
HellaSwag accuracy of any model (Zellers et al. 2019, arXiv 1905.07830): which ending is likeliest?

    python eval_hellaswag.py MODEL                  a hub id, a Hugging Face folder, or an out_dir
    torchrun --nproc_per_node=8 eval_hellaswag.py MODEL

    --data=FILE.jsonl   the questions      (default: data/hellaswag_val.jsonl, downloaded once)
    --limit=N           the first N only   (default: all 10,042)
    --json=OUT          the results, and each ending's score, as JSON
    --device=           cpu, cuda or mps   (default: cuda if there is one)

Two conventions are in use. (Published for GPT-2 small: 28.59%, 29.55% and 28.92%, 31.14%.)
    completion   `ctx`, a space, the ending, as in the LayerNorm papers. acc: the largest sum of an
                 ending's log-likelihoods in nats; acc_norm: the largest mean per token.
    harness      EleutherAI's lm-eval: the activity in front, WikiHow's bracketed markup taken out.
                 harness_acc: the same sum; harness_acc_norm: the sum over the ending's characters.
"""
import argparse
import json
import os
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import (LOCAL_RANK, RANK, WORLD, GPT2, UserError, check, command, companions,
                   join_processes, one_line, write)
from prepare import get_tokenizer

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
QUESTIONS = 10042
FILE = os.path.join('data', 'hellaswag_val.jsonl')
STYLES = ('completion', 'harness')

# -----------------------------------------------------------------------------
# The two conventions: a question -> a context and four endings, as text; then as tokens.

def clean(text):
    """WikiHow's markup as the harness reads it: a title starts a sentence, other brackets go."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')

def texts(question, style):
    """-> (context, the four endings)."""
    if style == 'completion':
        return question['ctx'], question['endings']
    context = f"{question['activity_label']}: {question['ctx_a']} {question['ctx_b'].capitalize()}"
    return clean(context), [clean(e) for e in question['endings']]

def tokens(context, ending, style, encode):
    """-> (the context's token ids, the ending's), of the two joined by a space."""
    if style == 'completion':
        return encode(context), encode(' ' + ending)
    # a context that ends in spaces gives them to the ending, and the two are encoded as one text
    head, whole = encode(context.rstrip()), encode(context + ' ' + ending)
    return head, whole[len(head):]

# -----------------------------------------------------------------------------
# Scores. A question is a batch of 8 rows, so that they do not depend on the number of processes.

@torch.no_grad()
def score(model, question, encode):
    """-> (2, 4, 3) float64, for each style and ending: the sum of its log-likelihoods in nats, its
    length in tokens or characters, and how many tokens the context lost on the left."""
    size, T = model.config.vocab_size, model.config.block_size
    rows, numbers = [], []      # (token ids, how many of them are scored); (length, lost)
    for style in STYLES:
        context, endings = texts(question, style)
        for ending in endings:
            head, tail = tokens(context, ending, style, encode)
            ids = np.concatenate([head, tail])[-(T + 1):].astype(np.int64)  # the last is no input
            n = min(len(tail), len(ids) - 1)
            rows.append((torch.from_numpy(ids), n))
            numbers.append((n if style == 'completion' else len(ending),
                            len(head) + len(tail) - len(ids)))
    top = max(ids.max() for ids, _ in rows)
    check(top < size, f"the model has {size} tokens, but its tokenizer gives token {top}")
    # padded on the right, where causal attention keeps it from being seen
    x, y = torch.full((2, 8, max(len(ids) for ids, _ in rows) - 1), -1)
    for r, (ids, n) in enumerate(rows):
        x[r, :len(ids) - 1] = ids[:-1]
        y[r, len(ids) - 1 - n:len(ids) - 1] = ids[-n:]
    device, scored = model.wte.weight.device, y >= 0
    z = model(x.clamp(0).to(device))[0][scored.to(device)]          # (scored tokens, vocab)
    loss = F.cross_entropy(z, y[scored].to(device), reduction='none')
    sums = torch.zeros(y.shape, dtype=torch.float64)
    sums[scored] = -loss.masked_fill(~z.sum(-1).isfinite(), torch.nan).cpu().double()
    return torch.cat((sums.sum(1, keepdim=True), torch.tensor(numbers)), 1).view(2, 4, 3)

def accuracies(questions, found):
    """{'acc': .., 'acc_stderr': .., 'acc_norm': .., ...}, and the scores that they come from."""
    n, labels = len(questions), np.array([int(q['label']) for q in questions])
    sums, lengths = found[..., 0].numpy(), found[..., 1].numpy().astype(int)    # (n, 2, 4)
    with np.errstate(divide='ignore', invalid='ignore'):  # an ending of brackets has no characters
        means = sums / lengths
    result = {}
    for name, scores in {'acc': sums[:, 0], 'acc_norm': means[:, 0],
                         'harness_acc': sums[:, 1], 'harness_acc_norm': means[:, 1]}.items():
        right = scores.argmax(1) == labels
        result[name] = right.mean().item()
        result[name + '_stderr'] = (right.std(ddof=1) / np.sqrt(n)).item() if n > 1 else None
    scores = [{'label': label, 'completion': {'loglikelihood': s[0], 'tokens': k[0]},
               'harness': {'loglikelihood': s[1], 'characters': k[1]}}
              for label, s, k in zip(labels.tolist(), sums.tolist(), lengths.tolist())]
    return result, scores

# -----------------------------------------------------------------------------
# The questions.

def parse(text, source, limit=None):
    """The questions in the bytes of a .jsonl file. UserError tells the number of a bad line."""
    questions = []
    for n, line in enumerate(text.splitlines(), 1):
        if not line.strip() or len(questions) == limit:
            continue
        try:
            q = json.loads(line)
            found = [q[k] for k in ('activity_label', 'ctx_a', 'ctx_b', 'ctx')] + [*q['endings']]
            check([type(t) for t in found] == [str] * 8, "expected 4 texts and 4 endings")
            check(str(q['label']) in [*'0123'], f"label is {q['label']!r}; expected 0 to 3")
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise UserError(f"{source}, line {n}: no question ({type(e).__name__}: {one_line(e)})")
        questions.append(q)
    check(questions, f"{source} holds no questions")
    return questions

def download(url, path):
    """Fetches the official validation file to `path`, which stands there only when complete."""
    for seconds in (1, 2, 4, 8, 0):     # until the next attempt
        try:
            answer = requests.get(url, timeout=(10, 60), stream=True)   # the status comes first
            answer.raise_for_status()
            n = len(parse(answer.content, url))
            check(n == QUESTIONS, f"{n} questions, expected {QUESTIONS}")
            return write(path, answer.content)
        except (requests.RequestException, UserError) as e:
            reason = one_line(e)
            if isinstance(e, requests.HTTPError) and e.response.status_code < 500:
                break       # a 4xx: do not retry
            time.sleep(seconds)
    raise UserError(f"cannot download the questions ({reason}): put the official file at {path} "
                    f"or type --data=FILE.jsonl")

@command
def main(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = partial(check, False)
    devices = ['cuda'] * torch.cuda.is_available() + ['cpu']
    devices += ['mps'] * torch.backends.mps.is_available()
    parser.add_argument('model', type=os.path.expanduser)
    parser.add_argument('--data', type=os.path.expanduser, default=FILE)
    parser.add_argument('--limit', type=int)
    parser.add_argument('--json', type=os.path.expanduser)
    parser.add_argument('--device', choices=devices, default=devices[0])
    o = parser.parse_args(argv)
    check(o.limit is None or o.limit > 0, f"--limit={o.limit}: expected a whole number from 1")
    if o.device == 'cuda':
        o.device = f'cuda:{LOCAL_RANK}'
        torch.set_float32_matmul_precision('highest')
    model = GPT2.from_pretrained(o.model).eval().to(o.device)
    size, own = model.config.vocab_size, 'tokenizer.json' in companions(o.model)
    gpt2 = 50257 <= size < 50257 + 128      # some pad it to a multiple of 64 or 128
    check(own or gpt2 or size == 257, f"{o.model} has {size} tokens and no tokenizer; GPT-2 has "
                                      f"50257: put its tokenizer.json into its folder")
    tokenizer = get_tokenizer(o.model if own else 'gpt2' if gpt2 else 'bytes')
    if o.data == FILE and RANK == 0 and not os.path.exists(FILE):
        download(URL, FILE)
    if WORLD > 1:
        join_processes()    # so that all wait for the file
    questions = parse(Path(o.data).read_bytes(), o.data, o.limit)
    if o.json and RANK == 0:
        check(not os.path.isdir(o.json), f"--json={o.json} is a folder; expected a file")
        os.makedirs(os.path.dirname(os.path.abspath(o.json)), exist_ok=True)
    t0, n = time.time(), len(questions)
    found = torch.zeros(n, 2, 4, 3, dtype=torch.float64)
    for i in tqdm(range(RANK, n, WORLD), unit=' questions', disable=None if RANK == 0 else True):
        found[i] = score(model, questions[i], tokenizer.encode)
        check(not found[i].isnan().any(), f"question {i + 1}: a logit is NaN or infinite")
    if WORLD > 1:
        dist.all_reduce(found)
    if RANK > 0:
        return
    result, scores = accuracies(questions, found)
    truncated = (found[..., 2] > 0).flatten(1).any(1).sum().item()
    print(f"{o.model}: {n:,} questions of HellaSwag in {time.time() - t0:.0f} s")
    print(f"questions longer than the context, which lost some on the left: {truncated:,}")
    print(f"\n{'':<18}{'accuracy':>10}{'std. error':>12}")
    for name in ('acc', 'acc_norm', 'harness_acc', 'harness_acc_norm'):
        error = '' if n == 1 else f"{result[name + '_stderr']:.2%}"
        print(f"{name:<18}{result[name]:>10.2%}{error:>12}")
    if o.json:
        about = {'model': o.model, 'questions': n, 'truncated': truncated, 'scores': scores}
        write(o.json, json.dumps(result | about).encode())

if __name__ == '__main__':
    main()
