"""
Whole runs of train.py: the commands scaling, plan and loop of bench.py.

Each command is a function of a BenchConfig. It prints a table and writes <config.out>/<machine>/<command>.json.
"""
import contextlib
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import checkpoint
import settings
from benchmarks.measure import ROOT, Progress, interleaved, report, timed, training_step, whole_process
from benchmarks.quality import TINY
from configurator import UserError
from files import replacing
from model import GPTConfig
from runtime import device as hardware
from runtime import runlog
from runtime.runlog import read_lines


def training_run(folder, processes, config, *words):
    """
    Start train.py on trix_tiny, or several processes of it under torchrun, with one thread each on a CPU. It trains
    and logs and does nothing else; its metrics are in the folder, its output in <folder>.txt. -> subprocess.Popen
    """
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    command = [sys.executable, *launcher, ROOT / 'train.py', ROOT / 'config' / TINY, f'--out_dir={folder}',
               f'--device={config.device}', f'--dtype={config.dtype}', '--warmup_steps=0', '--eval_interval=0',
               '--sample_interval=0', '--save_interval=0', *words]
    with open(f'{folder}.txt', 'w') as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                env={**os.environ, 'OMP_NUM_THREADS': '1'})


def training_lines(folder, *processes):
    """Wait for the processes, then return the training lines of the run in the folder. UserError if one fails."""
    for started in processes:
        if started.wait():
            raise UserError(f'{folder}: {Path(f"{folder}.txt").read_text().strip().splitlines()[-1]}')
    return [line for line in read_lines(Path(folder) / 'metrics.jsonl') if line['kind'] == 'train']


# ----------------------------------------------------------------------------------------------------------------------
# Several processes

def scaling(config):
    """
    trix_tiny with 16 x 256 tokens a step in each process: 1, 2, 4 and 8 processes in turn, as far as there are GPUs
    or cores. `efficiency`: tokens/s against that many times one process alone. `of the machine`: against that many
    separate runs at the same time. These share memory and clock, too, so it shows what DDP itself costs.
    """
    device = hardware.resolve(config.device, config.dtype)[0]
    available = torch.cuda.device_count() if device.type == 'cuda' else os.cpu_count()
    counts = [n for n in (1, 2, 4, 8) if n <= available]
    repeats = 1 if config.quick else max(1, config.repeats // 5)
    together = {n: [] for n in counts}  # tokens/s of each repeat
    separate = {n: [] for n in counts}
    progress = Progress('runs of all process counts', repeats * len(counts))
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for n in counts:
                together[n].append(speed_together(f'{folder}/{repeat}_{n}', n, config))
                separate[n].append(speed_separately(f'{folder}/{repeat}_{n}', n, config, device) if n > 1
                                   else together[n][-1])
                progress.step()
    rows = []
    for n in counts:
        of_the_machine = [a / b for a, b in zip(together[n], separate[n])]
        rows.append({
            'processes': n, 'tokens/s': statistics.median(together[n]),
            'efficiency': statistics.median(a / n / b for a, b in zip(together[n], together[1])),
            'of the machine': statistics.median(of_the_machine),
            'low': min(of_the_machine), 'high': max(of_the_machine)})
    report('scaling', rows, config)


def speed_together(out, n, config):
    """Tokens/s of one run with n processes."""
    words = f'--batch_tokens={n * 4096}', '--max_steps=20', '--log_interval=1'
    return median_speed(training_lines(out, training_run(out, n, config, *words)))


def speed_separately(out, n, config, device):
    """Tokens/s of n runs of one process each at the same time, each with a GPU of its own, added up."""
    outs = [f'{out}_{i}' for i in range(n)]
    runs = []
    for i in range(n):
        where = f'--device=cuda:{i}' if device.type == 'cuda' else f'--device={config.device}'
        runs.append(training_run(outs[i], 1, config, '--batch_tokens=4096', '--max_steps=20', '--log_interval=1',
                                 where))
    return sum(median_speed(training_lines(out, *runs)) for out in outs)


def median_speed(lines):
    return statistics.median(line['tokens_per_s'] for line in lines[5:])  # the first steps warm up


# ----------------------------------------------------------------------------------------------------------------------
# Plans

PLANNED = {  # name: config file and command line
    'trix_tiny': (TINY,),
    'dense_tiny': ('dense_tiny.py',),
    'speedrun_tiny': ('speedrun_tiny.py',),
    'wikitext_tiny': ('wikitext_tiny.py', '--dataset=pylib', '--tokenizer=bpe'),  # memory and time are the same
    'swiglu, 6 x 256': (
        'dense_tiny.py', '--ffn=swiglu', '--n_layer=6', '--n_embd=256', '--batch_size=8', '--batch_tokens=2048'),
    'trix, 4 x 256, context 512, two micro-steps': (
        TINY, '--n_layer=4', '--n_embd=256', '--trix_hidden=256', '--block_size=512', '--batch_size=4',
        '--batch_tokens=4096'),
    'bitnet, 4 x 256': ('dense_tiny.py', '--ffn=swiglu', '--linear=bitnet', '--n_layer=4', '--n_embd=256'),
    'resonance, 4 x 192, context 1024': (
        'dense_tiny.py', '--mixer=resonance', '--n_layer=4', '--n_embd=192', '--block_size=1024', '--batch_size=4',
        '--batch_tokens=4096'),
    'gelu, 8 x 512, checkpointing': (
        'dense_tiny.py', '--n_layer=8', '--n_embd=512', '--batch_size=8', '--batch_tokens=2048',
        '--activation_checkpointing=true')}


def plan(config):
    """
    What `train.py --plan` estimates for PLANNED, and what a run of 14 steps then takes: GB on top of Python and torch
    (the plan's `base`), and seconds a step, the median of the last ten.
    """
    rows, runs = [], list(PLANNED.items())[:2 if config.quick else None]
    progress = Progress('plans and their runs', len(runs))
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (file, *words)) in enumerate(runs):
            command = [sys.executable, ROOT / 'train.py', ROOT / 'config' / file, *words, f'--device={config.device}',
                       f'--dtype={config.dtype}']
            _, _, page = whole_process([*command, '--plan'])
            base_gb = planned_gb(page, 'base')
            planned = planned_gb(page, 'total') - base_gb
            planned_seconds = float(re.search(r'^time: ([\d.,]+) s', page, re.M)[1].replace(',', ''))
            out = Path(folder, str(i))
            whole_process([*command, f'--out_dir={out}', '--max_steps=14', '--warmup_steps=0', '--log_interval=1',
                           '--eval_interval=0', '--sample_interval=0', '--save_interval=0', '--compile=false'])
            lines = training_lines(out)
            memory = max(line['mem_gb'] for line in lines) - base_gb
            seconds = statistics.median(lines[0]['tokens'] / line['tokens_per_s'] for line in lines[4:])
            row = {'planned GB': planned, 'GB': memory, 'planned/measured GB': planned / memory,
                   'planned s/step': planned_seconds, 's/step': seconds,
                   'planned/measured s': planned_seconds / seconds}
            print(name, *(f'{value:.3g}' for value in row.values()), flush=True)
            rows.append({'run': name, **row})
            progress.step()
    report('plan', rows, config)


