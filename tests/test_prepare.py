import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
from configurator import UserError
from data import TokenData, load_tokenizer

ROOT = Path(prepare.__file__).parent
WORDS = 'the of model token byte window train while gradient descent loss layer attention résumé 数据 return def self'.split()


def texts(n, seed=0):
    """n different documents of about 300 bytes."""
    rng = random.Random(seed)
    return [' '.join(rng.choices(WORDS, k=50)) + f' {seed}.{i}\n' for i in range(n)]


def write_jsonl(path, documents):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    return path


def arguments(corpus, out, **changes):
    options = {'dataset': f'text:{corpus}', 'out': out, 'vocab_size': 300, 'val_ratio': 0.2, 'num_proc': 1} | changes
    return [f'--{key}={value}' for key, value in options.items()]


def prepared(corpus, out, **options):
    prepare.main(arguments(corpus, out, **options))
    return out


def start(code, *argv):
    """`code` in a new Python, which stands for prepare.py with something in it replaced."""
    return subprocess.Popen([sys.executable, '-c', code, *map(str, argv)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def command(*argv):
    return subprocess.run([sys.executable, ROOT / 'prepare.py', *map(str, argv)], capture_output=True, text=True, timeout=60)


def bins(out):
    return {name: (out / name).read_bytes() for name in ('train.bin', 'val.bin', 'tokenizer.json')}


def meta(out):
    return json.loads((out / 'meta.json').read_text())


def documents(out, split):
    encoding = load_tokenizer(out)
    ids = np.fromfile(out / f'{split}.bin', '<u2')
    assert ids[-1] == encoding.n_vocab - 1
    ends = np.flatnonzero(ids == encoding.n_vocab - 1)
    return [encoding.decode(part[part != encoding.n_vocab - 1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith('.'))


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / 'corpus.jsonl', texts(150))


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """A corpus of several batches, and what one process makes of it."""
    folder = tmp_path_factory.mktemp('large')
    corpus = write_jsonl(folder / 'corpus.jsonl', texts(9000))
    return corpus, prepared(corpus, folder / 'out')


# What is written

def test_bins_hold_every_document_and_meta_describes_them(corpus, tmp_path, capsys):
    out = prepared(corpus, tmp_path / 'deep' / 'out')
    split = {name: documents(out, name) for name in ('train', 'val')}
    assert sorted(split['train'] + split['val']) == sorted(texts(150)) and len(split['val']) > 15
    described = meta(out)
    assert described['source'] == {'dataset': f'text:{corpus}', 'files': 1, 'bytes': corpus.stat().st_size, 'text_field': 'text'}
    assert (described['version'], described['vocab_size'], described['eot_id'], described['seed']) == (1, 300, 299, 1337)
    assert described['documents'] == {'read': 150, 'unreadable': 0, 'empty': 0, 'duplicates': 0,
                                      'train': len(split['train']), 'val': len(split['val'])}
    for name in split:
        (file,) = described['files'][name]
        ids = np.fromfile(out / file['name'], '<u2')
        assert (file['tokens'], file['max_id']) == (len(ids), ids.max())
        assert file['bytes'] == sum(len(text.encode()) for text in split[name])
    assert sorted(path.name for path in out.iterdir()) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    assert leftovers(out.parent) == []
    data = TokenData(out, 8, 300)  # which checks sizes, hashes and ids
    assert data.train_tokens == described['files']['train'][0]['tokens']
    summary = capsys.readouterr().out.splitlines()[-1]
    assert f'{data.train_tokens:,} train' in summary and 'bytes per token' in summary


def test_bins_are_the_same_for_any_number_of_processes(large, tmp_path):
    corpus, out = large
    result = command(*arguments(corpus, tmp_path / 'two', num_proc=2))
    assert result.returncode == 0 and result.stderr == ''
    assert bins(tmp_path / 'two') == bins(out)
    assert {**meta(tmp_path / 'two'), 'created': 0, 'seconds': 0} == {**meta(out), 'created': 0, 'seconds': 0}


def test_documents_are_encoded_in_order_with_a_bounded_number_in_flight(large, tmp_path, monkeypatch):
    _, out = large
    taken = []

    def stream():
        for i in range(20):
            taken.append(i)
            yield Counter(), {'train': [f'{i} ' * 50], 'val': []}

    class Pool(prepare.ProcessPoolExecutor):
        def __init__(self, num_proc, context, initializer, initargs):
            prepare.open_tokenizer(*initargs)

        def submit(self, function, batch):
            return type('Future', (), {'result': lambda _: function(batch)})()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(prepare, 'ProcessPoolExecutor', Pool)
    results = prepare.encoded(stream(), out, 3)
    for i, (_, ids) in enumerate(results):
        assert load_tokenizer(out).decode(ids['train'].tolist()) == f'{i} ' * 50 + '<|endoftext|>'
        assert len(taken) == min(20, i + 6)


def test_max_tokens_is_the_train_budget(large, tmp_path):
    corpus, out = large
    short = prepared(corpus, tmp_path / 'short', max_tokens='2e5', num_proc=1)
    ids, all_ids = np.fromfile(short / 'train.bin', '<u2'), np.fromfile(out / 'train.bin', '<u2')
    assert len(ids) == 200_000 and ids[-1] == 299 and np.array_equal(ids[:-1], all_ids[:199_999])
    assert meta(short)['documents']['train'] == len(documents(short, 'train')) < meta(out)['documents']['train']


def test_literal_end_of_text_in_a_document_is_text(tmp_path):
    odd = [f'before <|endoftext|> after {i}' for i in range(30)]
    out = prepared(write_jsonl(tmp_path / 'c.jsonl', odd), tmp_path / 'out', vocab_size=270)
    assert sorted(documents(out, 'train') + documents(out, 'val')) == sorted(odd)


def test_exact_duplicates_and_empty_documents_go_out(tmp_path):
    rows = texts(100)
    write_jsonl(tmp_path / 'c.jsonl', [*rows, rows[3], '', ' \n\u3000', *rows[:10]])
    out = prepared(tmp_path / 'c.jsonl', tmp_path / 'out')
    assert sorted(documents(out, 'train') + documents(out, 'val')) == sorted(rows)
    counts = meta(out)['documents']
    assert (counts['read'], counts['empty'], counts['duplicates'], counts['train'] + counts['val']) == (113, 2, 11, 100)


def test_growing_the_corpus_never_moves_a_document_between_splits(corpus, tmp_path):
    small = prepared(corpus, tmp_path / 'small')
    grown = random.Random(1).sample(texts(150) + texts(150, seed=1), 300)
    large = prepared(write_jsonl(tmp_path / 'grown.jsonl', grown), tmp_path / 'large', vocab_size=310)
    for split in ('train', 'val'):
        assert set(documents(small, split)) == set(documents(large, split)) & set(texts(150))
    other = prepared(corpus, tmp_path / 'other', seed=2)
    assert set(documents(other, 'val')) != set(documents(small, 'val'))


# The tokenizer

@pytest.fixture(scope='module')
def both_tokenizers():
    """tiktoken's ids of a text, and those of the library that trained the tokenizer."""
    kept, original = [], prepare.Tokenizer
    prepare.Tokenizer = lambda model: kept.append(original(model)) or kept[-1]
    try:
        code = [path.read_text() for path in (ROOT / 'prepare.py', ROOT / 'data.py', Path(__file__))]
        encoding = load_tokenizer(prepare.train_tokenizer(code + texts(100), 1000))
    finally:
        prepare.Tokenizer = original
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]  # as GPT-2's encoder.py writes bytes
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}
    rank = {encoding.decode_single_token_bytes(i): i for i in range(999)}
    return encoding, lambda text: [rank[bytes(byte_of[c] for c in token)] for token in kept[0].encode(text).tokens]


CODE = (ROOT / 'prepare.py').read_text() + (ROOT / 'model.py').read_text()
code_slices = st.builds(lambda start, length: CODE[start:start + length], st.integers(0, len(CODE)), st.integers(0, 500))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="aé'sltv 1\n\t 數"), code_slices))
@example("I'll  don't\r\n\n  x \u2028\x85  ")
def test_tiktoken_gives_the_ids_of_the_trained_tokenizer(both_tokenizers, text):
    encoding, trained = both_tokenizers
    ids = encoding.encode_ordinary(text)
    assert ids == trained(text)
    assert encoding.decode_bytes(ids) == text.encode()


