"""Token files of nanoGPT, llm.c and modded-nanogpt, and the text of nanochat."""
import json
import os

import numpy as np
import pytest

import prepare
from corpora import show
import train
from corpora import building
from corpora import opening
from configurator import UserError
from data import TokenData, data_dir
from corpora.shards import open_data, pack, validate
from test_data import VOCAB, counting, tokenizer
from test_wide import gemma, saved


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The path of a tokenizer.json of 300 ids, the end of text 299, in a directory to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'theirs').mkdir()
    return saved(tokenizer(), tmp_path / 'tokenizer.json')


def with_header(file, ids, magic=20240520, version=1, count=None, dtype='<u2'):
    header = np.zeros(256, '<i4')
    header[:3] = magic, version, len(ids) if count is None else count
    file.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


def raw(file, ids, dtype='<u2'):
    np.asarray(ids, dtype).tofile(file)


def link(*words, path='theirs', tokenizer='tokenizer.json'):
    prepare.main([f'--dataset=bins:{path}', f'--tokenizer={tokenizer}', '--out=out', *words])
    return TokenData('out', 16, 80_000)


def whole(data, split):
    return data.read(split, 0, sum(map(len, data.shards[split])))


def test_nanogpts_files_are_used_where_they_are(names, tmp_path):
    raw(tmp_path / 'theirs' / 'train.bin', counting(1000))
    raw(tmp_path / 'theirs' / 'val.bin', counting(500))
    data = link()
    assert (whole(data, 'train') == counting(1000)).all() and (whole(data, 'val') == counting(500)).all()
    assert os.readlink(tmp_path / 'out' / 'train.bin') == str(tmp_path / 'theirs' / 'train.bin')
    meta = data.meta
    assert (meta['vocab_size'], meta['eot_id'], 'dtype' in meta) == (VOCAB, VOCAB - 1, False)
    assert meta['files']['val'][0] | {'sha256': ''} == {
        'name': 'val.bin', 'offset': 0, 'tokens': 500, 'size': 1000, 'max_id': VOCAB - 2, 'sha256': ''}
    assert json.loads((tmp_path / 'out' / 'tokenizer.json').read_text()) == tokenizer()


@pytest.mark.parametrize('train_names, val_name', [
    (['fineweb_train_000001.bin', 'fineweb_train_000002.bin'], 'fineweb_val_000000.bin'),  # modded-nanogpt
    (['tiny_shakespeare_train.bin'], 'tiny_shakespeare_val.bin')])  # llm.c
def test_the_header_of_a_file_is_skipped(names, tmp_path, train_names, val_name):
    for k, name in enumerate(train_names):
        with_header(tmp_path / 'theirs' / name, counting(1000 + k))
    with_header(tmp_path / 'theirs' / val_name, counting(100))
    data = link()
    assert whole(data, 'train').tolist() == [*counting(1000), *(counting(1001) if train_names[1:] else [])]
    assert whole(data, 'val').tolist() == counting(100).tolist()
    x, y = data.batch(0, 0, 4, 4)
    assert (y[:, :-1] == x[:, 1:]).all()


def test_llama_3s_files_have_ids_of_32_bits(names, tmp_path):
    saved(gemma(70_000), tmp_path / 'wide.json')
    for name, ids in (('train', [5, 70_000] * 200), ('val', [6] * 100)):
        with_header(tmp_path / 'theirs' / f'{name}.bin', ids, 20240801, 7, dtype='<u4')
    data = link(tokenizer='wide.json')
    assert data.meta['dtype'] == 'uint32' and data.gather('train', np.array([1]))[0].max() == 70_000
    assert whole(data, 'train').tolist() == [5, 70_000] * 200


@pytest.mark.parametrize('counts, ratio, train_counts, val_counts', [
    ((1000,), 0.1, [900], [100]), ((500, 500), 0.1, [500, 400], [100]), ((600, 300, 100), 0.1, [600, 300], [100]),
    ((600, 300, 100), 0.2, [600, 200], [100, 100])])
