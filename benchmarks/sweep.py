"""
Runs of train.py over a grid of options: the command sweep of bench.py.

    python bench.py sweep config/trix_tiny.py --learning_rate=1e-3,3e-3,1e-2                # three runs
    python bench.py sweep config/x.py --learning_rate=1e-3,3e-3 --ffn=gelu,swiglu --seeds=3 --minutes=60

Each option with commas spans one axis of the grid. All other options of train.py are the same for all runs. The runs
go to runs/sweep/<config>/. A run that is finished is used again. The last lines name the winner's command line.
"""
import itertools
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

import configurator
import settings
from benchmarks.measure import check_can_write, mean_and_sd, report
from benchmarks.quality import difference, evaluations, is_trained, run_train
from configurator import UserError
from runtime.runlog import duration, read_lines

DATA = ('dataset', 'tokenizer', 'vocab_size')  # losses per token with different ones cannot be compared
# Options whose value may hold a comma, or that sweep sets itself.
NOT_SWEPT = (*DATA, 'sample_prompts', 'mandatory_steps', 'out_dir', 'init_from', 'distill_from', 'resume', 'seed')


@dataclass
class SweepConfig:
    seeds: int = 1  # runs of each combination: with the config's own seed, then 1, 2, ...
    minutes: float = 0.0  # time limit: no run starts that would end later, as far as earlier runs tell (0: no limit)
    out: str = 'runs/bench'  # directory of the table and the picture
    runs: str = 'runs/sweep'  # directory of the runs

    def problems(self):
        problems = []
        if self.seeds < 1:
            problems.append(f'seeds={self.seeds} must be at least 1')
        if not 0 <= self.minutes < float('inf'):
            problems.append(f'minutes={self.minutes} must be a number of minutes, or 0')
        return problems


@dataclass
class Combination:
    """One point of the grid."""
    values: dict  # {option: value}, as on the command line
    words: list  # of train.py, without seed and out_dir

    @property
    def name(self):
        return ' '.join(f'{key}={value}' for key, value in self.values.items())

    @property
    def folder(self):
        """The name of its directory, whatever the order of the options."""
        return re.sub(r'[^\w.=-]+', '-', ','.join(f'{key}={value}' for key, value in sorted(self.values.items())))


def split_words(argv):
    """(words of SweepConfig, config files, {swept option: [values]}, other words of train.py). UserError if invalid."""
    own = {field.name for field in fields(SweepConfig)}
    mine, files, axes, others = [], [], {}, []
    for word in argv:
        key, _, value = word.removeprefix('--').partition('=')
        key = key.replace('-', '_')
        if word in ('--help', '-h') or word.startswith('--') and key in own:
            mine.append(word)
        elif not word.startswith('--'):
            files.append(word)
        elif ',' in value and key not in NOT_SWEPT:
            axes[key] = list(dict.fromkeys(part.strip() for part in value.split(',')))
        elif key in DATA and ',' in value:
            raise UserError(f'{word}: a sweep compares losses per token, which differ with {", ".join(DATA)}')
        elif key in ('out_dir', 'resume', 'seed'):
            raise UserError(f'{word}: a sweep sets {key} of its runs itself (--runs=DIR, --seeds=N)')
        else:
            others.append(word)
    return mine, files, axes, others


def grid(files, axes, others):
    """The combinations of all axes. UserError with the problems of all of them, before anything runs."""
    if not axes:
        raise UserError('nothing to sweep: give an option several values, as in --learning_rate=1e-3,3e-3,1e-2')
    combinations, problems = [], []
    for values in itertools.product(*axes.values()):
        combination = Combination(dict(zip(axes, values)), [])
        combination.words = [*files, *others, *(f'--{key}={value}' for key, value in combination.values.items())]
        try:
            if not settings.load(combination.words).eval_interval:
                problems.append('eval_interval=0: a sweep compares validation losses')
        except UserError as error:
            problems += error.args
        combinations.append(combination)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return combinations


def sweep(argv):
    """Train every combination with every seed, then print the table and the winner's command line."""
    mine, files, axes, others = split_words(argv)
    config = configurator.load(mine, SweepConfig, usage=__doc__)
    combinations = grid(files, axes, others)
    check_can_write(config.out)
    folder = Path(config.runs, '-'.join(Path(file).stem for file in files) or 'default')
    seeds = [settings.load(combinations[0].words).seed, *range(1, config.seeds)]
    runs = [(combination, seed) for seed in seeds for combination in combinations]  # every combination first
    results, left_out = train_all(runs, folder, config.minutes)
    rows, losses, curves = [], {}, {}
    for combination in combinations:
        outcomes = [results[combination.name, seed] for seed in seeds if (combination.name, seed) in results]
        done = [outcome for outcome in outcomes if outcome['state'] == 'finished']
        losses[combination.name] = [outcome['loss'] for outcome in done]
        curves[combination.name] = [outcome['curve'] for outcome in done]
        row = {**combination.values, 'runs': len(done), 'loss': '', 'loss sd': '', 'best loss': '', 'tokens/s': ''}
        if done:
            row |= mean_and_sd(loss=losses[combination.name])
            row['best loss'] = min(outcome['best'] for outcome in done)
            row['tokens/s'] = max(outcome['tokens/s'] for outcome in done)
        row['state'] = ', '.join(dict.fromkeys(outcome['state'] for outcome in outcomes)) or 'not run'
        rows.append(row)
    rows.sort(key=lambda row: (row['loss'] == '', row['loss']))
    report_config = settings.load(combinations[0].words)
    target = ReportConfig(report_config.device, report_config.dtype, config.out)
    report('sweep', rows, target, f' {shlex.join(argv)}', lambda rows, figure: plot(curves, axes, losses, figure),
           name=f'sweep_{folder.name}', losses=losses, curves=curves)
    if left_out:
        print(f'{left_out} of {len(runs)} runs were not started within --minutes={config.minutes:g}. Run the same '
              'command again with more minutes: finished runs are used.')
    print_winner(combinations, losses)


