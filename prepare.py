"""
Corpus -> tokenizer.json, train.bin, val.bin, meta.json: everything that data.py reads.

    python prepare.py                                                 # pylib: the text of this machine's Python library
    python prepare.py --dataset=text:notes --vocab_size=4096          # a file, a directory or a 'glob' of .txt and .jsonl
    python prepare.py --dataset=text:big.jsonl --text_field=body --max_tokens=5e6 --out=data/big

Documents are read once, as a stream: exact duplicates go out, the hash of a document's text decides whether it is train or
val, the train documents of the first 64 MB make the byte-level BPE, and processes encode. All of it is written beside --out
and renamed to it when it is whole, so that a killed preparation leaves nothing that looks finished.
"""
import base64
import codecs
import glob
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import textwrap
import threading
import time
import tokenize
import types
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from configurator import UserError, load, run
from data import EOT, VERSION, data_dir, load_tokenizer, read_json, token_bytes

# GPT-2's split into words as tiktoken writes it: equal results, but possessive, so that it never backtracks.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
BATCH = 10**6  # bytes of text that a process encodes at a time
TOKENIZER_BATCHES = 64  # the tokenizer is trained on the train documents of the first so many
SLICE = 2**19  # characters that tiktoken gets at a time: a run of a million spaces overflows its stack
PIECE, PATIENCE, LONGEST = 8 * 1024, 64 * 1024, 128 * 1024  # bytes of a .txt document: see `pieces`


@dataclass
class PrepareConfig:
    dataset: str = 'pylib'  # pylib, or text:PATH (file, directory or glob of .txt and .jsonl)
    vocab_size: int = 8192  # tokens, the end-of-text token included
    val_ratio: float = 0.05  # share of the documents that is kept for validation
    max_tokens: int = 0  # train tokens after which reading stops, 0: all
    text_field: str = 'text'  # of a line of .jsonl
    out: str = ''  # directory to make, '': data/NAME
    num_proc: int = 0  # processes that encode, 0: one a CPU
    seed: int = 1337  # of the split into train and val

    def problems(self):
        if self.dataset != 'pylib' and not re.match('text:.', self.dataset):
            yield f'--dataset={self.dataset}: unknown, expected pylib or text:PATH'
        if not 257 <= self.vocab_size <= 2**16:
            yield f'--vocab_size={self.vocab_size}: expected 257 (bytes and end of text) to 65536 (ids are uint16)'
        if not 0 < self.val_ratio < 1:
            yield f'--val_ratio={self.val_ratio}: expected a share between 0 and 1'
        for key in ('max_tokens', 'num_proc', 'seed'):
            if getattr(self, key) < 0:
                yield f'--{key}={getattr(self, key)}: must not be negative'


def main(argv):
    config = load(argv, PrepareConfig, usage=__doc__)
    out = Path(config.out) if config.out else data_dir(config.dataset)
    try:
        prepare(config, out)
    except BrokenPipeError:  # the reader of our output went away: `run` knows
        raise
    except OSError as error:  # a corpus that can't be read names itself, a full disk doesn't
        raise UserError(f'{error.filename or out}: {error.strerror}')


def prepare(config, out):
    start = time.time()
    source, documents = open_corpus(config)
    request = {'version': VERSION, 'source': source, 'filter': 'no exact duplicates, no empty documents', 'seed': config.seed,
               'val_ratio': config.val_ratio, 'max_tokens': config.max_tokens, 'vocab_size': config.vocab_size}
    if is_prepared(out, request):
        print(f'{out} is already prepared: nothing to do')
        return

    with workspace(out.resolve()) as work:
        print(f'{config.dataset}: reading', flush=True)
        stream = batches(documents, config)
        head = list(islice(stream, TOKENIZER_BATCHES))
        sample = [text for _, texts in head for text in texts['train']]
        if not any(texts['val'] for _, texts in head) and not sample:
            raise UserError(f'{config.dataset}: the corpus is empty, no document has any text')
        if not sample:
            raise UserError(f'{config.dataset}: no text for the train split: more documents, or a smaller --val_ratio')
        print(f'tokenizer: training {config.vocab_size} tokens on {len(sample):,} documents', flush=True)
        write_json(work / 'tokenizer.json', train_tokenizer(sample, config.vocab_size))
        print(f'encoding, after {time.time() - start:.1f} s', flush=True)
        counts, files = encode_corpus(chain(head, stream), work, config)
        if not counts['val']:
            raise UserError(f"{config.dataset}: none of {counts['train']} documents fell into the val split: "
                            f'more documents, or a larger --val_ratio')
        seconds = round(time.time() - start, 1)
        write_json(work / 'meta.json', {
            **request, 'eot_id': config.vocab_size - 1, 'documents': counts, 'files': files,
            'created': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'seconds': seconds})
        fsync(work)
        if not is_prepared(out, request):  # another run may have been faster
            work.rename(out.resolve())
            fsync(out.resolve().parent)

    (train,), (val,) = files['train'], files['val']
    size, tokens = train['bytes'] + val['bytes'], train['tokens'] + val['tokens']
    print(f"{out}: {train['tokens']:,} train + {val['tokens']:,} val tokens from {counts['train'] + counts['val']:,} documents, "
          f'{size / 1e6:.1f} MB, {size / tokens:.2f} bytes per token, {seconds} s')


