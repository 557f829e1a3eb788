"""
HellaSwag accuracy of any model (Zellers et al. 2019, arXiv 1905.07830): which of four endings does it find likeliest?

    python eval_hellaswag.py MODEL                  a hub id ('gpt2'), a Hugging Face folder, or a run's out_dir
    torchrun --nproc_per_node=8 eval_hellaswag.py MODEL

    --data=FILE.jsonl   the questions       (default: data/hellaswag_val.jsonl, downloaded once)
    --limit=N           the first N only    (default: all 10,042)
    --json=OUT          the results, and each ending's score, as JSON
    --device=           cpu, cuda or mps         (default: cuda if there is one)

Two conventions are in use, and differ in the text as much as in the score; both are computed in one pass:

    completion   `ctx`, a space, the ending. acc: the largest sum of the ending's log-likelihoods; acc_norm: the largest
                 mean per token. As in the LayerNorm papers. GPT-2 small: 28.59%, 29.55%
    harness      EleutherAI's lm-eval: the activity is put in front, WikiHow's bracketed markup taken out. harness_acc: the
                 largest sum; harness_acc_norm: the largest sum over the ending's characters. GPT-2 small: 28.92%, 31.14%

(Those are published values.) Log-likelihoods are in nats, in float32 on every device.
"""
import json
import os
import re
import time

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import GPT2, UserError, check, command, companions, write
from prepare import get_tokenizer, vocabulary

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
QUESTIONS = 10042
FILE = os.path.join('data', 'hellaswag_val.jsonl')
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
STYLES = ('completion', 'harness')

# -----------------------------------------------------------------------------
# The two conventions: a question -> a context and four endings, as text; then as tokens.

def clean(text):
    """The harness's clean-up of WikiHow's markup: a title starts a sentence, what else is in brackets goes."""
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
    body = context.rstrip()
    head, whole = encode(body), encode(context + ' ' + ending)
    return head, whole[len(head):]


def rows(questions, encode, block_size):
    """-> (ids, n_scored, lost): for question q, style s and ending e, row (q * 2 + s) * 4 + e.

    ids: a uint16 array, of which the last n_scored are the ending; at most block_size + 1, as the last is only
    predicted. lost: how many tokens the row lost on the left.
    """
    out = []
    for question in questions:
        for style in STYLES:
            context, endings = texts(question, style)
            for ending in endings:
                head, tail = tokens(context, ending, style, encode)
                ids = np.concatenate([head, tail])
                kept = ids[-(block_size + 1):]
                out.append((kept, min(len(tail), len(kept) - 1), len(ids) - len(kept)))
    return out

# -----------------------------------------------------------------------------

@torch.no_grad()
def score(model, rows, device, batch_tokens):
    """The sum of each ending's log-likelihoods in nats -> (len(rows),) float64, the same on all ranks.

    Rows of similar length share a batch; batches are dealt to the ranks, and are the same for any number of them.
    Raises UserError at a logit that is NaN or infinite.
    """
    from tqdm import tqdm
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), i))
    batches = []
    for i in order:     # the longest come first, so that what does not fit in memory fails at once
        if not batches or len(rows[batches[-1][0]][0]) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    total = torch.zeros(len(rows), dtype=torch.float64)     # NaN: a logit was not finite
    for batch in tqdm(batches[RANK::WORLD], unit=' batches', disable=None if RANK == 0 else True):
        width = len(rows[batch[0]][0]) - 1
        x, y = (torch.zeros(len(batch), width, dtype=torch.int64) for _ in range(2))
        y -= 1      # padded on the right, where causal attention keeps it from being seen
        for r, i in enumerate(batch):
            ids, n, _ = rows[i]
            ids = torch.from_numpy(ids.astype(np.int64))
            x[r, :len(ids) - 1] = ids[:-1]
            y[r, len(ids) - 1 - n:len(ids) - 1] = ids[-n:]
        where, at = (y >= 0).nonzero(as_tuple=True)
        z = model(x.to(device))[0][where.to(device), at.to(device)].float()     # (scored tokens, vocab)
        loss = F.cross_entropy(z, y[where, at].to(device), reduction='none')
        loss = loss.masked_fill(~z.sum(-1).isfinite(), torch.nan).cpu().double()    # one number a token: any NaN or infinity shows in the sum
        total[batch] = -torch.zeros(len(batch), dtype=torch.float64).index_add(0, where, loss)
    if WORLD > 1:
        dist.all_reduce(total)
    if total.isnan().any():
        i = total.isnan().nonzero()[0].item()
        raise UserError(f"the model gives a NaN or infinite logit: question {i // 8 + 1}, {STYLES[i // 4 % 2]} "
                        f"style, ending {i % 4}; no accuracy is computed from such a model")
    return total


