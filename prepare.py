"""
Text -> data/NAME/{train,val}.bin: uint16 token ids, end-of-text after each document; and meta.json.

    python prepare.py stdlib --tokenizer=bytes              the Python standard library
    python prepare.py openwebtext --max_tokens=600_000_000  streams just that much from the hub
    python prepare.py pile_filtered                         a preset (PRESETS, below)
    python prepare.py essays/ more.jsonl.gz --name=mine     local files and folders
    python prepare.py some-user/some-dataset --config=en    any dataset on the hub

    --name=          the folder under data/                 (default: from the first source)
    --tokenizer=     gpt2; bytes (0-255, and end-of-text 256); or a model's folder or hub id
    --max_tokens=    stop there, end-of-text counted        (default: everything)
    --val_fraction=  of the documents, drawn at random      (default: 0.01, presets: their own)
    --config=, --split=                                     (default: the hub's, and train)
    --column=        the column of text or of token ids     (default: text, else input_ids)
    --windows=True   rows of token ids are windows of a longer stream: add no end-of-text to them

A document is a text file, or a row of a .jsonl, .json, .csv, .tsv or .parquet file; each may be
compressed (.gz, .bz2, .xz). Text is UTF-8, or has a byte-order mark. A folder's files that are
neither text nor rows are skipped, and counted. Rows of token ids are GPT-2's by default; at an id
beyond 50256 the work starts again with an unknown tokenizer, which has no end-of-text to add.
"""
import argparse
import bz2
import contextlib
import copy
import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from model import UserError, check, command, companions, local_folder, one_line, write

# name: (hub dataset, val_fraction, rows are windows); val_fraction 1: for evaluation only
PRESETS = {
    'openwebtext': ('Skylion007/openwebtext', 0.0005, False),
    'openwebtext_val': ('Skylion007/openwebtext', 1.0, False),     # 4.4M tokens, all of it streamed
    'pile': ('apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2', 1.0, True),
    'pile_filtered': ('lucabaroni/apollo-pile-filtered-10k', 1.0, True),
    'pile10k': ('NeelNanda/pile-10k', 1.0, False),
    'stdlib': (None, 0.05, False),
}
LIMIT = 1 << 16             # token ids are stored as uint16

# -----------------------------------------------------------------------------
# Documents -> tokens -> bins.

def encoded(items, tokenizer):
    """(kind, document) -> (kind, document's token ids if it is a text, else itself, end-of-texts
    written in the text).

    In order, by all cores, in bounded memory. Threads are enough, as tiktoken lets go of the
    interpreter while it encodes; each has a tokenizer of its own.
    """
    own = threading.local()

    def work(batch):
        if not hasattr(own, 'tokenizer'):
            own.tokenizer = copy.copy(tokenizer)
        return [(kind, own.tokenizer.encode(d), d.count(tokenizer.eot_text))
                if isinstance(d, str) else (kind, d, 0) for kind, d in batch]

    cores, futures, batch, size = os.cpu_count() or 1, deque(), [], 0
    with ThreadPoolExecutor(cores) as pool:
        for kind, document in items:
            batch.append((kind, document))
            size += 100 + (len(document) if isinstance(document, (str, np.ndarray)) else 0)
            if size >= 1 << 18:
                futures.append(pool.submit(work, batch))
                batch, size = [], 0
            if len(futures) > 2 * cores:
                yield from futures.popleft().result()
        for future in (*futures, pool.submit(work, batch)):
            yield from future.result()

