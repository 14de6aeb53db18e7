import gzip
import hashlib
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import corpus, reading
from corpora import hub as hub_module
from configurator import UserError
from corpora.corpus import Document, count_words, open_corpus

ROOT = Path(corpus.__file__).parent.parent
LOAD_DATASET = datasets.load_dataset


def config(dataset, **changes):
    options = {'source': '', 'subset': 'sample-10BT', 'text_field': 'text', 'min_score': 3.0, 'bad_text': 'refuse', 'encoding': 'utf-8',
               'bad_rows': 1.0, 'max_documents': 0, 'max_tokens': 0} | changes
    return SimpleNamespace(dataset=str(dataset), **options | {'source': str(options['source'])})


def opened(path, **changes):
    return open_corpus(config(f'text:{path}', **changes))


def texts(of):
    return [document.text for document in of.documents()]


def refused(*arguments, read=True, **changes):
    """The one line with which a corpus is refused: by open_corpus, or with read=True perhaps later."""
    with pytest.raises(UserError) as error:
        of = open_corpus(config(*arguments, **changes))
        list(of.documents() if read else [])
    assert '\n' not in str(error.value)
    return str(error.value)


def compressed(data, kind):
    if kind == '.gz':
        return gzip.compress(data)
    if kind == '.zst':
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, 'zstd') as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data


def write_jsonl(path, rows, **more):
    rows = [row if isinstance(row, dict) else {'text': row} | more for row in rows]
    path.write_bytes(compressed(''.join(json.dumps(row) + '\n' for row in rows).encode(), path.suffix))
    return path


def write_parquet(path, rows, group=3, **columns):
    pq.write_table(pa.table({'text': rows, **columns}), path, row_group_size=group)
    return path


def stored(document):
    """Its position, as it comes back from the journal of a preparation."""
    return json.loads(json.dumps(document.position))


def without_positions(documents):
    return [document[:3] for document in documents]


def goes_on_behind_every_document(of):
    """The documents, read again from the position after each of them."""
    documents = list(of.documents())
    assert all(isinstance(document, Document) for document in documents)
    assert all((document.text is None) == (document.dropped not in ('', 'replaced')) for document in documents)
    for k, document in enumerate(documents):
        assert list(of.documents(stored(document))) == documents[k + 1:]
    progress = [of.progress(position) for position in (None, *(document.position for document in documents))]
    if progress[0] is not None:
        assert progress == sorted(progress) and 0 <= progress[0] <= progress[-1] <= 1
    return documents


# pylib

def test_pylib_is_source_in_its_declared_encoding_and_docstrings_of_c(tmp_path, monkeypatch):
    files = {'b/test/t.py': b'x = 1\r\n', 'a.py': '# coding: latin-1\ns = "é"\n'.encode('latin-1'), 'bad.py': b'# coding: none\n',
             'c.txt': b'no', 'site-packages/p.py': b'no', 'b/__pycache__/q.py': b'no',
             'half.py': b'# coding: raw_unicode_escape\ns = "\\ud800"\n', 'worse.py': b's = "\xff"\n'}
    for name, content in files.items():
        (tmp_path / 'lib' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'lib' / name).write_bytes(content)
    monkeypatch.setattr(corpus.sysconfig, 'get_paths', lambda: {key: str(tmp_path / 'lib') for key in ('stdlib', 'platstdlib')})
    found = texts(open_corpus(config('pylib')))
    assert found[:5] == ['# coding: latin-1\ns = "é"\n', 'x = 1\n', None, None, None]
    builtin = next(text for text in found[5:] if text.startswith('"""Built-in functions'))
    assert '\ndef len(obj, /):\n    """Return the number of items in a container."""\n' in builtin
    assert '\nclass dict:\n    """dict() -> new empty dictionary\n' in builtin
    assert '    def get(self, key, default=None, /):\n' in builtin
    of = open_corpus(config('pylib'))
    documents = goes_on_behind_every_document(of)
    assert [document.text for document in documents] == found
    assert [document.dropped for document in documents[:6]] == ['', '', 'unreadable', 'unreadable', 'unreadable', '']
    assert of.progress(None) == 0 and of.progress(documents[-1].position) == 1
    assert of.source == {'dataset': 'pylib', 'python': 'CPython ' + '.'.join(map(str, sys.version_info[:3]))}


def test_docstrings_of_c_are_the_same_in_every_run():
    code = 'from corpora import corpus; print(*map(corpus.c_docstrings, ["math", "builtins", "_io", "itertools", "sys"]))'
    outputs = {subprocess.run([sys.executable, '-c', imports + code], cwd=ROOT, capture_output=True, check=True,
                              env=os.environ | {'PYTHONHASHSEED': seed}).stdout
               for imports, seed in (('', '1'), ('import asyncio, decimal, unittest; ', '2'))}
    (output,) = outputs
    assert b'def acos(x, /):' in output and b' at 0x' not in output


# text:PATH

def test_text_reads_files_directories_and_globs_in_order(tmp_path):
    (tmp_path / 'b').mkdir()
    for name in ('c.txt', 'b/a.txt', 'b/z.md'):
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / 'a.jsonl', ['one', 'two'])
    write_jsonl(tmp_path / 'b' / 'c.jsonl.gz', ['three'])
    (tmp_path / 'b' / 'd.txt.zst').write_bytes(compressed(b'four', '.zst'))
    write_parquet(tmp_path / 'd.parquet', ['five'])
    assert texts(opened(tmp_path)) == ['one', 'two', 'b/a.txt', 'three', 'four', 'b/z.md', 'c.txt', 'five']
    assert texts(opened(tmp_path / 'b' / 'z.md')) == ['b/z.md']
    assert texts(opened(f'{tmp_path}/**/*.txt')) == ['b/a.txt', 'c.txt']
    (tmp_path / 'a.jsonl').write_text('\ufeff{"body": "x"}\n\n{"body": "y", "text": 1}')
    of = opened(tmp_path / 'a.jsonl', text_field='body')
    assert texts(of) == ['x', 'y'] and not of.own_splits and of.test() is None
    assert of.source == {'dataset': f'text:{tmp_path}/a.jsonl', 'files': 1, 'bytes': 42, 'text_field': 'body'}


