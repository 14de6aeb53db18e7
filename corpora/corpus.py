"""
The corpora by name, each a stream of documents that goes on from any position. Imported by prepare.py:

    corpus = open_corpus(config)                    # pylib, text:PATH, fineweb_edu, wikitext2, wikitext103
    for document in corpus.documents(position):     # position: that of the last document that was used, None: from the start
        document.text or document.dropped, corpus.progress(document.position)

Memory stays bounded whatever the size of a file. A file that can't be read is one line with its name and where in it.
"""
import asyncio
import codecs
import glob
import importlib
import inspect
import io
import json
import logging
import os
import platform
import re
import socket
import sys
import sysconfig
import textwrap
import time
import tokenize
import types
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from gzip import GzipFile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from files import stamp

DATASETS = ('pylib', 'wikitext2', 'wikitext103', 'fineweb_edu')  # and text:PATH
FINEWEB = 'HuggingFaceFW/fineweb-edu'
WIKITEXT, SUBSETS = 'Salesforce/wikitext', {'wikitext2': 'wikitext-2-raw-v1', 'wikitext103': 'wikitext-103-raw-v1'}
SURROGATE = re.compile('[\ud800-\udfff]')
TITLE = re.compile(r' = [^=\s].* = \s*')  # of an article; those of its sections have more of the =
PIECE, PATIENCE, LONGEST = 8 * 1024, 64 * 1024, 128 * 1024  # bytes of a .txt document: see `pieces`
LONGEST_LINE = 2**26  # bytes
LONGEST_ARTICLE = 2**20  # characters after which a file without titles is cut, at a line end
CHECKED = 1000  # up to so many files are all opened before the first is read
GO_ON = ' (--bad_text=skip or replace goes on)'
RETRIES = 5  # times that a fault of the network is waited out, for 1, 2, 4, 8 and 16 s; documents that arrive start the count anew
HOPELESS = 15  # seconds: where not one row has come so long after the start there is no network, and nothing more to wait for


class SourceMissing(UserError):
    """There is no file of the corpus at the path that was named."""


class Document(NamedTuple):
    text: str | None  # None: dropped
    dropped: str  # why: 'unreadable', 'bad_text', 'not_json' or 'low_score', '' if it wasn't; 'replaced': text that was mended
    split: str | None  # 'train' or 'val' where the corpus has splits of its own
    position: object  # of JSON; documents(position) goes on directly behind this document


@dataclass
class Corpus:
    source: dict  # what identifies it, for meta.json
    filter: str  # what it leaves out or changes, in words, '' for nothing
    documents: Callable  # (position=None) -> iterator of Document, in a fixed order
    progress: Callable = lambda position: None  # 0 to 1: how far through the corpus a position is, None where unknown
    own_splits: bool = False
    test: Callable = lambda: None  # the whole raw test split where there is one, as one str
    inputs: str | None = None  # stamp() of the source files, where there are any on this machine
    check: Callable = lambda: None  # opens the source files, as far as that is quick. Raises UserError


def open_corpus(config, check=True):
    """
    The Corpus that config.dataset names. Raises UserError, SourceMissing where its files are not there. check=False: files are only
    listed, for meta.json to be compared with, and not opened. Nothing is asked of the network before documents().
    """
    kind, colon, path = config.dataset.partition(':')
    if kind == 'text' and colon:
        corpus = text_corpus(config, path)
    elif kind == 'bins' and colon:
        corpus = nanochat_corpus(config, path)
    elif config.dataset == 'pylib':
        corpus = pylib_corpus()
    elif config.dataset == 'fineweb_edu':
        corpus = fineweb_corpus(config)
    elif config.dataset in SUBSETS:
        corpus = wikitext_corpus(config)
    else:
        raise UserError(f"--dataset={config.dataset}: unknown, expected {', '.join(DATASETS)}, text:PATH or bins:PATH")
    if check:
        corpus.check()
    return corpus


# The library of this Python

