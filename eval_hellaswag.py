"""
HellaSwag accuracy of any model (Zellers et al. 2019, arXiv 1905.07830): which of four endings is
likeliest?

    python eval_hellaswag.py MODEL                  a hub id, a Hugging Face folder, or an out_dir
    torchrun --nproc_per_node=8 eval_hellaswag.py MODEL

    --data=FILE.jsonl   the questions      (default: data/hellaswag_val.jsonl, downloaded once)
    --limit=N           the first N only   (default: all 10,042)
    --json=OUT          the results, and each ending's score, as JSON
    --device=           cpu, cuda or mps   (default: cuda if there is one)

Two conventions are in use. (Published for GPT-2 small: 28.59%, 29.55% and 28.92%, 31.14%.)
    completion   `ctx`, a space, the ending, as in the LayerNorm papers. acc: the largest sum of the
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

from model import GPT2, UserError, check, command, companions, one_line, probe, write
from prepare import get_tokenizer, vocabulary

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
QUESTIONS = 10042
FILE = os.path.join('data', 'hellaswag_val.jsonl')
RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
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

def rows(questions, encode, block_size):
    """-> [(ids, n_scored, lost)]: question q, style s and ending e are row (q * 2 + s) * 4 + e.

    ids: a uint16 array, whose last n_scored are the ending; at most block_size + 1, as the last is
    only predicted. lost: how many tokens the row lost on the left.
    """
    out = []
    for question, style in ((q, s) for q in questions for s in STYLES):
        context, endings = texts(question, style)
        for ending in endings:
            head, tail = tokens(context, ending, style, encode)
            ids = np.concatenate([head, tail])
            kept = ids[-(block_size + 1):]
            out.append((kept, min(len(tail), len(kept) - 1), len(ids) - len(kept)))
    return out

# -----------------------------------------------------------------------------
# Scores.

@torch.no_grad()
def score(model, rows, device, batch_tokens):
    """The sum of each ending's log-likelihoods, (len(rows),) float64, in float32 on every device.

    Ranks share the batches, which are the same for any number of them.
    """
    from tqdm import tqdm
    batches = []
    # the longest first: what does not fit in memory fails at once
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), i)):
        if not batches or len(rows[batches[-1][0]][0]) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for batch in tqdm(batches[RANK::WORLD], unit=' batches', disable=None if RANK == 0 else True):
        width = len(rows[batch[0]][0]) - 1
        x, y = torch.zeros(2, len(batch), width, dtype=torch.int64)
        y -= 1      # padded on the right, where causal attention keeps it from being seen
        for r, i in enumerate(batch):
            ids, n, _ = rows[i]
            ids = torch.from_numpy(ids.astype(np.int64))
            x[r, :len(ids) - 1] = ids[:-1]
            y[r, len(ids) - 1 - n:len(ids) - 1] = ids[-n:]
        where, at = (y >= 0).nonzero(as_tuple=True)
        z = model(x.to(device))[0][where.to(device), at.to(device)].float()     # (scored, vocab)
        loss = F.cross_entropy(z, y[where, at].to(device), reduction='none')
        loss = loss.masked_fill(~z.sum(-1).isfinite(), torch.nan).cpu().double()
        total[batch] = -torch.zeros(len(batch), dtype=torch.float64).index_add(0, where, loss)
    if WORLD > 1:
        dist.all_reduce(total)
    for i in total.isnan().nonzero().flatten().tolist():
        raise UserError(f"a logit of the model is NaN or infinite: question {i // 8 + 1}, "
                        f"{STYLES[i // 4 % 2]} style, ending {i % 4}")
    return total

def accuracies(questions, rows, sums):
    """{'acc': .., 'acc_stderr': .., 'acc_norm': .., ...}, and the scores behind them."""
    labels = np.array([int(q['label']) for q in questions])
    sums = np.asarray(sums).reshape(-1, 2, 4)                       # question, style, ending
    lengths = np.array([n for _, n, _ in rows]).reshape(-1, 2, 4)   # in tokens, but:
    lengths[:, 1] = [[len(e) for e in texts(q, 'harness')[1]] for q in questions]   # characters
    with np.errstate(divide='ignore', invalid='ignore'):  # an ending of brackets has no characters
        means = sums / lengths
    metrics = {'acc': sums[:, 0], 'acc_norm': means[:, 0],
               'harness_acc': sums[:, 1], 'harness_acc_norm': means[:, 1]}
    result = {}
    for name, scores in metrics.items():
        right, n = scores.argmax(1) == labels, len(labels)
        result[name] = right.mean().item()
        result[name + '_stderr'] = (right.std(ddof=1) / np.sqrt(n)).item() if n > 1 else None
    scores = [{'label': int(label), 'completion': {'loglikelihood': s[0], 'tokens': k[0]},
               'harness': {'loglikelihood': s[1], 'characters': k[1]}}
              for label, s, k in zip(labels, sums.tolist(), lengths.tolist())]
    return result, scores

# -----------------------------------------------------------------------------
# The questions.

def parse(text, source, limit=None):
    """The questions in the bytes of a .jsonl file. UserError tells the number of a bad line."""
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    check(lines, f"{source} holds no questions")
    questions = []
    for n, line in lines[:limit]:
        try:
            q = json.loads(line)
            found = [q[k] for k in ('activity_label', 'ctx_a', 'ctx_b', 'ctx')] + [*q['endings']]
            check([type(t) for t in found] == [str] * 8, "expected 4 texts and 4 endings")
            check(str(q['label']) in [*'0123'], f"label is {q['label']!r}; expected 0 to 3")
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise UserError(f"{source}, line {n}: no question ({type(e).__name__}: {one_line(e)})")
        questions.append(q)
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
                break       # not there, or not for us: asking again does not help
            time.sleep(seconds)
    raise UserError(f"cannot download the questions ({reason}): put the official file at {path} "
                    f"or type --data=FILE.jsonl")

# -----------------------------------------------------------------------------

def tokenizer_of(source, vocab_size):
    """The tokenizer that the model brings; without one, GPT-2's or bytes, by vocabulary size."""
    if vocabulary(companions(source)):
        return get_tokenizer(source)
    gpt2 = 50257 <= vocab_size < 50257 + 128    # some pad it to a multiple of 64 or 128
    check(gpt2 or vocab_size == 257, f"{source} has {vocab_size} tokens and no tokenizer; GPT-2 "
                                     f"has 50257: put its tokenizer.json into its folder")
    return get_tokenizer('gpt2' if gpt2 else 'bytes')

