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
HEAD = 64 * 1024  # bytes from which is told what a file holds
GO_ON = ' (--bad_text=skip or replace goes on)'
RETRIES = 5  # times that a fault of the network is waited out, for 1, 2, 4, 8 and 16 s; documents that arrive start the count anew
HOPELESS = 15  # seconds: where not one row has come so long after the start there is no network, and nothing more to wait for

# Of files by their endings. .gz and .zst may follow, except behind .parquet.
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
MAGIC = {  # the first bytes of what is no text. PRINTABLE ones could begin a text, too
    b'\x1f\x8b': 'gzip: give it the ending .gz', b'\x28\xb5\x2f\xfd': 'zstd: give it the ending .zst',
    b'PK\x03\x04': 'zip (or .docx, .epub, ...): unpack it, or extract its text',
    b'%PDF-': 'PDF: extract its text to a .txt file',
    b'\x89PNG': 'PNG: leave it out', b'\xff\xd8\xff': 'JPEG: leave it out', b'\x7fELF': 'a program: leave it out',
    b'\xfd7zXZ': 'xz: unpack it', b'7z\xbc\xaf': '7-zip: unpack it', b'\x93NUMPY': 'an array of NumPy: leave it out'}
PRINTABLE_MAGIC = {b'PAR1': 'Parquet: give it the ending .parquet', b'BZh': 'bzip2: unpack it',
                   b'GIF8': 'GIF: leave it out'}
MARKS = {codecs.BOM_UTF8: 'utf-8',
         codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',  # before UTF-16, whose marks these begin with
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
JSON_START = re.compile(rb'\s*(\[\s*)*\{\s*("[^"\n]*"\s*:|\})')
ISO_2022_JP = re.compile(rb'\x1b\$[@B]')  # it switches to two bytes a character, all of them ASCII
MARKUP_START = re.compile(rb'\s*<(!doctype html|html|\?xml)', re.IGNORECASE)


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
    contents: Callable = lambda: 'reading'  # one line: how many files of each kind are read, and which were left out


class Reading(NamedTuple):
    """How the files of a corpus are read."""
    field: str = 'text'  # the column of the text
    bad_text: str = 'refuse'
    encoding: str = 'utf-8'  # of files without a mark that says another one
    scores: tuple = ()  # the columns of a score, one of which must be there


def reading_of(config, scores=()):
    return Reading(config.text_field, config.bad_text, encoding_name(config.encoding), scores)


def encoding_name(name):
    """The one name of an encoding of text: UTF8 -> utf-8. '' for what is none."""
    try:
        'a'.encode(name)  # LookupError for what is no text, as base64
        name = codecs.lookup(name).name.removesuffix('-sig')
    except (LookupError, ValueError):
        return ''
    not_of_files = ('idna', 'punycode', 'unicode-escape', 'raw-unicode-escape')
    return '' if name in not_of_files else name


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
    files, left_out = find_files(path, ('txt', 'jsonl', 'parquet'))
    return files_corpus(config, files, left_out)


def nanochat_corpus(config, path):
    """
    The .parquet files of nanochat: the last one by name is validation (nanochat/dataset.py in github.com/karpathy/nanochat).
    It is read first, so that --max_tokens and --max_documents leave it whole.
    """
    files, left_out = find_files(path, ('parquet',))
    if len(files) < 2:
        raise UserError(f'{path}: one .parquet file, expected two at least, the last of which is validation '
                        f'(--dataset=text:{path} splits the documents of a single one)')
    return files_corpus(config, [files[-1], *files[:-1]], left_out, own_splits=True)


def files_corpus(config, files, left_out, own_splits=False):
    """own_splits: the first file is validation."""
    reading, bad_rows = reading_of(config), BadRows(config.bad_rows)
    source = {'dataset': config.dataset} | sizes(files)
    other = {kind(file) for file in files} - {'txt'}
    if other - {''} or other and reading.field != 'text':  # '': the content decides, which is not looked at here
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
    documents() and progress() of a corpus with splits of its own, val first, that ends after `limit` documents of train. Its
    positions are [position, documents of train so far].
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
    (the files of these kinds at a path, in a directory and its subdirectories, or of a glob, sorted; how many files with
    which endings are left out). Files are listed, not opened, but for .json. Raises UserError.
    """
    path, left_out = os.path.expanduser(path), []
    if os.path.isdir(path):
        found = list(Path(path).rglob('*'))
        known = [file for file in found if kind(file) in kinds]
        files = [file for file in known if not is_metadata(file)] or known  # alone they were meant: `kind_of` says what to do
        kept = set(files)
        left_out = [file for file in found if file.is_file() and file not in kept]
    else:  # what is named is read even if its ending says nothing: `kind_of` looks at the content
        found = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
        files = [file for file in map(Path, found) if (kind(file) or 'txt') in kinds]
        unwanted = [file for file in files if ending(file)[0] in NOT_TEXT or len(files) > 1 and is_metadata(file)]
        if len(unwanted) < len(files):  # otherwise they were meant, and `kind_of` says what to do
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
    """Whether a .json file among others holds no rows, as the dataset_info.json of a download."""
    if ending(path)[0] != '.json' or not path.is_file():
        return False
    try:
        return not starts_with_object(*read_head(path, 'utf-8'))
    except UserError:  # no text at all
        return True


def ending(path):
    """a/B.JSONL.gz -> ('.jsonl', '.gz')"""
    name = Path(path.name.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in ('.gz', '.zst') else (name.suffix, '')


def kind(path):
    """'txt', 'jsonl' or 'parquet' by the ending, '' for any other."""
    kind, packed = KINDS.get(ending(path)[0], ''), ending(path)[1]
    return '' if kind == 'parquet' and packed else kind


def kind_of(path, encoding):
    """
    'txt', 'jsonl' or 'parquet' by the ending, or by the content where the ending doesn't say. Raises UserError for other
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
    """The beginning of a file as UTF-8, without a mark; whether there is more. Raises UserError where it is no text."""
    with readable(lambda: path), uncompressed(path) as (file, _):
        data = file.read(HEAD)
    is_cut = len(data) == HEAD
    is_utf8 = b'\0' not in data and not_utf8_at(data) is None
    unmarked = encoding == encoding_of(path, data, encoding)
    # Text in another encoding is seldom UTF-8, too, and hardly ever for ten characters.
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
    """Whether the first line is a JSON object. is_cut: `head` is not the whole file, and may end inside that line."""
    line, *rest = head.lstrip().split(b'\n', 1)
    if is_cut and not rest:
        return line.startswith(b'{') and JSON_START.match(line) is not None
    try:
        return isinstance(json.loads(line.decode(errors='replace')), dict)
    except (ValueError, RecursionError):
        return False


def contents(files, left_out, reading):
    """In one line: how many files of which endings are read, and as what, and what is left out."""
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


def sizes(files):
    return {'files': len(files), 'bytes': sum(file.stat().st_size for file in files)}


def check_files(files, reading):
    """Opens the files (of many the first ones). Raises UserError for a broken one, or one without the text or score."""
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
    (row, dropped, position) of the files in turn. row[reading.field] is a str, unless the row was dropped. `text` reads
    what isn't .jsonl or .parquet, by default `pieces`. Position: [index of the file, position in it], and what BadRows adds.
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
    Rows without a text, or without a score where one is needed: they are left out, and the first is named. More than a
    share of `limit` of the rows read so far is a UserError, once 1,000 rows are read and at the end.
    """
    def __init__(self, limit):
        self.limit, self.is_named = limit, False

    def counted(self, rows, start, reading, place):
        """The (row, dropped, position) with the numbers of rows and of bad rows so far added to the position."""
        count, bad = start[2:] if start and len(start) == 4 else (0, 0)  # earlier versions didn't count
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
    """What positions in a file go up to: rows of .parquet, otherwise bytes, of a compressed file guessed from its beginning."""
    if kind(path) == 'parquet':
        with open_parquet(path) as file:
            return file.metadata.num_rows
    with opened(path, Reading(bad_text='replace', encoding=encoding)) as (file, raw):
        return len(file.read(2**22)) / max(1, raw.tell()) * path.stat().st_size


@contextmanager
def readable(where):
    """Faults of a file inside become a UserError; where() says which file, and where in it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where()}: {getattr(error, 'strerror', None) or f'damaged or cut off: {error}'}")