def test_tokenizer_is_bytes_first_then_merges_and_the_end_last(large):
    encoding = load_tokenizer(large[1])
    assert encoding.n_vocab == 300 and encoding.eot_token == 299
    tokens = [encoding.decode_single_token_bytes(i) for i in range(299)]
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    for i, token in enumerate(tokens[256:], 256):
        assert any(token[:k] in tokens[:i] and token[k:] in tokens[:i] for k in range(1, len(token)))


def test_long_runs_of_spaces_are_encoded(large):
    prepare.open_tokenizer(large[1])
    text = ' \t' * 600_000 + 'x'
    _, ids = prepare.encode((Counter(), {'train': [text], 'val': []}))
    assert prepare.encoding.decode(ids['train'].tolist()) == text + '<|endoftext|>'


# The corpora

def test_text_reads_files_directories_and_globs_in_order(tmp_path):
    (tmp_path / 'b').mkdir()
    for name in ('c.txt', 'b/a.txt', 'b/z.md'):
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / 'a.jsonl', ['one', 'two'])

    def read(path, field='text'):
        return list(prepare.open_corpus(prepare.PrepareConfig(dataset=f'text:{path}', text_field=field))[1])

    assert read(tmp_path) == ['one', 'two', 'b/a.txt', 'c.txt']
    assert read(tmp_path / 'b' / 'z.md') == ['b/z.md']
    assert read(f'{tmp_path}/**/*.txt') == ['b/a.txt', 'c.txt']
    (tmp_path / 'a.jsonl').write_text('\ufeff{"body": "x"}\n\n{"body": "y", "text": 1}')
    assert read(tmp_path / 'a.jsonl', 'body') == ['x', 'y']


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='aé數🙂\n\r ', max_size=300), st.text(alphabet='aé數🙂\n\r ', max_size=100), st.booleans())
def test_pieces_are_the_file_and_appending_changes_the_last_alone(tmp_path_factory, text, more, bom):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('PIECE', 8), ('PATIENCE', 30), ('LONGEST', 60)):
            patch.setattr(prepare, name, value)
        file = tmp_path_factory.getbasetemp() / 'pieces.txt'
        file.write_bytes(b'\xef\xbb\xbf' * bom + text.encode())
        before = list(prepare.pieces(file))
        file.write_bytes(b'\xef\xbb\xbf' * bom + (text + more).encode())
        after = list(prepare.pieces(file))
    assert ''.join(before) == text and ''.join(after) == text + more
    assert after[:len(before[:-1])] == before[:-1]
    assert max(map(len, map(str.encode, after)), default=0) <= 60


