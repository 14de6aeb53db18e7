"""Runs are matched, paired over seeds and ranked only beyond the noise."""
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import settings
import train
from benchmarks import frontier, quality
from benchmarks.deployed import seconds_per_token
from configurator import UserError
from model import GPTConfig
from runs import finish
from test_prepare import prepared, texts, write_jsonl


@pytest.mark.parametrize('what', quality.MATCHES.values())
@pytest.mark.parametrize('preset', ['ffn', 'mixer'])
def test_widths_bring_every_run_next_to_the_last_one(preset, what):
    shapes = {name: train.load([str(quality.ROOT / 'config' / file), *words]).pick(GPTConfig)
              for name, (file, *words) in quality.PRESETS[preset].items()}
    target = quality.measures(list(shapes.values())[-1])[what]
    for name, shape in shapes.items():
        key, value = quality.matched(shape, what, target)
        found = {n: quality.measures(replace(shape, **{key: n}))[what] for n in (value - (1 if key == 'n_layer' else 8), value) if n > 0}
        assert abs(found[value] - target) <= min(abs(other - target) for other in found.values())
        assert abs(found[value] / target - 1) < (0.25 if key == 'n_layer' else 0.02), (name, key, value, found[value], target)


def test_the_match_is_on_the_command_line_of_all_but_the_last():
    config = bench.load(['quality', '--preset=ffn', '--match=flops'], bench.BenchConfig, positional=('command',))
    runs = quality.runs_of(config)
    options = {name: words[-1].partition('=')[0] for name, words in runs.items()}
    assert options == {'relu2': '--d_ff', 'swiglu': '--d_ff', 'trix': '--trix_hidden', 'bitnet': '--d_ff', 'resonance': '--n_layer',
                     'none': '--n_layer', 'gelu': '--keep'}
    assert all(train.load(words).max_steps == 305 for words in runs.values())


def test_ranks_are_places_that_the_noise_allows():
    clear = {'a': [3.0, 3.1, 3.2], 'b': [3.5, 3.6, 3.71], 'c': [4.0, 4.1, 4.19]}  # the seeds move all alike
    assert quality.ranks(clear) == {'a': '1', 'b': '2', 'c': '3'}
    noisy = {'a': [3.0, 3.1, 3.2], 'b': [3.1, 3.2, 3.05], 'c': [4.0, 4.1, 4.19]}
    assert quality.ranks(noisy) == {'a': '1-2', 'b': '1-2', 'c': '3'}
    assert quality.ranks({'a': [1.0], 'b': [2.0]}) == {'a': '-', 'b': '-'}
    assert quality.difference([1, 2, 4], [0, 0, 0]) == pytest.approx((7 / 3, 4.303 * 1.5275 / 3**0.5), rel=1e-3)  # Student's t, 2 degrees
    lines = list(quality.verdicts(noisy))
    assert 'a is better' in lines[0] and 'b is better' in lines[1]
    assert 'within the noise' in next(quality.verdicts({'a': noisy['a'], 'b': noisy['b']}))
    assert 'one seed' in next(quality.verdicts({'a': [1.0], 'b': [2.0]}))


def test_recall_asks_for_every_pair_that_it_has_shown_once():
    x, y = quality.recall_batch(quality.np.random.default_rng(0), 50, 8)
    assert x.shape == y.shape == (50, 32)
    for row, asked in zip(x.tolist(), y.tolist()):
        shown = dict(zip(row[0:16:2], row[1:16:2]))
        assert len(shown) == 8 and all(key < 128 <= value < 256 for key, value in shown.items())
        assert sorted(row[16::2]) == sorted(shown)
        assert asked[:16] == [-1] * 16 and asked[17::2] == [-1] * 8
        assert asked[16::2] == [shown[key] for key in row[16::2]] == row[17::2]
    again, _ = quality.recall_batch(quality.np.random.default_rng(0), 50, 8)
    assert torch.equal(x, again) and not (x[:, 16::2] == x[:, 0:16:2]).all(1).any()  # in another order: 1 in 40,320 is not


def test_attention_learns_to_recall_and_accuracy_starts_at_chance():
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=256, ffn='none', block_size=8)
    with_it = quality.recall_accuracy(shape, 2, 300, 0, torch.device('cpu'))
    assert with_it > 0.5 and quality.recall_accuracy(replace(shape, mixer='resonance', num_frequencies=1), 2, 10, 0, torch.device('cpu')) < 0.3


