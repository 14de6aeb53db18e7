"""The figures of deployed models are measured on these models themselves."""
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import bench
import checkpoint
from benchmarks import deployed
import evaluate
from configurator import UserError
from model import GPT, GPTConfig
from runs import arguments, finish


def rows_of(tmp_path, name):
    path, = (tmp_path / 'results').glob(f'*/{name}.json')
    return {row['model']: row for row in json.loads(path.read_text())['rows']}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_conversion_is_followed_from_the_dense_model_to_the_recovered_one(corpus, here, monkeypatch, capsys):
    def trained(words):
        if words[0].endswith('recover.py'):
            return finish([words[0], f'--out_dir={here / words[0]}'.replace('recover.py', 'recovered'), '--learning_rate=3e-3'])
        out = next(word for word in words if word.startswith('--out_dir=')).removeprefix('--out_dir=')
        (here / out).parent.mkdir(parents=True)
        code, said = finish(arguments(corpus, here / out, '--ffn=gelu', '--dropout=0', '--sample_interval=0', '--max_steps=200'))
        assert code == 0, said
    monkeypatch.setattr(deployed, 'ensure_trained', trained)
    bench.main(['convert', '--repeats=1', '--device=cpu', f'--out={here}/results'])
    rows = rows_of(here, 'convert')
    assert [name.split(':')[0] for name in rows] == ['dense'] + 5 * ['trix'] + 2 * ['bitnet_ffn'] + 2 * ['bitnet']
    dense, cut, recovered = rows['dense'], rows['trix: cut into 8 tiles'], rows['trix: recovered']
    assert cut['loss'] == pytest.approx(dense['loss'], abs=1e-4) and cut['MB'] == pytest.approx(dense['MB'], rel=0.05)
    assert rows['bitnet: recovered']['MB'] < 0.8 * dense['MB'] and recovered['MB'] < dense['MB']
    assert recovered['loss'] < rows['trix: 6 of them, ternary']['loss']
    assert rows['bitnet: recovered']['loss'] < rows['bitnet: ternary']['loss']
    assert all(row['tokens/s'] > 0 for row in rows.values()) and dense['to dense'] == 0 and dense['speed'] == 1
    model, _ = checkpoint.load_model(here / 'runs' / 'convert' / 'trix' / 'recovered', 'cpu')
    assert model.config.trix_top_k == 6
    capsys.readouterr()
    evaluate.main([str(here / 'runs' / 'convert' / 'bitnet' / 'recovered'), '--eval_tokens=0', '--device=cpu'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['loss'] == pytest.approx(rows['bitnet: recovered']['loss'], abs=1e-6)


def test_the_shapes_have_the_width_or_the_weights_that_they_say():
    bitnet, wide, heavy = deployed.shapes().values()
    assert wide.trix_top_k * wide.trix_hidden == bitnet.d_ff
    assert 2 * heavy.trix_top_k * heavy.trix_hidden == 3 * bitnet.d_ff and heavy.act_bits == wide.act_bits == 8
    with torch.device('meta'):
        assert sum(p.numel() for p in GPT(bitnet).parameters()) == 95_367_936


@pytest.mark.skipif(not (find_spec('xllamacpp') and find_spec('gguf')), reason='development requirements')
def test_llama_cpp_and_packed_models_decode_in_turn(here, monkeypatch):
    small = GPTConfig(n_embd=256, n_layer=1, n_head=4, d_ff=256, vocab_size=600, ffn='swiglu', linear='bitnet')
    shapes = {'BitNet': small, 'TriX, as wide': replace(small, ffn='trix', trix_hidden=128, act_bits=8)}
    monkeypatch.setattr(deployed, 'shapes', lambda: shapes)
    bench.main(['peers', '--llama_cpp', '--repeats=1', '--device=cpu', f'--out={here}/results'])
    rows = rows_of(here, 'peers_llama_cpp')
    assert list(rows) == ['BitNet fp32', 'BitNet packed', 'llama.cpp TQ2_0', 'llama.cpp F16', 'TriX, as wide packed']
    assert rows['llama.cpp TQ2_0']['ratio'] == 1 and all(row['tokens/s'] > 0 and row['prompt tokens/s'] > 0 for row in rows.values())
    assert rows['BitNet packed']['file MB'] < rows['llama.cpp F16']['file MB']


def test_llama_cpp_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(deployed, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='--llama_cpp needs gguf and xllamacpp: pip install'):
        bench.main(['peers', '--llama_cpp', '--device=cpu'])
    with pytest.raises(UserError, match='--llama_cpp is for peers'):
        bench.main(['blocks', '--llama_cpp'])