def pylib_corpus():
    count = cache(lambda: len(pylib_sources()))

    def documents(position=None):
        sources, first = pylib_sources(), 0 if position is None else position + 1
        for index in range(first, len(sources)):
            text = sources[index]()
            yield Document(text, '' if text is not None else 'unreadable', None, index)

    return Corpus({'dataset': 'pylib', 'python': f'{platform.python_implementation()} {platform.python_version()}'}, '', documents,
                  lambda position: 0 if position is None else (position + 1) / count())


def pylib_sources():
    """
    A function for each document, that reads it: str, or None for an unreadable one. Documents are every .py file of the standard
    library, its tests included, and the docstrings of its modules written in C.
    """
    roots = [Path(root) for root in dict.fromkeys(sysconfig.get_paths()[key] for key in ('stdlib', 'platstdlib'))]
    files = {}
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in ('site-packages', 'dist-packages', '__pycache__')]
            paths = [Path(folder) / name for name in names if name.endswith('.py')]
            files |= {path.relative_to(root).as_posix(): path for path in paths}
    extensions = {path.name.partition('.')[0] for root in roots for path in (root / 'lib-dynload').glob('*.*')}
    modules = sorted(extensions | set(sys.builtin_module_names))
    return [*(partial(python_source, path) for _, path in sorted(files.items())),
            *(partial(c_docstrings, name) for name in modules if 'test' not in name and not name.lstrip('_').startswith('xx'))]


def python_source(path):
    try:
        with tokenize.open(path) as file:  # in the encoding that the source declares (PEP 263)
            text = file.read()
        text.encode()
        return text
    except (OSError, SyntaxError, LookupError, ValueError):  # the library's tests have broken sources on purpose
        return None


def c_docstrings(name):
    """The public functions, classes and methods of a module written in C, as a stub that holds their docstrings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # deprecated modules
            module = importlib.import_module(name)
    except ImportError:  # a system library is missing
        return None

    def docstring(thing, indent=''):
        doc = thing.__doc__
        return [textwrap.indent(f'"""{inspect.cleandoc(doc)}"""', indent)] if isinstance(doc, str) else []

    def function(key, thing, indent=''):
        signature = re.sub(r'\$module(, /)?(, )?', '', getattr(thing, '__text_signature__', None) or '(...)').replace('$', '')
        doc = docstring(thing, indent + '    ')
        return [f'\n{indent}def {key}{signature}:', *doc] if doc else []

    def public(owner):
        return sorted((key, thing) for key, thing in vars(owner).items() if not key.startswith('_'))

    methods = (types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType, staticmethod)
    lines = docstring(module)
    for key, thing in public(module):
        if isinstance(thing, types.BuiltinFunctionType):
            lines += function(key, thing)
        elif isinstance(thing, type):
            lines += [f'\nclass {key}:', *docstring(thing, '    ')]
            for member, method in public(thing):
                lines += function(member, method, '    ') if isinstance(method, methods) else []
    return '\n'.join(lines) + '\n'


# Files: text:PATH, and --source=PATH for the corpora that are downloaded otherwise

def text_corpus(config, path):
    files, field = find_files(path, ('txt', 'jsonl', 'parquet')), config.text_field
    source = {'dataset': config.dataset} | sizes(files)
    if any(kind(file) in ('jsonl', 'parquet') for file in files):
        source['text_field'] = field

    def documents(position=None):
        for row, dropped, end in file_rows(files, field, config.bad_text, position):
            yield Document(row and row[field], dropped, None, end)

    return Corpus(source, '', documents, partial(file_progress, files), inputs=stamp(files),
                  check=partial(check_files, files, field, config.bad_text))


def nanochat_corpus(config, path):
    """
    The .parquet files of nanochat: the last one by name is validation (nanochat/dataset.py in github.com/karpathy/nanochat).
    It is read first, so that --max_tokens leaves it whole.
    """
    files, field = find_files(path, ('parquet',)), config.text_field
    if len(files) < 2:
        raise UserError(f'{path}: one .parquet file, expected two at least, the last of which is validation '
                        f'(--dataset=text:{path} splits the documents of a single one)')
    files = [files[-1], *files[:-1]]

    def documents(position=None):
        for row, dropped, end in file_rows(files, field, config.bad_text, position):
            yield Document(row and row[field], dropped, 'train' if end[0] else 'val', end)

    source = {'dataset': config.dataset, 'text_field': field} | sizes(files)
    return Corpus(source, '', documents, partial(file_progress, files), own_splits=True, inputs=stamp(files),
                  check=partial(check_files, files, field, config.bad_text))


def find_files(path, kinds):
    """The files of these kinds at a path, in a directory and its subdirectories, or of a glob, sorted. Raises UserError."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        files = [file for file in Path(path).rglob('*') if kind(file) in kinds]
    else:  # what is named is read as plain text if its ending says nothing else
        found = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
        files = [file for file in map(Path, found) if (kind(file) or 'txt') in kinds]
    for file in files:
        if not file.exists():
            raise UserError(f'{file}: broken symbolic link to {os.readlink(file)}')
    files = sorted(file for file in files if file.is_file())
    if not files:
        endings = ', '.join(f'.{kind}' for kind in kinds)
        raise SourceMissing(f'{path}: no such file, and no directory or glob with {endings} files (.gz or .zst too, except .parquet)')
    return files


