"""
Text -> data/NAME/{train,val}.bin: uint16 token ids, end-of-text after each document. Beside them
stand meta.json, which names the tokenizer and the counts, and the tokenizer's files, tokenizer/.

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
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import UserError, check, command, companions, local_folder, one_line, write

# name: (hub dataset, val_fraction, rows are windows); val_fraction 1: for evaluation only
PRESETS = {
    'openwebtext': ('Skylion007/openwebtext', 0.0005, False),
    'openwebtext_val': ('Skylion007/openwebtext', 1.0, False),  # 4.4M tokens, all of it streamed
    'pile': ('apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2', 1.0, True),
    'pile_filtered': ('lucabaroni/apollo-pile-filtered-10k', 1.0, True),
    'pile10k': ('NeelNanda/pile-10k', 1.0, False),
    'stdlib': (None, 0.05, False),
}
LIMIT = 1 << 16             # token ids are stored as uint16

# -----------------------------------------------------------------------------
# Documents -> tokens -> bins.

def prepare(o, tokenizer):
    """Writes all files into the folder o.partial, then moves them to their places in o.folder."""
    started = time.time()
    shutil.rmtree(o.partial, ignore_errors=True)        # of a killed run
    os.makedirs(o.partial)
    train, val = (os.path.join(o.partial, name) for name in ('train.bin', 'val.bin'))
    with open(train, 'wb') as train_bin, open(val, 'wb') as val_bin, \
            tqdm(unit=' tokens', unit_scale=True, total=o.max_tokens, disable=None) as bar:
        found = write_bins(o, tokenizer, {'train': train_bin, 'val': val_bin}, bar)
    if not found:               # nobody named the tokenizer of these ids
        return prepare(o, Unknown())
    total = found['train']['tokens'] + found['val']['tokens']
    if o.val_fraction > 0 and not found['val']['tokens']:
        # too few documents to draw from, such as a single book: its end is the validation split
        cut = total - max(int(total * o.val_fraction), min(o.window + 1, total // 2))
        cut -= cut % (found['ids']['window'] or 1)
        found['train']['tokens'], found['val']['tokens'] = cut, total - cut
        np.fromfile(train, np.uint16, offset=2 * cut).tofile(val)
        os.truncate(train, 2 * cut)
    meta = {'tokenizer': tokenizer.name, 'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot,
            'vocab_hash': None, 'source': o.names, 'source_id': o.source_id,
            'train': found['train'], 'val': found['val']}
    if o.windows:
        meta['window'] = found['ids']['window']
    if tokenizer.eot is None:
        meta['vocab_size'] = found['ids']['largest'] + 1
    else:
        meta['vocab_hash'] = fingerprint(tokenizer.vocab(), tokenizer.vocab_size)
        files = tokenizer.files or tokenizer_files(tokenizer)
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            write(os.path.join(o.partial, 'tokenizer', name), content)
    write(os.path.join(o.partial, 'meta.json'), json.dumps(meta, indent=2).encode())
    # meta.json first: killed on the way, bins that are not as it says are refused, and made again
    for name in ('meta.json', 'train.bin', 'val.bin', 'tokenizer'):
        place = os.path.realpath(os.path.join(o.folder, name))      # links are followed
        if os.path.isdir(place):
            shutil.rmtree(place)
        if name in os.listdir(o.partial):       # an unknown tokenizer has no files
            shutil.move(os.path.join(o.partial, name), place)
    for group in ('train', 'val', 'read', 'skipped', 'notes'):
        counts = ', '.join(f'{k:,} {what}' for what, k in sorted(found[group].items()) if k)
        if counts:
            print(f"{group}: {counts}")
    seconds = time.time() - started
    print(f"{o.folder}: {total:,} tokens of {tokenizer.name}, end-of-text {tokenizer.eot}, in "
          f"{seconds:.1f} s, {total / seconds:,.0f} tokens/s")

def write_bins(o, tokenizer, bins, bar):
    """Writes the documents to the files bins['train'] and bins['val'].

    -> {group: Counter} of what was found; None at an id beyond a tokenizer that nobody named.
    """
    found = {'train': Counter(documents=0, tokens=0), 'val': Counter(documents=0, tokens=0),
             'read': Counter(), 'skipped': Counter(), 'notes': Counter(), 'ids': Counter()}
    nanogpts = o.sources == ['openwebtext'] and o.val_fraction == PRESETS['openwebtext'][1]
    drawn, rng = nanogpt_val() if nanogpts else None, random.Random(2357)
    end = np.array([] if o.windows or tokenizer.eot is None else [tokenizer.eot], np.uint16)
    n, total, window, largest = 0, 0, 0, 0
    for place, ids in encoded(documents(o, tokenizer, found), tokenizer):
        largest = max(largest, int(ids.max(initial=0)))
        if largest >= tokenizer.vocab_size:
            check(not o.tokenizer, f"{place}: token id {largest}; the tokenizer ends at "
                                   f"{tokenizer.vocab_size - 1}")
            return None
        room = (o.max_tokens or 1 << 62) - total - len(end)
        if room <= 0 or len(ids) > room and not len(end):
            break
        if o.windows:
            window = window or len(ids)
            check(1 < len(ids) <= window and total == n * window, f"{place} has {len(ids)} "
                  f"tokens; only the last window may be shorter: omit --windows")
        ids = np.append(ids[:room], end)
        split = 'val' if (n in drawn if drawn else rng.random() < o.val_fraction) else 'train'
        bins[split].write(ids.tobytes())
        found[split].update(documents=1, tokens=len(ids))
        total, n = total + len(ids), n + 1
        bar.update(len(ids))
    check(total > n * len(end), f"no text in {' '.join(o.sources)}: {n} documents, all empty, and "
          f"{found['skipped'].total()} files skipped: bring {' '.join(FILES)}")
    found['ids'].update(window=window, largest=largest)
    return found

def encoded(documents, tokenizer):
    """(place, document) -> (place, token ids), in order, by all cores, in bounded memory.

    Threads are enough, as tiktoken lets go of the interpreter while it encodes.
    """
    def portions():     # of some 250,000 characters
        portion, size = [], 0
        for place, document in documents:
            portion.append((place, document))
            size += 100 + len(document)
            if size > 1 << 18:
                yield portion
                portion, size = [], 0
        yield portion

    def encode(portion):
        return [(place, tokenizer.encode(document) if isinstance(document, str) else document)
                for place, document in portion]

    cores, waiting = os.cpu_count() or 1, portions()
    with ThreadPoolExecutor(cores) as pool:
        while some := list(itertools.islice(waiting, 2 * cores)):
            yield from itertools.chain.from_iterable(pool.map(encode, some))

# -----------------------------------------------------------------------------
# Sources -> documents.

def documents(o, tokenizer, found):
    """(place, document) of each row: a text or a uint16 array of token ids. Counts what it meets:
    found's 'read', 'skipped' (a folder's files of which the first row cannot be read), 'notes'."""
    written = f'times {tokenizer.eot_text} in a text, as text'
    for where, rows, named in streams(o):
        kind = ''.join(endings(where)) or 'other' if os.path.lexists(where) else 'dataset'
        place = where
        try:
            check(named or os.path.isfile(where), "no file")    # a pipe would wait for ever
            for row, value in enumerate(rows, 2):
                document = cell(value, o.column)
                found['read'][kind] += place == where
                if document is None:
                    found['notes']['rows without text (null)'] += 1
                else:
                    yield place, document
                if isinstance(document, str):
                    found['notes'][written] += document.count(tokenizer.eot_text)
                place = f"{where}, row {row}"       # of the next
        except Exception as e:      # damage has many names
            problem = f"{place}: {one_line(e, 9000)}"
            machine = isinstance(e, (MemoryError, ImportError)) or getattr(e, 'filename', None)
            check(not (named or machine or place != where), problem)
            if not found['skipped'][kind]:
                tqdm.write(f"skipped, for example: {problem}")
            found['skipped'][kind] += 1

def streams(o):
    """(file or dataset, its rows, whether the user named it) of all sources, in order."""
    for source in o.sources:
        if os.path.exists(source):
            real = os.path.realpath(source)
            files = files_in(source, {real}) if os.path.isdir(source) else [source]
            yield from ((path, file_rows(path), path == source) for path in files)
        elif source == 'stdlib':    # two blank lines stand between its classes and functions
            for path in stdlib_files():
                parts = (part for text in file_rows(path) for part in text.split('\n\n\n'))
                yield path, parts, False
        else:
            name = PRESETS.get(source, (source,))[0]
            rows = hub_rows(name, o.config, o.split or 'train')
            if source == 'openwebtext_val':
                drawn = nanogpt_val()
                rows = (row for n, row in enumerate(rows) if n in drawn)
            yield name, rows, True

def nanogpt_val(documents=8013769, fraction=PRESETS['openwebtext'][1]):
    """OpenWebText's documents that nanoGPT sets aside: datasets' train_test_split, seed 2357."""
    order = np.random.default_rng(2357).permutation(documents)
    return set(order[:int(np.ceil(documents * fraction))].tolist())

def cell(row, column):
    """What a row holds: a text, a uint16 array of token ids, or None for null."""
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
    bad = [value]
    if isinstance(value, list):
        bad = [i for i in value if type(i) is not int or not 0 <= i < LIMIT]
    if bad:
        raise ValueError(f"{column} has {bad[0]!r:.60}; expected text or ids below {LIMIT}")
    return np.array(value, np.uint16)

# -----------------------------------------------------------------------------
# Files. A file's rows are texts or {column: value}; a file of text is one row.

FILES = ('.txt', '.text', '.md', '.jsonl', '.json', '.csv', '.tsv', '.parquet')
NOT_TEXT = f"not UTF-8: try iconv -f ENCODING -t UTF-8, or bring {' '.join(FILES)}"
COMPRESSED = {'.gz': gzip, '.bz2': bz2, '.xz': lzma}

def endings(path):
    """('.jsonl', '.gz'): what a file holds by its name, and how it is compressed."""
    stem, last = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, '')

def file_rows(path):
    ending, compression = endings(path)
    with COMPRESSED.get(compression, io).open(path, 'rb') as f:
        if ending == '.parquet':
            from pyarrow.parquet import ParquetFile
            for batch in ParquetFile(f).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        elif ending in ('.json', '.jsonl', '.ndjson', '.jsonlines'):
            yield from json_rows(text_lines(f))
        elif ending in ('.csv', '.tsv'):
            csv.field_size_limit(2 ** 31 - 1)       # the default is 128 KiB
            dialect = 'excel' if ending == '.csv' else 'excel-tab'
            yield from csv.DictReader(text_lines(f), dialect=dialect, strict=True)
        else:
            yield ''.join(text_lines(f))

def text_lines(f):
    """The lines of a binary file, decoded. Raises UserError if it does not hold text."""
    encoding = json.detect_encoding(f.peek(4)[:4])
    if encoding not in ('utf-16', 'utf-32'):        # these have a byte-order mark
        encoding = 'utf-8-sig'
    try:
        for line in io.TextIOWrapper(f, encoding, newline=''):
            check('\0' not in line, NOT_TEXT)
            yield line
    except UnicodeError:
        raise UserError(NOT_TEXT)

def json_rows(lines):
    """JSON lines; or one value over several lines: a list of rows, or a row."""
    for line in filter(str.strip, lines):
        try:
            value = json.loads(line)
        except ValueError:      # it ends on a later line
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
    load = functools.partial(load_dataset, name, streaming=True)
    try:
        HfApi().dataset_info(name, timeout=20)      # an unknown name fails now, not after retries
        try:
            rows = load(config, split=split)
        except RuntimeError as e:
            if 'scripts are no longer supported' not in str(e):
                raise
            paths = HfApi().list_repo_files(name, repo_type='dataset', revision=CONVERTED)
            folder = converted(paths, config, split)
            rows = load(data_files=f'{folder}/*.parquet', split='train', revision=CONVERTED)
    except Exception as e:      # offline, unknown, private: each library has its own
        raise UserError(f"no file, no preset ({', '.join(PRESETS)}) and no hub dataset, or needs "
                        f"another --config= or --split= ({one_line(e, 9000)})")
    yield from rows

def converted(paths, config, split):
    """The branch's folder CONFIG/SPLIT; load_dataset would mix configurations."""
    folders = sorted({os.path.dirname(p) for p in paths if p.endswith('.parquet')})
    configs = {os.path.dirname(folder) for folder in folders}
    if len(configs) == 1:
        config = config or configs.pop()
    fits = [f for f in folders if f in (f'{config}/{split}', f'{config}/partial-{split}')]
    check(len(fits) == 1, f"CONFIG/SPLIT is one of {', '.join(folders)}")
    if 'partial-' in fits[0]:
        print(f"note: the hub's copy is partial: only the beginning of {config}/{split}")
    return fits[0]

