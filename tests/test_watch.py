"""Status, pictures and pages show what the files of a run say, and no damaged file breaks them."""
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

import watch
from configurator import UserError
from runtime.pages import running_mean
from schedule import schedule

ROOT = Path(__file__).parent.parent
OPTIONS = {'max_steps': 1000, 'batch_tokens': 4096, 'learning_rate': 1e-3, 'min_lr_ratio': 0.1, 'mid_lr_ratio': 0.3, 'warmup_steps': 100,
         'schedule': 'cosine', 'decay_steps': 0, 'boundary_step': 0, 'restart_steps': 0, 'restart_factor': 1, 'weight_decay': 0.1,
         'dataset': 'pylib', 'mandatory_steps': [500], 'sample_prompts': '{|'}


def train_line(step, **more):
    return {'kind': 'train', 'step': step, 'tokens': step * 4096, 'loss': 4 + 5 * math.exp(-step / 100), 'lr': 1e-3, 'wd': 0.1, 'grad_norm': 1.5,
            'tokens_per_s': 8192.0, 'mfu': None, 'mem_gb': 0.7, 'loader_wait': 0.002, **more}


def eval_line(step, loss):
    return {'kind': 'eval', 'step': step, 'tokens': step * 4096, 'loss': loss, 'perplexity': math.exp(loss), 'bits_per_byte': loss / 2.5}


def sample_line(step, prompt, mode, text='some text', **more):
    return {'step': step, 'prompt': prompt, 'mode': mode, 'text': text, 'tokens': 8, 'entropy': 2.5, 'repetition': 0.25, **more}


STATISTICS = {'trix_overload': 0.2, 'trix_entropy': 0.99, 'trix_dead': 0.0, 'ternary_minus': 0.3, 'ternary_zero': 0.4, 'ternary_plus': 0.3,
              'ternary_flips': 0.01, 'mfu': 0.31}
LINES = [eval_line(0, 9.0), *(train_line(step, **STATISTICS) for step in range(10, 310, 10)), eval_line(100, 5.0), eval_line(200, 4.5),
         {'kind': 'event', 'event': 'skipped', 'step': 211, 'loss': 'nan', 'grad_norm': 'inf', 'windows': [[1, 2]]},
         {'kind': 'event', 'event': 'skipped', 'step': 212, 'loss': 'nan', 'grad_norm': 'inf'},
         {'kind': 'event', 'event': 'spike', 'step': 250, 'loss': 7.5}, eval_line(300, 4.75)]


def write_lines(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def make(folder, lines=LINES, samples=(), age=0.0, options=OPTIONS, **status):
    """A run directory that was last written to `age` seconds ago."""
    (folder / 'checkpoints').mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(options, indent=1))
    write_lines(folder / 'metrics.jsonl', lines)
    write_lines(folder / 'samples.jsonl', samples)
    (folder / 'status.json').write_text(json.dumps({
        'state': 'running', 'step': 300, 'max_steps': 1000, 'tokens': 300 * 4096, 'best': 4.5, 'best_step': 200, 'eta': 3720.0, 'processes': 2,
        'pid': os.getpid(), 'host': socket.gethostname(), 'time': time.time() - age, **status}))
    for step in (100, 200, 300):
        (folder / f'checkpoints/step_{step:07d}.pt').write_bytes(bytes(500_000))
    os.utime(folder / 'metrics.jsonl', (time.time() - age,) * 2)
    return folder


def facts(folder):
    return watch.facts(watch.Run(folder), time.time())


def screen(*folders):
    return watch.screen([watch.Run(folder) for folder in folders], time.time())


# ----------------------------------------------------------------------------------------------------------------------
# Status

def test_status_of_a_healthy_run_says_what_its_files_say(tmp_path):
    said = facts(make(tmp_path / 'x', age=7))
    mean = sum(4 + 5 * math.exp(-step / 100) for step in range(110, 310, 10)) / 20
    assert said == {
        'state': 'running', 'last line': '7 s ago', 'progress': '[######--------------] 30 %', 'step': '300 of 1,000', 'time left': '1 h 2 min',
        'training time': '2 min 30 s', 'tokens': '1,228,800', 'loss curve': '█▇▇▆▆▅▅▄▄▄▃▃▃▃▂▂▂▂▂▂▂▁▁▁▁▁▁▁▁▁', 'training loss': f'{4 + 5 * math.exp(-3):.4f} (mean of 20: {mean:.4f})', 'validation loss': '4.7500 at step 300',
        'best': '4.5000 at step 200', 'perplexity': '90.02', 'bits per byte': '1.8000', 'learning rate': '0.001', 'weight decay': '0.1',
        'schedule': 'cosine, until step 1,000, in 5 min 50 s', 'tokens/s': '8,192', 'MFU': '31.0%',
        'waiting for data': '0.2%', 'memory': '0.70 GB', 'processes': '2', 'events': '2 skipped, 1 spike',
        'last event': 'spike at step 250, loss 7.5', 'checkpoints': '3, 1.5 MB', 'newest': 'step_0000300.pt, 0 s ago'}
    assert watch.remarks([watch.Run(tmp_path / 'x')], time.time()) == []