def kind(path):
    """'txt', 'jsonl' or 'parquet' by the ending, '' for any other."""
    match = re.search(r'\.(?:(txt|jsonl)(?:\.gz|\.zst)?|(parquet))$', path.name)
    return match[match.lastindex] if match else ''


def sizes(files):
    return {'files': len(files), 'bytes': sum(file.stat().st_size for file in files)}


def check_files(files, field, bad_text, one_of=()):
    """Opens the files (of many the first ones). Raises UserError for a broken one, or one without the field or all of `one_of`."""
    checked, without_text = files if len(files) < CHECKED else files[:10], []
    for file in checked:
        if kind(file) == 'parquet':
            with open_parquet(file, field) as parquet_file:
                names = parquet_file.schema_arrow.names
        else:  # the first line is refused by itself, but with bad_text='skip' in any number of files the first may be a bad one
            head = list(islice(READERS[kind(file)](file, field, bad_text), 1 if bad_text == 'refuse' else 100))
            names = next((row for row, _, _ in head if row), ())
            without_text += [file] if head and all(dropped == 'not_json' for _, dropped, _ in head) else []
        if names:
            check_names(file, names, one_of)
    if without_text == checked:
        raise UserError(f'{checked[0]}: none of its first lines has a text in a field {field!r}, which --text_field names')


def check_names(where, names, one_of):
    if one_of and not set(one_of) & set(names):
        raise UserError(f"{where}: no column {' or '.join(map(repr, one_of))}, it has: {', '.join(names)}")


def file_rows(files, field, bad_text, start=None, text=None):
    """
    (row, dropped, position) of the files in turn. A row is {field: str, ...}, or None if it was dropped. `text` reads what isn't
    .jsonl or .parquet, by default `pieces`. Position: [index of the file, position in it].
    """
    number, inner = start or (0, None)
    while number < len(files):
        read = READERS[kind(files[number])]
        read = text or read if read is pieces else read
        for row, dropped, end in read(files[number], field, bad_text, inner):
            yield row, dropped, [number, end]
        number, inner = number + 1, None


def file_progress(files, position):
    number, inner = position or (0, 0)
    size = [file.stat().st_size for file in files]
    inside = (inner[0] if isinstance(inner, list) else inner) / max(1, extent(files[number]))
    return (sum(size[:number]) + min(1, inside) * size[number]) / max(1, sum(size))


@cache
def extent(path):
    """What positions in a file go up to: rows of .parquet, otherwise bytes, of a compressed file guessed from its beginning."""
    if kind(path) == 'parquet':
        with open_parquet(path) as file:
            return file.metadata.num_rows
    with opened(path) as (file, raw):
        return len(file.read(2**22)) / max(1, raw.tell()) * path.stat().st_size


