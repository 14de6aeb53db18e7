"""recommend: every figure equals the hand computation, and every printed command is accepted."""
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_show import VOCAB, bins, said, shards, tokenizer

import prepare
import train
from corpora import opening, recommend
from runtime import profiling
from settings import micro_batches
from configurator import UserError
from data import data_dir
from model import GPT, GPTConfig
from optim import make_optimizers
from corpora.recommend import Corpus, Plan
from runtime.runlog import duration


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The presets are dense_tiny and trix_tiny, and this machine trains at 1 GFLOP/s."""
    (tmp_path / 'config').mkdir()
    for name in ('dense_tiny', 'trix_tiny'):
        shutil.copy(recommend.CONFIGS / f'{name}.py', tmp_path / 'config')
    monkeypatch.setattr(recommend, 'CONFIGS', tmp_path / 'config')
    monkeypatch.setattr(recommend, 'achieved', lambda device, dtype: (1e9, 'as agreed'))


@pytest.fixture
def unmeasured(monkeypatch):
    """For what is not about memory: a step takes 60 MB."""
    monkeypatch.setattr(recommend, 'estimate', lambda *_: lambda rows, checkpointing: {'parameters': 6e7})


def cells(text, name):
    return re.split(r' {2,}', next(line for line in text.splitlines() if line.startswith(name + ' ')))


def test_the_table_has_the_figures_computed_by_hand(tmp_path, two):
    V, C, T, layers, tokens = 1024, 128, 128, 3, 1220 * 4096
    attention, gelu, tile = 4 * C * C, 8 * C * C, 2 * 128 * C
    dense = V * C + layers * (attention + gelu + 2 * C) + C + 4 * C  # taps
    trix = V * C + layers * (attention + 8 * tile + 2 * C) + C + 4 * C
    dense_flops = 6 * (V * C + layers * (attention + gelu)) + 12 * C * T * layers
    trix_flops = 6 * (V * C + layers * (attention + 2 * tile)) + 12 * C * T * layers + 3 * layers * 2 * 8 * C
    for file in recommend.CONFIGS.glob('*.py'):  # smaller ones are measured sooner
        file.write_text(f'{file.read_text()}\nblock_size, vocab_size = {T}, {V}\n')
    text, _ = said(recommend.recommend, bins(tmp_path / 'd', [np.zeros(1_000_000)], np.zeros(300)), 'cpu')
    for name, size, flops in (('dense_tiny', dense, dense_flops), ('trix_tiny', trix, trix_flops)):
        row = cells(text, name)
        assert row[1:5] == [f'{size:,}', f'{1e6 / size:.3g}', f'{tokens / 1e6:.3g}', f'{flops * tokens:.2e}']
        assert row[5] == duration(flops * tokens / 1e9) and row[7] == 'yes'
        config = train.load([f'{recommend.CONFIGS}/{name}.py'])
        model = GPT(config.pick(GPTConfig))
        step = profiling.memory_breakdown(model, list(make_optimizers(model, config, torch.device('cpu')).values()), 16, torch.device('cpu'), torch.float32)
        size, unit = row[6].split()
        assert float(size) * {'MB': 1e6, 'GB': 1e9}[unit] == pytest.approx(step[-1][1], rel=0.05)
    assert '50k parameters' in text and '200k' in text and 'as agreed' in text


def test_a_preset_that_can_not_hold_the_data_is_left_out_with_the_reason(tmp_path):
    path = shards(tmp_path / 's', {'train': [np.full((2, 300), 7)], 'val': [np.full((1, 300), 7)]}, vocab_size=9000)
    text, _ = said(recommend.recommend, path, 'cpu')
    reasons = dict(re.split(r' {2,}', line.strip(), maxsplit=1) for line in text.splitlines() if line.startswith('  '))
    assert sorted(reasons) == sorted(file.stem for file in recommend.CONFIGS.glob('*.py'))
    assert reasons.pop('finetune_shakespeare') == 'it finetunes gpt2, which has its own tokenizer'
    assert all(re.match('its (vocabulary|block_size) of', reason) for reason in reasons.values()), reasons
    assert reasons['trix_tiny'] == 'its vocabulary of 8,192 is smaller than the 9,000 of the data'
    assert reasons['trix_small'] == 'its block_size of 256 divides neither rows of 300 tokens nor 299'
    assert text.endswith('use the nearest one with --vocab_size=9000, --block_size=300')


@pytest.mark.parametrize('row, suited', [(512, True), (513, True), (514, False), (256, True), (255, False), (257, True)])
def test_a_block_size_must_cut_a_row_of_shards_without_a_rest(row, suited):
    corpus = Corpus('x/y', 10**6, 10**4, 300, row)
    assert (recommend.unsuited(GPTConfig(block_size=256), corpus) == '') == suited


def test_bins_must_hold_a_window_in_both_splits():
    assert recommend.unsuited(GPTConfig(block_size=256), Corpus('x/y', 257, 257, 300)) == ''
    assert 'the val split has 256 tokens, fewer than one window of block_size + 1 = 257' in recommend.unsuited(
        GPTConfig(block_size=256), Corpus('x/y', 257, 256, 300))


def test_too_little_data_is_a_user_error(tmp_path):
    for train_tokens, val_tokens in ((64, 300), (300, 64)):
        path = bins(tmp_path / f'{train_tokens}', [np.zeros(train_tokens)], np.zeros(val_tokens))
        with pytest.raises(UserError, match='each split needs one window of the smallest preset, block_size . 1 = 65: prepare'):
            recommend.recommend(path, 'cpu', say=lambda _: None)
    with pytest.raises(UserError, match='no such file'):
        recommend.recommend(tmp_path / 'nothing', 'cpu', say=lambda _: None)
    with pytest.raises(UserError, match='--card_gb=-1'):
        recommend.recommend(tmp_path / '300', 'cpu', -1, say=lambda _: None)


def commands(text, beginning):
    return [shlex.split(line.strip()) for line in text.splitlines() if line.startswith(f'  {beginning}')]


@pytest.mark.parametrize('tokens', [300, 1_000_000])
def test_its_commands_are_accepted_and_their_steps_are_what_the_data_feed(tmp_path, two, unmeasured, tokens):
    path = bins(tmp_path / 'a folder', [np.zeros(tokens)], np.zeros(300))
    text, _ = said(recommend.recommend, path, 'cpu')
    python, several = commands(text, 'python'), commands(text, 'torchrun')
    assert python[0][:3] == ['python', 'train.py', 'config/dense_tiny.py'] and several[0][3:] == python[0][1:]
    config = train.load(python[0][2:])
    assert config.dataset == str(path) and config.max_steps == max(1, 4 * tokens // 4096)  # 4 epochs: fewer than 20 a parameter
    assert several[0][:3] == ['torchrun', '--standalone', f'--nproc_per_node={max(2, torch.cuda.device_count())}']
    assert 'a smaller model' in text


def test_enough_data_give_twenty_tokens_a_parameter_and_no_more():
    p = Plan('dense_tiny', 1_000_000, 6e6, 4096, 100, 1e9)
    text = recommend.advice(p, Corpus('x/y', 10_000_000), 1e12, 2e9)
    assert '--max_steps=4882' in text and '2 epochs' in text and 'suit better' not in text
    assert f'{6e6 * 4882 * 4096:.2e} FLOPs, about 2 min' in text  # 4882 = 20e6 // 4096
    assert 'enough for a larger model' in recommend.advice(p, Corpus('x/y', 30_000_000), 1e12, 2e9)
    assert '1.0 GB do not fit' in recommend.advice(p, Corpus('x/y', 10_000_000), 1e12, 5e8)


def test_the_best_preset_is_the_one_whose_size_the_data_feed():
    plans = [Plan(str(n), n, 6 * n, 4096, 100, 16 * n) for n in (10**5, 10**6, 3 * 10**6, 10**8)]
    assert [p.name for p in recommend.best(plans, 20 * 10**6, 1e12)] == ['3000000', '1000000']  # 1M to 4M: the larger first
    assert [p.name for p in recommend.best(plans, 20 * 10**6, 20e6)] == ['1000000']  # with memory for that
    assert [p.name for p in recommend.best(plans, 10**12, 1e12)] == ['100000000']
    assert [p.name for p in recommend.best(plans, 1000, 1.0)] == ['100000']  # none fits: the nearest all the same
    assert [recommend.mismatch(n, 20 * 10**6) for n in (10**6, 4 * 10**6)] == [0, 0]
    assert recommend.mismatch(5 * 10**5, 20 * 10**6) == pytest.approx(math.log(2)) == recommend.mismatch(8 * 10**6, 20 * 10**6)


def test_whether_it_fits_is_judged_by_the_card_that_is_named(tmp_path, two, unmeasured):
    path = bins(tmp_path / 'd', [np.zeros(1000)], np.zeros(300))
    small, large = said(recommend.recommend, path, 'cpu', 0.05)[0], said(recommend.recommend, path, 'cpu', 16)[0]
    assert cells(small, 'trix_tiny')[7] == 'no' and cells(large, 'trix_tiny')[7] == 'yes'
    assert 'do not fit' in small and 'do not fit' not in large
    assert 'The memory of a card of 16 GB is 16.0 GB' in large and 'keeps in bfloat16' in large


def test_shards_that_were_not_split_are_read_for_their_vocabulary(tmp_path, two, unmeasured):
    (tmp_path / 's').mkdir()
    for k, rows in enumerate((3, 5)):
        np.save(tmp_path / 's' / f'{k}.npy', np.zeros((rows, 512), np.uint16))
    text, _ = said(recommend.recommend, tmp_path / 's', 'cpu')
    assert '4,096 train tokens in rows of 512, vocabulary 1,' in text and 'not split off yet' in text
    assert 'no tokenizer.json beside these rows' in text and '--tokenizer=none' in commands(text, 'python')[0]
    assert f'--dataset=shards:{tmp_path}/s' in commands(text, 'python')[0]
    (tmp_path / 's' / 'tokenizer.json').write_text(json.dumps(tokenizer()))
    assert recommend.corpus_of(tmp_path / 's') == Corpus(f'shards:{tmp_path}/s', 4096, 0, VOCAB, 512)
    np.save(tmp_path / 's' / '2.npy', np.zeros((1, 100), np.uint16))
    with pytest.raises(UserError, match='2.npy: rows of 100 tokens, where most files have 512'):
        recommend.recommend(tmp_path / 's', 'cpu', say=lambda _: None)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Four presets, memory in proportion to the sequences, a machine of 1 TFLOP/s, and prepare.py in this process."""
    (tmp_path / 'presets' / 'config').mkdir(parents=True)
    for name in ('dense_tiny', 'trix_medium', 'resonance_small', 'resonance_32k'):
        shutil.copy(recommend.CONFIGS / f'{name}.py', tmp_path / 'presets' / 'config')
    monkeypatch.setattr(recommend, 'CONFIGS', tmp_path / 'presets' / 'config')
    monkeypatch.setattr(recommend, 'estimate', lambda *_: lambda rows, checkpointing: {'activations': rows * (2e9, 2e8)[checkpointing]})
    monkeypatch.setattr(recommend, 'achieved', lambda device, dtype: (1e12, 'as agreed'))
    monkeypatch.setattr(opening.subprocess, 'run', lambda words: prepare.main(words[2:]) or SimpleNamespace(returncode=0))


