"""
Turns config files and --key=value words into one typed, checked config. Imported by every script:

    config = load(argv, GPTConfig, TrainConfig, usage=__doc__)   # python train.py config/a.py config/b.py --n_layer=12
    model = GPT(config.pick(GPTConfig))
    print(config.changes())

The keys are the fields of the dataclasses. A field's trailing comment is its documentation, printed by --help.
A config file is plain Python: `n_layer = 12`. It can read the defaults and the values of earlier files as variables.
Later files override earlier ones. The command line overrides all files.
"""
import ast
import builtins
import difflib
import inspect
import json
import math
import os
import re
import signal
import sys
import textwrap
import traceback
import types
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import get_type_hints

KINDS = {int: 'int', float: 'float', bool: 'bool', str: 'str', tuple[int, ...]: 'int,int,...'}  # type names for users

BOOLS = {'true': True, '1': True, 'yes': True, 'on': True, 'false': False, '0': False, 'no': False, 'off': False}


class UserError(Exception):
    """A mistake of the user or in an input: UserError('one problem', 'another'). str() gives one line per problem."""

    def __str__(self):
        return '\n'.join(' '.join(map(str.strip, problem.splitlines())) for problem in self.args)


class Config:
    """
    Every key is an attribute. `origin` maps keys to 'default', 'config/x.py' or 'command line', in field order.
    `files` are the config files, in order.
    """

    def __init__(self, values, origin, files=()):
        vars(self).update(values, origin=origin, files=tuple(files))

    def __setattr__(self, key, value):
        assert key in self.origin, f'config.{key} = ...: no class has such a field{nearest(key, self.origin)}'
        vars(self)[key] = value

    def precedence(self, key):
        """Where the value of `key` comes from, as a number: 0 for the default, then config files, then command line."""
        where = self.origin[key]
        return self.files.index(where) + 1 if where in self.files else (len(self.files) + 1) * (where == 'command line')

    def pick(self, cls):
        """An instance of one of the dataclasses, with the values of this config."""
        return cls(**{field.name: getattr(self, field.name) for field in fields(cls)})

    def copy(self):
        return Config({key: getattr(self, key) for key in self.origin}, dict(self.origin), self.files)

    def as_dict(self):
        """Plain values in field order. Tuples become lists, so the dict is unchanged by a round trip through JSON."""
        values = {key: getattr(self, key) for key in self.origin}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def changes(self, width=118):
        """The values that differ from the defaults: one paragraph per origin, with the keys and values."""
        groups = {}
        for key, where in self.origin.items():
            if where != 'default':
                groups.setdefault(where, []).append(f'{key}={getattr(self, key)!r}')
        lines = [f'{where}: {", ".join(pairs)}' for where, pairs in groups.items()]
        options = dict(subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)
        lines = [textwrap.fill(line, width, **options) for line in lines]
        return '\n'.join(lines) or 'every option has its default (--help lists them)'


def peek(argv, key, *classes, folder='', bare=None):
    """The value of one key of type str, before load() checks anything. Errors in words or files are left to load()."""
    kinds, values = schema(classes)
    pairs = split(argv, kinds, bare or {}, ())
    for name, word in pairs:
        path = None if name else config_file(word, folder)
        if path:
            with suppress(UserError):
                values.update((k, value) for k, value in run_file(path, values).items() if k in values)
    given = [text for name, text in pairs if name == key and text is not None]
    return given[-1] if given else values[key]