def write_bins(o, tokenizer, files, bar):
    """Writes the documents to files['train'] and files['val'] -> what was found in them."""
    found = SimpleNamespace(
        train=Counter(documents=0, tokens=0), val=Counter(documents=0, tokens=0), read=Counter(),
        skipped=Counter(), why='', notes=Counter(), largest=0, window=0)
    limit = tokenizer.vocab_size if o.tokenizer else LIMIT
    nanogpts = o.sources == ['openwebtext'] and o.val_fraction == PRESETS['openwebtext'][1]
    drawn = nanogpt_val() if nanogpts else None
    rng, total, n, most = random.Random(2357), 0, 0, o.max_tokens or 1 << 62
    as_they_are = o.windows or tokenizer.eot is None        # rows that get no end-of-text
    for kind, ids, written in encoded(documents(o, limit), tokenizer):
        if isinstance(ids, UserError):
            found.skipped[kind] += 1
            found.why = ids
            continue
        found.read[kind] += 1
        if ids is None:
            found.notes['rows without text (null)'] += 1
            continue
        found.largest = max(found.largest, int(ids.max(initial=0)))
        full = total + 1 >= most or as_they_are and total + len(ids) > most
        if full or found.largest >= tokenizer.vocab_size:
            break
        found.notes[f'times {tokenizer.eot_text} in a text, as text'] += written
        found.notes['empty documents'] += not len(ids)
        if o.windows:
            found.window = found.window or len(ids)
            check(1 < len(ids) <= found.window and total == n * found.window, f"row {n + 1} has "
                  f"{len(ids)} tokens; only the last window may be shorter: omit --windows")
        if not as_they_are:
            ids = np.append(ids[:most - total - 1], np.uint16(tokenizer.eot))
        split = 'val' if (n in drawn if drawn else rng.random() < o.val_fraction) else 'train'
        files[split].write(ids.tobytes())
        vars(found)[split].update(documents=1, tokens=len(ids))
        total, n = total + len(ids), n + 1
        bar.update(len(ids))
    return found

