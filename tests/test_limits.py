"""How long a run is and what it keeps: passes over the data, intervals in tokens, archives, a plateau, a time limit."""
import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as no_deadline
from hypothesis import strategies as st

import checkpoint
import settings
import train
from configurator import UserError
from data import TokenData
from corpora.opening import open_training_data
from corpora.packing import PackedRows
from runs import arguments, finish, lines
from runtime import disk, limits, plan
from training import Progress

QUIET = ['--eval_interval=0', '--sample_interval=0', '--dropout=0']


def problems_of(*words):
    with pytest.raises(UserError) as caught:
        settings.load(list(words))
    return str(caught.value).split('\n')


# ---- epochs and max_windows

def epochs_of(epochs, n_windows, rows=8, step=0, windows=0):
    """max_steps of a run of so many epochs, with `rows` windows in a step."""
    config = settings.load([f'--epochs={epochs}', '--block_size=16', '--batch_size=1', f'--batch_tokens={16 * rows}'])
    settings.resolve_steps(config, n_windows, step, windows)
    return config.max_steps


def test_epochs_are_steps_rounded_up():
    assert [epochs_of(2, 64), epochs_of(0.5, 64), epochs_of(0.1, 64), epochs_of(0.001, 64)] == [16, 4, 1, 1]
    assert [epochs_of(2, 65), epochs_of(2, 68), epochs_of(3, 1000)] == [17, 17, 375]
    assert epochs_of(0.1, 1000, rows=1) == 100  # not 101, although 0.1 * 1000 is not exact in every product


def test_epochs_of_a_resumed_run_count_the_windows_already_read():
    assert epochs_of(2, 64, step=5, windows=40) == 16
    assert epochs_of(2, 64, rows=4, step=5, windows=40) == 5 + 22  # 88 windows are left
    assert epochs_of(1, 64, step=9, windows=72) == 9


def test_steps_that_follow_from_epochs_are_checked_and_completed_after_them():
    config = settings.load(['--epochs=2', '--block_size=16', '--batch_size=8', '--schedule=two_stage'])
    assert config.warmup_steps == -1
    settings.resolve_steps(config, 640)
    assert (config.max_steps, config.warmup_steps) == (160, 8)
    config = settings.load(['--epochs=2', '--block_size=16', '--batch_size=8', '--warmup_steps=200'])
    with pytest.raises(UserError, match='epochs=2 is 160 steps here: warmup_steps=200 is longer than the run of max_steps=160'):
        settings.resolve_steps(config, 640)


@pytest.mark.parametrize('world', [1, 2, 3])
def test_two_epochs_visit_every_window_exactly_twice_on_any_number_of_processes(corpus, world):
    data = TokenData(corpus, 16, 300)
    data.limit(96)
    config = settings.load(['--epochs=2', '--block_size=16', '--batch_size=2', f'--batch_tokens={16 * 12}'])
    settings.resolve_steps(config, data.n_windows)
    size, micro_steps = settings.micro_batches(config, world)
    seen = Counter(window for step in range(config.max_steps) for micro in range(micro_steps) for rank in range(world)
                   for window in data.rows(step, micro, size, 12, rank, world, seed=1).tolist())
    assert seen == {window: 2 for window in range(96)}


def record_windows(path):
    gather = TokenData.gather

    def recorded(self, split, windows):
        if split == 'train':
            with open(path, 'a') as file:
                file.write(json.dumps(windows.tolist()) + '\n')
        return gather(self, split, windows)
    TokenData.gather = recorded


