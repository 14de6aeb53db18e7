"""
Reads batches from prepared token bins. A batch is a pure function of (seed, step).
Imported by train.py, evaluate.py, bench.py, prepare.py:

    data = TokenData('data/pylib', block_size=256, vocab_size=8192)
    x, y = data.batch(step, micro, batch_size=16, batch_rows=64, rank=0, world=2, seed=1337)   # (16, 256) each
    x, y = data.val_batch(data.val_windows(eval_tokens=500_000)[:16])

A loader has no state. A resumed run sees the same batches as an uninterrupted one, on any number of processes.
"""
import hashlib
import json
import os
import re
import time
from bisect import bisect_left, bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError, read_json
from tokenizer import FIXED, load_tokenizer
from verification import BinFile, verify

VERSION = 1  # version of meta.json
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}  # types of the ids in bins
GAMMA = 0x9e3779b97f4a7c15  # 2^64 / golden ratio; keeps `mix` away from its fixed point 0


def data_dir(dataset, tokenizer='bpe', root='data', max_tokens=0, vocab_size=8192, **options):
    """
    The directory where prepare.py puts a corpus. Every non-default option is part of the name, so two different
    preparations never share a directory:

        pylib                                               -> data/pylib
        pylib with GPT-2's tokenizer                        -> data/pylib-gpt2
        500M tokens of fineweb_edu, a vocabulary of 32,000  -> data/fineweb_edu-500M-32000
        text:my/notes                                       -> data/text-my-notes-<hash>

    A dataset with a slash and no colon ('data/x') is a path and is returned unchanged.
    """
    kind, colon, path = dataset.partition(':')
    if not colon and '/' in dataset:
        return Path(dataset)
    words = [f'{kind}-{slug(path)}' if colon else dataset]
    if max_tokens:
        words.append(short_number(max_tokens))
    if tokenizer != 'bpe':
        words.append(tokenizer if tokenizer in (*FIXED, 'char') else slug(tokenizer))
    elif vocab_size != 8192:
        words.append(str(vocab_size))
    for key, value in options.items():
        plain = re.fullmatch(r'[\w.]+', str(value), re.ASCII)
        words.append(f'{key}-{value if plain else slug(str(value))}')
    return Path(root, '-'.join(words))


def short_number(n):
    """500_000_000 -> '500M', 2_500_000 -> '2500k', 1_234_567 -> '1234567': the shortest exact form."""
    for unit, size in (('B', 10**9), ('M', 10**6), ('k', 10**3)):
        if n % size == 0:
            return f'{n // size}{unit}'
    return str(n)


def slug(path):
    """A path as one readable word. A hash at the end keeps a/b and a-b apart."""
    word = re.sub(r'[^A-Za-z0-9.]+', '-', path).strip('-.')[-60:]
    return f'{word}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}'


def mix(x):
    """uint64 array -> uint64 array: splitmix64's finaliser. A bijection in which every bit affects all bits."""
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb
    return x ^ (x >> 31)


def permute(i, n, key):
    """
    The i-th element of range(n) in a pseudo-random order chosen by `key`.
    i: integer array. key: integer, or an integer array of i's shape.

    A Feistel network is a bijection of range(2^bits). A value outside range(n) goes through the network again until it
    lies inside (cycle walking: Black and Rogaway 2002). This takes fewer than 2 passes on average. Unlike numpy's
    permutation it needs no memory for n and gives the same order in every version.
    """
    i = np.asarray(i).astype(np.uint64)
    key = np.broadcast_to(np.asarray(key).astype(np.uint64), i.shape)
    bits = (n - 1).bit_length()
    low = (bits + 1) // 2
    keys = [key := mix(key + GAMMA) for _ in range(6)]  # 6 rounds: with 4, orders of a tiny n are not equally likely

    def feistel(x, keys):
        left, right = x >> low, x & (2**low - 1)
        for even, odd in zip(keys[::2], keys[1::2]):
            left = left ^ (mix(right ^ even) & (2**(bits - low) - 1))
            right = right ^ (mix(left ^ odd) & (2**low - 1))
        return left << low | right

    out = feistel(i, keys)
    while len(outside := np.flatnonzero(out >= n)):
        out[outside] = feistel(out[outside], [key[outside] for key in keys])
    return out.astype(np.int64)