def cut(path):
    return [row['text'] for row, _, _ in reading.pieces(path)]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='aé數🙂\n\r ', max_size=300), st.text(alphabet='aé數🙂\n\r ', max_size=100), st.booleans())
def test_joined_pieces_equal_the_file_and_appending_changes_only_the_last(tmp_path_factory, text, more, bom):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('PIECE', 8), ('PATIENCE', 30), ('LONGEST', 60)):
            patch.setattr(reading, name, value)
        file = tmp_path_factory.getbasetemp() / 'pieces.txt'
        file.write_bytes(b'\xef\xbb\xbf' * bom + text.encode())
        before = cut(file)
        file.write_bytes(b'\xef\xbb\xbf' * bom + (text + more).encode())
        after = cut(file)
    assert ''.join(before) == text and ''.join(after) == text + more
    assert after[:len(before[:-1])] == before[:-1]
    assert max(map(len, map(str.encode, after)), default=0) <= 60


def test_pieces_are_cut_at_blank_lines_then_line_ends_then_anywhere(tmp_path):
    def lengths(text):
        (tmp_path / 'a.txt').write_bytes(text)
        return [len(piece.encode()) for piece in cut(tmp_path / 'a.txt')]

    paragraph = b'x' * 999 + b'\n' + b'y' * 998 + b'\n\n'  # 2000 bytes
    assert lengths(paragraph * 10) == [10_000, 10_000]
    assert lengths(paragraph.replace(b'\n', b'\r\n') * 6) == [10_015, 2_003]
    line = b'z' * 999 + b'\n'
    assert lengths(line * 100) == [9_000] * 4 + [64_000]  # the last 64 KB may yet get a blank line
    assert lengths(b'w' * 300_000) == [131_072, 131_072, 37_856]
    assert lengths('數'.encode() * 100_000) == [131_070, 131_070, 37_860]


@pytest.fixture(scope='module')
def odd_files(tmp_path_factory):
    """One file of each kind, with documents of every sort."""
    folder = tmp_path_factory.mktemp('odd')
    for ending in ('', '.gz', '.zst'):
        text = b'\xef\xbb\xbf' + b'a line\n' * 15_000 + b'\xe9 \n' * 3 + 'é數🙂\n'.encode() * 9000
        (folder / f'a.txt{ending}').write_bytes(compressed(text, ending))
        rows = [b'{"text": "a"}', b'', b'{"text": ', b'{"text": ""}', b'  ', b'{"text": null}', b'[1]', b'{"text": "\xe9"}',
                b'{"text": "\\ud800x"}', b'{"x": 1}', b'{"text": "\\ud83d\\ude42"}']
        (folder / f'b.jsonl{ending}').write_bytes(compressed(b'\n'.join(rows), ending))
    values = [b'one', None, b'two', b'\xe9', b'', b'three', None] * 6
    binary = pa.array(values, pa.binary())
    broken = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers(), binary.null_count)
    pq.write_table(pa.table({'x': range(len(values)), 'text': broken}), folder / 'c.parquet', row_group_size=5)
    return folder


@pytest.mark.parametrize('bad_text', ['skip', 'replace'])
@pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz', 'a.txt.zst', 'b.jsonl', 'b.jsonl.gz', 'b.jsonl.zst', 'c.parquet', ''])
def test_reading_resumes_after_every_document(odd_files, name, bad_text):
    assert len(goes_on_behind_every_document(opened(odd_files / name, bad_text=bad_text))) >= 9


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=25), st.integers(1, 9), st.integers(1, 25))
def test_resuming_is_exact_for_any_parquet_and_jsonl(tmp_path_factory, rows, group, count):
    folder = tmp_path_factory.mktemp('rows')
    write_parquet(folder / 'a.parquet', pa.array(rows, pa.string()), group)
    write_parquet(folder / 'b.parquet', pa.array(rows, pa.large_string()), count)
    write_jsonl(folder / 'c.jsonl.gz', [{'text': row} for row in rows])
    assert texts(opened(folder)) == rows * 3
    goes_on_behind_every_document(opened(folder))


def test_bad_text_is_dropped_or_replaced_and_counted(odd_files):
    def read(name, bad_text):
        return [document[:2] for document in opened(odd_files / name, bad_text=bad_text).documents()]

    assert read('b.jsonl', 'skip') == [('a', ''), (None, 'not_json'), ('', ''), (None, 'unreadable'), (None, 'not_json'),
                                       (None, 'bad_text'), (None, 'bad_text'), (None, 'unreadable'), ('🙂', '')]
    assert read('b.jsonl', 'replace') == [('a', ''), (None, 'not_json'), ('', ''), (None, 'unreadable'), (None, 'not_json'),
                                          ('\ufffd', 'replaced'), ('\ufffdx', 'replaced'), (None, 'unreadable'), ('🙂', '')]
    parquet = [('one', ''), (None, 'unreadable'), ('two', ''), (None, 'bad_text'), ('', ''), ('three', ''), (None, 'unreadable')]
    assert read('c.parquet', 'skip') == parquet * 6
    assert read('c.parquet', 'replace') == [*parquet[:3], ('\ufffd', 'replaced'), *parquet[4:]] * 6
    text = (odd_files / 'a.txt').read_bytes()
    mended = read('a.txt.gz', 'replace')
    assert ''.join(document for document, _ in mended) == text.decode('utf-8-sig', 'replace')
    assert [dropped for document, dropped in mended if '\ufffd' in document] == ['replaced'] and len(mended) > 9
    assert [dropped for document, dropped in mended if '\ufffd' not in document] == [''] * (len(mended) - 1)
    skipped = read('a.txt.zst', 'skip')
    bad = skipped.index((None, 'bad_text'))
    assert [dropped for _, dropped in skipped].count('bad_text') == 1
    assert text.decode('utf-8-sig', 'replace').startswith(''.join(document for document, _ in skipped[:bad]))
    assert text.decode('utf-8-sig', 'replace').endswith(''.join(document for document, _ in skipped[bad + 1:]))
    assert {opened(odd_files, bad_text=choice).filter for choice in ('refuse', 'skip', 'replace')} == {''}  # the counts say it


