"""Status of a running job, plots and the report of a run. It only reads the files of a run, in whatever state they are.

    python watch.py runs/x                    # state, progress, losses, speed, memory, checkpoints, the newest sample, hints
    python watch.py runs/x --watch            # the same, in place, until the run is over (Ctrl-C ends it earlier)
    python watch.py runs/x --plot --report    # runs/x/plot.png, and runs/x/report.html: one page without scripts or links
    python watch.py runs/a runs/b --plot      # several runs side by side, and their curves in one picture, compare.png
    python watch.py config/x.py --plot        # before a run: its schedule as schedule.png; any option of train.py may follow
"""
import contextlib
import html
import io
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
from runtime.runlog import read_lines
from schedule import marks, problems, schedule

OVER = {'finished': '', 'interrupted': 'interrupted: go on with --resume=auto', 'failed': 'failed: log.txt says why',
        'killed': 'killed (its process is gone): go on with --resume=auto',
        'diverged': 'diverged: lower the learning rate, or go on from an earlier checkpoint'}
PANELS = {  # title: (left axis, {key of metrics.jsonl: name of its curve}, right axis, {key: name})
    'loss': ('nats a token', {'loss': 'training'}, '', {}),
    'schedule': ('learning rate', {'lr': ''}, 'weight decay', {'wd': ''}),
    'throughput': ('tokens/s', {'tokens_per_s': ''}, 'MFU', {'mfu': ''}),
    'gradient norm': ('before clipping', {'grad_norm': ''}, '', {}),
    'TriX balance': ('', {'trix_overload': 'overload', 'trix_entropy': 'entropy', 'trix_dead': 'dead tiles'}, '', {}),
    'ternary weights': ('share', {'ternary_minus': '-1', 'ternary_zero': '0', 'ternary_plus': '+1'}, 'flipped', {'ternary_flips': ''}),
}
INK = '#2b2d31'  # axes and text of pictures; pages replace it by their text colour, dark or light
STYLE = {**dict.fromkeys(('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'), INK), 'font.size': 9,
         'axes.titlelocation': 'left', 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.alpha': 0.3,
         'legend.frameon': False, 'legend.fontsize': 8, 'legend.handlelength': 1.2, 'legend.columnspacing': 1, 'svg.fonttype': 'none',
         'svg.hashsalt': 'watch'}
CSS = '''
:root { color-scheme: light dark } h1, h2 { font-weight: 600 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } .scroll { overflow: auto; max-height: 50rem } @media print { .scroll { max-height: none } }
td:first-child { min-width: 8rem } th, td { text-align: left; vertical-align: top; padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid #8884 }
pre { font-size: 12px; line-height: 1.4; margin: .3rem 0; min-width: 16rem; white-space: pre-wrap; overflow-wrap: anywhere }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem } svg { width: 100%; height: auto }
'''


@dataclass
class WatchConfig:
    watch: bool = False  # show the status again and again, until every run is over; what else is asked for comes then
    plot: bool = False  # draw the curves: plot.png in the run; compare.png or schedule.png in this directory
    report: bool = False  # write a page with everything: report.html in the run; compare.html in this directory
    every: float = 2.0  # seconds between two looks of --watch
    out: str = ''  # another file for the picture (a PNG) or the page

    def problems(self):
        found = [] if 0 < self.every < 1e6 else [f'every={self.every} must be a number of seconds above 0']
        return found + (['--out=FILE names one file: ask for --plot or for --report'] if self.out and self.plot == self.report else [])


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


def texts(line):
    return {key: clean(value) for key, value in line.items() if isinstance(value, str)}


