"""Comparisons are computed correctly, the candidates are what the tables say, and every promised file is written."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

import bench
import kernels
import settings
from benchmarks import blocks, deployed, loop, measure, preparing, presets, sweep, tables
from configurator import UserError
from model import GPT


def test_a_ratio_is_the_median_of_those_within_a_repeat():
    times = {'a': [1, 2, 4, 8, 16], 'b': [2, 2, 2, 2, 32]}  # b's speed over a's: 1/2, 1, 2, 4, 1/2
    assert measure.compare(times, 'a') == [
        {'name': 'a', 'seconds': 4, 'spread': 1.5, 'ratio': 1, 'low': 1, 'high': 1},
        {'name': 'b', 'seconds': 2, 'spread': 0, 'ratio': 1, 'low': 0.5, 'high': 2}]


def test_candidates_run_in_turn_and_the_first_rounds_do_not_count():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) or len(calls) for name in 'ab'}
    assert measure.interleaved(candidates, repeats=2, warmup=1) == {'a': [3, 5], 'b': [4, 6]}
    assert ''.join(calls) == 'ababab'


@pytest.mark.parametrize('ratios, expected', [((0.5, 1.0, 2.0), 1024), ((1.5, 0.9, 2.0), 2048), ((2.0, 2.0, 0.9), None)])
def test_the_crossover_is_where_resonance_stays_ahead(ratios, expected):
    assert blocks.crossover([{'context': T, 'ratio': ratio} for T, ratio in zip((512, 1024, 2048), ratios)]) == expected


@pytest.mark.parametrize('i, low, high', [(0, 8e6, 10e6), (1, 20e6, 22e6), (2, 65e6, 75e6)])
def test_blocks_compares_at_9_21_and_70_million_parameters(i, low, high):
    shape, *_ = blocks.SHAPES[i]
    with torch.device('meta'):
        models = {name: GPT(config) for name, config in blocks.variants(shape).items()}
    assert list(models) == ['dense', 'swiglu', 'trix', 'bitnet', 'resonance', 'none']
    assert low < measure.sizes(models['dense'])['parameters'] < high
    assert all(model.config.block_size == 256 and not model.config.tie_embeddings for model in models.values())
    tiny = settings.load([str(measure.ROOT / 'config' / 'trix_tiny.py')])
    trix, small = models['trix'].config, tiny.trix_hidden or tiny.n_embd
    assert (trix.trix_tiles, trix.trix_top_k, trix.trix_hidden) == (tiny.trix_tiles, tiny.trix_top_k, small * shape.n_embd // 128)
    assert measure.packed_bytes(models['bitnet']) < measure.packed_bytes(models['swiglu'])


def result_file(tmp_path, name):
    folder, = tmp_path.iterdir()
    assert folder.name == measure.slug(folder.name) and 'threads' in folder.name  # of the machine
    return folder / name


def written(tmp_path, title, columns):
    """The rows of results/<title>.json, after a look at them and at the picture."""
    result = json.loads(result_file(tmp_path, f'{title}_quick.json').read_text())
    assert all(list(row) == columns for row in result['rows'])
    assert result['command'] == f'python bench.py {title} --quick' and result['machine'] and result['date']
    assert all(isinstance(value, (str, int, float)) for row in result['rows'] for value in row.values())
    picture = result_file(tmp_path, f'{title}_quick.png').read_bytes()
    assert picture.startswith(b'\x89PNG\r\n\x1a\n') and len(picture) > 5000
    return result['rows']


def test_blocks_writes_table_and_picture(tmp_path, monkeypatch):
    shape = replace(blocks.SHAPES[0][0], n_embd=16, n_layer=1, n_head=2, vocab_size=64, block_size=32)
    monkeypatch.setattr(blocks, 'SHAPES', [(shape, 2, 1)])
    monkeypatch.setattr(blocks, 'FFN_SHAPES', {'cpu': ((16, 50),)})
    bench.main(['blocks', '--quick', '--device=cpu', f'--out={tmp_path}'])
    rows = written(tmp_path, 'blocks', [
        'shape', 'block', 'parameters', 'used by a token', 'MFLOP/token', 'packed MB', 'tokens/s', 'spread',
        'ratio to dense', 'low', 'high', 'ratio to swiglu', 'peak GB'])
    assert [row['block'] for row in rows] == list(blocks.variants(shape))
    assert {row['shape'] for row in rows} == {'1 x 16'}
    ffns = json.loads(result_file(tmp_path, 'blocks_ffn_quick.json').read_text())['rows']
    assert [row['FFN'] for row in ffns] == ['dense', 'trix, dense', 'trix, loop']
    assert ffns[0]['ratio to dense'] == 1 and all(row['ms'] > 0 and (row['width'], row['tokens']) == (16, 50) for row in ffns)
    assert rows[0]['ratio to dense'] == rows[1]['ratio to swiglu'] == 1 and all(0.05 < row['peak GB'] < 5 for row in rows)


def test_head_measures_the_loss_with_and_without_compilation(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, 'HEAD_SHAPES', {'cpu': (200, 8, 50)})
    monkeypatch.setattr(kernels, 'compiled_chunk_loss', lambda: kernels.chunk_loss)
    monkeypatch.setattr(blocks, 'FUSED_DEVICES', devices := set())
    monkeypatch.setattr(kernels, 'FUSED_DEVICES', devices)
    bench.main(['head', '--device=cpu', '--repeats=2', f'--out={tmp_path}'])
    rows = json.loads(result_file(tmp_path, 'head.json').read_text())['rows']
    assert [row['name'] for row in rows][:3] == ['chunked (ours)', 'chunked, compiled (ours)', 'plain']
    assert rows[0]['ratio'] == 1 and all(row['seconds'] > 0 for row in rows)


def test_context_writes_table_and_picture(tmp_path, monkeypatch, capsys):
    shape = replace(blocks.CONTEXT_SHAPE, n_embd=16, n_layer=1, n_head=2, vocab_size=64)
    monkeypatch.setattr(blocks, 'CONTEXT_SHAPE', shape)
    monkeypatch.setattr(blocks, 'CONTEXTS', (128, 8192))  # --quick leaves the second one out
    monkeypatch.setattr(blocks, 'MIXER_SHAPES', {'cpu': replace(shape, block_size=100, num_frequencies=4)})
    bench.main(['context', '--quick', '--device=cpu', f'--out={tmp_path}'])
    rows = written(tmp_path, 'context', [
        'context', 'attention tokens/s', 'resonance tokens/s', 'ratio', 'spread', 'attention peak GB', 'resonance peak GB',
        'attention ms/token', 'resonance ms/token'])
    assert [row['context'] for row in rows] == [128] and all(value > 0 for key, value in rows[0].items() if key != 'spread')
    output = capsys.readouterr().out
    assert 'crossover: ' in output and 'a mixer of 100 tokens, width 16, 4 modes' in output
    parts = json.loads(result_file(tmp_path, 'mixers_quick.json').read_text())['rows']
    assert [row['part'] for row in parts] == [
        'resonance', 'attention', *(f'convolution, FFT, chunks of {S}' for S in (256, 2048)),
        *(f'convolution, products, chunks of {S}' for S in (64, 128, 256, 512))]
    assert all(row['ms'] > 0 for row in parts) and parts[0]['ratio'] == 1
    figure, speeds = Figure(), [rows[0]['attention tokens/s'], rows[0]['resonance tokens/s']]
    blocks.plot_context(rows, figure)
    low, high = figure.axes[0].get_ylim()
    assert 0.5 * min(speeds) < low < high < 2 * max(speeds)  # the logarithmic axis shows the lines, and little else


def test_context_compares_the_preset_for_32k_tokens_with_its_attention_twin(tmp_path, monkeypatch):
    def side_by_side(title, candidates, repeats, config):
        assert all(c.batch_size == 4 and c.options.activation_checkpointing for c in candidates.values())
        assert all((c.shape.block_size, c.shape.n_embd, c.shape.mixer) == (32_768, 1024, name) for name, c in candidates.items())
        return {'attention': [2.0] * repeats, 'resonance': [1.0] * repeats}, {'attention': 20.0, 'resonance': 10.0}
    monkeypatch.setattr(blocks, 'side_by_side', side_by_side)
    blocks.attention_twin(bench.BenchConfig(device='cpu', out=str(tmp_path)))
    rows = json.loads(result_file(tmp_path, 'resonance_32k.json').read_text())['rows']
    assert rows[1] == {'mixer': 'resonance', 'tokens/s': 4 * 32_768, 'ratio to attention': 2.0, 'low': 2.0, 'high': 2.0, 'peak GB': 10.0}


def test_mixers_are_measured_compiled_where_that_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, 'MIXER_SHAPES', {'cpu': replace(blocks.CONTEXT_SHAPE, block_size=30, n_embd=8, num_frequencies=2, n_head=2)})
    monkeypatch.setattr(blocks, 'PRODUCT_CHUNKS', (8, 16))
    monkeypatch.setattr(blocks.compiler, 'choose', lambda setting, device: (True, ''))
    eager, compiled = torch.compile, []
    monkeypatch.setattr(torch, 'compile', lambda function, **options: compiled.append(function) or eager(
        function, backend='eager', **options))
    blocks.mixers(bench.BenchConfig(device='cpu', quick=True, out=str(tmp_path)))
    rows = json.loads(result_file(tmp_path, 'mixers_quick.json').read_text())['rows']
    assert [row['part'] for row in rows if row['part'].endswith('compiled')] == [
        'resonance, compiled', *(f'convolution, products, chunks of {S}, compiled' for S in (8, 16))] and len(compiled) == 3


def test_the_end_of_a_candidates_process_is_one_clear_line(monkeypatch):
    shape = replace(blocks.CONTEXT_SHAPE, n_embd=16, n_layer=1, n_head=3)  # impossible: building it fails
    with pytest.raises(UserError, match='here: the process of a model has died. If there is no message above, it ran out of memory'):
        measure.side_by_side('here', measure.alike({'bad': shape}, 1), 1, bench.load(['--device=cpu'], bench.BenchConfig))


def test_scaling_counts_against_one_process_and_against_separate_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.os, 'cpu_count', lambda: 2)
    started = []

    def training_run(folder, processes, config, *words):
        started.append((processes, dict(word[2:].split('=') for word in words if '=' in word)['batch_tokens']))
        return folder

    def training_lines(folder, *processes):
        speed = {'0_1': 100, '0_2': 180}.get(folder.rsplit('/')[-1], 95)
        return [{'tokens_per_s': 1}] * 5 + [{'tokens_per_s': speed}] * 3
    monkeypatch.setattr(loop, 'training_run', training_run)
    monkeypatch.setattr(loop, 'training_lines', training_lines)
    bench.main(['scaling', '--quick', '--device=cpu', f'--out={tmp_path}'])
    one, two = json.loads(result_file(tmp_path, 'scaling_quick.json').read_text())['rows']
    assert (one['tokens/s'], one['efficiency'], two['tokens/s'], two['efficiency']) == (100, 1, 180, 0.9)
    assert two['of the machine'] == pytest.approx(180 / 190)
    assert started[:2] == [(1, '4096'), (2, '8192')] and started[2:] == [(1, '4096')] * 2


def test_plans_are_set_beside_what_the_runs_take(tmp_path, monkeypatch):

    def whole_process(words):
        if '--plan' in words:
            return 1.0, 0.1, '  base   500.0 MB  Python\n  total  1.7 GB    of 8 GB\ntime: 2.5 s a step, 1,638 tokens/s (measured now)'
        out = Path(next(str(word) for word in words if '--out_dir=' in str(word)).partition('=')[2])
        out.mkdir()
        (out / 'metrics.jsonl').write_text(''.join(json.dumps({'kind': 'train', 'step': i, 'tokens': 4096 * i, 'tokens_per_s': 4096 / i,
                                                               'mem_gb': 1.5}) + '\n' for i in range(1, 15)))
    monkeypatch.setattr(loop, 'whole_process', whole_process)
    bench.main(['plan', '--quick', '--device=cpu', f'--out={tmp_path}'])
    row, _ = json.loads(result_file(tmp_path, 'plan_quick.json').read_text())['rows']
    assert (row['planned GB'], row['GB'], row['planned s/step'], row['s/step']) == (1.2, 1.0, 2.5, 9.5)
    assert row['planned/measured GB'] == pytest.approx(1.2) and row['planned/measured s'] == pytest.approx(2.5 / 9.5)


def test_the_loop_is_timed_on_a_real_run(tmp_path, monkeypatch):
    lines = [{'kind': 'train', 'step': step, 'tokens_per_s': 4096.0, 'loader_wait': 0.01} for step in range(6)]
    monkeypatch.setattr(loop, 'training_run', lambda *words: None)
    monkeypatch.setattr(loop, 'training_lines', lambda *words: lines)
    bench.main(['loop', '--repeats=2', '--device=cpu', f'--out={tmp_path}'])
    rows = {row['what']: row for row in json.loads(result_file(tmp_path, 'loop.json').read_text())['rows']}
    assert rows['step']['ms'] == 1000 and rows['waiting for a batch']['ms'] == 10
    assert all(row['percent of the time'] == pytest.approx(row['ms'] / 10 / row['every steps']) for row in rows.values())
    assert 0 < rows['its bytes written']['ms'] < 5000 and rows['checkpoint']['every steps'] == 122


def test_a_program_is_charged_with_its_own_memory_and_that_of_its_children_alone():
    keep = bytearray(400_000_000)  # ours: Linux would charge a child with it
    assert all(measure.whole_process([sys.executable, '-S', '-c', 'pass'])[1] < 0.05 for _ in range(2)) and len(keep)
    child = "import subprocess, sys; print('hello'); subprocess.run([sys.executable, '-S', '-c', 'bytearray(b\"1\") * 100_000_000'])"
    seconds, peak, output = measure.whole_process([sys.executable, '-S', '-c', child])
    assert 0.1 < peak < 0.15 and seconds > 0 and output == 'hello\n'
    with pytest.raises(UserError, match='failed: no'):
        measure.whole_process([sys.executable, '-c', "raise SystemExit('no')"])


def test_a_thousand_shards_are_opened_for_nothing(tmp_path):
    row = preparing.opened_shards(tmp_path)
    assert row['seconds to open'] < 2 and row['GB more'] < 0.05 and row['ms a batch of 4 rows'] < 20
    assert (row['files'], row['tokens']) == (1000, 990 * 100 * 32_768)


def test_what_a_user_measures_goes_to_a_folder_that_git_ignores():
    out = bench.load([], bench.BenchConfig).out
    ignored = subprocess.run(['git', 'check-ignore', '-q', f'{out}/a-machine/blocks.json'], cwd=measure.ROOT)
    assert ignored.returncode in (0, 128)  # 128: no git
    assert out != tables.RESULTS.name


def test_progress_says_how_much_is_done_and_the_time_left(monkeypatch, capsys):
    times = iter([0, 10, 20, 40])
    monkeypatch.setattr(measure.time, 'monotonic', lambda: next(times))
    progress = measure.Progress('rounds', 4)
    for _ in range(3):
        progress.step()
    assert capsys.readouterr().err == 'rounds: 3 of 4, 13 s left\n'  # a file gets a line every half minute


SMALL = replace(blocks.SHAPES[0][0], n_embd=16, n_layer=1, n_head=2, vocab_size=64, block_size=96)


def test_amp_measures_each_precision_that_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, 'SHAPES', [(SMALL, 2, 1)] * 2)
    bench.main(['amp', '--quick', '--device=cpu', f'--out={tmp_path}'])
    rows = json.loads(result_file(tmp_path, 'amp_quick.json').read_text())['rows']
    assert [row['precision'] for row in rows] == ['float32', 'bfloat16'] and rows[0]['ratio to float32'] == 1  # once, on a CPU
    assert all(row['tokens/s'] > 0 and 0.05 < row['peak GB'] < 5 for row in rows)


def test_decode_times_prompts_and_tokens_of_trained_and_packed_models(tmp_path, monkeypatch):
    monkeypatch.setattr(deployed, 'SMALL', replace(SMALL, vocab_size=256, ffn='swiglu'))
    monkeypatch.setattr(deployed, 'PROMPT', 20)
    bench.main(['decode', '--quick', '--device=cpu', f'--out={tmp_path}'])
    rows = json.loads(result_file(tmp_path, 'decode_quick.json').read_text())['rows']
    models = ['dense', 'BitNet', 'BitNet packed', 'TriX', 'TriX packed']
    assert [(row['sequences'], row['model']) for row in rows] == [(n, model) for n in (1, 16) for model in models]
    assert all(row['prompt ms'] > 0 and row['tokens/s'] > 0 for row in rows)


@pytest.mark.parametrize('limit, per_row', [(4.05, 0.1), (1.05, 0.1), (1.05, 0.4), (100.0, 0.01)])
def test_the_largest_batch_is_found_to_a_sixteenth_without_trying_what_cannot_fit(tmp_path, monkeypatch, limit, per_row):
    tried = []

    def two_steps(model, rows, device, dtype, options):
        tried.append(rows)
        return 0.6 + per_row * rows
    monkeypatch.setattr(presets, 'two_steps', two_steps)
    monkeypatch.setattr(presets, 'ProcessPoolExecutor', SamePool)
    bench.main(['batch', f'--card_gb={limit}', '--device=cpu', f"--model={measure.ROOT / 'config' / 'trix_tiny.py'}", f'--out={tmp_path}'])
    row, = json.loads(result_file(tmp_path, 'batch.json').read_text())['rows']
    most = int((limit - 0.6) / per_row + 1e-6)
    assert row['largest batch'] <= most < row['largest batch'] + max(1, row['largest batch'] // 16)
    assert row['peak GB'] == pytest.approx(0.6 + per_row * row['largest batch']) and max(tried) <= max(2, most)


def test_a_batch_that_is_out_of_memory_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, 'ProcessPoolExecutor', SamePool)
    monkeypatch.setattr(presets, 'two_steps', lambda model, rows, *rest: None if rows > 5 else 0.1)
    bench.main(['batch', '--card_gb=1', '--device=cpu', f"--model={measure.ROOT / 'config' / 'trix_tiny.py'}", f'--out={tmp_path}'])
    assert json.loads(result_file(tmp_path, 'batch.json').read_text())['rows'][0]['largest batch'] == 5
    monkeypatch.setattr(presets, 'two_steps', lambda model, rows, *rest: None)
    with pytest.raises(UserError, match='not even one sequence of 256 tokens fits'):
        bench.main(['batch', '--card_gb=1', '--device=cpu', f"--model={measure.ROOT / 'config' / 'trix_tiny.py'}", f'--out={tmp_path}'])


def test_two_real_steps_tell_their_peak_and_running_out_of_memory(monkeypatch):
    assert 0.05 < presets.two_steps(SMALL, 2, 'cpu', 'auto', settings.load([])) < 5

    def no_memory(*words, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    monkeypatch.setattr(presets, 'training_step', no_memory)
    assert presets.two_steps(SMALL, 2, 'cpu', 'auto', settings.load([])) is None


def test_batch_has_the_activation_checkpointing_and_the_optimizer_of_the_config_file(tmp_path, monkeypatch):
    (tmp_path / 'x.py').write_text("activation_checkpointing = True\noptimizer = 'muon'\nbatch_size = 1\n")
    monkeypatch.setattr(presets, 'ProcessPoolExecutor', SamePool)
    seen = []
    monkeypatch.setattr(presets, 'two_steps', lambda *words: seen.append(words[-1]) or 2.0)
    with pytest.raises(UserError, match='not even one sequence'):
        bench.main(['batch', '--card_gb=1', '--device=cpu', f"--model={tmp_path / 'x.py'}", f'--out={tmp_path}/out'])
    assert (seen[0].activation_checkpointing, seen[0].optimizer) == (True, 'muon')
    model, step = measure.training_step(SMALL, 2, torch.device('cpu'), torch.float32, options=settings.load(['--activation_checkpointing=true']))
    assert model.activation_checkpointing and not measure.training_step(SMALL, 2, torch.device('cpu'), torch.float32)[0].activation_checkpointing


def test_steps_measures_one_change_at_a_time_and_counts_tokens(tmp_path, monkeypatch):
    (tmp_path / 'x.py').write_text("mixer = 'resonance'\nchunk_size = 64\nblock_size = 128\nbatch_size = 4\n")
    seen = {}

    def side_by_side(title, candidates, repeats, config):
        seen.update(candidates)
        name = list(candidates)[-1]
        if name == 'batch_size=8':
            raise UserError('a process has died')
        return {'base': [2.0, 2.0], name: [4.0 if name == 'compile' else 2.0] * 2}, dict.fromkeys(candidates, 0.5)
    monkeypatch.setattr(presets, 'side_by_side', side_by_side)
    monkeypatch.setattr(presets.plan, 'achieved', lambda *words: (1e10, 'as agreed'))
    bench.main(['steps', '--device=cpu', f"--model={tmp_path / 'x.py'}", f'--out={tmp_path}/out'])
    rows = {row['change']: row for row in json.loads(result_file(tmp_path / 'out', 'steps_x.json').read_text())['rows']}
    assert list(rows) == ['base', 'compile', 'activation checkpointing on', 'chunk_size=16', 'batch_size=2', 'batch_size=8: out of memory']
    assert (rows['base']['tokens/s'], rows['compile']['ratio'], rows['batch_size=2']['ratio']) == (256, 0.5, 0.5)
    assert rows['batch_size=8: out of memory']['ratio'] == '' and seen['chunk_size=16'].shape.chunk_size == 16
    base, on = seen['base'], seen['activation checkpointing on']
    assert (base.dtype, base.compile, base.options.activation_checkpointing, on.options.activation_checkpointing) == ('float32', 'false', False, True)


def test_steps_says_what_it_measures_and_how_long_it_takes_and_refuses_more_than_half_a_day(tmp_path, monkeypatch, capsys):
    (tmp_path / 'x.py').write_text("block_size = 128\nbatch_size = 4\n")
    monkeypatch.setattr(presets, 'side_by_side', lambda *words: ({'base': [1.0, 1.0], list(words[1])[-1]: [1.0, 1.0]}, {'base': 1.0, list(words[1])[-1]: 1.0}))
    monkeypatch.setattr(presets.GPT, 'flops_per_token', lambda model: 1e9)
    words = ['steps', '--device=cpu', f"--model={tmp_path / 'x.py'}", f'--out={tmp_path}/out']
    monkeypatch.setattr(presets.plan, 'achieved', lambda *words: (512e9, 'as agreed'))  # one second a step
    bench.main(words)
    # base alone three times, then 1 + 5 rounds of base beside compile, checkpointing, half of the batch and twice the batch
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{tmp_path / 'x.py'}: training steps of 4 x 128 tokens in fp32, and with one change at a time: "
        'compile, activation checkpointing on, batch_size=2, batch_size=8',
        'a step takes about 1 s and the whole command about 54 s, by an estimate: as agreed. '
        'Compiling and starting processes come on top']
    monkeypatch.setattr(presets.plan, 'achieved', lambda *words: (512e6, 'as agreed'))
    with pytest.raises(UserError, match='more than 12 h on cpu: try --quick, or a faster device, or a copy of the file'):
        bench.main(words)
    bench.main([*words, '--quick'])  # 3 + 3 * 8.5 steps of 1,000 s are 7.9 h


def test_the_memory_table_has_every_batch_precision_and_card(tmp_path, monkeypatch):
    def estimate(run, kind, dtype):
        assert kind == 'cuda' and run.n_layer == 12
        size = 1e9 if dtype == torch.float32 else 0.5e9
        return lambda rows, checkpointing: {**dict.fromkeys(('parameters', 'gradients', 'buffers', 'copies', 'workspace'), 0.5e9), 'optimizer': 1e9,
                                            'activations': rows * size / (4 if checkpointing else 1)}
    monkeypatch.setattr(presets.plan, 'estimate', estimate)
    bench.main(['memory', f"--model={measure.ROOT / 'config' / 'wikitext_medium.py'}", '--device=cpu', f'--out={tmp_path}'])
    rows = json.loads(result_file(tmp_path, 'memory_wikitext_medium.json').read_text())['rows']
    found = {(row['batch'], row['precision'], row['checkpointing']): (row['total GB'], row['fits on']) for row in rows}
    assert len(found) == 12 and found[8, 'fp32', 'off'] == (11.5, '12, 16, 24 GB') and found[32, 'fp32', 'off'] == (35.5, 'none')
    assert found[16, 'fp16', 'on'] == (5.5, '8, 12, 16, 24 GB')


class SamePool:
    """A pool that does the work here and now."""

    def __init__(self, *words):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *words):
        return type('Done', (), {'result': staticmethod(lambda: function(*words))})


# ----------------------------------------------------------------------------------------------------------------------
# A sweep

@pytest.fixture
def sweeping(tmp_path, monkeypatch):
    """sweep(...) in an empty directory, with runs that only write their files. `started` lists their command lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x.py').write_text('n_layer = 1\neval_interval = 5\nmax_steps = 10\n')
    monkeypatch.setattr('benchmarks.quality.open_dataset', lambda config: SimpleNamespace(fingerprint='data'))
    started = []

    def run_train(words, **options):
        run = settings.load(words)
        started.append((run.learning_rate, run.ffn, run.seed))
        out = Path(run.out_dir)
        out.mkdir(parents=True)
        state = 'diverged' if run.learning_rate > 1 else 'finished'
        (out / 'config.json').write_text(json.dumps({**run.as_dict(), 'data_fingerprint': 'data'}))
        (out / 'status.json').write_text(json.dumps({'state': state}))
        loss = abs(run.learning_rate - 3e-3) + (0.5 if run.ffn == 'gelu' else 0) + run.seed / 1e6
        lines = [{'kind': 'eval', 'step': 5 * i, 'tokens': 100 * i, 'loss': 5 - i + loss} for i in range(3)]
        lines.append({'kind': 'train', 'step': 10, 'tokens': 200, 'loss': 3, 'tokens_per_s': 1000.0})
        (out / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        return 3 if state == 'diverged' else 0
    monkeypatch.setattr(sweep, 'run_train', run_train)
    return started


def test_a_sweep_runs_the_grid_once_and_names_the_winner(sweeping, capsys, tmp_path):
    words = ['sweep', 'x.py', '--learning_rate=1e-3,3e-3,2', '--ffn=gelu,swiglu', '--n_embd=32', '--device=cpu', '--seeds=2']
    bench.main(words)
    assert sweeping == [(rate, ffn, seed) for seed in (1337, 1) for rate in (1e-3, 3e-3, 2) for ffn in ('gelu', 'swiglu')]
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == 'python train.py x.py --n_embd=32 --device=cpu --learning_rate=3e-3 --ffn=swiglu'
    assert 'run 12 of 12: learning_rate=2 ffn=swiglu, seed 1, about' in output and 'is best, 0.0020 nats a token before' in output
    result = json.loads(result_file(tmp_path / 'runs' / 'bench', 'sweep_x.json').read_text())
    first, *_, last = result['rows']
    assert (first['learning_rate'], first['ffn'], first['runs'], first['state']) == ('3e-3', 'swiglu', 2, 'finished')
    assert first['loss'] == pytest.approx(3 + (1337 + 1) / 2e6) and last['state'] == 'diverged' and last['loss'] == ''
    picture = result_file(tmp_path / 'runs' / 'bench', 'sweep_x.png').read_bytes()
    assert picture.startswith(b'\x89PNG') and len(picture) > 5000
    sweeping.clear()
    bench.main([word for word in words if 'rate' not in word] + ['--learning_rate=1e-3,3e-3'])  # in another order
    assert not sweeping and capsys.readouterr().out.count('finished already') == 8  # what exists is used


def test_a_sweep_keeps_to_its_minutes_and_goes_on_later(sweeping, monkeypatch, capsys):
    clock = iter(range(0, 100_000, 40))  # each look at the clock is 40 s later
    monkeypatch.setattr(sweep.time, 'monotonic', lambda: next(clock))
    words = ['sweep', 'x.py', '--learning_rate=1e-3,2e-3,3e-3,4e-3', '--device=cpu']
    bench.main([*words, '--minutes=3'])
    assert [rate for rate, *_ in sweeping] == [1e-3, 2e-3]
    output = capsys.readouterr().out
    assert '2 of 4 runs were not started within --minutes=3' in output and 'not run' in output
    bench.main(words)
    assert [rate for rate, *_ in sweeping] == [1e-3, 2e-3, 3e-3, 4e-3]


@pytest.mark.parametrize('words, message', [
    (['--learning_rate=1e-3'], 'nothing to sweep: give an option several values'),
    (['--learning_rate=1e-3,-1'], 'learning_rate=-1.0 must not be negative'),
    (['--learnig_rate=1,2'], "unknown key 'learnig_rate', did you mean 'learning_rate'"),
    (['--vocab_size=300,400'], 'a sweep compares losses per token'),
    (['--n_layer=1,2', '--eval_interval=0'], 'eval_interval=0: a sweep compares validation losses'),
    (['--n_layer=1,2', '--seed=3'], 'a sweep sets seed of its runs itself'),
    (['--n_layer=1,2', '--seeds=0'], 'seeds=0 must be at least 1')], ids=str)
def test_a_sweep_refuses_mistakes_before_the_first_run(sweeping, words, message):
    with pytest.raises(UserError, match=message):
        bench.main(['sweep', 'x.py', *words])
    assert not sweeping


# ----------------------------------------------------------------------------------------------------------------------
# The tables of results/README.md

NOT_SHOWN = {  # measurements in results/ without a table
    'intel-xeon-2.50ghz-2-threads/head',  # the reason for a choice in the code, not a result of its own
    'intel-xeon-2.50ghz-2-threads/peers'}  # the table shows the later one of the EPYC


def test_every_table_of_the_results_is_that_of_its_json_file():
    page = (tables.RESULTS / 'README.md').read_text(encoding='utf-8')
    assert tables.filled(page, tables.RESULTS) == page
    assert len(tables.names_shown(page)) == page.count('<!-- ') > 10  # no mark is misspelt


def test_every_measurement_is_shown_or_listed_as_not_shown():
    listed = subprocess.run(['git', 'ls-files', 'results/*/*.json'], cwd=measure.ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('without git, the measurements of this machine are not told from those of the repository')
    committed = {path.removeprefix('results/').removesuffix('.json') for path in listed.stdout.splitlines()}
    shown = tables.names_shown((tables.RESULTS / 'README.md').read_text(encoding='utf-8'))
    assert len(committed) > 10 and committed - shown == NOT_SHOWN


@pytest.fixture
def small_results(tmp_path, monkeypatch):
    """A folder of one machine with two measurements, of which the page shows one."""
    (tmp_path / 'cpu').mkdir()
    rows = [{'name': 'a', 'tokens': 1234567, 'ratio': 1.23456}, {'name': 'long name', 'tokens': 8, 'ratio': 1.0}]
    (tmp_path / 'cpu' / 'speed.json').write_text(json.dumps({'rows': rows}))
    (tmp_path / 'cpu' / 'other.json').write_text(json.dumps({'rows': rows}))
    (tmp_path / 'cpu' / 'other_quick.json').write_text(json.dumps({'rows': rows}))
    page = 'Before.\n\n<!-- cpu/speed: name, ratio, tokens -->\n| old |\n\nAfter ².\n'
    (tmp_path / 'README.md').write_text(page, encoding='utf-8')
    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    return tmp_path


def test_the_command_tables_fills_in_the_page_and_names_what_it_does_not_show(small_results, capsys):
    bench.main(['tables'])
    expected = """Before.

<!-- cpu/speed: name, ratio, tokens -->
| name      | ratio | tokens    |
| --------- | ----- | --------- |
| a         | 1.235 | 1,234,567 |
| long name | 1     | 8         |

After ².
"""
    assert (small_results / 'README.md').read_text(encoding='utf-8') == expected
    assert capsys.readouterr().out.splitlines() == [f'{small_results}/README.md: 1 tables', 'not shown: cpu/other']
    bench.main(['tables'])
    assert (small_results / 'README.md').read_text(encoding='utf-8') == expected


@pytest.mark.parametrize('mark, content, message', [
    ('cpu/none: name', None, 'cpu/none.json: No such file or directory'),
    ('cpu/speed: name, speed, ratio, loss', None, 'cpu/speed.json: no column speed, loss: it has name, tokens, ratio'),
    ('cpu/speed: name', '{"rows": [', 'cpu/speed.json: broken'),
    ('cpu/speed: name', '{}', 'cpu/speed.json: no rows')])
def test_a_table_that_cannot_be_filled_is_one_line_and_leaves_the_page_alone(small_results, mark, content, message):
    page = f'<!-- cpu/other: name -->\n\n<!-- {mark} -->\n'
    (small_results / 'README.md').write_text(page)
    if content is not None:
        (small_results / 'cpu' / 'speed.json').write_text(content)
    with pytest.raises(UserError) as error:
        bench.main(['tables'])
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert (small_results / 'README.md').read_text() == page


def test_a_report_prints_the_table_that_the_page_shows(tmp_path, monkeypatch, capsys):
    rows = [{'name': 'a', 'seconds': 0.123456, 'tokens': 4096}]
    measure.report('head', rows, bench.load(['--device=cpu', f'--out={tmp_path}'], bench.BenchConfig))
    file = result_file(tmp_path, 'head.json')
    assert capsys.readouterr().out == f'\n{tables.markdown(rows)}\nwritten to {file}\n'
    result = json.loads(file.read_text())
    assert result['rows'] == rows and result['hardware']['matmul dtype'] == 'float32'
    assert result['hardware']['matmul TFLOP/s'] > 1e-4 and 0.5 < result['hardware']['memory GB'] < 1e5
