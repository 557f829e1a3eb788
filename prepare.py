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
import codecs
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
import sysconfig
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np

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
FILES = ('.txt', '.text', '.md', '.jsonl', '.json', '.csv', '.tsv', '.parquet')
OPENWEBTEXT = 8013769       # documents, over which nanoGPT draws its validation split
LIMIT = 1 << 16             # token ids are stored as uint16

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

    def copy(self):
        """A tokenizer for one thread."""
        return self


class GPT2BPE(Bytes):
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as e:      # requests' many ways of failing
            raise UserError(f"cannot download GPT-2's BPE files ({type(e).__name__}): set "
                            f"TIKTOKEN_CACHE_DIR to a copy of its cache, or type --tokenizer=bytes")
        self.decode, self.ranks = self.bpe.decode, self.bpe._mergeable_ranks

    def copy(self):
        """With tables of its own: threads that share one Encoding take twice the CPU time."""
        other, gpt2 = copy.copy(self), self.bpe
        other.bpe = type(gpt2)('gpt2', pat_str=gpt2._pat_str, mergeable_ranks=self.ranks,
                               special_tokens=gpt2._special_tokens)
        return other

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

    def __init__(self, name, files):
        self.name = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
        self.files, self.table = files, vocabulary(files)
        self.eot = end_of_text(name, files, self.table)
        self.vocab_size = max(self.table.values()) + 1
        check(self.vocab_size <= LIMIT,
              f"{name} has {self.vocab_size} tokens; expected at most {LIMIT}")
        words = {i: token for token, i in self.table.items()}
        check(self.eot in words, f"the tokenizer of {name} has no token {self.eot}, its "
                                 f"end-of-text: put the right eos_token_id into its config.json")
        self.eot_text = words[self.eot]
        check('tokenizer.json' in files, f"{name} has no tokenizer.json: {MAKE_ONE}")
        try:
            from tokenizers import Tokenizer
            self.bpe = Tokenizer.from_str(files['tokenizer.json'].decode('utf-8-sig'))
        except ImportError:
            raise UserError(f"the tokenizer of {name} needs a package: pip install tokenizers")
        except Exception as e:      # the package raises bare Exceptions
            raise UserError(f"{name}: its tokenizer.json cannot be read ({one_line(e)})")
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


def vocabulary(files):
    """{token: id} of a model's tokenizer files {name: bytes}; None if they hold none."""
    try:
        if 'tokenizer.json' in files:
            whole = json.loads(files['tokenizer.json'])
            table, added = whole['model']['vocab'], whole.get('added_tokens') or []
            if isinstance(table, list):     # Unigram: [token, score], in the order of the ids
                table = {token: i for i, (token, _) in enumerate(table)}
            return table | {a['content']: a['id'] for a in added}
        tables = [json.loads(files.get(name, '{}')) for name in ('vocab.json', 'added_tokens.json')]
        others = [name for name in files if name.endswith(('.model', 'vocab.txt'))]
        check(tables[0] or not others, f"the model's tokenizer is {others}, and there is no "
                                       f"tokenizer.json: {MAKE_ONE}")
        return tables[0] | tables[1] or None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"the model's tokenizer files are damaged ({type(e).__name__}: {e})")


def end_of_text(model, files, table):
    """A model's end-of-text: of a run, or eos_token_id as transformers reads it, a list's first;
    or, where its tokenizer lacks that, the eos_token of the tokenizer's own config."""
    path = os.path.join(model, 'ckpt.pt')
    if os.path.exists(path):
        import torch
        return torch.load(path, 'cpu', weights_only=True, mmap=True)['model_args']['eot_token_id']
    path, eos = os.path.join(local_folder(model), 'config.json'), None
    if os.path.exists(path):        # there are folders of a tokenizer alone
        with open(path, 'rb') as f:
            eos = json.load(f).get('eos_token_id', 50256)
    eos = eos[0] if isinstance(eos, list) and eos else eos
    token = json.loads(files.get('tokenizer_config.json', '{}')).get('eos_token')
    token = token['content'] if isinstance(token, dict) else token
    return eos if eos in table.values() else table.get(token, eos)


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
    known = KNOWN.get(fingerprint(table, LIMIT))
    same = known and known.eot == end_of_text(name, files, table)
    return known() if same else ModelTokenizer(name, files)


