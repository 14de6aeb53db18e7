"""
nanoGPT's own train.py beside ours, on the same machine and the same tokens: `bench.py peers --nanogpt=PATH`.

speed and race: a GPT of 3 layers with width 128 on Python's library. shakespeare: nanoGPT's best-known run.
On a GPU, gpt2: the speed of GPT-2 with 124M parameters.
"""
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

import settings
from benchmarks.measure import ROOT, compare, mean_and_sd, report, whole_process
from benchmarks.quality import SPEEDRUN, ensure_trained, evaluations
from configurator import read_json
from corpora.opening import open_dataset
from model import GPT, GPTConfig
from runtime import device as hardware
from runtime.runlog import read_lines

PEER_RATES = (4e-3, 8e-3, 1.6e-2)  # learning rates for nanoGPT; 1e-3 and 2e-3 are worse
PEER_TOKENS, PEER_BATCH = 5_000_000, 16 * 256
PEER_STEPS = PEER_TOKENS // PEER_BATCH
PEER_SHAPE = ['--n_layer=3', '--n_head=4', '--n_embd=128', '--block_size=256', '--batch_size=16']
PEER_OPTIONS = [*PEER_SHAPE, '--gradient_accumulation_steps=1', '--compile=False', '--eval_iters=1', '--log_interval=1',
                '--dropout=0.0']
SAME_MODEL = ['--vocab_size=8192', '--ffn=gelu', '--positions=learned', '--norm=layernorm', '--compile=false']
ONLY_STEPS = ['--eval_interval=0', '--sample_interval=0', '--save_interval=0', '--log_interval=1']
# The command for a CPU in nanoGPT's README
SHAKESPEARE = ['config/train_shakespeare_char.py', '--compile=False', '--eval_iters=20', '--log_interval=1',
               '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4', '--n_embd=128', '--max_iters=2000',
               '--lr_decay_iters=2000', '--dropout=0.0']
# GPT-2 of 124M parameters, compiled, without biases and dropout as in nanoGPT's README
GPT2_SHAPE = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, positions='learned',
                       norm='layernorm')
GPT2_SEQUENCES = 128  # in a step, which are 131,072 tokens
# Runs nanoGPT's train.py with a number added to its seed, which is a constant there. The number is the first argument.
# At the end it prints the peak of the memory on the GPU, which nanoGPT does not show.
WITH_SEED = ("import sys, torch; plain, seed = torch.manual_seed, int(sys.argv.pop(1)); "
             "torch.manual_seed = lambda n: plain(n + seed); "
             "sys.path.insert(0, '.'); sys.argv[0] = 'train.py'; exec(open('train.py').read()); "
             "print(f'peak: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB')")


def missing_from_nanogpt(path):
    """The reason why a directory is not a checkout of nanoGPT, '' if it is one."""
    marks = {'train.py': ('gradient_accumulation_steps', 'configurator.py'), 'configurator.py': (),
             'model.py': ('class GPTConfig', 'class GPT('), 'config/train_shakespeare_char.py': ('shakespeare_char',)}
    for name, expected in marks.items():
        file = Path(path) / name
        text = file.read_text(errors='replace') if file.is_file() else ''
        if not text:
            return f'no {name}'
        if any(mark not in text for mark in expected):
            return f"{name} is not nanoGPT's"
    return ''


def nanogpt(config, data, folder, out, seed, *words, n_vocab=0):
    """
    -> (directory, command line) of nanoGPT's own train.py on our bins, which are linked in `folder` as it expects
    them. words: its config file and options. n_vocab: of its model, 0: that of the data.
    """
    for split in ('train', 'val'):
        (folder / f'{split}.bin').unlink(missing_ok=True)
        os.symlink((data.path / f'{split}.bin').resolve(), folder / f'{split}.bin')
    # nanoGPT reads the size of the vocabulary from a pickled dict; this is {'vocab_size': n} in protocol 0.
    (folder / 'meta.pkl').write_bytes(b'(dVvocab_size\nI%d\ns.' % (n_vocab or data.n_vocab))
    device = hardware.resolve(config.device, config.dtype)[0].type
    return Path(config.nanogpt).resolve(), [
        sys.executable, '-c', WITH_SEED, seed, *words, f'--device={device}', f'--dataset={folder.resolve()}',
        f'--out_dir={out.resolve()}']


