"""
Corpus -> tokenizer.json, train.bin, val.bin, meta.json: everything that data.py reads.

    python prepare.py                                                 # pylib: the text of this machine's Python library
    python prepare.py --dataset=text:notes --vocab_size=4096          # a file, a directory or a 'glob': .txt, .jsonl, .parquet, .gz, .zst
    python prepare.py --dataset=fineweb_edu --max_tokens=5e8 --vocab_size=32000 --out=data/edu
    python prepare.py --dataset=wikitext103 --tokenizer=gpt2          # or a tokenizer.json, ours or one of Hugging Face
    python prepare.py --dataset=bins:fineweb10B --tokenizer=gpt2      # token files of nanoGPT, llm.c, modded-nanogpt
    python prepare.py --dataset=fineweb_edu --shard=3/16 --out=data/edu    # one of 16 machines
    python prepare.py join data/edu                                   # their directories, brought together there, as one
    python prepare.py show data/pylib --n=3                           # windows, figures and a picture of what is prepared

Rows of ids that are ready made (.npy, .pt):

    python prepare.py validate DIR                                    # names every file that is broken
    python prepare.py split DIR OUT --val_ratio=0.01                  # train and val by symbolic links; OUT is ready for train.py
    python prepare.py pack --dataset=pylib --row=32768 --out=DIR      # any corpus as such rows
    python prepare.py recommend DIR                                   # what to train on it: sizes, time, memory, commands

Documents are read as a stream: exact duplicates go out, the hash of a document's text decides whether it is train or val, the
train documents of the first 64 MB make the byte-level BPE, and processes encode. All of it is written in .NAME.tmp beside the
result and renamed to it when it is whole. A preparation that was killed goes on from its last finished part.
A corpus so small that the hash comes nowhere near val_ratio is split by position: its last part is val.
"""
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpora import linked
import tokenizer
from configurator import UserError, load, read_json, run
from files import fsync, write_json
from corpora.corpus import DATASETS, SourceMissing, count_words, encoding_name, open_corpus
from data import VERSION, data_dir
from corpora.splitting import Cut, find_cut, is_lopsided
from tokenizer import MAX_VOCAB, id_dtype, load_tokenizer, normalizer_of, token_bytes
from verification import remember, unverified
from corpora.workspace import Bins, Seen, compare, is_prepared, now, publish, workspace

BATCH = 10**6  # bytes of text that a process encodes at a time
SAMPLE = 64 * BATCH  # bytes of text whose train documents the tokenizer is trained on
PART = 16  # batches after which what is done is put on the record: a kill costs no more than these