def tail_as_validation(o, found, train, val):
    """Too few documents to draw from, such as a single book: its end is the validation split."""
    total = found.train['tokens']
    tail = max(int(total * o.val_fraction), min(o.window + 1, total // 2))
    if o.windows:
        tail = total - (total - tail) // found.window * found.window
    found.train['tokens'], found.val['tokens'] = total - tail, tail
    np.fromfile(train, np.uint16, offset=2 * (total - tail)).tofile(val)
    os.truncate(train, 2 * (total - tail))

def prepare(o, tokenizer):
    """Writes the folder o.partial, and then gives its files their places."""
    started = time.time()
    shutil.rmtree(o.partial, ignore_errors=True)        # of a killed run
    os.makedirs(o.partial)
    paths = [os.path.join(o.partial, name) for name in ('train.bin', 'val.bin')]
    with open(paths[0], 'wb') as train, open(paths[1], 'wb') as val, \
            tqdm(unit=' tokens', unit_scale=True, total=o.max_tokens, disable=None) as bar:
        found = write_bins(o, tokenizer, {'train': train, 'val': val}, bar)
    if found.largest >= tokenizer.vocab_size:       # nobody named the tokenizer of these ids
        return prepare(o, Unknown())
    n = found.train['documents'] + found.val['documents']
    check(n > found.notes['empty documents'], f"nothing to read in {' '.join(o.sources)}: {n} "
          f"documents, all empty; {found.skipped.total()} files skipped {found.why}")
    if not found.val['tokens'] and o.val_fraction > 0:
        tail_as_validation(o, found, *paths)
    known = tokenizer.name != 'unknown'
    size = tokenizer.vocab_size if known else found.largest + 1
    names = [os.path.basename(s.rstrip('/')) if os.path.exists(s) else s for s in o.sources]
    meta = {'tokenizer': tokenizer.name, 'vocab_size': size, 'eot': tokenizer.eot,
            'vocab_hash': fingerprint(tokenizer.vocab(), size) if known else None,
            'source': names, 'source_id': o.source_id, 'train': found.train, 'val': found.val}
    meta |= {'window': found.window} if o.windows else {}
    write(os.path.join(o.partial, 'meta.json'), json.dumps(meta, indent=2).encode())
    for name, content in tokenizer.files.items():
        write(os.path.join(o.partial, 'tokenizer', name), content)
    # links are followed, also to another disk
    there = lambda name: os.path.realpath(os.path.join(o.folder, name))
    shutil.rmtree(there('tokenizer'), ignore_errors=True)
    for name in sorted(os.listdir(o.partial), reverse=True):        # meta.json last
        shutil.move(os.path.join(o.partial, name), there(name))
    report(o, tokenizer, found, time.time() - started)

def report(o, tokenizer, found, seconds):
    for what in ('train', 'val', 'read', 'skipped', 'notes'):
        counts = sorted((kind, k) for kind, k in vars(found)[what].items() if kind and k)
        if counts:
            print(f"{what}: {', '.join(f'{k:,} {kind}' for kind, k in counts)}")
    if found.why:
        print(f"skipped, for example: {found.why}")
    total = found.train['tokens'] + found.val['tokens']
    print(f"{o.folder}: {total:,} tokens of {tokenizer.name}, end-of-text {tokenizer.eot}, in "
          f"{seconds:.1f} s, {total / seconds:,.0f} tokens/s")

# -----------------------------------------------------------------------------
# Sources -> documents.

def documents(o, limit):
    """(kind, document) of each row: a text, an array of token ids below the limit, None for null;
    or the UserError for which a folder's file is skipped. kind, '.txt', is '' after the first."""
    for where, rows, named in streams(o):
        done, ending = 0, ''.join(endings(where)) or 'other'
        kind = ending if os.path.lexists(where) else 'dataset'
        try:
            check(named or os.path.isfile(where), "no file")    # a pipe would wait for ever
            for row in rows:
                yield '' if done else kind, cell(row, o.column, limit)
                done += 1
        except (MemoryError, ImportError):      # not the file's
            raise
        except Exception as e:      # damage has many names
            local = os.path.lexists(where)
            why = NOT_TEXT if isinstance(e, UnicodeError) and local else one_line(e, 9000)
            problem = UserError(f"{where}, row {done + 1}: {why}" if done else f"{where}: {why}")
            unread = isinstance(e, OSError) and e.filename      # by the system's will
            if done or named or unread or isinstance(e, OverflowError):
                raise problem
            yield kind, problem

def streams(o):
    """(file or dataset, its rows, whether the user named it) of all sources, in order."""
    for source in o.sources:
        if os.path.isdir(source):
            files = files_in(source, {os.path.realpath(source)})
            yield from ((path, rows(path), False) for path in files)
        elif os.path.exists(source):
            yield source, rows(source), True
        elif source == 'stdlib':    # two blank lines stand between its classes and functions
            for path in stdlib_files():
                yield path, (part for text in rows(path) for part in text.split('\n\n\n')), False
        else:
            name = PRESETS.get(source, (source,))[0]
            numbered = enumerate(hub_rows(name, o.config, o.split or 'train'))
            only = nanogpt_val() if source == 'openwebtext_val' else None
            yield name, (row for n, row in numbered if only is None or n in only), True

def nanogpt_val(documents=8013769, fraction=PRESETS['openwebtext'][1]):
    """OpenWebText's documents that nanoGPT sets aside: datasets' train_test_split, seed 2357."""
    order = np.random.default_rng(2357).permutation(documents)
    return set(order[:math.ceil(documents * fraction)].tolist())

def cell(row, column, limit):
    """What a row holds: a text, a uint16 array of token ids below the limit, or None for null."""
    if not isinstance(row, dict):
        row, column = {'text': row}, 'text'
    column = column or ('text' if 'text' in row else 'input_ids')
    if column not in row:       # (check would format its message for every row)
        raise ValueError(f"no column {column}: type --column=, one of {', '.join(map(str, row))}")
    if None in row:     # csv's name for it
        raise ValueError("more fields than in the first line: quote a text with commas")
    value = row[column]
    if value is None or isinstance(value, str) and column != 'input_ids':
        return value
    ids = value if isinstance(value, list) else [value]
    bad = [i for i in ids if type(i) is not int or not 0 <= i < LIMIT]
    if bad or value is not ids:
        wrong = (bad or ids)[0]
        raise ValueError(f"{column} has {wrong!r:.60}; expected text or ids below {LIMIT}")
    if max(ids, default=0) >= limit:        # a good file, but of another tokenizer
        raise OverflowError(f"token id {max(ids)}; the tokenizer ends at {limit - 1}")
    return np.array(ids, np.uint16)

# -----------------------------------------------------------------------------
# Files. A file's rows are texts or {column: value}; a file of text is one row.

FILES = ('.txt', '.text', '.md', '.jsonl', '.json', '.csv', '.tsv', '.parquet')
COMPRESSED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
NOT_TEXT = f"not UTF-8: try iconv -f ENCODING -t UTF-8, or bring {' '.join(FILES)}"
BOMS = {b'\xff\xfe\0\0': 'utf-32', b'\0\0\xfe\xff': 'utf-32',    # before UTF-16's,
        b'\xff\xfe': 'utf-16', b'\xfe\xff': 'utf-16'}                # which begin alike

def endings(path):
    """('.jsonl', '.gz'): what a file holds by its name, and how it is compressed."""
    stem, last = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, '')

def rows(path):
    ending, compression = endings(path)
    with COMPRESSED.get(compression, open)(path, 'rb') as f:
        if ending == '.parquet':
            from pyarrow.parquet import ParquetFile
            for batch in ParquetFile(f).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        elif ending in ('.json', '.jsonl', '.ndjson', '.jsonlines'):
            yield from json_rows(text_lines(f))
        elif ending in ('.csv', '.tsv'):
            csv.field_size_limit(2 ** 31 - 1)       # the default is 128 KiB
            tab = '\t' if ending == '.tsv' else ','
            yield from csv.DictReader(text_lines(f), delimiter=tab, strict=True)
        else:
            yield ''.join(text_lines(f))

def text_lines(f):
    """The lines of a binary file, decoded; raises UnicodeError if it does not hold text."""
    encoding = next((e for bom, e in BOMS.items() if f.peek(4).startswith(bom)), 'utf-8-sig')
    for line in io.TextIOWrapper(f, encoding, newline=''):
        if '\0' in line:
            raise UnicodeError
        yield line

def json_rows(lines):
    """JSON lines; or one value over several lines: a list of rows, or a row."""
    for n, line in enumerate(filter(str.strip, lines)):
        try:
            value = json.loads(line)
        except ValueError:
            if n:
                raise
            value = json.loads(line + ''.join(lines))
        yield from value if isinstance(value, list) else [value]

def files_in(folder, seen):
    """All files below a folder, links followed, each once; hidden ones are left out."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        if not name.startswith('.') and real not in seen:
            seen.add(real)
            yield from files_in(path, seen) if os.path.isdir(path) else [path]

def stdlib_files():
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}
    for folder, dirs, names in os.walk(os.path.dirname(os.__file__)):
        dirs[:] = sorted(set(dirs) - left_out)
        yield from (os.path.join(folder, n) for n in sorted(names) if n.endswith('.py'))

# -----------------------------------------------------------------------------
# The hub.

CONVERTED = 'refs/convert/parquet'      # the branch on which the hub keeps a copy of every dataset

def hub_rows(name, config, split):
    """A hub dataset's rows, streamed. The libraries take up a broken connection, for minutes."""
    from datasets import load_dataset
    from huggingface_hub import HfApi
    try:
        HfApi().dataset_info(name, timeout=20)      # an unknown name fails now, not after retries
        try:
            stream = load_dataset(name, config, split=split, streaming=True)
        except RuntimeError as e:
            if 'scripts are no longer supported' not in str(e):
                raise
            files = converted(HfApi(), name, config, split)
            stream = load_dataset(name, data_files=files, split='train', streaming=True,
                                  revision=CONVERTED)
    except Exception as e:      # offline, unknown, private: each library has its own
        raise UserError(f"no file, no preset ({', '.join(PRESETS)}) and no hub dataset, or needs "
                        f"another --config= or --split= ({one_line(e, 9000)})")
    yield from stream

def converted(hub, name, config, split):
    """The files CONFIG/SPLIT/*.parquet of the branch; load_dataset would mix configs."""
    paths = sorted(hub.list_repo_files(name, repo_type='dataset', revision=CONVERTED))
    folders = sorted({os.path.dirname(p) for p in paths if p.endswith('.parquet')})
    wanted = rf"{re.escape(config) if config else '[^/]+'}/(partial-)?{re.escape(split)}"
    fits = [folder for folder in folders if re.fullmatch(wanted, folder)]
    one = len(fits) == 1 and (config or len({os.path.dirname(f) for f in folders}) == 1)
    check(one, f"CONFIG/SPLIT is one of {', '.join(folders)}")
    if 'partial-' in fits[0]:
        print(f"note: the hub's copy of {name} is partial: only the beginning of {split}")
    return [p for p in paths if os.path.dirname(p) == fits[0]]

# -----------------------------------------------------------------------------
# Tokenizers. GPT-2's files write a byte as a visible character; so do our tables of tokens.

_visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
VISIBLE = {b: chr(b) for b in _visible}
VISIBLE |= {b: chr(256 + n) for n, b in enumerate(sorted({*range(256)} - {*_visible}))}

def fingerprint(vocab, n):
    """16 hex digits that stand for the first n tokens of {token: id}."""
    pairs = sorted((i, token) for token, i in vocab.items() if i < n)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]

