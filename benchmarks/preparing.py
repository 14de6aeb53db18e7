"""
Preparing and opening data: the command data of bench.py.

It writes three tables: <config.out>/<machine>/data.json (encoding), data_memory.json (preparing) and data_shards.json
(opening shards).
"""
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch

from corpora import building
from benchmarks.measure import ROOT, compare, interleaved, report, timed, whole_process
from corpora import corpus
from corpora.prepared import open_data
from corpora.vocabulary import train_bpe
from runtime import device as hardware
from tokenizer import EOT, PATTERN, load_tokenizer

# A pool of one new process, which starts with the memory of Python and torch alone.
new_process = partial(ProcessPoolExecutor, 1, multiprocessing.get_context('spawn'))


def data(config):
    """
    What prepare.py and data.py do: the speed of encoding text, the memory to prepare a small and a large corpus and
    to train a byte-level BPE, and shards opened and read.
    """
    with tempfile.TemporaryDirectory() as folder:
        encoding_speed(folder, config)
    with tempfile.TemporaryDirectory() as folder:
        preparation_memory(folder, config)
    with tempfile.TemporaryDirectory() as folder, new_process() as pool:
        report('data', [pool.submit(opened_shards, folder).result()], config, name='data_shards')


def texts_of_pylib(folder, megabytes):
    """
    The path of a .jsonl with so much text: the standard library, again and again. Each copy of a file ends with a
    line of its own, so that no document is a duplicate.
    """
    texts = [document.text for document in corpus.pylib_corpus().documents() if document.text]
    path = Path(folder) / f'{megabytes}.jsonl'
    size = 0
    with open(path, 'w') as file:
        for copy in itertools.count():
            for text in texts:
                if size >= megabytes * 1e6:
                    return path
                text += f'# {copy}\n'
                size += len(text.encode())
                file.write(json.dumps({'text': text}) + '\n')


def read_texts(path):
    with open(path) as file:
        return [json.loads(line)['text'] for line in file]


def run_prepare(path, out, *words):
    """Run prepare.py on a .jsonl -> seconds, and GB of its largest process."""
    command = [sys.executable, ROOT / 'prepare.py', f'--dataset=text:{path}', f'--out={out}', *words]
    seconds, peak, _ = whole_process(command)
    return seconds, peak


# ----------------------------------------------------------------------------------------------------------------------
# The speed of encoding

def encoding_speed(folder, config):
    """
    MB/s of text with a BPE of 8,192: one thread of tiktoken, one thread in each of several processes, the processes
    of prepare.py, and prepare.py from file to file. `of the machine`: against as many threads of tiktoken at the same
    time, each in a process that has its text already.
    """
    processes = min(os.cpu_count(), 16)
    repeats = 2 if config.quick else max(1, config.repeats // 2)
    megabytes = 100
    path = texts_of_pylib(folder, megabytes)
    texts = read_texts(path)
    Path(folder, 'tokenizer.json').write_text(json.dumps(train_bpe(texts, 8192)))
    batches = [texts[i::200] for i in range(100)]  # half a megabyte each

    def run_from_file_to_file():
        shutil.rmtree(Path(folder, 'out'), ignore_errors=True)
        seconds, _ = run_prepare(path, f'{folder}/out', f'--tokenizer={folder}/tokenizer.json')
        return seconds / megabytes

    with contextlib.ExitStack() as exit_stack:
        pools = [exit_stack.enter_context(new_process(initializer=start_encoding, initargs=(folder, path)))
                 for _ in range(processes)]

        def run_tiktoken(n):
            futures = [pool.submit(encoding_seconds) for pool in pools[:n]]
            return max(future.result() for future in futures) / n  # the slowest of them
        times = interleaved({
            'one thread of tiktoken': partial(run_tiktoken, 1),
            f'{processes} of them': partial(run_tiktoken, processes),
            f'{processes} processes of prepare.py': partial(seconds_of_prepare, batches, folder, processes),
            'prepare.py, file to file': run_from_file_to_file}, repeats, warmup=1)
    one_thread, all_threads, our_processes, _ = times
    rows = []
    for row, to_machine, to_ours in zip(*(compare(times, name) for name in (one_thread, all_threads, our_processes))):
        rows.append({'name': row['name'], 'MB/s': 1 / row['seconds'], 'ratio': row['ratio'], 'low': row['low'],
                     'high': row['high'], 'of the machine': to_machine['ratio'], 'of the processes': to_ours['ratio']})
    report('data', rows, config)


def seconds_of_prepare(batches, folder, processes):
    """Seconds a megabyte that the processes of prepare.py take to encode batches of texts, once they are at work."""
    megabytes = [sum(len(text.encode()) for text in batch) / 1e6 for batch in batches]
    stream = (building.Batch(i, None, None, {'train': batch}) for i, batch in enumerate(batches))
    encoded = building.encoded(stream, folder, processes)
    first = 2 * processes  # batches in which the processes start and load the tokenizer
    for _ in range(first):
        next(encoded)
    start = time.perf_counter()
    for _ in encoded:
        pass
    return (time.perf_counter() - start) / sum(megabytes[first:])


def start_encoding(folder, path):
    """
    Prepare a process for `encoding_seconds`: the tokenizer of the folder with the split pattern as tiktoken ships it
    for GPT-2, and 25 MB of the text.
    """
    global encoding, sample
    ours = load_tokenizer(folder)
    ranks = {ours.decode_single_token_bytes(token): token for token in range(ours.eot_token)}
    encoding = tiktoken.Encoding('plain', pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT: ours.eot_token})
    sample = read_texts(path)[::4]