@dataclass
class PrepareConfig:
    dataset: str = 'pylib'  # pylib, wikitext2, wikitext103, fineweb_edu, text:PATH (file, directory, glob), shards:DIR or bins:PATH
    source: str = ''  # fineweb_edu, wikitext*: .parquet or .jsonl files on this machine (directory, file, glob) instead of a download
    subset: str = 'sample-10BT'  # fineweb_edu: which part of it
    min_score: float = 3.0  # fineweb_edu: educational score (0 to 5) that a document needs
    text_field: str = 'text'  # of .jsonl and .parquet
    bad_text: str = 'refuse'  # what isn't UTF-8 or JSON: refuse, skip, or replace (by U+FFFD; lines that aren't JSON are skipped)
    bad_rows: float = 0.01  # share of the rows that may be without a text (or a score): they are left out, more is refused
    encoding: str = 'utf-8'  # of .txt and .jsonl without a mark, as Python names it: cp1252, gb18030, shift_jis, utf-16-le ...
    tokenizer: str = 'bpe'  # bpe (trained on the corpus), gpt2, or a tokenizer.json, ours or one of Hugging Face
    vocab_size: int = 8192  # bpe: tokens, the end-of-text token included
    val_ratio: float = 0.05  # share of the documents that is kept for validation (wikitext* have splits of their own)
    max_tokens: int = 0  # train tokens after which reading stops, 0: all
    max_documents: int = 0  # documents after which reading stops, 0: all
    shard: str = ''  # i/n: prepare the i-th (from 0) of n parts, each on its own machine; together they are the whole
    out: str = ''  # directory to make, '': data/NAME
    num_proc: int = 0  # processes that encode, 0: one a CPU
    seed: int = 1337  # of the split into train and val

    def problems(self):
        known = self.dataset in DATASETS or re.match('(text|shards|bins):.', self.dataset) or is_path(self.dataset)
        if not known:
            yield (f"--dataset={self.dataset}: unknown, expected {', '.join(DATASETS)}, text:PATH, shards:DIR or "
                   'bins:PATH')
        if self.source and self.dataset not in ('fineweb_edu', 'wikitext2', 'wikitext103'):
            yield f'--source={self.source}: --dataset={self.dataset} has none (files of your own: --dataset=text:{self.source})'
        if self.bad_text not in ('refuse', 'skip', 'replace'):
            yield f'--bad_text={self.bad_text}: expected refuse, skip or replace'
        if not 0 <= self.bad_rows <= 1:
            yield f'--bad_rows={self.bad_rows}: expected a share from 0 to 1'
        if not encoding_name(self.encoding):
            yield f"--encoding={self.encoding}: unknown, expected an encoding of Python's, as cp1252, gb18030, shift_jis or utf-16-le"
        if not 257 <= self.vocab_size <= MAX_VOCAB:
            yield f'--vocab_size={self.vocab_size}: expected 257 (bytes and end of text) to {MAX_VOCAB}'
        if not 0 < self.val_ratio < 1:
            yield f'--val_ratio={self.val_ratio}: expected a share between 0 and 1'
        for key in ('max_tokens', 'max_documents', 'num_proc', 'seed'):
            if getattr(self, key) < 0:
                yield f'--{key}={getattr(self, key)}: must not be negative'
        if self.shard:
            i, _, n = self.shard.partition('/')
            if not (i.isdecimal() and n.isdecimal() and int(i) < int(n) <= 99_999):
                yield f'--shard={self.shard}: expected i/n with 0 <= i < n, as in --shard=0/4'
            if self.max_tokens:
                yield f'--max_tokens={self.max_tokens}: with --shard no machine knows the tokens of the others: use --max_documents'


@dataclass
class PackConfig:
    row: int = 32_768  # ids in a row
    rows_per_shard: int = 100  # rows in a file

    def problems(self):
        return (f'--{key}={getattr(self, key)}: must be at least 1' for key in ('row', 'rows_per_shard') if getattr(self, key) < 1)


@dataclass
class SplitConfig:
    path: str = ''  # directory, file or glob of .npy and .pt
    out: str = ''  # directory to make
    val_ratio: float = 0.01  # share of the files that is kept for validation
    vocab_size: int = 0  # ids must be below it, 0: any
    seed: int = 1337  # of the split

    def problems(self):
        if not self.path or not self.out:
            yield 'name the shards and the directory to make: python prepare.py split DIR OUT'
        if not 0 < self.val_ratio < 1:
            yield f'--val_ratio={self.val_ratio}: expected a share between 0 and 1'


@dataclass
class PathConfig:
    path: str = ''  # what prepare.py made, or shards
    vocab_size: int = 0  # validate: ids must be below it, 0: any
    n: int = 3  # show: windows to print
    card_gb: float = 0.0  # recommend: memory of the card to train on, 0: what this machine has

    def problems(self):
        if not self.path:
            yield 'name a directory: python prepare.py validate|recommend|show|join DIR'
        for key in ('vocab_size', 'n', 'card_gb'):
            if getattr(self, key) < 0:
                yield f'--{key}={getattr(self, key)}: must not be negative'


def directory(config):
    """Where the preparation that `config` asks for goes, unless --out names another place."""
    ignored = {'dataset', 'tokenizer', 'vocab_size', 'max_tokens', 'shard', 'out', 'num_proc', 'bad_rows'}  # named otherwise, or without effect
    options = {field.name: getattr(config, field.name) for field in fields(PrepareConfig)
               if field.name not in ignored and getattr(config, field.name) != field.default}
    return data_dir(config.dataset, config.tokenizer, max_tokens=config.max_tokens, vocab_size=config.vocab_size, **options)


def is_path(dataset):
    """Whether this is a directory that was prepared already, as in pack --dataset=data/x."""
    return '/' in dataset and (Path(dataset) / 'meta.json').is_file()