def read_object(path):
    """The JSON object in a file, without values nested deeper than a list. Empty if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_bytes()), dict):
            return {key: value for key, value in found.items()
                    if not any(isinstance(item, (dict, list)) for item in (value if isinstance(value, list) else [value]))}
    return {}


class Run:
    """A snapshot of a run's files. All cleaning happens here: missing, torn or wrongly typed values are dropped,
    numbers are finite, and texts are safe to show."""

    def __init__(self, path):
        self.path = Path(path)
        self.name = clean(configurator.as_utf8('/'.join(self.path.resolve().parts[-2:])))
        self.config, status = read_object(self.path / 'config.json'), read_object(self.path / 'status.json')
        self.status, self.said = numbers(status), texts(status)
        metrics, samples = ([line for line in read_lines(self.path / name) if number(line.get('step')) is not None]
                            for name in ('metrics.jsonl', 'samples.jsonl'))
        self.train = [numbers(line) for line in metrics if line.get('kind') == 'train']
        self.evals = [numbers(line) for line in metrics if line.get('kind') == 'eval' and number(line.get('loss')) is not None]
        self.events = [{**numbers(line), 'event': '?', **texts(line)} for line in metrics if line.get('kind') == 'event']
        self.samples = [{**numbers(line), 'prompt': '', 'mode': '', **texts(line), 'text': '\n'.join(map(clean, line['text'].split('\n')))}
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
        self.add_times()

    def add_times(self):
        """Add to each training line its seconds since the last one, without evaluations, and the hours of training."""
        lines = [line for line in self.train if 'tokens' in line and line.get('tokens_per_s', 0) > 0]
        # A run may start from another run's tokens. The first line is assumed to cover as many tokens as the second.
        ends, hours = [line['tokens'] for line in lines], 0
        starts = [max(0, 2 * ends[0] - ends[1]) if len(ends) > 1 else 0, *ends]
        for line, start in zip(lines, starts):
            line['seconds'] = max(0, line['tokens'] - start) / line['tokens_per_s']
            line['hours'] = hours = hours + line['seconds'] / 3600

    def sign_of_life(self, now, seen, since):
        """(time of the last sign of life in the files, the same on the local clock).

        seen, since: the result of the previous call, or None, None. The run's machine may have another clock. If the
        files changed between two calls, they were written just now."""
        return self.seen, min(self.seen, now) if seen is None else since if seen == self.seen else now

    def recent(self, key):
        return series(self.train[-20:], key)[1]

    def state(self, now):
        """(state, advice): the state in status.json, corrected if the process is gone or silent for too long."""
        state, silent = self.said.get('state', 'no status yet'), now - self.seen
        if state == 'running' and self.said.get('host') == socket.gethostname() and gone(self.status.get('pid', 0)):
            state = 'killed'
        usual = median(self.recent('seconds') or [120])  # before the first lines: compilation takes time
        if state == 'running' and silent > max(60, 5 * usual):
            return 'stalled', f'stalled? no line for {duration(silent)}, where one is due every {duration(usual)}'
        if state == 'running' and silent < -60:
            return state, (f'its last line is {duration(-silent)} in the future: the clock of {self.said.get("host", "its machine")} is ahead of '
                           'the one here, so only --watch can tell whether it has stalled')
        return state, OVER.get(state, '')


def series(lines, key, x='step'):
    """The points of a curve as two lists. Skips lines that lack one of the numbers."""
    points = [(line[x], line[key]) for line in lines if x in line and key in line]
    return [a for a, _ in points], [b for _, b in points]


def gone(pid):
    """Whether no process with this id exists on this machine."""
    if os.name == 'posix' and 0 < pid < 2**31:  # on other systems os.kill would end the process
        try:
            os.kill(int(pid), 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)  # PermissionError: it lives, but belongs to another user
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Status

def duration(seconds):
    """Seconds as text in the two largest units: 3 min 5 s, 2 h 5 min, 4 d 7 h."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f'{days:,} d {hours} h' if days else f'{hours} h {minutes} min' if hours else f'{minutes} min {seconds} s' if minutes else f'{seconds} s'


def show(line, form, *keys):
    """A format filled with numbers of a line. Empty if one is missing."""
    return '' if None in map(number, map(line.get, keys)) else form.format(*map(line.get, keys))


