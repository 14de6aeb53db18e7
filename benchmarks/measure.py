"""
How things are measured: in turn, as ratios within a repeat, each model in a process of its own; tables and pictures in results/.

    times = interleaved({'ours': function, 'theirs': function}, repeats=15)     # functions return seconds
    report('mine', compare(times, 'theirs'), config)                            # -> results/<machine>/mine.json, and a table
"""
import functools
import itertools
import json
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, process
from datetime import date
from pathlib import Path

import numpy as np
import torch

from runtime import compiler
from runtime import device as hardware
import settings
from configurator import UserError
from kernels import autocast
from model import GPT
from optim import make_optimizers
from runtime.parallel import Group
from training import TrainStep

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'results'


def timed(function, device):
    hardware.synchronize(device)
    start = time.perf_counter()
    function()
    hardware.synchronize(device)
    return time.perf_counter() - start


def interleaved(candidates, repeats, warmup=2):
    """{name: function that returns seconds} -> {name: seconds of each repeat}, the candidates in turn so that drift hits all
    alike. Before that, `warmup` rounds that don't count."""
    rounds = [{name: function() for name, function in candidates.items()} for _ in range(warmup + repeats)]
    return {name: [seconds[name] for seconds in rounds[warmup:]] for name in candidates}


def compare(times, reference):
    """Rows of {name, seconds (median), spread (quartiles over the median), ratio, low, high}: the speed against `reference`
    within a repeat, its median and quartiles over the repeats."""
    rows = []
    for name, seconds in times.items():
        low, middle, high = map(float, np.percentile(seconds, (25, 50, 75)))
        ratio = map(float, np.percentile([b / a for a, b in zip(seconds, times[reference])], (50, 25, 75)))
        rows.append({'name': name, 'seconds': middle, 'spread': (high - low) / middle, **dict(zip(('ratio', 'low', 'high'), ratio))})
    return rows


def report(title, rows, config, options='', plot=None, name='', **more):
    """Print rows as a Markdown table and keep them, and `more`, in results/<machine>/<name or title>.json, with --quick in
    <..>_quick.json, with what is needed to measure them again, and what plot(rows, figure) draws in a .png beside it."""
    table = [list(rows[0])] + [[f'{v:.4g}' if isinstance(v, float) else f'{v:,}' if isinstance(v, int) else v
                                for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ['-' * width for width in widths])
    print('\n' + '\n'.join('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in table) + '\n')
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    where, when = machine(config), date.today().isoformat()
    folder, stem = RESULTS / slug(where), (name or title) + '_quick' * config.quick  # never in place of what took its time
    folder.mkdir(parents=True, exist_ok=True)
    result = {'command': f'python bench.py {title}{options}', 'machine': where, 'torch': torch.__version__, 'commit': commit, 'date': when}
    (folder / f'{stem}.json').write_text(json.dumps({**result, 'rows': rows, **more}, indent=1) + '\n')
    if plot:
        from matplotlib.figure import Figure  # here, because the process of every candidate imports this file
        figure = Figure(figsize=(13, 5), layout='constrained')
        plot(rows, figure)
        figure.suptitle(f'bench.py {title}{options}: {where}, {when}', fontsize=12)
        figure.savefig(folder / f'{stem}.png', dpi=120)


def machine(config):
    device = hardware.resolve(config.device, config.dtype)[0]
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        name = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), name)
    return f'{name}, {torch.get_num_threads()} threads'


def slug(machine):
    """'Intel(R) Xeon(R) Processor @ 2.50GHz, 2 threads' -> 'intel-xeon-2.50ghz-2-threads'"""
    return re.sub(r'[^a-z0-9.]+', '-', re.sub(r'\((r|tm)\)|\b(cpu|processor)\b', ' ', machine.lower())).strip('-')


def whole_process(words, **options):
    """Run a program -> seconds, GB of the largest of its processes, what it printed. UserError if it fails."""
    # By way of a small Python, because Linux charges a new process with the memory of the one that starts it.
    wait = ("import os, sys, time; start = time.perf_counter(); pid = os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]); "
            "_, status, usage = os.wait4(pid, 0); "
            "print(time.perf_counter() - start, usage.ru_maxrss, file=sys.stderr); sys.exit(os.waitstatus_to_exitcode(status))")
    with tempfile.TemporaryFile('w+') as out:
        command = [sys.executable, '-S', '-c', wait, *map(str, words)]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, **options)
        out.seek(0)
        said = out.read()
    *errors, last = done.stderr.splitlines()
    if done.returncode:
        raise UserError(f"{' '.join(map(str, words[:3]))} failed: {(errors or said.splitlines() or [''])[-1]}")
    seconds, kilobytes = last.split()
    return float(seconds), int(kilobytes) / 1e6, said


