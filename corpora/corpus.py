"""
The corpora by name. Each one is a stream of documents that can resume at any position. Imported by prepare.py:

    corpus = open_corpus(config)                    # pylib, text:PATH, shakespeare, fineweb_edu, wikitext2, wikitext103
    for document in corpus.documents(position):     # position of the last document used; None starts at the beginning
        document.text or document.dropped, corpus.progress(document.position)

reading.py reads the files, hub.py the downloads.
"""
import glob
import hashlib
import importlib
import inspect
import os
import platform
import re
import sys
import sysconfig
import textwrap
import tokenize
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from configurator import UserError
from corpora.encodings import encoding_name
from corpora.hub import Stream
from corpora.reading import (
    BadRows, Reading, check_files, contents, file_progress, file_rows, find_files, installed, kind,
    place, text_lines, text_of)
from files import replacing, sizes, stamp

DATASETS = ('pylib', 'shakespeare', 'wikitext2', 'wikitext103', 'fineweb_edu')  # and text:PATH
# nanoGPT's data/shakespeare/input.txt
SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_FILE = 'data/tinyshakespeare.txt'  # where the download is kept
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
FINEWEB = 'HuggingFaceFW/fineweb-edu'
WIKITEXT, SUBSETS = 'Salesforce/wikitext', {'wikitext2': 'wikitext-2-raw-v1', 'wikitext103': 'wikitext-103-raw-v1'}
TITLE = re.compile(r' = [^=\s].* = \s*')  # title of an article; section titles have more than one =
LONGEST_ARTICLE = 2**20  # characters; a longer article is cut at a line end (files without titles)


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


def reading_of(config, scores=()):
    return Reading(config.text_field, config.bad_text, encoding_name(config.encoding), scores)


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
    elif config.dataset == 'shakespeare':
        corpus = shakespeare_corpus(config)
    elif config.dataset == 'fineweb_edu':
        corpus = fineweb_corpus(config)
    elif config.dataset in SUBSETS:
        corpus = wikitext_corpus(config)
    else:
        raise UserError(f"--dataset={config.dataset}: unknown, expected {', '.join(DATASETS)}, text:PATH or bins:PATH")
    if check:
        corpus.check()
    return corpus


# ----------------------------------------------------------------------------------------------------------------------
# The library of this Python

def pylib_corpus():
    count = cache(lambda: len(pylib_sources()))

    def documents(position=None):
        sources, first = pylib_sources(), 0 if position is None else position + 1
        for index in range(first, len(sources)):
            text = sources[index]()
            yield Document(text, '' if text is not None else 'unreadable', None, index)

    source = {'dataset': 'pylib', 'python': f'{platform.python_implementation()} {platform.python_version()}'}
    return Corpus(source, '', documents, lambda position: 0 if position is None else (position + 1) / count())


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
            *(partial(c_docstrings, name) for name in modules
              if 'test' not in name and not name.lstrip('_').startswith('xx'))]


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
        signature = getattr(thing, '__text_signature__', None) or '(...)'
        signature = re.sub(r'\$module(, /)?(, )?', '', signature).replace('$', '')
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


# ----------------------------------------------------------------------------------------------------------------------
# Shakespeare, as nanoGPT has it

def shakespeare_corpus(config):
    """
    The 1,115,394 characters of nanoGPT's Shakespeare. As in nanoGPT, the first 90 % are train and the last 10 % are
    val, each one document (data/shakespeare_char/prepare.py in github.com/karpathy/nanoGPT).

    The text is read from config.source, or from SHAKESPEARE_FILE, which is downloaded once.
    """
    file = Path(config.source or SHAKESPEARE_FILE).expanduser()

    def check():
        if not config.source and not file.exists():
            download_shakespeare(file)
        read_shakespeare(file)

    def documents(position=None):
        text = read_shakespeare(file).decode()
        cut = int(0.9 * len(text))
        for split, part in (('val', text[cut:]), ('train', text[:cut]))[0 if position is None else position + 1:]:
            yield Document(part, '', split, 0 if split == 'val' else 1)

    source = {'dataset': 'shakespeare', 'bytes': SHAKESPEARE_BYTES, 'sha256': SHAKESPEARE_SHA256}
    return Corpus(source, '', documents, own_splits=True, check=check, contents=lambda: f'reading {file}')


def read_shakespeare(file):
    """The bytes of the text. Raises UserError if the file is missing, or if it is another text."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}: expected the file of {SHAKESPEARE}')
    check_shakespeare(content, file)
    return content


def check_shakespeare(content, where):
    if len(content) != SHAKESPEARE_BYTES:
        raise UserError(f'{where}: {len(content):,} bytes, expected the {SHAKESPEARE_BYTES:,} of {SHAKESPEARE}')
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f'{where}: this is another text: its sha256 differs from {SHAKESPEARE}')


def download_shakespeare(file):
    """Download the text to `file`, which is only written if the right text has arrived."""
    print(f'downloading {SHAKESPEARE} to {file}', flush=True)
    try:
        with urlopen(SHAKESPEARE, timeout=30) as response:
            content = response.read(SHAKESPEARE_BYTES + 1)
    except (OSError, HTTPException) as error:
        raise UserError(f'shakespeare: cannot download {SHAKESPEARE} ({error}): copy the file to {file}, or '
                        'give prepare.py --source=FILE')
    check_shakespeare(content, SHAKESPEARE)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as target:
        target.write(content)


# ----------------------------------------------------------------------------------------------------------------------
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
        raise UserError(f'{path}: one .parquet file, expected at least two, because the last one is validation '
                        f'(--dataset=text:{path} splits the documents of a single file)')
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


# ----------------------------------------------------------------------------------------------------------------------
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
    return Corpus(source, '', documents, own_splits=True, inputs=inputs, check=check,
                  test=lambda: ''.join(line for line, *_ in split_lines('test')))


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
            raise UserError(f'{folder}: no file of the {split} split '
                            f'({split}*.parquet, .jsonl or .txt, or wiki.{split}*.raw)')
        if len({file.suffix for file in found}) > 1:
            raise UserError(f"{folder}: the {split} split exists twice: {', '.join(file.name for file in found)}")
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