def facts(run, now):
    """{name: short text} of everything to show about a run. The text is empty if there is nothing to show."""
    state, newest, losses = run.state(now)[0], run.evals[-1] if run.evals else {}, run.recent('loss')
    usual = {key: median(run.recent(key)) for key in ('tokens_per_s', 'mfu', 'mem_gb', 'loader_wait') if run.recent(key)}
    part = min(1, max(0, run.step / run.max_steps)) if run.max_steps > 0 else 0
    return {
        'state': state,
        'last line': (f'{duration(run.seen - now)} in the future' if run.seen > now + 1 else f'{duration(now - run.seen)} ago') if run.seen else '',
        'progress': f'[{"#" * int(20 * part):-<20}] {100 * part:.0f} %',
        'step': f'{run.step:,.0f} of {run.max_steps:,.0f}',
        'time left': duration(run.status['eta']) if state in ('running', 'stalled') and 'eta' in run.status else '',
        'tokens': show(run.train[-1] if run.train else {}, '{:,.0f}', 'tokens'),
        'training loss': f'{losses[-1]:.4f} (mean of {len(losses)}: {fmean(losses):.4f})' if losses else 'no training line yet',
        'validation loss': show(newest, '{:.4f} at step {:,.0f}', 'loss', 'step'),
        'best': show(run.best, '{:.4f} at step {:,.0f}', 'loss', 'step'),
        'perplexity': show(run.best, '{:,.2f}', 'perplexity'),
        'bits per byte': show(run.best, '{:.4f}', 'bits_per_byte'),
        'tokens/s': show(usual, '{:,.0f}', 'tokens_per_s'),
        'MFU': show(usual, '{:.1%}', 'mfu'),
        'waiting for data': show(usual, '{:.1%}', 'loader_wait'),
        'memory': show(usual, '{:.2f} GB', 'mem_gb'),
        'processes': show(run.status, '{:.0f}', 'processes'),
        'events': ', '.join(f'{count} {name}' for name, count in Counter(event['event'] for event in run.events).most_common(5)),
        'last event': ''.join(describe(event) for event in run.events[-1:]),
        'checkpoints': f'{len(run.checkpoints)}, {sum(size for _, size, _ in run.checkpoints) / 1e6:,.1f} MB' if run.checkpoints else '',
        'newest': ''.join(f'{name}, {duration(now - when)} ago' for name, _, when in run.checkpoints[-1:]),
    }


def describe(event):
    """'skipped at step 312, loss nan, grad_norm inf'"""
    more = [f'{clean(key)} {value}' if isinstance(value, str) else f'{clean(key)} {value:.4g}' for key, value in event.items()
            if key not in ('kind', 'event', 'step')]
    return ', '.join([f'{event["event"]} at step {event["step"]:,.0f}', *more])


def quality(sample):
    return ', '.join(filter(None, [show(sample, 'entropy {:.2f} nats', 'entropy'), show(sample, 'repetition {:.0%}', 'repetition')]))


def side_by_side(runs, now):
    """A table: the run names, then one row per fact that any run has. Leaves out facts that can't be compared."""
    found, left_out = [facts(run, now) for run in runs], () if comparable(runs) else ('training loss', 'validation loss', 'best', 'perplexity')
    return [('', *(run.name for run in runs)), *(row for name in found[0] if name not in left_out
                                                 and any((row := (name, *(one[name] for one in found)))[1:]))]


def comparable(runs):
    """Whether losses per token are comparable: all runs have the same data and tokenizer."""
    known = all('data_fingerprint' in run.config for run in runs)
    keys = ('data_fingerprint',) if known else ('dataset', 'tokenizer', 'vocab_size')
    return len({tuple(repr(run.config.get(key)) for key in keys) for run in runs}) == 1


def remarks(runs, now):
    """Warnings and advice for the user, one line each."""
    other = [] if comparable(runs) else ['different data or tokenizers: a loss a token is no measure between these runs, so they are compared '
                                         'by bits per byte, each of its own validation text']
    return other + [f'{run.name}: {what}' for run in runs for what in [run.state(now)[1], *hints(run.evals, run.samples)] if what]


def screen(runs, now):
    lines = remarks(runs, now) + configurator.columns(side_by_side(runs, now)).split('\n')
    for sample in sorted(runs[0].newest, key=lambda sample: sample['mode'] != 'typical')[:len(runs) == 1]:
        about = f'sample at step {sample["step"]:,.0f}', sample['mode'], f'after {sample["prompt"]!r}', quality(sample)
        lines.append(', '.join(filter(None, about)))
        lines += [f'  {line[:120]}' for line in sample['text'].split('\n')[:8]]
    return '\n'.join(lines)


