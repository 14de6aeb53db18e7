"""plan: every figure is the one computed by hand, or measured on the real thing; nothing is written."""
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
from runtime import device as hardware
from runtime import disk
from runtime import plan
from runtime import profiling
import train
from corpora import opening
from configurator import UserError
from model import GPT, GPTConfig
from optim import make_optimizers
from runtime.profiling import readable
from runtime.runlog import duration
from runs import lines

CPU = torch.device('cpu')
TINY = ['--vocab_size=300', '--block_size=32', '--n_layer=1', '--n_head=2', '--n_embd=16', '--ffn=gelu', '--device=cpu', '--batch_size=4',
        '--batch_tokens=128', '--dataset=missing']


# ---- memory

WHOLE = {'block_size': 96, 'vocab_size': 1500, 'n_embd': 32, 'n_layer': 2, 'trix_hidden': 32, 'chunk_size': 32}


@pytest.mark.parametrize('changes', [
    {'ffn': 'gelu', 'n_layer': 4, 'dropout': 0.1},
    {'ffn': 'swiglu', 'n_kv_head': 2, 'tie_embeddings': False, 'n_layer': 1},
    {'ffn': 'trix', 'n_layer': 3}, {'ffn': 'trix', 'dropout': 0.1},
    {'linear': 'bitnet', 'ffn': 'swiglu', 'n_layer': 3},
    {'mixer': 'resonance', 'ffn': 'swiglu', 'n_layer': 3}, {'mixer': 'resonance', 'attention_every': 2}], ids=str)
def test_activations_are_those_measured_on_the_whole_model(changes):
    config = GPTConfig(**{**WHOLE, **changes})
    *a_sequence, copies = profiling.measured(GPT(config), torch.device('cpu'), torch.float32)
    found = plan.activations(config, 'cpu', torch.float32)
    assert found == pytest.approx((*a_sequence, copies), rel=0.02)


def test_dropout_does_not_make_a_gpu_keep_attention_weights():
    config = GPTConfig(block_size=128, vocab_size=600, n_embd=32, n_layer=1, dropout=0.1)
    on_gpu = plan.activations(config, 'cuda', torch.float32)
    assert on_gpu == plan.activations(replace(config, dropout=0.0), 'cpu', torch.float32)
    assert plan.activations(config, 'cpu', torch.float32)[0] - on_gpu[0] > 4 * 128**2 * 4  # heads, bytes


def test_weights_and_moments_are_counted_and_the_rest_grows_with_the_sequences():
    config = train.load([*TINY, '--optimizer=muon', '--n_layer=4'])
    weights, matrices = 4 * sum(p.numel() for p in GPT(config.pick(GPTConfig)).parameters()), 4 * 4 * 16 * 16 * (4 + 8)
    memory = plan.estimate(config, 'cpu', torch.float32)
    assert memory(4, False)['parameters'] == memory(4, False)['gradients'] == weights
    assert memory(4, False)['optimizer'] == 2 * weights - matrices
    assert memory(8, False)['activations'] == 2 * memory(4, False)['activations'] > 2 * memory(4, True)['activations']