def is_bins(dataset):
    """Whether this names token files of another project. The text of nanochat, .parquet files, is a corpus like others."""
    return dataset.startswith('bins:') and linked.find_bins(dataset.removeprefix('bins:')) is not None


def link(config, out):
    """Token files of another project as a prepared directory."""
    path = config.dataset.removeprefix('bins:')
    for key in ('max_tokens', 'max_documents', 'shard'):
        if value := getattr(config, key):
            raise UserError(f'--{key}={value}: the files of {path} are used as they are: leave it out')
    content = make_tokenizer(config)
    linked.link(path, out, content, tokenizer.label(content), config.val_ratio)


def main(argv):
    command, *rest = argv if argv and argv[0] in COMMANDS else ('', *argv)
    try:
        COMMANDS.get(command, prepare_command)(rest)
    except BrokenPipeError:  # the reader of our output went away: `run` knows
        raise
    except OSError as error:  # a file that can't be read names itself, a full disk doesn't
        raise UserError(f"{error.filename or ' '.join(['prepare.py', *argv])}: {error.strerror or error}")


def prepare_command(argv):
    config = load(argv, PrepareConfig, usage=__doc__)
    out = Path(config.out) if config.out else directory(config)
    if config.dataset.startswith('shards:'):
        from corpora import shards
        vocab_size = config.vocab_size if config.origin['vocab_size'] != 'default' else 0
        shards.split(config.dataset.removeprefix('shards:'), out, config.val_ratio, vocab_size, config.seed)
    elif is_bins(config.dataset):
        link(config, out)
    else:
        prepare(config, out)


def pack_command(argv):
    config = load(argv, PrepareConfig, PackConfig, usage=__doc__)
    if not config.out:
        raise UserError('--out: name the directory to make: python prepare.py pack --dataset=NAME --row=32768 --out=DIR')
    from corpora import shards
    prepared = directory(config)
    if is_bins(config.dataset):
        link(config, prepared)
    elif not is_path(config.dataset):
        prepare(config, prepared)
    shards.pack(prepared, config.row, Path(config.out), config.rows_per_shard)


def split_command(argv):
    config = load(argv, SplitConfig, positional=('path', 'out'), usage=__doc__)
    from corpora import shards
    shards.split(config.path, Path(config.out), config.val_ratio, config.vocab_size, config.seed)


def path_command(function):
    def command(argv):
        config = load(argv, PathConfig, positional=('path',), usage=__doc__)
        function(config)
    return command


def validate(config):
    from corpora import shards
    shards.validate(config.path, config.vocab_size)


def show(config):
    from corpora import show as module
    module.show(config.path, config.n)


def recommend(config):
    from corpora import recommend as module
    module.recommend(config.path, card_gb=config.card_gb)


COMMANDS = {'pack': pack_command, 'split': split_command, 'validate': path_command(validate), 'show': path_command(show),
            'recommend': path_command(recommend), 'join': path_command(lambda config: join(Path(config.path), ask=True))}


# ----------------------------------------------------------------------------------------------------------------------
# A corpus

def prepare(config, out):
    start = time.time()
    corpus = open_corpus(config)
    content = make_tokenizer(config)
    vocab_size = load_tokenizer(content).n_vocab if content else config.vocab_size
    if vocab_size != config.vocab_size and config.origin['vocab_size'] != 'default':
        raise UserError(f'--vocab_size={config.vocab_size}: --tokenizer={config.tokenizer} has {vocab_size} tokens: '
                        'leave --vocab_size out')
    request = make_request(config, corpus, tokenizer.label(content), vocab_size)
    if is_prepared(out, request, bool(config.shard)):
        print(f'{out} is already prepared: nothing to do')
        return
    whole, part = out, request
    if config.shard:
        i, n = map(int, config.shard.split('/'))
        out, part = out / f'shard-{i:05d}-of-{n:05d}', request | {'shard': config.shard}
        check_shards(whole, request, n)
    with workspace(out, part) as work:
        if work:
            if not (work / 'meta.json').exists():
                build(config, corpus, content, part, work, start)
            publish(work, out)
    summary(out)
    if config.shard:
        join(whole)
    elif not config.out:
        print(f'train on it: python train.py config/trix_tiny.py --dataset={out}'
              + (f' --vocab_size={vocab_size}' if vocab_size != 8192 else ''))


