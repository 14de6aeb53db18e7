"""
The presets train as the five original systems do: number by number, and by the commands of docs/sources.md.

ORIGINALS holds the numbers that the original systems promise. DEVIATIONS holds every number that differs here, with the
reason. A deviation that no longer exists fails its test, so the list stays true.
"""
import json
import random
import re
import shlex
import shutil
import signal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import checkpoint
import evaluate
import export
import prepare
import runs  # noqa: F401  imports what every optimizer needs once
import sample
import schedule
import train
import watch
from configurator import load
from deploy import convert
from model import GPT, GPTConfig
from settings import due_steps, micro_batches

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 'sources.md').read_text()

# ----------------------------------------------------------------------------------------------------------------------
# The numbers

TRIX = dict(ffn='trix', tokens_per_step=65_536, dataset='fineweb_edu', grad_clip=1.0, dtype='float16',
            all_checkpoints_are_kept=True)
RESONANCE = dict(
    mixer='resonance', block_size=32_768, vocab_size=50_257, tie_embeddings=True, norm='layernorm', positions='learned',
    beta1=0.9, beta2=0.95, grad_clip=1.0, schedule='restarts', epochs=3, save_interval=1000,
    all_checkpoints_are_kept=True)
WIKITEXT = dict(
    ffn='gelu', norm='layernorm', positions='learned', bias=True, vocab_size=50_257, tokenizer='gpt2', epochs=20,
    learning_rate=3e-4, warmup_steps=1000, schedule='cosine', min_lr_ratio=0.1, weight_decay=0.1,
    dropout=0.1, grad_clip=1.0)
ORIGINALS = {  # the config files: the numbers of the original; parameters are (lowest, highest)
    'trix_tiny recipes/trix_tiny_source': dict(
        TRIX, n_embd=128, n_head=4, n_layer=3, vocab_size=8192, block_size=256, parameters=(200_000, 300_000),
        sequences_per_step=256, learning_rate=1e-3, warmup_steps=100, max_steps=76, tokens=5_000_000,
        save_interval_tokens=1_000_000, eval_interval_tokens=500_000),
    'trix_small': dict(
        TRIX, n_embd=256, n_head=4, n_layer=6, vocab_size=16_384, block_size=256, parameters=(2_000_000, 3_000_000),
        sequences_per_step=256, learning_rate=6e-4, warmup_steps=500, max_steps=763, tokens=50_000_000,
        save_interval_tokens=10_000_000, eval_interval_tokens=5_000_000),
    'trix_medium': dict(
        TRIX, n_embd=512, n_head=8, n_layer=8, vocab_size=32_000, block_size=512, parameters=(20_000_000, 30_000_000),
        sequences_per_step=128, learning_rate=3e-4, warmup_steps=2000, max_steps=7629, tokens=500_000_000,
        save_interval_tokens=50_000_000, eval_interval_tokens=25_000_000),
    'resonance_small': dict(
        RESONANCE, n_embd=768, num_frequencies=64, n_layer=6, batch_size=4, micro_steps=8,
        parameters=(45_000_000, 55_000_000)),
    'resonance_medium': dict(
        RESONANCE, n_embd=1024, num_frequencies=128, n_layer=12, batch_size=4, micro_steps=8,
        parameters=(180_000_000, 220_000_000)),
    'resonance_large': dict(
        RESONANCE, n_embd=2048, num_frequencies=256, n_layer=16, batch_size=2, micro_steps=16,
        parameters=(450_000_000, 550_000_000)),
    'resonance_xlarge': dict(
        RESONANCE, n_embd=4096, num_frequencies=512, n_layer=24, batch_size=1, micro_steps=32,
        parameters=(900_000_000, 2_000_000_000)),
    'resonance_32k': dict(
        mixer='resonance', n_embd=1024, n_layer=8, num_frequencies=128, chunk_size=256, block_size=32_768, batch_size=4,
        micro_steps=4, tokens_per_step=524_288, activation_checkpointing=True, schedule='onecycle', warmup_share=0.1,
        grad_clip=1.0, tokens=100_000_000, parameters=(123_000_000, 128_000_000)),
    'wikitext_tiny': dict(
        WIKITEXT, dataset='wikitext2', n_embd=256, n_head=4, n_layer=4, d_ff=1024, block_size=256,
        sequences_per_step=32, parameters=(15_500_000, 16_500_000)),
    'wikitext_small': dict(
        WIKITEXT, dataset='wikitext103', n_embd=512, n_head=8, n_layer=6, d_ff=2048, block_size=512,
        sequences_per_step=32, parameters=(44_500_000, 50_000_000)),
    'wikitext_medium': dict(
        WIKITEXT, dataset='wikitext103', n_embd=768, n_head=12, n_layer=12, d_ff=3072, block_size=1024,
        sequences_per_step=16, dtype='float16', parameters=(116_500_000, 117_500_000)),
    'bitnet_95m': dict(
        linear='bitnet', ffn='swiglu', tie_embeddings=True, n_layer=8, n_embd=768, n_head=12, n_kv_head=6, d_ff=3072,
        vocab_size=32_000, block_size=256, parameters=(95_367_936, 95_367_936), dataset='fineweb_edu',
        tokenizer='llama2', batch_size=16, micro_steps=2, tokens_per_step=8192, tokens=3_276_800_000, max_steps=400_000,
        schedule='two_stage', warmup_steps=375, boundary_step=200_000, rate_after_warmup=1.5e-3,
        rate_at_boundary=1e-3, rate_at_end=1.5e-5, weight_decay=0.1, weight_decay_at_boundary=0.0, save_interval=10_000,
        all_checkpoints_are_kept=True, number_of_checkpoints=40, mandatory_steps=(199_999, 200_000), log_interval=100,
        eval_interval=5000, sample_interval=5000, number_of_prompts=5)}

