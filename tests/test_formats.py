"""Text with any file name and any encoding, or with missing rows, is read exactly or refused with one clear line."""
import gzip
import json
import random
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import preparation
from configurator import UserError
from corpora import reading
from corpora.corpus import open_corpus
from test_corpus import compressed, goes_on_behind_every_document

TEXTS = ['One line.\n', 'é数🙂 "quoted" \\ back\n\nsecond', 'a', '\ttabs\r\nand returns\r\n']
ROWS = ''.join(json.dumps({'id': k, 'text': text}) + '\n' for k, text in enumerate(TEXTS)).encode()


def config(dataset, **changes):
    options = {'source': '', 'subset': '', 'text_field': 'text', 'min_score': 3.0, 'bad_text': 'refuse', 'encoding': 'utf-8',
               'bad_rows': 0.01, 'max_documents': 0, 'max_tokens': 0}
    return SimpleNamespace(dataset=dataset, **options | changes)


def opened(path, check=True, **changes):
    return open_corpus(config(f'text:{path}', **changes), check)


def texts(path, **changes):
    return [document.text for document in opened(path, **changes).documents()]


def refused(path, **changes):
    """The one line with which a path is refused."""
    with pytest.raises(UserError) as error:
        texts(path, **changes)
    assert '\n' not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def written(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compressed(data, path.suffix.lower()))
    return path


# Kinds of files

@pytest.mark.parametrize('name', ['a.jsonl', 'a.JSONL', 'a.ndjson', 'a.json', 'a.json.gz', 'a.Json.GZ', 'a.ndjson.zst',
                                  'a.jsonl.gz', 'a', 'a.log', 'a.gz', 'a.data.zst', 'c4-train.00000-of-01024.json.gz'])
def test_json_with_any_file_name_is_read_by_lines(tmp_path, name):
    assert texts(written(tmp_path / name, ROWS)) == TEXTS
    assert texts(written(tmp_path / name, b'\xef\xbb\xbf\n' + ROWS)) == TEXTS
    goes_on_behind_every_document(opened(tmp_path / name))


@pytest.mark.parametrize('name', ['a.txt', 'a.TXT', 'a.md', 'a.text', 'a.rst', 'a.Txt.gz', 'a.md.zst',
                                  'a', 'a.py', 'notes.2024', 'a.log.gz'])
def test_text_with_any_file_name_is_read_unchanged(tmp_path, name):
    assert texts(written(tmp_path / name, TEXTS[1].encode())) == [TEXTS[1]]
    assert ''.join(texts(written(tmp_path / name, b'{curly, but not JSON}\n'))) == '{curly, but not JSON}\n'


def test_a_directory_reads_known_endings_and_reports_the_rest(tmp_path):
    for name in ('a.TXT', 'b.md', 'c.txt', 'sub/d.txt'):
        written(tmp_path / name, name.encode())
    written(tmp_path / 'e.ndjson', ROWS)
    written(tmp_path / 'f.json.gz', ROWS)
    for name in ('t.csv', 'u.csv', 'v.png', 'w.py', 'Makefile'):
        written(tmp_path / name, b'left, out')
    of = opened(tmp_path)
    assert [document.text for document in of.documents()] == ['a.TXT', 'b.md', 'c.txt', *TEXTS, *TEXTS, 'sub/d.txt']
    line = of.contents()
    assert line.startswith('reading 3 .txt, 1 ') and '; left out: 2 .csv, ' in line and '\n' not in line
    assert all(part in line for part in ('1 .md', '1 .ndjson', '1 .json.gz', '1 .png', '1 .py', '1 (no ending)'))
    written(tmp_path / 'x.log', ROWS)
    assert opened(tmp_path / 'x.log').contents() == 'reading 1 .log as .jsonl file'
    of = opened(f'{tmp_path}/*')  # a glob takes endings without a meaning, too
    assert of.contents().endswith('left out: 2 .csv, 1 .png') and '1 .py as .txt' in of.contents()
    assert [document.text for document in of.documents()].count('left, out') == 2


def test_json_in_a_text_file_is_read_as_text_with_a_message(tmp_path):
    of = opened(written(tmp_path / 'a.txt', ROWS))
    assert ''.join(document.text for document in of.documents()) == ROWS.decode()
    assert of.contents() == 'reading 1 .txt as text (it looks like JSON: .jsonl is read by its fields) file'