def test_a_resumed_run_completes_its_epochs_on_the_first_windows(corpus, tmp_path):
    seen, words = tmp_path / 'seen', [*arguments(corpus, tmp_path / 'run', *QUIET, '--max_windows=64')]
    words.remove('--max_steps=40')
    code, said = finish([*words, '--epochs=1'], lambda: record_windows(seen))
    assert code == 0 and 'epochs=1: 8 steps of 128 tokens\n' in said and 'only the first 64 windows' in said, said
    code, said = finish([*words, '--epochs=2', '--resume=auto', '--batch_tokens=64'], lambda: record_windows(seen))
    assert code == 0 and 'epochs=2: 24 steps of 64 tokens\n' in said, said
    windows = Counter(window for line in seen.read_text().splitlines() for window in json.loads(line))
    assert windows == {window: 2 for window in range(64)}
    state = checkpoint.find(tmp_path / 'run')[1]
    assert (state['step'], state['windows'], state['config']['max_steps']) == (24, 128, 24)


def test_packed_rows_are_limited_in_the_order_of_the_text(corpus):
    rows = PackedRows(TokenData(corpus, 64, 300))
    n, begin = rows.n_windows, sorted(rows.begin[rows.first[rows.used_rows]].tolist())
    rows.limit(10)
    assert n > 20 and rows.n_windows == 10 and rows.begin[rows.first[rows.used_rows]].tolist() == begin[:10]


def test_the_plan_shows_the_steps_of_epochs(corpus, capsys):
    words = [word for word in arguments(corpus, 'x', '--plan', '--epochs=1.5', '--max_windows=60') if word != '--max_steps=40']
    config = settings.load(words)
    data = open_training_data(config, prepare=False)
    assert plan.run_lines(config, data)[0].startswith('12 steps of 128 tokens = 1,536 tokens: 1.60 epochs of')
    assert plan.run_lines(config, data)[1:] == ['max_windows=60: training reads only the first 60 windows of the data',
        'epochs=1.5: 12 steps of 128 tokens; the last step also reads 6 windows of the next pass']


# ---- options that exclude each other

def test_of_max_steps_and_epochs_the_command_line_wins_over_files(tmp_path):
    (tmp_path / 'a.py').write_text('epochs = 3\nsave_interval_tokens = 500\nmax_windows = 5')
    config = settings.load([f'{tmp_path}/a.py', '--max_steps=10', '--save_interval=7'])
    assert (config.epochs, config.max_steps, config.save_interval_tokens, config.save_interval) == (0, 10, 0, 7)
    (tmp_path / 'b.py').write_text('max_steps = 5\neval_interval = 4')
    config = settings.load([f'{tmp_path}/b.py', '--epochs=2', '--eval_interval_tokens=9'])
    assert (config.epochs, config.eval_interval_tokens, config.eval_interval) == (2, 9, 100)
    (tmp_path / 'c.py').write_text('max_steps = 5\nepochs = 2')
    assert problems_of(f'{tmp_path}/c.py') == [f'{tmp_path}/c.py: max_steps and epochs are both set: leave one of them out']


@pytest.mark.parametrize('words, says', [
    (['--epochs=2', '--max_steps=9'], 'command line: max_steps and epochs are both set: leave one of them out'),
    (['--epochs=0'], 'epochs=0 must be greater than 0: leave it out to train for max_steps'),
    (['--epochs=-1'], 'epochs=-1 must be greater than 0: leave it out to train for max_steps'),
    (['--epochs=inf'], 'epochs=inf must be greater than 0: leave it out to train for max_steps'),
    (['--keep_every=5', '--keep_every_tokens=5'], 'command line: keep_every and keep_every_tokens are both set: leave one of them out'),
    (['--stop_on=plateau'], '--stop_on=plateau and --plateau_steps=N need each other: N is the number of steps without an improvement'),
    (['--stop_on=nan'], "stop_on='nan': expected plateau, or nothing"),
    (['--max_hours=-1'], 'max_hours=-1.0: expected a number of hours, or 0 for no limit'),
    (['--archive_every=-1'], 'archive_every=-1 must not be negative')], ids=str)
def test_invalid_options_are_one_line(words, says):
    assert problems_of(*words) == [says]


