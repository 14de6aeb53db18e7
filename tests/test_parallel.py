"""Several processes train the same losses and weights as one process, and they survive or end together."""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import checkpoint
from configurator import UserError
from data import TokenData
from model import GPT, GPTConfig
from optim import local_tensor, own_rows
from runtime import parallel, sharding
from runtime.group import Group
from training import TrainStep
from runs import (arguments, assert_same_run, console_of, end, finish, finish_ranks, lines, lines_so_far, losses, start_ranks)

ROOT = Path(__file__).parent.parent
EXACT = ['--batch_tokens=192', '--batch_size=12', '--max_steps=20', '--keep=0', '--sample_interval=0', '--eval_interval=10', '--save_interval=20']
MODELS = {'dense': ['--ffn=gelu'], 'trix': ['--optimizer=muon'], 'resonance': ['--mixer=resonance', '--ffn=gelu'],
          # at 1e-2 one seed of three has a weight so near a threshold that rounding tips its code: 1.2e-4 from step 15 on
          'bitnet': ['--ffn=swiglu', '--linear=bitnet', '--learning_rate=3e-3']}


def run(corpus, out, world, *words):
    argv = arguments(corpus, out, *EXACT, *words)
    codes, said = finish_ranks(argv, world) if world > 1 else [[part] for part in finish(argv)]
    assert codes == [0] * world, said
    return out, said


def assert_same_training(one, other):
    """Losses to 1e-5 relative over 20 steps, weights and buffers to 1e-4."""
    a, b = losses(one), losses(other)
    assert len(a) == len(b) == 23
    for (kind, step, loss, _), (*_, other_loss, _) in zip(a, b):
        assert other_loss == pytest.approx(loss, rel=1e-5), (kind, step)
    (_, a), (_, b) = checkpoint.find(one), checkpoint.find(other)
    for name, weight in a['model'].items():
        torch.testing.assert_close(b['model'][name], weight, rtol=0, atol=1e-4, msg=name)


@pytest.fixture(scope='module', params=MODELS)
def alone(request, corpus, tmp_path_factory):
    """A run of one process: 12 sequences a step in one micro-step."""
    words = [*MODELS[request.param], '--dropout=0']
    return words, run(corpus, tmp_path_factory.mktemp('alone') / 'run', 1, *words)[0]


@pytest.mark.parametrize('world, words', [
    (1, ['--batch_size=3']), (2, []), (2, ['--batch_size=3']), (3, []), (4, []), (2, ['--parallel=fsdp']), (3, ['--parallel=fsdp', '--batch_size=2']),
], ids=['accumulated', '2', '2_accumulated', '3', '4', 'fsdp_2', 'fsdp_3_accumulated'])
def test_any_number_of_processes_trains_the_same(corpus, tmp_path, alone, world, words):
    out, said = run(corpus, tmp_path / 'run', world, *alone[0], *words)
    assert_same_training(alone[1], out)


def test_dropout_is_the_same_for_any_number_of_processes_with_equal_micro_batches(corpus, tmp_path):
    """The masks of a micro-batch come from its own seed. A micro-batch of another size has other masks."""
    words = ['--dropout=0.2', '--max_steps=8', '--eval_interval=8', '--batch_size=6']
    one, _ = run(corpus, tmp_path / 'one', 1, *words)
    two, said = run(corpus, tmp_path / 'two', 2, *words)
    assert '2 processes x 1 micro-step of 6 x 16' in said[0]
    assert [line[2] for line in losses(two)] == pytest.approx([line[2] for line in losses(one)], rel=1e-5)


# ---- they survive

