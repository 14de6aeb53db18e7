"""
Reads documents from files: .txt, .jsonl and .parquet, also compressed, in any encoding. Imported by corpus.py:

    files, left_out = find_files('notes', ('txt', 'jsonl', 'parquet'))
    for row, dropped, position in file_rows(files, Reading(), position):     # position None: from the beginning
        text_of(row, dropped, Reading())

Memory use is bounded for files of any size. An unreadable file gives a one-line error with file name and position.
"""
import codecs
import glob
import importlib
import io
import json
import os
import re
import types
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import cache
from gzip import GzipFile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from corpora.encodings import GO_ON, HEAD, Utf8, encoding_hint, encoding_of, not_utf8_at, wide_encoding

SURROGATE = re.compile('[\ud800-\udfff]')
PIECE, PATIENCE, LONGEST = 8 * 1024, 64 * 1024, 128 * 1024  # bytes of a .txt document, explained in `pieces`
LONGEST_LINE = 2**26  # bytes
CHECKED = 1000  # with fewer files than this, all are opened before the first is read

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
JSON_START = re.compile(rb'\s*(\[\s*)*\{\s*("[^"\n]*"\s*:|\})')
ISO_2022_JP = re.compile(rb'\x1b\$[@B]')  # switches to two bytes per character, all of them ASCII
MARKUP_START = re.compile(rb'\s*<(!doctype html|html|\?xml)', re.IGNORECASE)


class SourceMissing(UserError):
    """The given path has no files of the corpus."""


class Reading(NamedTuple):
    """How to read the files of a corpus."""
    field: str = 'text'  # name of the text column
    bad_text: str = 'refuse'
    encoding: str = 'utf-8'  # of files without a byte order mark
    scores: tuple = ()  # names of score columns; at least one must exist


# ----------------------------------------------------------------------------------------------------------------------
# Which files there are, and what they hold

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
        line = f'{path}: no such file, and no directory or glob with {endings} files (.gz or .zst too, except .parquet)'
        raise SourceMissing(line + (f'; left out: {listed(left_out)}' if left_out else ''))
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
        raise UserError(f"{path}: JSON without an object on its first line: convert it to one object per line "
                        "(an array with jq -c '.[]', objects with jq -c .), or leave it out")
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
    if is_utf8 and unmarked and not encoding.startswith('utf'):
        if len(re.sub('[\0-\x7f]+', '', data.decode(errors='ignore'))) >= 10:
            raise UserError(f'{path}: its text is UTF-8, not {encoding}: leave --encoding out, '
                            'or prepare only files of one encoding')
    if encoding == 'utf-8' and (escape := ISO_2022_JP.search(data)):
        raise UserError(f'{path}: an escape sequence of iso2022_jp at byte {escape.start()}: '
                        'try --encoding=iso2022_jp')
    for magic, content in (MAGIC if is_utf8 else MAGIC | PRINTABLE_MAGIC).items():
        if data.startswith(magic):
            raise UserError(f'{path}: its content is {content}')
    encoding = encoding_of(path, data, encoding)
    if encoding == 'utf-8' and (wide := wide_encoding(data)):
        raise UserError(f'{path}: every other byte is NUL, so it is likely {wide} without a mark: '
                        f'try --encoding={wide}')
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
        known = f"; the last of them has: {', '.join(names)[:200]}" if names else ''
        raise UserError(f'{file}: none of its first lines has a text in the field {reading.field!r} '
                        f'(--text_field){known}')


def check_names(where, names, one_of):
    if one_of and not set(one_of) & set(names):
        raise UserError(f"{where}: no column {' or '.join(map(repr, one_of))}, it has: {', '.join(names)}")


# ----------------------------------------------------------------------------------------------------------------------
# Rows of files

def file_rows(files, reading, start=None, text=None):
    """
    Yields (row, dropped, position) for all files in order. row[reading.field] is a str unless the row was dropped.

    `text` is the reader for files other than .jsonl and .parquet, by default `pieces`. A position is
    [index of the file, position in the file], plus the counts that BadRows adds.
    """
    number, inner = (start or (0, None))[:2]
    outdated = UserError('an earlier version began this preparation: remove its directory, .NAME.tmp, '
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
            raise UserError(f'{where}: {bad:,} of {count:,} rows up to here have no text in the field '
                            f'{reading.field!r}{score}, more than --bad_rows={self.limit:g} allows: '
                            'use another --text_field, or a larger --bad_rows')


def missing(row, reading):
    if not row or not isinstance(row.get(reading.field), str):
        return f'no text in the field {reading.field!r}'
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


# ----------------------------------------------------------------------------------------------------------------------
# Opening a file

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


# ----------------------------------------------------------------------------------------------------------------------
# Text

def pieces(path, reading=Reading(), start=0):
    """
    Yields ({field: str}, dropped, end in bytes): the documents of a .txt file. Joined, they are the whole file.

    A document ends at the first blank line after 8 KB. If there is no such line within 64 KB, it ends at the first line
    end after 8 KB. If there is no line end either, it ends at 128 KB. With these rules, text appended to the file
    changes only the last document. Raises UserError if bad_text is 'refuse' and the text is not UTF-8.
    """
    blank_line, offset = re.compile(rb'\n[ \t\r]*\n'), start or 0
    def where():
        return f'{path}: after byte {offset}' if offset else path
    with readable(where), opened(path, reading, offset) as (file, _):
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
                raise UserError(f'{path}:{number}: this line is longer than {LONGEST_LINE >> 20} MB: '
                                'does the file have one document per line?')
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


# ----------------------------------------------------------------------------------------------------------------------
# .jsonl and .parquet

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
                raise ValueError(f'no text in the field {reading.field!r} (--text_field){names}')
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
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or f'not a .parquet file: {error}'}")
    with file:
        names, field = file.schema_arrow.names, reading and reading.field
        if field and names.count(field) != 1:
            raise UserError(f"{path}: no column {field!r} (--text_field); it has: {', '.join(names)}")
        if field and (column := file.schema_arrow.field(field).type) not in (pa.string(), pa.large_string()):
            raise UserError(f'{path}: column {field!r} (--text_field) holds {column}, expected string')
        yield file


READERS = {'txt': pieces, '': pieces, 'jsonl': jsonl, 'parquet': parquet}


def decoded(data, bad_text, where):
    """Returns (text or None, reason for dropping it or 'replaced'). Raises UserError if bad_text is 'refuse'."""
    try:
        return (None, 'unreadable') if data is None else (data.decode(), '')
    except UnicodeDecodeError as error:
        if bad_text == 'refuse':
            raise UserError(f'{where}: not UTF-8 at byte {error.start} of the text{GO_ON}')
        return (None, 'bad_text') if bad_text == 'skip' else (data.decode(errors='replace'), 'replaced')


def kept(row, dropped):
    return row if dropped in ('', 'replaced') else None


def installed(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} can't be imported ({error}): pip install {name.partition('.')[0]}")
