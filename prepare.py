"""
Text -> data/NAME/{train,val}.bin: uint16 token ids, end-of-text after each document. Beside them
stand meta.json, which names the tokenizer and the counts, and tokenizer/, a model's own files.

    python prepare.py stdlib --tokenizer=bytes              the Python standard library
    python prepare.py openwebtext --max_tokens=700_000_000  streams just that much from the hub
    python prepare.py essays/ more.jsonl.gz --name=mine     local files and folders
    python prepare.py some-user/some-dataset --config=en    any dataset on the hub

    --name=          the folder under data/, a new one      (default: from the first source)
    --tokenizer=     gpt2; bytes (0-255, and end-of-text 256); or a model's folder or hub id
    --max_tokens=    stop there, end-of-text counted        (default: everything)
    --val_fraction=  of the documents, drawn at random      (default: 0.01, presets: their own)
    --config=, --split=                                     (default: the hub's, and train)
    --column=        the column of text or of token ids     (default: text, else input_ids)
    --windows=True   rows of token ids are windows of a longer stream: add no end-of-text to them

A document is a text file, or a row of a .jsonl, .json, .csv, .tsv or .parquet file; each may be
compressed (.gz, .bz2, .xz). Text is UTF-8, or has a byte-order mark; <|endoftext|> in it is text.
Prints what was read (a folder's other files are left out), what was written, and the speed.
"""
import argparse
import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import time
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import UserError, check, command, companions, local_folder, one_line, write

# name: (hub dataset, its revision, val_fraction, rows are windows); val_fraction 1: for evaluation
OWT = 'Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c'
PRESETS = {
    'openwebtext': (*OWT, 0.0005, False),
    'openwebtext_val': (*OWT, 1.0, False),      # 4.4M tokens, but all of the dataset is streamed
    'pile': ('apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2', 'main', 1.0, True),
    'pile_filtered': ('lucabaroni/apollo-pile-filtered-10k', 'main', 1.0, True),
    'pile10k': ('NeelNanda/pile-10k', 'main', 1.0, False),
    'stdlib': (None, None, 0.05, False)}

# -----------------------------------------------------------------------------
# Documents -> tokens -> bins.

FILES = 'train.bin', 'val.bin', 'meta.json'     # meta.json is the last to get its name: it is data