def test_the_text_field_is_recorded_if_the_content_decides(tmp_path):
    written(tmp_path / 'a', b'{"body": "x"}\n')
    assert opened(tmp_path / 'a', text_field='body').source['text_field'] == 'body'
    assert 'text_field' not in opened(written(tmp_path / 'b', b'prose')).source  # as it was before content was looked at


@pytest.mark.parametrize('position', [[0, 4], [{'examples_iterable': 1}, 4]])
def test_a_position_of_an_earlier_version_is_one_line(tmp_path, position):
    of = opened(written(tmp_path / 'a', ROWS))
    with pytest.raises(UserError, match='an earlier version began this preparation: remove its directory'):
        list(of.documents(position))


def test_listing_prints_nothing_and_opens_nothing(tmp_path, capsys, monkeypatch):
    written(tmp_path / 'a.jsonl', b'[1]')
    written(tmp_path / 'b.txt', b'\0')
    monkeypatch.setattr(reading, 'uncompressed', None)
    assert opened(tmp_path, check=False).source['files'] == 2 and capsys.readouterr() == ('', '')


OTHER_JSON = [b'[{"text": "a"}, {"text": "b"}]', b'[\n  {"text": "a"}\n]', b'{\n  "text": "a"\n}\n']


@pytest.mark.parametrize('content', [*OTHER_JSON, b'[\n', b'prose\n'])
@pytest.mark.parametrize('name', ['a.json', 'a.json.gz'])
def test_json_without_one_object_per_line_is_refused(tmp_path, name, content):
    assert 'convert it to one object per line' in refused(written(tmp_path / name, content))


def test_json_over_several_lines_is_recognised_without_an_ending(tmp_path):
    for content in (*OTHER_JSON, b'{"text": "torn'):
        assert 'convert it to one object per line' in refused(written(tmp_path / 'x', content))


def test_a_json_line_longer_than_the_inspected_head_is_read(tmp_path):
    text = 'x' * 3 * reading.HEAD
    for name in ('a', 'a.json'):
        assert texts(written(tmp_path / name, json.dumps({'text': text}).encode() + b'\n' + ROWS)) == [text, *TEXTS]


@pytest.mark.parametrize('name, remedy', [
    ('a.csv', 'a table'), ('a.TSV', 'a table'), ('a.csv.gz', 'a table'), ('a.html', 'markup'), ('a.xml.gz', 'markup'),
    ('a.pdf', 'extract its text'), ('a.ipynb', 'extract its text'), ('a.zip', 'unpack it'), ('a.tar.gz', 'unpack it'),
    ('a.png', 'leave it out'), ('a.npy', '--dataset=shards:'), ('a.bin', '--dataset=bins:')])
def test_files_that_are_not_plain_text_are_refused_with_advice(tmp_path, name, remedy):
    path = written(tmp_path / name, b'plain enough\n')
    assert refused(path).startswith(f'{path}: ') and remedy in refused(path)
    assert refused(f'{tmp_path}/*').startswith(f'{path}: ')  # a glob of nothing else
    message = refused(tmp_path)
    assert message.startswith(f'{tmp_path}: no such file') and message.endswith('; left out: 1 ' + name[1:].lower())


def parquet_bytes():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({'text': ['a']}), sink)
    return sink.getvalue().to_pybytes()


BINARY = [(gzip.compress(b'text', mtime=0), 'gzip'), (compressed(b'text', '.zst'), 'zstd'), (parquet_bytes(), '.parquet'),
          (b'PK\x03\x04abc', 'zip'), (b'%PDF-1.7\n', 'PDF'), (b'\x89PNG\r\n\x1a\n\0\0', 'PNG'), (b'\xff\xd8\xff\xe0', 'JPEG'),
          (b'\x7fELF\2\1', 'program'), (b'words\0\1\2\3', 'a NUL at byte 5'), (b'\0', 'NUL'), (b'\0' * 500, 'NUL'),
          (random.Random(0).randbytes(500) + bytes(10), 'NUL')]


@pytest.mark.parametrize('name', ['a', 'a.txt', 'a.md', 'a.jsonl', 'a.json', 'a.txt.gz'])
def test_binary_content_is_never_trained_on(tmp_path, name):
    for content, what in BINARY:
        path = written(tmp_path / name, content)
        for bad_text in ('refuse', 'skip', 'replace'):
            message = refused(path, bad_text=bad_text)
            assert message.startswith(f'{path}: ') and what in message