def make_request(config, corpus, label, vocab_size):
    """What meta.json says of a preparation before it is made: all that decides what will be in it."""
    filters = ', '.join(filter(None, ('' if corpus.own_splits else 'no exact duplicates, no empty documents', corpus.filter)))
    request = {'version': VERSION, 'source': corpus.source, 'filter': filters, 'seed': config.seed,
               'val_ratio': None if corpus.own_splits else config.val_ratio, 'max_tokens': config.max_tokens,
               'max_documents': config.max_documents, 'bad_text': config.bad_text, 'tokenizer': label, 'vocab_size': vocab_size}
    if (encoding := encoding_name(config.encoding)) != 'utf-8':
        request['encoding'] = encoding
    return request | {'inputs': corpus.inputs} if corpus.inputs else request


def check_prepared(config, path):
    """
    Raises UserError where the prepared directory at `path` holds anything but what `config` asks for: another corpus, files that
    were changed since, another tokenizer, other options. Says so where the files aren't there any more to compare with.
    """
    is_linked = is_bins(config.dataset)
    try:
        corpus = None if is_linked else open_corpus(config, check=False)
    except SourceMissing as error:
        print(f'{error}. Using what was prepared from it in {path}', flush=True)
        return
    if config.tokenizer == 'gpt2':  # known without the file, which may have to be downloaded
        label, vocab_size = 'gpt2', 50_257
    else:
        content = make_tokenizer(config)
        label, vocab_size = tokenizer.label(content), load_tokenizer(content).n_vocab if content else config.vocab_size
    if is_linked:
        request = linked.make_request(config.dataset.removeprefix('bins:'), label, vocab_size, config.val_ratio)
    else:
        request = make_request(config, corpus, label, vocab_size)
    compare(read_json(path / 'meta.json'), request, f'{path}: was prepared',
            f'remove it to prepare it anew, or use it as it is by --dataset={path}')


def make_tokenizer(config):
    """The content of tokenizer.json, or None where it is to be trained on the corpus."""
    if config.tokenizer == 'bpe':
        return None
    return tokenizer.gpt2() if config.tokenizer == 'gpt2' else tokenizer.from_file(config.tokenizer)


def build(config, corpus, content, request, work, start):
    """Everything that a prepared directory holds, meta.json last, in the directory `work`; what is there already is used."""
    print(f'{config.dataset}: {corpus.contents()}', flush=True)
    cut = Cut(*read_json(work / 'split.json')['cut']) if (work / 'split.json').exists() else None
    hash_only = corpus.own_splits or config.shard  # shards need not know of each other
    if not (work / 'tokenizer.json').exists():
        sample = read_sample(corpus, config, 4 * BATCH if content and hash_only else SAMPLE, cut)
        if not (cut or hash_only) and sample.is_whole and is_lopsided(sample.sizes, config.val_ratio):
            cut = split_by_position(corpus, config, sample.documents, sample.sizes, work)
            sample = read_sample(corpus, config, SAMPLE, cut)
        if not sample.train:
            raise UserError(empty_split(config, corpus, {'train': 0, 'val': sample.documents}))
        write_tokenizer(content, sample, config, work)
        del sample
    facts = {'split': 'position'} if cut else {}
    encoding = load_tokenizer(work)
    if (dtype := id_dtype(encoding.n_vocab)).itemsize > 2:
        facts['dtype'] = dtype.name
        print(f'{encoding.n_vocab:,} ids need 32 bits: the bins are uint32, which nanoGPT does not read', flush=True)
    if normalizer := normalizer_of(read_json(work / 'tokenizer.json')):
        facts['normalizer'] = normalizer
        print(f'this tokenizer changes text to the Unicode form {normalizer}: so is the text that is learned', flush=True)
    print(f'encoding, after {time.time() - start:.1f} s', flush=True)
    try:
        counts, files = encode_corpus(corpus, work, config, cut)
    except sqlite3.Error as error:
        raise UserError(f"{work / 'seen.sqlite'}: {error}: make room on the disk and try again, or remove {work} and start again")
    if not counts['train'] or not counts['val']:
        documents = counts['train'] + counts['val']
        sizes = {split: sum(file['bytes'] for file in files[split]) for split in files}
        # The hash suits the whole corpus, but what --max_tokens takes of it is in one split.
        if not (cut or hash_only) and split_by_position(corpus, config, documents, sizes, work):
            return build(config, corpus, content, request, work, start)
        shutil.rmtree(work)
        raise UserError(empty_split(config, corpus, counts))
    extra = {}
    if (text := corpus.test()) is not None:
        (work / 'test.txt').write_bytes(text.encode())
        fsync(work / 'test.txt')
        extra['test'] = {'name': 'test.txt', 'bytes': len(text.encode()), **count_words(text),
                         'sha256': hashlib.sha256(text.encode()).hexdigest()}
    remember(work, hashes_of(files), encoding.n_vocab)  # what was written right now need not be read
    write_json(work / 'meta.json', {
        **request, **facts, 'eot_id': encoding.eot_token, 'documents': counts, 'files': files, **extra,
        'created': now(), 'seconds': round(time.time() - start, 1)})