def accuracies(questions, rows, sums):
    """{'acc': .., 'acc_stderr': .., 'acc_norm', .., 'harness_acc', .., 'harness_acc_norm', ..}, and the scores behind them."""
    labels = np.array([int(q['label']) for q in questions])
    sums = np.asarray(sums).reshape(-1, 2, 4)                                   # question, style, ending
    n_tokens = np.array([n for _, n, _ in rows]).reshape(-1, 2, 4)
    n_chars = np.array([[len(e) for e in texts(q, 'harness')[1]] for q in questions])
    with np.errstate(divide='ignore', invalid='ignore'):    # an ending that was all brackets has no characters
        metrics = {'acc': sums[:, 0], 'acc_norm': sums[:, 0] / n_tokens[:, 0],
                   'harness_acc': sums[:, 1], 'harness_acc_norm': sums[:, 1] / n_chars}
    result = {}
    for name, scores in metrics.items():
        right = scores.argmax(1) == labels
        result[name] = right.mean().item()
        result[name + '_stderr'] = (right.std(ddof=1) / np.sqrt(len(right))).item() if len(right) > 1 else None
    scores = [{'label': int(l), 'completion': {'loglikelihood': s[0].tolist(), 'tokens': t[0].tolist()},
               'harness': {'loglikelihood': s[1].tolist(), 'characters': c.tolist()}}
              for l, s, t, c in zip(labels, sums, n_tokens, n_chars)]
    return result, scores

# -----------------------------------------------------------------------------
# The questions.

def read(path, limit=None):
    """The questions of a .jsonl file. Raises UserError with the number of a line that is none."""
    questions = []
    try:
        with open(path, encoding='utf-8-sig') as f:
            for n, line in enumerate(f, 1):
                if limit and len(questions) == limit:
                    break
                if line.strip():
                    q = json.loads(line)
                    for name in ('activity_label', 'ctx', 'ctx_a', 'ctx_b'):
                        check(isinstance(q[name], str), f"{name} is {q[name]!r}, expected text")
                    good = isinstance(q['endings'], list) and [type(e) for e in q['endings']] == [str] * 4
                    check(good, f"endings is {q['endings']!r}, expected a list of four texts")
                    check(str(q['label']) in ('0', '1', '2', '3'), f"label is {q['label']!r}, expected 0 to 3")
                    check(q['ctx'].strip(), "ctx is empty")
                    questions.append(q)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e}")
    except KeyError as e:
        raise UserError(f"{path}, line {n}: the field {e} is missing")
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}, line {n}: {e}; expected a question as JSON")
    check(questions, f"{path} holds no questions")
    return questions


def download(url, path, attempts=5):
    """Fetches the official validation file to `path`, which stands there only when complete."""
    for attempt in range(attempts):
        try:
            answer = requests.get(url, timeout=(10, 60), stream=True)
            answer.raise_for_status()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write(path + '.new', answer.content)
            n = len(read(path + '.new'))
            check(n == QUESTIONS, f"{n} questions, expected {QUESTIONS}")
            return os.replace(path + '.new', path)
        except (requests.RequestException, UserError) as e:
            reason = str(e).splitlines()[0]
            if isinstance(e, requests.HTTPError) and e.response.status_code < 500:
                break       # not there, or not for us: asking again does not help
            time.sleep(2 ** attempt * (attempt + 1 < attempts))
        finally:
            if os.path.exists(path + '.new'):
                os.remove(path + '.new')
    raise UserError(f"cannot download the questions ({reason}): put the official hellaswag_val.jsonl at {path}, "
                    f"or name it with --data=FILE.jsonl")