@contextmanager
def readable(where):
    """Faults of a file inside become a UserError; where() says which file, and where in it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where()}: {getattr(error, 'strerror', None) or f'damaged or cut off: {error}'}")


@contextmanager
def opened(path, offset=0):
    """A buffered binary file of the uncompressed content, at this byte of it, and the file as it is on the disk."""
    with open(path, 'rb') as raw:
        file = raw
        if path.suffix == '.gz':
            file = GzipFile(fileobj=raw)
        elif path.suffix == '.zst':  # pyarrow always reads it, Python itself only from 3.14 on
            file = io.BufferedReader(installed('pyarrow').input_stream(raw, compression='zstd'))
        if file.seekable():
            file.seek(offset)
        else:
            while offset and (data := file.read(min(offset, 2**20))):
                offset -= len(data)
        yield file, raw


def pieces(path, field='text', bad_text='refuse', start=0):
    """
    ({field: str}, dropped, end in bytes): documents of a .txt file, which joined are the file: cut at the first blank line after
    8 KB, at the first line end after 8 KB where 64 KB have no such blank line, and at 128 KB where no line ends. So text that is
    appended to the file changes the last document alone. Raises UserError where it isn't UTF-8, if bad_text is 'refuse'.
    """
    blank_line, offset = re.compile(rb'\n[ \t\r]*\n'), start or 0
    with readable(lambda: f'{path}: after byte {offset}' if offset else path), opened(path, offset) as (file, _):
        text = b'' if offset else file.read(3)
        if text == codecs.BOM_UTF8:
            offset, text = 3, b''
        while text := text + file.read(LONGEST - len(text)):
            if cut := blank_line.search(text, PIECE, PATIENCE):
                end = cut.end()
            elif len(text) < PATIENCE:
                end = len(text)
            else:
                end = text.find(b'\n', PIECE) + 1 or len(text)
            final, dropped = end < LONGEST, ''  # not final: may end inside a character
            try:
                document, end = codecs.utf_8_decode(text[:end], 'strict', final)
            except UnicodeDecodeError as error:
                if bad_text == 'refuse':
                    raise UserError(f'{path}: not UTF-8 at byte {offset + error.start}{GO_ON}')
                document, end = codecs.utf_8_decode(text[:end], 'replace', final)
                dropped = 'bad_text' if bad_text == 'skip' else 'replaced'
            offset, text = offset + end, text[end:]
            yield kept({field: document}, dropped), dropped, offset


def lines(path, start=None):
    """(bytes, [offset behind the line, its number]) of a file's lines. Raises UserError for a damaged file or a huge line."""
    offset, number = start or (0, 0)
    with readable(lambda: f'{path}:{number + 1}'), opened(path, offset) as (file, _):
        while line := file.readline(LONGEST_LINE + 1):
            offset, number = offset + len(line), number + 1
            if len(line) > LONGEST_LINE:
                raise UserError(f'{path}:{number}: longer than {LONGEST_LINE >> 20} MB: is this a file with one document a line?')
            yield line, [offset, number]


def text_lines(path, field, bad_text='refuse', start=None):
    for line, end in lines(path, start):
        text, dropped = decoded(line, bad_text, f'{path}:{end[1]}')
        yield kept({field: text}, dropped), dropped, end


def jsonl(path, field, bad_text='refuse', start=None):
    """
    ({field: str, ...}, '', position) of the lines of a .jsonl file, or (None, why, position): 'unreadable' (the text is null),
    'bad_text' or 'not_json'; with bad_text='refuse' the last two are a UserError with the number of the line.
    """
    for line, end in lines(path, start):
        if line.isspace():
            continue
        try:
            text, dropped = (line.decode(), '') if bad_text != 'replace' else decoded(line, bad_text, path)
            row = json.loads(text.removeprefix('\ufeff'))
            names = list(row) if isinstance(row, dict) else []
            if field not in names or not isinstance(row[field], (str, types.NoneType)):
                raise ValueError(f'no text in a field {field!r}, which --text_field names' +
                                 (f", but it has {', '.join(names)[:200]}" if names else ''))
            if row[field] is None:
                row, dropped = None, 'unreadable'
            else:
                try:
                    row[field].encode()
                except UnicodeEncodeError:  # json lets half a pair of surrogates pass
                    if bad_text != 'replace':
                        raise
                    row[field], dropped = SURROGATE.sub('\ufffd', row[field]), 'replaced'
        except (ValueError, RecursionError) as error:
            if bad_text == 'refuse':
                raise UserError(f'{path}:{end[1]}: broken line: {error}{GO_ON}')
            row, dropped = None, 'bad_text' if isinstance(error, UnicodeError) else 'not_json'
        yield row, dropped, end


