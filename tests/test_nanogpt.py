"""nanoGPT beside ours: its own commands are run, with every seed, and both losses are on the same text."""
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import settings
from benchmarks import nanogpt
from benchmarks.measure import ROOT, whole_process
from configurator import UserError
from data import TokenData
from test_prepare import prepared, texts, write_jsonl


FAKE_TRAIN = """
# gradient_accumulation_steps = 1; exec(open('configurator.py').read())
import os, sys, torch
words = {'learning_rate': '1e-3', 'eval_interval': '250'}
for word in sys.argv[1:]:
    if '=' in word:
        words.update([word[2:].split('=')])
    else:
        exec(open(word).read(), words)
torch.manual_seed(1337 + 0)
steps = int(words['max_iters'])
os.makedirs(words['out_dir'], exist_ok=True)
print('step 0: train loss 5.7, val loss 5.7')
for i in range(steps + 1):
    print(f'iter {i}: loss 5.0, time {100 + i % 2:.2f}ms, mfu 1%')
if int(words['max_iters']) % int(words['eval_interval']) == 0:
    bias = torch.tensor(float(words['learning_rate']) * 100 + torch.initial_seed() % 10)  # the loss to report
    torch.save({'model': {'bias': bias}, 'model_args': {'n': 1}}, words['out_dir'] + '/ckpt.pt')
"""
FAKE_MODEL = """
import torch
class GPTConfig:
    def __init__(self, n): pass
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, y):
        assert x.shape == y.shape and not self.training
        return None, self.bias
"""


def checkout(path):
    """A stand-in for a checkout of nanoGPT: it takes nanoGPT's command line, and writes what nanoGPT writes."""
    (path / 'config').mkdir(parents=True)
    (path / 'train.py').write_text(FAKE_TRAIN)
    (path / 'model.py').write_text(FAKE_MODEL)
    (path / 'configurator.py').write_text('pass')
    (path / 'config' / 'train_shakespeare_char.py').write_text("out_dir = 'out-shakespeare_char'\n")
    return path


def load(*words):
    return bench.load(['peers', *words], bench.BenchConfig, positional=('command',))


def test_the_race_takes_the_best_rate_every_seed_and_the_time_of_training_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = prepared(write_jsonl(tmp_path / 'a.jsonl', texts(60)), tmp_path / 'data' / 'x')
    monkeypatch.setattr(nanogpt, 'PEER_RATES', (2e-3, 1e-3))
    losses = iter([[9.0, 7.0, 6.9], [9.0, 8.5, 8.3]])

    def trained(words):
        out = Path(next(word for word in words if '--out_dir=' in word).partition('=')[2])
        out.mkdir(parents=True)
        (out / 'metrics.jsonl').write_text(''.join(json.dumps({'kind': 'eval', 'step': i, 'tokens': 1000 * i, 'loss': loss}) + '\n'
                                                   for i, loss in enumerate(next(losses))))
    monkeypatch.setattr(nanogpt, 'ensure_trained', trained)
    config = load(f"--nanogpt={checkout(tmp_path / 'nano')}", '--seeds=2', '--device=cpu', f'--out={tmp_path}/results')
    nanogpt.race(config, TokenData(data, 16, 300), {'nanoGPT': 2e-3, 'ours': 1e-3, 'speedrun_tiny': 1e-3})
    folder, = (tmp_path / 'results').iterdir()
    result = json.loads((folder / 'peers_race.json').read_text())
    assert result['learning_rate'] == 1e-3
    first, second = result['rows']
    assert first['nanoGPT loss'] == pytest.approx(7.1, abs=1e-6) and second['nanoGPT loss'] == pytest.approx(8.1, abs=1e-6)  # 1337, 1338
    assert first['nanoGPT tokens'] == 1220 * 4096 and first['nanoGPT seconds'] == pytest.approx(1220 * 4096 * 2e-3)
    assert first["tokens to nanoGPT's loss"] == 1000 and first['part of the time'] == pytest.approx(1000 / (1220 * 4096) / 2)
    assert second["tokens to nanoGPT's loss"] == second['part of the time'] == 'never'
    assert sorted(path.name for path in (tmp_path / 'runs' / 'peers').iterdir()) == [
        'nanogpt_0.001_0', 'nanogpt_0.001_1', 'nanogpt_0.002_0', 'speedrun_tiny_0', 'speedrun_tiny_1']
    out, started = tmp_path / 'runs' / 'peers' / 'nanogpt_0.001_0', []
    monkeypatch.setattr(nanogpt, 'whole_process', lambda words, **options: started.append(words) or whole_process(words, **options))
    kept = nanogpt.nanogpt_trained(config, TokenData(data, 16, 300), 1e-3, 0, out)
    assert kept == pytest.approx(7.1, abs=1e-6) and not started
    other = prepared(write_jsonl(tmp_path / 'b.jsonl', texts(70)), tmp_path / 'data' / 'y')  # other data: not the loss that is kept
    nanogpt.nanogpt_trained(config, TokenData(other, 16, 300), 1e-3, 0, out)
    assert len(started) == 1 and (out / 'train.bin').resolve() == (other / 'train.bin').resolve()


