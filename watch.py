"""Status of a running job, plots and reports of runs. Only reads the files of a run, in whatever state they are.

    python watch.py runs/x                    # state, progress, losses, speed, memory, newest sample, warnings
    python watch.py runs/x --watch            # the same, updated in place until the run is over (or Ctrl-C)
    python watch.py runs/x --samples          # all samples of the newest round
    python watch.py runs/x --plot --report    # runs/x/plot.png, and runs/x/report.html: one page without scripts
    python watch.py runs/a runs/b --plot      # several runs side by side, and their curves in runs/compare.png
    python watch.py config/x.py --plot        # before a run: runs/schedule.png; options of train.py may follow
"""
import contextlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace

import configurator
from configurator import UserError
from files import replacing
from runtime.hints import hints
from runtime.pages import INK, big_number, curve, draw, drawings, page, running_mean, series, table
from runtime.runlog import duration, read_lines
from schedule import marks, problems, schedule, stage

OVER = {'finished': '', 'interrupted': 'interrupted: continue with --resume=auto', 'failed': 'failed: see log.txt',
        'killed': 'killed (its process is gone): continue with --resume=auto',
        'diverged': 'diverged: lower the learning rate, or continue from an earlier checkpoint'}
PANELS = {  # title: (left axis, {key of metrics.jsonl: name of its curve}, right axis, {key: name})
    'loss': ('nats per token', {'loss': 'training'}, '', {}),
    'schedule': ('learning rate', {'lr': ''}, 'weight decay', {'wd': ''}),
    'throughput': ('tokens/s', {'tokens_per_s': ''}, 'MFU', {'mfu': ''}),
    'gradient norm': ('before clipping', {'grad_norm': ''}, '', {}),
    'TriX balance': ('', {'trix_overload': 'overload', 'trix_entropy': 'entropy', 'trix_dead': 'dead tiles'}, '', {}),
    'ternary weights': ('fraction', {'ternary_minus': '-1', 'ternary_zero': '0', 'ternary_plus': '+1'},
                        'flipped', {'ternary_flips': ''}),
}
UNITS = {'seconds': 1, 'minutes': 60, 'hours': 3600}  # of the time axis, and seconds in each
SPARKS = '▁▂▃▄▅▆▇█'


@dataclass
class WatchConfig:
    watch: bool = False  # update the status until every run is over; then --plot and --report follow
    samples: bool = False  # print all samples of the newest round
    plot: bool = False  # draw the curves: plot.png in the run; compare.png or schedule.png in runs/
    report: bool = False  # write a page with everything: report.html in the run; compare.html in runs/
    every: float = 2.0  # seconds between two updates of --watch
    out: str = ''  # another file for the picture (a PNG) or the page

    def problems(self):
        found = [] if 0 < self.every < 1e6 else [f'every={self.every} must be a number of seconds above 0']
        if self.out and self.plot == self.report:
            found.append('--out=FILE names one file: ask for --plot or for --report')
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def number(value):
    """`value` if it is a number of plausible size, otherwise None. Damaged files may hold anything."""
    return value if type(value) in (int, float) and (value == 0 or 1e-18 < abs(value) < 1e18) else None


def numbers(line):
    return {key: value for key, value in line.items() if number(value) is not None}


def clean(value):
    """A value as text that is safe to show on a terminal and a page. Cut after 1,000 characters."""
    return ''.join(c if c.isprintable() else ' ' for c in str(value)[:1000])


def clean_lines(text):
    return '\n'.join(map(clean, text.split('\n')))


def texts(line):
    return {key: clean(value) for key, value in line.items() if isinstance(value, str)}


def is_nested(value):
    """Whether a value holds more than plain values or a list of them."""
    return any(isinstance(item, (dict, list)) for item in (value if isinstance(value, list) else [value]))


