"""
Text -> data/NAME/{train,val}.bin: uint16 token ids, each document followed by end-of-text. The file
meta.json beside them names the tokenizer and the counts.

    python prepare.py stdlib --tokenizer=bytes              the Python standard library: always there
    python prepare.py openwebtext --max_tokens=600_000_000  streams just that much from the hub
    python prepare.py pile_filtered                         a preset (PRESETS, below)
    python prepare.py essays/ more.jsonl.gz --name=mine     local files and folders
    python prepare.py some-user/some-dataset --config=en    any dataset on the hub

    --name=          the folder under data/                       (default: from the first source)
    --tokenizer=     gpt2; bytes (0-255, and end-of-text 256); or a model's folder or hub id, for the
                     tokenizer that the model brings              (default: gpt2)
    --max_tokens=    stop there, end-of-text counted              (default: everything)
    --val_fraction=  of the documents, drawn at random            (default: 0.01, presets: their own)
    --config=, --split=                                           (default: the hub's, and train)
    --column=        the column of text or of token ids           (default: text, else input_ids)
    --windows=True   rows of token ids are windows of a longer stream: add no end-of-text to them

A document is a text file, or a row of a .jsonl, .json, .csv, .tsv or .parquet file. Each of these may
be compressed (.gz, .bz2, .xz). Any other file is text if it is UTF-8, or has a byte-order mark, and
holds no NUL character. A folder's files that are neither text nor rows are skipped, and counted.

Rows of token ids are GPT-2's unless --tokenizer says otherwise. If they turn out not to be (an id
beyond 50256), the work starts again with an unknown tokenizer, which has no end-of-text to add.

One pass, all cores, memory for a few documents (a .json list is read whole). Nothing stands under its
final name before it is complete.
"""
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
import sysconfig
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from model import UserError, check, command, companions

# name: (hub dataset, val_fraction, rows are windows); val_fraction 1: for evaluation only
PRESETS = {
    'openwebtext': ('Skylion007/openwebtext', 0.0005, False),
    'openwebtext_val': ('Skylion007/openwebtext', 1.0, False),     # 4.4M tokens, all of it streamed
    'pile': ('apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2', 1.0, True),
    'pile_filtered': ('lucabaroni/apollo-pile-filtered-10k', 1.0, True),
    'pile10k': ('NeelNanda/pile-10k', 1.0, False),
    'stdlib': (None, 0.05, False),
}
FILES = ('.txt', '.text', '.md', '.jsonl', '.json', '.csv', '.tsv', '.parquet', '.gz', '.bz2', '.xz')
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
    ranks = {bytes([b]): b for b in range(256)}     # {token: id}, in the form of tiktoken's

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8', 'surrogatepass'), np.uint8).astype(np.uint16)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode('utf-8', 'replace')

    def vocab(self):
        table = {''.join(VISIBLE[b] for b in token): i for token, i in self.ranks.items()}
        return table | {self.eot_text: self.eot}

    def copy(self):
        return self


class GPT2BPE(Bytes):
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as e:      # requests' many ways of failing
            raise UserError(f"cannot download GPT-2's BPE files ({type(e).__name__}): tiktoken does it "
                            f"once; offline, set TIKTOKEN_CACHE_DIR to a copy of its cache, or type "
                            f"--tokenizer=bytes")
        self.decode, self.ranks = self.bpe.decode, self.bpe._mergeable_ranks

    def copy(self):
        """With tables of its own: threads that share one Encoding take twice the CPU time."""
        import tiktoken
        other = copy.copy(self)
        other.bpe = tiktoken.Encoding('gpt2', pat_str=self.bpe._pat_str, mergeable_ranks=self.ranks,
                                      special_tokens=self.bpe._special_tokens)
        return other

    def encode(self, text):
        """encode_ordinary(text), without the list of Python integers."""
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:      # lone surrogates, which JSON can hold
            return np.array(self.bpe.encode_ordinary(text), np.uint16)
        except ValueError:      # a run of a million spaces is too much for its regular expression
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])


# A model's folder whose tokenizer is one of these needs no other package. (GPT-2's number is written
# here so that it can be recognised offline; the tests compute it.)
KNOWN = {fingerprint(Bytes().vocab(), LIMIT): Bytes, '08f8f6dd8cd5c8a2': GPT2BPE}


