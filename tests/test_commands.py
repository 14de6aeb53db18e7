"""From downloaded files or rows of ids to a trained model, with only the commands of the README."""
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from corpora import shards
import train
from corpora import opening
from configurator import UserError
from data import TokenData
from runs import SMALL, finish, lines
from test_prepare import ROOT, documents, meta, texts, write_jsonl

COLUMNS = ('text', 'id', 'dump', 'url', 'date', 'file_path', 'language', 'language_score', 'token_count', 'score', 'int_score')


def fineweb(path, documents, scores):
    """A file of FineWeb-Edu, with its columns, in several row groups."""
    rows = [dict(zip(COLUMNS, (text, f'<urn:uuid:{i}>', 'CC-MAIN-2024-10', f'https://example.com/{i}', '2024-03-01T00:00:00Z',
                               's3://crawl/0.warc.gz', 'en', 0.95, len(text.split()), score, round(score))))
            for i, (text, score) in enumerate(zip(documents, scores))]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)


def run(*words):
    prepare.main(list(map(str, words)))


def test_fineweb_edu_from_downloaded_files_is_filtered_deduplicated_and_counted(tmp_path, capsys):
    kept, low = texts(150), texts(60, seed=1)
    fineweb(tmp_path / 'in' / 'a.parquet', [*kept[:80], *low], [3.2] * 80 + [2.4] * 60)
    fineweb(tmp_path / 'in' / 'b.parquet', [*kept[80:], kept[0], kept[99]], [4.6] * 70 + [2.6] * 2)  # rounded to 3
    words = ['--dataset=fineweb_edu', f"--source={tmp_path / 'in'}", '--vocab_size=300', '--val_ratio=0.2', '--num_proc=1']
    run(*words, f"--out={tmp_path / 'out'}")
    made = meta(tmp_path / 'out')
    assert sorted(documents(tmp_path / 'out', 'train') + documents(tmp_path / 'out', 'val')) == sorted(kept)
    assert {key: made['documents'][key] for key in ('read', 'low_score', 'duplicates')} == {'read': 212, 'low_score': 60, 'duplicates': 2}
    assert made['documents']['train'] + made['documents']['val'] == 150 and 'score >= 3' in made['filter']
    assert '212 documents read, 150 kept, 2 duplicates, 60 low_score' in capsys.readouterr().out

    run(*words, '--max_tokens=5000', f"--out={tmp_path / 'less'}")
    assert TokenData(tmp_path / 'less', 16, 300).train_tokens == 5000
    run(*words, '--min_score=2', f"--out={tmp_path / 'more'}")
    assert meta(tmp_path / 'more')['documents']['train'] + meta(tmp_path / 'more')['documents']['val'] == 210


def test_wikitext_from_downloaded_files_keeps_its_splits_and_the_raw_test_split(tmp_path):
    split = {name: [line for i in range(n) for line in ('', f' = Title {name} {i} = \n', '', f' some <unk> words of {i} , @-@ here . \n')]
             for name, n in (('train', 20), ('validation', 5), ('test', 3))}
    folder = tmp_path / 'in' / 'wikitext-2-raw-v1'
    folder.mkdir(parents=True)
    for name, rows in split.items():
        pq.write_table(pa.table({'text': rows}), folder / f'{name}-00000-of-00001.parquet')
    run('--dataset=wikitext2', f"--source={tmp_path / 'in'}", '--vocab_size=260', '--num_proc=1', f"--out={tmp_path / 'out'}")
    made = meta(tmp_path / 'out')
    assert (made['documents']['train'], made['documents']['val'], made['val_ratio']) == (20, 5, None)
    for name, own in (('train', 'train'), ('val', 'validation')):
        assert ''.join(documents(tmp_path / 'out', name)) == ''.join(line or '\n' for line in split[own])
    raw = ''.join(line or '\n' for line in split['test'])
    assert (tmp_path / 'out' / 'test.txt').read_bytes() == raw.encode()
    assert (made['test']['words'], made['test']['lines']) == (len(raw.split()), 12) == (3 * 14, 12)


    words = ['--dataset=wikitext2', f"--source={tmp_path / 'in'}", '--vocab_size=260', '--num_proc=1']
    for limit, train in (('--max_documents=3', 3), ('--max_tokens=150', None)):  # of train alone: val stays whole
        run(*words, limit, f"--out={tmp_path / limit}")
        assert documents(tmp_path / limit, 'val') == documents(tmp_path / 'out', 'val')
        whole, part = (documents(tmp_path / name, 'train') for name in ('out', limit))
        assert 0 < len(part) < 20 and part[:-1] == whole[:len(part) - 1] and train in (None, len(part))


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    """A directory with a text, its bins under data/, and rows of 1,025 ids made of them."""
    folder = tmp_path_factory.mktemp('packed')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / 'text.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts(1200)))
        run('pack', '--dataset=text:text.jsonl', '--out=rows', '--row=1025', '--rows_per_shard=20', '--vocab_size=300',
            '--val_ratio=0.2', '--num_proc=1')
    return folder