@command
def main(argv):
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    devices = ['cuda'] * cuda + ['mps'] * mps + ['cpu']
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = partial(check, False)
    parser.add_argument('model', type=os.path.expanduser)
    parser.add_argument('--data', type=os.path.expanduser, default=FILE)
    parser.add_argument('--limit', type=int)
    parser.add_argument('--json', type=os.path.expanduser)
    parser.add_argument('--device', choices=devices, default='cuda' if cuda else 'cpu')
    o = parser.parse_args(argv)
    source, device = o.model, o.device
    check(o.limit is None or o.limit > 0, f"--limit={o.limit}: expected a whole number from 1")
    if device == 'cuda':
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.set_float32_matmul_precision('highest')
    model = GPT2.from_pretrained(source).eval().to(device)
    tokenizer = tokenizer_of(source, model.config.vocab_size)
    if o.data == FILE and RANK == 0 and not os.path.exists(FILE):
        download(URL, FILE)
    try:
        if WORLD > 1:
            dist.init_process_group('gloo')     # so that all wait for the file
        questions = parse(Path(o.data).read_bytes(), o.data, o.limit)
        if o.json and RANK == 0:
            probe(o.json)
        t0 = time.time()
        all_rows = rows(questions, tokenizer.encode, model.config.block_size)
        top = max(row.max() for row, _, _ in all_rows)
        check(top < model.config.vocab_size, f"the tokenizer of {source} gives token {top}; the "
                                             f"model has {model.config.vocab_size} tokens")
        # the logits of so many tokens take 0.8 GB on the CPU, 3.3 GB on a GPU
        sums = score(model, all_rows, device, 4096 if device == 'cpu' else 16384)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if RANK > 0:
        return
    result, scores = accuracies(questions, all_rows, sums)
    n, lost = len(questions), np.array([lost for _, _, lost in all_rows])
    truncated = (lost.reshape(n, 8) > 0).any(1).sum().item()
    if o.json:
        result |= {'model': source, 'questions': n, 'truncated': truncated, 'scores': scores}
        write(o.json, json.dumps(result).encode())
    print(f"{source}: {n:,} questions of HellaSwag in {time.time() - t0:.0f} s")
    if truncated:
        print(f"questions longer than the context, which lost some on the left: {truncated:,}")
    print(f"\n{'':<18}{'accuracy':>10}{'std. error':>12}")
    for name in ('acc', 'acc_norm', 'harness_acc', 'harness_acc_norm'):
        error = '' if n == 1 else f"{result[name + '_stderr']:.2%}"
        print(f"{name:<18}{result[name]:>10.2%}{error:>12}")

if __name__ == '__main__':
    main()