def follow(paths, every):
    """Show the status until every run is over. Updates in place on a terminal, otherwise prints each change."""
    terminal, before, last_signs = sys.stdout.isatty(), None, {}
    print('\x1b[2J' * terminal, end='')
    while True:
        now, runs = time.time(), [Run(path) for path in paths]
        for run in runs:
            last_signs[run.path] = run.sign_of_life(now, *last_signs.get(run.path, (None, None)))
            run.seen = last_signs[run.path][1]
        change = [(run.seen, run.state(now)[0]) for run in runs]
        if terminal:
            width, height = shutil.get_terminal_size()
            lines = [line[:width - 1] + '\x1b[K\n' for line in screen(runs, now).split('\n')[:height - 1]]
            print('\x1b[H' + ''.join(lines) + '\x1b[J', end='', flush=True)
        elif change != before:
            print(screen(runs, now), flush=True)
        if all(state in OVER for _, state in change):
            return
        before = change
        time.sleep(every)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures. A panel is a function that draws into axes. {title: panel} becomes one picture, or separate drawings on
# a page.

def curve(axes, lines, key, color, label='', x='step', smoothed=False, **style):
    """Plot one number of the lines, if they have it. smoothed: its running mean, with raw values as a thin line."""
    a, b = series(lines, key, x)
    dots = len(a) > 5000  # as vectors, a page would store every point
    if a and smoothed:
        axes.plot(a, b, color=color, linewidth=0.7, alpha=0.3, rasterized=dots)
        half = -(-len(b) // 80)
        b = [fmean(b[max(0, i - half):i + half + 1]) for i in range(len(b))]
    if a:
        axes.plot(a, b, color=color, label=label.replace('$', r'\$') or None, rasterized=dots, **style)


def planned(config):
    """The schedule of a config, in the format of a run's training lines."""
    steps = range(0, config.max_steps, max(1, config.max_steps // 1000))
    return [dict(zip(('step', 'lr', 'wd'), (step, *schedule(step, config)))) for step in steps]


def plan_of(run):
    """The planned schedule of a run. Empty if config.json has no valid one (another version, or damaged)."""
    with contextlib.suppress(Exception):
        config = SimpleNamespace(**run.config)
        whole = ('max_steps', 'warmup_steps', 'decay_steps', 'boundary_step', 'restart_steps', 'restart_factor')
        if all(type(getattr(config, key)) is int for key in whole) and not problems(config):
            return [numbers(line) for line in planned(config)]
    return []


def draw_panel(run, title, legend, axes):
    """Draw one of PANELS. Events are vertical lines. legend: whether the legend names them."""
    left, names, right, more = PANELS[title]
    sides, colors, plan = [(axes, left, names)], iter(('C0', 'C1', 'C2', 'C3')), plan_of(run) if title == 'schedule' else []
    if any(series(plan + run.train, key)[1] for key in more):
        sides.append((axes.twinx(), right, more))
    for one, label, names in sides:
        for (key, name), color in zip(names.items(), colors):
            curve(one, plan, key, color, 'planned' * (one is axes), linewidth=4, alpha=0.3)
            curve(one, run.train, key, color, name, smoothed=title != 'schedule', linestyle='-' if one is axes else '--')
        one.set_ylabel(label, color=color if len(sides) > 1 and len(names) == 1 else INK)
        one.grid(one is axes)
        one.spines['right'].set_visible(len(sides) > 1)
        if title in ('schedule', 'throughput'):
            one.set_ylim(bottom=0)
    if title == 'gradient norm':
        axes.set_yscale('log')
    if title == 'loss':
        curve(axes, run.evals, 'loss', 'C1', 'validation', marker='o', markersize=4, linestyle='')
        curve(axes, [run.best], 'loss', 'C3', show(run.best, 'best {:.4f}', 'loss'), marker='*', markersize=12, linestyle='')
    if not axes.lines:
        axes.text(0.5, 0.5, 'no training line yet', transform=axes.transAxes, ha='center')
    for i, (kind, _) in enumerate(Counter(event['event'] for event in run.events).most_common(4)):
        axes.vlines([event['step'] for event in run.events if event['event'] == kind], 0, 1, color=f'C{6 + i}', linestyle=':',
                    transform=axes.get_xaxis_transform(), label=kind[:16].replace('$', r'\$') if legend else None)
    axes.set_xlabel('step')
    if labels := axes.get_legend_handles_labels()[1]:
        axes.legend(loc='lower right', bbox_to_anchor=(1.01, 0.99), ncols=len(labels))


def draw_comparison(runs, lines, key, x, axes):
    """Draw one number of several runs. The first fifth of a loss may exceed the top of the picture."""
    late = []
    for i, run in enumerate(runs):
        curve(axes, getattr(run, lines), key, f'C{i % 10}', run.name, x, lines == 'train', linestyle=('-', '--', ':', '-.')[i // 10 % 4],
              marker='o' if lines == 'evals' else '', markersize=3)
        values = series(getattr(run, lines), key, x)[1]
        late += values[len(values) // 5:]
    if axes.lines:
        axes.set_ylim(top=max(late) if key == 'loss' else None)
        axes.legend()
    axes.set(xlabel='hours of training' if x == 'hours' else x,
             ylabel={'tokens_per_s': 'tokens/s', 'bits_per_byte': 'bits per byte'}.get(key, 'nats a token'))


def panels(runs):
    """{title: panel} of one run, for the numbers that it has, or of a comparison of several runs."""
    if len(runs) == 1:
        known = {'loss', 'lr', 'tokens_per_s', 'grad_norm', *(key for line in runs[0].train for key in line)}
        return {title: partial(draw_panel, runs[0], title, title == 'loss') for title, (_, names, *_) in PANELS.items() if known & {*names}}
    if not comparable(runs):
        return {title: partial(draw_comparison, runs, *what) for title, what in {
            'bits per byte': ('evals', 'bits_per_byte', 'tokens'), 'throughput': ('train', 'tokens_per_s', 'tokens')}.items()}
    return {title: partial(draw_comparison, runs, *what) for title, what in {
        'training loss': ('train', 'loss', 'tokens'), 'training loss over time': ('train', 'loss', 'hours'),
        'validation loss': ('evals', 'loss', 'tokens'), 'throughput': ('train', 'tokens_per_s', 'tokens')}.items()}


def schedule_panel(config):
    """{title: panel} of a config before its run: the schedule, with its marks as events."""
    events = [{'event': what, 'step': step} for step, what in marks(config).items() if 0 < step < config.max_steps - 1]
    return {'schedule': partial(draw_panel, SimpleNamespace(config={}, train=planned(config), evals=[], events=events), 'schedule', True)}


def draw(panels, heading='', kind='png'):
    """Draw the panels in one picture -> the bytes of a PNG or SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # the package is missing, or MPLBACKEND is invalid
        raise UserError(f'no picture: matplotlib: {error}')
    epoch = os.environ.get('SOURCE_DATE_EPOCH') or '0'
    if not epoch.isdecimal():  # matplotlib uses it as the date of a drawing
        raise UserError(f'SOURCE_DATE_EPOCH={epoch}: expected a number of seconds')
    wide, content = min(2, len(panels)), io.BytesIO()
    high = -(-len(panels) // wide)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.5 * wide, 3.5 * high), layout='constrained')
        for i, (title, panel) in enumerate(panels.items()):
            panel(figure.add_subplot(high, wide, i + 1, title=title))
        figure.suptitle(heading.replace('$', r'\$'))
        figure.savefig(content, format=kind, dpi=120, transparent=kind == 'svg')
    return content.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Pages

def drawings(panels):
    """The panels as inline SVG in the page's text colour. Each drawing's ids get a prefix, so ids never clash."""
    found = []
    for i, (title, panel) in enumerate(panels.items()):
        source = draw({title: panel}, kind='svg').decode()
        source = re.sub('<metadata>.*?</metadata>', '', source[source.index('<svg'):], flags=re.DOTALL).replace(INK, 'currentColor')
        found.append(re.sub(r'( id="|url\(#|href="#)', rf'\g<1>d{i}-', source))
    return f'<div class="curves">{"".join(found)}</div>'


def table(rows):
    """An HTML table of texts, header first ('' if no other rows). In a cell, lines after the first are <pre>."""
    lines = []
    for tag, row in zip(('th', *['td'] * len(rows)), rows):
        cells = [html.escape(cell).partition('\n') for cell in row]
        lines.append('<tr>' + ''.join(f'<{tag}>{first}' + f'<pre>{rest}</pre>' * bool(rest) + f'</{tag}>' for first, _, rest in cells) + '</tr>')
    return '<div class="scroll"><table>' + '\n'.join(lines) + '</table></div>' if len(rows) > 1 else ''


def report(runs, now):
    """The HTML page about one run, or a comparison of several. It has no scripts and loads no files."""
    title = html.escape(f'{runs[0].name}: {runs[0].state(now)[0]}' if len(runs) == 1 else f'{len(runs)} runs')
    parts = {'': ''.join(f'<p>{html.escape(what)}</p>' for what in remarks(runs, now)) + table(side_by_side(runs, now)),
             'Curves': drawings(panels(runs))}
    if len(runs) == 1:
        keys, forms = ('step', 'tokens', 'loss', 'perplexity', 'bits_per_byte'), ('{:,.0f}', '{:,.0f}', '{:.4f}', '{:,.2f}', '{:.4f}')
        parts['Validations'] = table([keys] + [[show(line, form, key) for key, form in zip(keys, forms)] for line in runs[0].evals])
        parts['Events'] = table([('event',)] + [(describe(event),) for event in runs[0].events])
        modes, prompts = (list(dict.fromkeys(sample[key] for sample in runs[0].newest)) for key in ('mode', 'prompt'))
        cells = {(sample['prompt'], sample['mode']): quality(sample) + '\n' + re.sub(r'\n\s*\n\s*\n', '\n\n', sample['text'])
                 for sample in runs[0].newest}
        parts['Samples'] = table([('prompt', *modes)] + [(repr(prompt), *(cells.get((prompt, mode), '') for mode in modes)) for prompt in prompts])
    values_of = {key: [clean(run.config.get(key, '')) for run in runs] for run in runs for key in run.config}
    parts['Config' if len(runs) == 1 else 'What differs in the configs'] = table([('', *(run.name for run in runs))] + [
        (clean(key), *values) for key, values in values_of.items() if len(runs) == 1 or len({*values}) > 1])
    body = ''.join(f'<h2>{name}</h2>\n' * bool(name) + f'{content}\n' for name, content in parts.items() if content)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<title>{title}</title><style>{CSS}</style></head>\n<body><h1>{title}</h1>\n{body}</body></html>\n')


# ----------------------------------------------------------------------------------------------------------------------

def no_run(path):
    """Why a path is not a run. Empty if it is a run."""
    if not os.path.exists(path):
        return f'{path}: no such directory' + configurator.nearest(path, [str(other) for other in Path(path).parent.glob('*/')])
    files, inside = ('config.json', 'metrics.jsonl', 'status.json'), [str(file.parent) for file in sorted(Path(path).glob('*/config.json'))]
    return '' if any(os.path.lexists(os.path.join(path, name)) for name in files) else (
        f'{path}: not a run, it has none of {", ".join(files)}' + f'; but there are {", ".join(inside[:3])}' * bool(inside))


def write(path, content):
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f'{path}: can\'t be written ({error.strerror}); choose another place by --out')
    print(f'wrote {path}')


def main(argv):
    paths, options = [word for word in argv if word[:1] != '-'], [word for word in argv if word[:1] == '-']
    files, own = [path for path in paths if path.endswith('.py')], {'h', 'help', *(field.name for field in fields(WatchConfig))}
    train_words = [word for word in options if files and word.lstrip('-').partition('=')[0] not in own]  # options of train.py
    config = configurator.load([word for word in options if word not in train_words], WatchConfig, usage=__doc__)
    if files:
        if files != paths or not config.plot or config.watch or config.report:
            raise UserError(f'{files[0]}: a config file has a schedule and no run yet: --plot alone draws it')
        import settings  # here, because it imports torch
        return write(config.out or 'schedule.png', draw(schedule_panel(settings.load(files + train_words)), clean(configurator.as_utf8(' '.join(files + train_words)))))
    if not paths:
        raise UserError('name a run: python watch.py runs/x')
    if wrong := [*filter(None, map(no_run, paths))]:
        raise UserError(*wrong)
    if config.watch:
        follow(paths, config.every)
    runs, now = [Run(path) for path in paths], time.time()
    if not config.watch:
        print(screen(runs, now))
    place, names = (runs[0].path, ('plot.png', 'report.html')) if len(runs) == 1 else (Path(), ('compare.png', 'compare.html'))
    if config.plot:
        heading = f'{runs[0].name}: {runs[0].state(now)[0]}, step {runs[0].step:,.0f}' if len(runs) == 1 else ''
        write(config.out or place / names[0], draw(panels(runs), heading))
    if config.report:
        write(config.out or place / names[1], report(runs, now).encode())


if __name__ == '__main__':
    configurator.run(main)