def test_any_corpus_is_packed_as_rows_validated_shown_and_split(packed, monkeypatch, capsys):
    monkeypatch.chdir(packed)
    bins, = (packed / 'data').iterdir()
    ids = np.concatenate([np.load(file).ravel() for file in sorted((packed / 'rows' / 'train').glob('*.npy'))])
    assert (ids == np.fromfile(bins / 'train.bin', '<u2')[:len(ids)]).all() and len(ids) > 90_000
    capsys.readouterr()
    run('validate', 'rows')
    said = capsys.readouterr().out
    assert '300' in re.search('vocabulary +(.*)', said)[1] and re.search('shape +(.*)', said)[1].endswith(', 1,025)')
    run('validate', bins)
    said = capsys.readouterr().out
    assert re.search('sequences +(.*)', said)[1] == '1,200' and re.search('format +(.*)', said)[1] == 'bin'
    run('show', 'rows', '--n=2')
    said = capsys.readouterr().out
    assert said.count('--- row') == 2 and 'résumé' in said and (packed / 'runs' / 'data_rows.png').read_bytes()[1:4] == b'PNG'
    run('split', 'rows/train', 'again', '--val_ratio=0.4')
    assert len(meta(packed / 'again')['files']['train']) == 5 and shards.open_data(packed / 'again', 1024, 300).tokenizer is None
    for words, message in ((['split', 'rows/train', 'new', '--val_ratio=1'], '--val_ratio=1'),
                           (['pack', f'--dataset={bins}', '--max_tokens=100', '--out=new', '--row=50'],
                            f'--max_tokens=100: {bins} is already prepared, and all of it is packed'),
                           (['split', 'rows/train', 'data'], 'exists but is not a prepared'),
                           (['show'], 'name a directory'), (['validate', 'nothing'], 'nothing: no such'),
                           (['show', 'nothing'], 'nothing'), (['join', 'nothing'], 'nothing'), (['recommend', 'nothing'], 'nothing')):
        with pytest.raises(UserError) as error:
            run(*words)
        assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (packed / 'new').exists()


@pytest.mark.parametrize('rows, block_size', [('rows/train', 1024), ('rows', 205)])  # 1,024 divides the row but for its last token
def test_a_preset_of_resonance_trains_on_rows_by_one_command(packed, monkeypatch, rows, block_size):
    monkeypatch.chdir(packed)
    small = [word for word in SMALL if word.startswith(('--vocab', '--n_', '--device', '--batch_size', '--learning', '--log'))]
    out = packed / f'run{block_size}'
    words = [f'{ROOT}/config/resonance_small.py', f'--dataset=shards:{rows}', f'--block_size={block_size}', '--num_frequencies=8',
             f'--batch_tokens={4 * block_size}', '--max_steps=6', '--warmup_steps=1', '--schedule=constant', '--eval_interval=3',
             f'--eval_tokens={4 * block_size}', '--save_interval=0', '--tokenizer=none']
    code, said = finish([*words, *small, f'--out_dir={out}'])
    assert code == 0, said
    assert ('preparing shards:rows' in said) == (rows == 'rows/train')  # the others are split already
    losses = [line['loss'] for line in lines(out, 'eval')]
    assert abs(losses[0] - np.log(300)) < 0.5 and losses[-1] < losses[0] - 0.2


def test_without_a_network_a_run_ends_with_the_reason_and_the_command_to_add_options_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    code, said = finish([*SMALL, '--dataset=fineweb_edu', '--max_steps=40', f"--out_dir={tmp_path / 'run'}"])
    reason, command = said.splitlines()[-2:]
    assert code == 2 and 'Traceback' not in said and 'HF_HUB_OFFLINE' in reason and '--source=' in reason and '--dataset=pylib' in reason
    assert 'python prepare.py --dataset=fineweb_edu' in command and '--vocab_size=300' in command
    assert not [*tmp_path.glob('data/*'), *tmp_path.glob('data/.*')] and not (tmp_path / 'run').exists()


def test_a_run_is_refused_if_the_text_of_its_data_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write_jsonl(Path('notes.jsonl'), texts(300))
    wanted = train.load([*SMALL, '--dataset=text:notes.jsonl'])
    data = opening.open_dataset(wanted)
    assert re.fullmatch(r'data/text-notes\.jsonl-\w{6}-300', str(data.path)) and opening.open_dataset(wanted).fingerprint == data.fingerprint
    write_jsonl(text, texts(301))
    with pytest.raises(UserError, match=f'{data.path} was prepared with source .*bytes.*--dataset={data.path}'):
        opening.open_dataset(wanted)
    assert opening.open_dataset(train.load([*SMALL, f'--dataset={data.path}'])).fingerprint == data.fingerprint


def test_rows_that_changed_since_they_were_split_are_refused(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packed / 'rows/train', 'rows')
    wanted = train.load([*SMALL, '--dataset=shards:rows', '--block_size=1024', '--batch_tokens=4096'])
    data = opening.open_dataset(wanted)
    assert opening.open_dataset(wanted).fingerprint == data.fingerprint
    os.utime(next(Path('rows').glob('*.npy')), ns=(0, 0))
    with pytest.raises(UserError, match='before its source files were changed: remove it to split them again, or use it as it is'):
        opening.open_dataset(wanted)


def test_runs_of_different_length_do_not_share_a_part_of_fineweb_edu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(opening.subprocess, 'run', lambda command: calls.append(command) or SimpleNamespace(returncode=5))
    for steps in (1000, 1001, 20_000):
        with pytest.raises(SystemExit) as error:
            opening.open_dataset(train.load([*SMALL, '--dataset=fineweb_edu', f'--max_steps={steps}']))
        assert error.value.code == 5
    outs, budgets = ([next(word for word in call if word.startswith(key)) for call in calls] for key in ('--out=', '--max_tokens='))
    assert outs == ['--out=data/fineweb_edu-130k-300', '--out=data/fineweb_edu-130k-300', '--out=data/fineweb_edu-2600k-300']
    assert budgets == ['--max_tokens=130000', '--max_tokens=130000', '--max_tokens=2600000']
    assert [opening.enough_tokens(tokens) for tokens in (0, 98, 99, 999_999, 1_000_000)] == [1, 99, 100, 1_000_000, 1_100_000]