def test_seeking_and_skipping_read_no_more_than_they_must(tmp_path, monkeypatch):
    write_jsonl(tmp_path / 'a.jsonl', ['x' * 1000] * 1000)
    write_parquet(tmp_path / 'b.parquet', ['x'] * 1000, 100)
    parsed, groups, loads, batches = [], [], json.loads, pq.ParquetFile.iter_batches
    monkeypatch.setattr(reading.json, 'loads', lambda line: parsed.append(line) or loads(line))
    monkeypatch.setattr(pq.ParquetFile, 'iter_batches', lambda self, *arguments, row_groups, **options:
                        groups.append(row_groups) or batches(self, *arguments, row_groups=row_groups, **options))
    assert len(list(opened(tmp_path).documents([0, [999 * 1013, 999]]))) == 1001 and len(parsed) == 2  # the check, and the last
    groups.clear()
    for position in (800, 805):
        assert len(list(opened(tmp_path / 'b.parquet').documents([0, position]))) == 1000 - position and groups == [[8], [9]]
        groups.clear()


def test_progress_is_the_share_of_the_bytes(tmp_path):
    write_parquet(tmp_path / 'a.parquet', [str(random.Random(i).random()) for i in range(1000)])
    for name in ('b.jsonl', 'c.jsonl.gz', 'd.jsonl.zst'):
        write_jsonl(tmp_path / name, [str(random.Random(i).random()) for i in range(1000)])
    of = opened(tmp_path)
    size = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    for k, name in enumerate(sorted(size)):
        documents = list(opened(tmp_path / name).documents())
        before = sum(size[other] for other in sorted(size)[:k])
        half = of.progress([k, documents[499].position[1]])
        assert half == pytest.approx((before + size[name] / 2) / sum(size.values()), abs=0.01)
        assert opened(tmp_path / name).progress(documents[-1].position) == pytest.approx(1, abs=0.01)