THE_CARD_DECIDES = ('dtype=auto takes bfloat16 where the card has it. It is as fast and as small, and needs no scaler. '
                    '--dtype=float16 is theirs')
NOT_THOSE_DIMENSIONS = 'the stated width, depth and vocabulary have this many parameters'
DEVIATIONS = {  # (config files, number): (ours, reason)
    ('trix_tiny recipes/trix_tiny_source', 'warmup_steps'): (7, 'a run of 76 steps has no 100 steps of warm-up'),
    ('trix_tiny recipes/trix_tiny_source', 'parameters'): (2_032_512, NOT_THOSE_DIMENSIONS),
    ('trix_small', 'parameters'): (12_061_952, NOT_THOSE_DIMENSIONS),
    ('trix_medium', 'parameters'): (58_335_744, NOT_THOSE_DIMENSIONS),
    ('resonance_small', 'parameters'): (106_891_008, NOT_THOSE_DIMENSIONS),
    ('resonance_medium', 'parameters'): (240_133_120, NOT_THOSE_DIMENSIONS),
    ('resonance_large', 'parameters'): (993_669_120, NOT_THOSE_DIMENSIONS),
    ('resonance_xlarge', 'parameters'): (5_280_366_592, f'{NOT_THOSE_DIMENSIONS}. resonance_large is nearest to 1B'),
    ('resonance_32k', 'parameters'): (154_873_856, NOT_THOSE_DIMENSIONS),
    ('wikitext_medium', 'parameters'): (124_439_808, f'{NOT_THOSE_DIMENSIONS}, as GPT-2 small has'),
    ('bitnet_95m', 'tokenizer'): (
        'bpe', 'LLaMA-2\'s licence must be accepted before a download. --tokenizer=llama2/tokenizer.json uses a copy. '
               'A BPE of the same size replaces it'),
    **{(name, 'dtype'): ('auto', THE_CARD_DECIDES)
       for name in ('trix_tiny recipes/trix_tiny_source', 'trix_small', 'trix_medium', 'wikitext_medium')}}
NUMBERS = [(files, key) for files, numbers in ORIGINALS.items() for key in numbers]


def paths(files):
    return [str(ROOT / 'config' / f'{name}.py') for name in files.split()]


@cache
def numbers_here(files):
    """The options of these config files, and what follows from them."""
    config = train.load(paths(files))
    with torch.device('meta'):
        parameters = sum(p.numel() for p in GPT(config.pick(GPTConfig)).parameters())
    sequences = config.batch_tokens // config.block_size
    saved, *kept = (due_steps(config, key) for key in ('save_interval', 'keep_every', 'archive_every'))
    rate, weight_decay = zip(*(schedule.schedule(step, config)
                               for step in (config.warmup_steps, config.boundary_step, config.max_steps)))
    return {
        **vars(config), 'parameters': parameters, 'tokens_per_step': config.batch_tokens,
        'sequences_per_step': sequences, 'micro_steps': sequences // config.batch_size,
        'tokens': config.max_steps * config.batch_tokens,
        'number_of_checkpoints': len(saved), 'all_checkpoints_are_kept': saved in kept,
        'number_of_prompts': len(config.sample_prompts.split('|')),
        'warmup_share': config.warmup_steps / config.max_steps,
        'rate_after_warmup': rate[0], 'rate_at_boundary': rate[1], 'rate_at_end': rate[2],
        'weight_decay_at_boundary': weight_decay[1]}