def parquet(path, field, bad_text='refuse', start=0):
    """({field: str} or None, dropped, rows up to here) of a .parquet file. Row groups before `start` are not read."""
    pa, done, start = installed('pyarrow'), 0, start or 0
    with open_parquet(path, field) as file:
        try:
            for group in range(file.num_row_groups):
                if (size := file.metadata.row_group(group).num_rows) <= start - done:
                    done += size
                    continue
                for batch in file.iter_batches(32, row_groups=[group], columns=[field], use_threads=False):
                    texts = batch.column(field).cast(pa.large_binary()).to_pylist()  # so that a broken one can be told
                    for data in texts:
                        done += 1
                        if done > start:
                            text, dropped = decoded(data, bad_text, f'{path}: row {done}')
                            yield kept({field: text}, dropped), dropped, done
        except (OSError, pa.ArrowException) as error:
            raise UserError(f'{path}: row {done + 1}: damaged: {error}')


@contextmanager
def open_parquet(path, field=None):
    """pyarrow's ParquetFile. Raises UserError, also where `field` is no column of text."""
    pa, pq = installed('pyarrow'), installed('pyarrow.parquet')
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)  # no whole row group
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or f'no .parquet file: {error}'}")
    with file:
        names = file.schema_arrow.names
        if field and names.count(field) != 1:
            raise UserError(f"{path}: no column {field!r}, which --text_field names, but it has: {', '.join(names)}")
        if field and (column := file.schema_arrow.field(field).type) not in (pa.string(), pa.large_string()):
            raise UserError(f'{path}: column {field!r}, which --text_field names, holds {column}, expected string')
        yield file


READERS = {'txt': pieces, '': pieces, 'jsonl': jsonl, 'parquet': parquet}


def decoded(data, bad_text, where):
    """(text, why it was dropped, or 'replaced')"""
    try:
        return (None, 'unreadable') if data is None else (data.decode(), '')
    except UnicodeDecodeError as error:
        if bad_text == 'refuse':
            raise UserError(f'{where}: not UTF-8 at byte {error.start} of it{GO_ON}')
        return (None, 'bad_text') if bad_text == 'skip' else (data.decode(errors='replace'), 'replaced')


def kept(row, dropped):
    return row if dropped in ('', 'replaced') else None


def installed(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} can't be imported ({error}): pip install {name.partition('.')[0]}")


# FineWeb-Edu and WikiText

def fineweb_corpus(config):
    """The documents with an educational score of at least min_score: streamed, or from downloaded files at config.source."""
    field, scores, inputs = config.text_field, ('int_score', 'score'), None
    source = {'dataset': config.dataset, 'min_score': config.min_score}
    if config.source:
        files = find_files(config.source, ('jsonl', 'parquet'))
        source |= {'source': config.source, **sizes(files)}
        inputs = stamp(files)
        stream = local(config.dataset, files, field, scores)
    else:
        source |= {'subset': config.subset}
        stream = hub(config.dataset, FINEWEB, config.subset, 'train', field, scores)

    def documents(position=None):
        for row, dropped, end in stream.rows(position):
            if row:
                score = row.get('int_score')  # the rounded score, by which the published subsets are cut
                score = row.get('score') if score is None else score
                if not isinstance(score, (int, float)):
                    dropped = 'unreadable'
                elif not score >= config.min_score:  # nan too
                    dropped = 'low_score'
            yield Document(None if dropped else row[field], dropped, None, end)

    return Corpus(source, f'educational score >= {config.min_score:g}', documents, stream.progress, inputs=inputs,
                  check=partial(installed, 'datasets'))