def planned_gb(page, key):
    """GB in the line `key` of what --plan prints. 0 if there is no such line."""
    line = re.search(rf'^  {key} +([\d.]+) (.B)', page, re.M)
    return float(line[1]) * {'GB': 1, 'MB': 1e-3, 'kB': 1e-6}[line[2]] if line else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# The loop

def loop(config):
    """What trix_tiny's loop does besides the step: milliseconds each time, and their percentage of the run's time."""
    tiny = settings.load([str(ROOT / 'config' / TINY)])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = training_run(f'{folder}/run', 1, config, '--max_steps=60')
        lines = training_lines(f'{folder}/run', run)[1:]
        times, checkpoint_bytes = surroundings(Path(folder, 'log'), tiny, lines[-1], config)
    step = tiny.batch_tokens / statistics.median(line['tokens_per_s'] for line in lines)
    wait = statistics.median(line['loader_wait'] for line in lines)
    every = {'statistics': tiny.log_interval, 'metrics, log, status': tiny.log_interval,
             'checkpoint': tiny.save_interval, 'its bytes written': tiny.save_interval}
    rows = [{'what': 'step', 'ms': 1000 * step, 'every steps': 1, 'percent of the time': 100.0},
            {'what': 'waiting for a batch', 'ms': 1000 * wait * step, 'every steps': 1,
             'percent of the time': 100 * wait}]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append({'what': name, 'ms': 1000 * median, 'every steps': every[name],
                     'percent of the time': 100 * median / every[name] / step})
    report('loop', rows, config)
    ratio = statistics.median(a / b for a, b in zip(times['checkpoint'], times['its bytes written']))
    print(f'saving a checkpoint ({checkpoint_bytes / 1e6:.1f} MB) takes {ratio:.2f} times as long as '
          f'writing its bytes alone (median of {config.repeats})')


def surroundings(folder, tiny, line, config):
    """
    Time what the loop does between steps, in turn, with the model of `tiny` and the training line of a run.
    -> {name: seconds of each repeat}, bytes of a checkpoint
    """
    device = hardware.resolve(config.device, config.dtype)[0]
    model, optimizer_step = training_step(tiny.pick(GPTConfig), 2, device, torch.float32)
    optimizer_step()
    state = {'model': model.state_dict(), 'optimizer': optimizer_step.optimizer.state_dict(), 'step': 1, 'config': {},
             'tokenizer': {}, 'data': {}}
    log = runlog.RunLog(str(folder))
    path = folder / 'checkpoints' / 'step_0000001.pt'
    checkpoint.save(path, state)
    content = path.read_bytes()

    def write_log():
        log.line('metrics.jsonl', **line)
        log.say('x' * 100)
        log.status(**line)

    def write_bytes():
        with replacing(path.with_name('plain.pt')) as file:
            file.write(content)
    times = interleaved({
        'statistics': lambda: timed(model.statistics, device),
        'metrics, log, status': lambda: timed(write_log, device),
        'checkpoint': lambda: timed(lambda: checkpoint.save(path, state), device),
        'its bytes written': lambda: timed(write_bytes, device)}, config.repeats)
    return times, len(content)