def is_the_original(key, here, original, batch_tokens):
    if key == 'parameters':
        return original[0] <= here <= original[1]
    if key == 'tokens':  # whole steps
        return abs(here - original) < batch_tokens
    return here == (pytest.approx(original) if isinstance(original, float) else original)


@pytest.mark.parametrize('files, key', NUMBERS)
def test_every_number_equals_the_original_or_is_a_deviation_with_a_reason(files, key):
    here, original = numbers_here(files)[key], ORIGINALS[files][key]
    same = is_the_original(key, here, original, numbers_here(files)['batch_tokens'])
    if (files, key) in DEVIATIONS:
        assert not same, f'no longer a deviation: remove it from DEVIATIONS ({here})'
        assert here == DEVIATIONS[files, key][0]
    else:
        assert same, f'{here}, in the original {original}'


def test_every_deviation_belongs_to_a_number_of_an_original():
    assert set(DEVIATIONS) <= set(NUMBERS) and all(len(reason) > 20 for _, reason in DEVIATIONS.values())


@pytest.mark.parametrize('files', [files for files in ORIGINALS])
def test_english_corpora_get_english_prompts(files):
    prompts = numbers_here(files)['sample_prompts'].split('|')
    assert not {'def', 'import', 'class', '#'} & set(prompts)


@pytest.mark.parametrize('name', ['trix_tiny', 'dense_tiny'])
def test_our_recipe_is_the_recipe_of_the_quick_start(name):
    plain, with_recipe = train.load(paths(name)), train.load(paths(f'{name} recipes/muon'))
    assert {**with_recipe.as_dict(), 'out_dir': ''} == {**plain.as_dict(), 'out_dir': ''}


@pytest.mark.parametrize('name, sequences, factor', [
    ('trix_small', 64, 4), ('trix_medium', 64, 2), ('wikitext_small', 32, 1), ('bitnet_95m', 32, 1),
    ('resonance_small', 32, 1)])
def test_our_recipe_reads_the_same_tokens_in_at_most_64_sequences_per_step(name, sequences, factor):
    plain, config = train.load(paths(name)), train.load(paths(f'{name} recipes/muon'))
    assert config.batch_tokens == sequences * config.block_size == plain.batch_tokens // factor
    assert (config.epochs, config.max_steps) == (plain.epochs, plain.max_steps * factor)
    assert (config.optimizer, config.schedule, config.learning_rate) == ('muon', 'linear', 24e-3 * 128 / config.n_embd)
    assert config.sample_interval * config.batch_tokens == plain.sample_interval * plain.batch_tokens


# ----------------------------------------------------------------------------------------------------------------------
# The commands

SCRIPTS = {'train.py': train, 'prepare.py': prepare, 'sample.py': sample, 'evaluate.py': evaluate, 'export.py': export,
           'watch.py': watch}
SECTIONS = {part.partition('\n')[0]: re.findall(r'(?:^|`)((?:python|torchrun) [^`\n]+)', part, re.M)
            for part in re.split(r'^## ', PAGE, flags=re.M)[1:]}
FROM_FILES = ['--vocab_size=300', '--num_proc=1', '--tokenizer=bpe']
SMALL = {  # the beginning of a command: more words, for little text and tiny models
    'prepare.py --dataset=fineweb_edu': [*FROM_FILES, '--source=edu.jsonl', '--max_tokens=3000', '--out=data/edu{n}'],
    'prepare.py pack': [*FROM_FILES, '--source=edu.jsonl', '--max_tokens=3000', '--row=16', '--rows_per_shard=20'],
    'prepare.py --dataset=wikitext103': [*FROM_FILES, '--source=wiki', '--out=data/again'],
    'prepare.py split': ['--val_ratio=0.3'],
    'sample.py': ['--max_new_tokens=4', '--device=cpu'],
    'evaluate.py': ['--device=cpu'],
    'export.py gguf': ['--matrices=F16'],  # the rows of the small model are no multiple of 256
    'export.py': ['--device=cpu'],
    'watch.py': ['--every=0.01']}
