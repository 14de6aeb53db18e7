"""
How bench.py measures: candidates run in turn, ratios compare within a repeat, and each model has its own process.

    times = interleaved({'ours': function, 'theirs': function}, repeats=15)  # the functions return seconds
    report('mine', compare(times, 'theirs'), config)  # prints a table and writes <config.out>/<machine>/mine.json
"""
import functools
import itertools
import json
import multiprocessing
import platform
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, process
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

import settings
from benchmarks.tables import markdown
from configurator import UserError
from files import replacing
from kernels import autocast
from model import GPT, BitLinear, GPTConfig
from optim import make_optimizers
from runtime import compiler, plan
from runtime import device as hardware
from runtime.parallel import OneProcess
from runtime.runlog import duration
from training import TrainStep

ROOT = Path(__file__).parent.parent


def timed(function, device):
    """Seconds of a call, until the device has finished."""
    hardware.synchronize(device)
    start = time.perf_counter()
    function()
    hardware.synchronize(device)
    return time.perf_counter() - start


class Progress:
    """
    How much of a benchmark is done, and the time left, on standard error. A terminal shows one line that changes. A
    file gets a line every half minute.
    """

    def __init__(self, title, total):
        self.title, self.total, self.done = title, total, 0
        self.start = self.shown = time.monotonic()

    def step(self):
        """Call after each of the `total` parts."""
        self.done += 1
        now = time.monotonic()
        left = (now - self.start) / self.done * (self.total - self.done)
        text = f'{self.title}: {self.done} of {self.total}, {duration(left)} left'
        if sys.stderr.isatty():
            end = '\r' if self.done < self.total else '\r\033[K'  # the last one clears the line
            print(f'\r\033[K{text}', end=end, file=sys.stderr, flush=True)
        elif now - self.shown > 30 and self.done < self.total:
            self.shown = now
            print(text, file=sys.stderr, flush=True)


def interleaved(candidates, repeats, warmup=2, title='rounds'):
    """
    {name: function that returns seconds} -> {name: seconds of each repeat}. Candidates run in turn, so that a drift
    of the machine's speed affects all of them alike. The first `warmup` rounds do not count.
    """
    progress, rounds = Progress(title, (warmup + repeats) * len(candidates)), []
    for _ in range(warmup + repeats):
        rounds.append({})
        for name, function in candidates.items():
            rounds[-1][name] = function()
            progress.step()
    return {name: [seconds[name] for seconds in rounds[warmup:]] for name in candidates}


def compare(times, reference):
    """
    {name: seconds of each repeat} -> rows of {name, seconds, spread, ratio, low, high}: the median of the seconds,
    their quartiles over that, and the speed against `reference` within a repeat: its median and quartiles over the
    repeats.
    """
    rows = []
    for name, seconds in times.items():
        low, middle, high = map(float, np.percentile(seconds, (25, 50, 75)))
        speeds = [b / a for a, b in zip(seconds, times[reference])]
        slow, ratio, fast = map(float, np.percentile(speeds, (25, 50, 75)))
        rows.append({'name': name, 'seconds': middle, 'spread': (high - low) / middle, 'ratio': ratio, 'low': slow,
                     'high': fast})
    return rows