@contextmanager
def uncompressed(path):
    """A buffered binary file of the uncompressed content, and the file as it is on the disk."""
    with open(path, 'rb') as raw:
        file, packed = raw, ending(path)[1]
        if packed == '.gz':
            file = GzipFile(fileobj=raw)
        elif packed == '.zst':  # pyarrow always reads it, Python itself only from 3.14 on
            file = io.BufferedReader(installed('pyarrow').input_stream(raw, compression='zstd'))
        yield file, raw


@contextmanager
def opened(path, reading, offset=0):
    """A buffered binary file of the content as UTF-8, uncompressed, at this byte of it, and the file on the disk."""
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
    """The encoding that the mark at the beginning of a file names, `encoding` where there is none."""
    for mark, marked in MARKS.items():
        if data.startswith(mark):
            return marked
    if encoding in ('utf-16', 'utf-32') and data:
        raise UserError(f'{path}: no mark says which byte comes first: --encoding={encoding}-le (on most machines) '
                        f'or {encoding}-be')
    return encoding


class Utf8(io.RawIOBase):
    """
    The text of a binary file in another encoding, as UTF-8. What can't be decoded is a UserError with bad_text='refuse',
    otherwise a byte that is no UTF-8: the readers do with it what they do with such bytes.
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
    """What can't be decoded becomes a surrogate, which UTF-8 can't encode, and that becomes a byte which is no UTF-8."""
    return b'\xff' if isinstance(error, UnicodeEncodeError) else '\udcff', error.end


codecs.register_error('bad_byte', bad_byte)


def pieces(path, reading=Reading(), start=0):
    """
    ({field: str}, dropped, end in bytes): documents of a .txt file, which joined are the file: cut at the first blank line after
    8 KB, at the first line end after 8 KB where 64 KB have no such blank line, and at 128 KB where no line ends. So text that is
    appended to the file changes the last document alone. Raises UserError where it isn't UTF-8, if bad_text is 'refuse'.
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
    """(bytes, [offset behind the line, its number]) of a file's lines. Raises UserError for a damaged file or a huge line."""
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
    (text or None, why it was dropped or 'replaced', bytes used). final=False: data may end inside a character. A NUL is
    no text either. Raises UserError if bad_text is 'refuse'.
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
    """Index of the first byte that is no UTF-8, or None. final=False: data may end inside a character."""
    try:
        codecs.utf_8_decode(data, 'strict', final)
    except UnicodeDecodeError as error:
        return error.start