class Bytes:
    name, vocab_size, eot, eot_text = 'bytes', 257, 256, '<|endoftext|>'
    files = {}      # {name: bytes} of a tokenizer that cannot be made from its name
    ranks = {bytes([b]): b for b in range(256)}     # {token: id}, in the form of tiktoken's

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8', 'surrogatepass'), np.uint8).astype(np.uint16)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode('utf-8', 'replace')

    def vocab(self):
        table = {''.join(VISIBLE[b] for b in token): i for token, i in self.ranks.items()}
        return table | {self.eot_text: self.eot}

class GPT2BPE(Bytes):
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self, parts=None):
        from tiktoken import Encoding
        from tiktoken_ext.openai_public import gpt2
        try:
            self.parts = parts or gpt2()
        except Exception as e:      # requests' many ways of failing
            raise UserError(f"cannot download GPT-2's BPE files ({type(e).__name__}): set "
                            f"TIKTOKEN_CACHE_DIR to a copy of its cache, or type --tokenizer=bytes")
        self.bpe, self.ranks = Encoding(**self.parts), self.parts['mergeable_ranks']
        self.decode = self.bpe.decode

    def __copy__(self):
        """With tables of its own: threads that share one Encoding take twice the CPU time."""
        return GPT2BPE(self.parts)

    def encode(self, text):
        try:    # encode_ordinary, without its list of Python integers
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:      # lone surrogates, which JSON can hold
            return np.array(self.bpe.encode_ordinary(text), np.uint16)
        except ValueError:      # a run of a million spaces is too much for its regular expression
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

