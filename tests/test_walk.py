"""Every command in every kind of trouble: it ends with a documented exit code and a line or two, never with a traceback
or a partial file.

Most of it is in this process: `ends` is a command as `python x.py` would end. The full product, by shells, is slow (-m slow).
"""
import contextlib
import ctypes
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.image
import pytest
from safetensors import safe_open

import bench
import checkpoint
import configurator
import evaluate
import export
from deploy import convert, packed
import prepare
import sample
import train
import watch
from configurator import UserError
from data import TokenData
from runs import SMALL, arguments, end, start

ROOT = Path(__file__).parent.parent
PREPARE = ['--dataset=text:{d}/texts/*.txt', '--vocab_size=300', '--val_ratio=0.2', '--num_proc=1']
COMMANDS = {  # name: (its main, words, what it makes in the place {d})
    'train': (train, [*SMALL, '--dataset={d}/data', '--out_dir={d}/out', '--max_steps=6', '--compile=false'], 'out/checkpoints/step_0000006.pt'),
    'resume': (train, [*SMALL, '--dataset={d}/data', '--out_dir={d}/dense', '--ffn=gelu', '--max_steps=10', '--resume=auto'],
               'dense/checkpoints/step_0000010.pt'),
    'prepare': (prepare, [*PREPARE, '--out={d}/out'], 'out/meta.json'),
    'prepare pack': (prepare, ['pack', '--dataset={d}/data', '--row=32', '--rows_per_shard=100', '--out={d}/out'], 'out/meta.json'),
    'prepare split': (prepare, ['split', '{d}/rows', '{d}/out', '--val_ratio=0.3'], 'out/meta.json'),
    'prepare validate': (prepare, ['validate', '{d}/rows'], ''),
    'prepare show': (prepare, ['show', '{d}/data'], 'runs/data_data.png'),
    'prepare recommend': (prepare, ['recommend', '{d}/rows'], ''),
    'prepare join': (prepare, ['join', '{d}/shards'], 'shards/meta.json'),
    'sample': (sample, ['{d}/run', '--prompt=aé', '--num=2', '--max_new_tokens=20'], ''),
    'evaluate': (evaluate, ['{d}/run', '--data={d}/data'], ''),
    'export pack': (export, ['pack', '{d}/run'], 'run/packed.safetensors'),
    'export gguf': (export, ['gguf', '{d}/run', '--matrices=F32'], 'run/model.gguf'),
    'export hf': (export, ['hf', '{d}/run'], 'run/hf/config.json'),
    'export convert': (export, ['convert', '{d}/dense', '--to=trix', '--tiles=2', '--top_k=1'], 'dense/trix/recover.py'),
    'watch': (watch, ['{d}/run'], ''),
    'watch --report': (watch, ['{d}/run', '{d}/dense', '--report', '--out={d}/x.html'], 'x.html'),
    'watch --plot': (watch, ['{d}/run', '--plot'], 'run/plot.png'),
    'watch config': (watch, ['{d}/x.py', '--plot', '--out={d}/x.png'], 'x.png'),
}
MAKING = [name for name, (*_, made) in COMMANDS.items() if made]
BINARY = ('export pack', 'export gguf', 'export hf')  # formats that other programs open only under names in UTF-8


@pytest.fixture(scope='session')
def original(corpus, tmp_path_factory):
    """A place with everything that the commands read."""
    d = tmp_path_factory.mktemp('walk') / 'd'
    shutil.copytree(corpus, d / 'data')
    shutil.copytree(corpus.parent, d / 'texts', ignore=shutil.ignore_patterns('tokens'))
    for rest in (['pack', f'--dataset={corpus}', '--row=32', '--rows_per_shard=100', f'--out={d}/packed'],
                 *([*PREPARE, f'--shard={i}/2', f'--out={d}/shards'] for i in range(2))):
        prepare.main([word.format(d=d) for word in rest])
    (d / 'rows').mkdir()
    for file in (d / 'packed').rglob('*.npy'):
        file.rename(d / 'rows' / f'{file.parent.name}_{file.name}')
    for file in [d / 'shards/meta.json', d / 'shards/tokenizer.json']:
        file.unlink()
    shutil.rmtree(d / 'packed')
    runs = [start(arguments(d / 'data', d / name, '--max_steps=8', '--sample_interval=4', *words))
            for name, words in (('run', ['--ffn=swiglu', '--linear=bitnet', '--d_ff=32']), ('dense', ['--ffn=gelu']))]
    assert end(runs) == [0, 0], Path(f'{d}/run.console').read_text() + Path(f'{d}/dense.console').read_text()
    (d / 'x.py').write_text('max_steps = 40\nwarmup_steps = 4\n')
    return d