def test_the_training_time_of_a_run_that_continues_another_says_from_which_step(tmp_path):
    resumed = {'kind': 'event', 'event': 'resumed', 'step': 100}
    own = [resumed, *(train_line(step) for step in range(110, 310, 10))]
    assert facts(make(tmp_path / 'second', own))['training time'] == '1 min 40 s since step 100'
    assert facts(make(tmp_path / 'same', [*LINES, resumed]))['training time'] == '2 min 30 s'


def test_a_killed_run_is_reported_with_the_way_to_continue(tmp_path):
    child = subprocess.Popen(['true'])
    child.wait()
    here, elsewhere = make(tmp_path / 'here', pid=child.pid), make(tmp_path / 'elsewhere', pid=child.pid, host='another-machine')
    assert 'killed (its process is gone): continue with --resume=auto' in screen(here) and facts(here)['state'] == 'killed'
    assert facts(elsewhere)['state'] == 'running'  # nobody here can tell


@pytest.mark.parametrize('seconds, age, state', [
    (5, 55, 'running'), (5, 65, 'stalled'), (100, 480, 'running'), (100, 520, 'stalled'), (None, 590, 'running'), (None, 610, 'stalled')])
def test_a_run_has_stalled_after_a_minute_and_five_usual_gaps(tmp_path, seconds, age, state):
    lines = [train_line(step, tokens_per_s=40_960 / seconds) for step in range(10, 210, 10)] if seconds else []
    folder = make(tmp_path / 'x', lines, age=age)
    assert facts(folder)['state'] == state
    assert (f'no line for {watch.duration(age)}; lines usually come every' in screen(folder)) == (state == 'stalled')


def test_a_run_whose_clock_is_ahead_is_named_in_a_single_look(tmp_path):
    folder = make(tmp_path / 'x', age=-7200)
    assert facts(folder)['state'] == 'running' and re.fullmatch('(2 h|1 h 59 min) in the future', facts(folder)['last line'])
    says = f'in the future: the clock of {socket.gethostname()} is ahead of the clock here, so only --watch can tell whether the run has stalled'
    assert says in screen(folder).split('\n')[0]
    assert 'future' not in screen(make(tmp_path / 'over', age=-7200, state='finished')).split('\n')[0]


@pytest.mark.parametrize('ahead', [-7200, -30, 0, 30, 7200])
def test_watching_sees_a_run_stall_whatever_its_clock_says(tmp_path, monkeypatch, capsys, ahead):
    """A run that writes for 100 s of ours and then nothing; it writes the time of its own clock."""
    folder, start, states = make(tmp_path / 'x', age=-ahead), time.time(), []
    clock = iter(range(0, 10**6, 5))

    def sleep(seconds):
        at = next(clock)
        monkeypatch.setattr(watch.time, 'time', lambda: start + at)
        if at <= 100:
            status = json.loads((folder / 'status.json').read_text())
            (folder / 'status.json').write_text(json.dumps({**status, 'time': start + at + ahead}))
            os.utime(folder / 'metrics.jsonl', (start + at + ahead,) * 2)
        run = capsys.readouterr().out
        states.append((at, 'stalled' if 'stalled' in run else 'running' if 'running' in run else states[-1][1]))
        if at == 300:
            (folder / 'status.json').write_text(json.dumps({'state': 'finished', 'step': 300}))
    monkeypatch.setattr(watch.time, 'sleep', sleep)
    watch.follow([folder], 5)
    during = [state for at, state in states if 10 < at <= 150]
    after = [state for at, state in states if 175 < at]
    assert set(during) == {'running'} and set(after) == {'stalled'}, states


def test_one_slow_line_does_not_change_what_is_usual(tmp_path):
    lines = [train_line(step, tokens_per_s=1.0 if step == 150 else 8192) for step in range(10, 210, 10)]
    assert facts(make(tmp_path / 'x', lines, age=65))['state'] == 'stalled'


