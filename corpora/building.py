"""
Builds the content of a prepared directory: documents -> train and val -> tokenizer -> token bins.
Imported by preparation.py:

    build(config, corpus, content, request, work, start)     # writes all files into `work`, meta.json last

A killed build resumes from its last finished part.
"""
import hashlib
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

import tokenizer
from configurator import UserError, read_json
from corpora import vocabulary
from corpora.corpus import count_words
from corpora.splitting import Cut, find_cut, is_lopsided
from corpora.workspace import Bins, Seen, now
from files import fsync, write_json
from tokenizer import id_dtype, load_tokenizer, token_bytes
from verification import remember

BATCH = 10**6  # bytes of text that a process encodes at a time
SAMPLE = 64 * BATCH  # bytes of text; the tokenizer is trained on the train documents among them
PART = 16  # batches between two records of the state; a kill loses at most this much work


def build(config, corpus, content, request, work, start):
    """Write all files of a prepared directory into `work`, meta.json last. Reuses files that are already there."""
    print(f'{config.dataset}: {corpus.contents()}', flush=True)
    cut = Cut(*read_json(work / 'split.json')['cut']) if (work / 'split.json').exists() else None
    hash_only = corpus.own_splits or config.shard  # shards are prepared independently
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
    if normalizer := vocabulary.normalizer_of(read_json(work / 'tokenizer.json')):
        facts['normalizer'] = normalizer
        print(f'this tokenizer normalises all text to the Unicode form {normalizer}', flush=True)
    print(f'encoding, after {time.time() - start:.1f} s', flush=True)
    try:
        counts, files = encode_corpus(corpus, work, config, cut)
    except sqlite3.Error as error:
        raise UserError(f"{work / 'seen.sqlite'}: {error}: free some space on the disk and try again, "
                        f'or remove {work} and start again')
    if not counts['train'] or not counts['val']:
        documents = counts['train'] + counts['val']
        sizes = {split: sum(file['bytes'] for file in files[split]) for split in files}
        # The hash splits the whole corpus well, but the part that --max_tokens selects may fall into one split.
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
    remember(work, hashes_of(files), encoding.n_vocab)  # just written: no need to verify
    write_json(work / 'meta.json', {
        **request, 'vocab_size': encoding.n_vocab, **facts, 'eot_id': encoding.eot_token, 'documents': counts,
        'files': files, **extra, 'created': now(), 'seconds': round(time.time() - start, 1)})


def write_tokenizer(content, sample, config, work):
    """
    Write tokenizer.json: `content`, or a tokenizer made from the sample. Raises UserError if the disk is too small.
    """
    if config.tokenizer == 'char':
        content = vocabulary.characters(sample.characters)
        part = '' if sample.is_whole else f' in the first {SAMPLE // BATCH} MB (a new character after them is an error)'
        print(f'tokenizer: one token for each of the {len(sample.characters):,} characters{part}', flush=True)
    elif not content:
        print(f'tokenizer: training {config.vocab_size} tokens on {len(sample.train):,} documents', flush=True)
        content = vocabulary.train_bpe(sample.train, config.vocab_size)
    size = sum(sample.sizes.values()) / sample.share if sample.share else 0
    check_room(load_tokenizer(content), sample.train, size, config, work)
    write_json(work / 'tokenizer.json', content)


def split_by_position(corpus, config, documents, sizes, work):
    """
    Switch a small corpus to a split by position. Returns the Cut and writes it to split.json. Removes the files made
    with the split by hash. Returns None if the corpus is not small.

    documents, sizes: number of documents and {split: bytes} of the split by hash, for the message.
    """
    cut = find_cut(corpus, config, SAMPLE)
    if cut is None:
        return None
    share = sizes['val'] / max(1, sum(sizes.values()))
    noun = 'document' if documents == 1 else 'documents'
    print(f'split by position: val is the last part of the text, because a split of {documents} {noun} by hash '
          f'puts {share:.1%} of the text into val', flush=True)
    (work / 'state.json').unlink(missing_ok=True)  # first, because it describes the others
    for path in work.iterdir():
        if path.name != 'request.json':
            path.unlink()
    write_json(work / 'split.json', {'cut': cut})
    return cut