def test_memory_stays_bounded_for_one_large_row_group(tmp_path):
    schema = pa.schema([('text', pa.string())])
    with pq.ParquetWriter(tmp_path / 'a.parquet', schema, compression='none', use_dictionary=False) as writer:
        writer.write_table(pa.table({'text': [f'{i}' + 'x' * 4000 for i in range(25_000)]}, schema), row_group_size=10**6)
    code = ('import pyarrow, sys, types\nfrom corpora import corpus\n'
            'of = corpus.open_corpus(types.SimpleNamespace(dataset=sys.argv[1], text_field="text", bad_text="refuse",\n'
            '                                             encoding="utf-8", bad_rows=1, max_documents=0, max_tokens=0))\n'
            'print(sum(len(document.text) for document in of.documents()), pyarrow.default_memory_pool().max_memory())')
    command = [sys.executable, '-c', code, f'text:{tmp_path}/a.parquet']
    length, peak = map(int, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert length > 10**8 and peak < 2 * 10**7


@pytest.mark.parametrize('dataset, changes, message', [
    ('nolib', {}, '--dataset=nolib: unknown, expected pylib, shakespeare, wikitext2, wikitext103, fineweb_edu, text:PATH or bins:PATH'),
    ('text:{tmp}/none', {}, '{tmp}/none: no such file'),
    ('text:{tmp}/*.none', {}, '{tmp}/*.none: no such file'),
    ('text:{tmp}/empty', {}, '{tmp}/empty: no such file, and no directory or glob with .txt, .jsonl, .parquet files'),
    ('text:{tmp}/links', {}, '{tmp}/links/gone.jsonl.gz: broken symbolic link to /nowhere/x'),
    ('text:{tmp}/links/gone.jsonl.gz', {}, '{tmp}/links/gone.jsonl.gz: broken symbolic link'),
    ('text:{tmp}/list.jsonl', {}, "{tmp}/list.jsonl:1: broken line: no text in the field 'text' (--text_field)"),
    ('text:{tmp}/many.jsonl', {'text_field': 'body'},
     "{tmp}/many.jsonl: none of its first lines has a text in the field 'body' (--text_field); the last of them has: te"),
    ('text:{tmp}/many.jsonl', {'text_field': 'body', 'bad_text': 'skip'},
     "{tmp}/many.jsonl: none of its first lines has a text in"),
    ('text:{tmp}/surrogate.jsonl', {}, '{tmp}/surrogate.jsonl:1: broken line: '),
    ('text:{tmp}/no.parquet', {}, '{tmp}/no.parquet: not a .parquet file: '),
    ('text:{tmp}/a.parquet', {'text_field': 'body'},
     "{tmp}/a.parquet: no column 'body' (--text_field); it has: text, i"),
    ('text:{tmp}/a.parquet', {'text_field': 'id'},
     "{tmp}/a.parquet: column 'id' (--text_field) holds int64, expected st"),
    ('text:{tmp}/no.txt.gz', {}, '{tmp}/no.txt.gz: damaged or cut off: '),
    ('text:{tmp}/no.jsonl.zst', {}, '{tmp}/no.jsonl.zst: damaged or cut off: '),
    ('fineweb_edu', {'source': '{tmp}/empty'}, '{tmp}/empty: no such file, and no directory or glob with .jsonl, .parquet files'),
    ('fineweb_edu', {'source': '{tmp}/many.jsonl'}, "{tmp}/many.jsonl: no column 'int_score' or 'score', it has: text, id"),
    ('fineweb_edu', {'source': '{tmp}/a.parquet'}, "{tmp}/a.parquet: no column 'int_score' or 'score', it has: text, id"),
    ('fineweb_edu', {'source': '{tmp}/list.jsonl'},
     "{tmp}/list.jsonl:1: broken line: no text in the field 'text' (--text_field)"),
    ('fineweb_edu', {'source': '{tmp}/score.parquet'},
     "{tmp}/score.parquet: no column 'text' (--text_field); it has: score"),
    ('wikitext2', {'source': '{tmp}/wiki'},
     '{tmp}/wiki: no file of the test split (test*.parquet, .jsonl or .txt, or wiki.test*.raw)'),
    ('wikitext2', {'source': '{tmp}/twice'}, '{tmp}/twice: the val split exists twice: valid.txt, validation.jsonl'),
])
def test_what_cannot_be_read_is_refused_in_one_line_before_anything_is_read(tmp_path, dataset, changes, message):
    for folder in ('empty', 'links', 'wiki', 'twice'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'links' / 'gone.jsonl.gz').symlink_to('/nowhere/x')
    for name in ('wiki/wiki.train.raw', 'wiki/wiki.valid.raw', 'twice/train.txt', 'twice/valid.txt', 'twice/test.txt'):
        (tmp_path / name).write_text('text\n')
    write_jsonl(tmp_path / 'twice' / 'validation.jsonl', ['x'])
    (tmp_path / 'list.jsonl').write_text('[1]\n')
    write_jsonl(tmp_path / 'many.jsonl', ['x'] * 200, id=1)
    (tmp_path / 'surrogate.jsonl').write_text(r'{"text": "\ud800"}')
    for name in ('no.parquet', 'no.txt.gz', 'no.jsonl.zst'):
        (tmp_path / name).write_text('neither the one nor the other')
    write_parquet(tmp_path / 'a.parquet', ['x'], id=[1])
    pq.write_table(pa.table({'score': [1.0]}), tmp_path / 'score.parquet')
    changes = {key: value.format(tmp=tmp_path) for key, value in changes.items()}
    assert refused(dataset.format(tmp=tmp_path), read=False, **changes).startswith(message.format(tmp=tmp_path))


def test_faults_in_the_middle_name_the_file_and_the_line_or_row(tmp_path, odd_files):
    (tmp_path / 'latin.txt').write_bytes(b'\xef\xbb\xbf' + b'line\n' * 4000 + b'abc\xe9def')
    assert refused(f'text:{tmp_path}/latin.txt') == (
        f'{tmp_path}/latin.txt: not UTF-8 at byte 20006, perhaps cp1252 (--encoding=cp1252); --bad_text=skip or replace continues')
    assert refused(f'text:{odd_files}/b.jsonl').startswith(f'{odd_files}/b.jsonl:3: broken line: Expecting')
    assert refused(f'text:{odd_files}/c.parquet').startswith(f'{odd_files}/c.parquet: row 4: not UTF-8 at byte 0')
    for number in (1, 2):  # the position at which reading went on doesn't matter
        of = opened(odd_files / 'b.jsonl', bad_text='skip')
        position = list(islice(of.documents(), number))[-1].position
        with pytest.raises(UserError, match=rf'b.jsonl:{[3, 7][number - 1]}: broken line'):
            list(islice(opened(odd_files / 'b.jsonl').documents(position), 4))
    rows = [random.Random(i).randbytes(500).hex() for i in range(2000)]
    for name in ('a.jsonl.gz', 'a.jsonl.zst'):
        whole = write_jsonl(tmp_path / name, rows).read_bytes()
        (tmp_path / name).write_bytes(whole[:-300])
        message = refused(f'text:{tmp_path}/{name}')
        line = int(message.split(':')[1])
        assert message.startswith(f'{tmp_path}/{name}:{line}: damaged or cut off: ') and 1000 < line <= 2000
    (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(''.join(rows).encode())[:-9])
    assert refused(f'text:{tmp_path}/b.txt.gz').startswith(f'{tmp_path}/b.txt.gz: after byte 1966080: damaged or cut off')
    pq.write_table(pa.table({'text': rows}), tmp_path / 'd.parquet', row_group_size=500, write_page_checksum=True)
    content = bytearray((tmp_path / 'd.parquet').read_bytes())
    content[len(content) // 2 + 1000] ^= 1
    (tmp_path / 'd.parquet').write_bytes(content)
    message = refused(f'text:{tmp_path}/d.parquet')
    assert message.startswith(f'{tmp_path}/d.parquet: row ') and 500 < int(message.split('row ')[1].split(':')[0]) < 1600


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, 'LONGEST_LINE', 2**20)
    (tmp_path / 'a.jsonl').write_bytes(b'{"text": "a"}\n[' + b'1, ' * 2**20)
    assert refused(f'text:{tmp_path}/a.jsonl').startswith(f'{tmp_path}/a.jsonl:2: this line is longer than 1 MB: does the file have')


# fineweb_edu

def fineweb_row(i):
    """In the columns of FineWeb-Edu. The score is rounded up, so that int_score >= 3 keeps more than score >= 3 does."""
    score = None if i % 11 == 10 else i % 5 + 0.6
    return {'text': None if i % 13 == 12 else f'text {i}', 'id': f'<urn:uuid:{i}>', 'dump': 'CC-MAIN-2024-10',
            'url': f'https://x.org/{i}', 'date': '2024-02-22T10:00:00Z', 'file_path': 's3://commoncrawl/x.warc.gz',
            'language': 'en', 'language_score': 0.9, 'token_count': 100 + i,
            'score': score, 'int_score': None if score is None or i % 7 == 6 else round(score)}


def fineweb_expected(count, minimum=3.0, columns=('int_score', 'score')):
    expected = []
    for row in map(fineweb_row, range(count)):
        scores = [row[column] for column in columns if row[column] is not None]
        if row['text'] is None or not scores:
            expected.append((None, 'unreadable'))
        else:
            expected.append((row['text'], '') if scores[0] >= minimum else (None, 'low_score'))
    return expected


def write_fineweb(folder, files, size, group):
    """Files of FineWeb-Edu with `size` documents each, in row groups."""
    folder.mkdir(exist_ok=True)
    for k in range(files):
        table = pa.Table.from_pylist([fineweb_row(i) for i in range(k * size, (k + 1) * size)])
        pq.write_table(table, folder / f'{k:03}_00000.parquet', row_group_size=group)
    return folder


@pytest.fixture
def fineweb(tmp_path):
    """Three .parquet files of several row groups each: 600 documents."""
    return write_fineweb(tmp_path / 'files', 3, 200, 70)


def write_fineweb_jsonl(folder, ending, files=1, size=600, drop=()):
    folder.mkdir(exist_ok=True)
    for k in range(files):
        rows = [fineweb_row(i) for i in range(k * size, (k + 1) * size)]
        write_jsonl(folder / f'{k}.jsonl{ending}', [{key: row[key] for key in row if key not in drop} for row in rows])
    return folder


def pairs(of, *position):
    return [document[:2] for document in of.documents(*position)]


def test_fineweb_keeps_documents_with_a_high_enough_score(fineweb):
    of = open_corpus(config('fineweb_edu', source=fineweb))
    assert pairs(of) == fineweb_expected(600) and of.filter == 'educational score >= 3'
    assert pairs(of)[:14] == [  # 2, 7 and 12 have a score of 2.6, an int_score of 3; 10 has no score, 12 no text
        (None, 'low_score'), (None, 'low_score'), ('text 2', ''), ('text 3', ''), ('text 4', ''), (None, 'low_score'),
        (None, 'low_score'), ('text 7', ''), ('text 8', ''), ('text 9', ''), (None, 'unreadable'), (None, 'low_score'),
        (None, 'unreadable'), ('text 13', '')]
    size = sum(path.stat().st_size for path in fineweb.iterdir())
    assert of.source == {'dataset': 'fineweb_edu', 'min_score': 3.0, 'source': str(fineweb), 'files': 3, 'bytes': size}


@pytest.mark.parametrize('ending', ['', '.gz', '.zst'])
def test_fineweb_as_jsonl_keeps_the_same_documents(tmp_path, ending):
    of = open_corpus(config('fineweb_edu', source=write_fineweb_jsonl(tmp_path / 'rows', ending, files=2, size=300)))
    assert pairs(of) == fineweb_expected(600) and of.progress(None) == 0


def test_int_score_decides_or_score_if_it_is_missing(tmp_path):
    def kept(name, minimum, drop=()):
        source = write_fineweb_jsonl(tmp_path / name, '', drop=drop)
        return pairs(open_corpus(config('fineweb_edu', source=source, min_score=minimum)))

    def row(i):
        return [fineweb_row(i)[key] for key in ('score', 'int_score')]

    assert row(22) == [2.6, 3] and row(27) == [2.6, None]
    assert (both := kept('both', 3.0))[22] == ('text 22', '') and both[27] == (None, 'low_score')
    assert kept('score', 3.0, ['int_score']) == fineweb_expected(600, 3.0, ['score']) != fineweb_expected(600)
    assert kept('int_score', 3.0, ['score']) == fineweb_expected(600, 3.0, ['int_score']) != fineweb_expected(600)


def test_fineweb_resumes_after_every_document_of_parquet_files(tmp_path):
    of = open_corpus(config('fineweb_edu', source=write_fineweb(tmp_path / 'files', 2, 10, 4)))
    documents = goes_on_behind_every_document(of)
    assert [document[:2] for document in documents] == fineweb_expected(20)
    assert [of.progress(stored(document)) for document in documents] == pytest.approx([k / 20 for k in range(1, 21)], abs=0.01)


def test_fineweb_resumes_after_every_document_of_jsonl_files(tmp_path):
    of = open_corpus(config('fineweb_edu', source=write_fineweb_jsonl(tmp_path / 'rows', '.gz', files=2, size=7)))
    documents = goes_on_behind_every_document(of)
    assert [document[:2] for document in documents] == fineweb_expected(14) and 0.5 < of.progress(stored(documents[9])) < 1


def test_files_with_any_name_are_read(tmp_path):
    folder = write_fineweb(tmp_path / 'of [2024] {a,b}', 2, 20, 7)
    (folder / '000_00000.parquet').rename(folder / 'test [*].parquet')  # sorted behind the other one
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links' / 'x.parquet').symlink_to(folder / '001_00000.parquet')
    assert pairs(open_corpus(config('fineweb_edu', source=folder))) == fineweb_expected(40)[20:] + fineweb_expected(20)
    assert pairs(open_corpus(config('fineweb_edu', source=tmp_path / 'links'))) == fineweb_expected(40)[20:]
    assert pairs(open_corpus(config('fineweb_edu', source=tmp_path / 'l*' / '*.parquet'))) == fineweb_expected(40)[20:]


def test_files_of_this_machine_are_read_without_asking_the_network(fineweb, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, 'HF_UPDATE_DOWNLOAD_COUNTS', True)  # as the library has it
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *arguments, **options: asked.append(arguments) or [])
    assert len(pairs(open_corpus(config('fineweb_edu', source=fineweb)))) == 600 and asked == []