def tokenizer_files(tokenizer, block_size):
    """{file name: text}: what transformers' AutoTokenizer reads, of GPT-2's BPE or bytes."""
    ranks, merges = tokenizer.ranks, []     # a merge is written as the two tokens that it joins
    for token, rank in sorted(ranks.items(), key=lambda t: t[1]):
        parts = [bytes([b]) for b in token]     # apply all earlier merges: two parts are left
        while len(parts) > 2:
            pairs = enumerate(zip(parts, parts[1:]))
            _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges += [[''.join(VISIBLE[b] for b in p) for p in parts]] * (len(parts) == 2)
    eot = tokenizer.eot_text
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    return {
        'tokenizer.json': json.dumps({
            'version': '1.0', 'pre_tokenizer': byte_level, 'decoder': byte_level,
            'added_tokens': [{'id': tokenizer.eot, 'content': eot, 'special': True, 'lstrip': False,
                              'rstrip': False, 'single_word': False, 'normalized': False}],
            'model': {'type': 'BPE', 'vocab': tokenizer.vocab(), 'merges': merges}},
            ensure_ascii=False),
        # with token types, transformers would add token type 0's embedding, which is token 0's
        'tokenizer_config.json': json.dumps({
            'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': eot, 'eos_token': eot,
            'unk_token': eot, 'model_input_names': ['input_ids', 'attention_mask'],
            'clean_up_tokenization_spaces': False, 'model_max_length': block_size}, indent=2)}

# -----------------------------------------------------------------------------
# Files. A file's rows are texts or {column: value}; a file of text is one row.

COMPRESSED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
BOMS = {codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',      # before UTF-16's,
        codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}      # which begin alike


def endings(path):
    """('.jsonl', '.gz'): what a file holds by its name, and how it is compressed."""
    stem, last = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, '')


def text_lines(f):
    """The lines of a binary file, decoded; raises UnicodeError if it does not hold text."""
    encoding = next((e for bom, e in BOMS.items() if f.peek(4).startswith(bom)), 'utf-8-sig')
    for line in io.TextIOWrapper(f, encoding, newline=''):
        if '\0' in line:
            raise UnicodeError
        yield line


def json_rows(lines):
    """JSON lines; or one value over several lines: a list of rows, or a row."""
    started = False
    for line in filter(str.strip, lines):
        try:
            value = json.loads(line)
        except ValueError:
            if started:
                raise
            value = json.loads(line + ''.join(lines))
        started = True
        yield from value if isinstance(value, list) else [value]


def rows(path):
    ending, compression = endings(path)
    with COMPRESSED.get(compression, open)(path, 'rb') as f:
        if ending == '.parquet':
            import pyarrow.parquet
            table = pyarrow.parquet.ParquetFile(io.BytesIO(f.read()) if compression else f)
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
        elif ending in ('.json', '.jsonl', '.ndjson', '.jsonlines'):
            yield from json_rows(text_lines(f))
        elif ending in ('.csv', '.tsv'):
            csv.field_size_limit(2 ** 31 - 1)       # the default is 128 KiB
            tab = '\t' if ending == '.tsv' else ','
            yield from csv.DictReader(text_lines(f), delimiter=tab, strict=True)
        else:
            yield ''.join(text_lines(f))