def test_keys_and_values_of_other_programs():
    config = settings.load(['--dtype=bf16', '--dataset=wikitext-103', '--compile=off', '--resume'])
    assert (config.dtype, config.dataset, config.compile, config.resume) == ('bfloat16', 'wikitext103', 'false', 'auto')
    kinds = {**train.GPTConfig.__dataclass_fields__, **settings.TrainConfig.__dataclass_fields__}
    assert all(key not in kinds and (to in kinds or ' ' in to) for key, to in settings.ALIASES.items())
    accumulation = 'batch_tokens = batch_size * block_size * accumulation steps'
    for key, answer in {'lr': "'learning_rate'", 'd_model': "'n_embd'", 'num_layers': "'n_layer'", 'num_heads': "'n_head'",
                        'max_seq_len': "'block_size'", 'seq_len': "'block_size'", 'gradient_accumulation': accumulation,
                        'no_eval': '--eval_interval=0', 'eval_every': "'eval_interval'", 'run_id': '--out_dir',
                        'resume_from': '--resume=PATH', 'num_epochs': "'epochs'", 'max_samples': "'max_windows'"}.items():
        assert re.fullmatch(f"command line: unknown key '{key}'.*{re.escape(answer)}.*", *problems_of(f'--{key}=1'))


# ---- intervals in tokens

@no_deadline(deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 500), st.booleans())
def test_an_interval_in_tokens_is_due_at_the_first_step_that_passes_a_multiple(max_steps, batch_tokens, every, in_tokens):
    config = SimpleNamespace(max_steps=max_steps, batch_tokens=batch_tokens, save_interval=every * (not in_tokens),
                             save_interval_tokens=every * in_tokens)
    due = [step for step in range(1, max_steps + 1) if settings.is_due(config, 'save_interval', step, step * batch_tokens)]
    each = batch_tokens if in_tokens else 1
    assert due == [s for s in range(1, max_steps + 1) if any((s - 1) * each < n <= s * each for n in range(every, s * each + 1, every))]
    assert settings.due_steps(config, 'save_interval') == set(due)
    assert settings.is_due(config, 'save_interval', 0, 0)  # a validation comes before the first step, too


# ---- what a run keeps

def without_steps(*words):
    """The usual arguments of a run without their intervals in steps, which exclude those in tokens."""
    return [word for word in arguments(*words) if not word.startswith(('--save_interval=', '--eval_interval='))]


def test_a_run_keeps_and_archives_checkpoints_by_steps_and_by_tokens(corpus, tmp_path):
    out = tmp_path / 'run'
    words = ['--save_interval_tokens=500', '--keep=1', '--keep_every=10', '--archive_every_tokens=1000', '--save_on_best=false',
             '--sample_interval=0', '--eval_interval_tokens=1280', '--max_steps=25']
    code, said = finish(without_steps(corpus, out, *words))
    assert code == 0, said
    assert [path.name for path in checkpoint.steps(out / 'checkpoints')] == [f'step_{s:07d}.pt' for s in (10, 20, 25)]
    assert [path.name for path in checkpoint.steps(out / 'archives')] == [f'step_{s:07d}.pt' for s in (8, 16, 24)]
    assert [line['step'] for line in lines(out, 'eval')] == [0, 10, 20, 25]
    config = settings.load(without_steps(corpus, out, *words))
    assert disk.checkpoints_at_most(config)[0] == 4  # one is being written
    code, said = finish(without_steps(corpus, out, *words, '--max_steps=28', '--keep_every=0', '--resume=auto'))
    assert code == 0 and [path.name for path in checkpoint.steps(out / 'checkpoints')] == [f'step_{s:07d}.pt' for s in (10, 20, 28)]

    archive = out / 'archives' / 'step_0000016.pt'
    assert archive.stat().st_size < 0.6 * checkpoint.find(out)[0].stat().st_size
    model, state = checkpoint.load_model(archive, torch.device('cpu'))
    assert state['step'] == 16 and state['tokenizer'] and state['config']['n_embd'] == 16
    code, said = finish(without_steps(corpus, tmp_path / 'other', f'--resume={archive}'))
    assert code == 2 and said.splitlines()[-1].startswith(f'{archive}: this file has weights but no optimizer state')