def test_a_damaged_file_of_a_source_is_one_line_that_says_where(tmp_path):
    folder = write_fineweb_jsonl(tmp_path / 'rows', '.gz', files=2, size=2000)
    (folder / '1.jsonl.gz').write_bytes((folder / '1.jsonl.gz').read_bytes()[:-100])
    assert re.match(rf'{folder}/1.jsonl.gz:19\d\d: damaged or cut off', refused('fineweb_edu', source=folder))
    (tmp_path / 'a.jsonl').write_text('{"text": ')
    message = refused('fineweb_edu', source=tmp_path / 'a.jsonl', read=False)
    assert message.startswith(f'{tmp_path}/a.jsonl:1: broken line: Expecting value')


@pytest.fixture
def hub(fineweb, monkeypatch):
    """The Hub, which serves the files: `asked` are the calls of load_dataset, `faults` raised in turn by them and by rows."""
    state = SimpleNamespace(asked=[], faults={}, waits=[], files={'train': sorted(map(str, fineweb.glob('*.parquet')))},
                            kind='parquet', info=None)

    def fault(place):
        if error := state.faults.pop(place, None):
            raise error

    class Rows:
        def __init__(self, rows):
            self.rows, self.info = rows, state.info
            self.state_dict, self.load_state_dict = rows.state_dict, rows.load_state_dict

        def __iter__(self):
            for row in self.rows:
                fault(row['text'])
                yield row

    def load_dataset(path, name=None, split=None, streaming=False):
        state.asked.append((path, name, split, streaming))
        fault(len(state.asked))
        return Rows(LOAD_DATASET(state.kind, data_files=state.files[split], split='train', streaming=True))

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    monkeypatch.setattr(hub_module.time, 'sleep', state.waits.append)
    return state


