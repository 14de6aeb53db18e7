"""Sampling and evaluation need a run directory or a checkpoint file, and nothing else."""
import contextlib
import importlib
import json
import math
import random
import re
import shutil
import signal
import sys

from types import SimpleNamespace
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
import torch.nn.functional as F

import checkpoint
import evaluate
import prepare
import sample
import train
from runtime import generation
from runtime.choice import choose_checkpoint
from configurator import UserError
from data import TokenData
from deploy import packed
from model import GPT, GPTConfig
from tokenizer import load_tokenizer


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(run directory, data directory) of a model that knows a few words."""
    folder, draw = tmp_path_factory.mktemp('sample'), random.Random(0)
    words = ['red', 'green', 'blue', 'straße', 'éclair', '日本']
    for i in range(40):
        (folder / f'{i:02d}.txt').write_text(' '.join(draw.choices(words, k=150)))
    data, out = folder / 'tokens', folder / 'run'
    prepare.main([f'--dataset=text:{folder}/*.txt', '--vocab_size=280', f'--out={data}', '--val_ratio=0.2', '--num_proc=1'])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.suppress(SystemExit):  # of a run that is over; had it failed, the tests would find no checkpoint
        train.main([f'--dataset={data}', f'--out_dir={out}', '--vocab_size=288', '--block_size=32', '--n_layer=1', '--n_head=2',
                    '--n_embd=32', '--max_steps=60', '--warmup_steps=5', '--learning_rate=1e-2', '--batch_size=8', '--device=cpu',
                    '--eval_interval=30', '--eval_tokens=0', '--sample_interval=0', '--save_interval=60'])
    for number, handler in handlers.items():  # a run takes them; pytest wants its Ctrl-C back
        signal.signal(number, handler)
    return out, data


def model_of(**keys):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, **keys)).eval()


def test_greedy_generation_is_the_argmax_of_the_full_forward():
    model, idx = model_of(ffn='trix'), torch.tensor([[1, 2, 3], [4, 5, 6]])
    got = torch.stack(list(generation.generate(model, idx, 40, 10, temperature=0)), 1)
    for _ in range(10):
        idx = torch.cat((idx, model(idx)[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, idx[:, 3:])


def test_generation_beyond_the_context_continues_from_its_last_half():
    model, idx = model_of(), torch.tensor([[1, 2, 3]])
    got = torch.cat(list(generation.generate(model, idx, 40, 20, temperature=0)))
    text = torch.cat((idx[0], got))
    assert len(got) == 20
    # The cache is full after 16 positions; the 17th token of the text is the last that sees all before it.
    assert text[17] == model(text[None, 9:17])[0, -1].argmax()
    assert text[16] == model(text[None, :16])[0, -1].argmax()


def test_a_long_prompt_is_cut_to_its_last_context():
    model, idx = model_of(), torch.randint(40, (1, 50))
    token = next(generation.generate(model, idx, 40, 1, temperature=0))
    assert token == model(idx[:, -16:])[0, -1].argmax()


def test_generation_leaves_the_mode_and_the_global_random_state_alone():
    model = model_of().train()
    before = torch.get_rng_state()
    list(generation.generate(model, torch.tensor([[1]]), 40, 3))
    assert model.training and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('keys, expected', [
    (dict(temperature=1.0, top_k=0, top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
    (dict(temperature=1.0, top_k=2, top_p=1.0), [0.625, 0.375, 0, 0]),
    (dict(temperature=1.0, top_k=0, top_p=0.75), [0.625, 0.375, 0, 0]),
    (dict(temperature=1.0, top_k=0, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    (dict(temperature=0.5, top_k=0, top_p=1.0), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    (dict(temperature=0, top_k=0, top_p=1.0), [1, 0, 0, 0]),
    (dict(temperature=1.0, top_k=0, top_p=1e-9), [1, 0, 0, 0]),
], ids=str)
def test_tokens_are_drawn_with_the_requested_probabilities(keys, expected):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20_000, 4)
    drawn = generation.choose(logits, **keys, generator=torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(share[[1, 3, 0, 2]], torch.tensor(expected, dtype=torch.float), atol=0.015, rtol=0)


class Letters:
    """A tokenizer with a letter for each id, so that different ids are different text."""
    n_vocab, eot_token = 37, 36
    encode_ordinary = staticmethod(lambda text: ['abcdefghijklmnopqrstuvwxyz0123456789'.index(c) for c in text])
    decode = staticmethod(lambda ids: ''.join('abcdefghijklmnopqrstuvwxyz0123456789'[i] for i in ids))


PROMPTS = ['', 'cat', 'a9b8c7d6', 'thisisapromptthatislongerthanthecontextof16']


def decisive(**keys):
    """A model that looks at all of its context, with logits far apart, to which the end of a document is never the likeliest."""
    model = model_of(tie_embeddings=False, **keys)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(('_proj.weight', '.up', '.down')) and 'in_proj' not in name:
                p.mul_(10)
        model.wte.weight.mul_(15)
        model.lm_head.weight.mul_(40)
        model.lm_head.weight[37:] *= 100  # padding of the vocabulary: the likeliest, if it were looked at
        model.lm_head.weight[36] = 0
    return model


def alone(model, prompt, n):
    """What `generate` makes of a prompt by itself."""
    idx = torch.tensor([sample.encode(Letters, prompt)])
    return Letters.decode([token.item() for token in generation.generate(model, idx, 37, n, temperature=0)])


@pytest.mark.parametrize('keys', [dict(), dict(mixer='resonance'), dict(ffn='trix'), dict(ffn='trix', trix_router='hash'),
                                  dict(mixer='resonance', attention_every=2, ffn='trix'), dict(ffn='resonance'),
                                  dict(positions='learned', ffn='bitnet')], ids=str)
@pytest.mark.parametrize('n', [7, 40])  # 40: a full context goes on from its last half, more than once
def test_greedy_rows_of_a_grid_equal_generate(keys, n):
    model = decisive(**keys)
    rows = generation.sample_grid(model, Letters, PROMPTS, n, seed=1)
    assert [(row['prompt'], row['mode']) for row in rows] == [(p, m) for p in PROMPTS for m in ('greedy', 'typical', 'stress')]
    expected = [alone(model, prompt, n) for prompt in PROMPTS]
    assert [row['text'] for row in rows if row['mode'] == 'greedy'] == expected
    assert len(set(expected)) == len(PROMPTS) and len(set(''.join(expected))) > 8  # else it would prove little
    assert all(row['tokens'] == len(row['text']) for row in rows)


@pytest.mark.parametrize('keys', [dict(), dict(mixer='resonance', attention_every=2, ffn='trix')], ids=str)
def test_a_row_of_a_grid_does_not_depend_on_the_others(keys):
    model = decisive(**keys)
    rows = generation.sample_grid(model, Letters, ['cat', '', 'a9b8c7d6'], 30, seed=1)
    for others in ([], ['a9b8c7d6', PROMPTS[3]]):
        for row, other in zip(rows[:3], generation.sample_grid(model, Letters, ['cat', *others], 30, seed=1)):
            assert other.pop('entropy') == pytest.approx(row['entropy'], rel=1e-3)
            assert other == {key: value for key, value in row.items() if key != 'entropy'}


def test_a_grid_depends_only_on_its_seed_and_rows_draw_separately():
    grid = {seed: generation.sample_grid(model_of(), Letters, ['cat', 'cat'], 20, seed) for seed in (1, 2, 2**64 - 1)}
    assert grid[1] == generation.sample_grid(model_of(), Letters, ['cat', 'cat'], 20, 1)
    texts = [row['text'] for rows in grid.values() for row in rows if row['mode'] != 'greedy']
    assert len(set(texts)) == len(texts) == 12


def test_entropy_and_repetition_describe_the_text():
    model = decisive()
    for row in generation.sample_grid(model, Letters, ['cat'], 11, seed=1):
        ids = sample.encode(Letters, 'cat' + row['text'])
        p = model(torch.tensor([ids[:-1]]))[0, 3:, :37].double().softmax(-1)
        assert len(ids) == 15 and row['entropy'] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-4)
        assert row['repetition'] == generation.repetition(ids[4:])


def test_entropy_of_a_uniform_model_is_the_logarithm_of_the_vocabulary():
    model = model_of()
    model.lm_head.weight.data.zero_()
    rows = generation.sample_grid(model, Letters, ['', 'cat'], 5, seed=1)
    assert [row['entropy'] for row in rows] == pytest.approx([math.log(37)] * 6, rel=1e-6)  # of the tokenizer, not of the 40
    assert rows[0]['text'] == 'aaaaa' and rows[0]['repetition'] == 0.5  # greedily: always the first


@pytest.mark.parametrize('ids, share', [([], 0), ([1, 1, 1], 0), ([1, 2, 3, 4], 0), ([1, 1, 1, 1, 1], 1 / 2), ([1, 2] * 4, 3 / 5),
                                        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6), (list(range(50)), 0), ([7] * 64, 60 / 61)], ids=str)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(ids, share):
    assert generation.repetition(ids) == pytest.approx(share)


def test_the_end_of_a_document_ends_its_row_and_the_last_one_the_grid(monkeypatch):
    model, calls = model_of(), []
    model.lm_head.weight.data.zero_()
    script = {0: iter([1, 2, 36]), 0.8: iter([5, 36]), 1.3: iter([3, 3, 3, 3])}  # a row that has ended is asked no more
    monkeypatch.setattr(generation, 'choose', lambda logits, temperature, **_: torch.tensor([next(script[temperature])]))
    rows = generation.sample_grid(model, Letters, ['cat'], 4, seed=1, stop=lambda: calls.append(1))
    assert [row['text'] for row in rows] == ['bc', 'f', 'dddd'] and [row['tokens'] for row in rows] == [2, 1, 4]
    assert [row['entropy'] for row in rows] == pytest.approx([math.log(37)] * 3)  # the end of a document was a choice, too
    assert len(calls) == 4  # the prompt and three tokens more; the last one is not fed
    script.update({0: iter([1, 36]), 0.8: iter([1, 1, 36]), 1.3: iter([1, 36])})
    calls.clear()
    generation.sample_grid(model, Letters, ['cat'], 400, seed=1, stop=lambda: calls.append(1))
    assert len(calls) == 3


def test_rows_that_end_early_do_not_delay_the_others(monkeypatch):
    model, choose = decisive(), generation.choose
    expected = alone(model, 'cat', 40)

    def ending(logits, temperature, **keys):
        return choose(logits, temperature, **keys) if temperature == 0 else torch.tensor([36])
    monkeypatch.setattr(generation, 'choose', ending)
    rows = generation.sample_grid(model, Letters, ['cat'], 40, seed=1)  # the context is full three times after the others have ended
    assert [row['text'] for row in rows] == [expected, '', '']


@pytest.mark.parametrize('pack', [False, True], ids=['trained', 'packed'])
@pytest.mark.parametrize('temperature', [0, 0.8])
def test_a_text_never_ends_before_its_first_token(temperature, pack):
    model, ends = model_of(ffn='trix', tie_embeddings=False), torch.tensor([[36], [36]])
    with torch.no_grad():
        model.wte.weight.fill_(0.1)
        model.lm_head.weight.fill_(0.01)[36] = 10  # the end of a document is by far the likeliest token
    if pack:
        model = packed.in_memory(model)
    free = list(generation.generate(model, ends, 37, 3, temperature))
    first, *others = generation.generate(model, ends, 37, 3, temperature, eot_id=36)
    assert 36 not in first and torch.stack(free + others).eq(36).all()
    rows = generation.sample_grid(model, Letters, ['', 'cat'], 5, seed=1)
    assert [row['tokens'] for row in rows if row['mode'] != 'stress'] == [1] * 4 and all(row['text'] for row in rows)
    assert rows[0]['entropy'] == pytest.approx(0, abs=0.01)  # of the model, to which this token is as good as certain


def test_a_sample_of_the_start_of_a_document_is_never_empty(trained, capsys):
    for seed in range(1, 6):
        sample.main([str(trained[0]), f'--seed={seed}', '--max_new_tokens=1', '--device=cpu'])
        assert capsys.readouterr().out.strip('\n')


def test_a_grid_that_is_stopped_is_empty_and_leaves_the_model_as_it_was():
    model, calls = model_of(dropout=0.5).train(), []
    before = torch.get_rng_state()
    assert generation.sample_grid(model, Letters, ['cat'], 20, seed=1, stop=lambda: calls.append(1) or len(calls) == 5) == []
    assert len(calls) == 5 and model.training and torch.equal(torch.get_rng_state(), before)


def test_a_grid_is_equal_in_training_and_evaluation_mode():
    model = decisive(dropout=0.5, ffn='trix')
    expected = generation.sample_grid(model, Letters, PROMPTS, 10, seed=1)
    before = torch.get_rng_state()
    with torch.enable_grad():
        assert generation.sample_grid(model.train(), Letters, PROMPTS, 10, seed=1) == expected
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(layer.load.sum() == 0 for layer in model.trix_layers()) and all(p.grad is None for p in model.parameters())
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generation.sample_grid(model, Letters, PROMPTS, 10, seed=1)
    assert model.training
    assert generation.sample_grid(model, Letters, [], 10, seed=1) == []


def test_a_grid_of_a_trained_model_is_text(trained):
    model, state = checkpoint.load_model(trained[0], 'cpu')
    rows = generation.sample_grid(model, load_tokenizer(state['tokenizer']), ['red green', ''], 40, seed=1)
    words = ' '.join(row['text'] for row in rows if row['mode'] == 'typical').split()
    assert sum(word in ('red', 'green', 'blue', 'straße', 'éclair', '日本') for word in words) > len(words) / 3
    assert all(0 < row['entropy'] < math.log(280) and 0 <= row['repetition'] < 1 for row in rows)


def test_characters_are_streamed_whole(trained):
    encoding, text = load_tokenizer(trained[1]), 'a日本ß'
    said = list(generation.pieces(encoding, text.encode()))  # single bytes are the first 256 ids
    assert ''.join(said) == text and all('\ufffd' not in part for part in said)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-5, 2**40), st.integers(0, 50)), unique=True))
def test_no_two_samples_have_the_same_seed(asked):
    seeds = [generation.sample_seed(seed, i) for seed, i in asked]
    assert len(set(seeds)) == len(seeds) and all(-2**63 <= seed < 2**63 for seed in seeds)
    assert all(generation.sample_seed(seed, 0) == seed for seed, _ in asked)


def test_the_second_sample_of_a_seed_is_not_the_first_of_the_next(trained, capsys):
    texts = {}
    for seed in (1, 2):
        capsys.readouterr()
        sample.main([str(trained[0]), '--num=2', f'--seed={seed}', '--max_new_tokens=30', '--device=cpu'])
        texts[seed] = re.split(r'--- \d\n', capsys.readouterr().out)[1:]
        sample.main([str(trained[0]), f'--seed={seed}', '--max_new_tokens=30', '--device=cpu'])
        assert capsys.readouterr().out == texts[seed][0]
    assert len({*texts[1], *texts[2]}) == 4


def test_a_checkpoint_alone_is_enough(trained, tmp_path, capsys):
    run, data = trained
    newest = checkpoint.steps(run / 'checkpoints')[-1]
    alone = shutil.copy(newest, tmp_path / 'model.pt')
    capsys.readouterr()
    outputs = []
    for source, seed in ((alone, 1), (run, 1), (alone, 2)):
        sample.main([str(source), '--prompt=red green', '--num=2', '--max_new_tokens=30', f'--seed={seed}', '--device=cpu'])
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out != outputs[2].out
    assert outputs[0].out.startswith('--- 1\nred green') and '--- 2\nred green' in outputs[0].out
    assert 'tokens/s' in outputs[0].err
    words = outputs[0].out.split()
    assert sum(word in ('red', 'green', 'blue', 'straße', 'éclair', '日本') for word in words) > len(words) / 3


def test_prompts_from_a_file_and_from_the_keyboard(trained, tmp_path, capsys, monkeypatch):
    run, _ = trained
    (tmp_path / 'prompts.txt').write_text('red\\ngreen\n\nblue\n')
    capsys.readouterr()
    sample.main([str(run), f"--prompts={tmp_path / 'prompts.txt'}", '--max_new_tokens=5', '--stop=false', '--device=cpu'])
    said = capsys.readouterr()
    first, second = said.out.removeprefix('--- 1\n').split('--- 2\n')
    assert first.startswith('red\ngreen') and second.startswith('blue')
    assert re.search(r'prompt: \d+ tokens, [\d,]+ tokens/s; decoding: 8 tokens, [\d,]+ tokens/s', said.err)
    typed = iter(['blue', 'blue', ''])
    monkeypatch.setattr('builtins.input', lambda _: next(typed))
    sample.main([str(run), '--interactive', '--max_new_tokens=5', '--stop=false', '--device=cpu'])
    assert capsys.readouterr().out == 2 * second  # the same seed, the same text
    for content, what in ((None, 'No such file'), (b'\n\n', 'the file has no prompt'), (b'\xff', "can't decode")):
        path = tmp_path / 'other.txt'
        path.write_bytes(content) if content else path.unlink(missing_ok=True)
        with pytest.raises(UserError, match=f'other.txt: .*{what}'):
            sample.main([str(run), f'--prompts={path}', '--device=cpu'])


def test_sampling_stops_at_the_end_of_a_document(trained, capsys, monkeypatch):
    script = iter(2 * [ord('y'), 279, 279])  # 279: the end-of-text token; a byte is its own id
    monkeypatch.setattr(generation, 'choose', lambda logits, *_: torch.tensor([next(script)]))
    capsys.readouterr()
    sample.main([str(trained[0]), '--prompt=x', '--device=cpu'])
    assert capsys.readouterr().out == 'xy\n'
    next(script)
    sample.main([str(trained[0]), '--prompt=x', '--device=cpu', '--stop=false', '--max_new_tokens=3'])
    assert capsys.readouterr().out == 'xy<|endoftext|><|endoftext|>\n'


def test_padding_of_the_vocabulary_is_never_sampled(trained):
    model, state = checkpoint.load_model(trained[0], 'cpu')
    assert model.config.vocab_size == 288 and load_tokenizer(state['tokenizer']).n_vocab == 280
    with torch.no_grad():
        model.lm_head.weight[280:] = 100 * model.norm(model.wte.weight[:1])
    tokens = torch.cat(list(generation.generate(model, torch.tensor([[1]]), 280, 50, temperature=2.0)))
    assert tokens.max() < 280


@pytest.mark.parametrize('words, message', [
    ([], 'name a run directory'), (['nowhere'], 'nowhere: no such run'), (['x', '--top_p=0'], 'top_p=0.0 must lie in (0, 1]'),
    (['x', '--num=0'], 'num=0 must be at least 1'), (['x', '--prompt=a', '--interactive'], 'give only one of them'),
    (['x', '--conversation'], 'only with --interactive'), (['x', '--pack=maybe'], "pack='maybe' is not one of"),
    (['x', '--serve', '--prompt=a'], 'give only one of them'), (['x', '--port=70000'], 'port=70000 must lie in'),
    (['x', '--checkpoint=worst'], '--checkpoint=worst: expected last, best or a step'), (['x', '--tempreature=1'], "did you mean 'temperature'"),
])
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(UserError) as refused:
        sample.main(words)
    assert message in str(refused.value) and '\n' not in str(refused.value)


def test_evaluate_ends_with_one_json_object_that_a_hand_computation_confirms(trained, capsys):
    run, path = trained
    evaluate.main([str(run), '--device=cpu', '--batch_size=3'])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    model, state = checkpoint.load_model(run, 'cpu')
    data, encoding = TokenData(path, 32, 288), load_tokenizer(path)
    x, y = map(torch.from_numpy, data.val_batch(data.val_windows()))
    with torch.no_grad():
        nats = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction='sum').item()
    size = sum(len(encoding.decode_single_token_bytes(t)) for t in y.flatten().tolist() if t != 279)
    assert result['tokens'] == y.numel() and result['step'] == 60
    assert result['loss'] == pytest.approx(nats / y.numel(), rel=1e-5)
    assert result['perplexity'] == pytest.approx(math.exp(result['loss']))
    assert result['bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_evaluate_refuses_data_of_another_tokenizer(trained, tmp_path):
    other = tmp_path / 'tokens'
    prepare.main([f'--dataset=text:{trained[1].parent}/[0-2]*.txt', '--vocab_size=280', f'--out={other}', '--val_ratio=0.2', '--num_proc=1'])
    with pytest.raises(UserError, match=f'has another tokenizer than.*--tokenizer={trained[1]}/tokenizer.json'):
        evaluate.main([str(trained[0]), f'--data={other}', '--device=cpu'])


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'evaluate.py', 'prepare.py', 'bench.py'])
def test_every_command_has_help_that_explains_every_option(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script.removesuffix('.py')).main(['--help'])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f'python {script}' in said
    options = [line for line in said.splitlines() if line.startswith('  --')]
    assert len(options) >= 6 and all(len(line.split()) > 3 for line in options)  # key, type, default, words


def test_a_file_of_prompts_has_one_prompt_per_line(tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_bytes('\ufefffirst\r\nsec\u2028ond\x0c\n\nthird'.encode())
    config = SimpleNamespace(interactive=False, prompts=str(path))
    assert list(sample.prompts(config)) == ['first', 'sec\u2028ond\x0c', 'third']


def test_a_prompt_of_another_locale_is_what_was_typed():
    config = SimpleNamespace(interactive=False, prompts='', prompt='Ω→'.encode().decode('ascii', 'surrogateescape'))
    assert list(sample.prompts(config)) == ['Ω→']


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = torch.tensor([[1.0, 3.0, 2.0], [900.0, -900.0, 0.0]])
    assert generation.choose(logits, 1e-40, 0, 1.0, torch.Generator()).tolist() == [1, 0]


def test_interactive_without_an_input_is_refused(monkeypatch):
    monkeypatch.setattr(sys, 'stdin', None)
    with pytest.raises(UserError, match='--interactive reads prompts from standard input, but it is closed'):
        sample.ask()


def test_logits_that_are_not_finite_give_one_line():
    for logits in (torch.full((1, 4), math.nan), torch.tensor([[math.inf, 1.0]])):
        with pytest.raises(UserError, match='no token can be drawn: the logits of the model are not finite'):
            generation.choose(logits, 0.8, 0, 1.0, torch.Generator())


# ---- which checkpoint

@pytest.fixture
def several(tmp_path):
    """A run with checkpoints of steps 10 to 30 and archived weights of step 5; that of step 20 is the best of them."""
    model, run = model_of(), tmp_path / 'run'
    for name, step in (('archives', 5), ('checkpoints', 10), ('checkpoints', 20), ('checkpoints', 30)):
        (run / name).mkdir(parents=True, exist_ok=True)
        checkpoint.save(run / name / f'step_{step:07d}.pt', {
            'model': model.state_dict(), 'optimizer': {}, 'step': step, 'config': vars(model.config), 'tokenizer': None, 'data': {}})
    lines = [{'kind': 'eval', 'step': step, 'loss': loss} for step, loss in ((5, 4.0), (10, 3.5), (15, 1.0), (20, 2.5), (30, 2.75))]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in [*lines, {'kind': 'eval', 'step': [20], 'loss': 0.5}]))
    return run


def test_a_checkpoint_is_chosen_by_its_loss_or_its_step(several):
    step = {choice: checkpoint.find(choose_checkpoint(several, choice))[1]['step'] for choice in ('last', 'best', '10', '5', '0000030')}
    assert step == {'last': 30, 'best': 20, '10': 10, '5': 5, '0000030': 30}  # 15 has the lowest loss, but no checkpoint


def test_a_checkpoint_that_is_not_there_is_refused(several):
    for run, choice, message in ((several, '15', 'no checkpoint of this step; the newest are 5, 10, 20, 30'), (several, 'newest', 'expected last, best or a step'),
                                 (several / 'checkpoints/step_0000010.pt', 'best', 'chooses in a run directory'), ('nowhere', '3', 'nowhere is not there')):
        with pytest.raises(UserError, match=message):
            choose_checkpoint(run, choice)
    (several / 'metrics.jsonl').unlink()
    with pytest.raises(UserError, match='no checkpoint with a validation loss'):
        choose_checkpoint(several, 'best')


# ---- packed in memory

@pytest.mark.parametrize('keys, packs', [(dict(ffn='trix'), True), (dict(linear='bitnet'), True), (dict(), False),
                                         (dict(ffn='trix', mixer='resonance'), False), (dict(ffn='trix', trix_router='hash'), False)], ids=str)
def test_a_ternary_model_is_packed_where_that_is_faster_and_says_so(keys, packs, capsys):
    model = model_of(**keys)
    other = sample.packed_in_memory(model, {'config': {}}, 'auto', torch.float32)
    if packed.library() is None:
        pytest.skip('no C++ compiler')
    assert (other is not model) == packs == ('packed in memory' in capsys.readouterr().err)
    assert sample.packed_in_memory(model, {'config': {}}, 'no', torch.float32) is model
    assert sample.packed_in_memory(model, {'config': {}}, 'auto', torch.bfloat16) is model
    if packs:
        idx = torch.tensor([[1, 2, 3]])
        texts = [torch.cat(list(generation.generate(net, idx, 40, 40, seed=3))).tolist() for net in (model, other)]
        assert texts[0] == texts[1] and len(set(texts[0])) > 8


def test_pack_yes_packs_any_ternary_model_and_refuses_others():
    model = model_of(ffn='trix', mixer='resonance')
    other = sample.packed_in_memory(model, {'config': {}}, 'yes', torch.float32)
    idx = torch.tensor([[1, 2, 3]])
    assert other is not model and torch.allclose(other(idx), model(idx), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match='no ternary matrix'):
        sample.packed_in_memory(model_of(), {'config': {}}, 'yes', torch.float32)


def test_a_model_within_the_ternary_warm_up_is_sampled_as_trained_and_not_packed():
    state = {'step': 3, 'config': {'ternary_warmup': 0.5, 'max_steps': 10}}
    model = model_of(ffn='trix')
    assert sample.packed_in_memory(model, state, 'yes', torch.float32) is model
    assert sample.packed_in_memory(model, {**state, 'step': 5}, 'yes', torch.float32) is not model


def test_a_conversation_continues_all_text_before_a_prompt(trained, capsys, monkeypatch):
    asked, encode = [], sample.encode
    monkeypatch.setattr(sample, 'encode', lambda encoding, text: asked.append(text) or encode(encoding, text))
    typed = iter(['red', 'blue', 'green', ''])
    monkeypatch.setattr('builtins.input', lambda _: next(typed))
    capsys.readouterr()
    sample.main([str(trained[0]), '--interactive', '--conversation', '--max_new_tokens=5', '--stop=false', '--device=cpu'])
    shown = capsys.readouterr().out
    assert asked[0] == 'red' and asked[1].startswith('red') and asked[2].startswith(asked[1])
    assert asked[2].removesuffix('green') == shown[:shown.index('green')]  # as it stands on the screen