def test_a_single_nul_is_bad_text(tmp_path):
    path = written(tmp_path / 'a.txt', b'word ' * 30_000 + b'\0' + b' word' * 10)
    assert f'{path}: binary content, a NUL at byte 150000; --bad_text' in refused(path)
    assert '\0' not in ''.join(texts(path, bad_text='replace')) and '\ufffd' in ''.join(texts(path, bad_text='replace'))
    assert None in texts(path, bad_text='skip')


def test_text_that_only_begins_like_a_binary_file_is_text(tmp_path):
    for text in ('BZh is no word\n', 'PAR10 is a golf score\n', 'GIF8 files\n', '[1] A footnote\n', '{a}\n', '[[wiki]]\n',
                 '<b>bold</b>\n'):
        assert texts(written(tmp_path / 'a', text.encode())) == [text]


# Encodings

PROSE = {'cp1252': 'Le café était fermé à côté — “déjà” l’été.\n', 'gb18030': '我们今天在学校里学习中文，明天去北京。\n',
         'shift_jis': 'これは日本語のテキストです。漢字もあります。\n', 'euc_kr': '우리는 오늘 학교에서 한국어를 배웁니다.\n',
         'cp1251': 'Сегодня мы читаем книги на русском языке.\n', 'koi8_r': 'Сегодня мы читаем книги на русском языке.\n',
         'big5': '我們今天在學校裡學習中文，明天去臺北。\n', 'euc_jp': 'これは日本語のテキストです。漢字もあります。\n'}


@pytest.mark.parametrize('encoding', PROSE)
def test_another_encoding_is_refused_with_a_suggestion(tmp_path, encoding):
    text = 'ASCII first.\n' + PROSE[encoding] * 20
    path = written(tmp_path / 'a.txt', text.encode(encoding))
    position = min(error_at(text.encode(encoding)), 200)
    message = refused(path)
    assert message.startswith(f'{path}: not UTF-8 at byte {position}, perhaps {encoding} (--encoding={encoding})')
    assert texts(path, encoding=encoding) == [text]
    lines = written(tmp_path / 'a.jsonl', json.dumps({'text': text}, ensure_ascii=False).encode(encoding))
    assert refused(lines).startswith(f'{lines}:1: not UTF-8 at byte ') and f'--encoding={encoding}' in refused(lines)
    assert texts(lines, encoding=encoding) == [text]


def error_at(data):
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start


def test_no_encoding_is_guessed_for_damaged_utf_8(tmp_path):
    path = written(tmp_path / 'a.txt', 'é数🙂 naïve café\n'.encode() * 9 + b'\xe9 end')
    assert '(--encoding=NAME reads other encodings); --bad_text' in refused(path)


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-be', 'utf-32', 'utf-32-be'])
@pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz', 'a.jsonl', 'a', 'a.json.zst'])
@pytest.mark.parametrize('given_encoding', ['utf-8', 'cp1252'])
def test_a_byte_order_mark_decides_the_encoding_and_is_not_a_token(tmp_path, encoding, name, given_encoding):
    is_json = 'json' in name
    rows = [json.dumps({'text': text}, ensure_ascii=False) for text in TEXTS]
    content = '\n'.join(rows) if is_json else TEXTS[1] * 4_000
    mark = '\ufeff' if encoding.endswith('be') else ''
    path = written(tmp_path / name, (mark + content).encode(encoding))
    documents = goes_on_behind_every_document(opened(path, encoding=given_encoding))
    found = [document.text for document in documents]
    assert found == TEXTS if is_json else ''.join(found) == content


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be'])
def test_utf_16_without_a_mark_is_refused_with_the_option_that_reads_it(tmp_path, encoding):
    text = 'Plain English, naïve 数.\n' * 9
    path = written(tmp_path / 'a.txt', text.encode(encoding))
    assert refused(path) == (f'{path}: every other byte is NUL, so it is likely {encoding} without a mark: '
                             f'try --encoding={encoding}')
    assert texts(path, encoding=encoding) == [text]


