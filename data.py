"""
Prepared token bins -> batches, as a pure function of (seed, step). Imported by train.py, evaluate.py, bench.py, prepare.py:

    data = TokenData('data/pylib', block_size=256, vocab_size=8192)
    x, y = data.batch(step, micro, batch_size=16, batch_rows=64, rank=0, world=2, seed=1337)   # (16, 256) each
    x, y = data.val_batch(data.val_windows(eval_tokens=500_000)[:16])

A loader has no state, so a resumed run and a run on another number of processes see the very same batches.
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
from tokenizer import load_tokenizer
from verification import BinFile, verify

VERSION = 1  # of meta.json
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}  # of ids in bins
GAMMA = 0x9e3779b97f4a7c15  # 2^64 / golden ratio: keeps `mix` away from its fixed point 0


def data_dir(dataset, tokenizer='bpe', root='data', max_tokens=0, vocab_size=8192, **options):
    """
    Where prepare.py puts a corpus. Every option that isn't the default is part of the name, so that no two preparations share a
    directory: pylib -> data/pylib, with GPT-2's tokenizer data/pylib-gpt2, 500M tokens of fineweb_edu in a vocabulary of 32,000
    -> data/fineweb_edu-500M-32000, text:my/notes -> data/text-my-notes-<hash>. A path ('data/x', with its slash) is itself.
    """
    kind, colon, path = dataset.partition(':')
    if not colon and '/' in dataset:
        return Path(dataset)
    words = [f'{kind}-{slug(path)}' if colon else dataset]
    if max_tokens:
        words.append(short_number(max_tokens))
    if tokenizer != 'bpe':
        words.append('gpt2' if tokenizer == 'gpt2' else slug(tokenizer))
    elif vocab_size != 8192:
        words.append(str(vocab_size))
    for key, value in options.items():
        plain = re.fullmatch(r'[\w.]+', str(value), re.ASCII)
        words.append(f'{key}-{value if plain else slug(str(value))}')
    return Path(root, '-'.join(words))


def short_number(n):
    """500_000_000 -> '500M', 2_500_000 -> '2500k', 1_234_567 -> '1234567': as short as it is exact."""
    for unit, size in (('B', 10**9), ('M', 10**6), ('k', 10**3)):
        if n % size == 0:
            return f'{n // size}{unit}'
    return str(n)


def slug(path):
    """A path as one readable word. With a hash, for a/b and a-b are one word without."""
    word = re.sub(r'[^A-Za-z0-9.]+', '-', path).strip('-.')[-60:]
    return f'{word}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}'


def mix(x):
    """uint64 array -> uint64 array, a bijection in which every bit of x reaches every bit: the finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb
    return x ^ (x >> 31)


def permute(i, n, key):
    """
    The i-th element of range(n) in the order that `key` stands for. i: integer array, key: integer or array like i.

    A Feistel network is a bijection of range(2^bits); a value that falls outside range(n) goes through it again until it is
    inside (cycle walking: Black and Rogaway 2002), fewer than 2 times on average. Unlike numpy's permutation it needs no
    memory for n and is the same in every version.
    """
    i = np.asarray(i).astype(np.uint64)
    key = np.broadcast_to(np.asarray(key).astype(np.uint64), i.shape)
    bits = (n - 1).bit_length()
    low = (bits + 1) // 2
    keys = [key := mix(key + GAMMA) for _ in range(6)]  # one a round: with 4 the orders of a tiny n are not equally likely

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
    """The tokens of a bin that belong to a split: all, unless meta.json gives the `offset` of the first in bytes."""
    name: str
    tokens: int
    offset: int
    size: int  # bytes of the whole bin
    sha256: str  # of the whole bin
    content: object  # what it adds to the fingerprint of the data

    @classmethod
    def of(cls, entry, dtype):
        """From an entry in meta.json. Raises KeyError, TypeError or ValueError for a broken one."""
        tokens, sha256 = int(entry['tokens']), entry['sha256']
        if 'offset' not in entry:
            return cls(entry['name'], tokens, 0, dtype.itemsize * tokens, sha256, sha256)
        offset, size = int(entry['offset']), int(entry['size'])
        if not 0 <= offset <= offset + dtype.itemsize * tokens <= size:
            raise ValueError(f'{tokens} tokens from byte {offset} on in {size} bytes')
        return cls(entry['name'], tokens, offset, size, sha256, [sha256, offset, tokens])