class ModelTokenizer:
    """The tokenizer that a model's folder brings, as transformers uses it without special tokens."""

    def __init__(self, name, files):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"the tokenizer of {name} needs a package: type `pip install tokenizers`")
        self.name = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
        self.table, self.eot = vocabulary(files), end_of_text(name)
        self.vocab_size = max(self.table.values()) + 1
        check(self.vocab_size <= LIMIT, f"{name}: its tokenizer has ids up to {self.vocab_size - 1}; "
              f"bins are uint16, which ends at {LIMIT - 1}: choose a model with a smaller vocabulary")
        words = {i: token for token, i in self.table.items()}
        check(self.eot in words, f"{name}: the config's eos_token_id is {self.eot}, which its tokenizer "
              f"({self.vocab_size} tokens) lacks: write the id of end-of-text into config.json")
        self.eot_text = words[self.eot]
        try:
            if 'tokenizer.json' in files:
                self.bpe = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode('utf-8-sig'))
            else:
                merges = [tuple(line.split()) for line in files['merges.txt'].decode().splitlines()
                          if line.strip() and not line.startswith('#version')]
                self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE(read_json(files, 'vocab.json'), merges))
                self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
                self.bpe.decoder = tokenizers.decoders.ByteLevel()
                added = read_json(files, 'added_tokens.json')
                self.bpe.add_tokens([tokenizers.AddedToken(t, normalized=False)
                                     for t in sorted(added, key=added.get)])
        except Exception as e:      # the package raises bare Exceptions; merges.txt may be missing
            raise UserError(f"{name}: its tokenizer cannot be read ({type(e).__name__}: {e})")
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

    def copy(self):
        return self


def read_json(files, name):
    return json.loads(files.get(name, b'{}'))       # of bytes, so that a byte-order mark is no matter


def vocabulary(files):
    """{token: id} of a model's tokenizer files {name: bytes}; None if they hold none."""
    try:
        if 'tokenizer.json' in files:
            whole = read_json(files, 'tokenizer.json')
            table, added = whole['model']['vocab'], whole.get('added_tokens') or []
            if isinstance(table, list):     # Unigram: [token, score], in the order of the ids
                table = {token: i for i, (token, _) in enumerate(table)}
            return table | {a['content']: a['id'] for a in added}
        table = read_json(files, 'vocab.json') | read_json(files, 'added_tokens.json')
        return table or None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"the model's tokenizer files are damaged ({type(e).__name__}: {e}): "
                        f"download them again, or type --tokenizer=gpt2 or bytes")


def end_of_text(model):
    """A model's eos_token_id as transformers reads it: 50256 if config.json has none, a list's first."""
    if os.path.exists(os.path.join(model, 'ckpt.pt')):      # a run of train.py
        import torch
        ckpt = torch.load(os.path.join(model, 'ckpt.pt'), 'cpu', weights_only=True, mmap=True)
        return ckpt['model_args']['eot_token_id']
    path = os.path.join(model, 'config.json')
    if not os.path.isdir(model):
        from huggingface_hub import hf_hub_download
        path = hf_hub_download(model, 'config.json')
    with open(path, 'rb') as f:
        eos = read_json({path: f.read()}, path).get('eos_token_id', 50256)
    return eos[0] if isinstance(eos, list) and eos else eos


def get_tokenizer(name):
    """'gpt2', 'bytes' or a model's folder or hub id -> its tokenizer: name, vocab_size, eot and
    encode(text) -> uint16 array, decode(ids) -> text, vocab() -> {token: id}."""
    if name in ('gpt2', 'bytes'):
        return GPT2BPE() if name == 'gpt2' else Bytes()
    name = os.path.expanduser(name)
    files = companions(name)
    table = vocabulary(files)
    if table is None:
        raise UserError(f"{name} brings no tokenizer.json or vocab.json: type --tokenizer=gpt2 or bytes, "
                        f"or name a folder that has them")
    known = KNOWN.get(fingerprint(table, LIMIT))
    return known() if known and known.eot == end_of_text(name) else ModelTokenizer(name, files)