@dataclass
class ReportConfig:
    """What `report` needs to know."""
    device: str
    dtype: str
    out: str
    quick: bool = False


def train_all(runs, folder, minutes):
    """
    Train the runs in turn -> {(name, seed): outcome}, number of runs that were left out for lack of time. A run that
    has diverged or failed does not end the sweep. An interrupted one does.
    """
    results, durations, start = {}, [], time.monotonic()
    for number, (combination, seed) in enumerate(runs, 1):
        out = folder / f'{combination.folder}_{seed}'
        words = [*combination.words, f'--seed={seed}', f'--out_dir={out}', '--resume=auto']
        if is_trained(words):
            print(f'{out}: finished already', flush=True)
            results[combination.name, seed] = outcome_of(out, 'finished')
            continue
        expected = sum(durations) / len(durations) if durations else 0.0
        spent = time.monotonic() - start
        if minutes and spent + expected > 60 * minutes:
            return results, len(runs) - number + 1
        left = f', about {duration(expected * (len(runs) - number + 1))} left' if durations else ''
        print(f'run {number} of {len(runs)}: {combination.name}, seed {seed}{left} (watch it: python watch.py {out})',
              flush=True)
        state = run_once(words, out)
        durations.append(time.monotonic() - start - spent)
        results[combination.name, seed] = outcome_of(out, state)
        loss = results[combination.name, seed]['loss']
        print(f'  {state}' + (f', validation loss {loss:.4f}' if loss is not None else ''), flush=True)
    return results, 0


def run_once(words, out):
    """Run train.py -> 'finished', 'diverged' or 'failed'. Its console goes to <out>.txt."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{out}.txt', 'w') as console:
        code = run_train(words, stdout=console, stderr=subprocess.STDOUT)
    if code == 75:
        print(f'{out}: interrupted. Run the same command again to go on.', file=sys.stderr)
        sys.exit(75)
    if code not in (0, 3):
        lines = Path(f'{out}.txt').read_text(errors='replace').strip().splitlines()
        print(f'  {lines[-1] if lines else ""} (exit code {code}; the console is in {out}.txt)', flush=True)
        return 'failed'
    return 'finished' if code == 0 else 'diverged'


def outcome_of(out, state):
    """{state, loss, best, curve, tokens/s} of a run: its last and its best validation loss."""
    curve = evaluations(out) if (out / 'metrics.jsonl').is_file() else []
    lines = read_lines(out / 'metrics.jsonl') if curve else []
    speeds = [line['tokens_per_s'] for line in lines if line.get('kind') == 'train']
    return {'state': state if curve else 'failed', 'loss': curve[-1][1] if curve else None,
            'best': min(loss for _, loss in curve) if curve else None, 'curve': curve,
            'tokens/s': float(np.median(speeds)) if speeds else ''}


def print_winner(combinations, losses):
    """The command line of the lowest mean loss, and whether its lead is more than noise."""
    finished = sorted((sum(loss) / len(loss), name) for name, loss in losses.items() if loss)
    if not finished:
        return print('no run has finished, so there is no winner')
    best = finished[0][1]
    if len(finished) > 1:
        second = finished[1][1]
        count = min(len(losses[best]), len(losses[second]))
        gap, noise = difference(losses[best][:count], losses[second][:count])
        verdict = 'the noise is unknown with one seed (--seeds=3)'
        if count > 1:
            verdict = f'{"more than" if abs(gap) > noise else "within"} the noise of {noise:.4f} (95 %)'
        print(f'{best} is best, {abs(gap):.4f} nats a token before {second}: {verdict}')
    words = next(combination.words for combination in combinations if combination.name == best)
    print(f'python train.py {shlex.join(words)}')


def plot(curves, axes, losses, figure):
    """Validation loss against tokens, and the last loss of every combination."""
    left, right = figure.subplots(1, 2, sharey=True)
    finished = {name: seeds for name, seeds in curves.items() if seeds}
    for i, (name, seeds) in enumerate(finished.items()):
        for n, curve in enumerate(seeds):
            tokens, loss = zip(*curve)
            left.plot(np.array(tokens) / 1e6, loss, color=f'C{i % 10}', label=name if n == 0 else None)
        right.plot([i] * len(losses[name]), losses[name], 'o', color=f'C{i % 10}')
    left.set(xlabel='million tokens', ylabel='validation loss (nats a token)')
    right.set(title='last validation loss of each seed', xticks=range(len(finished)))
    right.set_xticklabels([name.replace(' ', '\n') for name in finished], rotation=30 if len(finished) > 4 else 0)
    if finished:
        lowest = min(min(loss) for loss in losses.values() if loss)
        left.set_ylim(lowest - 0.1, lowest + 2.5)
        left.legend()
    for panel in (left, right):
        panel.grid(alpha=0.3)