def prepared_bins(tmp_path):
    return bins(tmp_path / 'd', [np.arange(3000) % VOCAB], np.zeros(300))


def prepared_shards(tmp_path):
    return shards(tmp_path / 's', {'train': [np.full((2, 32_769), 7)], 'val': [np.full((1, 32_769), 7)]}, vocab_size=9000)


def raw_rows(tmp_path, name, highest, row):
    (tmp_path / name).mkdir()
    for k in range(3):
        np.save(tmp_path / name / f'{k}.npy', np.full((2, row), highest, np.uint16))
    return tmp_path / name


def rows_of_gpt2(tmp_path):
    return raw_rows(tmp_path, 'rows', 50_256, 32_768)


def small_rows(tmp_path):
    return raw_rows(tmp_path, 'small', 8000, 257)


def rows_with_a_tokenizer(tmp_path):
    path = raw_rows(tmp_path, 'with', VOCAB - 1, 512)
    (path / 'tokenizer.json').write_text(json.dumps(tokenizer()))
    return path


@pytest.mark.parametrize('make, card_gb', [
    (prepared_bins, 1), (prepared_shards, 44), (rows_of_gpt2, 44), (rows_of_gpt2, 0), (small_rows, 0), (rows_with_a_tokenizer, 0)])
def test_every_command_that_is_printed_can_be_run(tmp_path, quick, monkeypatch, make, card_gb):
    path = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    text, _ = said(recommend.recommend, path, 'cpu', card_gb)
    printed = commands(text, 'python') + [words[2:] for words in commands(text, 'torchrun')]
    assert printed
    for words in printed:
        config = train.load([str(recommend.CONFIGS.parent / words[2]), *words[3:]])
        data = opening.open_dataset(config)
        assert data.n_vocab <= config.vocab_size and data.n_windows
        micro_batches(config, 2)
        memory = config.batch_size * (2e9, 2e8)[config.activation_checkpointing]
        assert memory <= card_gb * 1e9 or not card_gb
    assert ' years' not in text and (', about ' in text) == (card_gb == 0)