def open_corpus(config):
    """What identifies the corpus, for meta.json, and an iterator over its documents: str, or None for an unreadable one."""
    if config.dataset == 'pylib':
        return {'dataset': 'pylib', 'python': f'{platform.python_implementation()} {platform.python_version()}'}, pylib()
    path = os.path.expanduser(config.dataset.removeprefix('text:'))
    if os.path.isdir(path):
        files = [file for file in Path(path).rglob('*') if file.suffix in ('.txt', '.jsonl')]
    else:
        files = map(Path, [path] if os.path.exists(path) else glob.glob(path, recursive=True))
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise UserError(f'{path}: no such file, and no directory or glob with .txt or .jsonl files')
    source = {'dataset': config.dataset, 'files': len(files), 'bytes': sum(file.stat().st_size for file in files)}
    if any(file.suffix == '.jsonl' for file in files):
        source['text_field'] = config.text_field
    return source, chain.from_iterable(jsonl(file, config.text_field) if file.suffix == '.jsonl' else pieces(file)
                                       for file in files)


def pylib():
    """Every .py file of the standard library, its tests included, and the docstrings of its modules written in C."""
    roots = [Path(root) for root in dict.fromkeys(sysconfig.get_paths()[key] for key in ('stdlib', 'platstdlib'))]
    files = {}
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in ('site-packages', 'dist-packages', '__pycache__')]
            paths = [Path(folder) / name for name in names if name.endswith('.py')]
            files |= {path.relative_to(root).as_posix(): path for path in paths}
    for _, path in sorted(files.items()):
        try:
            with tokenize.open(path) as file:  # in the encoding that the source declares (PEP 263)
                text = file.read()
            text.encode()
        except (OSError, SyntaxError, LookupError, ValueError):  # the library's tests have broken sources on purpose
            text = None
        yield text
    extensions = {path.name.partition('.')[0] for root in roots for path in (root / 'lib-dynload').glob('*.*')}
    for name in sorted(extensions | set(sys.builtin_module_names)):
        if 'test' not in name and not name.lstrip('_').startswith('xx'):
            yield c_docstrings(name)