def wikitext_corpus(config):
    """WikiText's articles in its own splits: streamed, or from files at config.source (.parquet, .jsonl, .txt, wiki.train.raw)."""
    subset, field = SUBSETS[config.dataset], config.text_field
    source, inputs = {'dataset': config.dataset, 'subset': subset}, None
    if config.source:
        files, tables = wikitext_files(config.source, subset), {}
        for split, found in files.items():
            if kind(found[0]) in ('jsonl', 'parquet'):
                tables[split] = local(config.dataset, found, field)
            else:
                check_files(found, field, config.bad_text)
        everything = [file for found in files.values() for file in found]
        source |= {'source': config.source, **sizes(everything)}
        inputs = stamp(everything)
    else:
        names = {'train': 'train', 'val': 'validation', 'test': 'test'}
        tables = {split: hub(config.dataset, WIKITEXT, subset, name, field) for split, name in names.items()}

    def split_lines(split, start=None):
        is_table = split in tables  # where '' is an empty line
        rows = tables[split].rows(start) if is_table else file_rows(files[split], field, config.bad_text, start, text=text_lines)
        for row, dropped, end in rows:
            line = row[field] if row else ''  # null, or dropped for bad_text
            yield line + '\n' * (is_table and not line.endswith('\n')), dropped, end

    def documents(position=None):
        split, start = position or ('train', None)
        for name in ('train', 'val') if split == 'train' else ('val',):
            for text, dropped, end in articles(split_lines(name, start)):
                yield Document(text, dropped, name, [name, end])
            start = None

    return Corpus(source, '', documents, own_splits=True, test=lambda: ''.join(line for line, *_ in split_lines('test')),
                  inputs=inputs, check=partial(installed, 'datasets') if tables else lambda: None)


def wikitext_files(folder, subset):
    """{'train': files, 'val': files, 'test': files} of a directory, by their names. Raises UserError."""
    folder = os.path.expanduser(folder)
    inner = os.path.join(folder, subset)  # as a download of the whole repository has it
    folder = inner if os.path.isdir(inner) else folder
    files = {'train': [], 'val': [], 'test': []}
    for file in find_files(f'{glob.escape(folder)}/*', ('txt', 'jsonl', 'parquet')):
        split = re.search(r'(?:^|[._-])(train|val|test)', file.name)
        if split:
            files[split[1]].append(file)
    for split, found in files.items():
        if not found:
            raise UserError(f'{folder}: no file of the {split} split ({split}*.parquet, .jsonl or .txt, or wiki.{split}*.raw)')
        if len({file.suffix for file in found}) > 1:
            raise UserError(f"{folder}: the {split} split is there twice: {', '.join(file.name for file in found)}")
    return files


def articles(rows):
    """
    (line, dropped, position) -> (article, 'replaced' if a line of it was mended or dropped, position), an article from a line
    ` = Title = ` behind an empty line to the next such line.
    """
    article, length, mended, has_text, blank, here = [], 0, '', False, True, None
    for line, dropped, end in rows:
        if has_text and blank and TITLE.fullmatch(line) or length > LONGEST_ARTICLE:
            yield ''.join(article), mended, here
            article, length, mended, has_text = [], 0, '', False
        article.append(line)
        mended = 'replaced' if dropped else mended
        length, blank, here = length + len(line), not line.strip(), end
        has_text = has_text or not blank
    if article:
        yield ''.join(article), mended, here


def count_words(text):
    """
    {'words': runs of what isn't whitespace, 'lines': all lines, blank ones too}. The test set of WikiText-2 is published as 245,569
    tokens: 241,211 words and an <eos> for each of its 4,358 lines (with an <eos> for the lines that hold a word alone it would be
    244,102). So word-level perplexity divides by words + lines.
    """
    return {'words': len(text.split()), 'lines': text.count('\n') + (text[-1:] not in ('', '\n'))}


# Through the library of Hugging Face

def hub(name, repository, subset, split, field, one_of=()):
    return Stream(name, f'{repository} {subset} from the Hugging Face Hub', field, one_of,
                  {'path': repository, 'name': subset, 'split': split},
                  'Without a network: --source=PATH of downloaded .parquet files of it, --dataset=text:PATH or --dataset=pylib')


