"""Promises of configurator.py: one typed, checked config, and every mistake named in one line."""
import ast
import contextlib
import importlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
import model
import schedule
import train
from configurator import UserError, load, peek
from model import GPTConfig
from settings import TrainConfig


@dataclass
class Model:
    n_layer: int = 3  # blocks
    n_head: int = 4  # heads, at least one:
    #   more than one is usual
    bias: bool = False  # biases, written with a '#' in it: # and é

    def problems(self):
        return ['n_head does not divide n_layer'] if self.n_layer % self.n_head == 1 else []


@dataclass
class Train:
    learning_rate: float = 3e-4  # peak
    dataset: str = '# ééééé'  # a name
    warmup_steps: int = 0  # linear from 0

    # not about warmup_steps: a blank line parts them
    mandatory_steps: tuple[int, ...] = ()  # kept for ever
    compile: bool = True  # a key with the name of a builtin


no_deadline = settings(deadline=None, database=None)  # a busy machine is no failure
KEYS = ['n_layer', 'n_head', 'bias', 'learning_rate', 'dataset', 'warmup_steps', 'mandatory_steps', 'compile']


def config_of(*argv, **options):
    return load(list(argv), Model, Train, **options)


def problems_of(*argv, **options):
    with pytest.raises(UserError) as caught:
        config_of(*argv, **options)
    return str(caught.value).split('\n')


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config file, in a fresh working directory; returns the path to give on the command line."""
    monkeypatch.chdir(tmp_path)
    Path('config').mkdir()

    def write(text, name='x'):
        Path(f'config/{name}.py').write_text(text)
        return f'config/{name}.py'
    return write


# ----------------------------------------------------------------------------------------------------------------------
# The config

def test_without_arguments_every_key_has_its_default_and_says_so():
    config = config_of()
    assert [getattr(config, key) for key in KEYS] == [3, 4, False, 3e-4, '# ééééé', 0, (), True]
    assert config.origin == dict.fromkeys(KEYS, 'default') and list(config.origin) == KEYS


def test_pick_returns_a_class_with_its_fields_also_after_an_assignment():
    config = config_of('--n_layer=8', '--learning_rate=1')
    config.n_head = 2
    assert config.pick(Model) == Model(n_layer=8, n_head=2)
    assert config.pick(Train) == Train(learning_rate=1.0)


def test_a_misspelt_assignment_in_a_script_is_refused():
    with pytest.raises(AssertionError, match="did you mean 'n_layer'"):
        config_of().n_layr = 8


def test_as_dict_survives_json_in_field_order():
    values = config_of('--mandatory_steps=10,20').as_dict()
    assert list(values) == KEYS and values['mandatory_steps'] == [10, 20]
    assert json.loads(json.dumps(values)) == values


def test_changes_say_what_differs_from_the_defaults_and_where_it_comes_from(write):
    config = load([write('warmup_steps = 12'), '--dataset=a b', '--compile=false'], Train)
    assert config.changes() == "command line: dataset='a b', compile=False\nconfig/x.py: warmup_steps=12"
    assert config.changes(25).split('\n') == ["command line: dataset='a", "  b', compile=False", "config/x.py:", "  warmup_steps=12"]
    assert load([], Train).changes() == 'every option has its default (--help lists them)'


def test_two_classes_with_the_same_field_are_refused():
    @dataclass
    class Other:
        n_layer: int = 1  # again
    with pytest.raises(AssertionError, match='Other.n_layer'):
        load([], Model, Other)


def test_a_field_that_would_hide_part_of_config_is_refused():
    @dataclass
    class Other:
        origin: str = ''  # Config.origin
    with pytest.raises(AssertionError, match='Other.origin'):
        load([], Other)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

@no_deadline
@given(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(), st.lists(st.integers()).map(tuple))
def test_every_value_comes_back_from_the_command_line_with_its_type(integer, real, boolean, text, integers):
    values = {'warmup_steps': integer, 'learning_rate': real, 'compile': boolean, 'dataset': text,
              'mandatory_steps': integers}
    config = load([f'--{key}={value}' for key, value in values.items() if key != 'mandatory_steps']
                  + ['--mandatory_steps=' + ','.join(map(str, integers))], Train)
    for key, value in values.items():
        assert getattr(config, key) == value and type(getattr(config, key)) is type(value)
        assert config.origin[key] == 'command line'


@no_deadline
@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text(),
       st.lists(st.integers()))
def test_every_value_comes_back_from_a_file_with_its_type(tmp_path_factory, integer, real, boolean, text, integers):
    path = tmp_path_factory.getbasetemp() / 'values.py'
    path.write_bytes(f'warmup_steps = {integer}\nlearning_rate = {real}\ncompile = {boolean}\ndataset = {ascii(text)}\n'
                     f'mandatory_steps = {integers}'.encode())
    assert load([str(path)], Train).pick(Train) == Train(real, text, integer, tuple(integers), boolean)


@no_deadline
@given(st.lists(st.text() | st.sampled_from(KEYS) | st.sampled_from(KEYS).map('{}=1'.format), max_size=4))
def test_any_command_line_gives_a_config_or_a_line_a_problem(words):
    try:
        load([f'--{word}' for word in words] + words, Train)
    except UserError as error:
        assert len(str(error).splitlines()) == len(error.args) and all(error.args)


@pytest.mark.parametrize('text, value', [('5e6', 5_000_000), ('1_000', 1000), ('-3', -3), ('2.0', 2)])
def test_an_int_may_be_written_as_an_integral_float(text, value):
    config = config_of(f'--warmup_steps={text}')
    assert config.warmup_steps == value and type(config.warmup_steps) is int


@pytest.mark.parametrize('text', ['abc', '2.5', 'nan', 'inf', 'True', '', '1e999'])
def test_text_that_is_not_an_int_is_refused(text):
    assert problems_of(f'--n_layer={text}') == [f"--n_layer='{text}': expected int"]


@pytest.mark.parametrize('text', ['abc', 'nan', '', '1e999', '1' + 400 * '0', 'true'])
def test_text_that_is_not_a_float_is_refused(text):
    assert problems_of(f'--learning_rate={text}') == [f"--learning_rate='{text}': expected float"]


def test_infinity_is_a_float_only_where_it_is_written():
    assert config_of('--learning_rate=-inf').learning_rate == -math.inf


@pytest.mark.parametrize('text', ['1,x', '1,,2', '1,2.5', ','])
def test_text_that_is_not_a_tuple_of_ints_is_refused(text):
    assert problems_of(f'--mandatory_steps={text}') == [f"--mandatory_steps='{text}': expected int,int,..."]


@pytest.mark.parametrize('text, value', [('true', True), ('FALSE', False), ('1', True), ('0', False), ('yes', True), ('no', False), ('on', True), ('Off', False)])
def test_a_bool_is_written_true_false_yes_no_on_off_1_or_0(text, value):
    assert config_of(f'--bias={text}').bias is value


@pytest.mark.parametrize('text', ['ja', '', '2', 'none'])
def test_text_that_is_not_a_bool_is_refused(text):
    assert problems_of(f'--bias={text}') == [f"--bias='{text}': expected bool"]


def test_a_bare_key_means_true_and_needs_a_value_where_it_is_no_bool():
    assert config_of('--bias').bias is True
    assert problems_of('--n-layer') == ['--n_layer needs a value: --n_layer=...']


def test_a_value_may_contain_equals_signs_and_be_empty():
    assert config_of('--dataset=text:a=b==c').dataset == 'text:a=b==c'
    assert config_of('--dataset=').dataset == ''


def test_dashes_in_a_key_are_underscores_and_dashes_in_a_value_stay():
    assert config_of('--warmup-steps=7').warmup_steps == 7
    assert config_of('--dataset=a-b.py').dataset == 'a-b.py'


def test_of_two_values_on_the_command_line_the_later_wins():
    assert config_of('--n_layer=5', '--n_layer=6').n_layer == 6


def test_misspelt_key_on_the_command_line_names_the_nearest_key():
    assert problems_of('--learnig-rate=1', '--zzz') == [
        "command line: unknown key 'learnig_rate', did you mean 'learning_rate'?", "command line: unknown key 'zzz'"]


def test_words_fill_the_positional_fields_in_turn_and_one_too_many_is_named():
    options = {'positional': ('dataset', 'warmup_steps')}
    config = config_of('a=b', '--n_layer=6', '5', **options)
    assert (config.dataset, config.warmup_steps, config.origin['dataset']) == ('a=b', 5, 'command line')
    assert problems_of('a', '5', 'b', **options) == ["unexpected argument 'b'"]
    assert problems_of('a', 'b', **options) == ["--warmup_steps='b': expected int"]


def test_an_unexpected_word_gets_a_suggestion():
    stray = 'neither a config file (NAME.py) nor --key=value'
    assert problems_of('n_layer=3', '-n-head=3', 'word') == [f"n_layer=3: {stray}, did you mean '--n_layer=3'?",
                                                             f"-n-head=3: {stray}, did you mean '--n-head=3'?", f'word: {stray}']


def test_a_value_may_follow_after_a_space(write):
    path = write('n_layer = 7')
    config = config_of('--n_head', '8', '--bias', 'no', '--dataset', 'a b', path, '--warmup-steps', '-3')
    assert (config.n_layer, config.n_head, config.bias, config.dataset, config.warmup_steps) == (7, 8, False, 'a b', -3)
    assert problems_of('--n_head', path) == ['--n_head needs a value: --n_head=...']
    assert problems_of('--n_head', '--bias') == ['--n_head needs a value: --n_head=...']
    assert config_of('--bias', path).bias is True
    config = config_of('--bias', 'no', '--n_head', '8', positional=('dataset',))  # a word could be the dataset
    assert (config.bias, config.dataset, config.n_head) == (True, 'no', 8)


def test_a_bare_key_can_have_a_meaning_of_its_own(write):
    bare = {'dataset': 'auto'}
    assert config_of('--dataset', write(''), bare=bare).dataset == 'auto'
    assert config_of('--dataset', 'other', bare=bare).dataset == 'other' and config_of('--dataset=', bare=bare).dataset == ''


def test_other_spellings_of_a_value_are_accepted_in_files_too(write):
    spellings = {'dataset': {'wiki-text': 'wikitext'}}
    assert config_of('--dataset=Wiki-Text', spellings=spellings).dataset == 'wikitext'
    assert config_of(write("dataset = 'wiki-text'"), spellings=spellings).dataset == 'wikitext'
    assert config_of('--dataset=Other', spellings=spellings).dataset == 'Other'


def test_a_key_of_another_program_gets_our_key_or_advice(write):
    aliases = {'lr': 'learning_rate', 'no_eval': 'use --eval_interval=0'}
    assert problems_of('--lr', '1e-3', '--no-eval', write('lr = 1'), aliases=aliases) == [
        "config/x.py: unknown key 'lr', did you mean 'learning_rate'?",
        "command line: unknown key 'lr', did you mean 'learning_rate'?",
        "command line: unknown key 'no_eval': use --eval_interval=0"]


def test_a_config_file_may_be_named_without_its_folder_and_ending(write):
    path = write('n_layer = 6')
    for word in ('x', 'x.py', 'config/x', path):
        config = config_of(word, folder='config')
        assert config.n_layer == 6 and config.files == (path,) and config.origin['n_layer'] == path
    assert problems_of('xx', folder='config') == [
        "xx: neither a config file (NAME.py) nor --key=value, did you mean 'config/x.py'?"]
    assert problems_of('x') == ['x: neither a config file (NAME.py) nor --key=value']  # only where a folder is given


# ----------------------------------------------------------------------------------------------------------------------
# Config files

def test_later_files_win_and_the_command_line_wins_over_all_whatever_the_order(write):
    a, b = write('n_layer = 6; n_head = 8; warmup_steps = 1', 'a'), write('n_head = 2; warmup_steps = 2', 'b')
    config = config_of('--warmup_steps=3', a, b)
    assert (config.n_layer, config.n_head, config.warmup_steps) == (6, 2, 3)
    assert [config.origin[key] for key in ('n_layer', 'n_head', 'warmup_steps')] == [a, b, 'command line']


def test_a_file_reads_defaults_earlier_files_and_its_own_names_but_not_the_command_line(write):
    a = write('n_head = 8.0', 'a')
    b = write('warmup_steps = n_head * 10 + n_layer\nn_layer += 1\nlearning_rate = n_layer / 8\nbias = compile', 'b')
    config = config_of(a, b, '--n_head=2')
    assert (config.n_head, config.warmup_steps, config.n_layer, config.learning_rate) == (2, 83, 4, 0.5)
    assert config.bias is True  # the key compile, not the built-in function


def test_comprehensions_and_functions_in_a_file_see_its_names_and_the_keys(write):
    path = write('every = 10\ndef steps(n):\n    return [every * n_head * i for i in range(n)]\n'
                 'mandatory_steps = steps(3)\nn_layer = sum(every for i in range(2))')
    config = config_of(path)
    assert config.mandatory_steps == (0, 40, 80) and config.n_layer == 20


def test_helpers_in_a_file_are_ignored(write):
    path = write('import math\nfrom math import floor\n_unused = 1\ntokens_per_step = 8192\nclass Unused: pass\n'
                 'def unused(): pass\nwarmup_steps = 500_000 // tokens_per_step')
    assert config_of(path).as_dict() == {**config_of().as_dict(), 'warmup_steps': 61}


def test_misspelt_key_in_a_file_names_the_file_and_the_nearest_key(write):
    assert problems_of(write('learnig_rate = 1\nzzz = 2')) == [
        "config/x.py: unknown key 'learnig_rate', did you mean 'learning_rate'?", "config/x.py: unknown key 'zzz'"]


def test_a_misspelt_key_that_only_changes_itself_is_no_helper(write):
    assert problems_of(write('n_layr = 1\nn_layr += 1'))[0].startswith("config/x.py: unknown key 'n_layr'")


@pytest.mark.parametrize('line, problem', [
    ("n_layer = 'abc'", "n_layer = 'abc': expected int"),
    ("n_layer = '3'", "n_layer = '3': expected int"),
    ('n_layer = 2.5', 'n_layer = 2.5: expected int'),
    ('n_layer = True', 'n_layer = True: expected int'),
    ("n_layer = float('nan')", 'n_layer = nan: expected int'),
    ("n_layer = float('inf')", 'n_layer = inf: expected int'),
    ('n_layer = None', 'n_layer = None: expected int'),
    ("learning_rate = float('nan')", 'learning_rate = nan: expected float'),
    ('learning_rate = False', 'learning_rate = False: expected float'),
    ('bias = 2', 'bias = 2: expected bool'),
    ("bias = 'true'", "bias = 'true': expected bool"),
    ('dataset = 1', 'dataset = 1: expected str'),
    ('mandatory_steps = 5', 'mandatory_steps = 5: expected int,int,...'),
    ('mandatory_steps = [1, 2.5]', 'mandatory_steps = [1, 2.5]: expected int,int,...'),
    ('import math as dataset', None)])
def test_a_value_of_the_wrong_type_in_a_file_is_named(write, line, problem):
    [found] = problems_of(write(line))
    assert found == f'config/x.py: {problem}' if problem else found.endswith('expected str')


def test_numbers_in_a_file_take_the_type_of_their_key(write):
    config = config_of(write('n_layer = 5e6\nlearning_rate = 1\nbias = 1\nmandatory_steps = (1e3, 2)'))
    values = config.n_layer, config.learning_rate, config.bias, config.mandatory_steps
    assert repr(values) == '(5000000, 1.0, True, (1000, 2))'


def test_a_missing_file_names_the_nearest_one(write):
    write('', 'trix_tiny')
    assert problems_of('config/trix_tny.py', 'config/zzz.py', 'nowhere/x.py') == [
        "config/trix_tny.py: no such file, did you mean 'config/trix_tiny.py'?",
        'config/zzz.py: no such file', 'nowhere/x.py: no such file']


@pytest.mark.parametrize('text, problem', [
    ('\n\nn_layer = = 3', 'config/x.py:3: SyntaxError: invalid syntax'),
    ('\nreturn', "config/x.py:2: SyntaxError: 'return' outside function"),
    ('n_layer = 3\n  n_head = 3', 'config/x.py:2: IndentationError: unexpected indent'),
    ('n_layer = 8\nn_head = n_layer // 0', 'config/x.py:2: ZeroDivisionError: integer division or modulo by zero'),
    ('def f():\n    raise ValueError("two\\nlines")\nf()', 'config/x.py:2: ValueError: two lines'),
    ('import json\njson.loads("{")', 'config/x.py:2: json.decoder.JSONDecodeError: Expecting property name'),
    ('raise SystemExit(0)', 'config/x.py:1: SystemExit: 0'),
    ('assert n_layer == 0', 'config/x.py:1: AssertionError')])
def test_a_config_file_that_fails_is_one_line_with_the_line_number(write, text, problem):
    [found] = problems_of(write(text))
    assert found.startswith(problem)


def test_a_file_that_is_not_text_is_one_line(write):
    path = write('')
    for data in b'n_layer = "\xff"', b'\0':
        Path(path).write_bytes(data)
        [found] = problems_of(path)
        assert found.startswith('config/x.py')


# ----------------------------------------------------------------------------------------------------------------------
# Problems

def test_all_problems_of_files_and_command_line_come_at_once(write):
    files = write('n_layr = 1\nbias = 3', 'a'), write('oops', 'b'), 'config/none.py'
    assert sorted(problems_of(*files, '--n_head=x', '--compil=1', 'word')) == sorted([
        "config/a.py: unknown key 'n_layr', did you mean 'n_layer'?",
        'config/a.py: bias = 3: expected bool',
        "config/b.py:1: NameError: name 'oops' is not defined",
        'config/none.py: no such file',
        "--n_head='x': expected int",
        "command line: unknown key 'compil', did you mean 'compile'?",
        'word: neither a config file (NAME.py) nor --key=value'])


def test_combinations_within_a_class_and_over_classes_are_named_beside_unknown_keys():
    def check(config):
        return ['warmup is longer than the model is deep'] if config.warmup_steps > config.n_layer else []
    assert config_of('--warmup_steps=3', check=check).warmup_steps == 3
    assert sorted(problems_of('--n_layer=5', '--warmup_steps=6', '--zzz=1', check=check)) == [
        "command line: unknown key 'zzz'", 'n_head does not divide n_layer', 'warmup is longer than the model is deep']


def test_combinations_are_not_checked_while_a_value_is_missing():
    assert problems_of('--n_layer=5', '--n_head=x') == ["--n_head='x': expected int"]


def test_a_user_error_crosses_processes_whole():
    error = pickle.loads(pickle.dumps(UserError('one', 'two\n  lines')))
    assert str(error) == 'one\ntwo lines' and error.args == ('one', 'two\n  lines')


def test_load_is_pure(write, capsys):
    path = write('n_layer = 8')
    before = os.getcwd(), list(sys.path), dict(vars(Model)), os.environ.copy()
    argv = [path, '--n_head=2']
    assert config_of(*argv).as_dict() == config_of(*argv).as_dict()
    problems_of(path, '--n_head=x')
    assert config_of().n_layer == 3
    assert before == (os.getcwd(), list(sys.path), dict(vars(Model)), os.environ.copy())
    assert capsys.readouterr() == ('', '')


# ----------------------------------------------------------------------------------------------------------------------
# Programs

@pytest.mark.parametrize('key, table', [('ffn', 'FFNS'), ('mixer', 'MIXERS'), ('schedule', 'SCHEDULES')])
def test_help_lists_a_block_or_a_schedule_that_its_dict_has_and_no_comment_names(key, table, monkeypatch):
    cls, module = (TrainConfig, schedule) if key == 'schedule' else (GPTConfig, model)
    before = configurator.describe(cls).splitlines()
    monkeypatch.setitem(getattr(module, table), 'mine', None)
    added, = set(configurator.describe(cls).splitlines()) - set(before)
    assert added.split()[0] == 'also:' and added.split()[-1] == 'mine'


def answered(script, capsys, monkeypatch):
    """What the first lines of a script print for --help, if they answer it."""
    lines = Path(script.__file__).read_text().splitlines()
    line = next(number for number, line in enumerate(lines) if 'answer_help(' in line)
    assert not re.search('^(import|from) (torch|model|settings|benchmarks|deploy|runtime)', '\n'.join(lines[:line]), re.M)
    call = ast.parse(lines[line].strip()).body[0].value
    monkeypatch.setattr(sys, 'argv', [script.__file__, '--help'])
    monkeypatch.setattr(configurator, 'run', lambda main: main([]))
    with contextlib.suppress(SystemExit):
        configurator.answer_help('__main__', script.__doc__, *(node.value for node in call.args[2:]))
    return capsys.readouterr().out


@pytest.mark.parametrize('name', ['train', 'sample', 'evaluate', 'export', 'bench'])
def test_help_before_torch_is_imported_says_what_load_says(name, capsys, monkeypatch):
    script = importlib.import_module(name)
    text = answered(script, capsys, monkeypatch)
    with pytest.raises(SystemExit):
        script.main(['--help'])
    assert text == capsys.readouterr().out != ''


def test_help_before_torch_is_imported_knows_a_block_of_a_fork_or_leaves_it_to_load(capsys, monkeypatch):
    def with_blocks(line):
        text = Path(model.__file__).read_text()
        assert 'FFNS = {' in text
        return lambda module: (text, ast.parse(text.replace('FFNS = {', line))) if module == 'model' else plain(module)
    plain = configurator.source
    monkeypatch.setattr(configurator, 'source', with_blocks("FFNS = {'mine': None, "))
    assert re.search(r'--ffn .*\n +also: mine\n', answered(train, capsys, monkeypatch))
    monkeypatch.setattr(configurator, 'source', with_blocks('FFNS = load_all_of(FFNS) or {'))
    assert answered(train, capsys, monkeypatch) == ''


def test_help_lists_usage_and_type_default_and_comment_of_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        config_of('--zzz', '--help', usage='Trains.\npython train.py')
    assert end.value.code == 0
    assert capsys.readouterr().out == """\