class ModelTokenizer(Bytes):
    """The tokenizer.json that a model's folder brings, without the special tokens that it adds."""

    def __init__(self, name, files, table, eot):
        self.name = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
        self.files, self.table, self.eot = files, table, eot
        self.vocab_size = max(table.values()) + 1
        check(self.vocab_size <= LIMIT, f"{name} has {self.vocab_size} tokens, more than {LIMIT}")
        self.eot_text = {i: token for token, i in table.items()}.get(eot)
        check(self.eot_text, f"{name} has no token {eot}: mend the eos_token_id in its config.json")
        try:
            from tokenizers import Tokenizer
            self.bpe = Tokenizer.from_str(files['tokenizer.json'].decode('utf-8-sig'))
        except Exception as e:      # no such package, no such file; the package's are bare
            raise UserError(f"{name}: cannot read tokenizer.json ({one_line(e)}): {MAKE_ONE}")
        self.bpe.no_truncation()    # tokenizer.json may ask for it, for the sake of a batch
        self.bpe.no_padding()
        self.bpe.encode_special_tokens = True
        self.ordinary_eot = self.bpe.encode(self.eot_text, add_special_tokens=False).ids
        self.bpe.encode_special_tokens = False

    def encode(self, text):
        """End-of-text that is written in a text stays text; other added tokens are themselves."""
        text, ids = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'), []
        for n, part in enumerate(text.split(self.eot_text)):
            ids += self.ordinary_eot if n else []
            ids += self.bpe.encode(part, add_special_tokens=False).ids
        return np.array(ids, np.uint16)

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def vocab(self):
        return self.table

