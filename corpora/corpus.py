"""
The corpora by name. Each one is a stream of documents that can resume at any position. Imported by prepare.py:

    corpus = open_corpus(config)                    # pylib, text:PATH, fineweb_edu, wikitext2, wikitext103
    for document in corpus.documents(position):     # position of the last document used; None starts at the beginning
        document.text or document.dropped, corpus.progress(document.position)

Memory use is bounded for files of any size. An unreadable file gives a one-line error with file name and position.
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
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from gzip import GzipFile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from files import sizes, stamp

DATASETS = ('pylib', 'wikitext2', 'wikitext103', 'fineweb_edu')  # and text:PATH
FINEWEB = 'HuggingFaceFW/fineweb-edu'
WIKITEXT, SUBSETS = 'Salesforce/wikitext', {'wikitext2': 'wikitext-2-raw-v1', 'wikitext103': 'wikitext-103-raw-v1'}
SURROGATE = re.compile('[\ud800-\udfff]')
TITLE = re.compile(r' = [^=\s].* = \s*')  # title of an article; section titles have more than one =
PIECE, PATIENCE, LONGEST = 8 * 1024, 64 * 1024, 128 * 1024  # bytes of a .txt document, explained in `pieces`
LONGEST_LINE = 2**26  # bytes
LONGEST_ARTICLE = 2**20  # characters; a longer article is cut at a line end (files without titles)
CHECKED = 1000  # with fewer files than this, all are opened before the first is read
HEAD = 64 * 1024  # bytes read to detect the content of a file
GO_ON = ' (--bad_text=skip or replace goes on)'
RETRIES = 5  # retries after a network error, with waits of 1, 2, 4, 8 and 16 s; each document received resets the count
HOPELESS = 15  # seconds without a first row after which we assume that there is no network and give up

# Kind of a file by its ending. .gz or .zst may follow, except after .parquet.
KINDS = {'.txt': 'txt', '.text': 'txt', '.md': 'txt', '.rst': 'txt',
         '.jsonl': 'jsonl', '.ndjson': 'jsonl', '.json': 'jsonl', '.parquet': 'parquet'}
REMEDIES = {
    'a table: write it as .jsonl or .parquet with the text in one column, or name it .txt to train on it as it is':
        '.csv .tsv .xls .xlsx .ods',
    'markup: extract its text to a .txt file, or name it .txt to train on the markup too':
        '.html .htm .xhtml .xml .svg',
    'no plain text: extract its text to a .txt file': '.pdf .epub .doc .docx .odt .rtf .ppt .pptx .ipynb',
    'an archive: unpack it (only .gz and .zst of single files are read)': '.zip .tar .tgz .7z .rar .bz2 .xz',
    'no text: leave it out': '.png .jpg .jpeg .gif .bmp .tif .tiff .webp .ico .mp3 .wav .flac .ogg .mp4 .mkv .avi .mov '
                             '.webm .exe .dll .so .o .pyc .jar .pkl .db .sqlite .arrow .safetensors .gguf',
    'no text: rows of token ids are read by --dataset=shards:DIR (.npy, .pt) or --dataset=bins:PATH (.bin)':
        '.npy .pt .bin'}
NOT_TEXT = {ending: remedy for remedy, endings in REMEDIES.items() for ending in endings.split()}
MAGIC = {  # first bytes of files that are not text. Those in PRINTABLE_MAGIC could also begin a text
    b'\x1f\x8b': 'gzip: give it the ending .gz', b'\x28\xb5\x2f\xfd': 'zstd: give it the ending .zst',
    b'PK\x03\x04': 'zip (or .docx, .epub, ...): unpack it, or extract its text',
    b'%PDF-': 'PDF: extract its text to a .txt file',
    b'\x89PNG': 'PNG: leave it out', b'\xff\xd8\xff': 'JPEG: leave it out', b'\x7fELF': 'a program: leave it out',
    b'\xfd7zXZ': 'xz: unpack it', b'7z\xbc\xaf': '7-zip: unpack it', b'\x93NUMPY': 'an array of NumPy: leave it out'}
PRINTABLE_MAGIC = {b'PAR1': 'Parquet: give it the ending .parquet', b'BZh': 'bzip2: unpack it',
                   b'GIF8': 'GIF: leave it out'}
MARKS = {codecs.BOM_UTF8: 'utf-8',
         # UTF-32 comes before UTF-16, because its marks start with the UTF-16 marks.
         codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
JSON_START = re.compile(rb'\s*(\[\s*)*\{\s*("[^"\n]*"\s*:|\})')
ISO_2022_JP = re.compile(rb'\x1b\$[@B]')  # switches to two bytes per character, all of them ASCII
MARKUP_START = re.compile(rb'\s*<(!doctype html|html|\?xml)', re.IGNORECASE)


class SourceMissing(UserError):
    """The given path has no files of the corpus."""


class Document(NamedTuple):
    text: str | None  # None: the document was dropped
    dropped: str  # 'unreadable', 'bad_text', 'not_json' or 'low_score'; '' if kept; 'replaced' if repaired and kept
    split: str | None  # 'train' or 'val' if the corpus has its own splits
    position: object  # JSON-compatible; documents(position) continues right after this document


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
    contents: Callable = lambda: 'reading'  # one line: how many files of each kind are read, and which were left out


class Reading(NamedTuple):
    """How to read the files of a corpus."""
    field: str = 'text'  # name of the text column
    bad_text: str = 'refuse'
    encoding: str = 'utf-8'  # of files without a byte order mark
    scores: tuple = ()  # names of score columns; at least one must exist


def reading_of(config, scores=()):
    return Reading(config.text_field, config.bad_text, encoding_name(config.encoding), scores)


def encoding_name(name):
    """The canonical name of a text encoding: UTF8 -> utf-8. '' if the name is not a text encoding."""
    try:
        'a'.encode(name)  # LookupError for codecs that are not text encodings, such as base64
        name = codecs.lookup(name).name.removesuffix('-sig')
    except (LookupError, ValueError):
        return ''
    not_of_files = ('idna', 'punycode', 'unicode-escape', 'raw-unicode-escape')
    return '' if name in not_of_files else name


def open_corpus(config, check=True):
    """
    The Corpus that config.dataset names. Raises UserError, or SourceMissing if its files do not exist.

    check=False lists the files without opening them, which is enough for a comparison with meta.json.
    The network is not used before documents() is called.
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
    One function per document. It reads the document and returns a str, or None if the document is unreadable.

    The documents are all .py files of the standard library, including its tests, and the docstrings of its C modules.
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
        with tokenize.open(path) as file:  # uses the encoding that the source declares (PEP 263)
            text = file.read()
        text.encode()
        return text
    except (OSError, SyntaxError, LookupError, ValueError):  # the library's tests include broken sources
        return None


