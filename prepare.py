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
    --config=, --split=     of the dataset on the hub       (default: its only one, and train)
    --column=        the column of text or of token ids     (default: text, else input_ids)

A document is a text file, or a row of a .jsonl, .json or .parquet file, also .gz, .bz2 or .xz.
Text is UTF-8, or has a byte-order mark; <|endoftext|> in it is text. Prints counts and the speed.
"""
import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model import (UserError, check, command, companions, load_checkpoint, local_folder, one_line,
                   write)

# name: (hub dataset, its revision, val_fraction). The rows of the piles are windows of token ids
PRESETS = {
    'openwebtext': ('Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c', 0.0005),
    'pile': ('apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2', 'main', 1.0),
    'pile_filtered': ('lucabaroni/apollo-pile-filtered-10k', 'main', 1.0),
    'stdlib': (None, None, 0.05)}
FILES = 'train.bin', 'val.bin', 'meta.json'
KINDS = '.txt', '.text', '.md', '.jsonl', '.ndjson', '.json', '.parquet'
OPEN = {'': open, '.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': None, '.zip': None}

def prepare(o, tokenizer, folder):
    """Writes data/NAME. meta.json is the last to get its name: if meta.json.partial is still there,
    the rest is what a killed run has left, and the next run overwrites it."""
    started, counts = time.time(), Counter()
    train, val, last = (folder / f'{name}.partial' for name in FILES)
    nanogpts = o.sources == ['openwebtext'] and o.val_fraction == PRESETS['openwebtext'][2]
    drawn, rng = nanogpt_val() if nanogpts else None, random.Random(2357)
    end = np.array([] if o.windows else [tokenizer.eot], np.uint16)
    n, total, begins, window = 0, 0, True, None
    stream = encoded(documents(o, tokenizer, counts), tokenizer.encode)
    with open(train, 'wb') as train_bin, open(val, 'wb') as val_bin:
        for ids, ends in tqdm(stream, unit=' documents', disable=None):
            room = o.max_tokens - total - len(end)
            if begins:
                if room < (len(ids) if o.windows else 1):
                    break
                window = window or len(ids)
                to_val = n in drawn if drawn else rng.random() < o.val_fraction
                split, bin = ('val', val_bin) if to_val else ('train', train_bin)
                counts[f'{split} documents'] += 1
            ends = ends or len(ids) > room
            ids = np.append(ids[:room], end) if ends else ids
            bin.write(ids.tobytes())
            counts[f'{split} tokens'] += len(ids)
            n, total, begins = n + ends, total + len(ids), ends
    check(total > n, f"no text in {' '.join(o.sources)} ({dict(counts)}): bring {' '.join(KINDS)}")
    if o.val_fraction > 0 and not counts['val tokens'] and not o.windows:
        # too few documents to draw from, such as a single book: its end, of a GPT-2 window or more
        counts['val tokens'] = max(int(total * o.val_fraction), min(1025, total // 2))
        counts['train tokens'] = cut = total - counts['val tokens']
        np.memmap(train, np.uint16, 'r', offset=2 * cut).tofile(val)
        os.truncate(train, 2 * cut)
    meta = {'tokenizer': tokenizer.name, 'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot}
    meta |= {'window': window} if o.windows else {}
    for split in ('train', 'val'):
        meta[split] = {what: counts[f'{split} {what}'] for what in ('documents', 'tokens')}
    shutil.rmtree(folder / 'tokenizer', ignore_errors=True)     # a killed run's
    for name, content in tokenizer.files.items():
        write(folder / 'tokenizer' / name, content)
    last.write_text(json.dumps(meta, indent=2))
    for name in FILES:
        os.replace(folder / f'{name}.partial', folder / name)
    print(f"{folder}:", *(f"{count:,} {what}," for what, count in counts.items() if count),
          f"{total / (time.time() - started):,.0f} tokens/s")

def encoded(documents, encode):
    """(document, ends) -> (token ids, ends), in order, by threads, in bounded memory."""
    def work(document, ends):
        return encode(document) if isinstance(document, str) else document, ends
    ready, cores = [], os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        while portion := [*islice(documents, 16 * cores)]:
            done, ready = ready, pool.map(work, *zip(*portion))
            yield from done
        yield from ready

def nanogpt_val(documents=8013769, fraction=PRESETS['openwebtext'][2]):
    """OpenWebText's documents that nanoGPT sets aside: datasets' train_test_split, seed 2357."""
    order = np.random.default_rng(2357).permutation(documents)
    return set(order[:int(np.ceil(documents * fraction))].tolist())

def documents(o, tokenizer, counts):
    """Yields (document, ends) of all sources. A document is a text, or a uint16 array of token
    ids; a long text comes in parts, the last of which `ends` it. Counts in `counts`."""
    for where, rows in streams(o, tokenizer.encode, counts):
        n = 1
        try:
            for row in rows:
                document, ends = row if type(row) is tuple else (cell(row, o, tokenizer), True)
                counts['rows without text (null)'] += document is None
                if document is not None:
                    yield document, ends
                n += ends
        except Exception as e:      # damage has many names
            raise UserError(f"{where}, row {n}: {one_line(e, 2000)}")

def streams(o, encode, counts):
    """Yields (place, its rows) of all sources. A row is a text, {column: value} or (part, ends)."""
    for source in o.sources:
        if os.path.exists(source):
            for path in files_in(source) if os.path.isdir(source) else [source]:
                read = path == source or endings(path)[0] in KINDS
                counts['files' if read else 'files of other kinds left out'] += 1
                if read:
                    yield path, file_rows(path, o.column, encode)
        elif source == 'stdlib':    # two blank lines stand between its classes and functions
            for path in stdlib_files():
                yield path, Path(path).read_text('utf-8', 'replace').split('\n\n\n')
        else:
            yield f'{source} (no file, so on the hub)', hub_rows(source, o)

def files_in(path, left_out=()):
    """The files below a folder, sorted; hidden ones, and links to folders, are left out."""
    for folder, dirs, names in os.walk(path, onerror=lambda e: check(False, e)):
        dirs[:] = sorted(d for d in dirs if not d.startswith('.') and d not in left_out)
        yield from (os.path.join(folder, n) for n in sorted(names) if not n.startswith('.'))

def stdlib_files():
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}
    files = files_in(os.path.dirname(os.__file__), left_out)
    return (path for path in files if path.endswith('.py'))

def endings(path):
    """('.jsonl', '.gz'): what a file holds by its name, and how it is compressed."""
    stem, last = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], last) if last in OPEN else (last, '')

def file_rows(path, column, encode):
    kind, packed = endings(path)
    check(OPEN[packed] and kind not in ('.csv', '.tsv'), "unpack it, or make a .jsonl of it")
    with OPEN[packed](path, 'rb') as f:
        utf16 = f.peek(2)[:2] in (b'\xff\xfe', b'\xfe\xff')     # a byte-order mark
        text = io.TextIOWrapper(f, 'utf-16' if utf16 else 'utf-8-sig', newline='')
        try:
            if kind == '.parquet':
                from pyarrow.parquet import ParquetFile
                table = ParquetFile(f)
                columns = [wanted(table.schema_arrow.names, column)]
                for batch in table.iter_batches(batch_size=256, columns=columns):
                    yield from batch.to_pylist()
            elif kind in ('.jsonl', '.ndjson'):
                yield from map(json.loads, filter(str.strip, text))
            elif kind == '.json':       # a list of rows, a row, or a row in each line
                whole = text.read()
                try:
                    value = json.loads(whole)
                except ValueError:
                    value = map(json.loads, filter(str.strip, io.StringIO(whole)))
                yield from value if isinstance(value, (list, map)) else [value]
            else:
                yield from parts(text, encode)
        except UnicodeDecodeError as e:     # e.object: the bytes that were read last
            at = f.tell() - len(e.object) + e.start
            raise UserError(f"byte {at:,} is not {e.encoding}: type iconv -c -f UTF-8 -t UTF-8 to "
                            f"drop bad bytes, or iconv -f ENCODING to read another encoding")

def parts(f, encode, size=1 << 14, near=100):
    """Yields (part, ends) of a text of any length, in bounded memory; their ids are the whole's. A
    cut is before a space or newline with other text behind it, where GPT-2's BPE always begins a
    token; whether another tokenizer does is tried, on the characters near the place."""
    text = ''
    while more := f.read(max(size, len(text))):
        check('\0' not in more, "NUL characters: bring UTF-8, or UTF-16 with a byte-order mark")
        text += more
        place = re.compile(r'.+(?=[ \n]\S)', re.DOTALL).match(text, 0, max(len(text) - near, 0))
        cut = place.end() if place else 0
        a, b = text[max(cut - near, 0):cut], text[cut:cut + near]
        if cut and np.array_equal(encode(a + b), np.append(encode(a), encode(b))):
            yield text[:cut], False
            text = text[cut:]
    yield text, True

def wanted(names, column):
    column = column or ('text' if 'text' in names else 'input_ids')
    check(column in names, f"no column {column}: type --column=, one of {[*names]}")
    return column

def cell(row, o, tokenizer):
    """What a row holds: a text, a uint16 array of token ids, or None for null."""
    value = row[wanted(row, o.column)] if isinstance(row, dict) else row
    if value is None or isinstance(value, str):     # JSON can hold lone surrogates
        return value and value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    ids = value if isinstance(value, list) else [value]
    bad = [i for i in ids if type(i) is not int or not 0 <= i < tokenizer.vocab_size]
    check(not bad, f"{bad[:1]}: expected text, or ids below {tokenizer.vocab_size}: --tokenizer=?")
    return np.array(ids, np.uint16)

def hub_rows(source, o):
    """The rows of a hub dataset, streamed, with the one column that is wanted."""
    from datasets import load_dataset_builder
    name, revision, _ = PRESETS.get(source, (source, None, None))
    builder = load_dataset_builder(name, o.config, revision=revision)
    rows = builder.as_streaming_dataset(o.split or 'train')
    column = wanted(rows.column_names or next(iter(rows)), o.column)
    if hasattr(builder.config, 'columns'):      # parquet: the others are not downloaded
        builder.config.columns = [column]
        rows = builder.as_streaming_dataset(o.split or 'train')
    yield from rows.select_columns([column])    # nor decoded: pictures, sound

# encode: text -> (n,) uint16 token ids. files: {name: bytes}, what stands in tokenizer/.
Tokenizer = namedtuple('Tokenizer', 'name vocab_size eot encode files')

def get_tokenizer(name):
    """'gpt2', 'bytes', or a model's folder, hub id or out_dir -> Tokenizer."""
    if name == 'bytes':
        encode = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        return Tokenizer(name, 257, 256, encode, bytes_files())
    if name != 'gpt2':
        return model_tokenizer(name)
    import tiktoken
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except Exception as e:      # requests' many ways of failing
        raise UserError(f"no GPT-2 BPE: set TIKTOKEN_CACHE_DIR or --tokenizer= ({one_line(e)})")
    encode = lambda text: bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    return Tokenizer(name, 50257, 50256, encode, {})