def check_can_write(folder):
    """Create the folder of the tables and write to it. OSError if that fails: before hours of measuring, not after."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def report(title, rows, config, options='', plot=None, name='', **more):
    """
    Print rows as a Markdown table and write <config.out>/<machine>/<name or title>.json: the rows, `more`, and what is
    needed to measure them again. plot(rows, figure) draws a .png beside it. With --quick the files end in _quick, so
    that they never replace a longer measurement.
    """
    print(f'\n{markdown(rows)}')
    stem = name or title
    command = f'bench.py {title}{options}'
    if config.quick:
        stem += '_quick'
        command += ' --quick'
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    where, today = machine(config), date.today().isoformat()
    folder = Path(config.out) / slug(where)
    folder.mkdir(parents=True, exist_ok=True)
    result = {'command': f'python {command}', 'machine': where, 'hardware': facts(config.device, config.dtype),
              'torch': torch.__version__, 'commit': commit.stdout.strip(), 'date': today, 'rows': rows, **more}
    with replacing(folder / f'{stem}.json') as file:
        file.write((json.dumps(result, indent=1) + '\n').encode())
    written = f'{folder / stem}.json'
    if plot:
        from matplotlib.figure import Figure  # here, because the process of every candidate imports this file
        figure = Figure(figsize=(13, 5), layout='constrained')
        plot(rows, figure)
        figure.suptitle(f'{command}: {where}, {today}', fontsize=12)
        figure.savefig(folder / f'{stem}.png', dpi=120)
        written += ' and .png'
    print(f'written to {written}', flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The machine

def machine(config):
    """The name of the GPU, or that of the CPU with the number of threads."""
    device = hardware.resolve(config.device, config.dtype)[0]
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), name)
    return f'{name}, {torch.get_num_threads()} threads'


@functools.cache
def facts(device, dtype):
    """The hardware of a measurement: memory, driver, and the measured speed of matrix products in this precision."""
    device, dtype, _ = hardware.resolve(device, dtype)
    _, speed = plan.matmul_flops(device, dtype, duration=0.3)
    found = {'matmul TFLOP/s': speed / 1e12, 'matmul dtype': plan.name_of(dtype)}
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        found |= {'gpu': properties.name, 'memory GB': properties.total_memory / 1e9, 'cuda': torch.version.cuda,
                  'capability': f'{properties.major}.{properties.minor}', 'driver': driver_version()}
    else:
        found |= {'cores': os.cpu_count(), 'threads': torch.get_num_threads(),
                  'memory GB': plan.room(device, 0)[0] / 1e9}
    return found


def driver_version():
    """The version of NVIDIA's driver. None without nvidia-smi."""
    if not shutil.which('nvidia-smi'):
        return None
    done = subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True,
                          text=True)
    return done.stdout.split('\n')[0].strip() or None


def slug(machine):
    """'Intel(R) Xeon(R) Processor @ 2.50GHz, 2 threads' -> 'intel-xeon-2.50ghz-2-threads'"""
    name = re.sub(r'\((r|tm)\)|\b(cpu|processor)\b', ' ', machine.lower())
    return re.sub(r'[^a-z0-9.]+', '-', name).strip('-')


def whole_process(words, **options):
    """Run a program -> seconds, GB of its largest process, its output. UserError if it fails."""
    # A small Python starts it, because Linux charges a new process with the memory of the process that starts it.
    wait = ("import os, sys, time; start = time.perf_counter(); "
            "pid = os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]); "
            "_, status, usage = os.wait4(pid, 0); "
            "print(time.perf_counter() - start, usage.ru_maxrss, file=sys.stderr); "
            "sys.exit(os.waitstatus_to_exitcode(status))")
    with tempfile.TemporaryFile('w+') as file:
        command = [sys.executable, '-S', '-c', wait, *map(str, words)]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, **options)
        file.seek(0)
        output = file.read()
    *errors, last = done.stderr.splitlines()
    if done.returncode:
        reason = (errors or output.splitlines() or [''])[-1]
        raise UserError(f"{' '.join(map(str, words[:3]))} failed: {reason}")
    seconds, kilobytes = last.split()
    return float(seconds), int(kilobytes) / 1e6, output


# ----------------------------------------------------------------------------------------------------------------------
# Models side by side, each in a process of its own

@dataclass(frozen=True)
class Candidate:
    """A model of `side_by_side`, and how it is trained."""
    shape: GPTConfig
    batch_size: int
    dtype: str = ''  # '': config.dtype
    compile: str = 'auto'  # as in train.py
    options: object = None  # a run's options, for its optimizer and activation checkpointing; None: the defaults


def alike(models, batch_size):
    """{name: GPTConfig} -> {name: Candidate} that differ in nothing but the model"""
    return {name: Candidate(shape, batch_size) for name, shape in models.items()}