@pytest.mark.parametrize('state', ['finished', 'interrupted', 'diverged', 'failed'])
def test_a_run_that_is_over_is_not_judged_by_its_process_or_age(tmp_path, state):
    folder = make(tmp_path / 'x', state=state, age=1e6, pid=2**30)
    assert facts(folder)['state'] == state and facts(folder)['last line'] == '11 d 13 h ago' and not facts(folder)['time left']
    assert screen(folder).startswith(f'{watch.Run(folder).name}: {state}: ') == (state != 'finished')


def test_hints_are_shown(tmp_path):
    folder = make(tmp_path / 'x', [eval_line(step, 4.0 + step / 1000) for step in range(0, 2000, 100)])
    assert 'x: rising loss: ' in screen(folder)


def test_the_newest_typical_sample_is_shown_without_control_characters(tmp_path):
    folder = make(tmp_path / 'x', samples=[sample_line(100, 'a', 'typical', 'old'), sample_line(200, 'def ', 'greedy', 'not this'),
                                           sample_line(200, 'def ', 'typical', 'x\x1b[31m\ud800é\n' + 'second\n' * 20)])
    text = screen(folder)
    assert "sample at step 200, typical, after 'def ', entropy 2.50 nats, repetition 25%\n  x [31m é\n  second" in text
    assert 'old' not in text and 'not this' not in text and text.count('second') == 7


@pytest.mark.parametrize('files', [{'config.json': json.dumps(OPTIONS)}, {'metrics.jsonl': ''}, {'status.json': '{"state": "running", "step": 0}'}])
def test_an_empty_run_shows_what_there_is(tmp_path, files, capsys):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    watch.main([str(tmp_path), '--plot', '--report'])
    out = capsys.readouterr().out
    assert 'no training line yet' in out and 'plot.png' in out and 'report.html' in out
    assert ('0 of 1,000' in out) == ('config.json' in files)
    assert blue(tmp_path / 'plot.png') < 100 and (pale(tmp_path / 'plot.png') > 500) == ('config.json' in files)  # the plan is drawn
    check_page(tmp_path / 'report.html')