def model_tokenizer(name):
    """The tokenizer.json of a model. End-of-text is the model's (a list's first) if that is a
    token; or else tokenizer_config.json's; or else <|endoftext|>."""
    from tokenizers import Tokenizer as BPE
    files, folder, eos = companions(name), Path(local_folder(name)), None
    try:
        bpe = BPE.from_str(files['tokenizer.json'].decode('utf-8-sig'))
        bpe.encode_special_tokens = True    # those that are written in a text are text
        bpe.no_truncation()     # the file may ask for these, for the sake of a batch
        bpe.no_padding()
        vocab = bpe.get_vocab()
        if (folder / 'ckpt.pt').exists():       # a run
            eos = load_checkpoint(folder)['model_args']['eot_token_id']
        elif (folder / 'config.json').exists():
            eos = json.loads((folder / 'config.json').read_bytes()).get('eos_token_id')
        token = json.loads(files.get('tokenizer_config.json', '{}')).get('eos_token')
        token = token['content'] if isinstance(token, dict) else token or '<|endoftext|>'
        eos = eos[0] if isinstance(eos, list) else eos
        eot = eos if eos in vocab.values() else vocab[token]
    except Exception as e:      # damage has many names
        raise UserError(f"{name}: cannot read tokenizer.json and an end-of-text ({one_line(e)}): "
                        f"AutoTokenizer's save_pretrained writes them; or type --tokenizer=bytes")
    size = max(vocab.values()) + 1
    check(size <= 1 << 16, f"{name} has {size:,} tokens; ids of 16 bits reach {1 << 16:,}")
    encode = lambda text: np.array(
        bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint16)
    return Tokenizer(os.path.basename(os.path.abspath(name)), size, eot, encode, files)