def c_docstrings(name):
    """A stub of a C module: its public functions, classes and methods with their docstrings."""
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


# Files: text:PATH, and --source=PATH for the corpora that are downloaded by default

def text_corpus(config, path):
    files, left_out = find_files(path, ('txt', 'jsonl', 'parquet'))
    return files_corpus(config, files, left_out)


def nanochat_corpus(config, path):
    """
    The .parquet files of nanochat. The last file by name is the validation split
    (nanochat/dataset.py in github.com/karpathy/nanochat).

    The validation file is read first, so that --max_tokens and --max_documents do not shorten it.
    """
    files, left_out = find_files(path, ('parquet',))
    if len(files) < 2:
        raise UserError(f'{path}: one .parquet file, expected two at least, the last of which is validation '
                        f'(--dataset=text:{path} splits the documents of a single one)')
    return files_corpus(config, [files[-1], *files[:-1]], left_out, own_splits=True)


def files_corpus(config, files, left_out, own_splits=False):
    """The Corpus of these files. own_splits: the first file is the validation split, the others are train."""
    reading, bad_rows = reading_of(config), BadRows(config.bad_rows)
    source = {'dataset': config.dataset} | sizes(files)
    other = {kind(file) for file in files} - {'txt'}
    if other - {''} or other and reading.field != 'text':  # '': the kind depends on the content, which is not read here
        source['text_field'] = reading.field

    def documents(position=None):
        rows = file_rows(files, reading, position)
        for row, dropped, end in bad_rows.counted(rows, position, reading, partial(place, files)):
            split = ('train' if end[0] else 'val') if own_splits else None
            yield Document(text_of(row, dropped, reading), dropped, split, end)

    progress = partial(file_progress, files, reading)
    if own_splits and config.max_documents:
        documents, progress = of_train_documents(config.max_documents, documents, progress)
    return Corpus(source, '', documents, progress, own_splits, inputs=stamp(files),
                  check=partial(check_files, files, reading), contents=partial(contents, files, left_out, reading))


def of_train_documents(limit, documents, progress=lambda position: None):
    """
    Limit a corpus with its own splits, val first, to `limit` train documents.

    Returns documents() and progress(). Their positions are [position, train documents so far].
    """
    def limited(position=None):
        inner, count = position or (None, 0)
        for document in documents(inner):
            if document.split == 'train':
                if count == limit:
                    return
                count += 1
            yield document._replace(position=[document.position, count])
    return limited, lambda position: progress(position[0] if position else None)


def find_files(path, kinds):
    """
    Find the files of these kinds. `path` is a file, a directory (searched with its subdirectories) or a glob.

    Returns (sorted files, Counter of the endings of the files left out). Only .json files are opened, the others are
    listed. Raises UserError.
    """
    path, left_out = os.path.expanduser(path), []
    if os.path.isdir(path):
        found = list(Path(path).rglob('*'))
        known = [file for file in found if kind(file) in kinds]
        # If there is only metadata, the user meant it: `kind_of` will explain.
        files = [file for file in known if not is_metadata(file)] or known
        kept = set(files)
        left_out = [file for file in found if file.is_file() and file not in kept]
    else:  # a named file is read even with an unknown ending: `kind_of` checks its content
        found = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
        files = [file for file in map(Path, found) if (kind(file) or 'txt') in kinds]
        unwanted = [file for file in files if ending(file)[0] in NOT_TEXT or len(files) > 1 and is_metadata(file)]
        if len(unwanted) < len(files):  # if all are unwanted, the user meant them: `kind_of` will explain
            left_out = [file for file in unwanted if file.is_file()]
            files = [file for file in files if file not in unwanted]
    for file in files:
        if not file.exists():
            raise UserError(f'{file}: broken symbolic link to {os.readlink(file)}')
    files = sorted(file for file in files if file.is_file())
    left_out = Counter(''.join(ending(file)) or '(no ending)' for file in left_out)
    if not files:
        endings = ', '.join(f'.{kind}' for kind in kinds)
        raise SourceMissing(f'{path}: no such file, and no directory or glob with {endings} files '
                            '(.gz or .zst too, except .parquet)' + (f'; left out: {listed(left_out)}' if left_out else ''))
    return files, left_out