def test_what_the_named_encoding_cannot_decode_is_bad_text_with_its_place_in_the_file(tmp_path):
    path = written(tmp_path / 'a.txt', b'caf\xe9 ' * 40_000 + b'\x81 end')
    assert refused(path, encoding='cp1252') == f'{path}: not cp1252 at byte 200000; --bad_text=skip or replace continues'
    assert ''.join(texts(path, encoding='cp1252', bad_text='replace')) == 'café ' * 40_000 + '\ufffd end'
    skipped = texts(path, encoding='cp1252', bad_text='skip')
    assert skipped[-1] is None and len(skipped) > 1 and ('café ' * 40_000).startswith(''.join(skipped[:-1]))
    torn = written(tmp_path / 'b.txt', 'text 🙂'.encode('utf-16')[:-1])
    assert refused(torn) == f'{torn}: not utf-16 at byte 12; --bad_text=skip or replace continues'
    for encoding in ('gb18030', 'shift_jis', 'utf-16'):
        data = 'ab'.encode(encoding) + '漢'.encode(encoding)[-2:] * 70_000
        path = written(tmp_path / 'c.txt', data + b'\xff')
        assert f'not {encoding} at byte {len(data)};' in refused(path, encoding=encoding)
        documents = goes_on_behind_every_document(opened(path, encoding=encoding, bad_text='replace'))
        assert ''.join(document.text for document in documents) == 'ab' + '漢' * 70_000 + '\ufffd'


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet='aé\n\r ÿ’', min_size=1, max_size=200),
       st.sampled_from(['cp1252', 'utf-16', 'utf-16-le', 'gb18030', 'utf-7', 'utf-8-sig', 'UTF8']))
def test_named_encodings_are_read_exactly_and_resume_after_any_document(tmp_path_factory, text, encoding):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('PIECE', 8), ('PATIENCE', 30), ('LONGEST', 60)):
            patch.setattr(reading, name, value)
        path = written(tmp_path_factory.getbasetemp() / 'encoded.md', text.encode(encoding))
        documents = goes_on_behind_every_document(opened(path, encoding=encoding))
    assert ''.join(document.text for document in documents) == text


def test_the_encoding_is_checked_and_recorded():
    def problems(**options):
        return list(preparation.PrepareConfig(**options).problems())

    def request(**options):
        asked = preparation.PrepareConfig(**options)
        return preparation.make_request(asked, SimpleNamespace(own_splits=False, filter='', source={}, inputs=None), {'tokenizer': 'bpe', 'vocab_size': 300})

    for options in ({}, {'encoding': 'latin1'}, {'encoding': 'UTF_16'}, {'bad_rows': 1}, {'bad_rows': 0}):
        assert problems(**options) == []
    for name in ('', 'none', 'base64', 'rot13', 'idna', 'unicode_escape', 'a\0b'):
        assert problems(encoding=name)[0].startswith(f'--encoding={name}: unknown, expected an encoding that Python knows')
    for share in (-0.1, 1.1, float('nan')):
        assert problems(bad_rows=share) == [f'--bad_rows={share}: expected a fraction from 0 to 1']
    assert 'encoding' not in request() and request(encoding='UTF8') == request(bad_rows=0.5) == request()
    assert request(encoding='Latin1')['encoding'] == 'iso8859-1'
    assert preparation.directory(preparation.PrepareConfig(encoding='cp1252', bad_rows=0.5)).name == 'pylib-encoding-cp1252'


# Rows and columns

def rows_with_nulls(count, bad, row):
    return [row if k in bad else {'text': f'text {k}'} for k in range(count)]


def write_rows(path, rows):
    if path.suffix == '.parquet':
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    return written(path, ''.join(json.dumps(row) + '\n' for row in rows).encode())


@pytest.mark.parametrize('row', [{'text': None}, {'id': 1}, {}])
@pytest.mark.parametrize('name', ['a.jsonl', 'a.parquet'])
def test_rows_without_text_are_left_out_up_to_a_share_and_the_first_is_named(tmp_path, capsys, name, row):
    path = write_rows(tmp_path / name, rows_with_nulls(300, {10, 20, 30}, row))
    of = opened(path)
    documents = list(of.documents())
    place = f'{path}:11' if name == 'a.jsonl' else f'{path}: row 11'
    assert [document.dropped for document in documents].count('unreadable') == 3 and len(documents) == 300
    list(of.documents())  # the sample has been read, now all of it is encoded
    assert capsys.readouterr().out == (f"{place}: no text in the field 'text': such rows are left out, "
                                       'up to a share of --bad_rows=0.01\n')
    message = refused(path, bad_rows=0.009)
    assert message.startswith(place.replace('11', '300')) and '3 of 300 rows up to here have no text in the field' in message
    assert '--bad_rows=0.009 allows' in message
    assert texts(path, bad_rows=0.01).count(None) == texts(path, bad_rows=1).count(None) == 3
    assert 'no text' in refused(path, bad_rows=0)
    write_rows(path, rows_with_nulls(3000, range(5, 40), row))  # judged once 1,000 rows are read
    of = opened(path)
    with pytest.raises(UserError, match='35 of 1,000 rows'):
        list(of.documents())
    write_rows(path, rows_with_nulls(3000, range(2000, 2020), row))
    assert texts(path).count(None) == 20
    write_rows(path, rows_with_nulls(3000, range(2000, 2050), row))
    assert 'of 2,0' in refused(path)