def test_pieces_are_cut_at_blank_lines_then_line_ends_then_anywhere(tmp_path):
    def lengths(text):
        (tmp_path / 'a.txt').write_bytes(text)
        return [len(piece.encode()) for piece in prepare.pieces(tmp_path / 'a.txt')]

    paragraph = b'x' * 999 + b'\n' + b'y' * 998 + b'\n\n'  # 2000 bytes
    assert lengths(paragraph * 10) == [10_000, 10_000]
    assert lengths(paragraph.replace(b'\n', b'\r\n') * 6) == [10_015, 2_003]
    line = b'z' * 999 + b'\n'
    assert lengths(line * 100) == [9_000] * 4 + [64_000]  # the last 64 KB may yet get a blank line
    assert lengths(b'w' * 300_000) == [131_072, 131_072, 37_856]
    assert lengths('數'.encode() * 100_000) == [131_070, 131_070, 37_860]


def test_pylib_is_source_in_its_declared_encoding_and_docstrings_of_c(tmp_path, monkeypatch):
    files = {'b/test/t.py': b'x = 1\r\n', 'a.py': '# coding: latin-1\ns = "é"\n'.encode('latin-1'), 'bad.py': b'# coding: none\n',
             'c.txt': b'no', 'site-packages/p.py': b'no', 'b/__pycache__/q.py': b'no',
             'half.py': b'# coding: raw_unicode_escape\ns = "\\ud800"\n', 'worse.py': b's = "\xff"\n'}
    for name, content in files.items():
        (tmp_path / 'lib' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'lib' / name).write_bytes(content)
    monkeypatch.setattr(prepare.sysconfig, 'get_paths', lambda: {key: str(tmp_path / 'lib') for key in ('stdlib', 'platstdlib')})
    found = list(prepare.pylib())
    assert found[:5] == ['# coding: latin-1\ns = "é"\n', 'x = 1\n', None, None, None]
    builtin = next(text for text in found[5:] if text.startswith('"""Built-in functions'))
    assert '\ndef len(obj, /):\n    """Return the number of items in a container."""\n' in builtin
    assert '\nclass dict:\n    """dict() -> new empty dictionary\n' in builtin
    assert '    def get(self, key, default=None, /):\n' in builtin
    prepare.main([f'--out={tmp_path}/out', '--vocab_size=400', '--val_ratio=0.3', '--num_proc=1'])
    described = meta(tmp_path / 'out')
    assert described['documents']['unreadable'] == 3
    assert described['source'] == {'dataset': 'pylib', 'python': 'CPython ' + '.'.join(map(str, sys.version_info[:3]))}