def test_without_a_val_file_the_last_tokens_are_validation(
        names, tmp_path, capsys, counts, ratio, train_counts, val_counts):
    ids = np.arange(1000) % 251
    for k, part in enumerate(np.split(ids, np.cumsum(counts)[:-1])):
        with_header(tmp_path / 'theirs' / f'part_{k}.bin', part)
    data = link(f'--val_ratio={ratio}')
    assert [len(part) for part in data.shards['train']] == train_counts
    assert [len(part) for part in data.shards['val']] == val_counts
    assert [*whole(data, 'train'), *whole(data, 'val')] == ids.tolist()
    assert (f'no file has val in its name: the last {sum(val_counts)} tokens are the validation split '
            f'(--val_ratio={ratio})') in capsys.readouterr().out
    other = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    other['files']['train'][-1]['tokens'] -= 1
    (tmp_path / 'out' / 'meta.json').write_text(json.dumps(other))
    assert TokenData('out', 16, 300).fingerprint != data.fingerprint


def test_a_glob_selects_files_and_test_files_are_left_out(names, tmp_path, capsys):
    for name in ('a_train.bin', 'a_val.bin', 'a_test.bin', 'b_train.bin'):
        raw(tmp_path / 'theirs' / name, counting(len(name) * 10))
    data = link(path='theirs/a_*.bin')
    assert data.train_tokens == 110 and 'left out: a_test.bin' in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / 'out').glob('*.bin')) == ['a_train.bin', 'a_val.bin']


def header(*arguments, **options):
    """Makes train.bin with a header."""
    return lambda folder: with_header(folder / 'train.bin', *arguments, **options)


def content(raw):
    return lambda folder: (folder / 'train.bin').write_bytes(raw)


def single_token(folder):
    (folder / 'val.bin').unlink()
    raw(folder / 'x.bin', [1])


IDS = counting(99)


@pytest.mark.parametrize('make, message', [
    (header(IDS, count=100), 'train.bin: its header says 100 tokens, but 2 bytes are missing'),
    (header(IDS, count=98), 'train.bin: its header says 98 tokens, but 2 bytes are too many'),
    (header([], count=0), 'train.bin: its header says 0 tokens, expected at least 1'),
    (header([1], count=-1), 'train.bin: its header says -1 tokens'),
    (header(IDS, version=2), 'train.bin: version 2 of the format 20240520, expected 1'),
    (header(IDS, magic=20240519), 'has the unknown magic number 20240519, expected 20240520 or'),
    (header(IDS, magic=20240522), "questions with answers (llm.c's evaluation"),
    (content(np.array([20240520], '<i4').tobytes()), 'train.bin: truncated, 4 bytes are less than'),
    (content(b'abc'), 'train.bin: 3 bytes, expected ids of 2 bytes each'),
    (content(b''), 'train.bin: 0 bytes, expected ids'),
    (content(bytes([1, 0, 44, 1])), 'train.bin: id 300 at position 1 is outside the vocabulary of 300: another'),
    (lambda folder: (folder / 'train.bin').symlink_to(folder / 'gone'), 'train.bin: broken symbolic link to'),
    (lambda folder: (folder / 'train.bin').mkdir(), 'train.bin: Is a directory'),
    (header(IDS, 20240801, 7, dtype='<u4'), 'ids of uint16 and uint32: give files of only one'),
    (lambda folder: None, 'theirs: none of its .bin files is for training: val.bin'),
    (lambda folder: (folder / 'val.bin').unlink(), 'theirs: no such file, and no directory or glob with .bin files'),
    (single_token, 'x.bin: 1 token cannot be both training and validation'),
])
def test_an_unknown_format_is_refused_in_one_line_and_leaves_nothing(names, tmp_path, make, message):
    raw(tmp_path / 'theirs' / 'val.bin', counting(100))
    make(tmp_path / 'theirs')
    with pytest.raises(UserError) as error:
        link()
    assert message in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.out*'))


