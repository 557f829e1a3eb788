"""
Text -> data/NAME/{train,val}.bin: uint16 token ids, each document followed by end-of-text, and meta.json beside them.

    python prepare.py stdlib --tokenizer=bytes              the Python standard library's source: always there
    python prepare.py packages --tokenizer=bytes            sources and documentation of the installed packages
    python prepare.py openwebtext --max_tokens=600_000_000  streams just that much from the hub
    python prepare.py pile_filtered                         a preset: what the papers evaluate on (PRESETS, below)
    python prepare.py essays/ more.jsonl --name=mine        local .txt, .md, .rst, .py, .jsonl, .parquet, and folders
    python prepare.py some-user/some-dataset                any hub dataset with a column `text` or `input_ids`

    --name=          the folder under data/                        (default: from the first source)
    --tokenizer=     gpt2, or bytes: 0-255 and end-of-text 256     (default: gpt2)
    --max_tokens=    stop there, end-of-text counted               (default: everything)
    --val_fraction=  of the documents, drawn at random             (default: 0.01; the presets have their own)

A text file is one document, and so is a row of .jsonl or .parquet (the field `text`). One pass, all cores, and memory
that does not grow with the corpus (packages is read twice, and its lines' hashes are kept). Nothing stands under its
final name before it is complete.
"""
import codecs
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import requests

from model import UserError as BadInput

# name: (hub dataset, val_fraction); those with 1.0 are for evaluation only
PRESETS = {
    'openwebtext': ('Skylion007/openwebtext', 0.0005),
    'openwebtext_val': ('Skylion007/openwebtext', 1.0),     # its validation documents only: 4.4M tokens, all of it streamed
    'pile': ('apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2', 1.0),
    'pile_filtered': ('lucabaroni/apollo-pile-filtered-10k', 1.0),
    'pile10k': ('NeelNanda/pile-10k', 1.0),
    'stdlib': (None, 0.05),
    'packages': (None, 0.02),
}
OPENWEBTEXT = 8013769       # documents, which nanoGPT's split into train and val is drawn over
TEXT, ROWS = ('.txt', '.md', '.rst', '.py'), ('.jsonl', '.parquet')
PIECE = 1 << 20     # characters: what is read at once from a text file, and a thread's unit of work
WINDOW = {'gpt2': 1024, 'bytes': 128}       # GPT-2's context and the demo's

# -----------------------------------------------------------------------------

class Bytes:
    name, vocab_size, eot = 'bytes', 257, 256
    ranks = {bytes([b]): b for b in range(256)}     # {token: id}, as tiktoken's: single bytes, and no merges

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8', 'surrogatepass'), np.uint8).astype(np.uint16)

    def copy(self):
        return self

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode('utf-8', 'replace')


class GPT2BPE:
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self):
        import tiktoken
        import tiktoken.load

        def read_file(address):     # tiktoken's own, which sets no time-out; it checks the files' hashes and caches them
            answer = requests.get(address, timeout=(10, 60))
            answer.raise_for_status()
            return answer.content
        tiktoken.load.read_file = read_file
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as e:      # requests' many ways of failing
            raise BadInput(f"GPT-2's BPE files cannot be had ({type(e).__name__}): tiktoken downloads them once; offline, "
                           f"point TIKTOKEN_CACHE_DIR to a copy of its cache, or use --tokenizer=bytes")
        self.decode, self.ranks = self.bpe.decode, self.bpe._mergeable_ranks

    def copy(self):
        """The same tokenizer over tables of its own: threads that share one Encoding get in each other's way (twice the CPU time)."""
        import tiktoken
        other, bpe = copy.copy(self), self.bpe
        other.bpe = tiktoken.Encoding(bpe.name, pat_str=bpe._pat_str, mergeable_ranks=self.ranks, special_tokens=bpe._special_tokens)
        return other

    def encode(self, text):
        """encode_ordinary(text), without the list of Python integers."""
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:      # lone surrogates, which JSON can hold
            return np.array(self.bpe.encode_ordinary(text), np.uint16)
        except ValueError:      # a run of a million spaces is too much for tiktoken's regular expression
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])