# -----------------------------------------------------------------------------
# Tokenizers: name, vocab_size, eot and eot_text, the model's own files {name: bytes},
# encode(text) -> uint16 array, vocab() -> {token: id}.

def fingerprint(vocab, n):
    """16 hex digits that stand for the first n tokens of {token: id}."""
    pairs = sorted((i, token) for token, i in vocab.items() if i < n)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]

# GPT-2's files write a byte as itself if it is visible, the others as the characters from 256 on
_hidden = [*range(33), *range(127, 161), 173]
BYTES = {chr(256 + _hidden.index(b) if b in _hidden else b): b for b in range(256)}

class Bytes:
    name, vocab_size, eot, eot_text = 'bytes', 257, 256, '<|endoftext|>'
    table, merges, files = BYTES | {'<|endoftext|>': 256}, [], {}

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8', 'surrogatepass'), np.uint8).astype(np.uint16)

    def vocab(self):
        return self.table

class GPT2BPE(threading.local, Bytes):
    """Each thread makes its own: two that share one take 1.3 times the CPU time."""
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self):
        from tiktoken import Encoding
        parts, self.table, self.merges = gpt2_parts()
        self.bpe = Encoding(**parts)

    def encode(self, text):
        try:    # encode_ordinary, without its list of Python integers
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:      # lone surrogates, which JSON can hold
            return np.array(self.bpe.encode_ordinary(text), np.uint16)
        except ValueError:      # a run of a million spaces is too much for its regular expression
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