@pytest.fixture
def place(original, tmp_path):
    """A copy of it with blanks and Unicode in its name."""
    return shutil.copytree(original, tmp_path / 'ein Ort ü→', symlinks=True)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a program may change of its process, and a test not. Conversions are compared on few tokens."""
    monkeypatch.setattr(convert, 'PARITY_TOKENS', 64)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
    handlers, hook, argv = [signal.getsignal(number) for number in numbers], sys.excepthook, sys.argv
    yield
    sys.excepthook, sys.argv = hook, argv
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def ends(name, d, console=None):
    """Run a command in the place d, and from there, as a program -> (exit code, lines of standard error, all that it said). A traceback fails the test."""
    module, words, _ = COMMANDS[name]
    said, errors, code, home = console or io.StringIO(), io.StringIO(), 0, os.getcwd()
    os.chdir(d)
    sys.argv = [f'{module.__name__}.py', *(word.format(d=d) for word in words)]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            configurator.run(module.main)
        except SystemExit as over:
            code = over.code or 0
        finally:
            os.chdir(home)
    return code, errors.getvalue().splitlines(), '' if console else said.getvalue()


def files(d):
    return {path for path in d.rglob('*') if path.is_file()}


def assert_whole(d, before):
    """Nothing temporary is in the place but what the same command goes on from, and every file that is new can be read by what is to read it."""
    assert not [path for path in d.rglob('*') if path.name.endswith('.tmp') and not (path / 'meta.json').exists() and not (path / 'state.json').exists()]
    for path in files(d) - before:
        if path.suffix == '.pt':
            checkpoint.load(path)
        elif path.suffix == '.safetensors' and path.parent.name != 'hf':
            packed.read(path)
        elif path.suffix == '.gguf':
            pytest.importorskip('gguf').GGUFReader(path)
        elif path.suffix == '.html':
            assert path.read_text(encoding='utf-8').endswith('</html>\n')
        elif path.suffix == '.png':
            matplotlib.image.imread(path)
        elif path.suffix == '.json':
            json.loads(path.read_bytes())
        elif path.suffix == '.jsonl':
            assert all(map(json.loads, path.read_text().splitlines()))
        elif path.suffix == '.bin':
            TokenData(path.parent, 16, 300)
        elif path.name == 'recover.py':
            assert train.load([str(path)]).ffn == 'trix' and checkpoint.find(path.parent)
    if (hf := d / 'run/hf').exists():
        assert {file.name for file in hf.iterdir()} >= {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}
        with safe_open(hf / 'model.safetensors', 'pt') as file:
            assert list(file.keys())


def needs(name):
    for package in {'export gguf': ('gguf',), 'export hf': ('transformers',)}.get(name, ()):
        pytest.importorskip(package, reason='a development requirement')


# ---- troubles

@contextlib.contextmanager
def obeying_modes():
    """For the superuser, too, a directory without the right to write is one."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, rights)
    effective = rights[0]
    rights[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, rights)
    try:
        yield
    finally:
        rights[0] = effective
        libc.capset(header, rights)


