"""A run: it learns, resumes exactly after a kill, reports problems in one line, and leaves no partial files."""
import contextlib
import importlib.util
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import prepare
import sample
import schedule as schedules
import train
from runtime import plan
from configurator import UserError
from data import TokenData
from model import GPT
from tokenizer import EOT, Characters
from runs import arguments, assert_same_run, finish, lines, lines_so_far, losses, start

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    code, said = finish(arguments(corpus, out))
    assert code == 0, said
    return out


# ---- it trains

def test_a_run_learns_and_writes_its_files(whole):
    train_lines, evals = lines(whole, 'train'), lines(whole, 'eval')
    assert [line['step'] for line in train_lines] == list(range(1, 41))
    assert abs(evals[0]['loss'] - math.log(300)) < 0.3 and evals[-1]['loss'] < evals[0]['loss'] - 0.7
    assert evals[-1]['perplexity'] == pytest.approx(math.exp(evals[-1]['loss']))
    keys = {'step', 'tokens', 'loss', 'lr', 'wd', 'grad_norm', 'tokens_per_s', 'mfu', 'mem_gb', 'loader_wait', 'trix_overload'}
    assert keys <= set(train_lines[0]) and train_lines[-1]['tokens'] == 40 * 128
    status = json.loads((whole / 'status.json').read_text())
    assert (status['state'], status['step']) == ('finished', 40)
    assert json.loads((whole / 'config.json').read_text())['n_embd'] == 16
    assert {line['step'] for line in map(json.loads, (whole / 'samples.jsonl').read_text().splitlines())} == {10, 20, 30, 40}  # at step 0 they are noise
    assert 'python' in (whole / 'log.txt').read_text() and not list(whole.rglob('*.tmp'))


def test_bits_per_byte_follow_from_the_bytes_of_the_targets(whole, corpus):
    data = TokenData(corpus, 16, 300)
    encoding = train.load_tokenizer(corpus)
    _, y = data.val_batch(data.val_windows(256))
    size = sum(len(encoding.decode_single_token_bytes(t)) for t in y.flatten().tolist() if t != encoding.eot_token)
    line = lines(whole, 'eval')[-1]
    assert line['bits_per_byte'] == pytest.approx(line['loss'] * y.size / math.log(2) / size)


def test_accumulated_micro_steps_equal_one_large_batch(corpus, tmp_path, whole):
    code, said = finish(arguments(corpus, tmp_path / 'run', '--batch_size=8', '--dropout=0', '--max_steps=6'))
    code2, said2 = finish(arguments(corpus, tmp_path / 'two', '--batch_size=2', '--dropout=0', '--max_steps=6'))
    assert (code, code2) == (0, 0), said + said2
    for a, b in zip(losses(tmp_path / 'run'), losses(tmp_path / 'two')):
        assert a[2] == pytest.approx(b[2], abs=2e-5)


def test_weight_decay_is_on_matrices_only():
    config = train.load(['--n_embd=16', '--ffn=trix', '--norm=layernorm', '--bias=1', '--vocab_size=300'])
    model = GPT(config.pick(train.GPTConfig))
    decayed, rest = train.make_optimizers(model, config, torch.device('cpu'))['optimizer'].param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed['weight_decay'] == 0.1 and rest['weight_decay'] == 0
    assert {names[id(p)].split('.')[-1] for p in rest['params']} == {'weight', 'bias'} and all(p.dim() == 1 for p in rest['params'])
    assert 'blocks.0.ffn.up' in {names[id(p)] for p in decayed['params']}


def test_activation_checkpointing_trains_the_same(corpus, tmp_path, whole):
    code, said = finish(arguments(corpus, tmp_path / 'run', '--activation_checkpointing'))
    assert code == 0, said
    assert losses(tmp_path / 'run') == losses(whole)


# ---- it survives