def read_object(path):
    """The JSON object in a file, without values nested deeper than a list. Empty if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if not is_nested(value)}
    return {}


class Run:
    """A snapshot of a run's files. All cleaning happens here: missing, torn or wrongly typed values are dropped,
    numbers are finite, and texts are safe to show."""

    def __init__(self, path):
        self.path = Path(path)
        self.name = clean(configurator.as_utf8('/'.join(self.path.resolve().parts[-2:])))
        self.config, status = read_object(self.path / 'config.json'), read_object(self.path / 'status.json')
        self.status, self.status_texts = numbers(status), texts(status)
        metrics, samples = self.stepped('metrics.jsonl'), self.stepped('samples.jsonl')
        self.train = [numbers(line) for line in metrics if line.get('kind') == 'train']
        evals = [line for line in metrics if line.get('kind') == 'eval']
        self.evals = [numbers(line) for line in evals if number(line.get('loss')) is not None]
        events = [line for line in metrics if line.get('kind') == 'event']
        self.events = [{**numbers(line), 'event': '?', **texts(line)} for line in events]
        self.samples = [{**numbers(line), 'prompt': '', 'mode': '', **texts(line), 'text': clean_lines(line['text'])}
                        for line in samples if isinstance(line.get('text'), str)]
        self.newest = [sample for sample in self.samples if sample['step'] == self.samples[-1]['step']]
        self.best = min(self.evals, key=lambda line: line['loss'], default={})
        self.step = max([self.status.get('step', 0)] + [line['step'] for line in self.train[-1:]])
        self.max_steps = number(self.config.get('max_steps')) or self.status.get('max_steps', 0)
        self.checkpoints, self.seen = [], self.status.get('time', 0)  # (name, bytes, time)s, oldest first
        for file in sorted(self.path.glob('checkpoints/step_*.pt')):
            with contextlib.suppress(OSError):  # the run may delete it at this moment
                self.checkpoints.append((clean(file.name), file.stat().st_size, file.stat().st_mtime))
        with contextlib.suppress(OSError):
            self.seen = max(self.seen, (self.path / 'metrics.jsonl').stat().st_mtime)  # last sign of life
        self.schedule = schedule_config(self.config)
        self.add_times()

    def stepped(self, name):
        """The lines of a file that have a step."""
        return [line for line in read_lines(self.path / name) if number(line.get('step')) is not None]

    def add_times(self):
        """Add to each training line its seconds since the last one, without evaluations, and the time of training so
        far in all UNITS."""
        lines = [line for line in self.train if 'tokens' in line and line.get('tokens_per_s', 0) > 0]
        # A run may start from another run's tokens. The first line is assumed to cover as many tokens as the second.
        ends, total = [line['tokens'] for line in lines], 0
        starts = [max(0, 2 * ends[0] - ends[1]) if len(ends) > 1 else 0, *ends]
        for line, start in zip(lines, starts):
            gap = max(0, line['tokens'] - start) / line['tokens_per_s']
            total += gap
            line['gap'] = gap
            for unit, size in UNITS.items():
                line[unit] = total / size

    def sign_of_life(self, now, seen, since):
        """(time of the last sign of life in the files, the same on the local clock).

        seen, since: the result of the previous call, or None, None. The run's machine may have another clock. If the
        files changed between two calls, they were written just now."""
        return self.seen, min(self.seen, now) if seen is None else since if seen == self.seen else now

    def recent(self, key):
        return series(self.train[-20:], key)[1]

    def state(self, now):
        """(state, advice): the state in status.json, corrected if the process is gone or silent for too long."""
        state, silent = self.status_texts.get('state', 'no status yet'), now - self.seen
        host = self.status_texts.get('host')
        if state == 'running' and host == socket.gethostname() and gone(self.status.get('pid', 0)):
            state = 'killed'
        usual = median(self.recent('gap') or [120])  # before the first lines: compilation takes time
        if state == 'running' and silent > max(60, 5 * usual):
            return 'stalled', f'stalled? no line for {duration(silent)}; lines usually come every {duration(usual)}'
        if state == 'running' and silent < -60:
            return state, (f'the last line is {duration(-silent)} in the future: the clock of {host or "its machine"} '
                           'is ahead of the clock here, so only --watch can tell whether the run has stalled')
        return state, OVER.get(state, '')


def gone(pid):
    """Whether no process with this id exists on this machine."""
    if 0 < pid < 2**31:
        try:
            os.kill(int(pid), 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)  # PermissionError: it lives, but belongs to another user
    return False


def schedule_config(values):
    """The options of config.json for schedule.py, or None if they are not valid (another version, or damaged)."""
    with contextlib.suppress(Exception):
        config = SimpleNamespace(**values)
        whole = ('max_steps', 'warmup_steps', 'decay_steps', 'boundary_step', 'restart_steps', 'restart_factor')
        if all(type(getattr(config, key)) is int for key in whole) and not problems(config):
            return config
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Status

def clock(seconds):
    """A time as date and time of day on this machine. Empty if it is no such time."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))
    return ''