def write_tokenizer(content, sample, config, work):
    """Writes tokenizer.json: `content`, or a BPE trained on the sample. Raises UserError where the disk is too small."""
    if not content:
        print(f'tokenizer: training {config.vocab_size} tokens on {len(sample.train):,} documents', flush=True)
        content = tokenizer.train_bpe(sample.train, config.vocab_size)
    size = sum(sample.sizes.values()) / sample.share if sample.share else 0
    check_room(load_tokenizer(content), sample.train, size, config, work)
    write_json(work / 'tokenizer.json', content)


def split_by_position(corpus, config, documents, sizes, work):
    """
    The Cut of a small corpus, written to split.json, None where the corpus is not small. Removes what was made by the hash,
    which put `sizes` bytes of so many documents into the splits.
    """
    cut = find_cut(corpus, config, SAMPLE)
    if cut is None:
        return None
    share = sizes['val'] / max(1, sum(sizes.values()))
    part = {0: 'none', 1: 'all'}.get(share, f'{share:.1%} of the text')
    noun = 'document' if documents == 1 else 'documents'
    print(f'split by position: of {documents} {noun} the hash put {part} into val; now val is the last part of the text',
          flush=True)
    (work / 'state.json').unlink(missing_ok=True)  # first: it describes the other files
    for path in work.iterdir():
        if path.name != 'request.json':
            path.unlink()
    write_json(work / 'split.json', {'cut': cut})
    return cut


def empty_split(config, corpus, counts):
    """Why a split is empty, and what helps."""
    empty, other = ('val', 'larger') if counts['train'] else ('train', 'smaller')
    line = f"{config.dataset}: none of {counts['train'] + counts['val']} documents fell into the {empty} split: "
    if config.shard:
        return f'{line}a corpus so small needs no --shard'
    if corpus.own_splits:
        return f'{line}read more documents (--max_documents, --max_tokens)'
    return f'{line}more documents, or a {other} --val_ratio'


def hashes_of(files):
    """{name: sha256} of the files of both splits, as meta.json describes them."""
    return {file['name']: file['sha256'] for split in files.values() for file in split}


def summary(out):
    meta = read_json(out / 'meta.json')
    train, val = (meta['files'][split] for split in ('train', 'val'))
    tokens, size = (sum(file[key] for file in train + val) for key in ('tokens', 'bytes'))
    counts = meta['documents']
    dropped = ''.join(f', {count:,} {name}' for name, count in counts.items() if name not in ('read', 'train', 'val') and count)
    print(f"{counts['read']:,} documents read, {counts['train'] + counts['val']:,} kept{dropped}")
    print(f"{out}: {sum(file['tokens'] for file in train):,} train + {sum(file['tokens'] for file in val):,} val tokens from "
          f"{counts['train'] + counts['val']:,} documents, {size / 1e6:.1f} MB, {size / tokens:.2f} bytes per token, "
          f"{meta['seconds']} s")