def test_docstrings_of_c_are_the_same_in_every_run():
    code = 'import prepare; print(*map(prepare.c_docstrings, ["math", "builtins", "_io", "itertools", "sys"]))'
    outputs = {subprocess.run([sys.executable, '-c', imports + code], cwd=ROOT, capture_output=True, check=True,
                              env=os.environ | {'PYTHONHASHSEED': seed}).stdout
               for imports, seed in (('', '1'), ('import asyncio, decimal, unittest; ', '2'))}
    (output,) = outputs
    assert b'def acos(x, /):' in output and b' at 0x' not in output


# Refusals

@pytest.mark.parametrize('options, message', [
    ({'dataset': 'nolib'}, '--dataset=nolib: unknown, expected pylib or text:PATH'),
    ({'dataset': 'text:'}, '--dataset=text:: unknown'),
    ({'dataset': 'text:{tmp}/none'}, '{tmp}/none: no such file'),
    ({'dataset': 'text:{tmp}/*.none'}, '{tmp}/*.none: no such file'),
    ({'dataset': 'text:{tmp}/empty'}, '{tmp}/empty: no such file'),
    ({'dataset': 'text:{tmp}/blank.txt'}, 'text:{tmp}/blank.txt: the corpus is empty'),
    ({'dataset': 'text:{tmp}/broken.jsonl'}, '{tmp}/broken.jsonl:2: broken line: Expecting'),
    ({'dataset': 'text:{tmp}/list.jsonl'}, "{tmp}/list.jsonl:1: broken line: no text in a field 'text', which --text_field"),
    ({'dataset': 'text:{tmp}/surrogate.jsonl'}, '{tmp}/surrogate.jsonl:1: broken line:'),
    ({'text_field': 'body'}, "{tmp}/c.jsonl:1: broken line: no text in a field 'body'"),
    ({'dataset': 'text:{tmp}/latin.txt'}, '{tmp}/latin.txt: not UTF-8 at byte 20006'),
    ({'vocab_size': 256}, '--vocab_size=256: expected 257'),
    ({'vocab_size': 65537}, '--vocab_size=65537: expected 257'),
    ({'vocab_size': 60000}, '--vocab_size=60000: this corpus makes at most '),
    ({'val_ratio': 0}, '--val_ratio=0.0: expected a share'),
    ({'val_ratio': 1e-9}, 'text:{tmp}/c.jsonl: none of 150 documents fell into the val split: more documents, or a larger --val'),
    ({'val_ratio': 0.999999999}, 'text:{tmp}/c.jsonl: no text for the train split: more documents, or a smaller --val_ratio'),
    ({'max_tokens': -1}, '--max_tokens=-1: must not be negative'),
    ({'out': '{tmp}/c.jsonl/out'}, '{tmp}/c.jsonl: '),
    ({'out': '{tmp}/c.jsonl'}, '{tmp}/c.jsonl: in the way, it is no prepared data'),
    ({'out': '{tmp}/foreign'}, '{tmp}/foreign: in the way, it is no prepared data (no meta.json): choose another --out'),
])
def test_mistakes_are_refused_in_one_line_and_leave_nothing(tmp_path, options, message):
    write_jsonl(tmp_path / 'c.jsonl', texts(150))
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'notes').touch()
    (tmp_path / 'blank.txt').write_text('\n \n')
    (tmp_path / 'broken.jsonl').write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / 'list.jsonl').write_text('[1]\n')
    (tmp_path / 'surrogate.jsonl').write_text(r'{"text": "\ud800"}')
    (tmp_path / 'latin.txt').write_bytes(b'\xef\xbb\xbf' + b'line\n' * 4000 + b'abc\xe9def')
    before = sorted(tmp_path.rglob('*'))
    options = {'out': '{tmp}/data/out'} | options
    options = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError) as error:
        prepare.main(arguments(tmp_path / 'c.jsonl', **options))
    assert str(error.value).startswith(message.format(tmp=tmp_path)) and '\n' not in str(error.value)
    assert sorted(tmp_path.rglob('*')) == before


