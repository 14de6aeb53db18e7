"""The files of a run: strict JSON, one writer, readable while torn. Only a terminal overwrites the progress line."""
import json
import math

import pytest

from runtime import runlog
from configurator import UserError
from runtime.runlog import RunLog, plain, read_lines


def strict(text):
    return json.loads(text, parse_constant=lambda word: pytest.fail(f'{word} is no JSON'))


def test_every_line_is_strict_json_and_nan_is_a_string(tmp_path):
    log = RunLog(tmp_path)
    log.line('metrics.jsonl', kind='event', step=3, loss=math.nan, norms=[1.5, -math.inf], more={'a': (math.inf, None)})
    log.status(state='running', step=3, best=math.inf)
    assert strict((tmp_path / 'metrics.jsonl').read_text()) == {
        'kind': 'event', 'step': 3, 'loss': 'nan', 'norms': [1.5, '-inf'], 'more': {'a': ['inf', None]}}
    status = strict((tmp_path / 'status.json').read_text())
    assert status['best'] == 'inf' and {'state', 'step', 'pid', 'host', 'time'} <= set(status)
    assert plain(2.5) == 2.5 and plain('nan') == 'nan'


def test_a_reader_skips_torn_lines(tmp_path):
    (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1}\n[1]\n\xff\xfe\n{"step": 2}\n{"step": 3, "lo')
    assert read_lines(tmp_path / 'metrics.jsonl') == [{'step': 1}, {'step': 2}]
    assert read_lines(tmp_path / 'missing.jsonl') == read_lines(tmp_path) == []


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(tmp_path):
    log, said = RunLog(tmp_path), [('train', 4), ('eval', 4), ('event', 4), ('train', 3), ('eval', 3), ('train', 5), ('train', 'x')]
    for kind, step in said:
        log.line('metrics.jsonl', kind=kind, step=step)
    log.append('metrics.jsonl', '{"torn')
    (tmp_path / 'checkpoints' / 'a.tmp').write_text('')
    log.cut(4)
    assert [(line['kind'], line['step']) for line in read_lines(tmp_path / 'metrics.jsonl')] == [('train', 4), ('event', 4), ('train', 3), ('eval', 3)]
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_directory_has_one_writer_and_others_write_nothing(tmp_path, capsys):
    first = RunLog(tmp_path)
    with pytest.raises(UserError, match='another run is writing there .process'):
        RunLog(tmp_path)
    other = RunLog(tmp_path / 'other', active=False)
    other.say('hello'), other.line('metrics.jsonl', step=1), other.status(state='running'), other.cut(0), other.config({})
    assert not (tmp_path / 'other').exists() and capsys.readouterr().out == ''
    first.lock.close()
    RunLog(tmp_path)


def test_progress_is_written_over_on_a_terminal_and_plain_lines_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runlog.shutil, 'get_terminal_size', lambda: runlog.os.terminal_size((20, 5)))
    log = RunLog(tmp_path)
    for terminal in (False, True):
        log.terminal = terminal
        log.say('step 1', progress=True), log.say('step 2 ' + 'x' * 30, progress=True), log.say('validation')
    plain_lines, over = capsys.readouterr().out.split('validation\n')[:2]
    assert plain_lines == 'step 1\nstep 2 ' + 'x' * 30 + '\n'
    assert over == 'step 1\r\x1b[Kstep 2 ' + 'x' * 12 + '\r\x1b[K'
    assert (tmp_path / 'log.txt').read_text() == 2 * ('step 1\nstep 2 ' + 'x' * 30 + '\nvalidation\n')


def test_a_failure_is_in_the_files_of_the_run(tmp_path):
    log = RunLog(tmp_path)
    log.status(state='running', step=7)
    with pytest.raises(ValueError), log.failing():
        raise ValueError('the disk is on fire')
    status = json.loads((tmp_path / 'status.json').read_text())
    assert (status['state'], status['step'], status['reason']) == ('failed', 7, 'the disk is on fire')
    assert (tmp_path / 'log.txt').read_text() == 'the disk is on fire\n'