def test_fineweb_is_streamed_and_resumes_after_any_document(hub, tmp_path, capfd):
    of, expected = open_corpus(config('fineweb_edu')), fineweb_expected(600)
    assert hub.asked == []  # so that a finished preparation needs no network
    documents = list(of.documents())
    assert [document[:2] for document in documents] == expected
    assert hub.asked == [('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', True)]
    assert of.source == {'dataset': 'fineweb_edu', 'min_score': 3.0, 'subset': 'sample-10BT'}
    assert of.progress(documents[5].position) is None
    for k in (0, 68, 69, 70, 199, 200, 431, 598, 599):
        rest = list(of.documents(stored(documents[k])))
        assert [document[:2] for document in rest] == expected[k + 1:]
        for j in (0, 150):  # the position of a reading that itself went on
            if j < len(rest):
                assert pairs(of, stored(rest[j])) == expected[k + j + 2:]
    hub.kind, hub.files = 'json', {'train': str(write_fineweb_jsonl(tmp_path / 'rows', '') / '0.jsonl')}
    documents = list(of.documents())
    assert [document[:2] for document in documents] == expected
    assert pairs(of, stored(documents[321])) == expected[322:]
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and 'row 11: int_score is None and score is None' in out and err == ''  # nothing of the library


def test_progress_of_a_stream_is_the_share_of_the_rows_that_the_hub_names(hub):
    hub.info = SimpleNamespace(splits={'train': SimpleNamespace(num_examples=600), 'test': SimpleNamespace(num_examples=7)})
    of = open_corpus(config('fineweb_edu'))
    assert of.progress(None) is None  # it hasn't been asked yet
    documents = list(of.documents())
    assert of.progress(None) == 0 and [of.progress(stored(documents[k])) for k in (0, 299, 599)] == [1 / 600, 0.5, 1]


def http_error(status, library=httpx):
    if library is httpx:
        response = httpx.Response(status, request=httpx.Request('GET', 'https://hub'))
        return httpx.HTTPStatusError(f'status {status}', request=response.request, response=response)
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f'status {status}', response=response)


def test_network_errors_are_retried_without_losing_or_repeating_a_document(hub, capfd):
    hub.faults = {1: ConnectionError("Couldn't reach\nit"), 2: http_error(503), 3: http_error(429, requests),
                  'text 0': TimeoutError('slow'), 'text 75': httpx.ReadError('cut'), 'text 76': requests.ConnectionError('cut'),
                  'text 399': http_error(500), 'text 599': ConnectionResetError('gone')}
    assert pairs(open_corpus(config('fineweb_edu'))) == fineweb_expected(600)
    assert hub.waits == [1, 2, 4, 8, 1, 1, 1, 1] and hub.faults == {}
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 8 and err[0] == "fineweb_edu: ConnectionError: Couldn't reach it: trying again in 1 s"


def test_an_unreachable_hub_gives_one_line_with_the_alternatives(hub, capfd, monkeypatch):
    hub.faults = {call: ConnectionError("Couldn't reach it") for call in range(1, 99)}
    message = refused('fineweb_edu')
    assert hub.waits == [1, 2, 4, 8, 16] and len(hub.asked) == 6 == hub_module.RETRIES + 1
    assert message.startswith("fineweb_edu: cannot read HuggingFaceFW/fineweb-edu sample-10BT from the Hugging Face Hub "
                              "after row 0, tried 6 times (ConnectionError: Couldn't reach it)")
    assert all(way in message for way in ('--source=PATH', '--dataset=text:PATH', '--dataset=pylib'))
    assert len(capfd.readouterr().err.splitlines()) == 5
    clock = iter([0, 23.3])  # as long as the library below tries by itself
    monkeypatch.setattr(hub_module.time, 'monotonic', lambda: next(clock))
    assert 'tried 1 time (' in refused('fineweb_edu') and len(hub.waits) == 5