class Part(NamedTuple):
    """The tokens of a bin that belong to a split: all, unless meta.json gives the first token's `offset` in bytes."""
    name: str
    tokens: int
    offset: int
    size: int  # bytes of the whole bin
    sha256: str  # of the whole bin
    content: object  # what this part adds to the fingerprint of the data

    @classmethod
    def of(cls, entry, dtype):
        """Build a Part from an entry in meta.json. Raises KeyError, TypeError or ValueError if the entry is broken."""
        tokens, sha256 = int(entry['tokens']), entry['sha256']
        if 'offset' not in entry:
            return cls(entry['name'], tokens, 0, dtype.itemsize * tokens, sha256, sha256)
        offset, size = int(entry['offset']), int(entry['size'])
        if not 0 <= offset <= offset + dtype.itemsize * tokens <= size:
            raise ValueError(f'{tokens} tokens from byte {offset} on in {size} bytes')
        return cls(entry['name'], tokens, offset, size, sha256, [sha256, offset, tokens])


class TokenData:
    """
    A prepared directory. Attributes: .meta, .tokenizer (the content of tokenizer.json), .fingerprint, .train_tokens,
    .n_windows.

    Window i of a split covers the tokens [i*T, i*T + T + 1), T = block_size. The targets are the inputs shifted by one.
    The constructor raises UserError for anything wrong with the directory.

    verify: which bins are read completely, to compare their sha256 and to find ids outside the vocabulary.
        'once': bins that changed since they were last read
        'always': all bins
        'never': no bins, for a caller that reads them anyway
    """

    def __init__(self, path, block_size, vocab_size, verify='once'):
        self.path, self.block_size = Path(path), block_size
        file = self.path / 'meta.json'
        self.again = f'remove {self.path} and prepare it again'
        if not file.is_file():
            raise UserError(f'{self.path}: no prepared data (no meta.json): '
                            f'make it with python prepare.py --dataset=NAME --out={self.path}')
        self.meta = read_json(file)
        try:
            if self.meta['version'] != VERSION:
                raise UserError(f"{file}: version {self.meta['version']!r}, expected {VERSION}: {self.again}")
            self.n_vocab, self.dtype = int(self.meta['vocab_size']), DTYPES[self.meta.get('dtype', 'uint16')]
            parts = {split: [Part.of(entry, self.dtype) for entry in self.meta['files'][split]]
                     for split in ('train', 'val')}
            content = [self.meta['source'], *([part.content for part in parts[split]] for split in parts)]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{file}: broken ({error!r}): {self.again}')
        if self.n_vocab > vocab_size:
            raise UserError(f'{self.path} has a vocabulary of {self.n_vocab}, the model only {vocab_size}: '
                            f'use --vocab_size={self.n_vocab}')
        tokens = load_tokenizer(self.path).n_vocab
        self.tokenizer = read_json(self.path / 'tokenizer.json')
        if tokens != self.n_vocab:
            raise UserError(f"{self.path / 'tokenizer.json'}: {tokens} tokens, but meta.json says {self.n_vocab}: "
                            f'{self.again}')
        content.append(self.tokenizer)
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

        self.shards, self.starts, totals = {}, {}, {}
        for split, listed in parts.items():
            self.shards[split] = [self.open(part) for part in listed]
            ends = np.cumsum([len(shard) for shard in self.shards[split]]).tolist()
            self.starts[split], totals[split] = [0, *ends[:-1]], ends[-1] if ends else 0
            if totals[split] < block_size + 1:
                raise UserError(self.too_short(split, totals[split]))
        self.train_tokens = totals['train']
        self.n_windows = (totals['train'] - 1) // block_size
        self.n_val_windows = (totals['val'] - 1) // block_size
        # A file can hold parts of both splits. The dict keeps the offset of the earlier part, where the ids begin.
        both = sorted(parts['train'] + parts['val'], key=lambda part: -part.offset)
        self.bins = {part.name: BinFile(part.sha256, self.dtype, part.offset) for part in both}
        if verify != 'never':
            self.verify(reread=verify == 'always')

    def too_short(self, split, tokens):
        """The error for a split shorter than a window: what to do, and, if meta.json tells, the text a window needs."""
        window = self.block_size + 1
        val_ratio = self.meta.get('val_ratio', 0)  # 0: unknown, None: the corpus has its own splits
        files = self.meta['files']['train'] + self.meta['files']['val']
        all_bytes, all_tokens = (sum(file.get(key, 0) for file in files) for key in ('bytes', 'tokens'))
        window_kb = window * all_bytes / max(1, all_tokens) / 1000
        size = f', about {window_kb:,.1f} kB of text' if all_bytes else ''
        shorter = f'--block_size={tokens - 1} or less' if tokens > 1 else 'a smaller --block_size'
        more = 'prepare more text'
        if all_bytes and val_ratio:
            share = val_ratio if split == 'val' else 1 - val_ratio
            more += f' (about {window_kb / share:,.1f} kB)'
        ratio = ', or a larger --val_ratio' if split == 'val' and val_ratio is not None else ''
        return (f'{self.path}: the {split} split has {tokens} tokens, fewer than one window of block_size + 1 = '
                f'{window}{size}: use {shorter}, {more}{ratio}')

    def verify(self, reread):
        """Read the bins without a verification record, or all bins (reread) -> {name: result of verification.scan}."""
        return verify(self.path, self.bins, self.n_vocab, self.again, reread)

    def open(self, part):
        """Memory-map the ids of a part of a bin. Checks the size of the bin."""
        file = self.path / part.name
        try:
            if (size := file.stat().st_size) != part.size:
                raise UserError(f'{file}: {size} bytes, but meta.json says {part.size}: {self.again}')
            if not part.tokens:  # an empty range can't be mapped
                return np.zeros(0, self.dtype)
            # A plain array view, because slicing a np.memmap object costs ten times as much.
            return np.asarray(np.memmap(file, self.dtype, 'r', part.offset, (part.tokens,)))
        except OSError as error:
            raise UserError(f'{file}: {error.strerror}: {self.again}')

    def read(self, split, start, stop):
        """Tokens [start, stop) of a split. The range may span several shards."""
        starts = self.starts[split]
        first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop)
        return np.concatenate([self.shards[split][k][max(0, start - starts[k]):stop - starts[k]]
                               for k in range(first, last)])

    def position(self, split, window):
        """The position of a window's first token in its split."""
        return window * self.block_size

    def gather(self, split, windows):
        """(n,) windows -> x, y: (n, T) int64"""
        starts = [self.position(split, window) for window in windows.tolist()]
        rows = [self.read(split, start, start + self.block_size + 1) for start in starts]
        tokens = np.stack(rows).astype(np.int64)  # (n, T + 1)
        if tokens.max() >= self.n_vocab:
            row, column = np.argwhere(tokens >= self.n_vocab)[0]
            raise UserError(f'{self.path}: id {tokens[row, column]} at position {starts[row] + column} of the {split} '
                            f'split is outside the vocabulary of {self.n_vocab}: {self.again}')
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()

    def limit(self, windows):
        """Train on only the first windows of the data from now on."""
        self.n_windows = min(windows, self.n_windows)

    def repeats(self, tokens):
        """A line that says how often a run of so many tokens reads the training data. None if it repeats nothing."""
        times = tokens / (self.n_windows * self.block_size)
        if times > 1:
            return (f'this run reads its training data {times:.1f} times: to see no text twice, prepare more text, '
                    'or train for fewer steps (--max_steps)')

    def rows(self, step, micro, batch_size, batch_rows, rank=0, world=1, seed=0, offset=0):
        """
        (batch_size,) int64: the windows of one micro-step. Micro-steps and ranks share the batch_rows rows of a step.

        Step s begins at row s * batch_rows + offset of the run. The offset is 0 unless the run was resumed with another
        batch size. Then offset = rows read before the resume - resumed_step * batch_rows, so reading continues where it
        stopped.
        """
        number = offset + step * batch_rows + (micro * world + rank) * batch_size + np.arange(batch_size)
        epoch, i = np.divmod(number, self.n_windows)  # an epoch reads every window once
        key = mix(mix(np.array([seed]).astype(np.uint64) + GAMMA) + epoch.astype(np.uint64))
        return permute(i, self.n_windows, key)

    def batch(self, step, micro, batch_size, batch_rows, rank=0, world=1, seed=0, offset=0):
        """x, y: (batch_size, T) int64. The union over micro-steps and ranks is equal for any number of processes."""
        return self.gather('train', self.rows(step, micro, batch_size, batch_rows, rank, world, seed, offset))

    def val_windows(self, eval_tokens=0):
        """(n,) int64: the windows of an evaluation on about eval_tokens (0: all), spread evenly over the split."""
        n = self.n_val_windows
        count = min(n, max(1, eval_tokens // self.block_size)) if eval_tokens else n
        return np.arange(count) * n // count

    def val_batch(self, windows):
        """x, y: (len(windows), T) int64"""
        return self.gather('val', windows)


class Prefetcher:
    """
    Iterator over batch(*arguments) for every item of `sequence`. A thread makes the next batch while the current one is
    used. `wait` is the total time in seconds that the consumer has waited. An exception in batch() is raised by next().
    """

    def __init__(self, batch, sequence):
        self.batch, self.sequence, self.wait = batch, iter(sequence), 0.0
        self.pool = ThreadPoolExecutor(1)
        self.submit()

    def submit(self):
        arguments = next(self.sequence, None)
        self.ahead = None if arguments is None else self.pool.submit(self.batch, *arguments)

    def __iter__(self):
        return self

    def __next__(self):
        if self.ahead is None:
            self.pool.shutdown()
            raise StopIteration
        start = time.perf_counter()
        result = self.ahead.result()
        self.wait += time.perf_counter() - start
        self.submit()
        return result