@pytest.mark.parametrize('word', ['--dataset=wikitext2', '--vocab_size=1000', '--tokenizer=gpt2'])
def test_runs_on_different_data_or_tokenizers_are_not_ranked_by_loss(word, monkeypatch):
    monkeypatch.setitem(quality.PRESETS, 'ffn', {'a': (quality.TWIN,), 'b': (quality.TWIN, word)})
    with pytest.raises(UserError, match='cannot be compared between different data or tokenizers: a pylib bpe 8192, b '):
        quality.runs_of(bench.load(['quality'], bench.BenchConfig, positional=('command',)))


def test_the_bigram_table_is_that_of_witten_and_bell():
    draw = np.random.default_rng(0)
    steps, held_out = draw.integers(6, size=(3, 2, 9)), draw.integers(6, size=(2, 9))
    data = SimpleNamespace(n_vocab=6, batch=lambda step, *_, seed: (steps[step][:, :-1], steps[step][:, 1:]),
                           val_batch=lambda windows: (held_out[windows, :-1], held_out[windows, 1:]))
    pairs = [(x, y) for row in steps.reshape(-1, 9) for x, y in zip(row, row[1:])]
    single = {y: (1 + sum(b == y for _, b in pairs)) / (6 + len(pairs)) for y in range(6)}

    def loss(d):
        p = []
        for x, y in zip(held_out[1, :-1], held_out[1, 1:]):
            after = [b for a, b in pairs if a == x]
            extra = d * max(1, len(set(after)))
            p.append((after.count(y) + extra * single[y]) / (len(after) + extra))
        return -np.log(p).mean()
    config = SimpleNamespace(batch_tokens=16, block_size=8, max_steps=3, seed=0)
    assert quality.bigram(data, config, [1]) == pytest.approx(min(map(loss, (0.3, 0.5, 0.7, 1, 1.5, 2, 3))))


@pytest.mark.parametrize('preset, words, steps', [
    ('tiny', [], 1220), ('tiny', ['--tokens=40960'], 10), ('speedrun', [], 610), ('routing', [], 305), ('routing', ['--tokens=8192'], 2)])
def test_runs_have_the_length_of_the_preset_or_of_tokens(preset, words, steps):
    config = bench.load(['quality', f'--preset={preset}', *words], bench.BenchConfig, positional=('command',))
    assert {train.load(run).max_steps for run in quality.runs_of(config).values()} == {steps}


def test_quality_trains_evaluates_ranks_and_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, 'ensure_trained', lambda words: codes.append(finish(words)[0]))
    monkeypatch.setattr(quality, 'side_by_side', lambda *words: ({'relu2': [1.0, 1.0], 'gelu': [2.0, 2.0]}, {}))
    codes = []
    prepared(write_jsonl(tmp_path / 'a.jsonl', texts(60)), tmp_path / 'data' / 'x')
    small = ('dense_tiny.py', quality.SOURCE, '--dataset=data/x', '--vocab_size=300', '--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16',
             '--batch_size=4', '--batch_tokens=64', '--compile=false')
    monkeypatch.setattr(quality, 'PRESETS', {'ffn': {'relu2': (*small, '--ffn=relu2'), 'gelu': small}})
    bench.main(['quality', '--tokens=1280', '--seeds=2', '--match=params', '--repeats=1', '--device=cpu', f'--out={tmp_path}/results'])
    assert codes == [0] * 4
    folder, = (tmp_path / 'results').iterdir()
    result = json.loads((folder / 'quality_ffn_params.json').read_text())
    assert result['command'] == 'python bench.py quality --match=params --tokens=1280 --seeds=2'
    assert [row['model'] for row in result['rows']] == ['relu2', 'gelu'] and len({row['parameters'] for row in result['rows']}) == 1
    assert set(result['losses']) == {'relu2', 'gelu'} and all(len(losses) == 2 for losses in result['losses'].values())
    assert [tokens for tokens, _ in result['curves']['gelu'][1]] == [64 * step for step in range(0, 21, 2)]
    assert [(row['speed'], row['tokens/s'], row['rank']) for row in result['rows']] == [(2, 256, '1-2'), (1, 128, '1-2')]
    assert result['rows'][0]['loss'] == pytest.approx(sum(result['losses']['relu2']) / 2)
    assert (folder / 'quality_ffn_params.png').read_bytes()[1:4] == b'PNG'