def cell(row, column, where):
    """What a row holds: a text, a uint16 array of token ids, or None for null."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):       # (check would format its message for every row)
        raise UserError(f"{where} is {row!r:.60}; expected text or {{\"text\": ...}}")
    column = column or ('text' if 'text' in row else 'input_ids')
    if column not in row:
        names = ', '.join(map(str, row))
        raise UserError(f"{where} has no column {column}: type --column=, one of {names}")
    check(None not in row, f"{where} has more fields than the first line: quote a text with commas")
    value = row[column]
    if value is None or isinstance(value, str) and column != 'input_ids':
        return value
    ids = value if isinstance(value, list) else [value]
    bad = [i for i in ids if type(i) is not int or not 0 <= i < LIMIT]
    if bad or value is not ids:
        raise UserError(f"{where}: {column} has {(bad or ids)[0]!r:.60}; expected text or ids "
                        f"below {LIMIT}")
    return np.array(ids, np.uint16)


def file_documents(path, column, found):
    """(path, row, text or ids or None) of each row; in a folder (found), (path, 0, UserError) for a
    file that holds no document, which is skipped."""
    done, broken = 0, (ValueError, RecursionError, EOFError, csv.Error, zlib.error, lzma.LZMAError)
    try:
        check(not found or os.path.isfile(path), f"{path} is no file")      # a pipe waits for ever
        for row in rows(path):
            yield path, done + 1, cell(row, column, f"{path}, row {done + 1}")
            done += 1
        return
    except (*broken, OSError) as e:
        if isinstance(e, OSError) and e.filename:       # the system's own words name the file
            raise
        problem = e
        if isinstance(e, UnicodeError):
            text = endings(path)[0] in ('', *FILES)
            problem = UserError(f"{path} is not UTF-8 text: " + (
                f"if its encoding is another, type iconv -f ENCODING -t UTF-8 {path}" if text else
                f"expected {' '.join(FILES)}, alone or with {' '.join(COMPRESSED)}; unpack it"))
        elif not isinstance(e, UserError):
            problem = UserError(f"{path}, row {done + 1} is damaged ({one_line(e)})")
    if done or not found:
        raise problem
    yield path, 0, problem


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
    for folder, dirs, names in os.walk(sysconfig.get_paths()['stdlib']):
        dirs[:] = sorted(set(dirs) - left_out)
        yield from (os.path.join(folder, n) for n in sorted(names) if n.endswith('.py'))

# -----------------------------------------------------------------------------
# The hub.

CONVERTED = 'refs/convert/parquet'      # the branch on which the hub keeps a copy of every dataset


def hub_rows(name, config, split):
    """A hub dataset's rows, streamed. The libraries take up a broken connection, for minutes."""
    from datasets import load_dataset
    from huggingface_hub import HfApi
    n, split = 0, split or 'train'
    try:
        HfApi().dataset_info(name, timeout=20)      # an unknown name fails now, not after retries
        try:
            stream = load_dataset(name, config, split=split, streaming=True)
        except RuntimeError as e:
            if 'scripts are no longer supported' not in str(e):
                raise
            files = converted(name, config, split, HfApi())
            stream = load_dataset(name, data_files=files, split='train', streaming=True,
                                  revision=CONVERTED)
        for n, row in enumerate(stream, 1):
            yield row
    except UserError:
        raise
    except Exception as e:      # offline, unknown, private: each library has its own exceptions
        why = one_line(e, 30000)    # it lists the choices
        check(not n, f"lost {name} after {n:,} rows ({why}): type the same command again")
        raise UserError(f"{name} is no file, no preset ({', '.join(PRESETS)}) and no hub dataset, "
                        f"or needs another --config= or --split= ({why})")


def converted(name, config, split, api):
    """The files CONFIG/SPLIT/*.parquet of the branch; load_dataset would mix configs."""
    parts = {}
    for path in sorted(api.list_repo_files(name, repo_type='dataset', revision=CONVERTED)):
        if path.endswith('.parquet') and path.count('/') == 2:
            its_config, its_split, _ = path.split('/')
            parts.setdefault(its_config, {}).setdefault(its_split, []).append(path)
    config = config or (list(parts)[0] if len(parts) == 1 else None)
    check(config in parts, f"{name} needs --config=, one of {', '.join(parts)}; got {config}")
    if f'partial-{split}' in parts[config]:     # of a large split
        print(f"note: the hub's copy of {name} is partial: it holds the beginning of {split} only")
        split = f'partial-{split}'
    check(split in parts[config], f"{name} needs --split=, one of "
          f"{', '.join(s.removeprefix('partial-') for s in parts[config])}; got {split}")
    return parts[config][split]