@functools.cache
def gpt2_parts():
    """tiktoken's parts of GPT-2's BPE, and {token: id} and the merges of which it makes them."""
    from tiktoken.load import read_file_cached
    from tiktoken_ext.openai_public import gpt2
    url = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
    try:
        parts, table = gpt2(), json.loads(read_file_cached(url + 'encoder.json'))
        return parts, table, read_file_cached(url + 'vocab.bpe').decode().split('\n')[1:-1]
    except Exception as e:      # requests' many ways of failing
        raise UserError(f"cannot download GPT-2's BPE files ({type(e).__name__}): set "
                        f"TIKTOKEN_CACHE_DIR to a copy of its cache, or type --tokenizer=bytes")

class ModelTokenizer(Bytes):
    """The tokenizer.json that a model's folder brings, without the special tokens that it adds."""

    def __init__(self, name, files, table, eot):
        self.name = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
        self.files, self.table, self.eot = files, table, eot
        self.vocab_size = max(table.values()) + 1
        check(self.vocab_size <= LIMIT, f"{name} has {self.vocab_size} tokens, more than {LIMIT}")
        self.eot_text = {i: token for token, i in table.items()}.get(eot)
        check(self.eot_text, f"{name} has no token {eot}: mend eos_token_id in its config.json")
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