def c_docstrings(name):
    """The public functions, classes and methods of a module written in C, as a stub that holds their docstrings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # deprecated modules
            module = importlib.import_module(name)
    except ImportError:  # a system library is missing
        return None

    def docstring(thing, indent=''):
        doc = thing.__doc__
        return [textwrap.indent(f'"""{inspect.cleandoc(doc)}"""', indent)] if isinstance(doc, str) else []

    def function(key, thing, indent=''):
        signature = re.sub(r'\$module(, /)?(, )?', '', getattr(thing, '__text_signature__', None) or '(...)').replace('$', '')
        doc = docstring(thing, indent + '    ')
        return [f'\n{indent}def {key}{signature}:', *doc] if doc else []

    def public(owner):
        return sorted((key, thing) for key, thing in vars(owner).items() if not key.startswith('_'))

    methods = (types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType, staticmethod)
    lines = docstring(module)
    for key, thing in public(module):
        if isinstance(thing, types.BuiltinFunctionType):
            lines += function(key, thing)
        elif isinstance(thing, type):
            lines += [f'\nclass {key}:', *docstring(thing, '    ')]
            for name, method in public(thing):
                lines += function(name, method, '    ') if isinstance(method, methods) else []
    return '\n'.join(lines) + '\n'


def pieces(path):
    """
    Documents of a .txt file, which joined are the file: cut at the first blank line after 8 KB, at the first line end after
    8 KB where 64 KB have no such blank line, and at 128 KB where no line ends. So text that is appended to the file changes
    the last document alone. Raises UserError where the file isn't UTF-8.
    """
    blank_line = re.compile(rb'\n[ \t\r]*\n')
    with open(path, 'rb') as file:
        offset = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        text = b''
        while text := text + file.read(LONGEST - len(text)):
            if cut := blank_line.search(text, PIECE, PATIENCE):
                end = cut.end()
            elif len(text) < PATIENCE:
                end = len(text)
            else:
                end = text.find(b'\n', PIECE) + 1 or len(text)
            try:
                document, end = codecs.utf_8_decode(text[:end], 'strict', end < LONGEST)  # not final: may end inside a character
            except UnicodeDecodeError as error:
                raise UserError(f'{path}: not UTF-8 at byte {offset + error.start}')
            yield document
            offset, text = offset + end, text[end:]


def jsonl(path, field):
    """Documents of a .jsonl file, one a line. Raises UserError with the number of a line that holds none."""
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line.decode('utf-8-sig'))
                text = row.get(field) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise ValueError(f'no text in a field {field!r}, which --text_field names')
                text.encode()  # json lets half a surrogate pair pass
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path}:{number}: broken line: {error}')
            yield text


def batches(documents, config):
    """
    (counts, texts) of about 1 MB: how many documents were read and dropped, and {'train': [str], 'val': [str]}. The counts
    travel with the texts because reading runs ahead of encoding. Takes 100 bytes of memory a document, for the digests.
    """
    seen, key = set(), str(config.seed).encode()[:64]
    counts, texts, size = Counter(), {'train': [], 'val': []}, 0
    for text in documents:
        counts['read'] += 1
        if text is None:
            counts['unreadable'] += 1
            continue
        if not text or text.isspace():
            counts['empty'] += 1
            continue
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16, key=key).digest()
        if digest in seen:
            counts['duplicates'] += 1
            continue
        seen.add(digest)
        # By nothing but the text and the seed: no document changes sides when the corpus grows or comes in another order.
        split = 'val' if int.from_bytes(digest[:8], 'little') < config.val_ratio * 2**64 else 'train'
        texts[split].append(text)
        size += len(data)
        if size >= BATCH:
            yield counts, texts
            counts, texts, size = Counter(), {'train': [], 'val': []}, 0
    yield counts, texts


def train_tokenizer(texts, vocab_size):
    """The content of tokenizer.json: a byte-level BPE, ranks are the 256 bytes and then the tokens as they were merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 characters by which the library writes bytes
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
    vocab = bpe.get_vocab()
    if len(vocab) < vocab_size - 1:
        raise UserError(f'--vocab_size={vocab_size}: this corpus makes at most {len(vocab) + 1} tokens: give that, or more text')
    # A printable byte is written as its own character, the others in their order as characters from 256 on.
    own = [ord(character) for character in alphabet if ord(character) < 256]
    byte_of = dict(zip(alphabet, own + sorted(set(range(256)) - set(own))))
    merged = sorted(vocab, key=vocab.get)[256:]
    ranks = [bytes([byte]) for byte in range(256)] + [bytes(byte_of[character] for character in token) for token in merged]
    return {'format': 'nanotrix-tokenizer', 'version': VERSION, 'name': f'nanotrix-{vocab_size}', 'pattern': PATTERN,
            'special_tokens': {EOT: len(ranks)}, 'ranks': [base64.b64encode(rank).decode() for rank in ranks]}


def encode_corpus(stream, work, config):
    """Write train.bin and val.bin. Returns the documents counted and the files described, as meta.json has them."""
    lengths, eot = token_bytes(load_tokenizer(work)), config.vocab_size - 1
    counts = Counter(dict.fromkeys(('read', 'unreadable', 'empty', 'duplicates', 'train', 'val'), 0))
    bins = {split: Bin(work / f'{split}.bin', lengths) for split in ('train', 'val')}
    start = said = time.time()
    for batch_counts, ids in encoded(stream, work, config.num_proc or min(os.cpu_count(), 16)):
        room = config.max_tokens - bins['train'].tokens
        if full := config.max_tokens and len(ids['train']) >= room:
            ids['train'] = ids['train'][:room]
            ids['train'][-1] = eot  # the document that reaches max_tokens is cut, and ends
        counts.update(batch_counts)
        for split, bin in bins.items():
            bin.write(ids[split])
            counts[split] += int((ids[split] == eot).sum())
        if full:
            break
        if time.time() - said > 5:
            said = time.time()
            tokens, size = (sum(getattr(bin, key) for bin in bins.values()) for key in ('tokens', 'bytes'))
            done = counts['train'] + counts['val']
            print(f'  {done:,} documents, {size / 1e6:.1f} MB, {tokens / (said - start):,.0f} tokens/s', flush=True)
    return counts, {split: [bin.close()] for split, bin in bins.items()}