DATA = {  # what is prepared here in the place of a dataset
    'wikitext2': 'data/wiki', 'wikitext103': 'data/wiki', 'fineweb_edu': 'data/small',
    'shards:data/rows': 'shards:data/shards'}


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture
def place(corpus, tmp_path, monkeypatch):
    """A working directory with what the commands of the page read: presets, a little text, rows of ids, a tokenizer."""
    monkeypatch.chdir(tmp_path)
    Path('config').symlink_to(ROOT / 'config')
    for name in ('data/rows', 'wiki', 'llama2'):
        Path(name).mkdir(parents=True)
    for folder in ('data/rows', 'llama2'):
        shutil.copy(corpus / 'tokenizer.json', folder)
    Path('data/small').symlink_to(corpus)
    draw = random.Random(0)
    words = [''.join(draw.choices('abcdefghij', k=5)) for _ in range(80)]
    texts = [' '.join(draw.choices(words, k=60)) for _ in range(60)]
    write_rows(Path('edu.jsonl'), [{'text': text, 'score': 3.5} for text in texts])
    for split in ('train', 'validation', 'test'):
        lines = [line for text in texts[:20] for line in (f' = {split} = \n', f'{text}\n')]
        write_rows(Path('wiki', f'{split}.jsonl'), [{'text': line} for line in lines])
    for i in range(4):
        np.save(f'data/rows/{i}.npy', np.random.default_rng(i).integers(0, 300, (4, 32), dtype=np.uint16))
    item = {'activity_label': 'x', 'ctx_a': 'one', 'ctx_b': 'two', 'endings': ['a', 'b', 'c', 'd'], 'label': 1}
    write_rows(Path('hellaswag_val.jsonl'), [item])
    prepare.main(['--dataset=wikitext2', *FROM_FILES, '--source=wiki', '--out=data/wiki'])
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in signals.items():
        signal.signal(number, handler)


def shrunk(argv):
    """Words that make the model, batch, data and run of this command tiny, and leave its other options as they are."""
    config = train.load(argv)
    sizes = dict(vocab_size=300, block_size=16, n_layer=1, n_embd=16, n_head=2, n_kv_head=1, d_ff=32, trix_hidden=16,
                 num_frequencies=4, chunk_size=4, batch_size=4)
    words = [f'--{key}={size}' for key, size in sizes.items() if getattr(config, key)]  # 0 means: as the width says
    words += [f'--{key}=2' for key in ('eval_interval', 'save_interval', 'sample_interval') if getattr(config, key)]
    if config.dataset in DATA:
        words.append(f'--dataset={DATA[config.dataset]}')
    words.append('--max_windows=4' if config.epochs else f'--max_steps={3 if config.resume else 2}')
    words += ['--warmup_steps=1'] if config.origin['warmup_steps'] == 'command line' else []
    return [*words, '--batch_tokens=64', '--eval_tokens=64', '--sample_tokens=2', '--sample_prompts=word',
            '--device=cpu', '--dtype=float32']


def run_small(command, number):
    """Run a command of the page in small, in this process. `number` counts the commands of a section."""
    words = shlex.split(command.replace('step_0200000.pt', 'step_0000002.pt'))
    processes = int(words[2].partition('=')[2]) if words[0] == 'torchrun' else 1
    script, *argv = words[3:] if words[0] == 'torchrun' else words[1:]
    if script == 'bench.py':
        name = load(argv, bench.BenchConfig, positional=('command',)).command
        assert f"bench.main(['{name}'" in (ROOT / 'tests' / 'test_bench.py').read_text()  # there it runs in small
    elif script != 'train.py':
        for beginning, more in SMALL.items():
            if f'{script} {" ".join(argv)} '.startswith(f'{beginning} '):
                argv = argv + [word.format(n=number) for word in more]
        SCRIPTS[script].main(argv)
    elif '--plan' in argv:
        train.main([*argv, *shrunk(argv), '--dataset=data/none'])
    else:
        micro_batches(train.load(argv), processes)
        words = argv + (['--device=cpu'] if argv[0].endswith('recover.py') else shrunk(argv))
        train.main(words)
        state = checkpoint.find(train.load(words).out_dir)[1]
        assert state['step'] == state['config']['max_steps']


@pytest.mark.parametrize('section', SECTIONS)
def test_the_commands_of_the_page_run_on_small_models(section, place, monkeypatch):
    monkeypatch.setattr(convert, 'PARITY_TOKENS', 64)  # tokens that a conversion is measured on
    for number, command in enumerate(SECTIONS[section]):
        run_small(command, number)