def load(argv, *classes, positional=(), usage='', check=None, folder='', bare=None, spellings=None, aliases=None,
         defaults=None, source=''):
    """
    Resolve the command line against dataclasses -> Config. Raises UserError with all problems at once.

    positional: fields that are filled, in order, by words that are neither --key=value nor a .py file.
    Invalid combinations are found by a class's own `problems(self) -> list[str]`, and across classes by
    `check(config) -> list[str]`.
    folder: where config files are looked for. `trix_tiny` then means `<folder>/trix_tiny.py`.
    bare: {key: what a bare --key means}. spellings: {key: {another spelling of a value: the value}}.
    aliases: {key of another program: the key here, or a sentence that says what to do}, for errors.
    defaults: {key: value} in place of defaults of the classes; `source` is the origin of those that differ.
    """
    kinds, values = schema(classes)
    origin = {key: source if (defaults or {}).get(key, value) != value else 'default' for key, value in values.items()}
    values |= defaults or {}
    aliases, spellings = aliases or {}, spellings or {}
    assert set(positional) <= set(kinds), f'positional={positional}: name fields of the classes'
    if '--help' in argv or '-h' in argv:
        print(help_text(usage, map(describe, classes)), flush=True)
        raise SystemExit(0)

    unreadable, unknown = [], []  # separate, because combinations can't be checked while a value is missing

    def assign(where, key, value, written):
        if key not in kinds:
            unknown.append(f'{where}: unknown key {key!r}{hint(key, kinds, aliases)}')
            return
        if isinstance(value, str):
            value = spellings.get(key, {}).get(value.lower(), value)
        try:
            values[key], origin[key] = typed(value, kinds[key]), where
        except (ValueError, OverflowError):
            unreadable.append(f'{written}: expected {KINDS[kinds[key]]}')

    pairs = split(argv, kinds, bare or {}, positional)
    files = [None if key else config_file(word, folder) for key, word in pairs]
    paths = [path for path in files if path]
    for path in paths:
        try:
            assigned = run_file(path, values)
        except UserError as error:
            unreadable.extend(error.args)
            continue
        for key, value in assigned.items():
            assign(path, key, value, f'{path}: {key} = {value!r}')

    slots = iter(positional)
    for (key, text), path in zip(pairs, files):
        if path:
            continue
        if text is None:
            unreadable.append(f'--{key} needs a value: --{key}=...')
            continue
        if not key:
            key = next(slots, None)
        if key:
            assign('command line', key, parse(text, kinds.get(key)), f'--{key}={text!r}')
        elif positional:
            unknown.append(f'unexpected argument {text!r}')
        else:
            unknown.append(f'{text}: neither a config file (NAME.py) nor --key=value{meant(text, kinds, folder)}')

    config = Config(values, origin, paths)
    problems = unreadable + unknown
    if not unreadable:
        problems += [problem for cls in classes if hasattr(cls, 'problems') for problem in config.pick(cls).problems()]
        problems += check(config) if check else []
    if problems:
        raise UserError(*problems)
    return config


def split(argv, kinds, bare, positional):
    """
    The command line as pairs (key, text): ('n_layer', '3') for --n_layer=3 and for --n_layer 3, (None, word) for any
    other word. The text is None if a value is missing.
    """
    pairs, words = [], list(argv)
    while words:
        item = words.pop(0)
        if not item.startswith('--'):
            pairs.append((None, item))
            continue
        key, equals, text = item[2:].partition('=')
        key = key.replace('-', '_')
        kind = kinds.get(key)
        takes_next = bool(words) and not words[0].startswith('--') and not words[0].endswith('.py')
        if takes_next and kind in (bool, None):
            takes_next = not positional and (kind is None or words[0].lower() in BOOLS)
        if not equals and takes_next:
            text = words.pop(0)
        elif not equals:
            text = 'true' if kind in (bool, None) else bare.get(key)
        pairs.append((key, text))
    return pairs


def config_file(word, folder):
    """The config file that a word of the command line names, with or without the folder and '.py'. None: no file."""
    candidates = [word, f'{word}.py', f'{folder}/{word}', f'{folder}/{word}.py'] if folder else [word]
    found = [path for path in candidates if path.endswith('.py') and Path(path).is_file()]
    return found[0] if found else word if word.endswith('.py') else None


def hint(key, kinds, aliases):
    """What to write instead of an unknown key."""
    meaning = aliases.get(key)
    if not meaning:
        return nearest(key, kinds)
    return f', did you mean {meaning!r}?' if meaning in kinds else f': {meaning}'


def meant(word, kinds, folder):
    """What a stray word of the command line may mean."""
    if word.lstrip('-').partition('=')[0].replace('-', '_') in kinds:
        return f", did you mean '--{word.lstrip('-')}'?"
    files = {file.stem: str(file) for file in Path(folder).glob('*.py')} if folder else {}
    return nearest(Path(word).stem, files, files.get)


def schema(classes):
    """The type and the default of every key, in field order."""
    kinds, values = {}, {}
    for cls in classes:
        hints = get_type_hints(cls)
        for field in fields(cls):
            key, kind = field.name, hints[field.name]
            where = f'{cls.__name__}.{key}'
            assert key not in kinds, f'{where}: another class has this field, rename one'
            taken = key in ('origin', 'files') or hasattr(Config, key)
            assert not taken, f'{where}: Config uses this name, rename the field'
            assert kind in KINDS and field.default is not MISSING, f'{where}: give it a default and a type of KINDS'
            kinds[key], values[key] = kind, field.default
    return kinds, values