class TokenData:
    """
    A prepared directory: .meta, .tokenizer (the content of tokenizer.json), .fingerprint, .train_tokens, .n_windows.

    Window i of a split covers the tokens [i*T, i*T + T + 1), T = block_size: inputs, and targets one further. Everything that
    can be wrong with the directory is a UserError here.

    verify: which bins are read as a whole, to compare their sha256 and to look for ids outside the vocabulary. 'once':
    those that were not read since they last changed; 'always': all; 'never': none, for a caller who reads them anyway.
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
                            f'--vocab_size={self.n_vocab}')
        tokens = load_tokenizer(self.path).n_vocab
        self.tokenizer = read_json(self.path / 'tokenizer.json')
        if tokens != self.n_vocab:
            raise UserError(f"{self.path / 'tokenizer.json'}: {tokens} tokens, but meta.json says {self.n_vocab}: {self.again}")
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
        # Of a file that has parts of both splits the one that begins earlier says where its ids begin.
        both = sorted(parts['train'] + parts['val'], key=lambda part: -part.offset)
        self.bins = {part.name: BinFile(part.sha256, self.dtype, part.offset) for part in both}
        if verify != 'never':
            self.verify(reread=verify == 'always')

    def too_short(self, split, tokens):
        """Says that a split has no window, how much text a window is where meta.json tells, and what to do."""
        window = self.block_size + 1
        val_ratio = self.meta.get('val_ratio', 0)  # 0: not known, None: the corpus has splits of its own
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
        return (f'{self.path}: the {split} split has {tokens} tokens, fewer than one window of block_size + 1 = {window}'
                f'{size}: {shorter}, {more}{ratio}')

    def verify(self, reread):
        """Read the bins that are not on record, or all of them (reread) -> {name: what verification.scan found}."""
        return verify(self.path, self.bins, self.n_vocab, self.again, reread)

    def open(self, part):
        """The ids of a part of a bin, memory-mapped, the size of the bin checked."""
        file = self.path / part.name
        try:
            if (size := file.stat().st_size) != part.size:
                raise UserError(f'{file}: {size} bytes, but meta.json says {part.size}: {self.again}')
            if not part.tokens:  # nothing can't be mapped
                return np.zeros(0, self.dtype)
            # A plain view: slices of a np.memmap object cost ten times as much.
            return np.asarray(np.memmap(file, self.dtype, 'r', part.offset, (part.tokens,)))
        except OSError as error:
            raise UserError(f'{file}: {error.strerror}: {self.again}')

    def read(self, split, start, stop):
        """Tokens [start, stop) of a split, over as many shards as they lie in."""
        starts = self.starts[split]
        first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop)
        return np.concatenate([self.shards[split][k][max(0, start - starts[k]):stop - starts[k]] for k in range(first, last)])

    def gather(self, split, windows):
        """(n,) windows -> x, y: (n, T) int64"""
        T = self.block_size
        tokens = np.stack([self.read(split, w * T, w * T + T + 1) for w in windows.tolist()]).astype(np.int64)  # (n, T + 1)
        if tokens.max() >= self.n_vocab:
            row, column = np.argwhere(tokens >= self.n_vocab)[0]
            raise UserError(f'{self.path}: id {tokens[row, column]} at position {windows[row] * T + column} of the {split} split '
                            f'is outside the vocabulary of {self.n_vocab}: {self.again}')
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()

    def repeats(self, tokens):
        """A line that says how often a run of so many tokens reads the training data; None if it reads nothing twice."""
        times = tokens / (self.n_windows * self.block_size)
        if times > 1:
            return (f'this run reads its training data {times:.1f} times: to see no text twice, prepare more of it, '
                    'or take fewer steps (--max_steps)')

    def rows(self, step, micro, batch_size, batch_rows, rank=0, world=1, seed=0, offset=0):
        """
        (batch_size,) int64: the windows of one micro-step. The batch_rows rows of a step are dealt to its micro-steps and ranks.

        Step s begins at row s * batch_rows + offset of the run. The offset is not 0 after a resume with another batch size: then it
        is the number of rows read before, less resumed_step * batch_rows, so that reading goes on where it stopped.
        """
        number = offset + step * batch_rows + (micro * world + rank) * batch_size + np.arange(batch_size)
        epoch, i = np.divmod(number, self.n_windows)  # every window once an epoch
        key = mix(mix(np.array([seed]).astype(np.uint64) + GAMMA) + epoch.astype(np.uint64))
        return permute(i, self.n_windows, key)

    def batch(self, step, micro, batch_size, batch_rows, rank=0, world=1, seed=0, offset=0):
        """x, y: (batch_size, T) int64. The union over micro-steps and ranks is the same for any number of processes."""
        return self.gather('train', self.rows(step, micro, batch_size, batch_rows, rank, world, seed, offset))

    def val_windows(self, eval_tokens=0):
        """(n,) int64: the windows of every evaluation on about eval_tokens (0: all), spread evenly over the split."""
        n = self.n_val_windows
        count = min(n, max(1, eval_tokens // self.block_size)) if eval_tokens else n
        return np.arange(count) * n // count

    def val_batch(self, windows):
        """x, y: (len(windows), T) int64"""
        return self.gather('val', windows)


class Prefetcher:
    """
    Iterator over batch(*arguments) for every item of `sequence`, the next one made in a thread while the current one is used.
    `wait` adds up the seconds that the consumer waited. What batch() raises, the consumer's next() raises.
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