def test_a_peer_that_is_not_nanogpt_is_refused(tmp_path):
    def why():
        with pytest.raises(UserError, match='not a checkout of nanoGPT') as error:
            load(f'--nanogpt={tmp_path}')
        return str(error.value)
    assert '(no train.py)' in why()
    (tmp_path / 'train.py').write_text('print("another trainer")')
    assert "(train.py is not nanoGPT's)" in why()
    (tmp_path / 'train.py').write_text(FAKE_TRAIN), (tmp_path / 'configurator.py').write_text('pass')
    assert '(no model.py)' in why()
    (tmp_path / 'model.py').write_text('class GPT:\n    pass\n')
    assert "(model.py is not nanoGPT's)" in why()
    with pytest.raises(UserError, match="train.py is not nanoGPT's"):  # this repository itself
        load()
    (tmp_path / 'model.py').write_text(FAKE_MODEL)
    assert '(no config/train_shakespeare_char.py)' in why()
    with pytest.raises(UserError, match='--shakespeare is for peers --nanogpt=PATH'):
        load('--llama_cpp', '--shakespeare')


def test_shakespeare_runs_the_three_commands_in_turn_and_compares_losses_per_character(tmp_path, monkeypatch, capsys):
    """nanoGPT is a stand-in, and so are our runs: what they leave is enough."""
    monkeypatch.chdir(tmp_path)
    data, started = prepared(write_jsonl(tmp_path / 'a.jsonl', texts(60)), tmp_path / 'data' / 'x'), []
    monkeypatch.setattr(nanogpt, 'open_dataset', lambda config: TokenData(data, 16, 300))

    def run(words, cwd):
        started.append([str(word) for word in words])
        if words[1] == '-c':
            return whole_process(words, cwd=cwd)
        out = Path(words[-1].partition('=')[2])
        out.mkdir()
        bits = [3.0, 2.0, 2.5] if out.name == 'shakespeare' else [4.0]  # the best is not the last
        (out / 'metrics.jsonl').write_text(''.join(json.dumps({'kind': 'eval', 'loss': 9.0, 'bits_per_byte': b}) + '\n' for b in bits))
        return 60.0, 0.5, ''
    monkeypatch.setattr(nanogpt, 'whole_process', run)
    nano = checkout(tmp_path / 'nano')
    bench.main(['peers', f'--nanogpt={nano}', '--shakespeare', '--seeds=2', '--device=cpu', f'--out={tmp_path}/results'])
    words = started[0]  # the command line of nanoGPT's README, with the seed in front
    assert words[3:5] == ['0', 'config/train_shakespeare_char.py'] and {'--compile=False', '--max_iters=2000', '--device=cpu'} < set(words)
    assert [(words[2], words[4]) for words in started[1:3]] == [
        (str(ROOT / 'config/shakespeare_char.py'), '--seed=1337'), (str(ROOT / 'config/shakespeare.py'), '--seed=1337')]
    assert len(started) == 6 and started[4][4] == '--seed=1338'
    folder, = (tmp_path / 'results').iterdir()
    result = json.loads((folder / 'peers_shakespeare.json').read_text())
    assert result['losses']['nanoGPT'] == pytest.approx([7.1, 8.1], abs=1e-6)  # seeds 1337 and 1338 at 1e-3
    rows = {row['name']: row for row in result['rows']}
    assert list(rows) == ['nanoGPT', 'shakespeare_char', 'shakespeare'] and rows['shakespeare']['seconds'] == 60
    assert rows['shakespeare']['nats per character'] == pytest.approx(2 * math.log(2))
    assert rows['shakespeare_char']['nats per character'] == pytest.approx(4 * math.log(2))
    assert 'nanoGPT, seed 1338: 8.1000 nats per character' in capsys.readouterr().out