def show(line, form, *keys):
    """A format filled with numbers of a line. Empty if one is missing."""
    return '' if None in map(number, map(line.get, keys)) else form.format(*map(line.get, keys))


def sparkline(values, width=40):
    """A curve of block characters, smoothed if there are more values than characters. Empty for fewer than two."""
    if len(values) < 2:
        return ''
    points = values
    if len(values) > width:
        smooth = running_mean(values)
        points = [smooth[i * (len(smooth) - 1) // (width - 1)] for i in range(width)]
    low, high = min(points), max(points)
    return ''.join(SPARKS[round((len(SPARKS) - 1) * (point - low) / ((high - low) or 1))] for point in points)


def schedule_facts(run, running):
    """{name: text}: learning rate, weight decay, and the stage of the schedule with the time to its end."""
    line = run.train[-1] if run.train else {}
    found = {'learning rate': show(line, '{:.3g}', 'lr'), 'weight decay': show(line, '{:g}', 'wd'), 'schedule': ''}
    if run.schedule and run.step < run.schedule.max_steps:
        name, end = stage(run.step, run.schedule)
        seconds = seconds_to(run, end)
        left = f', in {duration(seconds)}' if running and seconds is not None else ''
        found['schedule'] = f'{name}, until step {end:,}{left}'
    return found


def seconds_to(run, step):
    """Seconds of training until a step at the usual speed, or None if that is unknown."""
    speeds, size = run.recent('tokens_per_s'), number(run.config.get('batch_tokens'))
    if not speeds or not size or median(speeds) <= 0:
        return None
    return (step - run.step) * size / median(speeds)


def last_line(run, now, absolute):
    if not run.seen:
        return ''
    if absolute:
        return clock(run.seen)
    return f'{duration(run.seen - now)} in the future' if run.seen > now + 1 else f'{duration(now - run.seen)} ago'


def training_time(run):
    """The time of the training lines, as text. A run that continues another run has only its own lines."""
    if not run.train or 'seconds' not in run.train[-1]:
        return ''
    first = run.train[0]['step']
    starts = [event['step'] for event in run.events if event['event'] == 'resumed' and 0 < event.get('step', 0) < first]
    return duration(run.train[-1]['seconds']) + (f' since step {max(starts):,}' if starts else '')


def facts(run, now, absolute=False):
    """
    {name: short text} of everything to show about a run. The text is empty if there is nothing to show.

    absolute: times of day in place of '5 s ago', for a page that is read later.
    """
    state, newest, losses = run.state(now)[0], run.evals[-1] if run.evals else {}, run.recent('loss')
    means = ('tokens_per_s', 'mfu', 'mem_gb', 'loader_wait')
    usual = {key: median(run.recent(key)) for key in means if run.recent(key)}
    part = min(1, max(0, run.step / run.max_steps)) if run.max_steps > 0 else 0
    running = state in ('running', 'stalled')
    training = f'{losses[-1]:.4f} (mean of {len(losses)}: {fmean(losses):.4f})' if losses else 'no training line yet'
    events = Counter(event['event'] for event in run.events)
    found = {
        'state': state,
        'last line': last_line(run, now, absolute),
        'progress': f'[{"#" * int(20 * part):-<20}] {100 * part:.0f} %',
        'step': f'{run.step:,.0f} of {run.max_steps:,.0f}',
        'time left': duration(run.status['eta']) if running and 'eta' in run.status and not absolute else '',
        'training time': training_time(run),
        'tokens': show(run.train[-1] if run.train else {}, '{:,.0f}', 'tokens'),
        'loss curve': sparkline(series(run.train, 'loss')[1]),
        'training loss': training,
        'validation loss': show(newest, '{:.4f} at step {:,.0f}', 'loss', 'step'),
        'best': show(run.best, '{:.4f} at step {:,.0f}', 'loss', 'step'),
        'perplexity': show(run.best, '{:,.2f}', 'perplexity'),
        'bits per byte': show(run.best, '{:.4f}', 'bits_per_byte'),
        **schedule_facts(run, running and not absolute),
        'tokens/s': show(usual, '{:,.0f}', 'tokens_per_s'),
        'MFU': show(usual, '{:.1%}', 'mfu'),
        'waiting for data': show(usual, '{:.1%}', 'loader_wait'),
        'memory': show(usual, '{:.2f} GB', 'mem_gb'),
        'processes': show(run.status, '{:,.0f}', 'processes') if run.status.get('processes', 1) > 1 else '',
        'events': ', '.join(f'{count} {kind}' for kind, count in events.most_common()),
        'last event': describe(run.events[-1]) if run.events else '',
        'checkpoints': '', 'newest': ''}
    if run.checkpoints:
        name, _, written = run.checkpoints[-1]
        found['checkpoints'] = f'{len(run.checkpoints)}, {sum(size for _, size, _ in run.checkpoints) / 1e6:,.1f} MB'
        found['newest'] = f'{name}, {clock(written) if absolute else duration(now - written) + " ago"}'
    return found


def describe(event):
    """'skipped at step 312, loss nan, grad_norm inf'"""
    parts = [f'{event["event"]} at step {event["step"]:,.0f}']
    for key, value in event.items():
        if key not in ('kind', 'event', 'step'):
            parts.append(f'{clean(key)} {value}' if isinstance(value, str) else f'{clean(key)} {value:.4g}')
    return ', '.join(parts)


def quality(sample):
    parts = show(sample, 'entropy {:.2f} nats', 'entropy'), show(sample, 'repetition {:.0%}', 'repetition')
    return ', '.join(filter(None, parts))


def side_by_side(runs, now, absolute=False):
    """A table: the run names, then one row per fact that any run has. Leaves out facts that can't be compared."""
    found = [facts(run, now, absolute) for run in runs]
    left_out = () if comparable(runs) else ('training loss', 'validation loss', 'best', 'perplexity')
    rows = [(name, *(one[name] for one in found)) for name in found[0] if name not in left_out]
    return [('', *(run.name for run in runs)), *(row for row in rows if any(row[1:]))]


def comparable(runs):
    """Whether losses per token are comparable: all runs have the same data and tokenizer."""
    known = all('data_fingerprint' in run.config for run in runs)
    keys = ('data_fingerprint',) if known else ('dataset', 'tokenizer', 'vocab_size')
    return len({tuple(repr(run.config.get(key)) for key in keys) for run in runs}) == 1


def remarks(runs, now):
    """Warnings and advice for the user, one line each."""
    found = []
    if not comparable(runs):
        found.append('different data or tokenizers: losses per token are not comparable, so only bits per byte are '
                     'shown, each on its own validation text')
        without = [run.name for run in runs if not series(run.evals, 'bits_per_byte')[1]]
        if without:
            found.append(f'no bits per byte in {", ".join(without)}: they need a validation and a tokenizer')
    for run in runs:
        for remark in [run.state(now)[1], *hints(run.evals, run.samples, run.train)]:
            if remark:
                found.append(f'{run.name}: {remark}')
    return found


def sample_lines(sample, most):
    """A sample as lines of text, at most `most` of its own."""
    about = f'sample at step {sample["step"]:,.0f}', sample['mode'], f'after {sample["prompt"]!r}', quality(sample)
    return [', '.join(filter(None, about)), *(f'  {line[:120]}' for line in sample['text'].split('\n')[:most])]


def screen(runs, now, all_samples=False):
    """The status as text. One typical sample of a single run, or all samples of the newest round."""
    lines = remarks(runs, now) + configurator.columns(side_by_side(runs, now)).split('\n')
    if all_samples:
        for run in runs:
            lines += [line for sample in run.newest for line in ['', *sample_lines(sample, 1000)]]
    elif len(runs) == 1 and runs[0].newest:
        typical = [sample for sample in runs[0].newest if sample['mode'] == 'typical']
        lines += sample_lines((typical or runs[0].newest)[0], 8)
    return '\n'.join(lines)


def follow(paths, every, all_samples=False):
    """Show the status until every run is over. Updates in place on a terminal, otherwise prints each change."""
    terminal, before, last_signs = sys.stdout.isatty(), None, {}
    if terminal:
        print('\x1b[2J', end='')
    while True:
        now, runs = time.time(), [Run(path) for path in paths]
        for run in runs:
            last_signs[run.path] = run.sign_of_life(now, *last_signs.get(run.path, (None, None)))
            run.seen = last_signs[run.path][1]
        change = [(run.seen, run.state(now)[0]) for run in runs]
        if terminal:
            width, height = shutil.get_terminal_size()
            shown = screen(runs, now, all_samples).split('\n')[:height - 1]
            lines = [line[:width - 1] + '\x1b[K\n' for line in shown]
            print('\x1b[H' + ''.join(lines) + '\x1b[J', end='', flush=True)
        elif change != before:
            print(screen(runs, now, all_samples), flush=True)
        if all(state in OVER for _, state in change):
            return
        before = change
        time.sleep(every)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures. A panel is a function that draws into axes. {title: panel} becomes one picture, or separate drawings on
# a page.

def planned(config):
    """The schedule of a config, in the format of a run's training lines."""
    found = []
    for step in range(0, config.max_steps, max(1, config.max_steps // 1000)):
        rate, decay = schedule(step, config)
        found.append({'step': step, 'lr': rate, 'wd': decay})
    return found


def plan_of(run):
    """The planned schedule of a run. Empty if config.json has no valid one (another version, or damaged)."""
    with contextlib.suppress(Exception):
        return [numbers(line) for line in planned(run.schedule)] if run.schedule else []
    return []


def draw_panel(run, title, legend, axes):
    """Draw one of PANELS. Events are vertical lines. legend: whether the legend names them."""
    left, names, right, more = PANELS[title]
    plan = plan_of(run) if title == 'schedule' else []
    sides, colors = [(axes, left, names)], iter(('C0', 'C1', 'C2', 'C3'))
    if any(series(plan + run.train, key)[1] for key in more):
        sides.append((axes.twinx(), right, more))
    for side, label, names in sides:
        for (key, name), color in zip(names.items(), colors):
            curve(side, plan, key, color, 'planned' if side is axes else '', linewidth=4, alpha=0.3)
            curve(side, run.train, key, color, name, smoothed=title != 'schedule',
                  linestyle='-' if side is axes else '--')
        side.set_ylabel(label, color=color if len(sides) > 1 and len(names) == 1 else INK)
        side.grid(side is axes)
        side.spines['right'].set_visible(len(sides) > 1)
        if title in ('schedule', 'throughput'):
            side.set_ylim(bottom=0)
    if title == 'gradient norm':
        axes.set_yscale('log')
    if title == 'loss':
        curve(axes, run.evals, 'loss', 'C1', 'validation', marker='o', markersize=4, linestyle='')
        best = show(run.best, 'best {:.4f}', 'loss')
        curve(axes, [run.best], 'loss', 'C3', best, marker='*', markersize=12, linestyle='')
    if not axes.lines:
        axes.text(0.5, 0.5, 'no training line yet', transform=axes.transAxes, ha='center')
    for i, (kind, _) in enumerate(Counter(event['event'] for event in run.events).most_common(4)):
        steps = [event['step'] for event in run.events if event['event'] == kind]
        axes.vlines(steps, 0, 1, color=f'C{6 + i}', linestyle=':', transform=axes.get_xaxis_transform(),
                    label=kind[:40].replace('$', r'\$') if legend else None)
    axes.set_xlabel('step')
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        axes.legend(loc='lower right', bbox_to_anchor=(1.01, 0.99), ncols=len(labels))


def time_unit(runs):
    """The largest of UNITS of which the longest run has at least two."""
    longest = max((line['seconds'] for run in runs for line in run.train if 'seconds' in line), default=0)
    return [unit for unit, size in UNITS.items() if longest >= 2 * size or size == 1][-1]


def draw_comparison(runs, lines, key, x, axes):
    """Draw one number of several runs. The first fifth of a loss may exceed the top of the picture."""
    late, styles = [], ('-', '--', ':', '-.')
    for i, run in enumerate(runs):
        curve(axes, getattr(run, lines), key, f'C{i % 10}', run.name, x, lines == 'train',
              linestyle=styles[i // 10 % len(styles)], marker='o' if lines == 'evals' else '', markersize=3)
        values = series(getattr(run, lines), key, x)[1]
        late += values[len(values) // 5:]
    if axes.lines:
        axes.set_ylim(top=max(late) if key == 'loss' else None)
        axes.legend()
    axes.set(xlabel=f'{x} of training' if x in UNITS else x,
             ylabel={'tokens_per_s': 'tokens/s', 'bits_per_byte': 'bits per byte'}.get(key, 'nats per token'))


def panels(runs):
    """{title: panel} of one run, for the numbers that it has, or of a comparison of several runs."""
    if len(runs) == 1:
        known = {'loss', 'lr', 'tokens_per_s', 'grad_norm', *(key for line in runs[0].train for key in line)}
        return {title: partial(draw_panel, runs[0], title, title == 'loss')
                for title, (_, names, *_) in PANELS.items() if known & {*names}}
    if comparable(runs):
        drawn = {'training loss': ('train', 'loss', 'tokens'),
                 'training loss over time': ('train', 'loss', time_unit(runs)),
                 'validation loss': ('evals', 'loss', 'tokens')}
    elif any(series(run.evals, 'bits_per_byte')[1] for run in runs):
        drawn = {'bits per byte': ('evals', 'bits_per_byte', 'tokens')}
    else:
        drawn = {}
    drawn['throughput'] = 'train', 'tokens_per_s', 'tokens'
    return {title: partial(draw_comparison, runs, *what) for title, what in drawn.items()}


def schedule_panel(config):
    """{title: panel} of a config before its run: the schedule, with its marks as events."""
    events = [{'event': what, 'step': step} for step, what in marks(config).items() if 0 < step < config.max_steps - 1]
    run = SimpleNamespace(schedule=None, train=planned(config), evals=[], events=events)
    return {'schedule': partial(draw_panel, run, 'schedule', True)}


# ----------------------------------------------------------------------------------------------------------------------
# Pages

def report(runs, now):
    """The HTML page about one run, or a comparison of several: the result, curves, then tables."""
    title = f'{runs[0].name}: {runs[0].state(now)[0]}' if len(runs) == 1 else f'{len(runs)} runs'
    parts = {' result': result(runs), ' curves': drawings(panels(runs)),
             'Status': ''.join(table([('remark',), (remark,)]) for remark in remarks(runs, now))
             + table(side_by_side(runs, now, absolute=True)) + table([('page written',), (clock(now),)])}
    if len(runs) == 1:
        parts |= tables(runs[0])
    values_of = {key: [clean(run.config.get(key, '')) for run in runs] for run in runs for key in run.config}
    rows = [(clean(key), *values) for key, values in values_of.items() if len(runs) == 1 or len({*values}) > 1]
    heading = 'Config' if len(runs) == 1 else 'What differs in the configs'
    parts[heading] = table([('', *(run.name for run in runs)), *rows])
    return page(title, parts)


def result(runs):
    """The one number of a report: the lowest validation loss, or bits per byte where losses are not comparable."""
    key, name = ('loss', 'nats per token') if comparable(runs) else ('bits_per_byte', 'bits per byte')
    done = [run for run in runs if key in run.best]
    if done:
        best = min(done, key=lambda run: run.best[key])
        return big_number(show(best.best, '{:.4f}', key), f'best validation loss in {name}, {best.name}, '
                          f'step {best.best["step"]:,.0f}')
    losses = runs[0].recent('loss')
    return big_number(f'{fmean(losses):.4f}', f'training loss, mean of the last {len(losses)} lines') if losses else ''


def tables(run):
    """{heading: HTML}: validations, events and samples of a run."""
    columns = {'step': '{:,.0f}', 'tokens': '{:,.0f}', 'loss': '{:.4f}', 'perplexity': '{:,.2f}',
               'bits_per_byte': '{:.4f}'}
    evals = [[show(line, form, key) for key, form in columns.items()] for line in run.evals]
    modes, prompts = (list(dict.fromkeys(sample[key] for sample in run.newest)) for key in ('mode', 'prompt'))
    cells = {}
    for sample in run.newest:
        text = re.sub(r'\n\s*\n\s*\n', '\n\n', sample['text'])
        cells[sample['prompt'], sample['mode']] = f'{quality(sample)}\n{text}'
    samples = [(repr(prompt), *(cells.get((prompt, mode), '') for mode in modes)) for prompt in prompts]
    return {'Samples': table([('prompt', *modes), *samples]), 'Validations': table([[*columns], *evals]),
            'Events': table([('event',), *((describe(event),) for event in run.events)])}


# ----------------------------------------------------------------------------------------------------------------------

def no_run(path):
    """Why a path is not a run. Empty if it is a run."""
    if not os.path.exists(path):
        others = {other.name: str(other) for other in Path(path).parent.glob('*/')}
        return f'{path}: no such directory' + configurator.nearest(Path(path).name, others, others.get)
    names = 'config.json', 'metrics.jsonl', 'status.json'
    if any(os.path.lexists(os.path.join(path, name)) for name in names):
        return ''
    inside = [str(file.parent) for file in sorted(Path(path).glob('*/config.json'))]
    more = f' and {len(inside) - 3} more' if len(inside) > 3 else ''
    runs = f'; it contains the runs {", ".join(inside[:3])}{more}' if inside else ''
    return f'{path}: not a run, because it has none of {", ".join(names)}{runs}'


def write(path, content):
    try:
        if Path(path).parent == Path('runs'):  # the default folder
            Path('runs').mkdir(exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f'{path}: could not be written ({error.strerror}); choose another place with --out')
    print(f'wrote {path}')


def main(argv):
    paths, options = [word for word in argv if word[:1] != '-'], [word for word in argv if word[:1] == '-']
    files = [path for path in paths if path.endswith('.py')]
    own = {'h', 'help', *(field.name for field in fields(WatchConfig))}
    train_words = [word for word in options if files and word.lstrip('-').partition('=')[0] not in own]  # of train.py
    config = configurator.load([word for word in options if word not in train_words], WatchConfig, usage=__doc__)
    if files:
        return plot_schedule(config, paths, files, train_words)
    if not paths:
        raise UserError('name a run: python watch.py runs/x')
    wrong = [problem for problem in map(no_run, paths) if problem]
    if wrong:
        raise UserError(*wrong)
    if config.watch:
        follow(paths, config.every, config.samples)
    runs, now = [Run(path) for path in paths], time.time()
    if not config.watch:
        print(screen(runs, now, config.samples))
    one = len(runs) == 1
    folder, picture, html = runs[0].path, 'plot.png', 'report.html'
    if not one:
        folder, picture, html = Path('runs'), 'compare.png', 'compare.html'
    if config.plot:
        heading = f'{runs[0].name}: {runs[0].state(now)[0]}, step {runs[0].step:,.0f}' if one else ''
        write(config.out or folder / picture, draw(panels(runs), heading))
    if config.report:
        write(config.out or folder / html, report(runs, now).encode())


def plot_schedule(config, paths, files, train_words):
    """Draw the schedule of config files, before a run."""
    if files != paths or not config.plot or config.watch or config.report:
        raise UserError(f'{files[0]} is a config file, not a run: only --plot works, which draws the schedule')
    import settings  # here, because it imports torch
    words = files + train_words
    heading, options = clean(configurator.as_utf8(' '.join(words))), settings.load(words)
    if options.epochs:
        print(f'epochs={options.epochs:g}: {steps_of_epochs(options)}')
    write(config.out or 'runs/schedule.png', draw(schedule_panel(options), heading))


def steps_of_epochs(options):
    """Set the steps that `epochs` means, if the data are prepared. Returns a phrase that says what is drawn."""
    from corpora.opening import open_training_data  # here, because they import torch
    from settings import step_problems
    if open_training_data(options, prepare=False):
        return f'{options.max_steps:,} steps'
    step_problems(options)  # sets the automatic warm-up
    return (f'the data decide the number of steps, and {options.dataset} is not prepared yet. The picture shows '
            f'{options.max_steps:,} steps. Prepare the data first, or give --max_steps=N')


if __name__ == '__main__':
    configurator.run(main)
