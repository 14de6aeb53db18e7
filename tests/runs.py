"""Runs of train.py for the tests. Each is a fork of the test process, so it starts at once: torch is already imported."""
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it, which takes seconds: once here, not in every fork
import torch.distributed.fsdp  # noqa: F401  the same

import checkpoint
import configurator
import train
from model import FFNS, MIXERS

OUR_BLOCKS = {'gelu', 'relu2', 'swiglu', 'trix', 'bitnet', 'resonance', 'none', 'attention'}
HAS_ADDED_BLOCKS = {*FFNS, *MIXERS} != OUR_BLOCKS  # a fork, whose model.py is its own
SMALL = ['--vocab_size=300', '--block_size=16', '--n_layer=1', '--n_head=2', '--n_embd=16', '--ffn=trix', '--trix_tiles=4',
         '--device=cpu', '--batch_size=4', '--batch_tokens=128', '--warmup_steps=4', '--learning_rate=1e-2', '--dropout=0.1',
         '--eval_interval=5', '--eval_tokens=256', '--sample_interval=10', '--sample_tokens=8', '--save_interval=4', '--log_interval=1']


def arguments(corpus, out, *more):
    return [*SMALL, f'--dataset={corpus}', f'--out_dir={out}', '--max_steps=40', *more]


def start(argv, before=None, environment=None):
    """train.main(argv) in a fork, after before(). Its output goes to <out_dir>.console, or .console.<rank>."""
    environment = environment or {}

    def child():
        console = os.open(console_of(argv, environment.get('RANK')), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(console, 1), os.dup2(console, 2)
        sys.stdout = sys.stderr = open(1, 'w', buffering=1, closefd=False)
        sys.argv = ['train.py', *argv]
        os.environ.update(environment)
        if before:
            before()
        configurator.run(train.main)
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    return process


def start_ranks(argv, world, before=None, missing=()):
    """The processes that torchrun would start, those of `missing` left out."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    common = {'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    return [start(argv, before, {**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}) for rank in range(world) if rank not in missing]


def console_of(argv, rank=None):
    out = next(word.partition('=')[2] for word in reversed(argv) if word.startswith('--out_dir='))
    return f'{out}.console' + (f'.{rank}' if rank else '')


def end(processes, timeout=60):
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def finish(argv, before=None):
    """Exit code and output of a run."""
    code, = end([start(argv, before)])
    return code, Path(console_of(argv)).read_text()


def finish_ranks(argv, world, before=None):
    """Exit codes and outputs of the processes of a run."""
    codes = end(start_ranks(argv, world, before))
    return codes, [Path(console_of(argv, rank)).read_text() for rank in map(str, range(world))]


def lines(run, kind):
    return [line for line in map(json.loads, (Path(run) / 'metrics.jsonl').read_text().splitlines()) if line['kind'] == kind]


def lines_so_far(run):
    return (run / 'metrics.jsonl').read_bytes().splitlines() if (run / 'metrics.jsonl').exists() else []


def losses(run):
    return [(kind, line['step'], line['loss'], line.get('grad_norm')) for kind in ('train', 'eval') for line in lines(run, kind)]


def assert_same_run(out, whole):
    assert losses(out) == losses(whole)
    assert (out / 'samples.jsonl').read_text() == (whole / 'samples.jsonl').read_text()
    (_, a), (_, b) = checkpoint.find(out), checkpoint.find(whole)
    assert a['step'] == b['step'] == b['config']['max_steps'] and a['best'] == b['best']
    for key in b['model']:
        assert torch.equal(a['model'][key], b['model'][key]), key
    for i, state in b['optimizer']['state'].items():
        assert all(torch.equal(a['optimizer']['state'][i][key], value) for key, value in state.items())