def run_file(path, values):
    """Run a config file -> the names that it assigns, without helpers. UserError if the file is missing or fails."""
    if not Path(path).is_file():
        siblings = {file.stem: str(file) for file in Path(path).parent.glob('*.py')}  # stems: all names share '.py'
        raise UserError(f'{path}: no such file{nearest(Path(path).stem, siblings, siblings.get)}')
    # The values so far are passed as built-in names. The whole file can read them, also in comprehensions and
    # functions. The namespace then holds only what the file assigned.
    namespace = {'__builtins__': {**vars(builtins), **values}}
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
        exec(compile(tree, path, 'exec', dont_inherit=True), namespace)
    except (Exception, SystemExit) as error:  # SystemExit: a config file must not end the program silently
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, 'lineno', None)  # a syntax error has no frame
        where = f'{path}:{line}' if line else path
        raise UserError(f'{where}: {traceback.format_exception_only(error)[-1]}') from error
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}

    def is_helper(name, value):
        misspelt = difflib.get_close_matches(name, values, 1, 0.8)  # n_layers is a typo, even if the file reads it
        return name[0] == '_' or name in read and not misspelt or isinstance(value, types.ModuleType) or callable(value)
    return {name: value for name, value in namespace.items() if name in values or not is_helper(name, value)}


def parse(text, kind):
    """The Python value in `text`. Invalid text is returned unchanged, and `typed` then rejects it."""
    if kind is bool:
        return BOOLS.get(text.lower(), text)
    if kind == tuple[int, ...]:
        return [parse(part, int) for part in text.split(',')] if text else []
    if kind in (int, float):
        with suppress(ValueError):
            return int(text)
        with suppress(ValueError):
            if math.isfinite(float(text)) or 'inf' in text.lower():  # 1e999 is a typo, inf is a choice
                return float(text)
    return text


def typed(value, kind):
    """`value` as `kind`. 5e6 is an int; 2.5 and True are not. Raises ValueError, or OverflowError for a huge int."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int and number and value % 1 == 0:  # False for inf and nan
        return int(value)
    if kind is float and number and not math.isnan(value):
        return float(value)
    if kind is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if kind is str and isinstance(value, str):
        return value
    if kind == tuple[int, ...] and isinstance(value, (list, tuple)):
        return tuple(typed(item, int) for item in value)
    raise ValueError


def read_json(path, advice=''):
    """The object in a JSON file. UserError with `advice`; the default advice is for a file of a prepared directory."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError('no JSON object')
        return content
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}')
    except (ValueError, RecursionError) as error:
        advice = advice or f'remove {path.parent} and prepare it again'
        raise UserError(f'{path}: broken ({error}): {advice}')


def nearest(name, names, shown=str):
    match = difflib.get_close_matches(name, names, 1)
    return f', did you mean {shown(match[0])!r}?' if match else ''


# ----------------------------------------------------------------------------------------------------------------------
# --help

def help_text(usage, tables):
    return '\n\n'.join([usage.strip(), *tables]).strip()


def answer_help(name, usage, *classes):
    """
    Answer --help and exit, if the script that calls this is run with it. For the first lines of a script: the imports
    that follow, such as torch, can take a second.

    name: the script's __name__. classes: the classes of its options, as 'module.Class'. Only their source is read. If
    that is not enough, this does nothing, and load() answers later.
    """
    if name != '__main__' or not {'--help', '-h'} & {*sys.argv[1:]}:
        return
    try:
        text = help_text(usage, [describe_source(*word.split('.')) for word in classes])
    except (AttributeError, LookupError, NameError, OSError, SyntaxError, TypeError, ValueError):
        return
    run(lambda argv: print(text, flush=True))
    sys.exit(0)


def describe(cls):
    """The --help text of a dataclass: key, type, default and comment of each field.

    The class may have `choices() -> {key: allowed values}`. Values that a comment does not name are listed after it."""
    text, hints = textwrap.dedent(inspect.getsource(cls)), get_type_hints(cls)
    values = {field.name: (KINDS[hints[field.name]], field.default) for field in fields(cls)}
    choices = cls.choices() if hasattr(cls, 'choices') else {}
    return option_table(cls.__name__, values, comments(text, ast.parse(text).body[0]), choices)


def describe_source(module, name):
    """describe() of the class `name` in a module beside this file, from its source alone."""
    text, tree = source(module)
    cls, = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)

    def value(node):
        return eval(compile(ast.Expression(node), module, 'eval'), {})  # a type or a number, so no names of the module
    values = {node.target.id: (KINDS[value(node.annotation)], value(node.value))
              for node in cls.body if isinstance(node, ast.AnnAssign)}
    choices = {}
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == 'choices':
            table, module = constant(node.body[-1].value, module)
            choices = {key.value: words_in(words, module) for key, words in zip(table.keys, table.values)}
    return option_table(name, values, comments(text, cls), choices)


@cache
def source(module):
    """(text, syntax tree) of a module beside this file."""
    text = Path(__file__).with_name(f'{module}.py').read_text(encoding='utf-8')
    return text, ast.parse(text)