def get_tokenizer(name):
    """'gpt2' or 'bytes' -> an object with name, vocab_size, eot, encode(text) -> uint16 array, decode(ids) -> str."""
    if name not in ('gpt2', 'bytes'):
        raise BadInput(f"tokenizer is {name!r}; expected gpt2 or bytes")
    return GPT2BPE() if name == 'gpt2' else Bytes()


def tokenizer_files(tokenizer, block_size):
    """{file name: text}: what transformers' AutoTokenizer reads beside a model, from the tokenizer's own table.

    GPT-2's files write a byte as a visible character, and a merge as the two tokens that it joins.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    char = {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(visible)))}
    text = lambda token: ''.join(char[b] for b in token)
    merges = []
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda t: t[1]):
        parts = [bytes([b]) for b in token]     # the merge that made it: apply all earlier ones, two parts are left
        while len(parts) > 2:
            _, i = min((tokenizer.ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges += [[text(p) for p in parts]] * (len(parts) == 2)
    eot, byte_level = '<|endoftext|>', {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    return {
        'tokenizer.json': json.dumps({
            'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None, 'post_processor': None,
            'added_tokens': [{'id': tokenizer.eot, 'content': eot, 'special': True, 'single_word': False, 'lstrip': False,
                              'rstrip': False, 'normalized': False}],
            'pre_tokenizer': byte_level, 'decoder': byte_level,
            'model': {'type': 'BPE', 'vocab': {text(t): i for t, i in tokenizer.ranks.items()} | {eot: tokenizer.eot}, 'merges': merges,
                      'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '',
                      'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False}}, ensure_ascii=False),
        # transformers would add token type 0's embedding, which is token 0's, if the tokenizer offered token types
        'tokenizer_config.json': json.dumps({
            'tokenizer_class': 'PreTrainedTokenizerFast', 'model_input_names': ['input_ids', 'attention_mask'],
            'bos_token': eot, 'eos_token': eot, 'unk_token': eot, 'clean_up_tokenization_spaces': False,
            'model_max_length': block_size}, indent=2)}

# -----------------------------------------------------------------------------
# Sources. Each yields (text or token ids, what follows): the document's next piece; its end, and so end-of-text; or
# nothing, after a window that somebody cut from a longer stream of tokens.
PIECE_FOLLOWS, ENDS, WINDOW_ENDS = range(3)

undecodable = 0     # bytes that are not UTF-8, replaced by U+FFFD


def _replace(error):
    global undecodable
    undecodable += error.end - error.start
    return '\ufffd' * (error.end - error.start), error.end


codecs.register_error('count', _replace)


def pieces(chunks):
    """A document's text in other pieces. A cut before a single space between two words never parts what the BPE would join."""
    rest = ''
    for more in chunks:
        rest += more
        cuts = [m.end() for m in re.finditer(r'\S(?= \S)', rest[-PIECE // 4:])][-1:] if len(rest) >= PIECE else []
        if cuts:
            cut = len(rest) - min(len(rest), PIECE // 4) + cuts[0]
            yield rest[:cut], PIECE_FOLLOWS
            rest = rest[cut:]
    yield rest, ENDS


def text_file(path):
    with open(path, encoding='utf-8', errors='count', newline='') as f:
        yield from pieces(iter(lambda: f.read(PIECE), ''))


def jsonl_file(path):
    with open(path, encoding='utf-8', errors='count') as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield row(json.loads(line), path)
                except (ValueError, RecursionError) as e:
                    raise BadInput(f"{path}, line {n}: {e if isinstance(e, BadInput) else f'not JSON: {e}'}")


def parquet_file(path):
    import pyarrow.parquet
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for r in batch.to_pylist():
                yield row(r, path)
    except (pyarrow.ArrowException, OSError) as e:
        raise BadInput(f"{path} is not a parquet file, or damaged: {e}")


def row(r, source):
    """A row's text, or its token ids as GPT-2 numbers them."""
    for column, kind in (('text', str), ('input_ids', list)):
        if isinstance(r, dict) and isinstance(r.get(column), kind):
            return r[column]
    raise BadInput(f"{source}: expected rows with a string `text` or a list `input_ids`, got "
                   f"{sorted(r) if isinstance(r, dict) else type(r).__name__}")


def windows_or_documents(rows):
    """Rows of token ids that are all of one length were cut from a longer stream: they are kept as they are.

    Looks ahead at 100 rows. Text, and ids of differing lengths, are documents.
    """
    rows = iter(rows)
    head = list(itertools.islice(rows, 100))
    lengths = [len(r) if isinstance(r, list) else 0 for r in head]
    if 2 < len(lengths) < 100:
        lengths = lengths[:-1] + [max(lengths[-1], lengths[0])]     # the very last may be shorter
    cut = len(head) > 1 and len(set(lengths)) == 1 and lengths[0] >= 128
    for r in itertools.chain(head, rows):
        if isinstance(r, str):
            yield from pieces(r[i:i + PIECE] for i in range(0, len(r), PIECE))
        else:
            yield r, WINDOW_ENDS if cut else ENDS


def nanogpt_val(documents=OPENWEBTEXT, fraction=PRESETS['openwebtext'][1]):
    """The numbers of the documents that nanoGPT's prepare.py sets aside: datasets' train_test_split with seed 2357."""
    return set(np.random.default_rng(2357).permutation(documents)[:math.ceil(documents * fraction)].tolist())


def hub_dataset(name, only=None):
    """A hub dataset's train split, streamed; `only`: the numbers of the rows that are wanted.

    The libraries below take up a connection that broke where it broke, for minutes; then it is an error.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi
    n = 0
    try:
        HfApi().dataset_info(name, timeout=20)      # a misspelt name is told at once, not after datasets' retries
        try:
            rows = load_dataset(name, split='train', streaming=True)
        except RuntimeError as e:
            if 'scripts are no longer supported' not in str(e):
                raise
            # the hub keeps a copy without the script, as parquet, on a branch of its own
            rows = load_dataset(name, split='train', streaming=True, revision='refs/convert/parquet')
        for n, r in enumerate(rows):
            if only is None or n in only:
                yield row(r, name)
    except BadInput:
        raise
    except Exception as e:      # offline, unknown, private, without a train split: each library has its own exceptions
        reason = f"({type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]})"
        if n:
            raise BadInput(f"lost {name} after {n:,} rows {reason}: nothing was written; type the same command again")
        other = '' if name in dict(PRESETS.values()) else f"is no file or folder here, no preset ({', '.join(PRESETS)}), and "
        raise BadInput(f"{name} {other}cannot be had from the Hugging Face hub {reason}")


def stdlib_files():
    root = sysconfig.get_paths()['stdlib']
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in ('site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'))
        yield from (os.path.join(folder, n) for n in sorted(names) if n.endswith('.py'))


def package_files():
    """Sources and documentation of the installed packages, less each file that repeats more than a quarter of earlier ones.

    What is compared are sets of three consecutive lines, blank ones left out, with all files before it, by name. (A file that a
    later and much longer one contains is kept, and so is the longer one.)
    """
    seen = set()
    for path in local_files(sysconfig.get_paths()['purelib'], TEXT):
        with open(path, encoding='utf-8', errors='replace') as f:
            lines = [line for line in map(str.strip, f) if line]
        triples = {hash(t) for t in zip(lines, lines[1:], lines[2:])} or {hash(tuple(lines))}
        if len(triples & seen) <= len(triples) / 4:
            seen |= triples
            yield path


def local_files(path, endings=TEXT + ROWS):
    if not os.path.isdir(path):
        if '.' in os.path.basename(path) and not path.endswith(TEXT + ROWS):
            raise BadInput(f"cannot tell what {path} holds: expected a file that ends in {', '.join(TEXT + ROWS)}")
        return [path]
    found = []
    for folder, dirs, names in os.walk(path):
        dirs[:] = [d for d in dirs if not d.startswith('.')]    # .git, .venv
        found += [os.path.join(folder, n) for n in names if n.endswith(endings)]
    if not found:
        raise BadInput(f"nothing to read in {path}: expected files that end in {', '.join(TEXT + ROWS)}")
    return sorted(found)


def documents(sources):
    """(text or token ids, what follows) of all sources in order."""
    for source in sources:
        if os.path.exists(source):
            files = local_files(source)
        elif source in ('stdlib', 'packages'):
            files = stdlib_files() if source == 'stdlib' else package_files()
        else:
            only = nanogpt_val() if source == 'openwebtext_val' else None
            yield from windows_or_documents(hub_dataset(PRESETS.get(source, (source,))[0], only))
            continue
        path = source
        try:
            for path in files:
                if path.endswith(ROWS):
                    yield from windows_or_documents((jsonl_file if path.endswith('.jsonl') else parquet_file)(path))
                else:
                    yield from text_file(path)
        except OSError as e:
            raise BadInput(f"cannot read {e.filename or path}: {e.strerror}")

# -----------------------------------------------------------------------------

def encoded(pieces, tokenizer):
    """(uint16 ids, what follows), in order, encoded by all cores.

    Threads are enough, each with its own tokenizer: tiktoken lets go of the interpreter while it encodes. What is under way is bounded.
    """
    own = threading.local()

    def ids(p):
        if isinstance(p, str):
            return own.tokenizer.encode(p)
        if not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in p):
            raise BadInput(f"a row's input_ids are not the {tokenizer.name} tokenizer's: expected integers below {tokenizer.vocab_size}")
        return np.array(p, np.uint16)

    def work(batch):
        return [(ids(p), follows) for p, follows in batch]

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores, initializer=lambda: setattr(own, 'tokenizer', tokenizer.copy())) as pool:
        futures, batch, size = deque(), [], 0
        for p, follows in pieces:
            batch.append((p, follows))
            size += len(p) + 100
            if size >= PIECE // 4:
                futures.append(pool.submit(work, batch))
                batch, size = [], 0
            if len(futures) > 2 * cores:
                yield from futures.popleft().result()
        for future in (*futures, pool.submit(work, batch)):
            yield from future.result()


def prepare(sources, name, tokenizer, max_tokens, val_fraction):
    from tqdm import tqdm
    global undecodable
    undecodable, t0 = 0, time.time()
    final, tmp = os.path.join('data', name), os.path.join('data', f'.{name}.partial')
    rng, empty, n = random.Random(2357), 0, 0
    streamed = sources == ['openwebtext'] and not os.path.exists('openwebtext')
    drawn = nanogpt_val() if streamed and val_fraction == PRESETS['openwebtext'][1] else None
    windows = [0, 0]    # the lengths of the first window and of the last; 0 if they do not all fit together
    counts = {split: {'documents': 0, 'tokens': 0} for split in ('train', 'val')}
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
        files = {split: open(os.path.join(tmp, f'{split}.bin'), 'w+b') for split in counts}
        with tqdm(unit=' tokens', unit_scale=True, total=max_tokens, disable=None) as bar:
            split, length = None, 0
            for ids, follows in encoded(documents(sources), tokenizer):
                if split is None:   # a document begins
                    val = n in drawn if drawn else rng.random() < val_fraction
                    split, length = 'val' if val else 'train', 0
                written = sum(c['tokens'] for c in counts.values())
                if follows == WINDOW_ENDS:
                    if max_tokens and written + len(ids) > max_tokens:
                        if n == 0:
                            raise BadInput(f"--max_tokens={max_tokens} is smaller than the first window, of {len(ids)} tokens")
                        break
                    windows = [len(ids)] * 2 if n == 0 else [windows[0] if windows[0] == windows[1] else 0, len(ids)]
                else:
                    windows = [0, 0]
                    if max_tokens and written + len(ids) + 1 >= max_tokens:
                        ids, follows, length = ids[:max_tokens - written - 1], ENDS, length + 1     # cut, not empty
                length += len(ids)
                if follows == ENDS:
                    empty += length == 0
                    ids = np.append(ids, np.uint16(tokenizer.eot))
                files[split].write(ids.tobytes())
                counts[split]['tokens'] += len(ids)
                bar.update(len(ids))
                if follows != PIECE_FOLLOWS:
                    counts[split]['documents'] += 1
                    split, n = None, n + 1
                if max_tokens and written + len(ids) >= max_tokens:
                    break
        windows = [windows[0] if windows[0] >= windows[1] else 0]
        total = counts['train']['tokens'] + counts['val']['tokens']
        if total == n:
            raise BadInput(f"nothing to read in {' '.join(sources)}: {'only empty documents' if total else 'no documents'}")
        if counts['val']['tokens'] == 0 and val_fraction > 0:
            # too few documents to draw from, such as a single book: its end is the validation split
            tail = max(int(total * val_fraction), min(WINDOW[tokenizer.name] + 1, total // 2))
            if windows[0]:      # whole windows
                tail = total - (total - tail) // windows[0] * windows[0]
            files['train'].seek(-2 * tail, os.SEEK_END)
            files['val'].write(files['train'].read())
            files['train'].truncate(2 * (counts['train']['tokens'] - tail))
            counts['train']['tokens'] -= tail
            counts['val']['tokens'] = tail
        for f in files.values():
            f.close()
        with open(os.path.join(tmp, 'meta.json'), 'w') as f:
            json.dump({'tokenizer': tokenizer.name, 'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot,
                       'source': [os.path.basename(s.rstrip('/')) if os.path.exists(s) else s for s in sources], **counts, **({'window': windows[0]} if windows[0] else {})}, f, indent=2)
        os.makedirs(final, exist_ok=True)
        for file in ('train.bin', 'val.bin', 'meta.json'):
            os.replace(os.path.join(tmp, file), os.path.join(final, file))
    except OSError as e:
        raise BadInput(f"cannot write {final}: {e}")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    for split, c in counts.items():
        print(f"{final}/{split}.bin: {c['tokens']:,} tokens, {c['documents']:,} {'windows' if windows[0] else 'documents'}")
    if empty:
        print(f"{empty:,} empty documents, kept as an end-of-text each")
    if undecodable:
        print(f"{undecodable:,} bytes were not UTF-8 and were replaced")
    if drawn and not max_tokens and n != OPENWEBTEXT:
        print(f"note: nanoGPT's validation documents are drawn from {OPENWEBTEXT:,}; this source had {n:,}, so val.bin is another one")
    seconds = time.time() - t0
    print(f"took {'the first ' * bool(max_tokens)}{n:,} {'windows' if windows[0] else 'documents'} of {' '.join(sources)}: {seconds:.1f} s, "
          f"{total / seconds:,.0f} tokens/s, tokenizer {tokenizer.name}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv or not argv:
        print(__doc__)
        return
    try:
        options = {'name': None, 'tokenizer': 'gpt2', 'max_tokens': None, 'val_fraction': None}
        kinds = {'name': str, 'tokenizer': str, 'max_tokens': int, 'val_fraction': float}
        sources = [a for a in argv if not a.startswith('--')]
        for arg in argv:
            if arg.startswith('--'):
                key, eq, value = arg[2:].partition('=')
                if key not in options or not eq:
                    raise BadInput(f"{arg}: expected one of {', '.join(f'--{k}=' for k in options)}")
                try:
                    options[key] = kinds[key](value)
                except ValueError:
                    raise BadInput(f"{arg}: {value!r} is not {'a whole number' if kinds[key] is int else 'a number'}")
        if not sources:
            raise BadInput("nothing to read: name a preset, a hub dataset, files or folders")
        for s in sources:
            if not os.path.exists(s) and (s.endswith((*TEXT, *ROWS, '/')) or not re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', s)):
                raise BadInput(f"no such file: {s}")
        tokenizer = get_tokenizer(options['tokenizer'])
        if options['max_tokens'] is not None and options['max_tokens'] <= WINDOW[tokenizer.name]:
            raise BadInput(f"--max_tokens={options['max_tokens']} is smaller than a window: expected more than {WINDOW[tokenizer.name]}")
        fraction = options['val_fraction']
        if fraction is None:
            fraction = PRESETS.get(sources[0], (None, 0.01))[1]
        if not 0 <= fraction <= 1:
            raise BadInput(f"--val_fraction={fraction}: expected a number from 0 to 1")
        name = options['name'] or os.path.splitext(os.path.basename(sources[0].rstrip('/')))[0]
        if not re.fullmatch(r'\w[\w.-]*', name):
            raise BadInput(f"the data would be called {name!r}: choose another name with --name=, of letters, digits, '.', '_' and '-'")
        prepare(sources, name, tokenizer, options['max_tokens'], fraction)
    except BadInput as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("prepare.py: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