def test_a_better_validation_saves_unless_save_on_best_is_off(corpus, tmp_path):
    saved = []
    for better in ('true', 'false'):
        out = tmp_path / better
        words = ['--max_steps=12', '--save_interval=8', '--sample_interval=0', '--keep=0', f'--save_on_best={better}']
        assert finish(arguments(corpus, out, *words))[0] == 0
        saved.append([int(path.stem[5:]) for path in checkpoint.steps(out / 'checkpoints')])
    assert saved == [[5, 8, 10, 12], [8, 12]]


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_the_run(corpus, tmp_path, monkeypatch):
    config = settings.load(arguments(corpus, tmp_path / 'run', '--keep=0', '--save_interval=10', '--archive_every=20'))
    each, weights = disk.checkpoint_bytes(config)
    monkeypatch.setattr(disk, 'free_bytes', lambda path: 4 * each + 2 * weights)
    disk.check_disk(config)
    monkeypatch.setattr(disk, 'free_bytes', lambda path: 4 * each + 2 * weights - 1)
    with pytest.raises(UserError, match=re.escape('no room for 4 checkpoints (all are kept (--keep=0)) of ')):
        train.main(arguments(corpus, tmp_path / 'run', '--keep=0', '--save_interval=10', '--archive_every=20'))
    assert not (tmp_path / 'run').exists()


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob('*') if path.is_file()}


def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing(corpus, tmp_path):
    words = arguments(corpus, tmp_path / 'run', '--max_steps=4', '--sample_interval=0')
    assert finish(words)[0] == 0
    before = contents(tmp_path / 'run')
    code, said = finish([*words, '--resume=auto'])
    assert code == 0 and said.splitlines()[-1] == (
        f'{tmp_path}/run is finished: 4 steps are done. Nothing to do; train longer with --max_steps=8'), said
    assert contents(tmp_path / 'run') == before


# ---- a plateau

@pytest.mark.parametrize('interval', [4, 0], ids=['validation', 'training'])
def test_a_run_on_a_plateau_stops_and_saves(corpus, tmp_path, interval):
    out = tmp_path / 'run'
    more = ['--stop_on=plateau', '--plateau_steps=10', '--learning_rate=1e-30', '--sample_interval=0', '--dropout=0',
            f'--eval_interval={interval}']
    code, said = finish(arguments(corpus, out, *more))
    event, = lines(out, 'event')
    stopped = event['step']
    assert code == 0 and event['event'] == 'plateau' and stopped - event['since'] >= 10
    assert checkpoint.find(out)[1]['step'] == stopped < 40
    assert re.search(rf'stop_on=plateau: the loss has not improved by 0.1 % since step {event["since"]} \(.*\): stopping at step {stopped} of 40', said)
    before = contents(out)
    code, said = finish(arguments(corpus, out, *more, '--resume=auto'))
    assert code == 0 and 'has stopped on a plateau' in said.splitlines()[-1] and contents(out) == before


def test_a_plateau_needs_steps_without_a_gain_of_a_thousandth():
    config, progress = SimpleNamespace(stop_on='plateau', plateau_steps=10, ternary_warmup=0.0, max_steps=100), Progress()
    assert not limits.on_plateau(config, progress)
    for step, loss, stops in ((0, 5.0, False), (5, 4.9, False), (14, 4.8999, False), (15, 4.899, True), (16, 4.8, False), (26, 4.9, True)):
        progress.step = step
        limits.note_loss(progress, loss)
        assert limits.on_plateau(config, progress) == stops, step
    config.stop_on = ''
    assert not limits.on_plateau(config, progress)


# ---- a time limit

def simulate(hours, longest, seconds, validation=0.0, every=100):
    """A run with a clock of its own -> (max_steps at its end, seconds that it took, changes). seconds: step -> seconds."""
    now = [0.0]
    limit, max_steps, step, changes = limits.TimeLimit(hours, clock=lambda: now[0]), longest, 0, []
    while step < max_steps:
        now[0] += seconds(step)
        step += 1
        if limit.is_due(step, max_steps) and step < max_steps:
            before, max_steps = max_steps, limit.fitting_steps(step, step, max_steps, longest)
            changes += [step] if max_steps != before else []
        now[0] += validation * (step % every == 0)
    return max_steps, now[0], changes


