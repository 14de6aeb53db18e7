"""
Opens the data of a training run, and prepares them if they are missing. Imported by train.py and evaluate.py:

    data = open_dataset(config)       # the loader of the tokens that config.dataset names

For a prepared directory, nothing is imported of what reads and prepares a corpus.
"""
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from configurator import UserError
from corpora.prepared import advice_for, open_data
from data import data_dir
from runtime.runlog import speak
from settings import resolve_steps
from tokenizer import FIXED

SCRIPT = Path(__file__).parent.parent / 'prepare.py'


def open_dataset(config, prepare=True, verify='once', say=speak):
    """
    The loader of the tokens that config.dataset names. Prepares missing data, or returns None with prepare=False.

    Raises UserError if the dataset is unknown, or if a prepared directory does not match the config. Exits with the
    code of prepare.py if that fails. verify: see TokenData.
    """
    name = config.dataset
    if '/' in name and (Path(name) / 'meta.json').is_file():
        return open_prepared(Path(name), config, verify)
    from corpora.corpus import DATASETS
    from corpora.preparation import PrepareConfig, check_prepared, directory
    if name.startswith('shards:'):
        rows = Path(name.removeprefix('shards:')).expanduser()
        if (rows / 'meta.json').is_file():  # output of prepare.py pack or split
            return open_prepared(rows, config, verify)
        from corpora.shards import check_split
        label = tokenizer_of_rows(rows, config.tokenizer)
        path, check = data_dir(name, label), lambda: check_split(rows, path)
        words = [f'--tokenizer={label}'] if label != 'bpe' else [f'--vocab_size={config.vocab_size}']
    elif name in DATASETS or name.startswith(('text:', 'bins:')):
        wanted = PrepareConfig(dataset=name, tokenizer=config.tokenizer)
        words = [f'--tokenizer={config.tokenizer}']
        if config.tokenizer == 'bpe':
            wanted.vocab_size = config.vocab_size
            words += [f'--vocab_size={config.vocab_size}']
        if name == 'fineweb_edu':
            wanted.max_tokens = enough_tokens(config.max_steps * config.batch_tokens)
            words += [f'--max_tokens={wanted.max_tokens}']
        path, check = directory(wanted), lambda: check_prepared(wanted, path, say)
    else:
        path = data_dir(name)
        if not prepare and not path.is_dir():
            return None
        if not path.is_dir():
            if advice := advice_for(Path(name)):
                raise UserError(f'dataset={name}: the directory {name} {advice}')
            raise UserError(f'dataset={name}: no directory {path}, and prepare.py knows only {", ".join(DATASETS)}, '
                            'text:PATH, shards:DIR and bins:PATH: copy the prepared data there, '
                            'or use --dataset=pylib')
        return open_prepared(path, config, verify)

    if (path / 'meta.json').is_file():
        check()
    elif not prepare:
        return None
    else:
        duration = '; under a minute' if name == 'pylib' else ''
        speak(f'No prepared data at {path}: preparing {name} (one-time{duration})')
        others = sorted(str(file.parent) for file in path.parent.glob('fineweb_edu*/meta.json'))
        if name == 'fineweb_edu' and others:
            speak(f'  already prepared (use them with --dataset=DIR): {", ".join(others)}')
        command = [sys.executable, str(SCRIPT), f'--dataset={name}', f'--out={path}', *words]
        if code := subprocess.run(command).returncode:  # prepare.py has printed the reason
            if code == 2 and name != 'pylib' and not name.startswith(('shards:', 'bins:')):
                speak('to prepare it with more options, add them to this command, then train again: '
                      f'{shlex.join(["python", "prepare.py", *command[2:]])}')
            sys.exit(code)
    return open_prepared(path, config, verify)


def open_training_data(config, prepare=True, verify='once', first=lambda work: work(), say=speak):
    """
    The training data as the config asks for it, and the number of steps that follows from it. None if nothing is
    prepared and prepare=False. first: runs a function in one process before the others.
    """
    data = first(lambda: open_dataset(config, prepare, verify, say))
    if data is None:
        return None
    find_eot(config, data)
    if config.packing == 'best_fit':
        from corpora.packing import PackedRows  # a plain run does not need it
        data = PackedRows(data)
    elif config.document_starts:
        from corpora.packing import DocumentStarts  # a plain run does not need it
        data = DocumentStarts(data, config.document_starts)
    if config.max_windows:
        data.limit(config.max_windows)
    resolve_steps(config, data.n_windows)
    return data


def find_eot(config, data):
    """Set config.eot_id from the data, for document_mask. UserError if it is unknown or the config has another one."""
    if not config.document_mask:
        return
    from corpora.packing import eot_id_of  # a plain run does not need it
    eot = eot_id_of(data)
    if eot is None:
        raise UserError(f'document_mask=true: {data.path} has no tokenizer.json, so it is unknown which id ends a '
                        'document: use --document_mask=false')
    if config.eot_id not in (-1, eot):
        raise UserError(f'eot_id={config.eot_id}: in {data.path} a document ends with {eot}: leave eot_id out')
    config.eot_id = eot


def tokenizer_of_rows(rows, name):
    """
    The tokenizer for the ids at `rows`: 'bpe', which means none, if a tokenizer.json beside them takes precedence over
    the option `name`, or if the option names none.
    """
    if name == 'char':
        raise UserError(f'tokenizer=char: it is made from text, but shards:{rows} holds ids: use gpt2, byte or a '
                        'tokenizer.json')
    if name in ('bpe', 'none'):
        return 'bpe'
    from corpora.shards import find_shards, tokenizer_beside
    beside = None
    with suppress(UserError):  # rows that do not exist: prepare.py reports them
        beside = tokenizer_beside(rows, find_shards(rows))
    if beside and Path(name) != beside:
        say_once(f'{beside} is the tokenizer of these rows: tokenizer={name} is not used')
    return 'bpe' if beside else name


def open_prepared(path, config, verify):
    """The loader of a prepared directory.

    Prints a line if its tokenizer is not the tokenizer of the config, or if its vocabulary is much smaller."""
    data = open_data(path, config.block_size, config.vocab_size, verify)
    name = config.tokenizer
    if name not in ('bpe', 'none') and not data.tokenizer:
        say_once(f'{path} was prepared without a tokenizer: tokenizer={name} is not used. For text, prepare it again: '
                 f'python prepare.py split DIR OUT --tokenizer={name}')
    elif name not in ('bpe', 'none') and not is_named(data.tokenizer, name):
        say_once(f"{path} has its own tokenizer, {data.tokenizer['name']}: tokenizer={name} is not used")
    if 2 * data.n_vocab < config.vocab_size:
        say_once(f'{path} has a vocabulary of {data.n_vocab:,}, the model has {config.vocab_size:,}: '
                 f'--vocab_size={data.n_vocab} makes the model smaller and faster')
    return data


def is_named(content, name):
    """Whether `content` is the tokenizer that --tokenizer=NAME means."""
    if name in (*FIXED, 'char'):
        return content['name'] == name
    from corpora.vocabulary import named  # a plain run does not need it
    return named(name) == content


def say_once(line):
    """Print a line in one process only: the others of a torchrun do the same work."""
    if os.environ.get('RANK', '0') == '0':
        speak(line)


def enough_tokens(tokens):
    """
    The number of tokens to prepare for a run of `tokens` tokens: at least one more, rounded up to two digits, so that
    similar runs share the data.
    """
    unit = 10 ** max(0, len(str(tokens + 1)) - 2)
    return -(-(tokens + 1) // unit) * unit