def empty_split(config, corpus, counts):
    """Error message for an empty split, with advice."""
    empty, other = ('val', 'larger') if counts['train'] else ('train', 'smaller')
    line = f"{config.dataset}: none of {counts['train'] + counts['val']} documents fell into the {empty} split: "
    if config.shard:
        return f'{line}leave --shard out for so small a corpus'
    if corpus.own_splits:
        return f'{line}read more documents (--max_documents, --max_tokens)'
    return f'{line}use more documents, or a {other} --val_ratio'


def hashes_of(files):
    """{name: sha256} of the files of both splits. files: the entries in meta.json."""
    return {file['name']: file['sha256'] for split in files.values() for file in split}


def shard_of(config):
    return tuple(map(int, (config.shard or '0/1').split('/')))


class Batch(NamedTuple):
    """About 1 MB of text, and the position in the corpus after it."""
    number: int
    position: tuple  # (documents read so far, position of the last one)
    counts: Counter  # documents read and dropped in this batch
    texts: dict  # {'train': [str], 'val': [str]}


def batches(corpus, config, is_new, cut=None, shard=(0, 1), number=0, position=(0, None)):
    """
    Yields the documents of one shard from `position` on, as Batches, assigned to train and val.

    The split and the shard of a document depend only on its text and the seed. So a document stays in its split when
    the corpus grows or its order changes. Duplicates fall into the same shard, and shards can be prepared
    independently. With a `cut`, a small corpus is split by position instead.

    is_new(digest, number): whether this digest is new. number: the number of the batch.
    """
    key, (i, n) = str(config.seed).encode()[:64], shard
    (read, at), counts, texts, size = position, Counter(), {'train': [], 'val': []}, 0
    for document in corpus.documents(at):
        if config.max_documents and not corpus.own_splits and read == config.max_documents:
            break
        read, at, text = read + 1, document.position, document.text
        if not text or text.isspace():
            if i == 0:  # a document without text has no digest: the first shard counts it
                counts.update(('read', document.dropped or 'empty'))
            continue
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16, key=key).digest()
        if int.from_bytes(digest[8:], 'little') % n != i:
            continue
        counts['read'] += 1
        if document.dropped:  # repaired and kept
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
    documents: int  # number of documents of both splits
    sizes: dict  # {split: bytes of text}
    share: float | None  # share of the corpus that was read, None: unknown
    is_whole: bool  # the sample is the whole corpus
    characters: set  # of both splits, for --tokenizer=char


def read_sample(corpus, config, enough, cut=None):
    """
    Read at least the first `enough` bytes of text, more if they have no train document. Every shard gets the same
    sample. Raises UserError if there is no text.
    """
    seen, train, characters, documents = set(), [], set(), 0
    sizes, share, is_whole = {'train': 0, 'val': 0}, None, True
    for batch in batches(corpus, config, lambda digest, _: digest not in seen and not seen.add(digest), cut):
        train += batch.texts['train']
        for split, texts in batch.texts.items():
            documents += len(texts)
            sizes[split] += sum(len(text.encode()) for text in texts)
            if config.tokenizer == 'char':
                characters.update(*texts)
        share = corpus.progress(batch.position[1])
        is_whole = sum(sizes.values()) < enough
        if not is_whole and train:
            break
    if not documents:
        raise UserError(f'{config.dataset}: the corpus is empty: no document has any text')
    return Sample(train, documents, sizes, share, is_whole, characters)