class Unknown(Bytes):
    """The tokenizer of rows of token ids that nobody has named."""
    name, vocab_size, eot = 'unknown', LIMIT, None

    def encode(self, text):
        raise UserError("text is mixed with token ids beyond GPT-2's: type --tokenizer=FOLDER")

# These need no other package. (GPT-2's number is written here to be recognised offline.)
KNOWN = {fingerprint(Bytes.table, LIMIT): Bytes, '08f8f6dd8cd5c8a2': GPT2BPE}
MAKE_ONE = "transformers writes it by AutoTokenizer.from_pretrained and save_pretrained"

def get_tokenizer(name):
    """'gpt2', 'bytes' or a model's folder or hub id -> its tokenizer."""
    if name in ('gpt2', 'bytes'):
        return GPT2BPE() if name == 'gpt2' else Bytes()
    name = os.path.expanduser(name)
    files = companions(name)
    table = vocabulary(files)
    check(table, f"{name} brings no tokenizer.json or vocab.json: type --tokenizer=gpt2 or bytes")
    try:
        eot, known = end_of_text(name, files, table), KNOWN.get(fingerprint(table, LIMIT))
    except ValueError as e:
        raise UserError(f"{name}: config.json or tokenizer_config.json is damaged ({one_line(e)})")
    return known() if known and known.eot == eot else ModelTokenizer(name, files, table, eot)