def test_resume_is_bit_exact_after_10_sigkills(corpus, tmp_path, whole):
    """At random moments of the run; every other time while a checkpoint is being written."""
    argv, draw = arguments(corpus, tmp_path / 'run', '--resume=auto', '--save_interval=1'), random.Random(1)
    folder, killed_while_saving, reached = tmp_path / 'run' / 'checkpoints', 0, []
    for kill in range(10):
        process, when = start(argv), draw.randrange(1, 4)  # lines of metrics.jsonl from now on
        target = len(lines_so_far(tmp_path / 'run')) + when
        while len(lines_so_far(tmp_path / 'run')) < target and process.is_alive():
            time.sleep(0.001)
        while kill % 2 and not list(folder.glob('*.tmp')) and process.is_alive():
            time.sleep(0.0002)
        killed_while_saving += bool(list(folder.glob('*.tmp')))
        time.sleep(0 if kill % 2 else draw.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, 'the run was over before the kill'
        reached.append(len(lines_so_far(tmp_path / 'run')))
    assert killed_while_saving >= 3 and len(set(reached)) > 5
    code, said = finish(argv)
    assert code == 0, said
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75_and_the_resumed_run_is_bit_exact(corpus, tmp_path, whole, number):
    out = tmp_path / 'run'
    argv = arguments(corpus, out, '--resume=auto', '--save_interval=0')
    process = start(argv)
    while not (out / 'metrics.jsonl').exists() or len((out / 'metrics.jsonl').read_text().splitlines()) < 12:
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == 75
    path, state = checkpoint.find(out)
    assert 0 < state['step'] < 40 and json.loads((out / 'status.json').read_text())['state'] == 'interrupted'
    assert str(path) in Path(f'{out}.console').read_text()
    code, said = finish([*argv, '--save_interval=4'])
    assert code == 0 and f'resuming from {path}' in said and 'changed: save_interval 0 -> 4' in said
    assert_same_run(out, whole)


def test_a_signal_between_micro_steps_repeats_the_step_with_the_same_dropout(corpus, tmp_path, whole):
    def interrupt():
        backward, count = torch.Tensor.backward, iter(range(10**6))

        def interrupting(loss, *args, **kwargs):
            backward(loss, *args, **kwargs)
            if next(count) == 14:  # the first of the two micro-steps of step 7
                os.kill(os.getpid(), signal.SIGTERM)
        torch.Tensor.backward = interrupting
    argv = arguments(corpus, tmp_path / 'run', '--resume=auto')
    assert finish(argv, interrupt)[0] == 75
    assert checkpoint.find(tmp_path / 'run')[1]['step'] == 7
    assert finish(argv)[0] == 0
    assert_same_run(tmp_path / 'run', whole)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_resumed(corpus, tmp_path, whole):
    out = tmp_path / 'run'
    assert finish(arguments(corpus, out))[0] == 0
    for path in checkpoint.steps(out / 'checkpoints')[-2:]:
        content = bytearray(path.read_bytes())
        if path.name == 'step_0000040.pt':
            path.write_bytes(content[:len(content) // 2])
        else:  # one flipped bit in a tensor
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    code, said = finish(arguments(corpus, out, '--resume=auto', '--keep=0'))
    assert code == 0, said
    assert 'skipped:' in said and 'step_0000040.pt: truncated' in said and 'fails its checksum' in said
    assert_same_run(out, whole)


def test_a_resumed_run_can_have_a_new_directory(corpus, tmp_path, whole):
    first = checkpoint.steps(whole / 'checkpoints')[0]
    code, said = finish(arguments(corpus, tmp_path / 'other', f'--resume={first}'))
    assert code == 0, said
    (_, a), (_, b) = checkpoint.find(tmp_path / 'other'), checkpoint.find(whole)
    assert all(torch.equal(a['model'][key], b['model'][key]) for key in b['model'])


def test_resuming_an_earlier_checkpoint_needs_another_directory(corpus, tmp_path, whole):
    first, last = checkpoint.steps(whole / 'checkpoints')[0], checkpoint.steps(whole / 'checkpoints')[-1]
    code, said = finish(arguments(corpus, whole, f'--resume={first}'))
    assert code == 2 and f'has a later checkpoint, {last.name}' in said
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'metrics.jsonl').write_text('')
    code, said = finish(arguments(corpus, tmp_path / 'other', f'--resume={first}'))
    assert code == 2 and 'already holds a run' in said


def test_the_last_step_is_logged_and_an_interval_of_0_is_off(corpus, tmp_path):
    words = ['--log_interval=4', '--eval_interval=0', '--sample_interval=0', '--save_interval=0', '--max_steps=6']
    assert finish(arguments(corpus, tmp_path / 'run', *words))[0] == 0
    assert [line['step'] for line in lines(tmp_path / 'run', 'train')] == [4, 6]
    assert not lines(tmp_path / 'run', 'eval') and not (tmp_path / 'run/samples.jsonl').exists()
    assert not checkpoint.steps(tmp_path / 'run/checkpoints')


def test_a_run_is_never_overwritten(corpus, whole):
    before = (whole / 'metrics.jsonl').read_bytes()
    code, said = finish(arguments(corpus, whole))
    assert code == 2 and 'already holds a run' in said and '--resume=auto' in said
    assert (whole / 'metrics.jsonl').read_bytes() == before


def test_retention_keeps_the_newest_the_best_and_the_mandatory(corpus, tmp_path, whole):
    out = tmp_path / 'run'
    assert finish(arguments(corpus, out, '--keep=2', '--mandatory_steps=7,12', '--eval_interval=0'))[0] == 0
    assert [path.name for path in checkpoint.steps(out / 'checkpoints')] == [f'step_{s:07d}.pt' for s in (7, 12, 36, 40)]
    checkpoint.retain(out / 'checkpoints/step_0000040.pt', 1, {12})
    assert [path.name for path in checkpoint.steps(out / 'checkpoints')] == ['step_0000012.pt', 'step_0000040.pt']


def test_a_full_disk_leaves_the_older_checkpoint_good(corpus, tmp_path):
    out = tmp_path / 'run'
    assert finish(arguments(corpus, out, '--max_steps=8'))[0] == 0
    size = (out / 'checkpoints/step_0000008.pt').stat().st_size

    def nearly_full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    code, said = finish(arguments(corpus, out, '--resume=auto', '--max_steps=16'), nearly_full)
    assert code == 2 and 'could not be written (File too large)' in said and 'step_0000008.pt is the newest good' in said, said
    assert 'Traceback' not in said and not list(out.rglob('*.tmp'))
    assert checkpoint.find(out)[1]['step'] == 8


def test_non_finite_steps_are_skipped_recorded_and_end_the_run_with_exit_code_3(corpus, tmp_path):
    out = tmp_path / 'run'

    def poison():
        backward, count = torch.Tensor.backward, iter(range(10**6))

        def poisoned(loss, *args, **kwargs):
            step = next(count) // 2
            return backward(loss * math.nan if step == 6 or step >= 20 else loss, *args, **kwargs)
        torch.Tensor.backward = poisoned
    code, said = finish(arguments(corpus, out, '--max_skipped=3'), poison)
    assert code == 3, said
    events = lines(out, 'event')
    assert [event['step'] for event in events] == [7, 21, 22, 23] and len(sum(events[0]['windows'], [])) == 8
    assert 'step_0000020.pt' in said.splitlines()[-1]
    state = checkpoint.find(out)[1]
    assert state['step'] == 20 and all(value.isfinite().all() for value in state['model'].values())
    assert json.loads((out / 'status.json').read_text())['state'] == 'diverged'


# ---- every block

@pytest.mark.parametrize('words, keys', [
    (['--ffn=swiglu', '--linear=bitnet', '--n_layer=2', '--mixer=resonance', '--attention_every=2', '--dropout=0'],
     {'ternary_minus', 'ternary_zero', 'ternary_plus', 'ternary_scale', 'ternary_flips', 'ternary_fence', 'act_utilisation'}),
    (['--ffn=trix'], {'trix_overload', 'trix_entropy', 'trix_dead', 'ternary_minus', 'ternary_zero', 'ternary_plus', 'ternary_scale',
                      'ternary_flips', 'ternary_fence'}),
], ids=['hybrid', 'trix'])
def test_blocks_log_their_statistics_and_resume_exactly(corpus, tmp_path, words, keys):
    code, said = finish(arguments(corpus, tmp_path / 'whole', '--keep=0', *words))
    assert code == 0, said
    code, said = finish(arguments(corpus, tmp_path / 'rest', *words, f'--resume={tmp_path}/whole/checkpoints/step_0000020.pt'))
    assert code == 0, said
    whole, rest = ([{key: line[key] for key in ('step', 'loss', 'grad_norm', *keys)} for line in lines(tmp_path / run, 'train')]
                   for run in ('whole', 'rest'))
    assert rest == whole[20:]
    code, said = finish(arguments(corpus, tmp_path / 'chunks', *words, '--chunk_size=3', f'--resume={tmp_path}/whole/checkpoints/step_0000036.pt'))
    assert code == 0 and 'changed: chunk_size 2048 -> 3' in said, 'it changes nothing but speed'
    numbers = {key: [line[key] for line in whole] for key in keys}
    assert all(0 <= flips < 0.5 for flips in numbers['ternary_flips']) and max(numbers['ternary_flips']) > 0
    assert all(abs(sum(values) - 1) < 1e-6 for values in zip(*(numbers[f'ternary_{sign}'] for sign in ('minus', 'zero', 'plus'))))
    assert len(set(numbers['ternary_scale'])) == 40 and 0 < numbers['ternary_fence'][0] < 0.2


# ---- it refuses: one clear line, exit code 2, nothing left behind

@pytest.mark.parametrize('words, message', [
    (['--learnig_rate=1'], "unknown key 'learnig_rate', did you mean 'learning_rate'?"),
    (['--n_layer=two'], "--n_layer='two': expected int"),
    (['--n_embd=30', '--n_head=4'], 'n_embd=30 is not divisible by n_head=4'),
    (['--vocab_size=2000000'], 'vocab_size=2000000 is over 1,048,576'),
    (['--batch_tokens=100'], 'the nearest are 64 or 128'),
    (['--device=cuda:7'], '--device=cuda:7'),
    (['--device=tpu'], 'expected auto, cpu, cuda'),
    (['--dtype=float16'], 'float16 needs a GPU'),
    (['--compile=maybe'], 'expected auto, true or false'),
    (['--dataset=nonsense'], 'dataset=nonsense: no directory data/nonsense, and prepare.py knows only pylib, shakespeare, '),
    (['--dataset=shards:rows'], 'rows: no such file, directory or glob'),
    (['--vocab_size=299'], 'has a vocabulary of 300, the model only 299'),
    (['--block_size=100000', '--batch_tokens=0'], 'fewer than one window'),
    (['--resume=missing.pt'], 'no such run or checkpoint'),
    (['--ffn=swish'], "ffn='swish' is not one of gelu, relu2, swiglu, trix, bitnet, resonance, none"),
    (['--trix_top_k=9'], 'trix_top_k=9 is more than trix_tiles=4'),
    (['config/missing.py'], 'config/missing.py: no such file'),
    (['--mandatory_steps=10,41'], 'mandatory_steps=41: the run ends at max_steps=40'),
    (['--warmup_steps=41'], 'warmup_steps=41 is longer than the run of max_steps=40'),
    (['--schedule=wsd', '--decay_steps=38'], 'warmup_steps=4 and a decay of 38 steps are longer than the run'),
    (['--schedule=two_stage', '--boundary_step=40'], 'boundary_step=40 must lie between'),
    (['--schedule=restarts', '--restart_steps=37'], 'restart_steps=37 is longer than the 36 steps'),
    (['--schedule=cosin'], "schedule='cosin' is not one of cosine, restarts"),
    (['--min_lr_ratio=1.5'], 'min_lr_ratio=1.5 must lie in [0, 1]'),
    (['--min_lr_ratio=-0.1'], 'min_lr_ratio=-0.1 must not be negative'),
    (['--optimizer=sgd'], "optimizer='sgd' is not one of adamw, muon"),
    (['--dtype=tf32'], '--dtype=tf32 needs an NVIDIA GPU'),
])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(corpus, tmp_path, words, message):
    code, said = finish(arguments(corpus, tmp_path / 'run', *words))
    assert code == 2 and message in said.splitlines()[-1] and 'Traceback' not in said
    assert not (tmp_path / 'run').exists()


def test_a_misspelt_key_in_a_file_is_named_with_its_file_on_a_real_command_line(tmp_path):
    (tmp_path / 'my.py').write_text('learnig_rate = 1e-3\nn_embd = 30\n')
    done = subprocess.run([sys.executable, ROOT / 'train.py', tmp_path / 'my.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"{tmp_path}/my.py: unknown key 'learnig_rate', did you mean 'learning_rate'?",
                                        'n_embd=30 is not divisible by n_head=4']
    assert os.listdir(tmp_path) == ['my.py']


def test_an_output_directory_that_cannot_be_written_is_refused(corpus, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='file/run: could not be written'), contextlib.redirect_stdout(io.StringIO()):
        train.main(arguments(corpus, tmp_path / 'file' / 'run'))


def test_resuming_with_another_architecture_shows_the_difference(corpus, whole):
    code, said = finish(arguments(corpus, whole, '--resume=auto', '--n_embd=32', '--ffn=gelu'))
    assert code == 2
    assert "n_embd is 16 in the checkpoint, 32 in the config" in said and 'ffn is trix in the checkpoint, gelu' in said


def test_resuming_on_changed_data_is_refused(corpus, tmp_path, whole):
    other = tmp_path / 'tokens'
    prepare.main([f'--dataset=text:{corpus.parent}/[0-4]*.txt', '--vocab_size=300', f'--out={other}', '--val_ratio=0.2', '--num_proc=1'])
    code, said = finish(arguments(other, whole, '--resume=auto'))
    assert code == 2 and f'another tokenizer than {other} has' in said and f'--tokenizer={corpus}/tokenizer.json' in said


class Evil:
    def __reduce__(self):
        return os.system, ('touch executed',)


@pytest.mark.parametrize('damage, message', [
    ('pickle', 'refused: it holds Python objects'),
    ('truncated', 'truncated, or not a checkpoint'),
    ('text', 'truncated, or not a checkpoint'),
    ('foreign', 'not a checkpoint of this project'),
    ('version', 'checkpoint version 99'),
    ('shapes', 'another architecture: blocks.0.mixer.q_proj.weight'),
    ('config', 'n_embd=15 is not divisible'),
    ('types', 'its config has values of the wrong type'),
    ('nothing', 'no valid config, tokenizer'),
])
def test_a_bad_checkpoint_is_refused_in_one_line_and_never_executed(tmp_path, monkeypatch, whole, damage, message):
    monkeypatch.chdir(tmp_path)
    good, state = checkpoint.find(whole)
    bad = tmp_path / 'bad.pt'
    if damage == 'pickle':
        torch.save({**state, 'best': Evil()}, bad)
    elif damage == 'truncated':
        bad.write_bytes(good.read_bytes()[:-1000])
    elif damage == 'text':
        bad.write_text('hello')
    else:
        change = {'foreign': {'format': 'other'}, 'version': {'version': 99}, 'config': {'config': {**state['config'], 'n_embd': 15}},
                  'nothing': {'config': None, 'tokenizer': [1]},
                  'types': {'config': {**state['config'], 'n_embd': 'wide'}},
                  'shapes': {'model': {**state['model'], 'blocks.0.mixer.q_proj.weight': torch.zeros(3, 3)}}}[damage]
        torch.save({**state, **change}, bad)
    with pytest.raises(UserError) as refused:
        sample.main([str(bad), '--device=cpu'])
    assert message in str(refused.value) and '\n' not in str(refused.value)
    assert not (tmp_path / 'executed').exists()


# ---- a loop that can be trusted for a week

def compile_for_ever():
    torch.compile = lambda model, **_: lambda x, y, **more: time.sleep(60)


def evaluate_slowly():
    val_batch = TokenData.val_batch
    TokenData.val_batch = lambda *arguments: (time.sleep(0.5), val_batch(*arguments))[1]


def save_slowly():
    save = torch.save
    torch.save = lambda *arguments: (save(*arguments), time.sleep(2))


@pytest.mark.parametrize('slowly, words, when', [
    (compile_for_ever, ['--compile=true'], lambda run: Path(f'{run}.console').exists() and 'compile on' in Path(f'{run}.console').read_text()),
    (evaluate_slowly, [], lambda run: lines_so_far(run)[-1:] and json.loads(lines_so_far(run)[-1])['step'] == 5),
    (save_slowly, [], lambda run: list((run / 'checkpoints').glob('*4.pt.tmp'))),
], ids=['compiling', 'evaluating', 'saving'])
def test_a_signal_is_obeyed_within_10_seconds_at_any_time(corpus, tmp_path, whole, slowly, words, when):
    out = tmp_path / 'run'
    process = start(arguments(corpus, out, *words), slowly)
    while not when(out) and process.is_alive():
        time.sleep(0.005)
    time.sleep(0.5)
    process.terminate()
    process.join(10)
    assert process.exitcode == 75, Path(f'{out}.console').read_text()
    assert not list(out.rglob('*.tmp'))
    assert slowly == compile_for_ever or checkpoint.find(out)[1]['step'] in (4, 5)  # before the first step there is nothing to save
    code, said = finish(arguments(corpus, out, '--resume=auto'))
    assert code == 0, said
    assert_same_run(out, whole)


def test_a_loss_spike_is_skipped_and_recorded_and_its_window_survives_a_resume(corpus, tmp_path):
    def spike():
        forward, count = GPT.forward, iter(range(10**6))

        def spiking(model, idx, targets=None, **words):
            loss = forward(model, idx, targets, **words)
            return loss * (3 if model.training and targets is not None and next(count) // 2 == 25 else 1)
        GPT.forward = spiking
    out, words = tmp_path / 'run', ['--spike_z=8', '--spike_window=20', '--keep=0']
    code, said = finish(arguments(corpus, out, *words), spike)
    assert code == 0, said
    event, = lines(out, 'event')
    assert (event['event'], event['step']) == ('spike', 26) and event['loss'] > 2.5 * event['recent_mean']
    assert 'step 26 skipped' in said and 'a spike' in said
    kept = [torch.load(out / f'checkpoints/step_00000{step}.pt', weights_only=True)['recent'] for step in (20, 28)]
    accepted = [line['loss'] for line in lines(out, 'train') if line['step'] != 26]
    assert kept == [accepted[:20], accepted[7:27]]
    assert not lines(whole_without_guard(corpus, tmp_path, spike), 'event')


def whole_without_guard(corpus, tmp_path, before):
    assert finish(arguments(corpus, tmp_path / 'off'), before)[0] == 0
    return tmp_path / 'off'


def exhausted(*arguments, **words):
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')


def out_of_memory_in_backward():
    backward, count = torch.Tensor.backward, iter(range(10**6))
    torch.Tensor.backward = lambda loss, *more, **words: (exhausted if next(count) == 6 else backward)(loss, *more, **words)


def out_of_memory_in_the_optimizer():
    torch.optim.AdamW.step = exhausted


def out_of_memory_in_validation():
    train.validate = exhausted


@pytest.mark.parametrize('where', [out_of_memory_in_backward, out_of_memory_in_the_optimizer, out_of_memory_in_validation])
def test_out_of_memory_is_one_line_with_the_options_that_help(corpus, tmp_path, where):
    code, said = finish(arguments(corpus, tmp_path / 'run', '--n_layer=4'), where)
    assert code == 2 and 'Traceback' not in said
    line = said.splitlines()[-1]
    assert re.match(r'out of memory: parameters .* activations [\d.]+ kB for 4 x 16 tokens: ', line)
    assert re.search(r'--batch_size=2 --batch_tokens=128 \(same results\) saves \d+', line) and '--activation_checkpointing' in line
    status = json.loads((tmp_path / 'run/status.json').read_text())
    assert status['state'] == 'failed' and status['reason'].startswith('out of memory')


def test_two_runs_never_write_into_one_directory(corpus, tmp_path, whole):
    out = tmp_path / 'run'
    first = start(arguments(corpus, out))
    while not lines_so_far(out):
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)  # alive, however long the second takes to start
    code, said = finish([*arguments(corpus, tmp_path / 'run/'), '--resume=auto'])
    os.kill(first.pid, signal.SIGCONT)
    assert code == 2 and f'{out}: another run is writing there (process {first.pid} on ' in said
    first.join(60)
    assert first.exitcode == 0
    assert_same_run(out, whole)


def test_muon_trains_the_matrices_and_resumes_exactly(corpus, tmp_path):
    words = ['--optimizer=muon', '--matrix_lr=2e-2', '--ffn=swiglu', '--keep=0']
    code, said = finish(arguments(corpus, tmp_path / 'whole', *words))
    assert code == 0 and 'Muon: 7 matrices' in said and 'AdamW: 1 matrix and 3 vectors' in said
    state = checkpoint.load(tmp_path / 'whole/checkpoints/step_0000020.pt')
    rates = [state[key]['param_groups'][0]['lr'] for key in ('optimizer', 'muon')]  # learning_rate is 1e-2
    assert 0 < rates[0] < 1e-2 and rates[1] == pytest.approx(2 * rates[0])
    code, said = finish(arguments(corpus, tmp_path / 'rest', *words, f'--resume={tmp_path}/whole/checkpoints/step_0000020.pt'))
    assert code == 0, said
    assert [line for line in losses(tmp_path / 'rest') if line[1] > 20] == [line for line in losses(tmp_path / 'whole') if line[1] > 20]
    assert lines(tmp_path / 'whole', 'train')[-1]['loss'] < 4
    code, said = finish(arguments(corpus, tmp_path / 'other', '--ffn=swiglu', f'--resume={tmp_path}/whole/checkpoints/step_0000020.pt'))
    assert code == 2 and 'optimizer is muon in the checkpoint, adamw in the config' in said


def test_changed_options_are_shown_and_take_effect_after_a_resume(corpus, tmp_path, whole):
    first = checkpoint.steps(whole / 'checkpoints')[0]
    code, said = finish(arguments(corpus, tmp_path / 'run', f'--resume={first}', '--beta2=0.99', '--schedule=constant', '--weight_decay=0.3'))
    assert code == 0 and 'changed: beta2 0.95 -> 0.99' in said and 'changed: schedule cosine -> constant' in said
    assert {(line['lr'], line['wd']) for line in lines(tmp_path / 'run', 'train')} == {(1e-2, 0.3)}
    groups = checkpoint.find(tmp_path / 'run')[1]['optimizer']['param_groups']
    assert [(group['betas'], group['weight_decay']) for group in groups] == [((0.9, 0.99), 0.3), ((0.9, 0.99), 0.0)]


@pytest.mark.parametrize('batch_tokens', [64, 256])
def test_a_resume_with_another_batch_reads_every_window_once_and_counts_its_tokens(corpus, tmp_path, whole, batch_tokens):
    seen = tmp_path / 'seen'

    def record_windows():
        gather = TokenData.gather

        def recorded(self, split, windows):
            if split == 'train':
                with open(seen, 'a') as file:
                    file.write(json.dumps(windows.tolist()) + '\n')
            return gather(self, split, windows)
        TokenData.gather = recorded

    words = [corpus, tmp_path / 'run', '--eval_interval=0', '--sample_interval=0']
    assert finish(arguments(*words, '--max_steps=8', '--schedule=constant'), record_windows)[0] == 0
    more = [f'--batch_tokens={batch_tokens}', '--max_steps=16', '--schedule=constant']
    code, said = finish(arguments(*words, *more, '--resume=auto'), record_windows)
    assert code == 0 and f'8 more steps end the run at {8 * 128 + 8 * batch_tokens:,} tokens (at 128 tokens a step: 2,048)' in said
    windows = [window for line in seen.read_text().splitlines() for window in json.loads(line)]
    assert len(windows) == (8 * 128 + 8 * batch_tokens) // 16
    n = TokenData(corpus, 16, 300).n_windows
    epochs = [windows[start:start + n] for start in range(0, len(windows), n)]
    assert len(windows) > 64 and all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert [line['tokens'] for line in lines(tmp_path / 'run', 'train')][7:10] == [1024, 1024 + batch_tokens, 1024 + 2 * batch_tokens]
    state = checkpoint.find(tmp_path / 'run')[1]
    assert state['tokens'] == 1024 + 8 * batch_tokens and state['windows'] == state['tokens'] // 16
    code, said = finish(arguments(*words, *more, '--max_steps=17', '--resume=auto'), record_windows)  # not by today's batch either
    assert code == 0 and lines(tmp_path / 'run', 'train')[-1]['tokens'] == 1024 + 9 * batch_tokens


def test_a_resumed_run_explains_the_effect_of_changed_options(corpus, tmp_path, whole):
    first = checkpoint.steps(whole / 'checkpoints')[0]
    words = ['--seed=2', '--max_steps=80', '--eval_tokens=128', f'--resume={first}']
    code, said = finish(arguments(corpus, tmp_path / 'run', *words))
    assert code == 0, said
    step = checkpoint.load(first)['step']
    old, new = (schedules.schedule(step, train.load(arguments(corpus, 'x', f'--max_steps={n}')))[0] for n in (40, 80))
    assert f'the learning rate continues at {new:.3g} (without these changes: {old:.3g})' in said
    assert 'another seed changes the order of the data' in said and 'losses before and after are not comparable' in said
    code, said = finish(arguments(corpus, tmp_path / 'same', f'--resume={first}'))
    assert code == 0 and 'continues at' not in said and 'the order' not in said and 'comparable' not in said


def test_a_run_that_repeats_its_data_says_so(corpus, tmp_path):
    data = TokenData(corpus, 16, 300)
    assert data.repeats(data.n_windows * 16) is None
    assert data.repeats(data.n_windows * 40).startswith('this run reads its training data 2.5 times: to see no text twice')
    code, said = finish(arguments(corpus, tmp_path / 'run', '--max_steps=2', '--warmup_steps=1', '--batch_tokens=25600', '--eval_interval=0', '--sample_interval=0'))
    times = f'reads its training data {2 * 25600 / 16 / data.n_windows:.1f} times'
    assert code == 0 and times in said
    config = train.load(arguments(corpus, tmp_path / 'run', '--max_steps=2', '--warmup_steps=1', '--batch_tokens=25600'))
    assert times in plan.run_lines(config, data)[1]


def test_two_stages_keep_checkpoints_on_both_sides_of_the_boundary(corpus, tmp_path):
    words = ['--schedule=two_stage', '--boundary_step=18', '--keep=1', '--eval_interval=0']
    assert finish(arguments(corpus, tmp_path / 'run', *words))[0] == 0
    assert [path.name for path in checkpoint.steps(tmp_path / 'run/checkpoints')] == [f'step_{s:07d}.pt' for s in (18, 19, 40)]
    assert [line['wd'] for line in lines(tmp_path / 'run', 'train')] == [0.1] * 18 + [0.0] * 22


def test_other_data_need_the_option_other_data(corpus, tmp_path, whole):
    other = shutil.copytree(corpus, tmp_path / 'other')
    meta = json.loads((other / 'meta.json').read_text())
    (other / 'meta.json').write_text(json.dumps({**meta, 'source': 'elsewhere'}))
    words = [f'--resume={checkpoint.steps(whole / "checkpoints")[0]}']
    code, said = finish(arguments(other, tmp_path / 'run', *words))
    here, there = TokenData(other, 16, 300).fingerprint, TokenData(corpus, 16, 300).fingerprint
    assert code == 2 and f'trained on other data than {other} (fingerprint {there}, here {here})' in said and '--other_data' in said
    assert not (tmp_path / 'run').exists()
    assert finish(arguments(other, tmp_path / 'run', *words, '--other_data'))[0] == 0


# ---- it can be watched

def test_samples_are_every_prompt_in_three_modes_with_their_figures(whole):
    samples = [line for line in map(json.loads, (whole / 'samples.jsonl').read_text().splitlines()) if line['step'] == 40]
    prompts = ['', 'The', 'In this', 'def', 'import']
    assert [(line['prompt'], line['mode']) for line in samples] == [(p, m) for p in prompts for m in ('greedy', 'typical', 'stress')]
    assert all(0 < line['entropy'] < math.log(300) and 0 <= line['repetition'] <= 1 and line['tokens'] <= 8 for line in samples)
    log = (whole / 'log.txt').read_text()
    assert log.count("  sample: '") == 15 and log.count('  sample:\n    ') == 5  # the last ones are text


def test_the_last_sample_is_text_without_control_characters():
    text = "ROMEO:\n\tO, 'tis\x1b[31m\r"
    assert train.shown_sample(text, last=False) == f'  sample: {text!r}'
    assert train.shown_sample(text, last=True) == "  sample:\n    ROMEO:\n    \tO, 'tis\ufffd[31m\ufffd"


def test_a_prompt_that_the_tokenizer_cannot_encode_drops_only_its_own_samples(monkeypatch):
    said, used = [], []
    monkeypatch.setattr(train, 'sample_grid', lambda model, encoding, prompts, *more: used.extend(prompts) or [])
    run = SimpleNamespace(
        config=SimpleNamespace(sample_prompts='a|aé|b', sample_tokens=4, seed=1), log=SimpleNamespace(say=said.append), model=None,
        encoding=Characters('x', {EOT: 2}, 'ab'), device=torch.device('cpu'), dtype=torch.float32, stopped=False)
    train.run_samples(run, lambda: False)
    assert used == ['a', 'b'] and len(said) == 1
    assert said[0].startswith("no samples of the prompt 'aé': the character 'é' is not among the 2 characters of the tokenizer")


@pytest.mark.parametrize('options, longer', [
    ({}, '--max_steps=800'), ({'epochs': 1.5}, '--epochs=3'), ({'max_hours': 0.5}, '--max_steps=800 --max_hours=1')])
def test_a_finished_run_says_what_to_do_next_in_five_lines(options, longer):
    config = SimpleNamespace(**{'max_steps': 400, 'epochs': 0.0, 'max_hours': 0.0, 'init_from': '', 'tokenizer': 'bpe', **options})
    python = Path(sys.executable).name
    run = SimpleNamespace(config=config, out=Path('runs/x'), encoding='some', data=SimpleNamespace(path='data/x'))
    sample_line, *others = train.next_steps(run)
    assert sample_line == f'sample from it: {python} sample.py runs/x --num=3' and len(others) == 4
    assert others[:2] == [f'see its curves: {python} watch.py runs/x --plot',
                          f'train longer: the same command with {longer} --resume=auto']
    assert '--dataset=text:PATH --out_dir' in others[2] and 'docs/data.md' in others[3]
    assert (Path(train.__file__).parent / 'docs/data.md').is_file()
    config.init_from = 'runs/a'  # its tokenizer must make the ids
    assert train.next_steps(run)[3] == f'{others[2]} --tokenizer=data/x/tokenizer.json'
    config.tokenizer, run.encoding = 'none', None  # rows of ids without a tokenizer
    assert train.next_steps(run) == others


def test_tensorboard_and_wandb_get_the_numbers_of_the_metrics(corpus, tmp_path):
    pytest.importorskip('tensorboard'), pytest.importorskip('wandb')
    out = tmp_path / 'run'
    code, said = finish(arguments(corpus, out, '--tensorboard', '--wandb', '--max_steps=6'), lambda: os.environ.update(WANDB_MODE='offline'))
    assert code == 0, said
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / 'tensorboard'))
    events.Reload()
    expected = {line['step']: line['loss'] for line in lines(out, 'train')}
    assert {scalar.step: scalar.value for scalar in events.Scalars('train/loss')} == pytest.approx(expected)
    assert {'train/tokens_per_s', 'train/mem_gb', 'eval/bits_per_byte'} <= set(events.Tags()['scalars'])
    assert list((out / 'wandb').glob('offline-run-*/*.wandb'))


@pytest.mark.parametrize('package', ['tensorboard', 'wandb'])
def test_a_missing_package_is_one_line_and_leaves_nothing_behind(corpus, tmp_path, package):
    def hide():
        importlib.util.find_spec = lambda name: None
    code, said = finish(arguments(corpus, tmp_path / 'run', f'--{package}'), hide)
    assert code == 2 and said.splitlines()[-1] == f'--{package} needs the package {package}: pip install {package}'
    assert not (tmp_path / 'run').exists()


def test_profile_writes_a_table_and_a_trace_and_changes_nothing(corpus, tmp_path, whole):
    code, said = finish(arguments(corpus, tmp_path / 'run', '--profile'))
    assert code == 0 and 'memory of a training step:' in said and 'activations' in said
    events = json.loads((tmp_path / 'run/profile/trace.json').read_text())['traceEvents']
    assert any('aten::mm' in event.get('name', '') for event in events) and 'aten::' in (tmp_path / 'run/profile/table.txt').read_text()
    assert_same_run(tmp_path / 'run', whole)


def test_a_real_plan_measures_shows_the_schedule_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(['--plan', '--schedule=two_stage', '--max_steps=1000', '--learning_rate=1.5e-3', '--dataset=missing', '--device=cpu',
                '--n_embd=16', '--n_layer=1', '--vocab_size=300', '--block_size=16'])
    shown = capsys.readouterr().out
    assert '(measured now' in shown and re.search(r'500 +1\.000e-03 +0 ', shown) and '▇' in shown and not list(tmp_path.iterdir())


# ---- signals and consoles

def when_running(out, process):
    while len(lines_so_far(out)) < 5 and process.is_alive():
        time.sleep(0.005)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_every_signal_that_asks_a_run_to_end_saves_it(corpus, tmp_path, number):
    out = tmp_path / 'run'
    process = start(arguments(corpus, out, '--max_steps=10000', '--warmup_steps=4'))  # more tokens would be compiled
    when_running(out, process)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 75, Path(f'{out}.console').read_text()
    assert checkpoint.find(out)[1]['step'] >= 4


def test_a_lost_terminal_does_not_end_a_run_under_nohup(corpus, tmp_path):
    out = tmp_path / 'run'
    process = start(arguments(corpus, out), lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    when_running(out, process)
    os.kill(process.pid, signal.SIGHUP)
    process.join(60)
    assert process.exitcode == 0


def train_in_a_shell(words, command, **environment):
    return subprocess.run(['bash', '-c', command], cwd=Path(train.__file__).parent, capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'RUN': ' '.join([sys.executable, 'train.py', *words]), **environment})


def closed():
    os.close(1)
    sys.stdout = None  # as Python starts with a closed descriptor


def full():
    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)