def test_a_run_that_was_made_with_other_options_is_not_taken_for_this_one(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(quality, 'run_train', lambda words: started.append(words) or 0)
    words = ['--n_embd=64', f'--out_dir={tmp_path}', '--device=cpu']
    (tmp_path / 'config.json').write_text(json.dumps({**train.load(words).as_dict(), 'device': 'cuda', 'data_fingerprint': 'x'}))
    quality.ensure_trained(words)
    assert len(started) == 1
    with pytest.raises(UserError, match='has a run with other options .learning_rate, seed.. Move it away'):
        quality.ensure_trained([*words, '--learning_rate=0.5', '--seed=7'])
    assert len(started) == 1


def test_a_run_with_epochs_is_recognised_by_its_options_not_by_the_steps_of_its_data(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(quality, 'run_train', lambda words: started.append(words) or 0)
    words = ['--epochs=2', f'--out_dir={tmp_path}', '--warmup_steps=-1']
    config = train.load(words)
    settings.resolve_steps(config, n_windows=2000)  # as train.py does when the data are open
    assert (config.max_steps, config.warmup_steps) == (250, 12)
    (tmp_path / 'config.json').write_text(json.dumps(config.as_dict()))
    quality.ensure_trained(words)
    assert len(started) == 1
    for other, key in (('--epochs=3', 'epochs'), ('--warmup_steps=10', 'warmup_steps')):
        with pytest.raises(UserError, match=f'other options .{key}.'):
            quality.ensure_trained([*words, other])


def test_a_finished_run_is_not_started_again_unless_the_data_has_changed(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(quality, 'run_train', lambda words: started.append(words) or 0)
    monkeypatch.setattr(quality, 'open_dataset', lambda config: SimpleNamespace(fingerprint='now'))
    words = ['--n_embd=64', f'--out_dir={tmp_path}']
    for fingerprint, state, times in (('now', 'finished', 0), ('now', 'stopped', 1), ('before', 'finished', 1)):
        (tmp_path / 'config.json').write_text(json.dumps({**train.load(words).as_dict(), 'data_fingerprint': fingerprint}))
        (tmp_path / 'status.json').write_text(json.dumps({'state': state}))
        started.clear()
        quality.ensure_trained(words)
        assert len(started) == times


def small_trix(words=()):
    """quality --preset=trix on one layer of width 16."""
    return bench.load(['quality', '--preset=trix', '--shape=1x64', '--device=cpu', *words], bench.BenchConfig,
                      positional=('command',))


def test_the_preset_trix_compares_equal_hidden_units_at_equal_options():
    runs = {name: train.load(words) for name, words in quality.runs_of(small_trix(['--shape=6x256'])).items()}
    used = {name: run.trix_top_k * run.trix_hidden + 256 * run.trix_shared for name, run in runs.items()
            if run.ffn == 'trix'}
    assert used == {'trix_16_4': 1024, 'trix_8_2': 1024, 'trix_32_8': 1024, 'trix_hash': 1024, 'trix_first': 1024,
                    'trix_half_8_2': 512, 'trix_half_16_4': 512, 'trix_shared': 768}
    assert {run.max_steps * run.batch_tokens for run in runs.values()} == {1587 * 4096}  # 6.5M tokens
    assert len({(run.n_layer, run.n_embd, run.learning_rate, run.schedule, run.document_starts)
                for run in runs.values()}) == 1
    flops = {name: quality.measures(run.pick(GPTConfig))['MFLOP/token'] for name, run in runs.items()}
    assert flops['trix_16_4'] == pytest.approx(flops['gelu'], rel=0.01)
    assert flops['trix_half_8_2'] < 0.8 * flops['gelu']


def test_every_run_tries_the_same_rates_and_uses_its_best(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    losses = {'a': {0.1: 3.0, 0.2: 2.0, 0.4: 2.5}, 'b': {0.1: 3.0, 0.2: 2.0, 0.4: 1.5}}
    monkeypatch.setattr(quality, 'ensure_trained', lambda words: None)

    def evaluated(out, *_):
        name, rate, _ = out.split('/')[-1].split('_')
        return None, None, {'loss': losses[name][float(rate)]}
    monkeypatch.setattr(quality, 'evaluated', evaluated)
    config = small_trix(['--rates=0.1,0.2,0.4'])
    best, trials = quality.tuned({'a': ['--ffn=gelu'], 'b': []}, 'x', 1000, config)
    assert best == {'a': 0.2, 'b': 0.4} and trials == losses
    assert 'b: its best rate, 0.4, is at the edge' in capsys.readouterr().out
    assert quality.rates_of(small_trix()) == (8e-3, 16e-3, 32e-3, 64e-3)  # a width of 64
    assert quality.options_of(config) == ' --preset=trix --shape=1x64 --rates=0.1,0.2,0.4'


def test_runs_of_equal_time_have_steps_by_the_speeds_that_were_measured_once(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(quality, 'side_by_side',
                        lambda *_: measured.append(1) or ({'fast': [1.0], 'slow': [4.0], 'last': [2.0]}, {}))
    runs = {name: ['--max_steps=100'] for name in ('fast', 'slow', 'last')}
    for _ in range(2):
        found = quality.at_equal_time(runs, tmp_path, small_trix(['--match=time']))
        assert {name: train.load(words).max_steps for name, words in found.items()} == {'fast': 200, 'slow': 50, 'last': 100}
    assert measured == [1]


@pytest.mark.parametrize('words, message', [
    (['--preset=trix', '--shape=6by256'], "shape='6by256' is not LAYERSxWIDTH"),
    (['--shape=4x128'], 'shape is for quality --preset=trix'),
    (['--rates=0,1'], "rates='0,1' is not a list of positive numbers")])
def test_a_wrong_shape_or_rate_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        bench.load(['quality', *words], bench.BenchConfig, positional=('command',))


def test_the_frontier_trains_packs_and_times_every_kind_at_every_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, 'ensure_trained', lambda words: finish(words))
    prepared(write_jsonl(tmp_path / 'a.jsonl', texts(60)), tmp_path / 'data' / 'x')
    small = ('--dataset=data/x', '--vocab_size=300', '--n_head=2', '--block_size=16', '--batch_size=4',
             '--batch_tokens=64', '--compile=false')
    monkeypatch.setattr(frontier, 'SIZES', ((1, 16),))
    monkeypatch.setattr(frontier, 'PROMPT', 4)
    monkeypatch.setattr(frontier, 'seconds_per_token', partial(seconds_per_token, new=3))
    plain = frontier.runs_of
    monkeypatch.setattr(frontier, 'runs_of', lambda tokens: {key: [*words, *small] for key, words in plain(tokens).items()})
    bench.main(['frontier', '--tokens=8192', '--seeds=1', '--repeats=1', '--device=cpu', f'--out={tmp_path}/results'])
    folder, = (tmp_path / 'results').iterdir()
    result = json.loads((folder / 'frontier.json').read_text())
    rows = {row['model']: row for row in result['rows']}
    assert list(rows) == list(frontier.KINDS) and result['command'].endswith('frontier --tokens=8192 --seeds=1')
    assert rows['TriX']['MB'] < 2 * rows['dense']['MB'] and all(row['tokens/s'] > 0 for row in rows.values())
    dense = rows['dense']
    assert dense['training TFLOP'] == pytest.approx(3 * 8192 * quality.measures(train.load(
        plain(8192)['dense', 1, 16] + list(small)).pick(GPTConfig))['MFLOP/token'] / 1e6)
    assert (folder / 'frontier.png').read_bytes()[1:4] == b'PNG'
    assert 'TriX 1x16: ' in capsys.readouterr().out


def test_a_ternary_model_is_dominated_by_a_dense_one_that_is_better_in_all_three():
    dense = {'model': 'dense', 'layers': 1, 'width': 8, 'loss': 2.0, 'MB': 3.0, 'tokens/s': 10.0}
    verdicts = [*frontier.undominated([dense, {**dense, 'model': 'TriX', 'loss': 2.1},
                                       {**dense, 'model': 'BitNet', 'loss': 2.1, 'MB': 1.0}])]
    assert verdicts == ['TriX 1x8: dense 1x8 is better in everything', 'BitNet 1x8: no dense model dominates it']
