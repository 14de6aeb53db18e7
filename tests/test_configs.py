"""Every file in config/ is what it says: it loads, has the stated size and the shape of its source, and trains.

A new file is tested by itself. A line in DIMENSIONS fixes its shape, too.
"""
import ast
import contextlib
import hashlib
import io
import json
import math
import random
import re
import signal
from pathlib import Path

import pytest
import torch

import prepare
import schedule
import train
from corpora import corpus as corpus_module
from configurator import UserError
from model import GPT, GPTConfig

FOLDER = Path(__file__).parent.parent / 'config'
GPT2 = dict(vocab_size=50_257, norm='layernorm', positions='learned', ffn='gelu', bias=True, dropout=0.1,
            tie_embeddings=True, weight_decay=0.1)
RESONANCE = dict(mixer='resonance', ffn='swiglu', block_size=32_768, vocab_size=50_257, tie_embeddings=True,
                 dataset='shards:data/shards', activation_checkpointing=True, beta1=0.9, beta2=0.95, grad_clip=1.0)
DIMENSIONS = {  # what the sources fix; budget: tokens, batch: (sequences of a micro-step, micro-steps)
    'trix_tiny': dict(ffn='trix', n_embd=128, n_head=4, n_layer=3, vocab_size=8192, block_size=256,
                      budget=5_000_000, dataset='pylib'),
    'dense_tiny': dict(ffn='gelu', n_embd=128, n_head=4, n_layer=3, vocab_size=8192, block_size=256,
                       budget=5_000_000, dataset='pylib'),
    'speedrun_tiny': dict(n_embd=128, n_head=4, n_layer=3, vocab_size=8192, block_size=256, dataset='pylib'),
    'shakespeare': dict(vocab_size=1024, dataset='shakespeare', tokenizer='bpe', eval_tokens=0),
    'shakespeare_char': dict(GPT2, vocab_size=66, n_embd=128, n_head=4, n_layer=4, block_size=64, bias=False, dropout=0.0, batch=(12, 1),
                             max_steps=2000, learning_rate=1e-3, min_lr_ratio=0.1, warmup_steps=100, schedule='cosine', beta1=0.9, beta2=0.99,
                             grad_clip=1.0, optimizer='adamw', dataset='shakespeare', tokenizer='char'),  # nanoGPT's README, and its defaults
    'trix_small': dict(ffn='trix', n_embd=256, n_head=4, n_layer=6, vocab_size=16_384, block_size=256,
                       budget=50_000_000, dataset='fineweb_edu'),
    'trix_medium': dict(ffn='trix', n_embd=512, n_head=8, n_layer=8, vocab_size=32_000, block_size=512,
                        budget=500_000_000, dataset='fineweb_edu'),
    'resonance_small': dict(RESONANCE, schedule='restarts', n_embd=768, num_frequencies=64, n_layer=6, batch=(4, 8)),
    'resonance_medium': dict(RESONANCE, schedule='restarts', n_embd=1024, num_frequencies=128,
                             n_layer=12, batch=(4, 8)),
    'resonance_large': dict(RESONANCE, schedule='restarts', n_embd=2048, num_frequencies=256,
                            n_layer=16, batch=(2, 16)),
    'resonance_xlarge': dict(RESONANCE, schedule='restarts', n_embd=4096, num_frequencies=512,
                             n_layer=24, batch=(1, 32)),
    'resonance_32k': dict(RESONANCE, schedule='onecycle', n_embd=1024, num_frequencies=128, n_layer=8,
                          chunk_size=256, batch=(4, 4)),
    'wikitext_tiny': dict(GPT2, n_embd=256, n_head=4, n_layer=4, d_ff=1024, block_size=256, dataset='wikitext2'),
    'wikitext_small': dict(GPT2, n_embd=512, n_head=8, n_layer=6, d_ff=2048, block_size=512, dataset='wikitext103'),
    'wikitext_medium': dict(GPT2, n_embd=768, n_head=12, n_layer=12, d_ff=3072, block_size=1024, dataset='wikitext103'),
    'bitnet_tiny': dict(linear='bitnet', ffn='swiglu', norm='rmsnorm', positions='rotary', tie_embeddings=True,
                        qk_norm=False, embed_taps=0, n_embd=256, d_ff=768, vocab_size=8192,
                        dataset='pylib', budget=1_500_000),
    'bitnet_95m': dict(linear='bitnet', ffn='swiglu', norm='rmsnorm', positions='rotary', tie_embeddings=True,
                       vocab_size=32_000, n_layer=8, n_embd=768, n_head=12, n_kv_head=6, d_ff=3072,
                       dataset='fineweb_edu', weight_decay=0.1, beta1=0.9, beta2=0.95, learning_rate=1.5e-3,
                       warmup_steps=375, log_interval=100,
                       schedule='two_stage'),
}
EXACT = {'bitnet_95m': 95_367_936, 'wikitext_medium': 124_439_808}  # known from elsewhere: the source, GPT-2 small
FINETUNING = [path.stem for path in FOLDER.glob('*.py') if 'init_from' in path.read_text()]  # no shape of their own
PRESETS = [path.stem for path in sorted(FOLDER.glob('*.py')) if path.stem not in FINETUNING]
each_preset = pytest.mark.parametrize('name', PRESETS)
each_known_preset = pytest.mark.parametrize('name', DIMENSIONS)