# -----------------------------------------------------------------------------

def tokenizer_of(source, vocab_size):
    """The tokenizer that the model brings; without one, GPT-2's or bytes, by the size of its vocabulary."""
    if vocabulary(companions(source)):
        return get_tokenizer(source)
    # some pad the vocabulary to a multiple of 64 or 128
    name = 'bytes' if vocab_size == 257 else 'gpt2' if 50257 <= vocab_size < 50257 + 128 else None
    check(name, f"{source} brings no tokenizer, and has a vocabulary of {vocab_size} tokens; expected GPT-2's "
                f"(50257) or bytes (257): put its tokenizer.json into its folder")
    return get_tokenizer(name)


@command
def main(argv):
    options = {'data': FILE, 'limit': '0', 'json': '', 'device': 'cuda' if torch.cuda.is_available() else 'cpu'}
    names = [os.path.expanduser(a) for a in argv if not a.startswith('--')]
    for arg in argv:
        if arg.startswith('--'):
            key, eq, value = arg[2:].partition('=')
            check(key in options and value, f"{arg}: expected one of {', '.join(f'--{k}=' for k in options)}")
            options[key] = os.path.expanduser(value)
    check(len(names) == 1, f"expected one MODEL, got {len(names)}: a hub id, a Hugging Face folder or a run's out_dir")
    data, limit, out, device = (options[k] for k in ('data', 'limit', 'json', 'device'))
    check(limit.isdecimal() and ('--limit=0' not in argv), f"--limit={limit}: expected a whole number of at least 1")
    usable = device == 'cpu' or device == 'cuda' and torch.cuda.is_available() \
        or device == 'mps' and torch.backends.mps.is_available()
    check(usable, f"--device={device} cannot be used here: type --device=cpu")
    if out and RANK == 0:
        open(out, 'a').close()      # before an hour of computing, not after
    if device == 'cuda':
        device = f'cuda:{LOCAL_RANK}'
        torch.set_float32_matmul_precision('highest')
    model = GPT2.from_pretrained(names[0]).eval().to(device)
    tokenizer = tokenizer_of(names[0], model.config.vocab_size)
    if data == FILE and RANK == 0 and not os.path.exists(FILE):
        download(URL, FILE)
    try:
        if WORLD > 1:
            dist.init_process_group('gloo')     # so that all wait for the file
        questions = read(data, int(limit))
        t0 = time.time()
        all_rows = rows(questions, tokenizer.encode, model.config.block_size)
        # at most so many tokens a batch: their logits are 0.8 GB on the CPU, 3.3 GB on a GPU
        sums = score(model, all_rows, device, 4096 if device == 'cpu' else 16384)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if RANK > 0:
        return
    result, scores = accuracies(questions, all_rows, sums)
    truncated = sum(any(lost for _, _, lost in all_rows[q * 8:q * 8 + 8]) for q in range(len(questions)))
    if out:
        found = {'model': names[0], 'questions': len(questions), 'truncated': truncated, **result, 'scores': scores}
        write(out, json.dumps(found).encode())
    print(f"{names[0]}: {len(questions):,} questions of HellaSwag in {time.time() - t0:.0f} s")
    if truncated:
        print(f"questions longer than the model's context of {model.config.block_size} tokens, which lost some on "
              f"the left: {truncated:,}")
    print(f"\n{'':<18}{'accuracy':>10}{'std. error':>12}")
    for name in ('acc', 'acc_norm', 'harness_acc', 'harness_acc_norm'):
        error = result[name + '_stderr']
        print(f"{name:<18}{result[name]:>10.2%}" + (f"{error:>12.2%}" if error is not None else ''))


if __name__ == '__main__':
    main()