def prepare(o, tokenizer, folder):
    """Writes data/NAME. meta.json.partial is there until all else is in place; by it the next run
    knows what a killed run has left, and overwrites it."""
    started, notes = time.time(), Counter()     # notes: what was read, for the summary
    train, val, marker = (folder / f'{name}.partial' for name in FILES)
    marker.touch()
    counts = {split: {'documents': 0, 'tokens': 0} for split in ('train', 'val')}
    nanogpts = o.sources == ['openwebtext'] and o.val_fraction == PRESETS['openwebtext'][2]
    drawn, rng = nanogpt_val() if nanogpts else None, random.Random(2357)
    end = np.array([] if o.windows else [tokenizer.eot], np.uint16)
    n, total, window, begins = 0, 0, 0, True
    with open(train, 'wb') as train_bin, open(val, 'wb') as val_bin, \
            tqdm(unit=' tokens', unit_scale=True, total=o.max_tokens, disable=None) as bar:
        for ids, ends in encoded(documents(o, tokenizer, notes), tokenizer.encode):
            room = (o.max_tokens or 1 << 62) - total - len(end)
            if begins:
                if room <= 0 or o.windows and len(ids) > room:
                    break
                to_val = n in drawn if drawn else rng.random() < o.val_fraction
                split, bin = ('val', val_bin) if to_val else ('train', train_bin)
                counts[split]['documents'] += 1
            if o.windows:
                window = window or len(ids)
                check(1 < len(ids) <= window and total == n * window, f"window {n + 1} has "
                      f"{len(ids)} tokens; only the last one may be shorter: omit --windows")
            ends = ends or len(ids) > room
            ids = np.append(ids[:room], end) if ends else ids
            bin.write(ids.tobytes())
            counts[split]['tokens'] += len(ids)
            n, total, begins = n + ends, total + len(ids), ends
            bar.update(len(ids))
    check(total > n * len(end), f"no text in {' '.join(o.sources)} ({notes['files']} files; "
                                f"{notes[OTHERS]} {OTHERS}): bring {' '.join(KINDS)}")
    if o.val_fraction > 0 and not counts['val']['tokens']:
        # too few documents to draw from, such as a single book: its end is the validation split
        cut = total - max(int(total * o.val_fraction), min(o.window + 1, total // 2))
        cut -= cut % (window or 1)
        counts['train']['tokens'], counts['val']['tokens'] = cut, total - cut
        np.memmap(train, np.uint16, 'r', offset=2 * cut).tofile(val)
        os.truncate(train, 2 * cut)
    meta = {'tokenizer': tokenizer.name, 'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot,
            'source': o.names, **counts} | ({'window': window} if o.windows else {})
    shutil.rmtree(folder / 'tokenizer', ignore_errors=True)     # a killed run's
    for name, content in tokenizer.files.items():
        write(folder / 'tokenizer' / name, content)
    marker.write_text(json.dumps(meta, indent=2))
    for name in FILES:
        os.replace(folder / f'{name}.partial', folder / name)
    print('read:', ', '.join(f'{count:,} {what}' for what, count in notes.items() if count))
    for split, count in counts.items():
        print(f"{split}: {count['documents']:,} documents, {count['tokens']:,} tokens")
    seconds = time.time() - started
    print(f"{folder}: {total:,} tokens of {tokenizer.name}, end-of-text {tokenizer.eot}, in "
          f"{seconds:.1f} s, {total / seconds:,.0f} tokens/s")

def encoded(documents, encode):
    """(document, ends) -> (token ids, ends), in order, by all cores, in bounded memory. Threads
    are enough, as the tokenizers let go of the interpreter while they encode."""
    def work(portion):
        return [(encode(d) if isinstance(d, str) else d, ends) for d, ends in portion]

    waiting, cores = deque(), os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        while portion := [*itertools.islice(documents, 16)]:
            waiting.append(pool.submit(work, portion))
            if len(waiting) > 2 * cores:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

# -----------------------------------------------------------------------------
# Sources -> documents.

KINDS = ('.txt', '.text', '.md', '.jsonl', '.ndjson', '.json', '.csv', '.tsv', '.parquet')
OTHERS = 'files of other kinds left out'
COMPRESSED = {'.gz': gzip, '.bz2': bz2, '.xz': lzma}
UNPACK = {'.zst': 'unzstd', '.zip': 'unzip', '.lz4': 'unlz4', '.7z': '7z x', '.tar': 'tar -xf'}

def documents(o, tokenizer, notes):
    """Yields (document, ends) of all sources. A document is a text, or a uint16 array of token
    ids; a long text comes in parts, the last of which `ends` it. Counts in `notes`."""
    for where, rows in streams(o, tokenizer.encode, notes):
        notes['files' if os.path.exists(where) else 'datasets'] += 1
        n = 1
        try:
            for row in rows:
                part = type(row) is tuple
                document, ends = row if part else (cell(row, o.column, tokenizer), True)
                if document is None:
                    notes['rows without text (null)'] += 1
                else:
                    yield document, ends
                n += ends
        except Exception as e:      # damage has many names
            raise UserError(f"{where}, row {n}: {one_line(e)}")

def streams(o, encode, notes):
    """Yields (file or dataset, its rows) of all sources. A row is a text or {column: value}; of a
    file of text it is (part, ends)."""
    for source in o.sources:
        if os.path.exists(source):
            for path in files_in(source, set()):
                if path == source or endings(path)[0] in KINDS:
                    yield path, file_rows(path, o.column, encode)
                else:
                    notes[OTHERS] += 1
        elif source == 'stdlib':    # two blank lines stand between its classes and functions
            for path in stdlib_files():
                yield path, Path(path).read_bytes().decode('utf-8', 'replace').split('\n\n\n')
        else:
            name, revision, _, _ = PRESETS.get(source, (source, None, None, None))
            rows = hub_rows(name, revision, o.config, o.split or 'train', o.column)
            drawn = nanogpt_val() if source == 'openwebtext_val' else None
            yield name, (row for n, row in enumerate(rows) if drawn is None or n in drawn)

def files_in(path, seen):
    """All files below a folder, sorted; links are followed, each once; hidden ones left out."""
    if os.path.realpath(path) not in seen:
        seen.add(os.path.realpath(path))
        if not os.path.isdir(path):
            yield path
        else:
            for name in sorted(os.listdir(path)):
                if not name.startswith('.'):
                    yield from files_in(os.path.join(path, name), seen)

def stdlib_files():
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}
    for folder, dirs, names in os.walk(os.path.dirname(os.__file__)):
        dirs[:] = sorted(set(dirs) - left_out)
        yield from (os.path.join(folder, n) for n in sorted(names) if n.endswith('.py'))

def nanogpt_val(documents=8013769, fraction=PRESETS['openwebtext'][2]):
    """OpenWebText's documents that nanoGPT sets aside: datasets' train_test_split, seed 2357."""
    order = np.random.default_rng(2357).permutation(documents)
    return set(order[:int(np.ceil(documents * fraction))].tolist())

def endings(path):
    """('.jsonl', '.gz'): what a file holds by its name, and how it is compressed."""
    stem, last = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED | UNPACK else (last, '')

def file_rows(path, column, encode):
    kind, packed = endings(path)
    check(os.path.isfile(path), "no file")      # a pipe would wait for ever
    check(packed not in UNPACK, f"unpack it first, type {UNPACK.get(packed)} {path}")
    with COMPRESSED.get(packed, io).open(path, 'rb') as f:
        utf16 = f.peek(2)[:2] in (b'\xff\xfe', b'\xfe\xff')     # a byte-order mark
        text = io.TextIOWrapper(f, 'utf-16' if utf16 else 'utf-8-sig', newline='')
        try:
            if kind == '.parquet':
                from pyarrow.parquet import ParquetFile
                table = ParquetFile(f)
                columns = [wanted(table.schema_arrow.names, column)]
                for batch in table.iter_batches(batch_size=256, columns=columns):
                    yield from batch.to_pylist()
            elif kind in ('.jsonl', '.ndjson', '.json'):
                yield from json_rows(text, kind)
            elif kind in ('.csv', '.tsv'):
                csv.field_size_limit(2 ** 31 - 1)       # the default is 128 KiB
                dialect = 'excel' if kind == '.csv' else 'excel-tab'
                yield from csv.DictReader(text, dialect=dialect, strict=True)
            else:
                yield from parts(text, encode)
        except UnicodeDecodeError as e:     # e.object: the bytes that were read last
            at = f.tell() - len(e.object) + e.start
            raise UserError(f"byte {at:,} is not {e.encoding}: iconv -c -f UTF-8 -t UTF-8 FILE > "
                            f"NEW drops bad bytes; iconv -f ENCODING reads another encoding")

def parts(f, encode, size=1 << 14, near=100):
    """Yields (part, ends) of a text of any length, in bounded memory; their ids are the whole's.

    A place to cut is before a space or newline with other text behind it: there GPT-2's BPE always
    begins a token. Whether a model's own tokenizer does is tried, on the characters near the
    place. A text without such a place is read whole.
    """
    text = ''
    while more := f.read(max(size, len(text))):
        check('\0' not in more, f"NUL characters, which tr -d '\\000' < FILE > NEW drops: bring "
              f"UTF-8, or UTF-16 with a byte-order mark, or {' '.join(KINDS)}")
        text += more
        place = re.compile(r'.+(?=[ \n]\S)', re.DOTALL).match(text, 0, max(len(text) - near, 0))
        cut = place.end() if place else 0
        a, b = text[max(cut - near, 0):cut], text[cut:cut + near]
        if cut and np.array_equal(encode(a + b), np.append(encode(a), encode(b))):
            yield text[:cut], False
            text = text[cut:]
    yield text, True

def json_rows(lines, kind):
    """JSON lines; a .json may also be one value over several lines: a list of rows, or a row."""
    for n, line in enumerate(filter(str.strip, lines)):
        try:
            value = json.loads(line)
        except ValueError:
            if n or kind != '.json':
                raise
            value = json.loads(line + lines.read())
        yield from value if isinstance(value, list) else [value]

def wanted(names, column):
    """The column to read of those that are there."""
    column = column or ('text' if 'text' in names else 'input_ids')
    check(column in names, f"no column {column}: type --column=, one of {[*names]}")
    return column

def cell(row, column, tokenizer):
    """What a row holds: a text, a uint16 array of token ids, or None for null."""
    row = row if isinstance(row, dict) else {'text': row}
    check(None not in row, "more fields than in the first line: quote a text with commas")   # csv
    column = wanted(row, column)
    value = row[column]
    if isinstance(value, str) and column != 'input_ids':    # JSON can hold lone surrogates
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    ids = [] if value is None else value if isinstance(value, list) else [value]
    bad = [i for i in ids if type(i) is not int or not 0 <= i < tokenizer.vocab_size]
    check(not bad, f"{column} has {bad[:1]}; expected text, or ids of {tokenizer.name}, which are "
                   f"below {tokenizer.vocab_size}: type another --tokenizer=")
    return None if value is None else np.array(ids, np.uint16)

def hub_rows(name, revision, config, split, column):
    """The rows of a hub dataset, streamed, with the one column that is wanted."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi
    try:        # an unknown name fails at once; the library would try for minutes
        HfApi().dataset_info(name, revision=revision, timeout=20)
        builder = load_dataset_builder(name, config, revision=revision)
        rows = builder.as_streaming_dataset(split)
        column = wanted(rows.column_names or next(iter(rows)), column)
        if hasattr(builder.config, 'columns'):      # parquet: the others are not downloaded
            builder.config.columns = [column]
            rows = builder.as_streaming_dataset(split)
        return rows.select_columns([column])        # nor decoded: pictures, sound
    except Exception as e:      # offline, unknown, private: each library has its own
        raise UserError(f"no file, no preset ({', '.join(PRESETS)}), and the hub says of {name}: "
                        f"{one_line(e, 2000)}")

# -----------------------------------------------------------------------------
# Tokenizers. encode: text -> (n,) uint16 token ids; end-of-text that is written in it is text.
# files: {file name: bytes}, what stands in tokenizer/.

Tokenizer = namedtuple('Tokenizer', 'name vocab_size eot encode files')

def get_tokenizer(name):
    """'gpt2', 'bytes', or a model's folder, hub id or out_dir -> Tokenizer."""
    if name == 'bytes':
        encode = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        return Tokenizer(name, 257, 256, encode, bytes_files())
    if name != 'gpt2':
        return model_tokenizer(os.path.expanduser(name))
    import tiktoken
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except Exception as e:      # requests' many ways of failing
        raise UserError(f"cannot download GPT-2's BPE ({type(e).__name__}): set TIKTOKEN_CACHE_DIR "
                        f"to a copy of its cache, or name a folder that has a tokenizer.json")
    # encode_ordinary, without its list of Python integers
    encode = lambda text: bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    return Tokenizer(name, 50257, 50256, encode, {})

def model_tokenizer(name):
    """The tokenizer.json of a folder. Special tokens are neither added nor read from a text. Its
    end-of-text is the run's; or config.json's (a list's first); or tokenizer_config.json's."""
    files, folder = companions(name), Path(local_folder(name))
    check('tokenizer.json' in files, f"{name} has no tokenizer.json: transformers writes it by "
          f"AutoTokenizer.from_pretrained and save_pretrained; or type --tokenizer=gpt2 or bytes")
    try:
        from tokenizers import Tokenizer as BPE
        bpe = BPE.from_str(files['tokenizer.json'].decode('utf-8-sig'))
        bpe.encode_special_tokens = True
        bpe.no_truncation()     # the file may ask for these, for the sake of a batch
        bpe.no_padding()
        config, vocab = {}, bpe.get_vocab()
        if (folder / 'config.json').exists():       # a folder of a tokenizer alone has none
            config = json.loads((folder / 'config.json').read_bytes())
        if (folder / 'ckpt.pt').exists():
            run = torch.load(folder / 'ckpt.pt', 'cpu', weights_only=True, mmap=True)
            config = {'eos_token_id': run['model_args']['eot_token_id']}
        eos = config.get('eos_token_id')
        eos = eos[0] if isinstance(eos, list) else eos
        token = json.loads(files.get('tokenizer_config.json', '{}')).get('eos_token')
        token = token['content'] if isinstance(token, dict) else token or '<|endoftext|>'
        eot = eos if eos in vocab.values() else vocab[token]
    except Exception as e:      # no such package; damage, which has many names
        raise UserError(f"{name}: cannot read tokenizer.json and eos_token_id ({one_line(e)})")
    size = max(vocab.values()) + 1
    check(size <= 1 << 16, f"{name} has {size:,} tokens; ids of 16 bits reach {1 << 16:,}")

    def encode(text):
        return np.array(bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint16)
    short = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
    return Tokenizer(short, size, eot, encode, files)

def bytes_files():
    """What transformers' AutoTokenizer reads. A visible byte stands for itself; the others are
    the characters from 256 on, as in GPT-2's files."""
    hidden, eot = [*range(33), *range(127, 161), 173], '<|endoftext|>'
    vocab = {chr(256 + hidden.index(b) if b in hidden else b): b for b in range(256)} | {eot: 256}
    plain = dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False)
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    whole = {'version': '1.0', 'model': {'type': 'BPE', 'vocab': vocab, 'merges': []},
             'pre_tokenizer': byte_level, 'decoder': byte_level,
             'added_tokens': [{'id': 256, 'content': eot, 'special': True, **plain}]}
    config = {'tokenizer_class': 'GPT2TokenizerFast', 'clean_up_tokenization_spaces': False}
    return {'tokenizer.json': json.dumps(whole).encode(),
            'tokenizer_config.json': json.dumps(config).encode()}