@contextlib.contextmanager
def read_only(d):
    folders = [d, *(path for path in d.rglob('*') if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    with obeying_modes():
        yield
    for folder in folders:
        folder.chmod(0o755)


@contextlib.contextmanager
def no_room(d, size=1000):
    """A file can't become larger than so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)




@pytest.mark.parametrize('name', COMMANDS)
def test_a_line_says_that_nothing_can_be_recorded(name, place):
    needs(name)
    before = files(place)
    with read_only(place):
        code, errors, said = ends(name, place)
    if name in MAKING:
        assert code == 2 and len(errors) == 1 and 'ermission denied' in errors[0] and (str(place) in errors[0] or name == 'prepare show'), (code, errors)
    else:
        assert code == 0, errors
    assert files(place) == before


@pytest.mark.parametrize('name', MAKING)
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(name, place):
    needs(name)
    before = files(place)
    with no_room(place, 30 if name in ('prepare split', 'prepare join', 'prepare pack') else 1000):
        code, errors, said = ends(name, place)
    assert code == 2 and len(errors) == 1 and ('too large' in errors[0] or 'disk' in errors[0]), (code, errors)
    assert_whole(place, before)
    assert not (place / COMMANDS[name][2]).exists()


@pytest.mark.parametrize('name', COMMANDS)
def test_names_that_are_not_utf8_work_or_are_refused_at_once(name, original, tmp_path):
    needs(name)
    d = shutil.copytree(original, tmp_path / os.fsdecode(b'caf\xe9'), symlinks=True)
    before = files(d)
    code, errors, said = ends(name, d)
    if name in BINARY:
        assert code == 2 and len(errors) == 1 and 'this path is not UTF-8' in errors[0], (code, errors)
        assert files(d) == before
    else:
        assert code == 0 and (not COMMANDS[name][2] or (d / COMMANDS[name][2]).exists()), errors
        assert_whole(d, before)


@pytest.mark.parametrize('kind, codes, says', [('full', (0, 2), 'standard output: No space left on device'), ('gone', (0, 141), '')])
@pytest.mark.parametrize('name', COMMANDS)
def test_a_console_that_is_full_or_gone_is_no_traceback_and_no_end_of_a_run(name, kind, codes, says, place):
    needs(name)
    before, (read, write) = files(place), os.pipe()
    os.close(read)
    with contextlib.suppress(OSError), open('/dev/full' if kind == 'full' else write, 'w', encoding='utf-8') as console:
        code, errors, _ = ends(name, place, console)
    assert code in codes and (name not in ('train', 'resume') or code == 0), errors
    assert not code or [line for line in errors if 'on cpu' not in line and 'packed in memory' not in line] in ([says] if says else [], [f'{" ".join(sys.argv)}: {says[17:]}']), errors
    assert_whole(place, before)


@pytest.mark.parametrize('name', COMMANDS)
def test_an_ascii_console_and_a_machine_without_home_or_room_for_temporary_files(name, place, monkeypatch):
    needs(name)
    monkeypatch.setenv('HOME', '/nonexistent')
    monkeypatch.setenv('TMPDIR', '/nonexistent')
    monkeypatch.setattr(tempfile, 'tempdir', None)
    before, console = files(place), io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    code, errors, _ = ends(name, place, console)
    assert code == 0, errors
    assert_whole(place, before)
    assert not COMMANDS[name][2] or (place / COMMANDS[name][2]).exists()


# ---- bench.py, whose commands take minutes

BENCH_MISTAKES = [
    (['bloks'], "command 'bloks' is not one of blocks, amp,"), (['--quik'], "unknown key 'quik', did you mean 'quick'?"),
    (['blocks', 'amp'], "unexpected argument 'amp'"), (['head', '--repeats=0'], 'repeats=0 must be at least 1'),
    (['head', '--repeats=many'], "--repeats='many': expected int"), (['head', '--device=tpu'], 'device'),
    (['quality', '--preset=x'], "preset 'x' is not one of"), (['quality', '--match=size'], "match='size' is not one of"),
    *(([command, '--model=nowhere.py'], 'nowhere.py: no such file') for command in ('steps', 'batch', 'memory')),
    (['memory', '--batch_sizes=0'], 'batch_sizes must be numbers of at least 1'),
    (['peers', '--nanogpt=nowhere'], '--nanogpt=nowhere: not a checkout of nanoGPT'),
    (['blocks', '--llama_cpp'], '--llama_cpp is for peers'), (['--quick', 'sweep'], 'sweep must be the first word'),
    (['sweep', 'nowhere.py', '--n_layer=1,2'], 'nowhere.py: no such file'), (['sweep'], 'nothing to sweep')]


def bench_ends(d, *words):
    """`ends` for bench.py with these words."""
    with contextlib.ExitStack() as stack:
        stack.callback(COMMANDS.pop, 'bench')
        COMMANDS['bench'] = bench, list(words), ''
        return ends('bench', d)


@pytest.mark.parametrize('words, message', BENCH_MISTAKES, ids=str)
def test_a_mistake_in_a_command_of_bench_is_one_line(words, message, tmp_path):
    code, errors, _ = bench_ends(tmp_path, *words)
    assert code == 2 and len(errors) == 1 and message in errors[0], (code, errors)
    assert not files(tmp_path)


@pytest.mark.parametrize('command', ['', 'sweep', *(name for name in bench.COMMANDS if name != 'tables')])
def test_bench_measures_nothing_if_its_tables_cannot_be_written(command, tmp_path, monkeypatch):
    for module, name in ((bench.sweep, 'train_all'), *((bench.COMMANDS, name) for name in bench.COMMANDS)):
        change = monkeypatch.setitem if module is bench.COMMANDS else monkeypatch.setattr
        change(module, name, lambda *_: pytest.fail('it started to measure'))
    words = {'': [], 'sweep': ['sweep', '--n_layer=1,2'], 'peers': ['peers', '--llama_cpp']}.get(command, [command])
    with read_only(tmp_path):
        code, errors, _ = bench_ends(tmp_path, *words, '--out={d}/bench')
    assert code == 2 and len(errors) == 1 and errors[0].endswith('bench: Permission denied'), (code, errors)


# ---- signals

def interrupted(name, d, at, number):
    """`ends` with a signal at the at-th call of a function of ours; also the number of those calls."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        if event == 'call' and frame.f_code.co_filename.startswith(f'{ROOT}/') and 'tests' not in frame.f_code.co_filename:
            calls += 1
            if calls == at:
                signal.raise_signal(number)
    for each in (signal.SIGTERM, signal.SIGHUP):  # a run of train.py in this process has left its own handlers
        signal.signal(each, signal.SIG_DFL)
    sys.setprofile(count)
    try:
        return ends(name, d), calls
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize('parts', [(60, 97), pytest.param((*range(2, 90, 8), *range(90, 100)), marks=pytest.mark.slow)], ids=['two', 'many'])
@pytest.mark.parametrize('name', COMMANDS)
def test_a_signal_at_any_moment_leaves_nothing_half_written(name, parts, original, tmp_path):
    needs(name)
    whole = shutil.copytree(original, tmp_path / 'whole', symlinks=True)
    (code, *_), calls = interrupted(name, whole, -1, signal.SIGINT)
    assert code == 0
    moments = {calls * part // 100: (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[part % 3] for part in parts}
    for at, number in moments.items():
        d = shutil.copytree(original, tmp_path / f'{at}', symlinks=True)
        before = files(d)
        (code, errors, said), _ = interrupted(name, d, at, number)
        if name in ('train', 'resume'):
            assert code in (0, 75, 128 + number), errors
            out = d / ('out' if name == 'train' else 'dense')
            assert code != 75 or 'nothing to save' in said or 'saved' in said and checkpoint.find(out), said
        else:
            assert code in (0, 128 + number), (code, errors)
        assert len(errors) <= 3 * (name == 'sample'), errors
        assert_whole(d, before)
        if name.startswith('prepare'):
            assert ends(name, d)[0] == 0
            assert_whole(d, before)
            assert not list(d.glob('.*.tmp'))


def test_a_run_that_is_stopped_before_its_first_step_says_so(place, monkeypatch):
    monkeypatch.setattr(checkpoint, 'resume', lambda *arguments: signal.raise_signal(signal.SIGTERM))
    code, errors, said = ends('train', place)
    assert code == 75 and not errors and said.splitlines()[-1] == 'interrupted before the first step: nothing to save'
    assert not (place / 'out').exists()


@pytest.mark.parametrize('word', ['--tensorboard', '--profile'])
def test_outputs_that_need_utf8_names_are_refused_before_the_run(word, original, tmp_path, monkeypatch):
    monkeypatch.setattr('runtime.trackers.check_packages', lambda config: None)
    d = shutil.copytree(original, tmp_path / os.fsdecode(b'caf\xe9'), symlinks=True)
    with pytest.raises(UserError, match='not UTF-8. The libraries behind --tensorboard and --profile cannot open such a path'):
        train.main([*(part.format(d=d) for part in COMMANDS['train'][1]), word])
    assert not (d / 'out').exists()


# ---- the environment

TORCHRUN = {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}


@pytest.mark.parametrize('change, says', [
    ({'RANK': '²'}, "RANK='²', expected numbers"), ({'WORLD_SIZE': '-2'}, "WORLD_SIZE='-2', expected numbers"), ({'MASTER_PORT': ''}, "MASTER_PORT='', expected"),
    ({'WORLD_SIZE': '0'}, 'RANK=0, but WORLD_SIZE=0'), ({'WORLD_SIZE': None, 'MASTER_ADDR': None}, 'RANK but no WORLD_SIZE, MASTER_ADDR')])
def test_an_incomplete_torchrun_environment_is_one_line(change, says, monkeypatch):
    for key, value in {**TORCHRUN, **change}.items():
        monkeypatch.setenv(key, value) if value is not None else monkeypatch.delenv(key, raising=False)
    with pytest.raises(UserError) as refused:
        train.main(['--max_steps=1'])
    assert len(refused.value.args) == 1 and says in str(refused.value) and 'start several processes with torchrun' in str(refused.value)


@pytest.mark.parametrize('name', ['watch', 'watch --report', 'watch --plot', 'prepare show', 'sample', 'train'])
@pytest.mark.parametrize('environment', [
    {'COLUMNS': '1', 'LINES': '1'}, {'COLUMNS': 'x', 'TERM': 'dumb', 'NO_COLOR': '1'}, {'TERM': '', 'TZ': 'No/Where', 'SOURCE_DATE_EPOCH': '1'}],
    ids=lambda environment: ','.join(environment))
def test_odd_environments_change_nothing(name, environment, place, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    before = files(place)
    code, errors, _ = ends(name, place)
    assert code == 0 and len(errors) <= 3 * (name == 'sample'), errors
    assert_whole(place, before)


def test_an_unknown_matplotlib_backend_is_one_line(place):
    done = subprocess.run([sys.executable, 'watch.py', place / 'run', '--plot'], cwd=ROOT, env={**os.environ, 'MPLBACKEND': 'none'}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('no picture: matplotlib cannot be used: ') and len(done.stderr.splitlines()) == 1, done.stderr


def test_an_invalid_source_date_epoch_is_one_line(place, monkeypatch):
    monkeypatch.setenv('SOURCE_DATE_EPOCH', 'never')
    assert ends('watch --report', place)[:2] == (2, ['SOURCE_DATE_EPOCH=never: expected a number of seconds'])


# ---- by a shell

C_LOCALE = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': 'ascii'}
SHELLS = {  # trouble: (command line, environment, exit codes)
    'no standard output': ('"$@" >&-', {}, (0,)),
    'no standard error': ('"$@" 2>&-', {}, (0,)),
    'full standard error': ('"$@" 2>/dev/full', {}, (0, 2)),
    'head': ('"$@" | head -n 1; exit ${PIPESTATUS[0]}', {}, (0, 141)),
    'full': ('"$@" >/dev/full', {}, (0, 2)),
    'ascii locale': ('"$@"', C_LOCALE, (0,)),
    'no home': ('unset HOME; "$@"', {}, (0,)),
    'killed after 0.5 s': ('timeout -s TERM 0.5 "$@"; test $? = 124 && exit 143', {}, (0, 1, 143)),
    'interrupted after 2 s': ('timeout -s INT 2 "$@"; test $? = 124 && exit 130', {}, (0, 1, 130)),
}
QUICK = [('prepare', 'ascii locale'), ('prepare', 'no standard output'), ('watch', 'no standard output'), ('watch', 'no standard error'),
         ('watch config', 'ascii locale'), ('prepare pack', 'head'), ('sample', 'full standard error')]


@pytest.mark.parametrize('name, trouble', [pytest.param(name, trouble, marks=() if (name, trouble) in QUICK else pytest.mark.slow)
                                           for name in COMMANDS for trouble in SHELLS])
def test_a_command_in_a_shell_in_trouble(name, trouble, place):
    needs(name)
    (module, words, made), (command, environment, codes) = COMMANDS[name], SHELLS[trouble]
    before = files(place)
    done = subprocess.run(['bash', '-c', command, 'sh', sys.executable, f'{ROOT}/{module.__name__}.py', *(word.format(d=place) for word in words)],
                          cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, errors='replace', timeout=300)
    assert done.returncode in codes and 'Traceback' not in done.stderr + done.stdout, (done.returncode, done.stderr)
    assert len(done.stderr.splitlines()) <= (2 if name == 'sample' else 1), done.stderr
    assert done.returncode or not made or (place / made).exists()
    assert_whole(place, before)