def wide_encoding(data):
    """The UTF-16 or UTF-32 that data without a mark is in, or '': of Latin letters one or three bytes are NUL."""
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
    """How text that is not UTF-8 may be read, for an error."""
    guess = likely_encoding(data[:HEAD])
    return f', perhaps {guess}, which --encoding={guess} reads' if guess else ' (--encoding=NAME reads other encodings)'


def likely_encoding(data):
    """A guess at the encoding of text that is not UTF-8, '' where there is none, or where damaged UTF-8 is likelier."""
    def share(encoding, expected):
        """Of the characters beyond ASCII, how many are expected ones."""
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
                return 'gb18030' if encoding == 'gb2312' else encoding  # which it is a part of
    elif share('cp1252', '[À-ÖØ-öø-ÿŒœŠšŽž€‘’“”–—…«»¡¿£§©°·]') > 0.9:
        return 'cp1252'
    return ''


def jsonl(path, reading, start=None):
    """
    (row, '', position) of the lines of a .jsonl file, where row[field] is a str, or (row or None, why, position):
    'unreadable' (no text in the field), 'bad_text' or 'not_json'; with bad_text='refuse' the last two are a UserError with
    the number of the line.
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
            elif SURROGATE.search(value):  # json lets half a pair of surrogates pass
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
    (row or None, dropped, rows up to here) of a .parquet file: the text and score columns. Row groups before `start` are
    not read.
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
                    texts = batch.column(reading.field).cast(pa.large_binary()).to_pylist()  # so that a broken one can be told
                    values = [batch.column(name).to_pylist() for name in scores]
                    for data, *row_scores in zip(texts, *values):
                        done += 1
                        if done > start:
                            text, dropped = decoded(data, reading.bad_text, f'{path}: row {done}')
                            row = {reading.field: text, **dict(zip(scores, row_scores))}
                            yield kept(row, dropped), dropped, done
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last one of a score
            raise UserError(f'{path}: row {done + 1}: damaged: {error}')


@contextmanager
def open_parquet(path, reading=None):
    """pyarrow's ParquetFile. Raises UserError, with `reading` also where its field is no column of text."""
    pa, pq = installed('pyarrow'), installed('pyarrow.parquet')
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)  # no whole row group
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
                elif not score >= config.min_score:  # nan too
                    dropped = 'low_score'
            yield row, dropped, end

    def documents(position=None):
        for row, dropped, end in bad_rows.counted(scored(rows(position)), position, reading, where):
            yield Document(text_of(row, dropped, reading), dropped, None, end)

    return Corpus(source, f'educational score >= {config.min_score:g}', documents, progress, inputs=inputs, check=check,
                  contents=contents_line)


def score_of(row):
    """The rounded score, by which the published subsets are cut, or the exact one without it. None: it is no number."""
    score = row.get('int_score')
    score = row.get('score') if score is None else score
    try:
        return None if isinstance(score, bool) else float(score)
    except (TypeError, ValueError, OverflowError):
        return None


def wikitext_corpus(config):
    """WikiText's articles in its own splits: streamed, or from files at config.source (.parquet, .jsonl, .txt, wiki.train.raw)."""
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
            line = text_of(row, dropped, reading) or ''  # null, or dropped for bad_text
            yield line + '\n' * (split in tables and not line.endswith('\n')), dropped, end  # where '' is an empty line

    # A limit takes whole val and as much of train.
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
    """{'train': files, 'val': files, 'test': files} of a directory, by their names. Raises UserError."""
    folder = os.path.expanduser(folder)
    inner = os.path.join(folder, subset)  # as a download of the whole repository has it
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

class Stream:
    """The rows of a data set of the Hugging Face Hub."""

    def __init__(self, name, repository, subset, split, reading):
        self.name, self.where, self.reading = name, f'{repository} {subset} from the Hugging Face Hub', reading
        self.arguments = {'path': repository, 'name': subset, 'split': split}
        self.total = 0  # rows, as far as the library says

    def place(self, position):
        return f'{self.where}: row {position[1]:,}'

    def rows(self, start=None):
        """
        (row or None, dropped, position). A fault of the network is waited out, and reading goes on behind the last row; what is
        hopeless is a UserError. Position: the state of datasets' IterableDataset, which opens the right file at once but passes
        over the rows before it in that file, and the number of rows.
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
            except Exception as error:  # of whatever class: the libraries below have their own
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
            library.utils.logging.set_verbosity(logging.CRITICAL)  # faults are told in our own lines
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1  # not 20 of them in silence
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would call another server, and wait for it
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