def file_of(name):
    return FOLDER / f'{name}.py'


def load(name, *words):
    return train.load([str(file_of(name)), *words])


def tokens(*shape, vocab_size):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


# ---- the files

def test_every_preset_of_the_table_is_a_file():
    missing = set(DIMENSIONS) - set(PRESETS)
    assert not missing, f'not in config/ (remove them from DIMENSIONS in tests/test_configs.py): {missing}'
    others = [path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != '.py']
    assert not others, f'config/ holds Python files only: {others}'
    assert 'finetune_shakespeare' in FINETUNING  # see test_pretrained.py


@each_known_preset
def test_a_file_is_short_and_holds_only_assignments(name):
    text = file_of(name).read_text()
    assert 5 <= len(text.splitlines()) <= 25 and all(isinstance(node, ast.Assign) for node in ast.parse(text).body)
    assert text[0] == '#' and max(map(len, text.splitlines())) <= 130


@each_known_preset
def test_it_is_true_to_its_source(name):
    config = load(name)
    shown = {**config.as_dict(), 'budget': config.max_steps * config.batch_tokens,
             'batch': (config.batch_size, config.batch_tokens // (config.batch_size * config.block_size))}
    wanted = dict(DIMENSIONS[name])
    if 'budget' in wanted:  # to within an optimizer step, and as many steps as training needs
        assert abs(wanted.pop('budget') - shown['budget']) < config.batch_tokens and config.max_steps >= 700
    assert {key: shown[key] for key in wanted} == wanted
    if config.dataset == 'pylib':  # the others have the warm-up of their source
        assert 0.01 < config.warmup_steps / config.max_steps <= 0.1


def test_bitnet_has_two_stages_and_resonance_cycles_that_double():
    config = load('bitnet_95m')
    rates = {step: schedule.schedule(step, config) for step in (0, 375, 199_999, 200_000, 400_000)}
    assert rates[0] == pytest.approx((1.5e-3 / 375, 0.1)) and rates[375] == pytest.approx((1.5e-3, 0.1))
    assert rates[199_999][1] == 0.1
    assert rates[200_000] == pytest.approx((1e-3, 0.0)) and rates[400_000] == pytest.approx((1.5e-5, 0.0))
    for name in ('small', 'medium', 'large', 'xlarge'):
        config = load(f'resonance_{name}', '--max_steps=800', '--warmup_steps=50')
        cycles = [schedule.cycle(step, config) for step in (60, 150, 349, 350)]
        assert cycles == [(50, 100), (150, 200), (150, 200), (350, 400)]
    config = load('resonance_32k')
    assert config.warmup_steps == config.max_steps // 10
    assert schedule.schedule(config.warmup_steps - 1, config)[0] == pytest.approx(config.learning_rate)


def test_a_run_cut_short_on_the_command_line_leaves_out_what_does_not_fit():
    short = load('bitnet_95m', '--max_steps=100')
    assert (short.warmup_steps, short.boundary_step, schedule.boundary(short), short.mandatory_steps) == (5, 0, 50, ())
    assert 'shorter than the run of' in short.origin['warmup_steps']
    with pytest.raises(UserError, match='warmup_steps=200 is longer than the run of max_steps=100'):
        load('bitnet_95m', '--max_steps=100', '--warmup_steps=200')
    with pytest.raises(UserError, match='mandatory_steps=200: the run ends at max_steps=100'):
        load('bitnet_95m', '--max_steps=100', '--mandatory_steps=50,200')
    assert load('bitnet_95m', '--max_steps=199_999').mandatory_steps == (199_999,)


@pytest.mark.parametrize('name, rate, parameters', [
    ('trix_tiny', 1e-3, 2_032_512), ('dense_tiny', 1e-3, 1_639_296), ('trix_small', 6e-4, 12_061_952),
    ('trix_medium', 3e-4, 58_335_744)])
def test_the_recipe_of_the_source_is_one_switch_away(name, rate, parameters):
    config = load(name, str(FOLDER / 'recipes' / 'source.py'))
    plain = train.load([f'--learning_rate={rate}'])
    recipe = ('optimizer', 'learning_rate', 'matrix_lr', 'schedule', 'min_lr_ratio', 'qk_norm', 'zero_init',
              'embed_norm', 'embed_taps', 'document_starts', 'weight_decay', 'beta1', 'beta2', 'grad_clip')
    assert [getattr(config, key) for key in recipe] == [getattr(plain, key) for key in recipe]
    ours = load(name)
    changed = {key for key, value in ours.as_dict().items() if value != config.as_dict()[key]}
    assert changed <= {*recipe, 'out_dir'} and config.out_dir == f'runs/{name}-source'
    assert (changed == {'out_dir'}) == (name in ('trix_small', 'trix_medium'))  # these have the source's recipe already
    with torch.device('meta'):
        assert sum(p.numel() for p in GPT(config.pick(GPTConfig)).parameters()) == parameters


@each_preset
def test_the_flags_in_its_comments_are_accepted(name):
    for word in re.findall(r'`(--[^`]*)`', file_of(name).read_text()):
        load(name, word)


def test_shakespeare_is_prepared_trained_and_sampled_by_one_command(tmp_path, monkeypatch, handlers, capsys):
    """On a text of 10,000 made-up characters that stands for the real one."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    text = '\n'.join(f'ROMEO:\n{" ".join(draw.choices(("thou", "art", "my", "love", "and", "sun"), k=8))}.\n' for _ in range(300)).encode()[:10_000]
    monkeypatch.setattr(corpus_module, 'SHAKESPEARE_BYTES', 10_000)
    monkeypatch.setattr(corpus_module, 'SHAKESPEARE_SHA256', hashlib.sha256(text).hexdigest())
    Path('data').mkdir()
    Path('data/tinyshakespeare.txt').write_bytes(text)
    prepare.main(['--dataset=shakespeare', '--vocab_size=280', '--num_proc=1'])
    train.main([str(file_of('shakespeare')), '--vocab_size=280', '--max_steps=12', '--warmup_steps=2', '--n_layer=1', '--n_embd=32', '--block_size=32',
                '--sample_tokens=20', '--device=cpu', '--dtype=float32'])
    evals = [line for line in map(json.loads, Path('runs/shakespeare/metrics.jsonl').read_text().splitlines()) if line['kind'] == 'eval']
    assert [line['step'] for line in evals] == [0, 12] and evals[1]['bits_per_byte'] < 0.8 * evals[0]['bits_per_byte']
    said = capsys.readouterr().out
    assert '  sample:\n    ROMEO:' in said and said.splitlines()[-5].endswith('sample.py runs/shakespeare --num=3')


# ---- the size

@each_preset
def test_the_numbers_in_its_comments_are_the_true_ones(name):
    config, text = load(name), file_of(name).read_text()
    with torch.device('meta'):
        count = sum(p.numel() for p in GPT(config.pick(GPTConfig)).parameters())
    assert count == EXACT.get(name, count)
    shown = re.findall(r'[\d,]+(?= parameters)', text)
    assert shown == [f'{count:,}'] or not shown and name not in DIMENSIONS, f'config/{name}.py has {count:,} parameters'
    for shown in re.findall(r'([\d.]+) GB at 16 bytes a parameter', text):  # fp32 weights, gradients, two moments
        assert shown == f'{16 * count / 1e9:.3g}', f'{16 * count / 1e9:.3g} GB'
    for shown in re.findall(r'keeps ([\d.]+) GB of block', text):
        inputs = config.n_layer * config.batch_size * config.block_size * config.n_embd * 4 / 1e9
        assert shown == f'{inputs:.3g}', f'{inputs:.3g} GB'


# ---- it trains

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """A directory of tokens from 20 kB of made-up words."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp('corpus')
    words = [''.join(draw.choices('abcdefghij', k=draw.randint(2, 7))) for _ in range(80)]
    for i in range(40):
        (folder / f'{i:02d}.txt').write_text(' '.join(draw.choices(words, k=100)))
    out = folder / 'tokens'
    prepare.main([f'--dataset=text:{folder}/*.txt', '--vocab_size=300', f'--out={out}', '--val_ratio=0.2',
                  '--num_proc=1'])
    return out


@pytest.fixture
def handlers():
    """The signal handlers that a run in this process replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def shrunk(config):
    """Words that make the model, the context and the batch tiny. Every other setting stays that of the preset."""
    sizes = dict(vocab_size=300, block_size=16, n_layer=2, n_embd=16, n_head=2, n_kv_head=1, d_ff=32, trix_hidden=16,
                 num_frequencies=4, chunk_size=4, batch_size=2, batch_tokens=2 * 2 * 16)
    return [f'--{key}={size}' for key, size in sizes.items() if getattr(config, key)]  # 0 means: as the width says


@each_preset
def test_an_optimizer_step_of_it(corpus, tmp_path, handlers, name):
    words = [*shrunk(load(name)), f'--dataset={corpus}', f'--out_dir={tmp_path}/run', '--device=cpu',
             '--dtype=float32', '--max_steps=1', '--log_interval=1', '--eval_interval=0', '--sample_interval=0',
             '--save_interval=0']
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([str(file_of(name)), *words])
    line, = map(json.loads, (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines())
    assert (line['kind'], line['step'], line['tokens']) == ('train', 1, 64)
    assert abs(line['loss'] - math.log(300)) < 0.3 and math.isfinite(line['grad_norm'])


@each_preset
def test_its_loss_starts_at_ln_vocab_at_its_true_width(name):
    """With all heads and frequencies, but two layers (one of the widest) and, above width 1024, a small vocabulary."""
    config = load(name).pick(GPTConfig)
    config.n_layer = 2 if config.n_embd <= 2048 else 1
    config.vocab_size = config.vocab_size if config.n_embd <= 1024 else 512
    torch.manual_seed(0)
    model, T = GPT(config).eval(), min(config.block_size, 512)
    idx, targets = tokens(2, 1, T, vocab_size=config.vocab_size)
    with torch.no_grad():
        loss = model(idx, targets).item()
    assert abs(loss - math.log(config.vocab_size)) < 0.3