def peers(config):
    """
    nanoGPT against ours. On a GPU: the speed of GPT-2. On a CPU: small models. --quick: only their speed.
    --shakespeare: only nanoGPT's Shakespeare run.
    """
    if config.shakespeare:
        return shakespeare(config)
    if hardware.resolve(config.device, config.dtype)[0].type == 'cuda':
        return gpt2(config)
    speed_and_race(config)
    if not config.quick:
        shakespeare(config)


def gpt2(config):
    """
    The speed of GPT-2 with 124M parameters, compiled: nanoGPT's own train.py, ours with the same model, and on a GPU
    that has it ours with --dtype=fp8. Three rounds in turn, each run a process of its own, 131,072 tokens a step.

    The tokens are of Python's library with a vocabulary of 8,192, because only the speed is measured. The model has
    the 50,304 entries of nanoGPT's. `MFU` counts the FLOPs of both models alike, relative to the peak of bfloat16.
    """
    device, dtype, _ = hardware.resolve(config.device, config.dtype)
    gpu, block_size = device.type == 'cuda', GPT2_SHAPE.block_size
    data = open_dataset(settings.load(['--dataset=pylib', '--vocab_size=8192', f'--block_size={block_size}']))
    large = gpu and torch.cuda.get_device_properties(device).total_memory > 60e9
    rows, steps = 32 if large else 8, config.repeats + 5
    shape = {key: getattr(GPT2_SHAPE, key) for key in ('n_layer', 'n_head', 'n_embd', 'block_size')}
    shape = [f'--{key}={value}' for key, value in (shape | {'batch_size': rows}).items()]
    step_tokens = GPT2_SEQUENCES * block_size
    ours = [sys.executable, 'train.py', *shape, f'--batch_tokens={step_tokens}',
            f'--vocab_size={GPT2_SHAPE.vocab_size}', f'--positions={GPT2_SHAPE.positions}', f'--norm={GPT2_SHAPE.norm}',
            f'--ffn={GPT2_SHAPE.ffn}', f'--dataset={data.path.resolve()}', f'--device={config.device}',
            f'--max_steps={steps}', *ONLY_STEPS]
    precisions = {'ours': config.dtype}
    if gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        precisions['ours, fp8'] = 'fp8'

    def commands(folder, repeat):
        theirs = nanogpt(config, data, folder, folder / 'theirs', 0, *shape, '--dropout=0.0', '--bias=False',
                         f'--gradient_accumulation_steps={GPT2_SEQUENCES // rows}', '--eval_iters=1',
                         '--log_interval=1', '--eval_interval=1000000', f'--max_iters={steps}',
                         n_vocab=GPT2_SHAPE.vocab_size)
        runs = {'nanoGPT': theirs}
        for name, precision in precisions.items():
            runs[name] = ROOT, [*ours, f'--dtype={precision}', f'--out_dir={folder}/{precision}{repeat}']
        return runs
    step_sizes = dict.fromkeys(('nanoGPT', *precisions), step_tokens)
    times, memory = run_in_turn(commands, step_sizes, step_tokens, steps, gpu)
    with torch.device('meta'):
        flops = GPT(GPT2_SHAPE).flops_per_token()
    peak = hardware.peak_flops(device, dtype)
    speeds = [{**row, 'tokens/s': step_tokens / row['seconds']} for row in compare(times, 'nanoGPT')]
    report('peers', [{**row, 'MFU': flops * row['tokens/s'] / peak if peak else 'unknown',
                      'peak GB': memory[row['name']]} for row in speeds],
           config, ' --nanogpt=PATH', name='peers_gpt2', batch_size=rows)