def encoding_seconds():
    """Seconds a megabyte of tiktoken's usual call."""
    start = time.perf_counter()
    for text in sample:
        encoding.encode_ordinary(text)
    return (time.perf_counter() - start) / sum(len(text.encode()) for text in sample) * 1e6


# ----------------------------------------------------------------------------------------------------------------------
# The memory of preparing

def preparation_memory(folder, config):
    """Seconds and peak memory of prepare.py on a small and a large corpus, and of training the tokenizer."""
    small, large = (30, 60) if config.quick else (250, 1000)  # MB
    given = f'--tokenizer={folder}/prepared0/tokenizer.json'  # of the first case
    cases = ((large, '--vocab_size=32000', ', with a BPE of 32,000'), (large, given, ''), (small, given, ''))
    rows = []
    for i, (megabytes, word, how) in enumerate(cases):
        path = texts_of_pylib(folder, megabytes)
        seconds, peak = run_prepare(path, f'{folder}/prepared{i}', word)
        rows.append({'what': f'prepare.py on {megabytes:,} MB{how}', 'seconds': seconds, 'peak GB': peak})
    with new_process() as pool:
        seconds, peak, megabytes = pool.submit(bpe_training, 32_000, 30).result()
    rows.append({'what': f'a BPE of 32,000 on {megabytes:.0f} MB', 'seconds': seconds, 'peak GB': peak})
    report('data', rows, config, name='data_memory')


def bpe_training(vocab_size, megabytes):
    """Train a BPE on that much of the standard library, or all of it -> seconds, peak GB of the process, MB of text."""
    texts, size = [], 0
    for document in corpus.pylib_corpus().documents():
        if document.text and size < megabytes * 1e6:
            texts.append(document.text)
            size += len(document.text.encode())
    start = time.perf_counter()
    train_bpe(texts, vocab_size)
    return time.perf_counter() - start, hardware.peak_memory_gb(torch.device('cpu')), size / 1e6


# ----------------------------------------------------------------------------------------------------------------------
# Shards

def opened_shards(folder):
    """Open 1,000 files of 100 x 32,768 ids, and read random batches of 4 rows -> a row of the table."""
    path = Path(folder) / 'shards'
    write_shards(path)
    cpu = torch.device('cpu')
    before = hardware.peak_memory_gb(cpu)
    start = time.perf_counter()
    shards = open_data(path, 32_768, 50_257)
    opened = time.perf_counter() - start
    after = hardware.peak_memory_gb(cpu)
    seconds = [timed(lambda: shards.batch(step, 0, 4, 4), cpu) for step in range(200)]
    return {'files': 1000, 'tokens': shards.train_tokens, 'seconds to open': opened, 'GB more': after - before,
            'ms a batch of 4 rows': 1000 * statistics.median(seconds), 'slowest of 200': 1000 * max(seconds)}


def write_shards(path):
    """
    990 shards of the train split and 10 of the val split. The ids are holes in the files, so they take no disk space.
    """
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {'descr': '<u2', 'fortran_order': False, 'shape': (100, 32_768)})
    size = head.tell() + 2 * 100 * 32_768
    files = {}
    for split, count in (('train', 990), ('val', 10)):
        (path / split).mkdir(parents=True)
        files[split] = []
        for i in range(count):
            name = f'{split}/{i:04d}.npy'
            (path / name).write_bytes(head.getvalue())
            os.truncate(path / name, size)
            files[split].append({'name': name, 'first': 0, 'rows': 100, 'tokens': 100 * 32_768, 'bytes': size,
                                 'max_id': 0, 'sha256': ''})
    meta = {'version': 1, 'kind': 'shards', 'source': {}, 'vocab_size': 50_257, 'row': 32_768, 'files': files}
    (path / 'meta.json').write_text(json.dumps(meta))