# -----------------------------------------------------------------------------
# The command line.

@command
def main(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda message: check(False, message)
    parser.add_argument('sources', nargs='+', type=os.path.expanduser)
    for key in ('name', 'tokenizer', 'config', 'split', 'column', 'max_tokens', 'val_fraction'):
        parser.add_argument(f'--{key}', type={'max_tokens': int, 'val_fraction': float}.get(key))
    parser.add_argument('--windows', choices=('True', 'False'))
    o = parser.parse_intermixed_args(argv)
    first, local = o.sources[0], [s for s in o.sources if os.path.exists(s)]
    check(not local or not (o.config or o.split),
          f"--config and --split are for the hub's datasets, not for {' '.join(local)}")
    _, _, fraction, windows = PRESETS.get('' if first in local else first, (0, 0, 0.01, False))
    o.val_fraction = fraction if o.val_fraction is None else o.val_fraction
    check(0 <= o.val_fraction <= 1, f"--val_fraction={o.val_fraction}: expected 0 to 1")
    o.windows = windows or o.windows == 'True'
    o.names = [os.path.basename(os.path.abspath(s)) if s in local else s for s in o.sources]
    name = o.name or os.path.basename(os.path.abspath(first)).split('.')[0]
    check(re.fullmatch(r'\w[\w.-]*', name), f"--name={name}: expected letters, digits, . _ and -")
    folder = Path('data', name)
    new, there = not folder.exists(), {path.name for path in folder.glob('*')}
    data = sorted(there.intersection([*FILES, 'tokenizer']))
    check(not data or 'meta.json.partial' in there and 'meta.json' not in there,
          f"{folder} has {', '.join(data)} already: type another --name=, or remove it")
    tokenizer = get_tokenizer(o.tokenizer or 'gpt2')
    o.window = 128 if tokenizer.name == 'bytes' else 1024       # of a usual model
    check(o.max_tokens is None or o.max_tokens > o.window,
          f"--max_tokens={o.max_tokens} is no longer than a window: expected more than {o.window}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        prepare(o, tokenizer, folder)
    except BaseException:       # all or nothing
        ours = [*folder.glob('*.partial'), *(folder / file for file in data)]   # a killed run's
        for path in [folder] if new else ours:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise

if __name__ == '__main__':
    main()