def encoded(stream, work, num_proc):
    """`encode` of every batch, in order. Only two batches a process are in the works (Pool.imap would read the corpus ahead)."""
    if num_proc == 1:
        open_tokenizer(work)
        yield from map(encode, stream)
        return
    spawn = multiprocessing.get_context('spawn')  # the tokenizer's training has started threads: a fork could hang
    try:
        with ProcessPoolExecutor(num_proc, spawn, start_worker, (work,)) as pool:
            ahead = deque()
            for batch in stream:
                # A worker is born with its parent's signal mask: Ctrl-C is the parent's to handle.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    ahead.append(pool.submit(encode, batch))
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                if len(ahead) == 2 * num_proc:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    except BrokenProcessPool:
        raise UserError(f'one of the {num_proc} processes that encode died (out of memory?): try a smaller --num_proc')


def start_worker(work):
    """A worker doesn't outlive its parent."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    open_tokenizer(work)


def open_tokenizer(work):
    global encoding  # one a process, for `encode`
    encoding = load_tokenizer(work)


def encode(batch):
    """(counts, {split: [str]}) -> (counts, {split: (n,) uint16 ids}), with the end of text after every document."""
    counts, texts = batch
    ids = {split: [] for split in texts}
    for split, documents in texts.items():
        for document in documents:
            for start in range(0, len(document), SLICE):
                ids[split] += encoding.encode_ordinary(document[start:start + SLICE])  # '<|endoftext|>' in it is plain text
            ids[split].append(encoding.n_vocab - 1)
    return counts, {split: np.array(ids[split], '<u2') for split in ids}


class Bin:
    """A token file in the making, and its entry in meta.json."""

    def __init__(self, path, lengths):
        self.file, self.lengths, self.sha256 = open(path, 'wb'), lengths, hashlib.sha256()
        self.tokens, self.bytes, self.max_id = 0, 0, 0

    def write(self, ids):
        self.file.write(ids)
        self.sha256.update(ids)
        self.tokens += len(ids)
        self.bytes += int(self.lengths[ids].sum())
        self.max_id = max(self.max_id, int(ids.max(initial=0)))

    def close(self):
        self.file.close()
        fsync(self.file.name)
        return {'name': os.path.basename(self.file.name), 'tokens': self.tokens, 'bytes': self.bytes, 'max_id': self.max_id,
                'sha256': self.sha256.hexdigest()}


def is_prepared(out, request):
    """Whether `out` holds what `request` asks for. Raises UserError if it holds anything else: nothing is overwritten."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    if not (out / 'meta.json').is_file():
        raise UserError(f'{out}: in the way, it is no prepared data (no meta.json): choose another --out')
    meta = read_json(out / 'meta.json')
    for key, value in request.items():
        if (old := meta.get(key)) != value:
            raise UserError(f'{out}: was prepared with {key} {old!r}, not {value!r}: remove it, or choose another --out')
    return True


@contextmanager
def workspace(out):
    """A directory beside `out`, gone when the work ends, however it ends. Those of killed preparations go as well."""
    work, made = out.with_name(f'.{out.name}.tmp-{os.getpid()}'), not out.parent.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    for other in out.parent.glob(f'.{glob.escape(out.name)}.tmp-*'):
        pid = other.name.rpartition('-')[2]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(other)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if made:
            with suppress(OSError):  # not empty if all went well
                out.parent.rmdir()


def is_alive(pid):
    """Whether another process has this id. Not our own: in containers every preparation can have the same one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1), encoding='utf-8')
    fsync(path)


def fsync(path):
    """Contents on the disk: of a file, or of a directory the names in it."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


if __name__ == '__main__':
    for number in (signal.SIGINT, signal.SIGTERM):  # leave through `workspace`, which cleans up
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    run(main)