WORLD_OF_TWO = ['--resume=auto', '--max_steps=60', '--save_interval=1', '--eval_interval=20', '--sample_interval=30']


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    """A run of two processes that nothing interrupts; with dropout."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    codes, said = finish_ranks(arguments(corpus, out, *WORLD_OF_TWO), 2)
    assert codes == [0, 0], said
    assert said[1] == '', 'only rank 0 speaks'
    return out


def wait_for(condition, processes):
    while not condition() and all(process.is_alive() for process in processes):
        time.sleep(0.001)


def test_12_kills_of_12_are_survived_bit_exactly(corpus, tmp_path, whole):
    """SIGKILL to one rank, SIGTERM to all, and SIGKILL to rank 0 inside a save, at random moments."""
    out, draw, inside = tmp_path / 'run', random.Random(3), 0
    argv = arguments(corpus, out, *WORLD_OF_TWO)
    for kill in range(12):
        processes = start_ranks(argv, 2)
        target = len(lines_so_far(out)) + draw.randrange(1, 3)
        wait_for(lambda: len(lines_so_far(out)) >= target, processes)
        if kill % 3 == 0:  # inside a save
            wait_for(lambda: list((out / 'checkpoints').glob('*.tmp')), processes)
            inside += bool(list((out / 'checkpoints').glob('*.tmp')))
            processes[0].kill()
        elif kill % 3 == 1:
            time.sleep(draw.uniform(0, 0.02))
            processes[kill % 2].kill()
        else:
            for process in processes:
                process.terminate()
        codes = end(processes, 20)
        expected = {0: [-9, 1], 1: [[-9, 1], [1, -9]][kill % 2], 2: [75, 75]}[kill % 3]
        assert codes == expected, (kill, codes, [Path(console_of(argv, rank)).read_text() for rank in '01'])
    assert inside >= 3 and len(lines(out, 'train')) < 60
    codes, said = finish_ranks(argv, 2)
    assert codes == [0, 0], said
    assert_same_run(out, whole)


def test_a_signal_to_one_process_stops_all_of_them_at_the_same_step(corpus, tmp_path, whole):
    argv = arguments(corpus, tmp_path / 'run', *WORLD_OF_TWO)
    processes = start_ranks(argv, 2)
    wait_for(lambda: len(lines_so_far(tmp_path / 'run')) > 5, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert end(processes, 10) == [75, 75]
    assert finish_ranks(argv, 2)[0] == [0, 0]
    assert_same_run(tmp_path / 'run', whole)


MUON, MUON_FSDP = ['--optimizer=muon'], ['--optimizer=muon', '--parallel=fsdp']


@pytest.mark.parametrize('before, after', [((1, []), (2, [])), ((2, []), (3, [])), ((2, MUON_FSDP), (1, MUON)), ((1, MUON), (2, MUON_FSDP))],
                         ids=['1_to_2', '2_to_3', 'fsdp_to_1', '1_to_fsdp'])
def test_a_run_resumes_with_another_number_of_processes(corpus, tmp_path, before, after):
    words = [*EXACT, '--dropout=0', '--save_interval=8']
    run(corpus, tmp_path / 'whole', before[0], *words, *before[1])
    rest, said = run(corpus, tmp_path / 'rest', after[0], *words, *after[1], f'--resume={tmp_path}/whole/checkpoints/step_0000008.pt')
    assert f'changed: processes {before[0]} -> {after[0]}' in said[0]
    expected = [line for line in losses(tmp_path / 'whole') if line[1] > 8]
    assert [line[:2] for line in losses(rest)] == [line[:2] for line in expected] and len(expected) == 14
    assert [line[2] for line in losses(rest)] == pytest.approx([line[2] for line in expected], rel=1e-5)
    (_, a), (_, b) = checkpoint.find(rest), checkpoint.find(tmp_path / 'whole')
    for name, weight in b['model'].items():
        torch.testing.assert_close(a['model'][name], weight, rtol=0, atol=1e-4, msg=name)


# ---- they end together, with the reason

def in_rank(rank, action):
    """What a process does before it trains, if it is that rank."""
    return lambda: action() if os.environ['RANK'] == str(rank) else None


def test_a_failing_process_ends_all_with_its_reason(corpus, tmp_path):
    def damage():
        batch, count = TokenData.batch, iter(range(100))

        def damaged(*arguments):
            if next(count) == 9:
                raise UserError('data/x: id 70000 at position 5')
            return batch(*arguments)
        TokenData.batch = damaged
    argv = arguments(corpus, tmp_path / 'run', '--batch_tokens=128')
    codes, said = finish_ranks(argv, 2, in_rank(1, damage))
    assert codes == [2, 2]
    assert said[1] == 'data/x: id 70000 at position 5\n'
    assert said[0].splitlines()[-1] == 'rank 0: ended because rank 1 failed: data/x: id 70000 at position 5'


def test_a_mistake_of_all_processes_is_printed_once(corpus, tmp_path):
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'run', '--learnig_rate=1'), 2)
    assert codes == [2, 2] and said[1] == '' and said[0].count('learnig_rate') == 1
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'run', '--resume=missing.pt'), 2)
    assert codes == [2, 2] and ''.join(said).count('no such run or checkpoint') == 1
    assert not (tmp_path / 'run').exists()


def test_a_failure_just_after_the_first_work_does_not_keep_another_from_its_own():
    class Store(torch.distributed.HashStore):
        def check(self, keys):
            there = super().check(keys)
            self.set('first', 'done'), self.set('failure', '2 0 a mistake that all make')  # before the next look
            return there
    group = Group(1, 2)
    group.store = Store()
    assert group.first(lambda: 'own') == 'own'
    group.store = torch.distributed.HashStore()
    group.store.set('failure', '2 0 no data')
    with pytest.raises(parallel.Ended):
        group.first(lambda: 'own')


def test_a_missing_process_is_reported_in_one_line(corpus, tmp_path):
    argv = arguments(corpus, tmp_path / 'run', '--dist_timeout=3')
    assert end(start_ranks(argv, 2, missing=[1]), 30) == [2]
    said = Path(console_of(argv, '0')).read_text().splitlines()[-1]
    assert 'rank 0: the 2 processes did not all connect' in said and 'within 3 s' in said


def test_processes_with_other_data_and_those_that_never_reach_the_start_are_named(corpus, tmp_path):
    def other():
        TokenData.fingerprint = property(lambda self: 'another', lambda self, value: None)
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'run'), 2, in_rank(1, other))
    assert codes == [2, 2] and 'rank 1 on ' in said[1] and 'has another data than rank 0: another, but rank 0 has' in said[1]

    def late():
        checkpoint.resume = lambda *arguments: time.sleep(60)
    argv = arguments(corpus, tmp_path / 'run', '--dist_timeout=3')
    processes = start_ranks(argv, 2, in_rank(1, late))
    processes[0].join(30)
    processes[1].kill()
    assert processes[0].exitcode == 2
    assert 'rank 0: the comparison of data was not reached within 3 s by rank 1' in Path(console_of(argv, '0')).read_text().splitlines()[-1]


def test_a_process_that_stops_answering_ends_the_others_after_the_timeout(corpus, tmp_path):
    argv = arguments(corpus, tmp_path / 'run', '--dist_timeout=4')
    processes = start_ranks(argv, 2)
    wait_for(lambda: len(lines_so_far(tmp_path / 'run')) > 3, processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(30)
    assert processes[0].exitcode == 1
    said = Path(console_of(argv, '0')).read_text().splitlines()[-1]
    assert 'rank 0: lost another process' in said and 'over 4 s (--dist_timeout): continue with --resume=auto' in said
    assert json.loads((tmp_path / 'run/status.json').read_text())['state'] == 'failed'
    processes[1].kill()


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(corpus, tmp_path):
    def poison():
        backward, count = torch.Tensor.backward, iter(range(10**6))

        def poisoned(loss, *args, **kwargs):
            return backward(loss * float('nan') if next(count) == 6 else loss, *args, **kwargs)
        torch.Tensor.backward = poisoned
    argv = arguments(corpus, tmp_path / 'run', '--max_steps=10')
    codes, said = finish_ranks(argv, 2, in_rank(1, poison))
    assert codes == [0, 0], said
    event, = lines(tmp_path / 'run', 'event')
    assert event['event'] == 'skipped' and event['step'] == 7 and event['grad_norm'] == 'nan'
    assert len(event['windows'][0]) == 8 and len(event['micro_losses']) == 2 and event['nonfinite_gradients'] > 5
    assert all(weight.isfinite().all() for weight in checkpoint.find(tmp_path / 'run')[1]['model'].values())


def test_a_batch_that_the_processes_cannot_share_names_the_nearest(corpus, tmp_path):
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'run'), 3)
    assert codes == [2] * 3 and said[1:] == ['', '']
    assert 'batch_tokens=128 is 8 sequences. ' in said[0]
    assert '3 processes cannot divide them into micro-steps of 2; the nearest batch_tokens that divide are 96 or 192' in said[0]


@pytest.mark.parametrize('environment, message', [
    ({'RANK': '0'}, 'the environment has RANK but no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start several processes with torchrun'),
    ({'RANK': 'x', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}, "RANK='x', expected numbers"),
    ({'RANK': '2', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}, 'RANK=2, but WORLD_SIZE=2'),
])
def test_a_broken_environment_is_refused(monkeypatch, environment, message):
    for key in parallel.ENVIRONMENT:
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        parallel.start(10)


def test_torchrun_trains_and_prints_why_it_ended(corpus, tmp_path):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'train.py']
    words = arguments(corpus, tmp_path / 'run', '--max_steps=4', '--sample_interval=0')
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('finished: 4 steps') == 1 and '2 processes, ddp' in done.stdout
    done = subprocess.run([*torchrun, *words, '--seed=x'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('seed=') == 1 and 'Traceback (most' not in done.stderr.split('seed=')[0]


# ---- sharded models (FSDP)

@pytest.mark.parametrize('words', [['--mixer=resonance', '--ffn=gelu'], ['--ffn=trix']], ids=['resonance', 'trix'])
def test_sharded_models_sample_and_count_like_full_models(corpus, tmp_path, words):
    words = [*words, '--dropout=0', '--max_steps=8', '--sample_interval=8']
    ddp, fsdp = tmp_path / 'ddp', tmp_path / 'fsdp'
    assert finish_ranks(arguments(corpus, ddp, *words), 2)[0] == finish_ranks(arguments(corpus, fsdp, *words, '--parallel=fsdp'), 2)[0] == [0, 0]
    for a, b in zip(lines(ddp, 'train'), lines(fsdp, 'train'), strict=True):
        same = {key: value for key, value in a.items()
                if value is not None and key not in ('kind', 'tokens_per_s', 'mem_gb', 'loader_wait')}
        assert {key: b[key] for key in same} == pytest.approx(same, rel=1e-4, abs=1e-6)
    texts = [[json.loads(line)['text'] for line in (run / 'samples.jsonl').read_text().splitlines()] for run in (ddp, fsdp)]
    assert texts[0] == texts[1] and len(texts[0]) == 15


def test_a_process_never_holds_more_than_its_part_of_the_model_and_one_block(corpus, tmp_path):
    """Four processes draw a model of 43 MB and then read it from a file. Both give the weights of a run of one process."""
    config, cpu = GPTConfig(vocab_size=300, n_layer=6, n_embd=384, positions='learned', embed_taps=2), torch.device('cpu')
    torch.manual_seed(7)
    whole = GPT(config)
    rng_state, expected = torch.get_rng_state(), whole.state_dict()
    size, block = (sum(4 * p.numel() for p in module.parameters()) for module in (whole, whole.blocks[0]))
    torch.save({'model': expected}, tmp_path / 'weights.pt')

    def memory(kind):
        return int(re.search(rf'{kind}:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024

    def measure():
        group = parallel.start(60)
        group.connect(cpu)
        group.barrier('the first measurement')
        small = sharding.meta_model(lambda: GPT(GPTConfig(n_layer=1, n_embd=16, vocab_size=300)))
        group.shard(small, cpu)
        sharding.draw_weights(small)  # loads the libraries
        before = memory('VmRSS')
        torch.manual_seed(7)
        model = sharding.meta_model(lambda: GPT(config))
        group.shard(model, cpu)
        sharding.draw_weights(model)
        drawn = memory('VmHWM') - before
        assert torch.equal(torch.get_rng_state(), rng_state)
        shards = {name: (local_tensor(value), own_rows(expected[name], value)) for name, value in model.state_dict().items()}
        assert all(torch.equal(shard, rows) for shard, rows in shards.values())
        for shard, _ in shards.values():
            shard.zero_()
        before = memory('RssAnon')  # without the pages of the mapped file, which the system drops when it needs memory
        checkpoint.load_weights(model, torch.load(tmp_path / 'weights.pt', mmap=True, weights_only=True), 'weights.pt')
        read = memory('RssAnon') - before
        assert all(torch.equal(shard, rows) for shard, rows in shards.values())
        print('grown by', drawn, read)
        sys.exit(group.disconnect())
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'run'), 4, measure)
    assert codes == [0] * 4, said
    for text in said:
        drawn, read = map(int, re.search(r'grown by (\d+) (\d+)', text).groups())
        assert drawn < size / 4 + block + 5e6 < size / 1.5 and read < 8e6, (drawn, read, size, block)


def test_saving_may_take_longer_than_the_timeout_of_the_processes(corpus, tmp_path):
    def slow_save():
        save = checkpoint.save

        def slow(path, state):
            time.sleep(5 if path.name == 'step_0000004.pt' else 0)
            save(path, state)
        checkpoint.save = slow
    words = ['--parallel=fsdp', '--dist_timeout=3', '--max_steps=6', '--eval_interval=0', '--sample_interval=0']
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'run', *words), 2, slow_save)
    assert codes == [0, 0] and said[1] == '', said
    assert [path.name for path in checkpoint.steps(tmp_path / 'run/checkpoints')] == ['step_0000004.pt', 'step_0000006.pt']


def test_one_process_and_several_have_the_same_methods():
    for name, method in vars(parallel.OneProcess).items():
        if callable(method):
            assert signature(method) == signature(getattr(Group, name)), name


def test_a_process_waits_for_the_main_process_only_while_it_is_alive():
    main, other = Group(0, 2, timeout=0.4), Group(1, 2, timeout=0.4)
    main.store = other.store = torch.distributed.HashStore()
    work = threading.Thread(target=main.in_main, args=('slow work', lambda: time.sleep(1) or 'its result'))
    work.start()
    assert other.in_main('slow work', None) == 'its result'
    work.join()
    with pytest.raises(UserError, match='rank 1: no sign of life from rank 0 for 0.4 s'):
        other.in_main('work that never begins', None)


def test_a_gradient_that_is_not_finite_in_one_shard_is_named(corpus, tmp_path):
    def poison():
        judge = TrainStep.judge

        def poisoned(step, *arguments):
            if step.steps == 2:
                local_tensor(dict(step.model.named_parameters())['blocks.0.ffn.up'].grad).fill_(math.inf)
            return judge(step, *arguments)
        TrainStep.judge = poisoned
    words = ['--parallel=fsdp', '--max_steps=4', '--eval_interval=0', '--sample_interval=0']
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'run', *words), 2, in_rank(1, poison))
    assert codes == [0, 0], said
    event, = lines(tmp_path / 'run', 'event')
    assert event['step'] == 3 and event['nonfinite_gradients'] == 1 and event['first_of_them'] == ['blocks.0.ffn.up']


def test_gradients_are_averaged_in_the_last_micro_step_alone_from_its_forward_on(corpus, tmp_path):
    def spy():
        wrap = Group.wrap

        def spied(group, model, *arguments):
            trained, forward = wrap(group, model, *arguments), model.forward

            def said(*inputs, **words):
                if model.training:
                    print('sync', trained.require_backward_grad_sync)
                return forward(*inputs, **words)
            model.forward = said
            return trained
        Group.wrap = spied
    words = ['--batch_tokens=192', '--batch_size=2', '--max_steps=4', '--eval_interval=0', '--sample_interval=0']
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'run', *words), 2, spy)
    assert codes == [0, 0], said
    assert re.findall(r'^sync (\w+)', said[1], re.M) == ['False', 'False', 'True'] * 4


# ---- the end

def watch_the_end():
    """In a process of a run: say when it disconnects, and take a warning of DDP for an error."""
    plain = dist.destroy_process_group
    dist.destroy_process_group = lambda: (plain(), print('disconnected', flush=True))
    warnings.filterwarnings('error', '.*broadcast_buffers')


@pytest.mark.parametrize('words, code, stopped', [
    (['--max_steps=4'], 0, False), (['--learning_rate=1e30', '--max_skipped=2', '--max_steps=20'], 3, False), (['--max_steps=10000'], 75, True)],
    ids=['finished', 'diverged', 'interrupted'])
def test_all_processes_disconnect_whatever_the_exit_code(corpus, tmp_path, words, code, stopped):
    argv = arguments(corpus, tmp_path / 'run', '--sample_interval=0', '--eval_interval=0', '--warmup_steps=1', '--compile=false', *words)
    processes = start_ranks(argv, 2, watch_the_end)
    if stopped:
        wait_for(lambda: len(lines_so_far(tmp_path / 'run')) > 3, processes)
        os.kill(processes[1].pid, signal.SIGTERM)
    assert end(processes) == [code, code]
    said = [Path(console_of(argv, rank)).read_text() for rank in '01']
    assert [text.splitlines()[-1] for text in said] == ['disconnected'] * 2 and len(said[1].splitlines()) == 1, said


def test_the_end_of_a_run_waits_for_no_process_that_is_gone(monkeypatch, capsys):
    group, left = Group(0, 2, timeout=0.2), []
    group.store = dist.HashStore()
    monkeypatch.setattr(dist, 'destroy_process_group', lambda: left.append(True))
    group.disconnect()
    assert left and capsys.readouterr().err.startswith('rank 0: the end was not reached within 0.2 s by rank 1: ')