class Batch(NamedTuple):
    """About 1 MB of text, and where the corpus goes on behind it."""
    number: int
    position: tuple  # documents read so far, and the position of the last of them
    counts: Counter  # documents read and dropped on the way
    texts: dict  # {'train': [str], 'val': [str]}


def batches(corpus, config, is_new, cut=None, shard=(0, 1), number=0, position=(0, None)):
    """
    The documents of the corpus from `position` on as Batch after Batch: those of the shard, sorted into train and val.

    Which split and which shard a document belongs to depends on nothing but its text and the seed: no document changes sides
    when the corpus grows or comes in another order, duplicates meet in one shard, and shards need not know of each other.
    A `cut` splits a small corpus by position instead.
    is_new(digest, number): whether no document had this digest before.
    """
    key, (i, n) = str(config.seed).encode()[:64], shard
    (read, at), counts, texts, size = position, Counter(), {'train': [], 'val': []}, 0
    for document in corpus.documents(at):
        if config.max_documents and read == config.max_documents:
            break
        read, at, text = read + 1, document.position, document.text
        if not text or text.isspace():
            if i == 0:  # no text, no digest: the first shard counts it
                counts.update(('read', document.dropped or 'empty'))
            continue
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16, key=key).digest()
        if int.from_bytes(digest[8:], 'little') % n != i:
            continue
        counts['read'] += 1
        if document.dropped:  # mended, and kept
            counts[document.dropped] += 1
        if not corpus.own_splits and not is_new(digest, number):
            counts['duplicates'] += 1
            continue
        is_val = int.from_bytes(digest[:8], 'little') < config.val_ratio * 2**64
        parts = cut.split(read, text) if cut else {document.split or ('val' if is_val else 'train'): text}
        for split, part in parts.items():
            texts[split].append(part)
        size += len(data)
        if size >= BATCH:
            yield Batch(number, (read, at), counts, texts)
            number, counts, texts, size = number + 1, Counter(), {'train': [], 'val': []}, 0
    yield Batch(number, (read, at), counts, texts)


class Sample(NamedTuple):
    """The beginning of a corpus."""
    train: list  # texts of the train documents
    documents: int  # of both splits
    sizes: dict  # {split: bytes of text}
    share: float | None  # of the corpus, None: unknown
    is_whole: bool  # the corpus ends here


def read_sample(corpus, config, enough, cut=None):
    """The first `enough` bytes of text, the same for every shard. Raises UserError where there is no text."""
    seen, train, documents, sizes, share, is_whole = set(), [], 0, {'train': 0, 'val': 0}, None, True
    for batch in batches(corpus, config, lambda digest, _: digest not in seen and not seen.add(digest), cut):
        train += batch.texts['train']
        for split, texts in batch.texts.items():
            documents += len(texts)
            sizes[split] += sum(len(text.encode()) for text in texts)
        share = corpus.progress(batch.position[1])
        is_whole = sum(sizes.values()) < enough
        if not is_whole and train:
            break
    if not documents:
        raise UserError(f'{config.dataset}: the corpus is empty, no document has any text')
    return Sample(train, documents, sizes, share, is_whole)