@pytest.mark.parametrize('words', [['--ffn=gelu', '--n_layer=2'], ['--ffn=swiglu', '--batch_tokens=4096', '--activation_checkpointing=true']], ids=str)
def test_the_plan_is_what_a_run_of_train_py_takes(words, corpus, tmp_path):
    """To 15 % of the memory that comes on top of Python and torch; with a probe of half of the sequences, too."""
    run = ['--vocab_size=300', '--block_size=256', '--n_head=4', '--n_embd=256', '--batch_size=8', '--batch_tokens=2048', '--device=cpu',
           *words, f'--dataset={corpus}', f'--out_dir={tmp_path}/run', '--max_steps=6', '--eval_interval=0', '--sample_interval=0',
           '--save_interval=0', '--log_interval=1']
    # not in a fork of the tests, which has memory of theirs to use again
    done = subprocess.run([sys.executable, '-c', 'import sys, torch, torch._dynamo, train; from runtime import device; torch.set_num_threads(1); '
                           'print("base", device.peak_memory_gb(torch.device("cpu"))); train.main(sys.argv[1:])', *run],
                          cwd=Path(plan.__file__).parent.parent, capture_output=True, text=True)
    said = done.stdout
    assert done.returncode == 0, done.stderr
    seen, config = lines(tmp_path / 'run', 'train'), train.load(run)
    base = float(re.search(r'base ([.\d]+)', said)[1])
    rows, micro_steps = train.micro_batches(config, 1)
    found = plan.probe(config, rows, micro_steps, 0.1, lambda n: True)
    assert found.bytes / 1e9 == pytest.approx(max(line['mem_gb'] for line in seen) - base, rel=0.15)
    seconds = statistics.median(config.batch_tokens / line['tokens_per_s'] for line in seen[2:])
    assert 0.3 < (found.micro * micro_steps + found.rest) / seconds < 3  # at the mercy of what else runs here
    half = plan.probe(config, rows, micro_steps, 0.1, lambda n: n <= rows // 2)
    assert half.rows == rows // 2 and half.bytes + half.a_sequence * rows / 2 == pytest.approx(found.bytes, rel=0.15)


def test_a_probe_that_takes_too_long_or_does_not_fit_is_not_made():
    config = train.load(TINY)
    assert plan.probe(config, 4, 1, plan.PROBE, lambda n: True) is None and plan.probe(config, 4, 1, 0.0, lambda n: False) is None


# ---- time

def test_the_speed_is_printed_with_how_it_was_got(monkeypatch):
    monkeypatch.setattr(plan, 'time', SimpleNamespace(perf_counter=iter([0, 0.6, 1.2]).__next__))  # two products in 1.2 s
    assert plan.achieved(torch.device('cpu'), torch.float32) == (pytest.approx(0.35 * 2 * 2 * 1024**3 / 1.2), (
        '35% (an assumption) of the 4 GFLOP/s measured now on cpu in products of 1024 x 1024 matrices, float32'))
    monkeypatch.setattr(hardware, 'peak_flops', lambda device, dtype: 100e12)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Card')
    assert plan.achieved(torch.device('cuda'), torch.bfloat16) == (
        pytest.approx(35e12), '35% (an assumption) of the 100 TFLOP/s that the maker of Card states')


def test_counts_are_readable():
    assert [plan.count(n) for n in (12, 999.9, 1_638_400, 5.1e9)] == ['12', '1k', '1.64M', '5.1B']


# ---- disk

BF16 = ['--optimizer=adamw8bit', '--dtype=bfloat16', '--weights_dtype=bfloat16']


@pytest.mark.parametrize('words', [[], ['--optimizer=muon'], ['--ffn=trix', '--tie_embeddings=false'], BF16], ids=str)
def test_a_checkpoint_is_as_large_as_planned(tmp_path, words):
    config = train.load([*TINY, '--n_embd=64', '--vocab_size=3000', *words])
    model = disk.model_of(config)
    optimizers = make_optimizers(model, config, CPU)
    with torch.autocast('cpu', torch.bfloat16, enabled=config.dtype == 'bfloat16'):
        model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    checkpoint.save(tmp_path / 'x.pt', {'model': model.state_dict(), **{name: o.state_dict() for name, o in optimizers.items()}})
    assert plan.checkpoint_bytes(config)[0] == pytest.approx((tmp_path / 'x.pt').stat().st_size, rel=0.03)


@pytest.mark.parametrize('words, number', [
    ([], 5), (['--eval_interval=0'], 4), (['--keep=1', '--mandatory_steps=5,50'], 5), (['--schedule=two_stage'], 7),
    (['--keep=0'], 12), (['--keep=0', '--eval_interval=0', '--save_interval=300'], 4), (['--save_interval=0'], 1),
    (['--save_interval=1000', '--eval_interval=500'], 3)], ids=str)
def test_how_many_checkpoints_there_are_at_most(words, number):
    config = train.load([*TINY, '--max_steps=1000', '--save_interval=100', '--eval_interval=250', *words])
    assert plan.checkpoints_at_most(config)[0] == number


# ---- the page

@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Memory in round figures, a probe of two sequences that takes 0.5 s, and an empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, 'achieved', lambda device, dtype: (1e9, 'as agreed'))
    monkeypatch.setattr(plan, 'probe', lambda *_: plan.Measured(2, 7e9, 1.5e9, 0.2, 0.1))

    def estimate(config, kind, dtype):
        return lambda rows, checkpointing: {
            'parameters': 1e9, 'gradients': 1e9, 'optimizer': 2e9,
            'activations': rows * 1e9 / (4 if checkpointing else 1) / (2 if dtype == torch.bfloat16 else 1)}
    monkeypatch.setattr(plan, 'estimate', estimate)