def training_step(model_config, batch_size, device, dtype, compile='false', options=None):
    """
    -> (model, function): a new model, and a function that takes one optimizer step on `batch_size` sequences of random
    tokens. compile: as in train.py. options: as in Candidate.
    """
    torch.manual_seed(0)
    config = options or settings.load([])
    model = GPT(model_config).to(device)
    model.activation_checkpointing = config.activation_checkpointing
    train_step = TrainStep(model, make_optimizers(model, config, device), config, device, dtype, OneProcess())
    if compiler.choose(compile, device)[0]:
        train_step.forward = compiler.compiled(model)
    idx = torch.randint(model_config.vocab_size, (batch_size, model_config.block_size + 1)).to(device)
    batches = itertools.repeat((idx[:, :-1], idx[:, 1:]))

    def step():
        train_step.update(train_step.judge(train_step.backward(0, batches, 1)))
    step.optimizer = next(iter(train_step.optimizers.values()))
    return model, step


@torch.no_grad()
def decoding(model, device, dtype):
    """
    A generator: first it fills the cache of one sequence up to the last 64 positions, then each step adds a token.
    """
    cache = model.eval().new_cache(1)
    fixed = model.fixed_weights()
    idx = torch.randint(model.config.vocab_size, (1, model.config.block_size - 64), device=device)
    while True:
        with autocast(device, dtype), fixed:
            model(idx, cache=cache)
        yield
        idx = idx[:, :1]


def build(candidate, device, dtype, threads):
    """In the process of a candidate: make its model, and the jobs of `do`."""
    torch.set_num_threads(threads)
    device, dtype, _ = hardware.resolve(device, candidate.dtype or dtype)
    model, step = training_step(candidate.shape, candidate.batch_size, device, dtype, candidate.compile,
                                candidate.options)
    tokens = decoding(model, device, dtype)
    do.jobs = {
        'train': lambda: timed(step, device),
        'first': functools.cache(lambda: timed(step, device)),
        'peak': lambda: hardware.peak_memory_gb(device),
        'decode': lambda: timed(lambda: [next(tokens) for _ in range(8)], device) / 8}


def do(job):
    time.sleep(0.02)  # the OpenMP threads of the previous process still spin for a few ms
    return do.jobs[job]()


def side_by_side(title, candidates, repeats, config, jobs=('train',)):
    """
    {name: Candidate} -> {name: seconds of each repeat} for each of the jobs, then {name: peak GB}. Each candidate has
    its own process, so that its peak memory is its own, too. The jobs: `train`, a step; `first`, the first step, which
    compiles; `decode`, one more token of a sequence with a full context but for 64 tokens.
    """
    print(f'{title}: {repeats} repeats on {hardware.resolve(config.device, config.dtype)[2]}', flush=True)
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['torch._dynamo'])  # every optimizer imports it, which takes seconds: once for all
    pools = {name: ProcessPoolExecutor(1, server, build,
                                       (candidate, config.device, config.dtype, torch.get_num_threads()))
             for name, candidate in candidates.items()}

    def functions(job):
        return {name: lambda pool=pool: pool.submit(do, job).result() for name, pool in pools.items()}
    try:
        times = [interleaved(functions(job), repeats, warmup=1, title=f'{title}, {job}') for job in jobs]
        return *times, {name: peak() for name, peak in functions('peak').items()}
    except process.BrokenProcessPool:
        raise UserError(f'{title}: the process of a model has died. If there is no message above, it ran out of '
                        'memory') from None
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Columns

def sizes(model):
    table = model.parameter_table()
    return {'parameters': sum(total for _, total, _ in table), 'used by a token': sum(used for *_, used in table),
            'MFLOP/token': model.flops_per_token() / 1e6}


def packed_bytes(model):
    """Bytes of the weights: ternary codes in 2 bits, their scales in fp32, all others in bf16. Without buffers."""
    # {id of a ternary weight: its number of scales}
    scales = {id(m.weight): 1 for m in model.modules() if isinstance(m, BitLinear)}
    scales |= {id(p): len(p) for trix in model.trix_layers() for p in (trix.up, trix.down)}
    ternary = sum(-(-p.numel() // 4) + 4 * scales[id(p)] for p in model.parameters() if id(p) in scales)
    return ternary + sum(2 * p.numel() for p in model.parameters() if id(p) not in scales)


def mean_and_sd(**columns):
    """Mean and standard deviation over runs: mean_and_sd(loss=[3, 4]) -> {'loss': 3.5, 'loss sd': 0.71}"""
    row = {}
    for name, values in columns.items():
        row[name] = statistics.mean(values)
        row[f'{name} sd'] = statistics.stdev(values) if len(values) > 1 else 0.0
    return row