@pytest.mark.parametrize('seconds', [lambda step: 1.0, lambda step: 50.0 if step == 0 else 1.0, lambda step: 1 + step % 3,
                                     lambda step: 1 if step < 1000 else 1.5], ids=['steady', 'compiling', 'uneven', 'slower'])
@pytest.mark.parametrize('validation', [0.0, 30.0])
def test_a_run_uses_its_time_limit_and_not_more(seconds, validation):
    steps, took, changes = simulate(1, 100_000, seconds, validation)
    assert 0.88 * 3600 <= took <= 3600 and steps < 4000
    assert changes[0] == 20 and len(changes) < 10


def test_a_run_that_fits_is_not_changed():
    assert simulate(1, 3000, lambda step: 1.0) == (3000, 3000, [])
    assert simulate(1, 100, lambda step: 1.0)[2] == []


def step_clock():
    """A clock on which every optimizer step takes 36 seconds and nothing else takes any."""
    steps, judge = [0], train.TrainStep.judge

    def judged(self, *arguments):
        steps[0] += 1
        return judge(self, *arguments)
    train.TrainStep.judge = judged
    train.TimeLimit = lambda hours, spent: limits.TimeLimit(hours, round(spent / 36) * 36, clock=lambda: 36.0 * steps[0])


def test_max_hours_shortens_run_and_schedule_and_a_resume_is_exact(corpus, tmp_path):
    words = [*QUIET, '--max_hours=0.3', '--schedule=wsd', '--decay_steps=30', '--keep=0']  # 30 steps of 36 seconds, 28 with a reserve
    code, said = finish(arguments(corpus, tmp_path / 'run', *words), step_clock)
    assert code == 0 and 'max_hours=0.3: at 36 s a step, the run ends at step 28 (before: 40)' in said, said
    assert [(line['event'], line['step'], line['max_steps']) for line in lines(tmp_path / 'run', 'event')] == [('max_hours', 20, 28)]
    rates = [line['lr'] for line in lines(tmp_path / 'run', 'train')]
    assert len(rates) == 28 and rates[-1] < 0.3 * max(rates)  # the decay ends with the run
    assert json.loads((tmp_path / 'run/config.json').read_text())['max_steps'] == 28
    code, said = finish(arguments(corpus, tmp_path / 'rest', *words, f'--resume={tmp_path}/run/checkpoints/step_0000024.pt'), step_clock)
    assert code == 0 and 'changed: max_steps' not in said, said
    (_, a), (_, b) = checkpoint.find(tmp_path / 'run'), checkpoint.find(tmp_path / 'rest')
    assert a['step'] == b['step'] == 28 and all(torch.equal(a['model'][key], b['model'][key]) for key in a['model'])


def test_a_schedule_that_does_not_fit_the_time_becomes_automatic():
    config = settings.load(['--max_steps=1000', '--schedule=wsd', '--decay_steps=300', '--warmup_steps=100'])
    asked = config.copy()
    settings.fit_steps(config, asked, 500)
    assert (config.max_steps, config.warmup_steps, config.decay_steps) == (500, 100, 300)
    settings.fit_steps(config, asked, 200)
    assert (config.max_steps, config.warmup_steps, config.decay_steps) == (200, 10, 0)
    settings.fit_steps(config, asked, 2000)
    assert (config.max_steps, config.warmup_steps, config.decay_steps) == (1000, 100, 300)


def test_a_run_does_not_stop_on_a_plateau_before_its_weights_are_ternary():
    config = SimpleNamespace(stop_on='plateau', plateau_steps=10, ternary_warmup=0.5, max_steps=100)
    progress = Progress(plateau_loss=3.0, plateau_step=5)
    assert [limits.on_plateau(config, replace(progress, step=step)) for step in (20, 49, 50)] == [False, False, True]