def local(name, files, field, one_of=()):
    """The same from files on this machine, .parquet or .jsonl (.gz, .zst). Raises UserError."""
    kinds, folder = sorted({kind(file) for file in files}), files[0].parent
    if len(kinds) > 1:
        raise UserError(f"{folder}: {' and '.join(kinds)} files: name those of one kind, as in --source='{folder}/*.parquet'")
    try:
        check_files(files, field, 'refuse', one_of)
    except UserError as error:
        raise UserError(str(error).removesuffix(GO_ON))  # the library doesn't
    if any(file.suffix == '.zst' for file in files):
        installed('zstandard')
    where = files[0] if len(files) == 1 else f'the files of --source, {folder}'
    builder, total = ('json', 0) if kinds == ['jsonl'] else ('parquet', sum(map(extent, files)))
    paths = [glob.escape(str(file.absolute())) for file in files]
    return Stream(name, where, field, one_of, {'path': builder, 'data_files': paths, 'split': 'train'},
                  'Look at them, or download them again', total)


class Stream:
    """The rows of datasets.load_dataset(**arguments, streaming=True). `total`: how many there are, 0: what the library says."""

    def __init__(self, name, where, field, one_of, arguments, remedy, total=0):
        self.name, self.where, self.field, self.one_of = name, where, field, one_of
        self.arguments, self.remedy, self.total = arguments, remedy, total

    def rows(self, start=None):
        """
        (row or None, dropped, position). A fault of the network is waited out, and reading goes on behind the last row; what is
        hopeless is a UserError. Position: the state of datasets' IterableDataset, which opens the right file at once but passes
        over the rows before it in that file, and the number of rows.
        """
        position, failures, begin, arrived = start or [None, 0], 0, time.monotonic(), False
        while True:
            try:
                rows = self.open()
                if position[0]:
                    rows.load_state_dict(position[0])
                for row in rows:
                    if not arrived:
                        for wanted in ((self.field,), self.one_of):
                            check_names(f'{self.name}: {self.where}', row, wanted)
                    position, arrived, failures = [rows.state_dict(), position[1] + 1], True, 0
                    yield (row, '', position) if isinstance(row[self.field], str) else (None, 'unreadable', position)
                return
            except UserError:
                raise
            except Exception as error:  # of whatever class: the libraries below have their own
                failures += 1
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300].rstrip(':')
                offline = 'HF_HUB_OFFLINE is set, ' if installed('datasets').config.HF_HUB_OFFLINE else ''
                hopeless = failures > RETRIES or not arrived and time.monotonic() - begin > HOPELESS
                if hopeless or offline or not is_transient(error):
                    raise UserError(f"{self.name}: can't read {self.where} behind row {position[1]:,}, tried {failures} time"
                                    f"{'s' * (failures > 1)} ({offline}{reason}). {self.remedy}") from error
                print(f'{self.name}: {reason}: trying again in {2**(failures - 1)} s', file=sys.stderr, flush=True)
                time.sleep(2**(failures - 1))

    def open(self):
        datasets, hub = installed('datasets'), installed('huggingface_hub')
        datasets.disable_progress_bars()
        for library in (datasets, hub):
            library.utils.logging.set_verbosity(logging.CRITICAL)  # faults are told in our own lines
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1  # not 20 of them in silence
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # for files of this machine too it would call a server, and wait for it
        rows = datasets.load_dataset(**self.arguments, streaming=True)
        known = (rows.info.splits or {}).get(self.arguments['split']) if rows.info else None
        self.total = self.total or known and known.num_examples or 0
        return rows

    def progress(self, position):
        return min(1, (position[1] if position else 0) / self.total) if self.total else None


def is_transient(error):
    """Whether to try again, by the error and those that led to it: an HTTP status decides, otherwise the class."""
    chain = []
    while error and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        status = getattr(getattr(link, 'response', None), 'status_code', None) or getattr(link, 'status', None)
        if isinstance(status, int):
            return status in (408, 429) or status >= 500
    classes = {parent for link in chain for parent in type(link).__mro__}
    packages = {'requests', 'urllib3', 'httpx', 'httpx2', 'httpcore', 'httpcore2', 'aiohttp', 'fsspec', 'http'}
    return bool(classes & {ConnectionError, TimeoutError, asyncio.TimeoutError, socket.gaierror} or
                packages & {cls.__module__.partition('.')[0] for cls in classes})