def test_a_command_does_not_name_the_directory_of_another_run(tmp_path, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('runs/dense_tiny-2').mkdir(parents=True)
    Path('runs/dense_tiny').mkdir()
    text, _ = said(recommend.recommend, prepared_bins(tmp_path), 'cpu')
    assert '--out_dir=runs/dense_tiny-2-2' in commands(text, 'python')[0]


def test_what_takes_years_is_left_out(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(recommend, 'achieved', lambda device, dtype: (1e6, 'as agreed'))
    text, _ = said(recommend.recommend, rows_of_gpt2(tmp_path), 'cpu')
    assert re.search('  resonance_32k +its run would take over a year on this machine', text) and ' years' not in text
    assert text.endswith('--card_gb=N shows what a GPU with N GB could train')


def test_a_directory_in_the_current_one_is_named_with_a_slash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bins(tmp_path / 'd', [np.zeros(1000)], np.zeros(300))
    named = recommend.corpus_of('d')
    assert named == Corpus('./d', 1000, 300, VOCAB, 0)
    assert data_dir(named.dataset) == Path('d')


def test_a_broken_preset_is_left_out_and_the_others_are_not(tmp_path, two, unmeasured):
    (recommend.CONFIGS / 'bad.py').write_text('n_layer = "many"\n')
    (recommend.CONFIGS / 'worse.py').write_text('n_layer = 1 / 0\n')
    (recommend.CONFIGS / 'zero.py').write_text('batch_size = 0\n')
    text, _ = said(recommend.recommend, bins(tmp_path / 'd', [np.zeros(1000)], np.zeros(300)), 'cpu')
    assert re.search(r"  bad .*bad.py: n_layer = 'many': expected int", text) and 'ZeroDivisionError' in text
    assert re.search(r'  zero +batch_size=0', text) and cells(text, 'dense_tiny')[7] == 'yes'