def test_largest_vocabulary_that_is_named_works(corpus, tmp_path):
    with pytest.raises(UserError) as error:
        prepared(corpus, tmp_path / 'out', vocab_size=60000)
    largest = str(error.value).split('at most ')[1].split()[0]
    assert meta(prepared(corpus, tmp_path / 'out', vocab_size=largest))['vocab_size'] == int(largest)


def test_mistakes_end_the_program_with_exit_code_2_and_no_traceback(corpus, tmp_path):
    result = command('--vocab_size=1', '--val_ratio=2', '--seeed=1')
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.count('\n') == 3
    assert all(part in result.stderr for part in ('--vocab_size=1:', '--val_ratio=2.0:', "'seeed'"))
    result = command(*arguments(tmp_path / 'none', tmp_path / 'out'))
    assert (result.returncode, result.stderr.count('\n'), result.stdout) == (2, 1, '')


def test_full_disk_is_one_line_and_leaves_nothing(corpus, tmp_path):
    code = ('import resource, sys, configurator, prepare\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n'
            'configurator.run(prepare.main)')
    process = start(code, *arguments(corpus, tmp_path / 'out'))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stderr == f'{tmp_path}/out: File too large\n'
    assert sorted(tmp_path.iterdir()) == [corpus]


# Finished, interrupted and killed preparations

def test_finished_preparation_is_left_alone(corpus, tmp_path, capsys):
    out = prepared(corpus, tmp_path / 'out')
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    prepared(corpus, out)
    assert capsys.readouterr().out == f'{out} is already prepared: nothing to do\n'
    for change in ({'vocab_size': 310}, {'seed': 2}, {'val_ratio': 0.3}, {'max_tokens': 1000}):
        (key, value), = change.items()
        with pytest.raises(UserError, match=f'was prepared with {key} .*, not {value}: remove it, or choose another --out'):
            prepared(corpus, out, **change)
    write_jsonl(corpus, texts(151))
    with pytest.raises(UserError, match='was prepared with source .*not'):
        prepared(corpus, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_empty_directory_and_link_to_one_are_filled(corpus, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'elsewhere')
    assert bins(prepared(corpus, tmp_path / 'empty')) == bins(prepared(corpus, tmp_path / 'link'))
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'elsewhere' / 'meta.json').is_file()