def training_step(model_config, rows, device, dtype, compile='false'):
    """-> (model, function): a new model, and one optimizer step of it on `rows` sequences of random tokens. compile: as in train.py."""
    torch.manual_seed(0)
    model, config = GPT(model_config).to(device), settings.load([])
    train_step = TrainStep(model, make_optimizers(model, config, device), config, device, dtype, Group())
    if compiler.choose(compile, device)[0]:
        train_step.forward = compiler.compiled(model)
    idx = torch.randint(model_config.vocab_size, (rows, model_config.block_size + 1)).to(device)
    batches = itertools.repeat((idx[:, :-1], idx[:, 1:]))

    def step():
        train_step.update(train_step.judge(train_step.backward(0, batches, 1)))
    step.optimizer = train_step.optimizers['optimizer']
    return model, step


@torch.no_grad()
def decoding(model, device, dtype):
    """A generator: first it fills the cache of one sequence up to 64 positions before the end, then it adds a token a time."""
    cache, idx = model.eval().new_cache(1), torch.randint(model.config.vocab_size, (1, model.config.block_size - 64), device=device)
    while True:
        with autocast(device, dtype):
            model(idx, cache=cache)
        yield
        idx = idx[:, :1]


def build(model_config, rows, device, dtype, threads, compile):
    """In the process of a model: make it, and the jobs that `do` does there."""
    torch.set_num_threads(threads)
    device, dtype, _ = hardware.resolve(device, dtype)
    model, step = training_step(model_config, rows, device, dtype, compile)
    tokens = decoding(model, device, dtype)
    do.jobs = {'train': lambda: timed(step, device), 'first': functools.cache(lambda: timed(step, device)), 'peak': lambda: hardware.peak_memory_gb(device),
               'prefill': lambda: timed(lambda: next(decoding(model, device, dtype)), device),
               'decode': lambda: timed(lambda: [next(tokens) for _ in range(8)], device) / 8}


def do(job):
    time.sleep(0.02)  # the OpenMP threads of the process that was at work before spin for a few ms
    return do.jobs[job]()


def side_by_side(title, models, rows, repeats, config, jobs=('train',), dtypes=None, compiles=None):
    """
    models {name: GPTConfig} -> ({name: seconds of each repeat} for each of the jobs, in turn; {name: peak GB}). Each model has a
    process of its own, so that its peak of memory is its own, too. Jobs: train (a step on `rows` sequences), first (the first of
    them, which compiles), prefill and decode (one sequence: all but its last 64 tokens at once, a further token). dtypes {name: dtype},
    else config.dtype; compiles {name: 'true' or 'false'}, else 'auto', as in train.py.
    """
    print(f'{title}: {repeats} repeats on {hardware.resolve(config.device, config.dtype)[2]}', flush=True)
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['torch._dynamo'])  # seconds to import, and every optimizer needs it: once for all
    pools = {name: ProcessPoolExecutor(1, server, build, (
        model, rows, config.device, (dtypes or {}).get(name, config.dtype), torch.get_num_threads(),
        (compiles or {}).get(name, 'auto'))) for name, model in models.items()}

    def each(job):
        return {name: lambda pool=pool: pool.submit(do, job).result() for name, pool in pools.items()}
    try:
        times = [interleaved(each(job), repeats, warmup=1) for job in jobs]
        return *times, {name: peak() for name, peak in each('peak').items()}
    except process.BrokenProcessPool:
        raise UserError(f'{title}: the process of a model came to its end; if it gave no reason, the machine is out of memory') from None
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


def sizes(model):
    table = model.parameter_table()
    return {'parameters': sum(total for _, total, _ in table), 'used by a token': sum(used for *_, used in table),
            'MFLOP/token': model.flops_per_token() / 1e6}


def figures(**spread):
    """Mean and standard deviation over runs: figures(loss=[3, 4]) -> {'loss': 3.5, 'loss sd': 0.71}"""
    return {name: value for key, values in spread.items() for name, value in
            ((key, statistics.mean(values)), (f'{key} sd', statistics.stdev(values) if len(values) > 1 else 0.0))}