def test_the_share_of_bad_rows_is_the_same_after_resuming(tmp_path):
    path = write_rows(tmp_path / 'a.jsonl', rows_with_nulls(1500, range(700, 720), {'text': None}))
    of = opened(path, bad_rows=0.1)
    position = json.loads(json.dumps([document.position for document in of.documents()][1200]))
    with pytest.raises(UserError, match='20 of 1,5'):
        list(opened(path).documents(position))
    goes_on = list(opened(path, bad_rows=0.1).documents(position))
    assert len(goes_on) == 299 and goes_on[-1].position[2:] == [1500, 20]
    assert len(list(opened(path).documents(position[:2]))) == 299  # of a preparation that an earlier version began


def test_a_wrong_text_field_is_refused_at_once_with_the_existing_fields(tmp_path):
    path = write_rows(tmp_path / 'a.jsonl', [{'content': 'x', 'id': k} for k in range(300)])
    assert refused(path, bad_rows=1) == (f"{path}: none of its first lines has a text in the field 'text' "
                                         '(--text_field); the last of them has: content, id')


def fineweb(path, rows):
    return open_corpus(config('fineweb_edu', source=str(write_rows(path, rows))))


def test_unused_columns_may_hold_anything(tmp_path):
    """Null for the first 30,000 rows, a string later: a schema that is inferred from the first rows fails there."""
    rows = [{'text': f'text {k}', 'score': 3.5, 'int_score': 4, 'dump': None, 'id': None} for k in range(30_000)]
    rows += [{'text': 'last', 'score': 3.5, 'int_score': 4, 'dump': 'CC-MAIN', 'id': 1},
             {'text': 'end', 'score': 4, 'dump': [{}], 'id': 'x'}]
    documents = list(fineweb(tmp_path / 'a.jsonl', rows).documents())
    assert len(documents) == 30_002 and [document.text for document in documents[-2:]] == ['last', 'end']


@pytest.mark.parametrize('name', ['a.jsonl', 'a.parquet'])
def test_scores_may_be_strings_and_invalid_scores_are_named(tmp_path, capsys, name):
    rows = [{'text': f'text {k}', 'score': f'{k % 5}.6'} for k in range(200)]
    documents = list(fineweb(tmp_path / name, rows).documents())
    assert [document.text for document in documents] == [f'text {k}' if k % 5 >= 3 else None for k in range(200)]
    rows[7]['score'] = 'high'
    documents = list(fineweb(tmp_path / name, rows).documents())
    assert documents[7][:2] == (None, 'unreadable')
    named = capsys.readouterr().out.partition('8: ')[2]
    assert named.startswith("score is 'high', expected a number: such rows are left out")
    for row in rows:
        row['score'] = 'high'
    with pytest.raises(UserError, match='200 of 200 rows up to here have no text in the field .text. or no score'):
        list(fineweb(tmp_path / name, rows).documents())


def test_a_score_that_is_not_utf8_is_one_line(tmp_path):
    scores = pa.array([b'4.0', b'\xff'], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, scores.buffers())
    pq.write_table(pa.table({'text': ['a', 'b'], 'score': broken}), tmp_path / 'a.parquet')
    with pytest.raises(UserError, match=r"a.parquet: row \d: damaged: 'utf-8' codec can't decode"):
        list(open_corpus(config('fineweb_edu', source=str(tmp_path))).documents())


def test_files_of_both_kinds_are_read_together(tmp_path):
    for name in ('a.parquet', 'b.jsonl'):
        write_rows(tmp_path / name, [{'text': name, 'score': 4.0}])
    of = open_corpus(config('fineweb_edu', source=str(tmp_path)))
    assert [document.text for document in of.documents()] == ['a.parquet', 'b.jsonl']