class Unknown(Bytes):
    """The tokenizer of rows of token ids that nobody has named."""
    name, vocab_size, eot = 'unknown', LIMIT, None

    def encode(self, text):
        raise UserError("text is mixed with token ids beyond GPT-2's: type --tokenizer=FOLDER")

# These need no other package. (GPT-2's number is written here to be recognised offline.)
KNOWN = {fingerprint(Bytes().vocab(), LIMIT): Bytes, '08f8f6dd8cd5c8a2': GPT2BPE}
MAKE_ONE = "transformers writes it by AutoTokenizer.from_pretrained and save_pretrained"

def get_tokenizer(name):
    """'gpt2', 'bytes' or a model's folder or hub id -> its tokenizer: name, vocab_size, eot and
    encode(text) -> uint16 array, decode(ids) -> text, vocab() -> {token: id}."""
    check(name not in (None, 'unknown', 'characters'), f"nobody knows the tokenizer ({name})")
    if name in ('gpt2', 'bytes'):
        return GPT2BPE() if name == 'gpt2' else Bytes()
    name = os.path.expanduser(name)
    files = companions(name)
    table = vocabulary(files)
    check(table, f"{name} brings no tokenizer.json or vocab.json: type --tokenizer=gpt2 or bytes")
    eot, known = end_of_text(name, files, table), KNOWN.get(fingerprint(table, LIMIT))
    return known() if known and known.eot == eot else ModelTokenizer(name, files, table, eot)

def vocabulary(files):
    """{token: id} of a model's tokenizer files {name: bytes}; None if they hold none."""
    try:
        if 'tokenizer.json' in files:
            whole = json.loads(files['tokenizer.json'])
            vocab, added = whole['model']['vocab'], whole.get('added_tokens') or []
            if isinstance(vocab, list):     # Unigram: [token, score], in the order of the ids
                vocab = {token: i for i, (token, _) in enumerate(vocab)}
            return vocab | {a['content']: a['id'] for a in added}
        vocab = json.loads(files.get('vocab.json', '{}'))
        table = vocab | json.loads(files.get('added_tokens.json', '{}'))
    except Exception as e:      # damage has many names
        raise UserError(f"the model's tokenizer files are damaged ({type(e).__name__}: {e})")
    others = [name for name in files if name.endswith(('.model', 'vocab.txt'))]
    check(vocab or not others, f"the model's {others} needs a tokenizer.json beside: {MAKE_ONE}")
    return table or None

def end_of_text(model, files, table):
    """A model's end-of-text: of a run, or eos_token_id as transformers reads it, a list's first;
    or, where its tokenizer lacks that, the eos_token of the tokenizer's own config."""
    run = os.path.join(model, 'ckpt.pt')
    if os.path.exists(run):
        return torch.load(run, 'cpu', weights_only=True, mmap=True)['model_args']['eot_token_id']
    config, eos = Path(local_folder(model), 'config.json'), None
    if config.exists():        # there are folders of a tokenizer alone
        eos = json.loads(config.read_bytes()).get('eos_token_id', 50256)
    eos = eos[0] if isinstance(eos, list) and eos else eos
    token = json.loads(files.get('tokenizer_config.json', '{}')).get('eos_token')
    token = token['content'] if isinstance(token, dict) else token
    return eos if eos in table.values() else table.get(token, eos)