def run_in_turn(commands, batch_tokens, reference_tokens, steps, gpu):
    """
    Three rounds of training runs, each run a process of its own.

    commands: a function of a folder and the number of the round -> {name: (directory, command line)}
    batch_tokens: {name: tokens of a step}
    -> {name: seconds of each step, scaled to reference_tokens}, {name: peak GB, with `gpu` that of its tensors}
    """
    times, memory = {name: [] for name in batch_tokens}, dict.fromkeys(batch_tokens, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(3):
            for name, (cwd, words) in commands(Path(folder), repeat).items():
                _, peak, output = whole_process(words, cwd=cwd)
                if gpu:
                    peak = max(map(float, re.findall(r'(?:^peak:|tokens/s) +([\d.]+) GB', output, re.M)))
                if name == 'nanoGPT':
                    seconds = [float(ms) / 1000 for ms in re.findall(r'time ([\d.]+)ms', output)]
                else:
                    speeds = re.findall(r'([\d,]+) tokens/s', output)
                    seconds = [batch_tokens[name] / float(speed.replace(',', '')) for speed in speeds]
                # The first steps warm up.
                times[name] += [reference_tokens / batch_tokens[name] * s for s in seconds[4:steps]]
                memory[name] = max(memory[name], peak)
    return times, memory


def speed_and_race(config):
    """
    nanoGPT's own train.py against ours on the same bins: 3 layers, width 128, 4 heads, context 256, vocabulary 8192, 16
    sequences a step. First the speed, with each run a process of its own, in turn: the same plain GPT, then
    config/speedrun_tiny.py. After that, unless --quick, the time to a loss (see `race`).
    """
    device = hardware.resolve(config.device, config.dtype)[0].type
    data = open_dataset(settings.load(['--dataset=pylib', '--vocab_size=8192', '--block_size=256']))
    recipe, steps = str(ROOT / 'config' / SPEEDRUN), config.repeats + 5
    batch_tokens = {'nanoGPT': PEER_BATCH, 'ours': PEER_BATCH, 'speedrun_tiny': settings.load([recipe]).batch_tokens}
    shared = [f'--dataset={data.path.resolve()}', f'--device={device}', f'--max_steps={steps}', *ONLY_STEPS]

    def commands(folder, repeat):
        return {
            'nanoGPT': nanogpt(config, data, folder, folder / 'theirs', 0, *PEER_OPTIONS,
                               '--eval_interval=1000000', f'--max_iters={steps}'),
            'ours': (ROOT, [sys.executable, 'train.py', *PEER_SHAPE, *SAME_MODEL, *shared,
                            f'--out_dir={folder}/ours{repeat}']),
            'speedrun_tiny': (ROOT, [sys.executable, 'train.py', recipe, *shared, '--warmup_steps=0',
                                     f'--out_dir={folder}/fast{repeat}'])}
    times, memory = run_in_turn(commands, batch_tokens, PEER_BATCH, steps, device == 'cuda')
    count = min(map(len, times.values()))
    rows = compare({name: seconds[:count] for name, seconds in times.items()}, 'nanoGPT')
    report('peers', [{**row, 'tokens/s': PEER_BATCH / row['seconds'], 'peak GB': memory[row['name']],
                      'memory ratio': memory[row['name']] / memory['nanoGPT']} for row in rows],
           config, ' --nanogpt=PATH')
    if not config.quick:
        race(config, data, {row['name']: row['seconds'] / PEER_BATCH for row in rows})


def race(config, data, seconds_per_token):
    """
    Time to a loss. nanoGPT trains on PEER_TOKENS with the best of PEER_RATES, chosen with its first seed.
    config/speedrun_tiny.py trains until its validation loss is no higher. Both losses are on the whole validation
    split, with config.seeds seeds each. Seconds are those of training alone: tokens times the seconds per token that
    `peers` has measured side by side. The runs are kept in runs/peers.
    """
    folder, recipe = Path('runs/peers'), str(ROOT / 'config' / SPEEDRUN)

    def nanogpt_result(rate, seed):
        loss = nanogpt_trained(config, data, rate, seed, folder / f'nanogpt_{rate:g}_{seed}')
        print(f'nanoGPT, learning rate {rate:g}, seed {seed}: {loss:.4f}', flush=True)
        return loss
    best_rate = min(PEER_RATES, key=lambda rate: nanogpt_result(rate, 0))
    nanogpt_tokens = PEER_STEPS * PEER_BATCH
    nanogpt_seconds = nanogpt_tokens * seconds_per_token['nanoGPT']
    rows = []
    for seed in range(config.seeds):
        target = nanogpt_result(best_rate, seed)
        out = folder / f'speedrun_tiny_{seed}'
        ensure_trained([recipe, f'--dataset={data.path.resolve()}', '--eval_tokens=0', '--eval_interval=100',
                        '--sample_interval=0', f'--seed={1337 + seed}', f'--out_dir={out}', '--resume=auto',
                        f'--device={config.device}', f'--dtype={config.dtype}'])
        curve = evaluations(out)
        row = {'seed': seed, 'nanoGPT loss': target, 'nanoGPT tokens': nanogpt_tokens,
               'nanoGPT seconds': nanogpt_seconds, 'speedrun_tiny loss': curve[-1][1]}
        reached = [tokens for tokens, loss in curve if loss <= target]
        if reached:
            seconds = reached[0] * seconds_per_token['speedrun_tiny']
            row |= {"tokens to nanoGPT's loss": reached[0], 'seconds to it': seconds,
                    'part of the time': seconds / nanogpt_seconds}
        else:
            row |= dict.fromkeys(("tokens to nanoGPT's loss", 'seconds to it', 'part of the time'), 'never')
        rows.append(row)
    report('peers', rows, config, ' --nanogpt=PATH', name='peers_race', learning_rate=best_rate)


def nanogpt_trained(config, data, rate, seed, out):
    """
    The loss on our whole validation split that nanoGPT's own loop reaches after PEER_TOKENS. out/loss.json keeps it
    with what it was trained with; if that is the same, it is read from there.
    """
    file = out / 'loss.json'
    options = [f'--learning_rate={rate}', f'--min_lr={rate / 10}', f'--max_iters={PEER_STEPS}',
               f'--lr_decay_iters={PEER_STEPS}', '--warmup_iters=100', '--beta2=0.99', f'--eval_interval={PEER_STEPS}']
    trained_with = {'seed': seed, 'options': PEER_SHAPE + options, 'data': data.fingerprint}
    result = read_json(file) if file.is_file() else {}
    if {**result, 'loss': None} != {**trained_with, 'loss': None}:
        out.mkdir(parents=True, exist_ok=True)
        cwd, words = nanogpt(config, data, out, out, seed, *PEER_OPTIONS, *options)
        whole_process(words, cwd=cwd)
        result = {**trained_with, 'loss': nanogpt_loss(config, data, out / 'ckpt.pt')}
        file.write_text(json.dumps(result))
    return result['loss']


@torch.no_grad()
def nanogpt_loss(config, data, path):
    """The loss of a checkpoint of nanoGPT on our whole validation split, computed by nanoGPT's own model."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(config.nanogpt) / 'model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = torch.load(path, map_location='cpu', weights_only=True)
    model = module.GPT(module.GPTConfig(**state['model_args']))
    model.load_state_dict(state['model'])
    model.eval()
    windows, total = data.val_windows(), 0.0
    for i in range(0, len(windows), 16):
        x, y = map(torch.from_numpy, data.val_batch(windows[i:i + 16]))
        total += model(x, y)[1].item() * len(x)
    return total / len(windows)


# ----------------------------------------------------------------------------------------------------------------------
# Shakespeare

def shakespeare(config):
    """
    nanoGPT's Shakespeare run for a CPU against config/shakespeare_char.py, which is the same model and recipe, and
    config/shakespeare.py: whole commands in turn, with config.seeds seeds each, on the same 90/10 split.

    Losses are in nats per character, on the whole validation split, of the best checkpoint of each run: nanoGPT, too,
    keeps the best one. Seconds are those of the whole command, which evaluates, and in our case samples, on the way.
    """
    device = hardware.resolve(config.device, config.dtype)[0].type
    presets = {name: str(ROOT / 'config' / f'{name}.py') for name in ('shakespeare_char', 'shakespeare')}
    data = {name: open_dataset(settings.load([file])) for name, file in presets.items()}
    characters = data['shakespeare_char']
    losses, seconds, memory = ({name: [] for name in ('nanoGPT', *presets)} for _ in range(3))
    for seed in range(config.seeds):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            commands = {'nanoGPT': nanogpt(config, characters, folder, folder / 'nanoGPT', seed, *SHAKESPEARE)}
            for name, file in presets.items():
                commands[name] = ROOT, [sys.executable, 'train.py', file, f'--dataset={data[name].path.resolve()}',
                                        f'--seed={1337 + seed}', f'--device={device}', f'--out_dir={folder / name}']
            for name, (cwd, words) in commands.items():
                time, peak, _ = whole_process(words, cwd=cwd)
                loss = (nanogpt_loss(config, characters, folder / name / 'ckpt.pt') if name == 'nanoGPT' else
                        loss_per_character(folder / name))
                print(f'{name}, seed {1337 + seed}: {loss:.4f} nats per character in {time:.0f} s', flush=True)
                losses[name].append(loss)
                seconds[name].append(time)
                memory[name].append(peak)
    rows = [{'name': name, **mean_and_sd(**{'nats per character': losses[name], 'seconds': seconds[name]}),
             'peak GB': max(memory[name])} for name in losses]
    report('peers', rows, config, f' --nanogpt=PATH --shakespeare --seeds={config.seeds}', name='peers_shakespeare',
           losses=losses, seconds=seconds)


def loss_per_character(run):
    """The lowest validation loss of a run, in nats per character. Every character of this text is one byte."""
    lines = read_lines(Path(run) / 'metrics.jsonl')
    return math.log(2) * min(line['bits_per_byte'] for line in lines if line['kind'] == 'eval')