def test_the_tokenizer_must_be_named_and_a_pickle_is_not_opened(names, tmp_path):
    raw(tmp_path / 'theirs' / 'train.bin', counting(1000))
    with pytest.raises(UserError, match='theirs: give the tokenizer that made these tokens: --tokenizer=gpt2, or'):
        link(tokenizer='bpe')
    (tmp_path / 'theirs' / 'meta.pkl').write_bytes(b'cos\nsystem\n(S"touch opened"\ntR.')
    with pytest.raises(UserError, match='Its meta.pkl is not read, because opening a pickle can run any program'):
        link(tokenizer='bpe')
    assert not (tmp_path / 'opened').exists()


def test_options_that_select_text_are_refused(names, tmp_path):
    raw(tmp_path / 'theirs' / 'train.bin', counting(1000))
    for words in (['--max_tokens=100'], ['--max_documents=3'], ['--shard=0/2']):
        with pytest.raises(UserError, match='the files of theirs are used as they are: leave it out'):
            link(*words)


def test_linked_files_are_verified_packed_shown_and_read_again_when_they_change(names, tmp_path, capsys):
    raw(tmp_path / 'theirs' / 'a.bin', counting(1000))
    data = link('--val_ratio=0.1')
    found = validate('out', say=lambda line: None)
    assert (found['tokens'], found['files'], found['max_id']) == (1000, 1, VOCAB - 2)
    pack('out', 50, tmp_path / 'rows', say=lambda line: None)
    assert open_data(tmp_path / 'rows', 49, VOCAB).train_tokens == 900
    show.show('out', n=1, say=lambda line: None)
    assert link('--val_ratio=0.1').fingerprint == data.fingerprint and 'nothing to do' in capsys.readouterr().out
    raw(tmp_path / 'theirs' / 'a.bin', [7] + [1] * 999)
    os.utime(tmp_path / 'theirs' / 'a.bin', ns=(0, 1))
    with pytest.raises(UserError, match='a.bin: damaged'):
        TokenData('out', 16, VOCAB)
    with pytest.raises(UserError, match='out was prepared before its source files were changed'):
        link('--val_ratio=0.1')


def test_train_py_reads_linked_files_by_dataset(names, tmp_path, monkeypatch):
    with_header(tmp_path / 'theirs' / 'x_train_1.bin', counting(1000))
    with_header(tmp_path / 'theirs' / 'x_val_0.bin', counting(100))
    monkeypatch.setattr(opening.subprocess, 'run',
                        lambda command: prepare.main(command[2:]) or type('', (), {'returncode': 0}))
    config = train.load(['--dataset=bins:theirs', '--tokenizer=tokenizer.json', f'--vocab_size={VOCAB}',
                         '--block_size=16'])
    data = opening.open_dataset(config)
    assert data.path == data_dir('bins:theirs', 'tokenizer.json') and data.train_tokens == 1000
    assert opening.open_dataset(config).fingerprint == data.fingerprint
    os.utime(tmp_path / 'theirs' / 'x_val_0.bin', ns=(0, 1))
    with pytest.raises(UserError, match='was prepared before its source files were changed'):
        opening.open_dataset(config)


def test_the_last_file_of_nanochat_is_validation_even_in_a_part(names, tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    for k in range(3):
        table = pa.table({'text': [f'file {k} text {i} ' * 9 for i in range(20)]})
        pq.write_table(table, tmp_path / 'theirs' / f'shard_{k:05d}.parquet')
    data = link('--max_tokens=1000', '--num_proc=1')
    encoding = building.load_tokenizer('out')
    val, text = encoding.decode(whole(data, 'val').tolist()), encoding.decode(whole(data, 'train').tolist())
    assert val.split('<|endoftext|>') == [*(f'file 2 text {i} ' * 9 for i in range(20)), '']
    assert 'file 0' in text and 'file 2' not in text and data.train_tokens == 1000
    prepare.main(['--dataset=bins:theirs', '--vocab_size=270', '--out=bpe', '--num_proc=1'])
    assert TokenData('bpe', 16, 270).meta['documents']['val'] == 20
    for k in range(2):
        (tmp_path / 'theirs' / f'shard_{k:05d}.parquet').unlink()
    with pytest.raises(UserError, match='theirs: one .parquet file, expected at least two, because the last one is'):
        prepare.main(['--dataset=bins:theirs', '--vocab_size=270', '--out=other', '--num_proc=1'])