def check_room(encoding, sample, size, config, work):
    """
    Raises UserError if the disk has no room for the bins. Estimates their size from the bytes of text (`size`, 0:
    unknown) and the tokens per byte of the sample.
    """
    texts = sample[::max(1, len(sample) // 100)]
    texts = [text[:2**16] for text in texts]
    rate = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts) / sum(len(text.encode()) for text in texts)
    tokens = size * rate / shard_of(config)[1]
    if config.max_tokens:
        tokens = min(tokens or config.max_tokens, config.max_tokens / (1 - config.val_ratio))
    if not tokens:
        return
    need, free = id_dtype(encoding.n_vocab).itemsize * tokens, shutil.disk_usage(work).free
    print(f'about {tokens / 1e6:,.1f}M tokens, {need / 1e6:,.1f} MB on disk ({free / 1e9:,.1f} GB are free)',
          flush=True)
    if need > free:
        raise UserError(f'{work.parent}: about {need / 1e9:,.3f} GB of tokens, but only {free / 1e9:,.3f} GB are free: '
                        'free some space, choose another --out, or prepare less with --max_tokens or --max_documents')


def encode_corpus(corpus, work, config, cut=None):
    """
    Write the bins of both splits. Returns (document counts, {split: file entries}) for meta.json.

    Every PART batches the progress is recorded: first the bins, then the digests, then state.json with the positions in
    both. On resuming, everything beyond these positions is removed, because it comes from a killed preparation.
    """
    done = read_json(work / 'state.json') if (work / 'state.json').exists() else {}
    encoding = load_tokenizer(work)
    lengths, dtype, eot = token_bytes(encoding), id_dtype(encoding.n_vocab), encoding.eot_token
    kinds = ('read', 'unreadable', 'empty', 'duplicates', 'train', 'val')
    counts = Counter(dict.fromkeys(kinds, 0) | done.get('counts', {}))
    entries = done.get('files', {})
    bins = {split: Bins(work, split, lengths, dtype, entries.get(split, [])) for split in ('train', 'val')}
    number, position = done.get('batches', 0), done.get('position', (0, None))
    if number:
        print(f"continuing after {position[0]:,} documents, {bins['train'].tokens:,} train tokens", flush=True)
    budgets = token_budgets(config, cut)
    say = progress(corpus, config, position[1], bins)
    with Seen(work / 'seen.sqlite', number) as seen:
        stream = batches(corpus, config, seen.is_new, cut, shard_of(config), number, position)
        for batch, ids in encoded(stream, work, config.num_proc or min(os.cpu_count(), 16)):
            for split, budget in budgets.items():
                room = budget - bins[split].tokens
                if len(ids[split]) >= room:
                    ids[split] = ids[split][:room]
                    ids[split][-1:] = eot  # the document that reaches the budget is cut and terminated
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
    """
    {split: maximum tokens}. With a split by position, val follows all of train in the corpus, so val needs a budget,
    too.
    """
    if not config.max_tokens:
        return {}
    val = {'val': max(2, round(config.max_tokens * config.val_ratio / (1 - config.val_ratio)))} if cut else {}
    return {'train': config.max_tokens, **val}


def progress(corpus, config, position, bins):
    """Returns a function say(position, counts) that prints a progress line at most every five seconds."""
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
        left = f'{seconds * (1 - share) / (share - there):,.0f} s left' if share > there else 'time left unknown'
        size = bins['train'].dtype.itemsize * total['tokens'] / 1e9
        need = f' of {size / share:,.2f}' if share else ''
        print(f"  {counts['train'] + counts['val']:,} documents, {total['tokens'] / 1e6:,.1f}M tokens, "
              f"{(total['bytes'] - before['bytes']) / seconds / 1e6:.1f} MB/s, {size:,.2f}{need} GB of disk, {left}",
              flush=True)

    before = totals()
    return say


def encoded(stream, work, num_proc):
    """
    Yields (batch, its ids) in order. At most two batches per process are in flight. Pool.imap is not used because it
    would read the whole corpus ahead. The texts of a batch are freed once they are submitted.
    """
    if num_proc == 1:
        open_tokenizer(work)
        for batch in stream:
            yield batch, encode(batch.texts)
        return
    spawn = multiprocessing.get_context('spawn')  # not fork: it can hang after the tokenizer started threads
    try:
        with ProcessPoolExecutor(num_proc, spawn, start_worker, (work,)) as pool:
            ahead = deque()
            for batch in stream:
                # A worker inherits the signal mask of its parent. With SIGINT blocked, only the parent handles Ctrl-C.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    ids = pool.submit(encode, batch.texts)
                except (OSError, ValueError):
                    # The pool broke while it started a process, and closed its pipes.
                    # A second submit raises the real error.
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
        raise UserError(f'one of the {num_proc} encoding processes died (out of memory?): use a smaller --num_proc')


def start_worker(work):
    """Initialise a worker: load the tokenizer, and exit when the parent dies."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    open_tokenizer(work)


def open_tokenizer(work):
    global encoding  # one per process, used by `encode`
    encoding = load_tokenizer(work)


def encode(texts):
    """{split: [str]} -> {split: (n,) ids}. Every document is followed by the end-of-text token."""
    eot = np.array([encoding.eot_token], id_dtype(encoding.n_vocab))
    parts = {split: [part for document in documents for part in (tokenizer.encode(encoding, document), eot)]
             for split, documents in texts.items()}
    return {split: np.concatenate(part or [eot[:0]]) for split, part in parts.items()}