def constant(node, module):
    """(the expression that `node` stands for, its module). Follows names of constants, also into other modules."""
    if isinstance(node, ast.Attribute):
        _, origin = constant(node.value, module)
        return constant(ast.Name(node.attr), origin)
    if not isinstance(node, ast.Name):
        return node, module
    for line in source(module)[1].body:
        if isinstance(line, ast.Assign) and getattr(line.targets[0], 'id', '') == node.id:
            return constant(line.value, module)
        for alias in line.names if isinstance(line, (ast.Import, ast.ImportFrom)) else ():
            if (alias.asname or alias.name) == node.id:
                if isinstance(line, ast.Import):
                    return None, alias.name
                return constant(ast.Name(alias.name), line.module)
    raise NameError(f'{node.id} is not in {module}.py')


def words_in(node, module):
    """The texts in a tuple, or the keys of a dict."""
    node, module = constant(node, module)
    if isinstance(node, ast.Constant):
        return [node.value]
    found = []
    for item in node.keys if isinstance(node, ast.Dict) else node.elts:
        found += words_in(item.value if isinstance(item, ast.Starred) else item, module)
    return found


def comments(text, cls):
    """{field: the lines of its comment} of a dataclass. cls: its node in the syntax tree of `text`."""
    lines, found = text.split('\n'), {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign):
            rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()  # ast counts columns in bytes
            below = takewhile(lambda line: line.lstrip().startswith('#'), lines[node.end_lineno:])
            found[node.target.id] = [line.lstrip(' #') for line in (rest, *below)]
    return found


def option_table(name, values, comments, choices):
    """values: {field: (type, default)}. comments: {field: lines}. choices: {field: allowed values}."""
    rows = []
    for key, (kind, default) in values.items():
        first, *more = comments[key]
        words = re.findall(r'\w+', ' '.join(comments[key]))
        unnamed = [value for value in choices.get(key, ()) if value and value not in words]
        if unnamed:
            more.append(f'also: {", ".join(unnamed)}')
        rows.append((f'  --{key}', kind, repr(default), first))
        rows.extend(('', '', '', line) for line in more)
    return f'{name}\n{columns(rows)}'


def columns(rows):
    """Rows of strings as aligned lines. A very long cell shifts only its own line."""
    widths = [min(32, max(map(len, column))) for column in zip(*rows)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# Programs

def as_utf8(text):
    """A command-line value as typed. Decodes the surrogates that Python uses for bytes if the locale is not UTF-8."""
    return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def utf8_path(path):
    """A path as other programs read it, in any locale here. None if its bytes are not UTF-8."""
    with suppress(UnicodeDecodeError):
        return os.fsencode(path).decode()


def run(main):
    """
    Call main(sys.argv[1:]) as a program. Expected errors end it without a traceback. Exit codes:

        2             a UserError (one line per problem) or an OSError, such as an unreadable file or a full console
        130           Ctrl-C
        128 + number  another signal
        141           the reader of the output went away

    Signals raise exceptions, so partly written files are removed. A character that the console can't encode prints as
    '?'.
    """
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed, as by `>&-`; a file opened later must not get its descriptor
            setattr(sys, name, open(os.devnull, 'w'))
        elif hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(errors='replace')
    sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP is ignored and stays ignored
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # a closed pipe is caught here, but not during interpreter shutdown
    except UserError as error:
        end(2, error)
    except KeyboardInterrupt:
        end(130)
    except OSError as error:
        failure = None if error.filename else console_failure()
        if isinstance(failure, BrokenPipeError):  # the reader went away, as in `python watch.py runs/x | head`
            end(141)
        if failure:
            end(2, f'standard output: {failure.strerror}')
        if isinstance(error, BrokenPipeError):  # another pipe, say to a dead worker process: a bug
            raise
        end(2, f'{error.filename}: {error.strerror}' if error.filename else error.strerror or error)


def console_failure():
    """The OSError of writing to standard output, or None. After an error, output goes to os.devnull."""
    try:
        print(flush=True)
    except OSError as error:
        silence_stdout()
        return error


def silence_stdout():
    """From now on, standard output goes to os.devnull."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def end(code, reason=''):
    with suppress(OSError):  # the console may be gone
        if reason:
            print(reason, file=sys.stderr, flush=True)
    sys.exit(code)


def refuse(kind, error, trace):
    """sys.excepthook until run(): an OSError during imports becomes one line and exit code 2."""
    if not issubclass(kind, OSError):
        return sys.__excepthook__(kind, error, trace)
    end(2, f'{error}: free some space, or set TMPDIR' if 'temporary directory' in str(error) else error)


# The scripts import this file before torch, whose import takes seconds. Until run(), Ctrl-C ends them at once. As an
# exception, it would print a traceback or leave a library half imported.
if Path(getattr(sys.modules['__main__'], '__file__', None) or '').resolve().parent == Path(__file__).resolve().parent:
    sys.excepthook = refuse
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