def planned(capsys, *words):
    train.main(['--plan', *TINY, *words])
    return capsys.readouterr().out


def rows_of(text):
    return {line.split()[0]: re.split(r' {2,}', line.strip()) for line in text.splitlines() if line.startswith('  ')}


def test_the_page_for_another_card_has_the_figures_computed_by_hand(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    text = planned(capsys, '--max_steps=1000', '--eval_interval=100', '--eval_tokens=3840', '--card=T4', '--dtype=float16',
                   '--mandatory_steps=125', '--price=0.5')
    C, V, T = 16, 300, 32
    total, flops = V * C + 12 * C * C + 3 * C, 6 * (V * C + 12 * C * C) + 12 * C * T
    assert f'{total:,} parameters, {total:,} active (used by a token), {V * C:,} in embeddings (tied to the head)' in text
    assert f'{flops / 1e6:,.1f} MFLOP a token' in text and '128,000 tokens; missing is not prepared yet' in text
    rows = rows_of(text)
    assert rows['parameters'][1] == '1.0 GB' and rows['activations'][1] == '4.0 GB' and 'measured' not in rows
    assert rows['total'][1:] == ['8.0 GB', 'of 16.0 GB of a card of 16 GB: fits (an estimate, without what operators and malloc hold: nothing was run)']
    assert rows['1'][1:] == ['5.0 GB', 'fits', '4.2 GB', 'fits'] and rows['16'][1:] == ['20.0 GB', 'does not fit', '8.0 GB', 'fits']
    assert rows['4'][0] == '4 (this run)' and 'what to change' not in text
    seconds = flops * 128_000 * (1 + 11 * 1280 / 128_000) / (0.35 * 65e12)
    assert 'plan for T4 with 16 GB, float16; this card is not in this machine' in text
    assert f'{duration(seconds)} in all, with 11 validations' in text and 'as agreed' not in text
    hours = seconds / 3600
    assert f'cost: {plan.number(hours / 2)} = {plan.number(hours)} h x 0.5 an hour\n' in text
    table = {line.split()[0]: line.split() for line in text[text.index('    hours'):].splitlines()[1:]}
    assert list(table) == ['0', '50', '125', '250', '500', '750', '999', '1,000']  # corners, quarters, mandatory steps
    assert table['250'][3:] == [plan.number(hours / 4), plan.number(hours / 8), '1/4', 'of', 'the', 'run']
    assert table['125'][5:] == ['mandatory', 'checkpoint'] and table['1,000'][-1] == 'end'
    size = 12 * total  # weights and two moments
    assert (f'6 checkpoints at most (keep=3, the best, 1 permanent, one being written) of {readable(size)} = {readable(6 * size)} '
            'in runs/default') in text
    assert 'learning rate, schedule=cosine' in text and not list(tmp_path.iterdir())


def test_memory_and_time_are_those_of_the_probe(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, 'room', lambda *_: (16e9, 'a machine'))
    monkeypatch.setattr(hardware, 'peak_memory_gb', lambda device: 0.5)
    text = planned(capsys, '--max_steps=1000', '--eval_interval=100', '--eval_tokens=3840', '--batch_tokens=256')
    rows = rows_of(text)  # 7 GB for two sequences and 1.5 for each further one; estimated 4 + 4
    assert rows['measured'][1] == '+2.0 GB' and 'a real step of 2 x 32' in text and rows['base'][1] == '500.0 MB'
    assert rows['total'][1:] == ['10.5 GB', 'of 16.0 GB of a machine: fits']
    assert rows['8'][1:] == ['16.5 GB', 'does not fit', '10.5 GB', 'fits']  # the activations of 8 take 6 GB less
    # two micro-steps of twice 0.2 s, and 0.1; 900 s and validations of a third of 42,240 tokens
    assert 'time: 0.9 s a step, 284 tokens/s (measured now' in text and '; 15 min 50 s in all, with 11 validations' in text
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_measured_is_estimated_and_says_so(quick, capsys, monkeypatch):
    monkeypatch.setattr(plan, 'probe', lambda *_: None)
    text = planned(capsys)
    assert '(an estimate: as agreed)' in text and 'which can be as much again for tensors below 32 MB: nothing was run' in text


def test_what_to_change_is_said_with_numbers_and_is_accepted(quick, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    text = planned(capsys, '--card_gb=6.5', '--dtype=float32')
    assert 'of 6.5 GB of a card of 6.5 GB: DOES NOT FIT' in text
    said = [line.strip() for line in text[text.index('what to change:'):].splitlines()[1:] if line.startswith('  --')]
    assert '--batch_size=2 --batch_tokens=128 (same results): 6.0 GB, fits' in said
    assert '--parallel=fsdp (on 8 devices, same results): 4.5 GB, fits' in said
    assert '--activation_checkpointing=true (same results, slower): 5.0 GB, fits' in said
    assert '--dtype=bfloat16 (faster, rounds more): 6.0 GB, fits' in said
    assert '--batch_size=2 --batch_tokens=128 --activation_checkpointing=true (same results, slower): 4.5 GB, fits' in said
    for line in said:
        train.load([*TINY, *shlex.split(line.split(' (')[0])])
    assert 'time: unknown, because --card_gb gives the memory of a card alone' in text and '    hours' not in text
    assert 'or a smaller model' in planned(capsys, '--card_gb=0.1') and 'or a smaller model' not in text


def test_epochs_and_disk_count_what_is_prepared(quick, corpus, capsys):
    text = planned(capsys, f'--dataset={corpus}', '--max_steps=500')
    tokens = opening.open_dataset(train.load([*TINY, f'--dataset={corpus}'])).train_tokens
    assert f'64,000 tokens: {64_000 / tokens:.2f} epochs of the {tokens:,} in {corpus}' in text
    assert readable(sum(f.stat().st_size for f in corpus.rglob('*') if f.is_file())) + ' of data are in' in text


def test_a_directory_whose_preparation_was_interrupted_is_left_as_it_is(quick, tmp_path, capsys):
    (tmp_path / 'data' / 'pylib').mkdir(parents=True)
    text = planned(capsys, '--dataset=pylib')
    assert 'pylib is not prepared yet' in text and not any((tmp_path / 'data' / 'pylib').iterdir())


def test_a_disk_without_room_is_named(quick, capsys, monkeypatch):
    monkeypatch.setattr(plan, 'free_bytes', lambda path: 1000)
    assert '1.0 kB are free: NOT ENOUGH' in planned(capsys)


@pytest.mark.parametrize('words, message', [
    (['--card=RTX 3070'], '--card=RTX 3070: this card is not in the table. The nearest names are .*RTX 3080'),
    (['--card=A100'], '--card=A100: A100 comes with 40 or 80 GB. Say which: --card="A100 40GB"'),
    (['--card=T4', '--dtype=bfloat16'], '--dtype=bfloat16: T4 does not have it; use --dtype=float16')], ids=str)
def test_a_card_that_is_unknown_or_cannot_do_it_is_refused_with_what_to_write(words, message):
    with pytest.raises(UserError, match=message):
        plan.find_target(train.load(['--plan', *words]))


@pytest.mark.parametrize('key', ['--card=T4', '--card_gb=16', '--price=1'])
def test_options_of_a_plan_are_refused_without_one(key):
    with pytest.raises(UserError, match='is for --plan'):
        train.load([key])


def test_a_card_with_another_memory_keeps_its_speed_and_a_precision_has_its_own():
    plain, larger, tf32, fp32, apple = (plan.find_target(train.load(['--plan', *words])) for words in (
        ['--card=RTX 3060'], ['--card=RTX 3060', '--card_gb=24'], ['--card=RTX 3060', '--dtype=tf32'],
        ['--card=A100 80GB', '--dtype=float32'], ['--card=Apple M2 Max', '--card_gb=64']))
    assert (plain.memory_limit, plain.dtype, plain.half, plain.speed) == (12e9, torch.bfloat16, torch.bfloat16, 0.35 * 25.5e12)
    assert (larger.memory_limit, larger.speed) == (24e9, plain.speed) and (tf32.dtype, tf32.speed) == (torch.float32, 0.35 * 12.7e12)
    assert (fp32.memory_limit, fp32.speed) == (80e9, 0.35 * 19.5e12) and (apple.dtype, apple.half) == (torch.float32, None)


@pytest.mark.parametrize('gb', ['-1', 'inf'])
def test_a_card_without_sense_is_refused(gb):
    with pytest.raises(UserError, match='card_gb=.*: expected the memory of a card in GB'):
        train.load(['--plan', f'--card_gb={gb}'])