def read_by_nobody():
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    sys.stdout, sys.stderr = (open(number, 'w', buffering=1, closefd=False) for number in (1, 2))


@pytest.mark.parametrize('console', [closed, full, read_by_nobody])
def test_a_console_that_is_gone_does_not_end_a_run(corpus, tmp_path, console):
    code, said = finish(arguments(corpus, tmp_path / 'run', '--max_steps=12'), console)
    assert code == 0 and 'Traceback' not in said, said
    log = (tmp_path / 'run/log.txt').read_text()
    assert 'finished: 12 steps' in log
    assert list((tmp_path / 'run/checkpoints').glob('*12.pt'))


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_console_that_lacks_a_character_does_not_end_a_run(corpus, tmp_path, encoding):
    words = arguments(corpus, tmp_path / 'run', '--max_steps=4', '--sample_interval=2', "--sample_prompts=Ω→")
    done = train_in_a_shell(words, '$RUN', PYTHONIOENCODING=encoding, LC_ALL='C', PYTHONUTF8='0')
    assert done.returncode == 0, done.stderr
    assert 'Ω→' in (tmp_path / 'run/log.txt').read_text(encoding='utf-8') and "sample: '??" in done.stdout


@pytest.mark.parametrize('word, says', [
    ('--learning_rate=0', 'learning_rate=0.0 must be greater than 0'), ('--learning_rate=-1', 'learning_rate=-1.0 must not be negative'),
    (f'--seed={2**63}', f'seed={2**63} must be below 2^63')])
def test_impossible_numbers_are_refused(word, says):
    with pytest.raises(UserError, match=re.escape(says)):
        train.load([word])


def test_a_tilde_in_out_dir_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert train.load(['--out_dir=~/runs/x']).out_dir == f'{tmp_path}/runs/x'


def test_a_checkpoint_without_an_optimizer_is_for_init_from(corpus, tmp_path, whole):
    path, state = checkpoint.find(whole)
    bare = tmp_path / 'bare.pt'
    torch.save({**{key: value for key, value in state.items() if key not in ('scaler', 'rng')}, 'optimizer': {}}, bare)  # as a conversion
    code, said = finish(arguments(corpus, tmp_path / 'run', f'--resume={bare}'))
    assert code == 2 and said.splitlines()[-1] == (f'{bare}: this file has weights but no optimizer state, so no run can '
                                                   f'continue from it: start a new run with --init_from={bare}')
    assert finish(arguments(corpus, tmp_path / 'run', f'--init_from={bare}', '--max_steps=4'))[0] == 0