def nanogpt_val(documents=OPENWEBTEXT, fraction=PRESETS['openwebtext'][1]):
    """The documents that nanoGPT sets aside: datasets' train_test_split with seed 2357."""
    order = np.random.default_rng(2357).permutation(documents)
    return set(order[:math.ceil(documents * fraction)].tolist())


def documents(sources, config, split, column):
    """(file or dataset, row, text or ids or None or UserError) of all sources, in order."""
    for source in sources:
        if os.path.isdir(source):
            for path in files_in(source, {os.path.realpath(source)}):
                yield from file_documents(path, column, True)
        elif os.path.exists(source):
            yield from file_documents(source, column, False)
        elif source == 'stdlib':
            for path in stdlib_files():
                for where, n, text in file_documents(path, column, True):
                    # two blank lines stand between classes and functions: these are documents
                    for part in text.split('\n\n\n') if isinstance(text, str) else [text]:
                        yield where, n, part
        else:
            only = nanogpt_val() if source == 'openwebtext_val' else None
            name = PRESETS.get(source, (source,))[0]
            for n, row in enumerate(hub_rows(name, config, split), 1):
                if only is None or n - 1 in only:
                    yield name, n, cell(row, column, f"{name}, row {n}")

# -----------------------------------------------------------------------------
# Writing.

def encoded(items, tokenizer):
    """(where, row, ids or None or UserError, end-of-texts written in the text; None if it was ids).

    In order, by all cores, in bounded memory. Threads are enough, as tiktoken lets go of the
    interpreter while it encodes; each has a tokenizer of its own.
    """
    own = threading.local()

    def work(batch):
        if not hasattr(own, 'tokenizer'):
            own.tokenizer = tokenizer.copy()
        return [(where, n, own.tokenizer.encode(v), v.count(tokenizer.eot_text))
                if isinstance(v, str) else (where, n, v, None) for where, n, v in batch]

    cores, futures, batch, size = os.cpu_count() or 1, deque(), [], 0
    with ThreadPoolExecutor(cores) as pool:
        for item in items:
            batch.append(item)
            size += 100 + (len(item[2]) if isinstance(item[2], (str, np.ndarray)) else 0)
            if size >= 1 << 18:
                futures.append(pool.submit(work, batch))
                batch, size = [], 0
            if len(futures) > 2 * cores:
                yield from futures.popleft().result()
        for future in (*futures, pool.submit(work, batch)):
            yield from future.result()


@contextlib.contextmanager
def complete_or_nothing(folder, names):
    """Open files PATH.partial, which get their names at the end, or vanish if the block fails."""
    # links are followed first: a rename cannot move a file to another disk
    paths = [os.path.realpath(os.path.join(folder, name)) for name in names]
    made = not os.path.isdir(folder)
    os.makedirs(os.path.realpath(folder), exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(open(path + '.partial', 'w+b')) for path in paths]
        for path in paths:
            os.replace(path + '.partial', path)
    except BaseException:
        for path in paths:
            with contextlib.suppress(OSError):
                os.remove(path + '.partial')
        if made and not os.listdir(folder):
            os.rmdir(folder)
        raise


class NotItsTokens(Exception):
    """Rows of token ids beyond GPT-2's, and nobody named their tokenizer."""