def check_room(encoding, sample, size, config, work):
    """Raises UserError where the disk has no room for the bins of `size` bytes of text (0: unknown), as the sample makes tokens."""
    texts = sample[::max(1, len(sample) // 100)]
    texts = [text[:2**16] for text in texts]
    rate = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts) / sum(len(text.encode()) for text in texts)
    tokens = size * rate / shard_of(config)[1]
    if config.max_tokens:
        tokens = min(tokens or config.max_tokens, config.max_tokens / (1 - config.val_ratio))
    if not tokens:
        return
    need, free = id_dtype(encoding.n_vocab).itemsize * tokens, shutil.disk_usage(work).free
    print(f'about {tokens / 1e6:,.1f}M tokens, {need / 1e9:,.3f} GB of disk ({free / 1e9:,.3f} GB are free)', flush=True)
    if need > free:
        raise UserError(f'{work.parent}: about {need / 1e9:,.3f} GB of tokens, but only {free / 1e9:,.3f} GB are free: make room, '
                        f'choose another --out, or prepare less with --max_tokens or --max_documents')


def encode_corpus(corpus, work, config, cut=None):
    """
    Write the bins of both splits. Returns the documents counted and the files described, as meta.json has them.

    Every PART batches what is done is put on record: the bins, then the digests, then state.json, which says where the former
    two stood. What lies behind that in them is the work of a killed preparation, and goes.
    """
    done = read_json(work / 'state.json') if (work / 'state.json').exists() else {}
    encoding = load_tokenizer(work)
    lengths, dtype, eot = token_bytes(encoding), id_dtype(encoding.n_vocab), encoding.eot_token
    counts = Counter(dict.fromkeys(('read', 'unreadable', 'empty', 'duplicates', 'train', 'val'), 0) | done.get('counts', {}))
    entries = done.get('files', {})
    bins = {split: Bins(work, split, lengths, dtype, entries.get(split, [])) for split in ('train', 'val')}
    number, position = done.get('batches', 0), done.get('position', (0, None))
    if number:
        print(f"going on behind {position[0]:,} documents, {bins['train'].tokens:,} train tokens", flush=True)
    budgets = token_budgets(config, cut)
    say = progress(corpus, config, position[1], bins)
    with Seen(work / 'seen.sqlite', number) as seen:
        stream = batches(corpus, config, seen.is_new, cut, shard_of(config), number, position)
        for batch, ids in encoded(stream, work, config.num_proc or min(os.cpu_count(), 16)):
            for split, budget in budgets.items():
                room = budget - bins[split].tokens
                if len(ids[split]) >= room:
                    ids[split] = ids[split][:room]
                    ids[split][-1:] = eot  # the document that reaches the budget is cut, and ends
            counts.update(batch.counts)
            for split, bin in bins.items():
                bin.append(ids[split])
                counts[split] += int((ids[split] == eot).sum())
            if budgets and all(bins[split].tokens == budget for split, budget in budgets.items()):
                break
            if (batch.number + 1) % PART == 0:
                files = {split: bin.sync() for split, bin in bins.items()}
                seen.commit()
                write_json(work / 'state.json', {
                    'batches': batch.number + 1, 'position': batch.position, 'counts': counts, 'files': files})
            say(batch.position, counts)
    return counts, {split: bin.close() for split, bin in bins.items()}


def token_budgets(config, cut):
    """{split: tokens after which it ends}. By position val follows all of train, so that it needs a budget, too."""
    if not config.max_tokens:
        return {}
    val = {'val': max(2, round(config.max_tokens * config.val_ratio / (1 - config.val_ratio)))} if cut else {}
    return {'train': config.max_tokens, **val}


def progress(corpus, config, position, bins):
    """-> say(position, counts): a line every five seconds."""
    start, before, there = time.time(), {}, corpus.progress(position) or 0
    said = start

    def totals():
        return {key: sum(getattr(bin, key) for bin in bins.values()) for key in ('tokens', 'bytes')}

    def say(position, counts):
        nonlocal said
        if (now := time.time()) - said < 5:
            return
        said, total, seconds = now, totals(), now - start
        share = corpus.progress(position[1]) or 0
        if config.max_tokens:
            share = max(share, bins['train'].tokens / config.max_tokens)
        left = f'{seconds * (1 - share) / (share - there):,.0f} s left' if share > there else 'of an unknown size'
        size = bins['train'].dtype.itemsize * total['tokens'] / 1e9
        need = f' of {size / share:,.2f}' if share else ''
        print(f"  {counts['train'] + counts['val']:,} documents, {total['tokens'] / 1e6:,.1f}M tokens, "
              f"{(total['bytes'] - before['bytes']) / seconds / 1e6:.1f} MB/s, {size:,.2f}{need} GB of disk, {left}",
              flush=True)

    before = totals()
    return say


def encoded(stream, work, num_proc):
    """
    (batch, its ids) in order. Only two batches a process are in the works (Pool.imap would read the corpus ahead), and their
    texts go as soon as a process has them.
    """
    if num_proc == 1:
        open_tokenizer(work)
        for batch in stream:
            yield batch, encode(batch.texts)
        return
    spawn = multiprocessing.get_context('spawn')  # the tokenizer's training has started threads: a fork could hang
    try:
        with ProcessPoolExecutor(num_proc, spawn, start_worker, (work,)) as pool:
            ahead = deque()
            for batch in stream:
                # A worker is born with its parent's signal mask: Ctrl-C is the parent's to handle.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    ids = pool.submit(encode, batch.texts)
                except (OSError, ValueError):  # it broke while it started a process, and closed what that needs: now it says so
                    ids = pool.submit(encode, batch.texts)
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                ahead.append((batch._replace(texts=None), ids))
                if len(ahead) == 2 * num_proc:
                    batch, ids = ahead.popleft()
                    yield batch, ids.result()
            while ahead:
                batch, ids = ahead.popleft()
                yield batch, ids.result()
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


def encode(texts):
    """{split: [str]} -> {split: (n,) ids}, with the end of text after every document."""
    eot = np.array([encoding.eot_token], id_dtype(encoding.n_vocab))
    return {split: np.concatenate([part for document in documents for part in (tokenizer.encode(encoding, document), eot)] or [eot[:0]])
            for split, documents in texts.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Directories

def shard_of(config):
    return tuple(map(int, (config.shard or '0/1').split('/')))


def check_shards(out, request, n):
    """Raises UserError where shards that are prepared beside this one don't go with it."""
    for meta in out.glob('shard-*/meta.json'):
        theirs = {**read_json(meta), 'inputs': request.get('inputs')}  # of other machines: other times of the same files
        compare(theirs, request | {'shard': f"{int(meta.parent.name[6:11])}/{n}"}, f'{meta.parent}: was prepared',
                'remove it, or choose another --out')


def join(out, ask=False):
    """The meta.json of all shards in `out` as one corpus, if all are there. ask: it is a UserError if they aren't."""
    metas = {file.parent.name: read_json(file) for file in sorted(out.glob('shard-*-of-*/meta.json'))}
    if not metas:
        raise UserError(f'{out}: no directories shard-00000-of-... with a meta.json: make them with --shard=i/n')
    n = int(next(iter(metas))[-5:])
    if missing := [i for i in range(n) if f'shard-{i:05d}-of-{n:05d}' not in metas]:
        need = f"{out}: {len(missing)} of {n} shards are missing ({', '.join(map(str, missing[:10]))}{' ...' * (len(missing) > 10)})"
        if ask:
            raise UserError(f'{need}: copy their directories here')
        print(f'{need}: with all of them here, python prepare.py join {out}')
        return
    first = next(iter(metas.values()))
    request = {key: value for key, value in first.items() if key not in ('shard', 'inputs', 'documents', 'files', 'test', 'created', 'seconds')}
    tokenizers = {name: read_json(out / name / 'tokenizer.json') for name in metas}
    for name, meta in metas.items():
        compare(meta, request | {'shard': f'{int(name[6:11])}/{n}'}, f'{out / name}: was prepared', 'it is no part of this corpus')
        if tokenizers[name] != next(iter(tokenizers.values())):
            raise UserError(f'{out / name}: its tokenizer is not that of the other shards: prepare it again')
    files = {split: [{**file, 'name': f"{name}/{file['name']}"} for name, meta in metas.items() for file in meta['files'][split]]
             for split in ('train', 'val')}
    counts = Counter()
    for meta in metas.values():
        counts.update(meta['documents'])  # unlike a sum it keeps zeros
    test = {'test': {**first['test'], 'name': f"{next(iter(metas))}/{first['test']['name']}"}} if 'test' in first else {}
    write_json(out / 'tokenizer.json', next(iter(tokenizers.values())))
    known = {}
    for name, meta in metas.items():
        hashes, n_vocab = hashes_of(meta['files']), meta['vocab_size']
        unknown = unverified(out / name, hashes, n_vocab)  # files copied here are read when they are first used
        known |= {f'{name}/{file}': sha256 for file, sha256 in hashes.items() if file not in unknown}
    remember(out, known, first['vocab_size'])
    write_json(out / 'meta.json', {
        **request, 'shards': n, 'documents': counts, 'files': files, **test,
        'created': max(meta['created'] for meta in metas.values()),
        'seconds': max(meta['seconds'] for meta in metas.values())})
    summary(out)


if __name__ == '__main__':
    for number in (signal.SIGINT, signal.SIGTERM):  # leave through `workspace`
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    run(main)
