"""
HellaSwag accuracy of any model (Zellers et al. 2019, arXiv 1905.07830): which of four endings does it find likeliest?

    python eval_hellaswag.py MODEL                  a hub id ('gpt2'), a Hugging Face folder, or a run's out_dir
    torchrun --nproc_per_node=8 eval_hellaswag.py MODEL

    --data=FILE.jsonl   the questions       (default: data/hellaswag_val.jsonl, downloaded once)
    --limit=N           the first N only    (default: all 10,042)
    --json=OUT          the results, and each ending's score, as JSON
    --device=           cpu or cuda         (default: cuda if there is one)

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
import sys
import time

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import GPT2, UserError as BadInput
from prepare import Bytes, GPT2BPE

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
    Raises BadInput at a logit that is NaN or infinite.
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
        ids = torch.from_numpy(rows[i][0][:-1].astype(np.int64)).to(device)
        t = first_bad_token(model, ids)
        raise BadInput(f"the model gives a NaN or infinite logit: question {i // 8 + 1}, {STYLES[i // 4 % 2]} style, ending {i % 4}"
                       + (f", first at token {t} (id {ids[t]})" if t is not None else '') + "; no accuracy is computed from such a model")
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
    """The questions of a .jsonl file. Raises BadInput with the number of a line that is none."""
    questions = []
    try:
        with open(path, encoding='utf-8') as f:
            for n, line in enumerate(f, 1):
                if limit and len(questions) == limit:
                    break
                if not line.strip():
                    continue
                try:
                    q = json.loads(line)
                    for field in ('activity_label', 'ctx', 'ctx_a', 'ctx_b'):
                        if not isinstance(q[field], str):
                            raise BadInput(f"{field} is {q[field]!r}, expected text")
                    if not (isinstance(q['endings'], list) and len(q['endings']) == 4 and all(isinstance(e, str) for e in q['endings'])):
                        raise BadInput("expected `endings` to be a list of four texts")
                    if str(q['label']) not in ('0', '1', '2', '3'):
                        raise BadInput(f"label is {q['label']!r}, expected 0, 1, 2 or 3")
                    if not q['ctx'].strip():
                        raise BadInput("ctx is empty")
                except KeyError as e:
                    raise BadInput(f"{path}, line {n}: the field {e} is missing")
                except BadInput as e:
                    raise BadInput(f"{path}, line {n}: {e}")
                except (ValueError, TypeError, RecursionError) as e:
                    raise BadInput(f"{path}, line {n}: not a question as JSON ({e})")
                questions.append(q)
    except OSError as e:
        raise BadInput(f"cannot read the questions {path}: {e.strerror}")
    except UnicodeDecodeError as e:
        raise BadInput(f"{path} is not UTF-8 text: {e}")
    if not questions:
        raise BadInput(f"{path} holds no questions")
    return questions


def download(url, path, attempts=5):
    """Fetches the official validation file to `path`, which stands there only when complete and well-formed."""
    from tqdm import tqdm
    tmp = path + '.partial'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for attempt in range(attempts):
            try:
                with requests.get(url, stream=True, timeout=(10, 30)) as r, open(tmp, 'wb') as f:
                    r.raise_for_status()
                    size = int(r.headers.get('Content-Length', 0)) or None
                    with tqdm(desc=os.path.basename(path), total=size, unit='B', unit_scale=True, disable=None) as bar:
                        for chunk in r.iter_content(1 << 16):
                            f.write(chunk)
                            bar.update(len(chunk))
                if (n := len(read(tmp))) != QUESTIONS:
                    raise BadInput(f"{n} questions, expected {QUESTIONS}")
                os.replace(tmp, path)
                return
            except (requests.RequestException, BadInput) as e:
                reason = str(e).splitlines()[0]
                if isinstance(e, requests.HTTPError) and e.response.status_code < 500:
                    break       # not there, or not for us: asking again does not help
                if attempt + 1 < attempts:
                    time.sleep(2 ** attempt)
    except OSError as e:
        reason = str(e)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)
    raise BadInput(f"the questions cannot be downloaded ({reason}): put the official hellaswag_val.jsonl at {path}, or name it with --data=FILE.jsonl")

# -----------------------------------------------------------------------------

def evaluate(argv):
    options = {'data': None, 'limit': None, 'json': None, 'device': 'cuda' if torch.cuda.is_available() else 'cpu'}
    names = [a for a in argv if not a.startswith('--')]
    for arg in argv:
        if arg.startswith('--'):
            key, eq, value = arg[2:].partition('=')
            if key not in options or not value:
                raise BadInput(f"{arg}: expected one of {', '.join(f'--{k}=' for k in options)}")
            options[key] = value
    if len(names) != 1:
        raise BadInput(f"expected one MODEL, got {len(names)}: a hub id, a Hugging Face folder or a run's out_dir")
    limit, device, out = options['limit'], options['device'], options['json']
    if limit is not None and (not limit.isdecimal() or int(limit) < 1):
        raise BadInput(f"--limit={limit}: expected a whole number of at least 1")
    if device not in ('cpu', 'cuda') or device == 'cuda' and not torch.cuda.is_available():
        raise BadInput(f"--device={device} cannot be used here: type --device=cpu")
    if out and RANK == 0:
        try:
            open(out, 'a').close()      # before an hour of computing, not after
        except OSError as e:
            raise BadInput(f"--json={out} cannot be written: {e.strerror}")
    if device == 'cuda':
        device = f'cuda:{LOCAL_RANK}'
        torch.set_float32_matmul_precision('highest')

    model = GPT2.from_pretrained(names[0]).eval().to(device)
    vocab = model.config.vocab_size
    if vocab == Bytes.vocab_size:
        tokenizer = Bytes()
    elif GPT2BPE.vocab_size <= vocab < GPT2BPE.vocab_size + 128:     # some pad the vocabulary to a multiple of 64 or 128
        tokenizer = GPT2BPE()
    else:
        raise BadInput(f"{names[0]} has a vocabulary of {vocab} tokens; expected GPT-2's ({GPT2BPE.vocab_size}) or bytes ({Bytes.vocab_size})")
    if options['data'] is None and RANK == 0 and not os.path.exists(FILE):
        download(URL, FILE)
    if options['data'] is None and WORLD > 1:
        dist.init_process_group('gloo')     # so that all wait for the file
    questions = read(options['data'] or FILE, limit and int(limit))
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group('gloo')
    t0 = time.time()
    all_rows = rows(questions, tokenizer.encode, model.config.block_size)
    # at most so many tokens a batch: their logits are 0.8 GB on the CPU, 3.3 GB on a GPU
    sums = score(model, all_rows, device, 4096 if device == 'cpu' else 16384)
    result, scores = accuracies(questions, all_rows, sums)
    if RANK > 0:
        return
    truncated = sum(any(lost for _, _, lost in all_rows[q * 8:q * 8 + 8]) for q in range(len(questions)))
    print(f"{names[0]}: {len(questions):,} questions of HellaSwag in {time.time() - t0:.0f} s")
    if truncated:
        print(f"questions longer than the model's context of {model.config.block_size} tokens, which lost some on the left: {truncated:,}")
    print(f"\n{'':<18}{'accuracy':>10}{'std. error':>12}")
    for name in ('acc', 'acc_norm', 'harness_acc', 'harness_acc_norm'):
        error = result[name + '_stderr']
        print(f"{name:<18}{result[name]:>10.2%}" + (f"{error:>12.2%}" if error is not None else ''))
    if out:
        try:
            with open(out + '.tmp', 'w') as f:
                json.dump({'model': names[0], 'questions': len(questions), 'truncated': truncated, **result, 'scores': scores}, f)
            os.replace(out + '.tmp', out)
        except OSError as e:
            raise BadInput(f"--json={out} cannot be written: {e.strerror}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv or not argv:
        print(__doc__)
        return
    try:
        evaluate(argv)
    except BadInput as e:
        if RANK == 0:       # all ranks find the same
            print(f"eval_hellaswag.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