def bytes_files():
    """What AutoTokenizer reads; as in GPT-2's, the characters from 256 on are the hidden bytes."""
    hidden = [*range(33), *range(127, 161), 173]
    vocab = {chr(256 + hidden.index(b) if b in hidden else b): b for b in range(256)}
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    bpe = {'type': 'BPE', 'vocab': vocab | {'<|endoftext|>': 256}, 'merges': []}
    whole = {'model': bpe, 'pre_tokenizer': byte_level, 'decoder': byte_level, 'added_tokens': []}
    config = b'{"tokenizer_class": "GPT2TokenizerFast", "clean_up_tokenization_spaces": false}'
    return {'tokenizer.json': json.dumps(whole).encode(), 'tokenizer_config.json': config}

@command
def main(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda message: check(False, message)
    parser.add_argument('sources', nargs='+', type=os.path.expanduser)
    for key in ('name', 'tokenizer', 'config', 'split', 'column', 'max_tokens', 'val_fraction'):
        parser.add_argument(f'--{key}', type={'max_tokens': int, 'val_fraction': float}.get(key))
    parser.set_defaults(tokenizer='gpt2', max_tokens=1 << 62)
    o = parser.parse_intermixed_args(argv)
    first, here = o.sources[0], [*map(os.path.exists, o.sources)]
    if o.val_fraction is None:
        o.val_fraction = 0.01 if any(here) or first not in PRESETS else PRESETS[first][2]
    o.windows = not any(here) and {'pile', 'pile_filtered'} >= {*o.sources}
    check(not all(here) or not (o.config or o.split), f"{first} is here: drop --config and --split")
    check(0 <= o.val_fraction <= 1, f"--val_fraction={o.val_fraction}: expected 0 to 1")
    name = o.name or os.path.basename(os.path.abspath(first)).split('.')[0]
    check(re.fullmatch(r'\w[\w.-]*', name), f"--name={name}: expected letters, digits, . _ and -")
    folder = Path('data', name)
    killed = (folder / 'meta.json.partial').exists()
    check(killed or not any((folder / file).exists() for file in FILES),
          f"{folder} has data already: type another --name=, or remove it")
    tokenizer = get_tokenizer(o.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        prepare(o, tokenizer, folder)
    except BaseException:       # all or nothing
        for path in folder.glob('*.partial'):
            path.unlink()
        if not any(folder.iterdir()) and not folder.is_symlink():
            folder.rmdir()
        raise

if __name__ == '__main__':
    main()