@pytest.mark.parametrize('function, call', [('train_tokenizer', 1), ('encode', 1), ('fsync', 2), ('fsync', 4), ('fsync', 5)])
def test_killed_preparation_leaves_nothing_that_looks_finished_and_the_next_one_works(corpus, tmp_path, function, call):
    code = ('import os, prepare, sys\n'
            f'original, calls = prepare.{function}, []\n'
            'def kill(*arguments):\n'
            f'    calls.append(1) or len(calls) == {call} and os.kill(os.getpid(), 9)\n'
            '    return original(*arguments)\n'
            f'prepare.{function} = kill\n'
            'prepare.main(sys.argv[1:])')
    process = start(code, *arguments(corpus, tmp_path / 'out'))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert leftovers(tmp_path) == [f'.out.tmp-{process.pid}'] and not (tmp_path / 'out').exists()
    expected = prepared(corpus, tmp_path / 'uninterrupted')
    assert bins(prepared(corpus, tmp_path / 'out')) == bins(expected)
    assert leftovers(tmp_path) == []


def test_work_of_a_living_preparation_is_left_alone(corpus, tmp_path):
    mine, others, foreign = (tmp_path / f'.out.tmp-{suffix}' for suffix in (os.getpid(), os.getppid(), 'x'))
    for folder in (mine, others, foreign):  # in a container a killed preparation can have had our own process id
        folder.mkdir()
        (folder / 'meta.json').write_text('{}')
    prepared(corpus, tmp_path / 'out')
    assert leftovers(tmp_path) == sorted([others.name, foreign.name])


def test_of_two_equal_preparations_the_faster_one_wins(corpus, tmp_path, monkeypatch):
    original = prepare.encode_corpus

    def overtaken(*arguments):
        result = original(*arguments)
        assert command(*map(str, globals()['arguments'](corpus, tmp_path / 'out'))).returncode == 0
        return result

    monkeypatch.setattr(prepare, 'encode_corpus', overtaken)
    prepared(corpus, tmp_path / 'out')
    assert TokenData(tmp_path / 'out', 8, 300).train_tokens > 0 and leftovers(tmp_path) == []


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_preparation_cleans_up(large, tmp_path, number, code):
    process = subprocess.Popen([sys.executable, ROOT / 'prepare.py', *arguments(large[0], tmp_path / 'out')],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().endswith('reading\n')
    assert leftovers(tmp_path) == [f'.out.tmp-{process.pid}']
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == '' and process.returncode == code
    assert list(tmp_path.iterdir()) == []


WITH_WORKERS = '''
import multiprocessing, os, prepare, signal, sys, time, configurator
if __name__ == '__main__':
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has us ignore it
    prepare.BATCH, prepare.TOKENIZER_BATCHES = 3000, 3
    original = prepare.batches
    def batches(*arguments):
        for batch in original(*arguments):
            yield batch
            if workers := multiprocessing.active_children():
                {action}
    prepare.batches = batches
    configurator.run(prepare.main)
'''


def test_death_of_a_worker_ends_the_preparation(corpus, tmp_path):
    process = start(WITH_WORKERS.format(action='workers[0].kill()'), *arguments(corpus, tmp_path / 'out', num_proc=2))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr == 'one of the 2 processes that encode died (out of memory?): try a smaller --num_proc\n'
    assert list(tmp_path.iterdir()) == [corpus]


def test_workers_do_not_outlive_a_killed_preparation(corpus, tmp_path):
    process = start(WITH_WORKERS.format(action='os.kill(os.getpid(), 9)'), *arguments(corpus, tmp_path / 'out', num_proc=2))
    process.communicate(timeout=20)  # returns when the last of them has closed the pipe
    assert process.returncode == -signal.SIGKILL


def test_ctrl_c_reaches_the_parent_alone(corpus, tmp_path):
    action = 'time.sleep(0.1); os.killpg(0, 2)'  # while a worker imports, where it would die with a traceback
    process = start(WITH_WORKERS.format(action=action), *arguments(corpus, tmp_path / 'out', num_proc=2))
    assert process.communicate(timeout=60)[1] == '' and process.returncode == 130
    assert list(tmp_path.iterdir()) == [corpus]


def test_prepare_starts_without_torch():
    process = start('import prepare, sys; print("torch" in sys.modules)')
    assert process.communicate()[0] == 'False\n'