def tokenizer_files(tokenizer, block_size):
    """{file name: text}: what transformers' AutoTokenizer reads, of GPT-2's BPE or bytes.

    GPT-2's files write a merge as the two tokens that it joins.
    """
    ranks, merges = tokenizer.ranks, []
    for token, rank in sorted(ranks.items(), key=lambda t: t[1]):
        parts = [bytes([b]) for b in token]     # apply all earlier merges: two parts are left
        while len(parts) > 2:
            _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges += [[''.join(VISIBLE[b] for b in p) for p in parts]] * (len(parts) == 2)
    eot = tokenizer.eot_text
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    return {
        'tokenizer.json': json.dumps({
            'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None,
            'added_tokens': [{'id': tokenizer.eot, 'content': eot, 'special': True, 'lstrip': False,
                              'rstrip': False, 'single_word': False, 'normalized': False}],
            'pre_tokenizer': byte_level, 'post_processor': None, 'decoder': byte_level,
            'model': {'type': 'BPE', 'vocab': tokenizer.vocab(), 'merges': merges, 'dropout': None,
                      'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '',
                      'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False}},
            ensure_ascii=False),
        # with token types, transformers would add token type 0's embedding, which is token 0's
        'tokenizer_config.json': json.dumps({
            'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': eot, 'eos_token': eot,
            'unk_token': eot, 'model_input_names': ['input_ids', 'attention_mask'],
            'clean_up_tokenization_spaces': False, 'model_max_length': block_size}, indent=2)}

# -----------------------------------------------------------------------------
# Files. A file's rows are texts or {column: value}; a file of text is one row.

COMPRESSED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
BOMS = ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'),      # before UTF-16's,
        (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'))      # which begin alike


class NotData(UserError):
    """A file without text or rows: refused if the user named it, skipped if a folder held it."""

    def __init__(self, why, message):
        super().__init__(message)
        self.why = why


def endings(path):
    """('.jsonl', '.gz'): what a file holds by its name, and how it is compressed, '' if it is not."""
    stem, last = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, '')


def text_lines(f):
    """The lines of a binary file, decoded; raises UnicodeError if it does not hold text."""
    encoding = next((e for bom, e in BOMS if f.peek(4).startswith(bom)), 'utf-8-sig')
    for line in io.TextIOWrapper(f, encoding, newline=''):
        if '\0' in line:
            raise UnicodeError
        yield line


def json_rows(lines):
    """JSON lines; or one value over several lines: a list of rows, or a row."""
    started = False
    for line in lines:
        if line.strip():
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
    if not isinstance(row, dict):
        raise NotData('no rows', f"{where} is {row!r:.60}; expected text or {{\"text\": ...}}")
    column = column or ('text' if 'text' in row else 'input_ids')
    if column not in row:
        raise NotData('no such column', f"{where} has no column `{column}`: name the column of text or of "
                                        f"token ids with --column=, one of {', '.join(map(str, row))}")
    if None in row:
        raise UserError(f"{where} has more fields than the first line names: quote a text with commas")
    value = row[column]
    if value is None or isinstance(value, str) and column != 'input_ids':
        return value
    bad = value
    if isinstance(value, list):
        if set(map(type, value)) <= {int} and (not value or 0 <= min(value) <= max(value) < LIMIT):
            return np.array(value, np.uint16)
        bad = next(i for i in value if type(i) is not int or not 0 <= i < LIMIT)
    raise UserError(f"{where}: `{column}` holds {bad!r:.60}; expected text, or a list of token ids from 0 "
                    f"to {LIMIT - 1}")


def file_documents(path, column, found):
    """(path, row, text or ids or None); (path, 0, NotData) for a file to skip. found: in a folder."""
    done = 0
    try:
        if found and not os.path.isfile(path):      # a pipe would wait for ever
            raise NotData('not a file', f"{path} is no file")
        for row in rows(path):
            where = f"{path}, row {done + 1}" if done or endings(path)[0] else path
            yield path, done + 1, cell(row, column, where)
            done += 1
        return
    except NotData as e:
        problem = e
    except UserError:
        raise
    except UnicodeError:
        problem = NotData('not text', f"{path} is not UTF-8 text: if it is text in another encoding, type "
                                      f"`iconv -f ENCODING -t UTF-8 {path}` to convert it")
    except (ValueError, RecursionError, EOFError, csv.Error, zlib.error, lzma.LZMAError, OSError) as e:
        if isinstance(e, OSError) and e.filename:       # the system's own words name the file
            raise
        problem = NotData('damaged', f"{path}, row {done + 1}: damaged, or not what its name says ({e})")
    if done or not found:
        raise problem
    yield path, 0, problem


def files_in(folder, seen):
    """All files below a folder, links followed, each once; hidden ones are left out."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        if name.startswith('.') or real in seen:
            continue
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
    except Exception as e:      # offline, unknown, private, ...: each library has its own exceptions
        why = f"{type(e).__name__}: {' '.join(str(e).split())}"
        if n:
            raise UserError(f"lost {name} after {n:,} rows ({why}): type the same command again")
        raise UserError(f"cannot read {name}, which is no local file or preset ({', '.join(PRESETS)}), from "
                        f"the Hugging Face hub; --config= and --split= choose a part of it ({why})")


def converted(name, config, split, api):
    """The files CONFIG/SPLIT/0000.parquet of one configuration and split on the converted branch.

    load_dataset would mix the configurations. The hub calls the copy of a large split partial-SPLIT.
    """
    parts = {}
    for path in sorted(api.list_repo_files(name, repo_type='dataset', revision=CONVERTED)):
        if path.endswith('.parquet') and path.count('/') == 2:
            one, its_split, _ = path.split('/')
            parts.setdefault(one, {}).setdefault(its_split, []).append(path)
    config = config or (list(parts)[0] if len(parts) == 1 else None)
    if config not in parts:
        raise UserError(f"{name} has several configurations, or not {config}: choose one with --config=, of "
                        f"{', '.join(parts)}")
    if f'partial-{split}' in parts[config]:
        print(f"note: the hub's copy of {name} is partial: it holds the beginning of {split} only")
        split = f'partial-{split}'
    if split not in parts[config]:
        raise UserError(f"{name} has no split {split} in configuration {config}: choose one with --split=, of "
                        f"{', '.join(s.removeprefix('partial-') for s in parts[config])}")
    return parts[config][split]


def nanogpt_val(documents=OPENWEBTEXT, fraction=PRESETS['openwebtext'][1]):
    """The documents that nanoGPT sets aside: datasets' train_test_split with seed 2357."""
    order = np.random.default_rng(2357).permutation(documents)
    return set(order[:math.ceil(documents * fraction)].tolist())


def documents(sources, config, split, column):
    """(file or dataset, row, text or ids or None or NotData) of all sources, in order."""
    for source in sources:
        if os.path.isdir(source):
            for path in files_in(source, {os.path.realpath(source)}):
                yield from file_documents(path, column, True)
        elif os.path.exists(source):
            yield from file_documents(source, column, False)
        elif source == 'stdlib':
            for path in stdlib_files():
                for where, n, text in file_documents(path, column, True):
                    # two blank lines stand between classes and functions: a document is one of these
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

class Unknown:
    """The tokenizer of rows of token ids that nobody has named."""
    name, vocab_size, eot, eot_text = 'unknown', LIMIT, None, '<|endoftext|>'

    def encode(self, text):
        raise UserError("text and token ids beyond GPT-2's, which no tokenizer was named for, are mixed: "
                        "type --tokenizer=FOLDER, or prepare them apart")

    def copy(self):
        return self


def encoded(items, tokenizer):
    """(where, row, ids or None or NotData, end-of-texts written in the text; None if it came as ids).

    In order, by all cores. Threads are enough, each with a tokenizer of its own: tiktoken lets go of
    the interpreter while it encodes. What is under way is bounded.
    """
    own = threading.local()

    def work(batch):
        return [(where, n, own.tokenizer.encode(v), v.count(tokenizer.eot_text)) if isinstance(v, str)
                else (where, n, v, None) for where, n, v in batch]

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores, initializer=lambda: setattr(own, 'tokenizer', tokenizer.copy())) as pool:
        futures, batch, size = deque(), [], 0
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
def complete_or_nothing(*paths):
    """Open files PATH.partial, which get their names at the end, or vanish if the block fails.

    Links are followed first: a rename cannot move a file to another disk.
    """
    paths = [os.path.realpath(p) for p in paths]
    folder = os.path.dirname(paths[0])
    made, files = not os.path.isdir(folder), []
    try:
        os.makedirs(folder, exist_ok=True)
        files += [open(p + '.partial', 'w+b') for p in paths]
        yield files
        for f in files:
            f.close()
        for p in paths:
            os.replace(p + '.partial', p)
        made = False
    finally:
        for f in files:
            with contextlib.suppress(OSError):
                f.close()
        for p in paths:
            with contextlib.suppress(OSError):
                os.remove(p + '.partial')
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


class NotItsTokens(Exception):
    """Token ids beyond GPT-2's, in rows for which no tokenizer was named."""


def prepare(sources, options, name, tokenizer):
    """Writes data/NAME and says what was read; raises NotItsTokens where they are not GPT-2's."""
    from tqdm import tqdm
    final, started, guessed = os.path.join('data', name), time.time(), options['tokenizer'] is None
    real = [os.path.realpath(s) if os.path.exists(s) else s for s in sources]
    which = [real, *(options[k] for k in ('config', 'split', 'column'))]
    source_id = hashlib.sha256(json.dumps(which).encode()).hexdigest()[:16]
    if os.path.isdir(final) and os.listdir(final):
        try:
            with open(os.path.join(final, 'meta.json'), 'rb') as f:
                old = json.load(f).get('source_id')
        except (OSError, ValueError, AttributeError):
            old = None
        check(old == source_id, f"{final} holds data of another source: choose another name with --name=, "
                                f"or remove it")
    preset = PRESETS.get(sources[0], (None, 0.01, False)) if not os.path.exists(sources[0]) else (None, 0.01, False)
    fraction = preset[1] if options['val_fraction'] is None else options['val_fraction']
    windows, most = preset[2] or options['windows'], options['max_tokens'] or math.inf
    drawn = nanogpt_val() if sources == ['openwebtext'] and preset[0] and fraction == preset[1] else None
    rng, n, largest = random.Random(2357), 0, 0
    counts = {split: {'documents': 0, 'tokens': 0} for split in ('train', 'val')}
    tally, read, skipped, lengths, seen = Counter(), Counter(), Counter(), [], set()
    paths = [os.path.join(final, f) for f in ('train.bin', 'val.bin', 'meta.json')]
    with complete_or_nothing(*paths) as (train, val, meta), \
            tqdm(unit=' tokens', unit_scale=True, total=options['max_tokens'], disable=None) as bar:
        files, total = {'train': train, 'val': val}, 0
        for where, row, ids, written in encoded(documents(
                sources, options['config'], options['split'], options['column']), tokenizer):
            if isinstance(ids, NotData):
                skipped[f"{endings(where)[0] or 'unnamed'}: {ids.why}"] += 1
                continue
            if where not in seen:
                seen.add(where)
                read[''.join(endings(where)) or 'other' if os.path.exists(where) else 'dataset'] += 1
            if ids is None:
                tally['rows without text (null), left out'] += 1
                continue
            if written is None:     # the row came as token ids
                high = int(ids.max(initial=0))
                if high >= tokenizer.vocab_size and guessed:
                    raise NotItsTokens
                check(high < tokenizer.vocab_size, f"{where}, row {row} holds token id {high}; the tokenizer "
                                                   f"{tokenizer.name} ends at {tokenizer.vocab_size - 1}")
                largest = max(largest, high)
            tally['times <|endoftext|> was written in a text, as ordinary text'] += written or 0
            split = 'val' if (n in drawn if drawn else rng.random() < fraction) else 'train'
            whole = windows or tokenizer.eot is None
            if whole and total + len(ids) > most or total + 1 >= most:
                break
            tally['empty documents, kept as an end-of-text each'] += not len(ids)
            if windows:
                check(len(ids) > 1 and (n < 2 or lengths[1] == lengths[0]) and (not n or len(ids) <= lengths[0]),
                      f"{where}, row {row}: windows are of one length, the last may be shorter; this one has "
                      f"{len(ids)} tokens: leave out --windows")
                lengths = [lengths[0] if n else len(ids), len(ids)]
            if not whole:
                ids = np.append(ids[:int(min(len(ids), most - total - 1))], np.uint16(tokenizer.eot))
            files[split].write(ids.tobytes())
            counts[split]['tokens'] += len(ids)
            counts[split]['documents'] += 1
            total, n = total + len(ids), n + 1
            bar.update(len(ids))
        check(total > n * (tokenizer.eot is not None and not windows), f"nothing to read in {' '.join(sources)}: "
              f"{n} documents, all empty{''.join(f'; skipped {k} {why}' for why, k in skipped.items())}")
        if not counts['val']['tokens'] and fraction > 0:
            # too few documents to draw from, such as a single book: its end is the validation split
            tail = max(int(total * fraction), min(1025 if tokenizer.vocab_size > 257 else 129, total // 2))
            if windows:
                tail = total - (total - tail) // lengths[0] * lengths[0]
            train.seek(-2 * tail, os.SEEK_END)
            val.write(train.read())
            train.truncate(2 * (total - tail))
            counts['train']['tokens'], counts['val']['tokens'] = total - tail, tail
        known = tokenizer.name != 'unknown'
        size = tokenizer.vocab_size if known else largest + 1
        meta.write(json.dumps({
            'tokenizer': tokenizer.name, 'vocab_size': size, 'eot': tokenizer.eot,
            'vocab_hash': fingerprint(tokenizer.vocab(), size) if known else None,
            'source': [os.path.basename(s.rstrip('/')) if os.path.exists(s) else s for s in sources],
            'source_id': source_id, **counts, **({'window': lengths[0]} if windows else {})}, indent=2).encode())
    noun = 'windows' if windows else 'documents'
    for split, c in counts.items():
        print(f"{final}/{split}.bin: {c['tokens']:,} tokens, {c['documents']:,} {noun}")
    print('read: ' + ', '.join(f"{k:,} {what}" for what, k in read.items()))
    if skipped:
        print('skipped: ' + ', '.join(f"{k:,} {what}" for what, k in sorted(skipped.items())))
    for what, k in tally.items():
        if k:
            print(f"{k:,} {what}")
    if not known:
        print("note: nobody named the tokenizer of these ids, so no end-of-text was added: --tokenizer=FOLDER does")
    if drawn and most == math.inf and n != OPENWEBTEXT:
        print(f"note: nanoGPT draws its validation documents from {OPENWEBTEXT:,}; this source had {n:,}")
    seconds = time.time() - started
    print(f"{n:,} {noun} in {seconds:.1f} s, {total / seconds:,.0f} tokens/s, tokenizer {tokenizer.name}")


@command
def main(argv):
    options = dict.fromkeys(('name', 'tokenizer', 'max_tokens', 'val_fraction', 'config', 'split', 'column', 'windows'))
    kinds = {'max_tokens': int, 'val_fraction': float, 'windows': {'True': True, 'False': False}.__getitem__}
    sources = [os.path.expanduser(a) for a in argv if not a.startswith('--')]
    for arg in argv:
        if arg.startswith('--'):
            key, eq, value = arg[2:].partition('=')
            check(key in options and eq, f"{arg}: expected one of {', '.join(f'--{k}=' for k in options)}")
            try:
                options[key] = kinds.get(key, str)(value)
            except (ValueError, KeyError):
                raise UserError(f"{arg}: expected {'True or False' if key == 'windows' else 'a number'}"
                                f"{', whole, like 1_000_000' * (key == 'max_tokens')}")
    check(sources, "nothing to read: name a preset, a hub dataset, files or folders (--help tells more)")
    for s in sources:
        hub = re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', s) and not endings(s)[0] in FILES
        check(os.path.exists(s) or hub, f"no such file: {s}")
    fraction, most = options['val_fraction'], options['max_tokens']
    check(fraction is None or 0 <= fraction <= 1, f"--val_fraction={fraction}: expected a number from 0 to 1")
    name = options['name'] or os.path.basename(os.path.abspath(sources[0])).split('.')[0]
    check(re.fullmatch(r'\w[\w.-]*', name), f"the data would be called {name!r}: choose a name with --name=, of "
                                            f"letters, digits, '.', '_' and '-'")
    tokenizer = get_tokenizer(options['tokenizer'] or 'gpt2')
    least = 128 if tokenizer.name == 'bytes' else 1024
    check(most is None or most > least, f"--max_tokens={most} is smaller than a window: expected more than {least}")
    try:
        prepare(sources, options, name, tokenizer)
    except NotItsTokens:
        prepare(sources, options, name, Unknown())


if __name__ == '__main__':
    main()