# Everything with everything

ENDINGS = ['.txt', '.md', '.TXT', '.json', '.jsonl', '.ndjson', '.log', '', '.txt.gz', '.json.gz', '.gz', '.jsonl.zst', '.dat.zst']
CONTENTS = ['prose', 'rows', 'nulls', 'array', 'noise', 'empty']


@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize('content', CONTENTS)
def test_any_input_is_read_exactly_or_refused(tmp_path, ending, content):
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'cp1252', 'shift_jis'):
        for size in (1, 2, 3, 40, 3000):
            draw = random.Random(f'{ending}{content}{encoding}{size}')
            alphabet = 'ab \n' + {'cp1252': 'éü’', 'shift_jis': 'あい漢'}.get(encoding, 'é数🙂\r')
            prose = ''.join(draw.choices(alphabet, k=size))
            rows = [''.join(draw.choices(alphabet, k=draw.randint(0, 9))) for _ in range(min(size, 100))]
            if content == 'nulls':
                rows = [None if draw.random() < 0.01 else row for row in rows]
            newline = draw.choice(['\n', '\r\n'])
            objects = [json.dumps({'text': row}, ensure_ascii=False) for row in rows]
            text = {'prose': prose, 'noise': '', 'empty': '', 'array': '[' + f',{newline}'.join(objects) + ']'}.get(
                content, newline.join(objects))
            data = draw.randbytes(size) if content == 'noise' else text.encode(encoding)
            path = written(tmp_path / f'a{ending}', data)
            for named in ('utf-8', encoding):
                try:
                    documents = list(opened(path, encoding=named).documents())
                except UserError as error:
                    assert str(error).startswith(str(path)) and '\n' not in str(error) and len(str(error)) < 600
                    assert content != 'prose' or 'json' in ending or named != encoding, error
                    assert content != 'rows' or named != encoding or 'txt' in ending.lower(), error
                    continue
                found = [document.text for document in documents]
                as_text = ''.join(piece for piece in found if piece)
                if content in ('rows', 'nulls') and not ending.lower().startswith(('.txt', '.md')):
                    assert found == rows
                elif content == 'noise' or named != encoding and encoding not in ('utf-8-sig', 'utf-16'):  # without a mark
                    decoded = data.decode('utf-8-sig', 'replace'), data.decode(named, 'replace')
                    assert as_text in decoded or data.isspace()
                else:
                    assert as_text == text or text.isspace()


def test_a_json_file_without_rows_is_left_out_of_a_directory_and_refused_by_name(tmp_path):
    written(tmp_path / 'a.jsonl', b'{"text": "one"}\n')
    written(tmp_path / 'dataset_info.json', b'{\n  "features": {}\n}\n')
    corpus = opened(tmp_path)
    assert [document.text for document in corpus.documents()] == ['one']
    assert corpus.contents() == 'reading 1 .jsonl file; left out: 1 .json'
    assert [document.text for document in opened(f'{tmp_path}/*').documents()] == ['one']
    with pytest.raises(UserError, match='dataset_info.json: JSON without an object on its first line'):
        opened(f'{tmp_path}/dataset_info.json')


@pytest.mark.parametrize('encoding', ['cp1252', 'latin-1', 'cp1251', 'gb18030'])
def test_utf8_is_not_read_as_another_encoding(tmp_path, encoding):
    written(tmp_path / 'a.txt', 'ein Café in Zürich; '.encode() * 5)
    with pytest.raises(UserError, match='a.txt: its text is UTF-8, not .*: leave --encoding out'):
        opened(f'{tmp_path}/a.txt', encoding=encoding)
    written(tmp_path / 'a.txt', b'plain')
    assert [document.text for document in opened(f'{tmp_path}/a.txt', encoding=encoding).documents()] == ['plain']


def test_iso_2022_jp_is_recognised_and_read(tmp_path):
    text = '日本語のテキスト'
    written(tmp_path / 'a.txt', text.encode('iso2022_jp'))
    with pytest.raises(UserError, match='an escape sequence of iso2022_jp at byte 0: try --encoding=iso2022_jp'):
        opened(f'{tmp_path}/a.txt')
    assert [document.text for document in opened(f'{tmp_path}/a.txt', encoding='iso2022_jp').documents()] == [text]