Trains.
python train.py

Model
  --n_layer  int   3      blocks
  --n_head   int   4      heads, at least one:
                          more than one is usual
  --bias     bool  False  biases, written with a '#' in it: # and é

Train
  --learning_rate    float        0.0003     peak
  --dataset          str          '# ééééé'  a name
  --warmup_steps     int          0          linear from 0
  --mandatory_steps  int,int,...  ()         kept for ever
  --compile          bool         True       a key with the name of a builtin
"""


def program(tmp_path, body):
    """A Python script whose main(argv) is `body`; returns the command that starts it."""
    script = tmp_path / 'script.py'
    script.write_text('import sys\nfrom dataclasses import dataclass\nfrom configurator import load, run\n'
                      '@dataclass\nclass Train:\n    steps: int = 3  # how many\n'
                      f'def main(argv):\n    {body}\nrun(main)\n')
    return [sys.executable, str(script)]


def start(command, **options):
    # An empty PYTHONUNBUFFERED keeps output buffered, as users have it.
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent), 'PYTHONUNBUFFERED': ''}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_user_error_ends_the_program_with_2_and_a_line_a_problem(tmp_path):
    process = start(program(tmp_path, 'load(argv, Train)') + ['--steps=x', '--stepz=1'])
    assert process.communicate(timeout=30) == ('', "--steps='x': expected int\n"
                                               "command line: unknown key 'stepz', did you mean 'steps'?\n")
    assert process.returncode == 2


def test_other_exit_codes_and_errors_of_a_program_pass_through(tmp_path):
    process = start(program(tmp_path, 'print(load(argv, Train).steps); sys.exit(75)') + ['--steps=4'])
    assert process.communicate(timeout=30) == ('4\n', '') and process.returncode == 75
    process = start(program(tmp_path, 'raise ValueError("a bug")'))
    assert 'ValueError: a bug' in process.communicate(timeout=30)[1] and process.returncode == 1


def test_an_interrupt_ends_the_program_quietly_with_130(tmp_path):
    process = start(program(tmp_path, 'raise KeyboardInterrupt'))
    assert process.communicate(timeout=30) == ('', '') and process.returncode == 130


@pytest.mark.parametrize('body', ['print("x" * 10)', 'load(["--help"], Train)', 'print("x" * 10**6, flush=True)'])
def test_a_reader_that_goes_away_ends_the_program_quietly(tmp_path, body):
    process = start(program(tmp_path, f'sys.stdin.read(); {body}'), stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == '' and process.wait(timeout=30) == 141


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_program_quietly_and_what_it_was_making_is_removed(tmp_path, number):
    body = '\n'.join(['import os, signal', '    try: os.kill(os.getpid(), int(argv[0])); signal.pause()', '    finally: print("removed")'])
    process = start(program(tmp_path, body) + [str(int(number))], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.communicate(timeout=30) == ('removed\n', '') and process.returncode == 128 + number


def test_nohup_is_respected(tmp_path):
    process = start(program(tmp_path, 'import os; os.kill(os.getpid(), 1); print("goes on")'), preexec_fn=lambda: signal.signal(1, signal.SIG_IGN))
    assert process.communicate(timeout=30) == ('goes on\n', '') and process.returncode == 0


@pytest.mark.parametrize('body, says', [
    ('open("none/such")', 'none/such: No such file or directory'), ('raise OSError("the network is down")', 'the network is down'),
    ('raise OSError(28, "No space left on device")', 'No space left on device')])
def test_an_error_of_the_operating_system_is_one_line_and_exit_code_2(tmp_path, body, says):
    process = start(program(tmp_path, body))
    assert process.communicate(timeout=30)[1] == f'{says}\n' and process.returncode == 2


@pytest.mark.parametrize('body', ['print("x" * 10)', 'print("x" * 10**6, flush=True)', 'open("none/such")'])
def test_a_full_console_is_one_line_and_exit_code_2(tmp_path, body):
    with open('/dev/full', 'w') as full:
        process = subprocess.run(program(tmp_path, body), stdout=full, stderr=subprocess.PIPE, text=True, timeout=30,
                                 env={**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)})
    says = 'none/such: No such file or directory' if 'none' in body else 'standard output: No space left on device'
    assert (process.returncode, process.stderr) == (2, says + '\n')


def while_it_imports(tmp_path, code):
    """A script of a directory that has configurator.py, with what it does after importing that and before run()."""
    (tmp_path / 'configurator.py').write_bytes((Path(__file__).parent.parent / 'configurator.py').read_bytes())
    (tmp_path / 'script.py').write_text(f'import configurator\n{code}\n')
    return start([sys.executable, str(tmp_path / 'script.py')], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path):
    process = while_it_imports(tmp_path, 'import time\nprint("importing", flush=True)\ntry: time.sleep(60)\nexcept: pass')  # as some libraries have it
    assert process.stdout.readline() == 'importing\n'
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ('', '') and process.returncode == -signal.SIGINT  # 130 in a shell


def test_an_import_without_disk_space_is_one_line_and_a_bug_is_a_traceback(tmp_path):
    process = while_it_imports(tmp_path, 'raise FileNotFoundError(2, "No usable temporary directory found")')
    assert process.communicate(timeout=30)[1] == '[Errno 2] No usable temporary directory found: free some space, or set TMPDIR\n'
    assert process.returncode == 2
    process = while_it_imports(tmp_path, 'raise ValueError("a bug")')
    assert 'Traceback' in process.communicate(timeout=30)[1] and process.returncode == 1


def test_another_broken_pipe_is_not_hidden(tmp_path):
    process = start(program(tmp_path, 'raise BrokenPipeError("the worker died")'))
    assert 'the worker died' in process.communicate(timeout=30)[1] and process.returncode == 1


def test_a_misspelt_key_that_the_file_itself_reads_is_no_helper(tmp_path):
    path = tmp_path / 'x.py'
    path.write_text('n_layers = 2\nn_heads = 4\nwidth = 16 * n_heads * n_layers\nlearning_rate = 1 / width\n')
    with pytest.raises(UserError) as refused:
        train.load([str(path)])
    assert refused.value.args == (f"{path}: unknown key 'n_layers', did you mean 'n_layer'?", f"{path}: unknown key 'n_heads', did you mean 'n_head'?")
    path.write_text('_n_layers = 2\nwidth = 128 * _n_layers\nn_embd = width\n')
    assert train.load([str(path)]).n_embd == 256


def test_a_value_can_be_read_before_the_checks_and_defaults_replaced(write):
    first, broken = write("dataset = 'a'\nn_layers = 3\n", 'a'), write('dataset = 1 / 0\n', 'b')
    assert peek([first, broken, '--n_head=x'], 'dataset', Model, Train) == 'a'
    assert peek([first, '--dataset=b=c'], 'dataset', Model, Train) == 'b=c' and peek([], 'dataset', Train) == '# ééééé'
    file = write('warmup_steps = 10 * n_layer\n')
    config = config_of(file, '--bias', defaults={'n_layer': 8, 'n_head': 4}, source='elsewhere')
    assert (config.warmup_steps, config.n_layer, config.bias) == (80, 8, True)
    assert config.origin['n_layer'] == 'elsewhere' and config.origin['n_head'] == 'default', 'only what differs'