@pytest.mark.parametrize('error', [http_error(401), http_error(403), http_error(404, requests), ValueError('no such config'),
                                   DatasetNotFoundError("doesn't exist"), PermissionError('no')])
def test_errors_that_a_retry_cannot_fix_are_reported_at_once(hub, error):
    hub.faults = {1: error}
    assert f'after row 0, tried 1 time ({type(error).__name__}: {error})' in refused('fineweb_edu') and hub.waits == []
    hub.faults = {'text 75': error}
    assert f'after row 75, tried 1 time ({type(error).__name__}: {error})' in refused('fineweb_edu') and hub.waits == []


def test_offline_mode_is_reported_at_once(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    hub.faults = {1: ConnectionError('offline')}
    assert 'tried 1 time (HF_HUB_OFFLINE is set, ConnectionError: offline)' in refused('fineweb_edu') and hub.waits == []


def test_columns_that_are_missing_on_the_hub_are_named(hub, fineweb):
    write_parquet(fineweb / 'x.parquet', ['a'], id=[1])
    hub.files = {'train': [str(fineweb / 'x.parquet')]}
    assert refused('fineweb_edu') == ("fineweb_edu: HuggingFaceFW/fineweb-edu sample-10BT from the Hugging Face Hub: "
                                      "no column 'int_score' or 'score', it has: text, id")
    assert refused('fineweb_edu', text_field='body').endswith("Hub: no column 'body', it has: text, id")


def test_libraries_that_are_missing_are_one_line(fineweb, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    wiki = wikitext_folder(tmp_path / 'wiki', 'parquet')
    for dataset in ('fineweb_edu', 'wikitext2'):
        assert 'pip install datasets' in refused(dataset, read=False)
    assert len(texts(open_corpus(config('fineweb_edu', source=fineweb)))) == 600  # files on this machine need it not
    assert len(texts(open_corpus(config('wikitext2', source=wiki)))) == 6
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert 'pip install pyarrow' in refused('fineweb_edu', source=fineweb, read=False)


# WikiText

ARTICLES = [' \n = One = \n \n Text of one . \n \n = = Section = = \n = 1 = \n No title : it follows no empty line . \n \n',
            ' = Two = \n \n = = = Deep = = = \n More <unk> @-@ text . \n \n', ' = Three é = \n \n']


def wikitext_folder(folder, form):
    folder.mkdir()
    for split, name in (('train', 'train'), ('valid', 'validation'), ('test', 'test')):
        text = (''.join(ARTICLES) if split != 'test' else ARTICLES[1]).replace('One', split)
        lines = text.splitlines(keepends=True)
        if form == 'raw':
            (folder / f'wiki.{split}.raw').write_text(text)
        elif form == 'txt.gz':
            (folder / f'{split}.txt.gz').write_bytes(gzip.compress(text.encode()))
        elif form == 'jsonl':
            write_jsonl(folder / f'{split}.jsonl', [line.rstrip('\n') for line in lines])
        else:
            half = len(lines) // 2
            for k, part in enumerate((lines[:half], lines[half:])):
                write_parquet(folder / f'{name}-{k:05}-of-00002.parquet', ['' if line == ' \n' else line for line in part])
    (folder / 'README.md').write_text('# no split')
    return folder


@pytest.mark.parametrize('form', ['raw', 'txt.gz', 'jsonl', 'parquet'])
def test_wikitext_lines_are_joined_to_articles_without_losing_any_text(tmp_path, form):
    of = open_corpus(config('wikitext2', source=wikitext_folder(tmp_path / 'wiki', form)))
    documents = goes_on_behind_every_document(of)
    expected = [article.replace('One', split) for split in ('train', 'valid') for article in ARTICLES]
    if form == 'parquet':  # whose '' is an empty line
        expected = [re.sub('^ \n', '\n', article, flags=re.MULTILINE) for article in expected]
    assert [document.text for document in documents] == expected
    assert [document.split for document in documents] == ['train'] * 3 + ['val'] * 3
    assert of.own_splits and of.test().split() == ARTICLES[1].split() and count_words(of.test()) == {'words': 15, 'lines': 5}
    assert of.source['files'] == (6 if form == 'parquet' else 3) and of.source['subset'] == 'wikitext-2-raw-v1'
    assert {document.dropped for document in documents} == {of.filter} == {''}
    assert of.progress(None) is of.progress(documents[2].position) is None


def test_wikitext_as_downloaded_is_the_published_text(tmp_path):
    lines = {'train': ['', ' = Robert B = \n', '', ' He is an actor . \n', ' = = Career = = \n', '', ' In 2000 he @-@ played . \n',
                       '', '', ' = Du Fu = \n', '', ' A poet é . \n', ''],
             'validation': ['', ' = Homarus = \n', '', ' A lobster . \n', ''],
             'test': ['', ' = Tank = \n', '', ' It rolls , 3 @,@ 000 . \n']}
    folder = tmp_path / 'wikitext-2-raw-v1'
    folder.mkdir()
    for split, rows in lines.items():
        write_parquet(folder / f'{split}-00000-of-00001.parquet', rows)
    text = {split: ''.join(row or '\n' for row in rows) for split, rows in lines.items()}
    for source in (tmp_path, folder):
        of = open_corpus(config('wikitext2', source=source))
        documents = goes_on_behind_every_document(of)
        assert [document.split for document in documents] == ['train', 'train', 'val'] and of.own_splits
        assert documents[0].text + documents[1].text == text['train'] and documents[1].text.startswith(' = Du Fu = \n')
        assert documents[2].text == text['validation'] and of.test() == text['test']
        assert of.source['files'] == 3


def test_wikitext_is_streamed_by_split_and_resumes_after_errors(tmp_path, hub):
    folder = wikitext_folder(tmp_path / 'wikitext-103-raw-v1', 'parquet')
    hub.files = {name: sorted(map(str, folder.glob(f'{name}*'))) for name in ('train', 'validation', 'test')}
    of = open_corpus(config('wikitext103'))
    local = open_corpus(config('wikitext103', source=tmp_path))  # the directory above: a download of the whole repository
    hub.faults = {1: ConnectionError(), ' = Two = \n': TimeoutError(), ' Text of one . \n': ConnectionError()}
    documents = list(of.documents())
    assert without_positions(documents) == without_positions(local.documents()) and len(documents) == 6
    assert of.test() == local.test() and hub.waits == [1, 1, 1]
    assert hub.asked[-1] == ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'test', True) and hub.asked[-2][2] == 'validation'
    for k, document in enumerate(documents):
        assert without_positions(of.documents(stored(document))) == without_positions(documents[k + 1:])


def test_bad_text_in_wikitext_is_refused_or_replaced(tmp_path):
    folder = wikitext_folder(tmp_path / 'wiki', 'raw')
    (folder / 'wiki.valid.raw').write_bytes(b'one \n two \xe9 \n')
    message = refused('wikitext2', source=folder)
    assert message == f'{folder}/wiki.valid.raw: not UTF-8 at byte 10, perhaps cp1252 (--encoding=cp1252); --bad_text=skip or replace continues'
    (folder / 'wiki.train.raw').write_bytes(''.join(ARTICLES).encode().replace(b'Text', b'T\xe9xt'))
    for choice, line, first in (('replace', ' two \ufffd \n', ARTICLES[0].replace('Text', 'T\ufffdxt')),
                                ('skip', '', ARTICLES[0].replace(' Text of one . \n', ''))):
        documents = goes_on_behind_every_document(open_corpus(config('wikitext2', source=folder, bad_text=choice)))
        assert without_positions(documents) == [
            (first, 'replaced', 'train'), (ARTICLES[1], '', 'train'), (ARTICLES[2], '', 'train'),
            ('one \n' + line, 'replaced', 'val')]


def test_text_without_titles_is_cut_at_a_line_end(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'LONGEST_ARTICLE', 100)
    folder = wikitext_folder(tmp_path / 'wiki', 'raw')
    (folder / 'wiki.train.raw').write_text('some line\n' * 95 + 'end')
    documents = goes_on_behind_every_document(open_corpus(config('wikitext2', source=folder)))
    train = [document.text for document in documents if document.split == 'train']
    assert ''.join(train) == 'some line\n' * 95 + 'end' and set(map(len, train[:-1])) == {110}


def test_words_are_counted_with_every_line_for_word_level_perplexity():
    assert count_words(' \n = A title = \n \n One two @-@ three . \n') == {'words': 9, 'lines': 4}
    assert count_words('') == {'words': 0, 'lines': 0}
    assert count_words('a\nb') == {'words': 2, 'lines': 2}


def test_corpora_without_a_download_start_without_the_large_libraries():
    code = ('import sys, types\nfrom corpora import corpus\n'
            'corpus.open_corpus(types.SimpleNamespace(dataset="pylib"))\n'
            'print({"torch", "datasets", "pyarrow", "numpy"} & set(sys.modules))')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == 'set()\n'


# Shakespeare

@pytest.fixture
def shakespeare(tmp_path, monkeypatch):
    """A text of 1,000 characters stands for the real one. Returns the list of URLs that were asked for."""
    monkeypatch.chdir(tmp_path)
    content, asked = (b'First Citizen:\nWe are.\n' * 50)[:1000], []
    monkeypatch.setattr(corpus, 'SHAKESPEARE_BYTES', 1000)
    monkeypatch.setattr(corpus, 'SHAKESPEARE_SHA256', hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(corpus, 'urlopen', lambda url, timeout: asked.append(url) or io.BytesIO(content))
    return asked


def shakespeare_options(**more):
    return SimpleNamespace(**{'dataset': 'shakespeare', 'source': '', **more})


def test_shakespeare_is_downloaded_once_and_split_where_nanogpt_does(shakespeare):
    for _ in range(2):
        of = open_corpus(shakespeare_options())
    assert shakespeare == [corpus.SHAKESPEARE]
    text = Path('data/tinyshakespeare.txt').read_text()
    assert [(document.split, document.text) for document in of.documents()] == [('val', text[900:]), ('train', text[:900])]
    assert [document.split for document in of.documents(0)] == ['train'] and not [*of.documents(1)]
    assert of.own_splits and of.source['bytes'] == 1000
    Path('mine.txt').write_text(text)
    assert open_corpus(shakespeare_options(source='mine.txt')).source == of.source


def test_a_text_other_than_shakespeare_is_refused_and_not_kept(shakespeare, monkeypatch):
    Path('short.txt').write_text('short')
    Path('other.txt').write_text('x' * 1000)
    for source, message in (('short.txt', '5 bytes, expected the 1,000 of'), ('other.txt', 'this is another text'), ('none.txt', 'No such file')):
        with pytest.raises(UserError, match=f'{source}: {message}'):
            open_corpus(shakespeare_options(source=source))
    monkeypatch.setattr(corpus, 'urlopen', lambda url, timeout: io.BytesIO(b'<html>'))
    with pytest.raises(UserError, match='input.txt: 6 bytes, expected the 1,000'):
        open_corpus(shakespeare_options())

    def offline(url, timeout):
        raise OSError('no route')
    monkeypatch.setattr(corpus, 'urlopen', offline)
    with pytest.raises(UserError, match=r'cannot download .*input.txt \(no route\): copy the file to data/tinyshakespeare.txt, or'):
        open_corpus(shakespeare_options())
    assert not Path('data').exists()