def test_on_a_gpu_the_peer_is_gpt2_with_the_same_model_batch_and_vocabulary_on_both_sides(tmp_path, monkeypatch):
    """The GPU is a stand-in, and so are our runs. nanoGPT's first rounds compile, and they do not count."""
    monkeypatch.chdir(tmp_path)
    data, started = prepared(write_jsonl(tmp_path / 'a.jsonl', texts(60)), tmp_path / 'data' / 'x'), []
    monkeypatch.setattr(nanogpt, 'open_dataset', lambda config: TokenData(data, 16, 300))
    monkeypatch.setattr(nanogpt.hardware, 'resolve', lambda *_: (torch.device('cuda'), torch.bfloat16, 'a stand-in'))
    monkeypatch.setattr(nanogpt.hardware, 'peak_flops', lambda *_: 989e12)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=141e9))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr('benchmarks.measure.machine', lambda config: 'stand-in')
    monkeypatch.setattr('benchmarks.measure.facts', lambda *_: {})

    def run(words, cwd):
        words = [str(word) for word in words]
        started.append(words)
        if words[1] == '-c':
            meta = next(word for word in words if word.startswith('--dataset=')).partition('=')[2]
            assert pickle.loads((Path(meta) / 'meta.pkl').read_bytes()) == {'vocab_size': 50304}
            times = [9000.0] * 4 + [260.0 + i for i in range(4)]
            return 60.0, 1.0, '\n'.join(f'iter {i}: loss 9.0, time {ms:.2f}ms, mfu 1%' for i, ms in enumerate(times)) + '\npeak: 33.30 GB\n'
        speed = 600_000 if '--dtype=fp8' in words else 550_000
        line = f'step 1/8 (12 %)  loss 9.0  lr 1e-3  {speed:,} tokens/s  31.20 GB  0:01 left\n'
        return 60.0, 1.0, 8 * line
    monkeypatch.setattr(nanogpt, 'whole_process', run)
    bench.main(['peers', f"--nanogpt={checkout(tmp_path / 'nano')}", '--repeats=3', f'--out={tmp_path}/results'])
    result = json.loads((tmp_path / 'results' / 'stand-in' / 'peers_gpt2.json').read_text())
    rows = {row['name']: row for row in result['rows']}
    assert list(rows) == ['nanoGPT', 'ours', 'ours, fp8'] and len(started) == 9
    assert rows['nanoGPT']['seconds'] == pytest.approx(0.2615) and rows['nanoGPT']['peak GB'] == 33.3
    assert rows['ours']['tokens/s'] == pytest.approx(550_000) and rows['ours']['peak GB'] == 31.2
    assert rows['ours']['ratio'] == pytest.approx(0.2615 * 550_000 / 131_072)
    assert rows['ours']['MFU'] == pytest.approx((6 * 123.6e6 + 12 * 12 * 768 * 1024) * 550_000 / 989e12, rel=0.001)
    theirs, ours, fp8 = (set(words) for words in started[:3])
    same = {'--n_layer=12', '--n_head=12', '--n_embd=768', '--block_size=1024', '--batch_size=32'}
    assert same | {'--gradient_accumulation_steps=4', '--bias=False', '--device=cuda', '--max_iters=8'} < theirs
    assert same | {'--batch_tokens=131072', '--vocab_size=50304', '--norm=layernorm', '--positions=learned'} < ours
    assert {word for word in fp8 - ours if 'out_dir' not in word} == {'--dtype=fp8'}
    settings.load([word for word in started[1] if word.startswith('--')])  # train.py takes our command line