def tokenizer_files(tokenizer, block_size):
    """{file name: text}: what transformers' AutoTokenizer reads, of GPT-2's BPE or bytes."""
    eot, ranks, merges = tokenizer.eot_text, tokenizer.ranks, []
    for token, rank in sorted(ranks.items(), key=lambda t: t[1]):
        parts = [bytes([b]) for b in token]     # apply all earlier merges: two parts are left
        while len(parts) > 2:
            pairs = enumerate(zip(parts, parts[1:]))
            _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges += [[''.join(VISIBLE[b] for b in p) for p in parts]] * (len(parts) == 2)
    plain = dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False)
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    return {
        'tokenizer.json': json.dumps({
            'version': '1.0', 'pre_tokenizer': byte_level, 'decoder': byte_level,
            'added_tokens': [{'id': tokenizer.eot, 'content': eot, 'special': True, **plain}],
            'model': {'type': 'BPE', 'vocab': tokenizer.vocab(), 'merges': merges}},
            ensure_ascii=False),
        # with token types, transformers would add token type 0's embedding, which is token 0's
        'tokenizer_config.json': json.dumps({
            'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': eot, 'eos_token': eot,
            'unk_token': eot, 'model_input_names': ['input_ids', 'attention_mask'],
            'clean_up_tokenization_spaces': False, 'model_max_length': block_size}, indent=2)}

# -----------------------------------------------------------------------------
# The command line.

def read_options(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda message: check(False, message)
    parser.add_argument('sources', nargs='+', type=os.path.expanduser)
    for key, kind in {'name': str, 'tokenizer': str, 'max_tokens': int, 'val_fraction': float,
                      'config': str, 'split': str, 'column': str}.items():
        parser.add_argument(f'--{key}', type=kind)
    parser.add_argument('--windows', choices=('True', 'False'))
    o = parser.parse_intermixed_args(argv)
    first, local = o.sources[0], [s for s in o.sources if os.path.exists(s)]
    for s in o.sources:
        hub = re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', s) and endings(s)[0] not in FILES
        check(s in local or hub, f"no such file: {s}")
    check(not local or not (o.config or o.split),
          f"--config and --split are for the hub's datasets, not for {' '.join(local)}")
    _, fraction, windows = PRESETS.get('' if first in local else first, (None, 0.01, False))
    o.val_fraction = fraction if o.val_fraction is None else o.val_fraction
    check(0 <= o.val_fraction <= 1, f"--val_fraction={o.val_fraction}: expected 0 to 1")
    o.windows = windows or o.windows == 'True'
    name = o.name or os.path.basename(os.path.abspath(first)).split('.')[0]
    check(re.fullmatch(r'\w[\w.-]*', name), f"--name={name}: expected letters, digits, . _ and -")
    o.folder = os.path.join('data', name)
    o.partial = os.path.realpath(os.path.join(o.folder, '.partial'))
    real = [os.path.realpath(s) if s in local else s for s in o.sources]
    which = json.dumps([real, o.config, o.split, o.column])
    o.source_id = hashlib.sha256(which.encode()).hexdigest()[:16]
    meta = Path(o.folder, 'meta.json')
    ours = meta.exists() and o.source_id in meta.read_text(errors='replace')
    there = os.listdir(o.folder) if os.path.isdir(o.folder) else []
    check(ours or there in ([], ['.partial']),      # a killed run leaves that
          f"{o.folder} holds data of another source: type another --name=")
    return o

@command
def main(argv):
    o = read_options(argv)
    tokenizer = get_tokenizer(o.tokenizer or 'gpt2')
    o.window = 128 if tokenizer.name == 'bytes' else 1024       # of a usual model
    check(o.max_tokens is None or o.max_tokens > o.window,
          f"--max_tokens={o.max_tokens} is no longer than a window: expected more than {o.window}")
    try:
        prepare(o, tokenizer)
    finally:        # all or nothing
        shutil.rmtree(o.partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(o.folder)

if __name__ == '__main__':
    main()