def write_bins(items, o, tokenizer, files, bar):
    """Writes the documents to files['train'] and files['val'] -> what was found in them."""
    found = SimpleNamespace(documents=Counter(train=0, val=0), tokens=Counter(train=0, val=0),
                            kinds=Counter(), places=set(), skipped=Counter(), why='',
                            notes=Counter(), largest=0, window=0)
    drawn = nanogpt_val() if o.as_nanogpt else None
    rng, n, total, last, most = random.Random(2357), 0, 0, 0, o.max_tokens or math.inf
    as_they_are = o.windows or tokenizer.eot is None        # rows that get no end-of-text
    for where, row, ids, written in items:
        if where not in found.places:
            found.places.add(where)
            kind = ''.join(endings(where)) or 'other' if os.path.exists(where) else 'dataset'
            (found.skipped if isinstance(ids, UserError) else found.kinds)[kind] += 1
        if isinstance(ids, UserError):
            found.why = ids
            continue
        if ids is None:
            found.notes['rows without text (null), left out'] += 1
            continue
        if written is None:     # the row came as token ids
            found.largest = max(found.largest, int(ids.max(initial=0)))
            if found.largest >= tokenizer.vocab_size and o.tokenizer is None:
                raise NotItsTokens
            check(found.largest < tokenizer.vocab_size, f"{where}, row {row} holds token id "
                  f"{found.largest}; {tokenizer.name} ends at {tokenizer.vocab_size - 1}")
        if total + 1 >= most or as_they_are and total + len(ids) > most:
            break
        found.notes[f'times {tokenizer.eot_text} was written in a text, as text'] += written or 0
        found.notes['empty documents, kept as an end-of-text each'] += not len(ids)
        if o.windows:
            found.window = found.window or len(ids)
            check(1 < len(ids) <= found.window and last in (0, found.window), f"{where}, row {row} "
                  f"has {len(ids)} tokens; only the last window may be shorter: omit --windows")
            last = len(ids)
        if not as_they_are:
            ids = np.append(ids[:int(min(len(ids), most - total - 1))], np.uint16(tokenizer.eot))
        split = 'val' if (n in drawn if drawn else rng.random() < o.val_fraction) else 'train'
        files[split].write(ids.tobytes())
        found.tokens[split] += len(ids)
        found.documents[split] += 1
        total, n = total + len(ids), n + 1
        bar.update(len(ids))
    return found