def is_metadata(path):
    """Whether a .json file holds metadata instead of rows, such as the dataset_info.json of a download."""
    if ending(path)[0] != '.json' or not path.is_file():
        return False
    try:
        return not starts_with_object(*read_head(path, 'utf-8'))
    except UserError:  # not text
        return True


def ending(path):
    """a/B.JSONL.gz -> ('.jsonl', '.gz')"""
    name = Path(path.name.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in ('.gz', '.zst') else (name.suffix, '')


def kind(path):
    """'txt', 'jsonl' or 'parquet' by the ending, '' for any other ending."""
    kind, packed = KINDS.get(ending(path)[0], ''), ending(path)[1]
    return '' if kind == 'parquet' and packed else kind


def kind_of(path, encoding):
    """
    'txt', 'jsonl' or 'parquet' by the ending, or by the content if the ending is unknown. Raises UserError for other
    content.
    """
    name = ending(path)[0]
    if name in NOT_TEXT:
        raise UserError(f'{path}: {NOT_TEXT[name]}')
    if kind(path) == 'parquet':
        return 'parquet'
    head, is_cut = read_head(path, encoding)
    if kind(path) and name != '.json':
        return kind(path)
    if starts_with_object(head, is_cut):
        return 'jsonl'
    if head.strip() and name == '.json' or JSON_START.match(head):
        raise UserError(f"{path}: JSON without an object on its first line: convert it to one object a line "
                        "(an array by jq -c '.[]', objects by jq -c .), or leave it out")
    if MARKUP_START.match(head):
        raise UserError(f"{path}: {NOT_TEXT['.html']}")
    return kind(path) or 'txt'


def read_head(path, encoding):
    """
    Returns (the first HEAD bytes converted to UTF-8 without a byte order mark, whether the file may be longer).
    Raises UserError if the file is not text.
    """
    with readable(lambda: path), uncompressed(path) as (file, _):
        data = file.read(HEAD)
    is_cut = len(data) == HEAD
    is_utf8 = b'\0' not in data and not_utf8_at(data) is None
    unmarked = encoding == encoding_of(path, data, encoding)
    # Text in another encoding is rarely valid UTF-8 by accident, and almost never for ten characters beyond ASCII.
    if is_utf8 and unmarked and not encoding.startswith('utf') and len(re.sub('[\0-\x7f]+', '', data.decode(errors='ignore'))) >= 10:
        raise UserError(f'{path}: its text is UTF-8, not {encoding}: leave --encoding out, or name the files of one encoding alone')
    if encoding == 'utf-8' and (escape := ISO_2022_JP.search(data)):
        raise UserError(f'{path}: an escape sequence of iso2022_jp at byte {escape.start()}, which --encoding=iso2022_jp reads')
    for magic, content in (MAGIC if is_utf8 else MAGIC | PRINTABLE_MAGIC).items():
        if data.startswith(magic):
            raise UserError(f'{path}: its content is {content}')
    encoding = encoding_of(path, data, encoding)
    if encoding == 'utf-8' and (wide := wide_encoding(data)):
        raise UserError(f'{path}: every other byte is NUL: likely {wide} without a mark, which --encoding={wide} reads')
    if encoding != 'utf-8':
        data = codecs.getincrementaldecoder(encoding)('replace').decode(data).encode('utf-8', 'replace')
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.count(0) > len(data) / 100:
        raise UserError(f'{path}: binary content, with a NUL at byte {data.index(0)}: leave it out')
    return data, is_cut


def starts_with_object(head, is_cut):
    """Whether the first line is a JSON object. is_cut: `head` is only part of the file and may end inside the line."""
    line, *rest = head.lstrip().split(b'\n', 1)
    if is_cut and not rest:
        return line.startswith(b'{') and JSON_START.match(line) is not None
    try:
        return isinstance(json.loads(line.decode(errors='replace')), dict)
    except (ValueError, RecursionError):
        return False


def contents(files, left_out, reading):
    """One line: how many files of each ending are read, how they are read, and which files are left out."""
    labels = Counter()
    for file in files:
        label = ''.join(ending(file)) or '(no ending)'
        if len(files) >= CHECKED:
            label += '' if kind(file) else ' by their content'
        elif not kind(file):
            label += f' as .{kind_of(file, reading.encoding)}'
        elif kind(file) == 'txt' and starts_with_object(*read_head(file, reading.encoding)):
            label += ' as text (it looks like JSON: .jsonl is read by its fields)'
        labels[label] += 1
    line = f"reading {listed(labels, ' and ')} {'file' if len(files) == 1 else 'files'}"
    return line + (f'; left out: {listed(left_out)}' if left_out else '')


def listed(counts, last=', '):
    """Counter -> '12 .txt, 3 .md and 1 .rst' for last=' and '."""
    *others, final = [f'{count:,} {label}' for label, count in counts.most_common(12)]
    if len(counts) > 12:
        final += f' and {len(counts) - 12} more endings'
    return last.join(filter(None, (', '.join(others), final)))


def check_files(files, reading):
    """
    Opens the files (only the first 10 if there are CHECKED or more). Raises UserError if a file is broken or lacks the
    text or score column.
    """
    checked, without_text = files if len(files) < CHECKED else files[:10], []
    for file in checked:
        kind = kind_of(file, reading.encoding)
        if kind == 'parquet':
            with open_parquet(file, reading) as parquet_file:
                names = parquet_file.schema_arrow.names
        else:
            head = []
            for row, dropped, _ in islice(READERS[kind](file, reading), 100):
                head.append((row, dropped))
                if dropped in ('', 'replaced'):
                    break
            names = list(next((row for row, _ in reversed(head) if row), ()))
            if head and all(dropped == 'not_json' or row and reading.field not in row for row, dropped in head):
                without_text.append((file, names))
        if names and reading.field in names:
            check_names(file, names, reading.scores)
    if len(without_text) == len(checked):
        file, names = without_text[0]
        raise UserError(f'{file}: none of its first lines has a text in a field {reading.field!r}, which --text_field names'
                        + (f", but the last of them has: {', '.join(names)[:200]}" if names else ''))


def check_names(where, names, one_of):
    if one_of and not set(one_of) & set(names):
        raise UserError(f"{where}: no column {' or '.join(map(repr, one_of))}, it has: {', '.join(names)}")


def file_rows(files, reading, start=None, text=None):
    """
    Yields (row, dropped, position) for all files in order. row[reading.field] is a str unless the row was dropped.

    `text` is the reader for files other than .jsonl and .parquet, by default `pieces`. A position is
    [index of the file, position in the file], plus the counts that BadRows adds.
    """
    number, inner = (start or (0, None))[:2]
    outdated = UserError('the unfinished preparation is of an earlier version: remove its directory, .NAME.tmp, '
                         'and start again')
    if not isinstance(number, int):
        raise outdated
    while number < len(files):
        kind = kind_of(files[number], reading.encoding)
        read = text if text and kind == 'txt' else READERS[kind]
        if inner is not None and isinstance(inner, list) != (read in (jsonl, text_lines)):
            raise outdated
        for row, dropped, end in read(files[number], reading, inner):
            yield row, dropped, [number, end]
        number, inner = number + 1, None


def text_of(row, dropped, reading):
    return row[reading.field] if dropped in ('', 'replaced') else None


def place(files, position):
    """'a.jsonl:3' or 'a.parquet: row 3'"""
    number, inner = position[:2]
    return f'{files[number]}:{inner[1]}' if isinstance(inner, list) else f'{files[number]}: row {inner}'


class BadRows:
    """
    Counts bad rows: rows without a text, or without a required score. They are left out of the corpus. Prints the
    location of the first one.

    Raises UserError if the share of bad rows exceeds `limit`. The check runs from row 1,000 on and at the end.
    """
    def __init__(self, limit):
        self.limit, self.is_named = limit, False

    def counted(self, rows, start, reading, place):
        """Yields (row, dropped, position), with the counts of rows and of bad rows so far appended to the position."""
        count, bad = start[2:] if start and len(start) == 4 else (0, 0)  # positions of earlier versions have no counts
        position = start
        for row, dropped, position in rows:
            count += 1
            if dropped == 'unreadable':
                bad += 1
                if not self.is_named:
                    self.is_named = True
                    print(f'{place(position)}: {missing(row, reading)}: such rows are left out, up to a share of '
                          f'--bad_rows={self.limit:g}', flush=True)
            if count == 1000 or count > 1000 and dropped == 'unreadable':
                self.judge(count, bad, reading, place(position))
            yield row, dropped, [*position[:2], count, bad]
        if bad:
            self.judge(count, bad, reading, place(position))

    def judge(self, count, bad, reading, where):
        if bad / count > self.limit:
            score = ' or no score' if reading.scores else ''
            raise UserError(f'{where}: {bad:,} of {count:,} rows up to here have no text in a field {reading.field!r}{score}, '
                            f'more than --bad_rows={self.limit:g} allows: name another --text_field or allow more')


def missing(row, reading):
    if not row or not isinstance(row.get(reading.field), str):
        return f'no text in a field {reading.field!r}'
    scores = ' and '.join(f'{name} is {row[name]!r}'[:100] for name in reading.scores if name in row)
    return f"{scores or 'no score'}, expected a number"


def file_progress(files, reading, position):
    number, inner = (position or (0, 0))[:2]
    size = [file.stat().st_size for file in files]
    inside = (inner[0] if isinstance(inner, list) else inner) / max(1, extent(files[number], reading.encoding))
    return (sum(size[:number]) + min(1, inside) * size[number]) / max(1, sum(size))


@cache
def extent(path, encoding='utf-8'):
    """
    The largest position in a file: its rows for .parquet, otherwise its uncompressed bytes. For a compressed file this
    is an estimate from its beginning.
    """
    if kind(path) == 'parquet':
        with open_parquet(path) as file:
            return file.metadata.num_rows
    with opened(path, Reading(bad_text='replace', encoding=encoding)) as (file, raw):
        return len(file.read(2**22)) / max(1, raw.tell()) * path.stat().st_size


@contextmanager
def readable(where):
    """Turns read errors inside the block into a UserError. where() returns the file and the position in it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where()}: {getattr(error, 'strerror', None) or f'damaged or cut off: {error}'}")


@contextmanager
def uncompressed(path):
    """Yields (a buffered binary file of the uncompressed content, the raw file on disk)."""
    with open(path, 'rb') as raw:
        file, packed = raw, ending(path)[1]
        if packed == '.gz':
            file = GzipFile(fileobj=raw)
        elif packed == '.zst':  # pyarrow can always read zstd, Python itself only since 3.14
            file = io.BufferedReader(installed('pyarrow').input_stream(raw, compression='zstd'))
        yield file, raw


@contextmanager
def opened(path, reading, offset=0):
    """Yields (a buffered binary file of the uncompressed content as UTF-8, starting at byte `offset`, the raw file)."""
    with uncompressed(path) as (file, raw):
        encoding = encoding_of(path, file.peek(4), reading.encoding)
        if encoding != 'utf-8':
            file = io.BufferedReader(Utf8(file, path, encoding, reading.bad_text), 2**16)
        if file.seekable():
            file.seek(offset)
        else:
            while offset and (data := file.read(min(offset, 2**20))):
                offset -= len(data)
        yield file, raw


def encoding_of(path, data, encoding):
    """The encoding given by the byte order mark at the start of a file, or `encoding` if there is no mark."""
    for mark, marked in MARKS.items():
        if data.startswith(mark):
            return marked
    if encoding in ('utf-16', 'utf-32') and data:
        raise UserError(f'{path}: no mark says which byte comes first: --encoding={encoding}-le (on most machines) '
                        f'or {encoding}-be')
    return encoding


class Utf8(io.RawIOBase):
    """
    Converts a binary file from another encoding to UTF-8.

    Undecodable input raises a UserError with bad_text='refuse'. Otherwise it becomes a byte that is not valid UTF-8,
    and the readers handle that byte like any other bad byte.
    """
    def __init__(self, file, path, encoding, bad_text):
        self.file, self.path, self.encoding, self.bad_text = file, path, encoding, bad_text
        self.decoder = codecs.getincrementaldecoder(encoding)('strict' if bad_text == 'refuse' else 'bad_byte')
        self.read_bytes, self.ready, self.ended = 0, b'', False

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready and not self.ended:
            pending = len(self.decoder.getstate()[0])
            data = self.file.read(2**16)
            self.ended = not data
            try:
                text = self.decoder.decode(data, self.ended)
            except UnicodeDecodeError as error:
                position = self.read_bytes - pending + error.start
                raise UserError(f'{self.path}: not {self.encoding} at byte {position}{GO_ON}')
            self.read_bytes += len(data)
            self.ready = text.encode('utf-8', 'bad_byte')
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def bad_byte(error):
    """
    Codec error handler. Decoding turns bad input into a surrogate. UTF-8 cannot encode a surrogate, so encoding turns
    it into the byte 0xff, which is not valid UTF-8.
    """
    return b'\xff' if isinstance(error, UnicodeEncodeError) else '\udcff', error.end


codecs.register_error('bad_byte', bad_byte)


def pieces(path, reading=Reading(), start=0):
    """
    Yields ({field: str}, dropped, end in bytes): the documents of a .txt file. Joined, they are the whole file.

    A document ends at the first blank line after 8 KB. If there is no such line within 64 KB, it ends at the first line
    end after 8 KB. If there is no line end either, it ends at 128 KB. With these rules, text appended to the file
    changes only the last document. Raises UserError if bad_text is 'refuse' and the text is not UTF-8.
    """
    blank_line, offset = re.compile(rb'\n[ \t\r]*\n'), start or 0
    with readable(lambda: f'{path}: after byte {offset}' if offset else path), opened(path, reading, offset) as (file, _):
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
            document, dropped, end = plain_text(text[:end], reading, path, offset, final=end < LONGEST)
            offset, text = offset + end, text[end:]
            yield kept({reading.field: document}, dropped), dropped, offset


def lines(path, reading, start=None):
    """
    Yields (bytes, [offset after the line, line number]) for each line of a file. Raises UserError for a damaged file or
    a line longer than LONGEST_LINE.
    """
    offset, number = start or (0, 0)
    with readable(lambda: f'{path}:{number + 1}'), opened(path, reading, offset) as (file, _):
        while line := file.readline(LONGEST_LINE + 1):
            offset, number = offset + len(line), number + 1
            if len(line) > LONGEST_LINE:
                raise UserError(f'{path}:{number}: longer than {LONGEST_LINE >> 20} MB: is this a file with one document a line?')
            yield line.removeprefix(codecs.BOM_UTF8), [offset, number]


def text_lines(path, reading, start=None):
    for line, end in lines(path, reading, start):
        text, dropped, _ = plain_text(line, reading, f'{path}:{end[1]}')
        yield kept({reading.field: text}, dropped), dropped, end


def plain_text(data, reading, where, offset=0, final=True):
    """
    Returns (text or None, reason for dropping it or 'replaced', bytes used).

    Text that is not UTF-8 or contains a NUL is bad. If bad_text is 'refuse', bad text raises a UserError.
    final=False: data may end inside a character.
    """
    is_strict = reading.bad_text == 'refuse'
    try:
        text, used = codecs.utf_8_decode(data, 'strict', final)
        if '\0' not in text:
            return text, '', used
        problem = f'binary content, a NUL at byte {offset + data.index(0)}'
    except UnicodeDecodeError as error:
        problem = f'not UTF-8 at byte {offset + error.start}' + (encoding_hint(data) if is_strict else '')
    if is_strict:
        raise UserError(f'{where}: {problem}{GO_ON}')
    text, used = codecs.utf_8_decode(data, 'replace', final)
    return (None, 'bad_text', used) if reading.bad_text == 'skip' else (text.replace('\0', '\ufffd'), 'replaced', used)


def not_utf8_at(data, final=False):
    """Index of the first byte that is not UTF-8, or None. final=False: data may end inside a character."""
    try:
        codecs.utf_8_decode(data, 'strict', final)
    except UnicodeDecodeError as error:
        return error.start


def wide_encoding(data):
    """
    Detects UTF-16 or UTF-32 without a byte order mark, returns its name or ''. It uses the fact that Latin letters have
    one NUL byte in UTF-16 and three in UTF-32.
    """
    for encoding, width in (('utf-32-le', 4), ('utf-32-be', 4), ('utf-16-le', 2), ('utf-16-be', 2)):
        whole = data[:len(data) - len(data) % width]
        nuls = [whole[k::width].count(0) for k in range(width)]
        low, high = (nuls[0], nuls[-1]) if encoding.endswith('le') else (nuls[-1], nuls[0])
        if width == 4 and nuls[1 if encoding.endswith('be') else 2] != high:
            continue
        if high > max(1, len(whole) / width / 20) and not low:
            try:
                codecs.getincrementaldecoder(encoding)().decode(whole)
                return encoding
            except UnicodeDecodeError:
                pass
    return ''


def encoding_hint(data):
    """Advice for an error message: which --encoding may read this text, which is not UTF-8."""
    guess = likely_encoding(data[:HEAD])
    return f', perhaps {guess}, which --encoding={guess} reads' if guess else ' (--encoding=NAME reads other encodings)'


def likely_encoding(data):
    """Guesses the encoding of text that is not UTF-8. '' if there is no good guess or damaged UTF-8 is more likely."""
    def share(encoding, expected):
        """Share (0 to 1) of the characters beyond ASCII that match `expected`. 0 if the data can't be decoded."""
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(data)
        except UnicodeDecodeError:
            return 0
        others = re.sub('[\0-\x7f]+', '', text)
        return len(re.findall(expected, others)) / max(1, len(others))

    high, letters = len(re.findall(rb'[\x80-\xff]', data)), len(re.findall(rb'[A-Za-z]', data))
    if len(re.sub('[\0-\x7f]+', '', data.decode(errors='ignore')).encode()) > 0.8 * high:
        return ''
    kana, hangul, hanzi = '[\u3040-\u30ff]', '[\uac00-\ud7a3]', '[\u4e00-\u9fff\u3000-\u301f\uff00-\uff1f]'
    for encoding in ('shift_jis', 'cp932', 'euc_jp'):
        if share(encoding, kana) > 0.3:
            return encoding
    if high > letters:
        candidates = [('euc_kr', hangul, 0.9), ('gb2312', hanzi, 0.9), ('big5', hanzi, 0.9), ('gb18030', hanzi, 0.9),
                      ('cp1251', '[а-яё]', 0.6), ('koi8_r', '[а-яё]', 0.6)]
        for encoding, expected, least in candidates:
            if share(encoding, expected) > least:
                return 'gb18030' if encoding == 'gb2312' else encoding  # gb18030 contains gb2312
    elif share('cp1252', '[À-ÖØ-öø-ÿŒœŠšŽž€‘’“”–—…«»¡¿£§©°·]') > 0.9:
        return 'cp1252'
    return ''


def jsonl(path, reading, start=None):
    """
    Yields one item per line of a .jsonl file. Blank lines are skipped.

    A good line gives (row, '', position), where row[field] is a str. With bad_text='replace', a repaired line gives
    'replaced' instead of ''. A dropped line gives (row or None, reason, position). The reason is 'unreadable' (no text
    in the field), 'bad_text' or 'not_json'. With bad_text='refuse' the last two raise a UserError with the line number.
    """
    for line, end in lines(path, reading, start):
        if line.isspace() or not line:
            continue
        try:
            strict = reading.bad_text != 'replace'
            text, dropped = (line.decode(), '') if strict else decoded(line, reading.bad_text, path)
            row = json.loads(text)
            value = row.get(reading.field) if isinstance(row, dict) else row
            if not isinstance(row, dict) or not isinstance(value, (str, types.NoneType)):
                names = f", but it has {', '.join(row)[:200]}" if isinstance(row, dict) else ''
                raise ValueError(f'no text in a field {reading.field!r}, which --text_field names{names}')
            if value is None:
                dropped = 'unreadable'
            elif SURROGATE.search(value):  # json accepts half of a surrogate pair
                if strict:
                    value.encode()
                row[reading.field], dropped = SURROGATE.sub('\ufffd', value), 'replaced'
        except UnicodeDecodeError as error:
            if reading.bad_text == 'refuse':
                hint = encoding_hint(line)
                raise UserError(f'{path}:{end[1]}: not UTF-8 at byte {error.start} of the line{hint}{GO_ON}')
            row, dropped = None, 'bad_text'
        except (ValueError, RecursionError) as error:
            if reading.bad_text == 'refuse':
                raise UserError(f'{path}:{end[1]}: broken line: {error}{GO_ON}')
            row, dropped = None, 'bad_text' if isinstance(error, UnicodeError) else 'not_json'
        yield row, dropped, end


def parquet(path, reading, start=0):
    """
    Yields (row or None, dropped, rows so far) for a .parquet file. A row holds the text and score columns. Row groups
    before row `start` are not read.
    """
    pa, done, start = installed('pyarrow'), 0, start or 0
    with open_parquet(path, reading) as file:
        scores = [name for name in reading.scores if file.schema_arrow.names.count(name) == 1]
        try:
            for group in range(file.num_row_groups):
                if (size := file.metadata.row_group(group).num_rows) <= start - done:
                    done += size
                    continue
                columns = [reading.field, *scores]
                for batch in file.iter_batches(32, row_groups=[group], columns=columns, use_threads=False):
                    # As bytes: `decoded` then finds the row whose text is not UTF-8.
                    texts = batch.column(reading.field).cast(pa.large_binary()).to_pylist()
                    values = [batch.column(name).to_pylist() for name in scores]
                    for data, *row_scores in zip(texts, *values):
                        done += 1
                        if done > start:
                            text, dropped = decoded(data, reading.bad_text, f'{path}: row {done}')
                            row = {reading.field: text, **dict(zip(scores, row_scores))}
                            yield kept(row, dropped), dropped, done
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # UnicodeDecodeError: from a score
            raise UserError(f'{path}: row {done + 1}: damaged: {error}')


@contextmanager
def open_parquet(path, reading=None):
    """Yields pyarrow's ParquetFile. Raises UserError if it can't be opened or if reading.field is not a text column."""
    pa, pq = installed('pyarrow'), installed('pyarrow.parquet')
    try:
        # These buffer settings avoid loading a whole row group into memory.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or f'no .parquet file: {error}'}")
    with file:
        names, field = file.schema_arrow.names, reading and reading.field
        if field and names.count(field) != 1:
            raise UserError(f"{path}: no column {field!r}, which --text_field names, but it has: {', '.join(names)}")
        if field and (column := file.schema_arrow.field(field).type) not in (pa.string(), pa.large_string()):
            raise UserError(f'{path}: column {field!r}, which --text_field names, holds {column}, expected string')
        yield file


READERS = {'txt': pieces, '': pieces, 'jsonl': jsonl, 'parquet': parquet}


def decoded(data, bad_text, where):
    """Returns (text or None, reason for dropping it or 'replaced'). Raises UserError if bad_text is 'refuse'."""
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
    """
    The documents with an educational score of at least min_score. They are streamed, or read from downloaded files at
    config.source.
    """
    reading, bad_rows, inputs = reading_of(config, ('int_score', 'score')), BadRows(config.bad_rows), None
    source = {'dataset': config.dataset, 'min_score': config.min_score}
    check, contents_line = partial(installed, 'datasets'), lambda: 'reading'
    if config.source:
        files, left_out = find_files(config.source, ('jsonl', 'parquet'))
        source |= {'source': config.source, **sizes(files)}
        inputs = stamp(files)
        rows, progress = partial(file_rows, files, reading), partial(file_progress, files, reading)
        where = partial(place, files)
        check, contents_line = partial(check_files, files, reading), partial(contents, files, left_out, reading)
    else:
        source |= {'subset': config.subset}
        stream = Stream(config.dataset, FINEWEB, config.subset, 'train', reading)
        rows, progress, where = stream.rows, stream.progress, stream.place

    def scored(rows):
        for row, dropped, end in rows:
            if dropped in ('', 'replaced'):
                score = score_of(row)
                if score is None:
                    dropped = 'unreadable'
                elif not score >= config.min_score:  # written this way to drop nan, too
                    dropped = 'low_score'
            yield row, dropped, end

    def documents(position=None):
        for row, dropped, end in bad_rows.counted(scored(rows(position)), position, reading, where):
            yield Document(text_of(row, dropped, reading), dropped, None, end)

    return Corpus(source, f'educational score >= {config.min_score:g}', documents, progress, inputs=inputs, check=check,
                  contents=contents_line)


def score_of(row):
    """
    The rounded score (int_score), which defines the published subsets. If it is missing, the exact score. None if the
    score is not a number.
    """
    score = row.get('int_score')
    score = row.get('score') if score is None else score
    try:
        return None if isinstance(score, bool) else float(score)
    except (TypeError, ValueError, OverflowError):
        return None


def wikitext_corpus(config):
    """
    The articles of WikiText in its own splits. They are streamed, or read from files at config.source (.parquet,
    .jsonl, .txt, wiki.train.raw).
    """
    subset, reading = SUBSETS[config.dataset], reading_of(config)
    source, inputs, check = {'dataset': config.dataset, 'subset': subset}, None, partial(installed, 'datasets')
    if config.source:
        files = wikitext_files(config.source, subset)
        rows = {split: partial(file_rows, found, reading, text=text_lines) for split, found in files.items()}
        tables = {split for split, found in files.items() if kind(found[0]) in ('jsonl', 'parquet')}
        everything = [file for found in files.values() for file in found]
        source |= {'source': config.source, **sizes(everything)}
        inputs, check = stamp(everything), lambda: [check_files(found, reading) for found in files.values()]
    else:
        names = {'train': 'train', 'val': 'validation', 'test': 'test'}
        rows = {split: Stream(config.dataset, WIKITEXT, subset, name, reading).rows for split, name in names.items()}
        tables = set(rows)

    def split_lines(split, start=None):
        for row, dropped, end in rows[split](start):
            line = text_of(row, dropped, reading) or ''  # '' for null and for bad_text
            # In tables, '' is an empty line.
            yield line + '\n' * (split in tables and not line.endswith('\n')), dropped, end

    # With a limit, val comes first, so that it stays whole. The limit then applies to train.
    order = ('val', 'train') if config.max_documents or config.max_tokens else ('train', 'val')

    def documents(position=None):
        split, start = position or (order[0], None)
        for name in order[order.index(split):]:
            for text, dropped, end in articles(split_lines(name, start)):
                yield Document(text, dropped, name, [name, end])
            start = None

    if config.max_documents:
        documents, _ = of_train_documents(config.max_documents, documents)
    return Corpus(source, '', documents, own_splits=True, test=lambda: ''.join(line for line, *_ in split_lines('test')),
                  inputs=inputs, check=check)


def wikitext_files(folder, subset):
    """
    {'train': files, 'val': files, 'test': files} of a directory, assigned by file name. Raises UserError if a split has
    no files, or files of two kinds.
    """
    folder = os.path.expanduser(folder)
    inner = os.path.join(folder, subset)  # layout of a download of the whole repository
    folder = inner if os.path.isdir(inner) else folder
    files = {'train': [], 'val': [], 'test': []}
    for file in find_files(f'{glob.escape(folder)}/*', ('txt', 'jsonl', 'parquet'))[0]:
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
    Joins lines into articles: (line, dropped, position) -> (article, 'replaced' or '', position).

    An article starts at a line ` = Title = ` that follows an empty line. It ends before the next such line. 'replaced'
    means that one of its lines was repaired or dropped.
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
    {'words': runs of non-whitespace, 'lines': all lines, including blank lines}.

    Word-level perplexity divides by words + lines. Reason: the published size of the WikiText-2 test set is 245,569
    tokens, which is 241,211 words plus one <eos> for each of its 4,358 lines. Counting <eos> only for the lines that
    hold a word would give 244,102.
    """
    return {'words': len(text.split()), 'lines': text.count('\n') + (text[-1:] not in ('', '\n'))}


# Streaming from the Hugging Face Hub

class Stream:
    """Streams the rows of a dataset on the Hugging Face Hub."""

    def __init__(self, name, repository, subset, split, reading):
        self.name, self.where, self.reading = name, f'{repository} {subset} from the Hugging Face Hub', reading
        self.arguments = {'path': repository, 'name': subset, 'split': split}
        self.total = 0  # rows; 0 if the library does not know

    def place(self, position):
        return f'{self.where}: row {position[1]:,}'

    def rows(self, start=None):
        """
        Yields (row or None, dropped, position). After a network error it waits and continues after the last row. It
        raises a UserError for a permanent error, or when the retries are used up.

        A position is [state of datasets' IterableDataset, number of rows]. Resuming opens the right file at once, but
        skips over the earlier rows of that file.
        """
        position, failures, begin, arrived = (start or [None, 0])[:2], 0, time.monotonic(), False
        while True:
            try:
                rows = self.open()
                if position[0]:
                    rows.load_state_dict(position[0])
                for row in rows:
                    if not arrived:
                        for wanted in ((self.reading.field,), self.reading.scores):
                            check_names(f'{self.name}: {self.where}', row, wanted)
                    position, arrived, failures = [rows.state_dict(), position[1] + 1], True, 0
                    yield row, '' if isinstance(row[self.reading.field], str) else 'unreadable', position
                return
            except UserError:
                raise
            except Exception as error:  # any class: each underlying library has its own
                failures += 1
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300].rstrip(':')
                offline = 'HF_HUB_OFFLINE is set, ' if installed('datasets').config.HF_HUB_OFFLINE else ''
                hopeless = failures > RETRIES or not arrived and time.monotonic() - begin > HOPELESS
                if hopeless or offline or not is_transient(error):
                    raise UserError(f"{self.name}: can't read {self.where} behind row {position[1]:,}, tried {failures} time"
                                    f"{'s' * (failures > 1)} ({offline}{reason}). Without a network: --source=PATH of "
                                    'downloaded .parquet files of it, --dataset=text:PATH or --dataset=pylib') from error
                print(f'{self.name}: {reason}: trying again in {2**(failures - 1)} s', file=sys.stderr, flush=True)
                time.sleep(2**(failures - 1))

    def open(self):
        datasets, hub = installed('datasets'), installed('huggingface_hub')
        datasets.disable_progress_bars()
        for library in (datasets, hub):
            library.utils.logging.set_verbosity(logging.CRITICAL)  # we print our own error lines
        # By default the library retries 20 times in silence.
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would contact another server and wait
        rows = datasets.load_dataset(**self.arguments, streaming=True)
        known = (rows.info.splits or {}).get(self.arguments['split']) if rows.info else None
        self.total = self.total or known and known.num_examples or 0
        return rows

    def progress(self, position):
        return min(1, (position[1] if position else 0) / self.total) if self.total else None


def is_transient(error):
    """
    Whether to retry after this error. Looks at the error and the chain of its causes. An HTTP status decides if there
    is one, otherwise the exception class.
    """
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