def test_runs_stand_side_by_side(tmp_path, capsys):
    make(tmp_path / 'a', state='finished'), make(tmp_path / 'b', [train_line(10)])
    watch.main([str(tmp_path / 'a'), str(tmp_path / 'b')])
    rows = [re.split('  +', line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0][1:] == [f'{tmp_path.name}/a', f'{tmp_path.name}/b']
    assert ['state', 'finished', 'running'] in rows and ['tokens', '1,228,800', '40,960'] in rows
    assert ['best', '4.5000 at step 200'] in rows  # b has none


def test_training_time_leaves_evaluations_out_and_starts_where_the_run_does(tmp_path):
    folder = make(tmp_path / 'x', [train_line(step, tokens_per_s=40.96) for step in range(1010, 1050, 10)])  # steps of 100 s, from step 1000
    assert watch.series(watch.Run(folder).train, 'gap')[1] == [1000.0] * 4
    assert watch.series(watch.Run(folder).train, 'step', 'hours')[0] == pytest.approx([1 / 3.6, 2 / 3.6, 3 / 3.6, 4 / 3.6])


@pytest.mark.parametrize('seconds, text', [(0.4, '0 s'), (59, '59 s'), (185, '3 min 5 s'), (7500, '2 h 5 min'), (7200, '2 h'), (371_000, '4 d 7 h'), (-3, '0 s'),
                                           (5e9, '159 years')])
def test_durations_are_readable(seconds, text):
    assert watch.duration(seconds) == text


@pytest.mark.parametrize('step, options, text', [
    (40, {}, 'warm-up, until step 100, in 30 s'), (100, {}, 'cosine, until step 1,000, in 7 min 30 s'),
    (399, {'schedule': 'two_stage', 'boundary_step': 400}, 'stage 1, until step 400, in 0 s'),
    (400, {'schedule': 'two_stage', 'boundary_step': 400}, 'stage 2, until step 1,000, in 5 min'),
    (700, {'schedule': 'wsd'}, 'stable, until step 800, in 50 s'), (900, {'schedule': 'wsd'}, 'decay, until step 1,000, in 50 s'),
    (500, {'schedule': 'restarts', 'restart_steps': 300, 'restart_factor': 2}, 'cosine cycle, until step 1,000, in 4 min 10 s'),
    (20, {'schedule': 'onecycle'}, 'warm-up, until step 99, in 40 s'), (1000, {}, ''), (40, {'warmup_steps': '3'}, '')])
def test_the_stage_of_the_schedule_and_its_remaining_time_are_shown(tmp_path, step, options, text):
    folder = make(tmp_path / 'x', [train_line(at) for at in (step - 20, step - 10, step)], options={**OPTIONS, **options}, step=step)
    assert facts(folder)['schedule'] == text


@pytest.mark.parametrize('values, line', [([], ''), ([3.0], ''), ([1.0, 2.0], '▁█'), ([5.0] * 3, '▁▁▁'), ([9.0, 2.0, 5.5], '█▁▅')])
def test_a_curve_in_one_line(values, line):
    assert watch.sparkline(values) == line


def test_a_long_curve_keeps_its_ends_and_its_width():
    line = watch.sparkline([1000 - i for i in range(1000)])
    assert len(line) == 40 and line[0] == '█' and line[-1] == '▁' and sorted(line, reverse=True) == [*line]


def test_all_samples_of_the_newest_round_are_shown_in_full(tmp_path, capsys):
    make(tmp_path / 'x', samples=[sample_line(100, 'a', 'greedy', 'old'), sample_line(200, 'a', 'greedy', 'one\n' * 20), sample_line(200, 'b', 'stress', 'two')])
    watch.main([str(tmp_path / 'x'), '--samples'])
    out = capsys.readouterr().out
    assert out.count('  one\n') == 20 and '  two' in out and 'old' not in out and 'stress' in out


def test_hints_use_the_training_loss_without_validation(tmp_path):
    flat = [train_line(step, loss=3.0 + 0.02 * math.sin(step)) for step in range(10, 4010, 10)]
    assert 'x: plateau: the training loss fell by less than 0.5 % from step 3010 to 4000' in screen(make(tmp_path / 'x', flat))
    assert 'plateau' not in screen(make(tmp_path / 'validated', [*flat, eval_line(4000, 3.0)]))


@pytest.mark.skipif(not shutil.which('jq'), reason='jq is not installed')
def test_the_jq_commands_of_the_readme_work(tmp_path):
    make(tmp_path / 'runs/trix_tiny', samples=[sample_line(100, 'def', 'greedy', ' one'), sample_line(200, 'def', 'typical', ' two')])
    commands = re.findall(r'^jq .*', (ROOT / 'README.md').read_text(), re.M)
    shown = [subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout for command in commands]
    losses = [[*map(float, line.split())] for line in shown[0].splitlines()]  # versions of jq print 9.0 as 9 or 9.0
    assert losses == [[0, 9], [100, 5], [200, 4.5], [300, 4.75]] and shown[1] == 'def two\n'


# ----------------------------------------------------------------------------------------------------------------------
# Following

def scripted_sleep(monkeypatch, *acts):
    """time.sleep does the next act instead; a call too many fails."""
    acts = iter(acts)
    monkeypatch.setattr(watch.time, 'sleep', lambda seconds: next(acts)())


def test_watching_into_a_pipe_prints_each_change_once_and_ends_with_the_run(tmp_path, monkeypatch, capsys):
    folder, now = make(tmp_path / 'x', age=50), time.time()

    def grow():
        with open(folder / 'metrics.jsonl', 'a') as file:
            file.write(json.dumps(train_line(310, loss=1.25)) + '\n')

    def finish():
        (folder / 'status.json').write_text(json.dumps({'state': 'finished', 'step': 1000, 'time': now + 5}))
    scripted_sleep(monkeypatch, lambda: None, grow, lambda: None, finish)
    watch.main([str(folder), '--watch', '--plot', f'--out={tmp_path}/last.png'])
    out = capsys.readouterr().out
    assert blue(tmp_path / 'last.png') > 1500  # drawn when all is over
    assert '\x1b' not in out and re.findall(r'^state +(\w+)', out, re.M) == ['running', 'running', 'finished']
    assert out.count('1.2500 (mean') == 2


def test_watching_on_a_terminal_draws_in_place_and_never_more_than_fits(tmp_path, monkeypatch, capsys):
    folder = make(tmp_path / 'x', state='finished', samples=[sample_line(300, '', 'typical', 'wide ' * 100)])
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(watch.shutil, 'get_terminal_size', lambda: os.terminal_size((50, 12)))
    watch.main([str(folder), '--watch'])
    out = capsys.readouterr().out
    assert out.startswith('\x1b[2J\x1b[H') and out.endswith('\x1b[J')
    lines = out.removeprefix('\x1b[2J\x1b[H').removesuffix('\x1b[J').splitlines()
    assert len(lines) == 11 and all(line.endswith('\x1b[K') and len(line) <= 49 + 3 for line in lines)


def test_ctrl_c_ends_watching_without_a_traceback(tmp_path):
    watcher = subprocess.Popen([sys.executable, ROOT / 'watch.py', make(tmp_path / 'x', pid=os.getpid()), '--watch', '--every=0.05'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores it
    assert 'x' in watcher.stdout.readline()
    watcher.send_signal(signal.SIGINT)
    _, said = watcher.communicate(timeout=20)
    assert watcher.returncode == 130 and said == ''


def test_a_reader_of_a_growing_file_sees_a_prefix_of_it(tmp_path):
    lines, folder, stop = [train_line(step) for step in range(1, 201)], make(tmp_path / 'x', []), threading.Event()

    def write():
        draw, data = random.Random(0), ''.join(json.dumps(line) + '\n' for line in lines).encode()
        with open(folder / 'metrics.jsonl', 'ab', buffering=0) as file:
            while data:
                size = draw.randint(1, 400)
                file.write(data[:size])
                data = data[size:]
                time.sleep(0.001)
        stop.set()
    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not stop.is_set():
        seen.append(watch.series(watch.Run(folder).train, 'loss')[1])
    writer.join()
    everything = [line['loss'] for line in lines]
    assert all(one == everything[:len(one)] for one in seen) and len({len(one) for one in seen}) > 3
    assert watch.series(watch.Run(folder).train, 'loss')[1] == everything


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and pages

def pixels(path, *color):
    """How many pixels of a picture have a colour (0 to 255)."""
    return int((np.abs(matplotlib.image.imread(path)[..., :3] * 255 - color).max(-1) < 4).sum())


def blue(path):
    return pixels(path, 31, 119, 180)  # of a curve


def pale(path):
    return pixels(path, 188, 214, 233)  # of a planned one


class Page(HTMLParser):
    """Notes what a page holds, and that its tags are closed in the right order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for key, value in attributes if key == 'id']
        assert not any(key.startswith('on') for key, _ in attributes)
        if tag != 'meta':
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for key, value in attributes if key == 'id']

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_page(path, least=4):
    """Well-formed, loads nothing, runs nothing; returns the Page."""
    source = path.read_text()
    page = Page(source)
    assert source.startswith('<!DOCTYPE html>\n') and source.count('<!DOCTYPE') == 1 and '<?xml' not in source
    assert 'http' not in re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', '', source)
    assert not {'script', 'link', 'img', 'iframe', 'object'} & {*page.tags} and '@import' not in source
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*', source) == [] == re.findall(r'url\((?!#)', source)
    assert len(page.ids) == len({*page.ids}) > 50
    drawings = re.findall(r'<svg.*?</svg>', source, re.S)
    assert len(drawings) == page.tags.count('svg') >= least
    for drawing in drawings:
        names = {node.get('id') for node in ElementTree.fromstring(drawing).iter()}
        assert {*re.findall(r'url\(#([^)]*)\)', drawing), *re.findall(r'href="#([^"]*)"', drawing)} <= names
    return page


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A run with its plot.png and report.html."""
    hostile = '</pre><script>alert("&amp;")</script>\n  <b>bold'
    folder = make(tmp_path_factory.mktemp('runs') / 'a$b$<i>', samples=[
        sample_line(200, 'old', 'greedy'),
        *(sample_line(300, prompt, mode, hostile) for prompt in ('', '<def>') for mode in ('greedy', 'typical', 'stress'))])
    watch.main([str(folder), '--plot', '--report'])
    return folder


def test_the_plot_is_drawn(drawn):
    image = matplotlib.image.imread(drawn / 'plot.png')
    assert image.shape == (1260, 1560, 4) and blue(drawn / 'plot.png') > 1500
    corners = [image[y:y + 420, x:x + 780, :3].std() for y in (0, 420, 840) for x in (0, 780)]
    assert min(corners) > 0.05  # none of six panels is blank


def test_panels_show_the_numbers_of_the_run(drawn):
    run, axes = watch.Run(drawn), Figure().subplots()
    watch.draw_panel(run, 'loss', True, axes)
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves['validation'] == [[0, 9.0], [100, 5.0], [200, 4.5], [300, 4.75]] and curves['best 4.5000'] == [[200, 4.5]]
    assert axes.lines[0].get_xydata().tolist() == [[line['step'], line['loss']] for line in run.train]
    assert [y for _, y in curves['training']] == [line['loss'] for line in run.train]  # too few values for a mean
    assert {event.get_label(): [segment[0][0] for segment in event.get_segments()] for event in axes.collections} == {
        'skipped': [211, 212], 'spike': [250]}
    axes = Figure().subplots()
    watch.draw_panel(run, 'TriX balance', False, axes)
    assert {line.get_label(): line.get_ydata()[-1] for line in axes.lines[1::2]} == pytest.approx({'overload': 0.2, 'entropy': 0.99, 'dead tiles': 0})
    assert list(watch.panels([run])) == list(watch.PANELS) and 'TriX balance' not in watch.panels([SimpleNamespace(train=[train_line(10)])])


def test_the_planned_schedule_stands_behind_the_actual_one(drawn):
    axes = Figure().subplots()
    watch.draw_panel(watch.Run(drawn), 'schedule', False, axes)
    plan = dict(axes.lines[0].get_xydata().tolist())
    assert axes.lines[0].get_label() == 'planned' and len(plan) == 1000
    assert all(plan[step] == schedule(step, SimpleNamespace(**OPTIONS))[0] for step in (0, 99, 500, 999))


@pytest.mark.parametrize('options', [{'max_steps': 10.5}, {'restart_factor': 0.5, 'schedule': 'restarts', 'restart_steps': 1},
                                   {'schedule': 'none'}, {'warmup_steps': '3'}, {'learning_rate': 'high'}, {'restart_factor': None}])
def test_a_damaged_config_has_no_plan(tmp_path, options):
    assert watch.plan_of(watch.Run(make(tmp_path / 'x', options={**OPTIONS, **options}))) == []


def test_the_report_is_one_page_that_loads_and_runs_nothing(drawn):
    page = check_page(drawn / 'report.html')
    text, source = ' '.join(page.text), (drawn / 'report.html').read_text()
    assert source.index('class="big">4.5000') < source.index('<svg') < source.index('<table>')  # the result, curves, then tables
    assert 'ago' not in text and time.strftime('%Y-%m-%d ') in text  # a page is read later
    assert page.tags.count('svg') == 6 and 'a$b$<i>: running' in text
    assert all(word in text for word in ('4.5000 at step 200', '90.02', 'skipped at step 211', 'batch_tokens', '[500]', '{|'))


def test_samples_of_the_last_round_are_escaped(drawn):
    page = check_page(drawn / 'report.html')
    assert page.text.count('</pre><script>alert("&amp;")</script>\n  <b>bold') == 6 and page.tags.count('pre') == 6 and 'b' not in page.tags
    assert page.text.count('entropy 2.50 nats, repetition 25%') == 6 and "'<def>'" in page.text and "'old'" not in page.text


def test_runs_are_compared_in_one_picture_and_one_page(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [train_line(step, loss=3.0, tokens_per_s=4096.0) for step in range(10, 110, 10)]
    other = make(tmp_path / 'other', lines, options={**OPTIONS, 'learning_rate': 0.125})
    watch.main([str(drawn), str(other), '--plot', '--report'])
    assert 'wrote runs/compare.png\nwrote runs/compare.html' in capsys.readouterr().out
    assert blue('runs/compare.png') > 1000 and pixels('runs/compare.png', 255, 127, 14) > 300  # a curve of each
    text = check_page(tmp_path / 'runs' / 'compare.html').text
    assert text.count('svg') == 0 and '0.125' in text and 'learning_rate' in text and 'batch_tokens' not in text  # that is the same
    axes = Figure().subplots()
    watch.panels([watch.Run(drawn), watch.Run(other)])['training loss over time'](axes)
    curves = {line.get_label(): line.get_xydata() for line in axes.lines[1::2]}
    assert curves[f'{tmp_path.name}/other'][-1].tolist() == pytest.approx([100 / 60, 3.0]) and axes.get_xlabel() == 'minutes of training'


def test_runs_on_different_data_are_compared_only_by_bits_per_byte(tmp_path, capsys):
    def run(name, loss, bits, **options):
        evals = [{'kind': 'eval', 'step': step, 'tokens': 100 * step, 'loss': loss, 'perplexity': 9.87, 'bits_per_byte': bits} for step in (0, 10)]
        return make(tmp_path / name, [train_line(10, loss=loss), *evals], options={**OPTIONS, **options})

    def compared(*runs):
        watch.main([str(path) for path in runs])
        return capsys.readouterr().out, watch.panels([*map(watch.Run, runs)])
    here, there = {'data_fingerprint': 'a'}, {'data_fingerprint': 'b'}
    a, b, c, old = run('a', 3.125, 1.5, **here), run('b', 4.375, 1.25, **there), run('c', 2.625, 1.75, **here), run('old', 2.875, 1.0)
    text, panels = compared(a, b)
    assert 'losses per token are not comparable' in text and '1.2500' in text and '1.5000' in text
    assert not any(loss in text for loss in ('3.125', '4.375', '9.87')) and [*panels] == ['bits per byte', 'throughput']
    axes = Figure().subplots()
    panels['bits per byte'](axes)
    assert [line.get_ydata()[-1] for line in axes.lines] == [1.5, 1.25] and axes.get_ylabel() == 'bits per byte'
    for runs in ((a, c), (a, old)):  # the same; and without fingerprints, by the names of the data
        text, panels = compared(*runs)
        assert 'not comparable' not in text and '3.1250' in text and 'validation loss' in panels
    assert 'not comparable' in compared(a, run('other', 3.0, 1.0, vocab_size=77))[0]
    text, panels = compared(run('rows', 3.0, None, **here), run('rows2', 3.0, None, **there))
    assert 'no bits per byte in rows, rows2: they need a validation and a tokenizer' in text.replace(f'{tmp_path.name}/', '')
    assert [*panels] == ['throughput']  # no empty picture


def test_a_curve_of_one_point_is_visible(tmp_path):
    axes = Figure().subplots()
    runs = [watch.Run(make(tmp_path / name, [train_line(10, tokens_per_s=4096.0)], options=OPTIONS)) for name in 'ab']
    watch.panels(runs)['throughput'](axes)
    assert [line.get_marker() for line in axes.lines if line.get_label() in [run.name for run in runs]] == ['o', 'o']


def test_the_schedule_of_a_config_is_drawn_before_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    watch.main([str(ROOT / 'config/trix_tiny.py'), '--plot', '--max_steps=50', '--warmup_steps=10'])
    assert capsys.readouterr().out == 'wrote runs/schedule.png\n' and blue('runs/schedule.png') > 500
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        watch.main([str(ROOT / 'config/trix_tiny.py'), '--plot', '--learnig_rate=1'])


def test_the_schedule_of_epochs_has_the_steps_that_the_data_give(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn, words = [], [str(ROOT / 'config/wikitext_tiny.py'), '--plot', '--batch_size=2', '--block_size=8']
    monkeypatch.setattr(watch, 'draw', lambda panels, heading: b'')
    monkeypatch.setattr(watch, 'schedule_panel', lambda config: drawn.append((config.max_steps, config.warmup_steps)))
    watch.main(words)
    assert 'wikitext2 is not prepared yet. The picture shows 1,000 steps' in capsys.readouterr().out
    data = SimpleNamespace(n_windows=100, limit=lambda windows: setattr(data, 'n_windows', windows))
    monkeypatch.setattr('corpora.opening.open_dataset', lambda *arguments: data)
    watch.main(words)
    assert capsys.readouterr().out.startswith('epochs=20: 1,000 steps\n')  # 20 passes over 100 windows, two windows a step
    watch.main([*words, '--max_windows=10'])
    assert capsys.readouterr().out.startswith('epochs=20: 100 steps\n')
    assert [steps for steps, _ in drawn] == [1000, 1000, 100] and drawn[-1][1] == 5  # the warm-up of 1,000 would not fit


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes and damage

@pytest.mark.parametrize('words, message', [
    ([], 'name a run: python watch.py runs/x'), (['--watch'], 'name a run'), (['runs/trix_tny'], "no such directory, did you mean 'runs/trix_tiny'?"),
    (['runs/nope'], 'runs/nope: no such directory$'),
    (['runs'], 'runs: not a run, because it has none of config.json, metrics.jsonl, status.json; it contains the runs runs/trix_tiny'),
    (['file'], 'file: not a run'), (['runs/trix_tiny', '--plt'], "did you mean 'plot'"), (['runs/trix_tiny', '--every=0'], 'every=0.0 must be'),
    (['runs/trix_tiny', '--out=x.png'], 'ask for --plot or for --report'), (['runs/trix_tiny', '--plot', '--report', '--out=x.png'], '--out=FILE'),
    (['config.py'], 'config.py is a config file, not a run'), (['config.py', 'runs/trix_tiny', '--plot'], 'is a config file'),
    (['config.py', '--plot'], 'config.py: no such file'), (['runs/trix_tiny', '--plot', '--out=nowhere/x.png'], 'nowhere/x.png: could not be written'),
])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    make(Path('runs/trix_tiny'), [])
    Path('file').touch()
    with pytest.raises(UserError) as refused:
        watch.main(words)
    text = str(refused.value) + '$'  # $: the end of the message
    assert message in text and '\n' not in text


def test_the_program_refuses_with_exit_code_2_and_starts_without_matplotlib():
    code = 'import sys, configurator, watch; print({"matplotlib", "train"} & {*sys.modules}); configurator.run(watch.main)'
    done = subprocess.run([sys.executable, '-c', code, 'nowhere'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == 'set()\n' and done.stderr == 'nowhere: no such directory\n'


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        watch.main(['config/x.py', '--help'])
    said = capsys.readouterr().out
    assert end.value.code == 0 and 'python watch.py runs/x --watch' in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith('  --')] == ['--watch', '--samples', '--plot', '--report', '--every', '--out']


JUNK = [None, True, -1, 0, 1e308, -1e308, 1e-320, float('nan'), float('inf'), 10**400, 2**63, '', 'nan', '\ud800', '\x1b[2J', '$\\frac$', '_x',
        [], [[[]]], {}, {'a': {'b': []}}, 'x' * 5000, '<script>']


def junk_lines(draw, lines):
    """Lines with some values, keys and whole objects replaced by nonsense."""
    for line in lines:
        line = dict(line)
        for key in draw.sample(sorted(line), draw.randint(0, 2)):
            line[key] = draw.choice(JUNK)
        line.update({draw.choice(['step', '', 'ключ', 'tokens']): draw.choice(JUNK)} if draw.random() < 0.1 else {})
        yield line if draw.random() < 0.95 else draw.choice(JUNK)


def damage(draw, folder, template):
    """A copy of a run, damaged in every way that a disk, a kill or a person may find."""
    shutil.copytree(template, folder)
    for name in ('config.json', 'metrics.jsonl', 'samples.jsonl', 'status.json'):
        path, raw = folder / name, (template / name).read_bytes()
        kind = draw.choice(['whole', 'junk', 'junk', 'cut', 'bytes', 'flips', 'empty', 'missing', 'directory', 'deep', 'zeros'])
        if kind in ('missing', 'directory'):
            path.unlink()
            if kind == 'directory':
                path.mkdir()
        elif kind == 'junk':
            objects = [json.loads(raw)] if name.endswith('.json') else map(json.loads, raw.splitlines())
            path.write_text('\n'.join(map(json.dumps, junk_lines(draw, objects))))
        elif kind == 'flips':
            flipped = bytearray(raw)
            for _ in range(draw.randint(1, 50)):
                flipped[draw.randrange(len(flipped))] = draw.randrange(256)
            path.write_bytes(flipped)
        elif kind != 'whole':
            path.write_bytes({'cut': raw[:draw.randrange(len(raw))], 'bytes': draw.randbytes(2000), 'empty': b'', 'zeros': bytes(500),
                              'deep': b'{"step": ' + b'[' * draw.choice([900, 950, 990, 100_000]) + b'\n'}[kind])
    if draw.random() < 0.2:
        shutil.rmtree(folder / 'checkpoints')
        draw.choice([(folder / 'checkpoints').touch, (folder / 'checkpoints').mkdir])()
    elif draw.random() < 0.3:
        (folder / 'checkpoints/step_0000300.pt').unlink()
        (folder / 'checkpoints/step_0000300.pt').symlink_to('gone')


def test_no_damage_breaks_status_pictures_or_pages(tmp_path, capsys):
    draw, counts = random.Random(0), {'whole': 0, 'drawn': 0}
    template = make(tmp_path / 'template', LINES, [sample_line(300, 'p', mode) for mode in ('greedy', 'typical')])
    for i in range(200):
        folder = tmp_path / f'{i}'
        damage(draw, folder, template)
        if not any((folder / name).exists() for name in ('config.json', 'metrics.jsonl', 'status.json')):
            (folder / 'status.json').touch()
        watch.main([str(folder)])
        out = capsys.readouterr().out
        assert re.search(r'^state  +\S', out, re.M) and '\x1b' not in out and out.encode()
        run = watch.Run(folder)
        assert all(type(value) is not bool and math.isfinite(value) for line in run.train for value in line.values())
        assert all(math.isfinite(value) for line in watch.plan_of(run) for value in line.values())
        if i % 35 == 0:
            watch.main([str(folder), *[str(template)] * (i % 3 == 2), ('--plot', '--report')[i % 2], f'--out={tmp_path}/drawn'])
            if i % 2:
                check_page(tmp_path / 'drawn', 2)  # with a damaged config the data may be others, so that losses aren't drawn
            else:
                assert matplotlib.image.imread(tmp_path / 'drawn')[..., :3].std() > 0.05
            counts['drawn'] += 1
        counts['whole'] += run.train == watch.Run(template).train
    assert counts['drawn'] == 6 and 5 < counts['whole'] < 60


def test_the_smoothed_curve_of_a_few_values_is_the_values_themselves():
    assert running_mean([8.2, 8.1]) == [8.2, 8.1] and running_mean([3.0, 1.0, 2.0] * 20) == [3.0, 1.0, 2.0] * 20
    assert running_mean([3.0, 1.0, 2.0] * 27)[1:-1] == pytest.approx([2.0] * 79)