def vocabulary(files):
    """{token: id} of a model's tokenizer files {name: bytes}; None if they hold none."""
    try:
        whole = json.loads(files.get('tokenizer.json', '{}'))
        vocab = whole['model']['vocab'] if whole else json.loads(files.get('vocab.json', '{}'))
        if isinstance(vocab, list):     # Unigram: [token, score], in the order of the ids
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        vocab |= {added['content']: added['id'] for added in whole.get('added_tokens') or []}
    except Exception as e:      # damage has many names
        raise UserError(f"the model's tokenizer files are damaged ({type(e).__name__}: {e})")
    others = [name for name in files if name.endswith(('.model', 'vocab.txt'))]
    check(vocab or not others, f"the model's {others} needs a tokenizer.json beside: {MAKE_ONE}")
    return vocab or None

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

def tokenizer_files(tokenizer):
    """{file name: text}: what transformers' AutoTokenizer reads, of GPT-2's BPE or bytes."""
    eot = tokenizer.eot_text
    plain = dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False)
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    model = {'type': 'BPE', 'vocab': tokenizer.table, 'merges': tokenizer.merges}
    whole = {
        'version': '1.0', 'pre_tokenizer': byte_level, 'decoder': byte_level, 'model': model,
        'added_tokens': [{'id': tokenizer.eot, 'content': eot, 'special': True, **plain}]}
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
        'bos_token': eot, 'eos_token': eot, 'unk_token': eot,
        # with token types, transformers would add token type 0's embedding, which is token 0's
        'model_input_names': ['input_ids', 'attention_mask']}
    return {'tokenizer.json': json.dumps(whole, ensure_ascii=False),
            'tokenizer_config.json': json.dumps(config, indent=2)}

# -----------------------------------------------------------------------------
# The command line.

def read_options(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = functools.partial(check, False)
    parser.add_argument('sources', nargs='+', type=os.path.expanduser)
    for key in ('name', 'tokenizer', 'config', 'split', 'column'):
        parser.add_argument(f'--{key}')
    parser.add_argument('--max_tokens', type=int)
    parser.add_argument('--val_fraction', type=float)
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
    o.names = [os.path.basename(s.rstrip('/')) if s in local else s for s in o.sources]
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