def tail_as_validation(found, o, tokenizer, train, val):
    """Too few documents to draw from, such as a single book: its end is the validation split."""
    total = found.tokens['train']
    one_window = 1025 if tokenizer.vocab_size > 257 else 129
    tail = max(int(total * o.val_fraction), min(one_window, total // 2))
    if o.windows:
        tail = total - (total - tail) // found.window * found.window
    train.seek(-2 * tail, os.SEEK_END)
    val.write(train.read())
    train.truncate(2 * (total - tail))
    found.tokens = {'train': total - tail, 'val': tail}


def metadata(found, o, tokenizer):
    known = tokenizer.name != 'unknown'
    size = tokenizer.vocab_size if known else found.largest + 1
    names = [os.path.basename(s.rstrip('/')) if os.path.exists(s) else s for s in o.sources]
    return {'tokenizer': tokenizer.name, 'vocab_size': size, 'eot': tokenizer.eot,
            'vocab_hash': fingerprint(tokenizer.vocab(), size) if known else None,
            'source': names, 'source_id': o.source_id,
            **{split: {'documents': found.documents[split], 'tokens': k}
               for split, k in found.tokens.items()},
            **({'window': found.window} if o.windows else {})}


def report(found, o, tokenizer, seconds):
    noun = 'windows' if o.windows else 'documents'
    n, total = (sum(c.values()) for c in (found.documents, found.tokens))
    listed = lambda counts: ', '.join(f"{k:,} {what}" for what, k in sorted(counts.items()))
    for split, k in found.tokens.items():
        print(f"{o.folder}/{split}.bin: {k:,} tokens, {found.documents[split]:,} {noun}")
    print(f"read: {listed(found.kinds)}")
    if found.skipped:
        print(f"skipped: {listed(found.skipped)}, for example: {found.why}")
    for what, k in found.notes.items():
        if k:
            print(f"{k:,} {what}")
    if tokenizer.name == 'unknown':
        print("note: ids of an unknown tokenizer got no end-of-text: --tokenizer=FOLDER names it")
    print(f"{n:,} {noun} in {seconds:.1f} s, {total / seconds:,.0f} tokens/s, {tokenizer.name}")


def prepare(o, tokenizer):
    """Writes data/NAME and says what was read; raises NotItsTokens where they are not GPT-2's."""
    from tqdm import tqdm
    started = time.time()
    items = encoded(documents(o.sources, o.config, o.split, o.column), tokenizer)
    names = ('train.bin', 'val.bin', 'meta.json')
    with complete_or_nothing(o.folder, names) as (train, val, meta), \
            tqdm(unit=' tokens', unit_scale=True, total=o.max_tokens, disable=None) as bar:
        found = write_bins(items, o, tokenizer, {'train': train, 'val': val}, bar)
        total, n = sum(found.tokens.values()), sum(found.documents.values())
        empty = 0 if o.windows or tokenizer.eot is None else n
        check(total > empty, f"nothing to read in {' '.join(o.sources)}: {n} documents, all empty; "
                             f"{sum(found.skipped.values())} files skipped {found.why}")
        if not found.tokens['val'] and o.val_fraction > 0:
            tail_as_validation(found, o, tokenizer, train, val)
        meta.write(json.dumps(metadata(found, o, tokenizer), indent=2).encode())
    shutil.rmtree(os.path.join(o.folder, 'tokenizer'), ignore_errors=True)
    for name, content in tokenizer.files.items():
        write(os.path.join(o.folder, 'tokenizer', name), content)
    report(found, o, tokenizer, time.time() - started)

# -----------------------------------------------------------------------------

def read_options(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for key in ('name', 'tokenizer', 'config', 'split', 'column'):
        parser.add_argument(f'--{key}')
    parser.add_argument('--max_tokens', type=int)
    parser.add_argument('--val_fraction', type=float)
    parser.add_argument('--windows', choices=('True', 'False'))
    parser.add_argument('sources', nargs='*', type=os.path.expanduser)
    parser.error = partial(check, False)
    o = parser.parse_intermixed_args(argv)
    check(o.sources, "nothing to read: name a preset, a hub dataset, files or folders (see --help)")
    for s in o.sources:
        hub = re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', s) and endings(s)[0] not in FILES
        check(os.path.exists(s) or hub, f"no such file: {s}")
    local = [s for s in o.sources if os.path.exists(s)]
    check(not local or not (o.config or o.split), f"--config and --split are for the hub's "
          f"datasets: name the files of {' '.join(local)} that you want")
    given = o.val_fraction
    preset = PRESETS.get('' if os.path.exists(o.sources[0]) else o.sources[0], (None, 0.01, False))
    o.val_fraction = preset[1] if given is None else given
    check(0 <= o.val_fraction <= 1, f"--val_fraction={given}: expected a number from 0 to 1")
    o.as_nanogpt = o.sources == ['openwebtext'] and preset[0] and o.val_fraction == preset[1]
    o.windows = preset[2] or o.windows == 'True'
    name = o.name or os.path.basename(os.path.abspath(o.sources[0])).split('.')[0]
    check(re.fullmatch(r'\w[\w.-]*', name), f"data/{name} is no name: type --name=, of letters, "
                                            f"digits, '.', '_' and '-'")
    o.folder = os.path.join('data', name)
    return o


def check_source(o):
    """Sets o.source_id, which stands for what is read. Other data under the same name is kept."""
    real = [os.path.realpath(s) if os.path.exists(s) else s for s in o.sources]
    which = json.dumps([real, o.config, o.split, o.column])
    o.source_id, old = hashlib.sha256(which.encode()).hexdigest()[:16], None
    if os.path.isdir(o.folder) and os.listdir(o.folder):
        with contextlib.suppress(OSError, ValueError, AttributeError), \
                open(os.path.join(o.folder, 'meta.json'), 'rb') as f:
            old = json.load(f).get('source_id')
        check(old == o.source_id, f"{o.folder} holds data of another source: type another --name=")


@command
def main(argv):
    o = read_options(argv)
    check_source(o)
    tokenizer = get_tokenizer(o.tokenizer or 'gpt2')
    least = 128 if tokenizer.name == 'bytes' else 1024
    check(o.max_tokens is None or o.max_tokens > least,
          f"--max_tokens={o.max_tokens} is no longer than a window: expected more than {least}")
    try:
        prepare(o, tokenizer)
    except NotItsTokens:
        prepare(o, Unknown())


if __name__ == '__main__':
    main()
