"""The figures of evaluate.py and hellaswag.py are correct, and equal the run's own figures to the last bit."""
import contextlib
import json
import math
import re
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import configurator
import evaluate
from benchmarks import hellaswag
import prepare
from corpora import shards
import tokenizer
import train
from configurator import UserError
from data import TokenData
from evaluate import Strided
from benchmarks.hellaswag import accuracy, clean, encode_items, log_likelihoods, parse, parse_one, read_items
from model import GPT, GPTConfig
from runtime import comparison
from runs import arguments, finish, finish_ranks, lines
from corpora.shards import open_data
from tokenizer import load_tokenizer

CPU, FP32 = torch.device('cpu'), torch.float32
TEST = ' = Robert = \n \n The bird sang ; it sang @-@ well . \n   \n\n Ünder the tree , again\n'
WORDS = ('=', 'Robert', '=', 'The', 'bird', 'sang', ';', 'it', 'sang', '@-@', 'well', '.', 'Ünder', 'the', 'tree', ',', 'again')


@pytest.fixture(scope='module')
def wiki(tmp_path_factory):
    """A prepared directory of a made-up WikiText, with its test split."""
    folder, draw = tmp_path_factory.mktemp('wiki'), np.random.default_rng(0)
    words = [''.join(draw.choice([*'abcdefgh'], 4)) for _ in range(60)]
    for split, n in (('train', 30), ('valid', 6)):
        articles = [f' = Article {i} = \n \n ' + ' '.join(draw.choice(words, 120)) + ' \n \n' for i in range(n)]
        (folder / f'wiki.{split}.raw').write_text(''.join(articles))
    (folder / 'wiki.test.raw').write_text(TEST)
    prepare.main(['--dataset=wikitext2', f'--source={folder}', '--vocab_size=300', f'--out={folder}/tokens', '--num_proc=1'])
    return folder / 'tokens'


@pytest.fixture(scope='module')
def trained(wiki):
    """A run that train.py has made on it, with a validation at its last step."""
    out = wiki.parent / 'run'
    code, said = finish(arguments(wiki, out, '--max_steps=10', '--eval_tokens=320', '--sample_interval=0'))
    assert code == 0, said
    return out


@pytest.fixture
def saved(wiki, tmp_path):
    """saved(**keys of GPTConfig) -> (path of a checkpoint as train.py would write it, its model); the data are those of `wiki`."""
    def save(prepared=wiki, change=lambda model: None, **keys):
        torch.manual_seed(1)
        config = GPTConfig(**{**dict(block_size=16, vocab_size=300, n_layer=1, n_head=2, n_embd=16), **keys})
        model, tokenizer = GPT(config).eval(), prepared / 'tokenizer.json'
        with torch.no_grad():
            model.lm_head.weight.mul_(30)  # far from uniform
            change(model)
        run = {'eval_tokens': 0, 'batch_size': 4, 'batch_tokens': 4 * config.block_size}
        path = tmp_path / f'{len(list(tmp_path.iterdir()))}.pt'
        checkpoint.save(path, {'model': model.state_dict(), 'optimizer': {}, 'step': 7, 'config': {**asdict(config), **run},
                               'tokenizer': json.loads(tokenizer.read_text()) if tokenizer.exists() else None,
                               'data': {'path': str(prepared)}})
        return path, model
    return save


def run_of(capsys, *words):
    """(the JSON object at the end of what evaluate.py says, all that it says)"""
    capsys.readouterr()
    evaluate.main([*map(str, words), '--device=cpu'])
    said = capsys.readouterr().out
    return json.loads(said.splitlines()[-1]), said


def refused(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


class Bigrams(torch.nn.Module):
    """P(next token | this token) from a table, as a model has it: known losses."""

    def __init__(self, table):
        super().__init__()
        self.logits = torch.tensor(table).log()

    def forward(self, idx, targets=None):
        logits = self.logits[idx]
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def fixed_weights(self):
        return contextlib.nullcontext()


# ---- validation

def test_the_last_validation_of_a_run_is_reproduced_to_the_last_bit(trained, capsys):
    own = lines(trained, 'eval')[-1]
    result, said = run_of(capsys, trained)
    assert [own[key] for key in ('step', 'loss', 'perplexity', 'bits_per_byte')] == \
        [result[key] for key in ('step', 'loss', 'perplexity', 'bits_per_byte')]
    assert result['tokens'] == 320 and "same as the run's own loss at step 10: yes\n" in said
    result, said = run_of(capsys, checkpoint.steps(trained / 'checkpoints')[-1], '--eval_tokens=320')
    assert own['loss'] == result['loss'] and "same as the run's own loss at step 10: yes\n" in said
    assert list(result) == ['run', 'step', 'loss', 'perplexity', 'tokens', 'bits_per_byte']


@pytest.mark.parametrize('file', ['', 'checkpoints/step_0000010.pt', 'packed.safetensors'])
def test_the_own_loss_of_a_run_is_found_from_its_checkpoints_and_exports(file, tmp_path):
    (tmp_path / 'run/checkpoints').mkdir(parents=True)
    (tmp_path / 'run/metrics.jsonl').write_text('{"kind": "eval", "step": 10, "loss": 5.25}\n')
    path = tmp_path / 'run' / file
    path.exists() or path.touch()
    assert evaluate.own_loss(path, 10) == 5.25 and evaluate.own_loss(path, 20) is None


def test_a_different_loss_is_not_reported_as_the_same(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / 'run')
    metrics = run / 'metrics.jsonl'
    metrics.write_text(metrics.read_text().replace(f"\"loss\": {lines(run, 'eval')[-1]['loss']}", '"loss": 5.25'))
    assert "step 10: no, the run recorded 5.25 (other" in run_of(capsys, run)[1]
    metrics.unlink()
    assert "step 10: the run recorded none" in run_of(capsys, run)[1]
    assert 'same as' not in run_of(capsys, run, '--eval_tokens=0')[1] + run_of(capsys, run, '--stride=8')[1]


def test_the_validation_of_two_processes_is_reproduced_to_the_last_bit(wiki, tmp_path, capsys):
    argv = arguments(wiki, tmp_path / 'run', '--max_steps=2', '--batch_tokens=64', '--warmup_steps=0', '--eval_interval=2',
                     '--sample_interval=0')
    codes, said = finish_ranks(argv, 2)
    assert codes == [0, 0], said
    assert run_of(capsys, tmp_path / 'run')[0]['loss'] == lines(tmp_path / 'run', 'eval')[-1]['loss']


@pytest.mark.parametrize('batch_size, batch_tokens, world', [(4, 128, 1), (4, 32, 1), (16, 128, 2), (3, 96, 2)], ids=str)
def test_evaluation_uses_the_batches_of_train_py(batch_size, batch_tokens, world):
    config = configurator.load([f'--batch_size={batch_size}', f'--batch_tokens={batch_tokens}', '--block_size=16'],
                               GPTConfig, train.TrainConfig)
    state = {'config': config.as_dict(), 'processes': world}
    assert evaluate.of_the_run(state, 'x') == (65_536, 16 * train.micro_batches(config, world)[0])


def test_a_checkpoint_with_a_broken_config_is_refused():
    for config in ({}, {'batch_size': 'x'}, {'block_size': 8, 'batch_tokens': 2.5}):
        assert refused(evaluate.of_the_run, {'config': config}, 'x.pt') == 'x.pt: its config has values of the wrong type'


def test_zero_eval_tokens_mean_the_whole_split(trained, wiki, capsys):
    data = TokenData(wiki, 16, 300)
    result, _ = run_of(capsys, trained, '--eval_tokens=0')
    assert result['tokens'] == 16 * data.n_val_windows > 320
    assert run_of(capsys, trained, f'--eval_tokens={16 * data.n_val_windows}')[0] == result


def test_too_large_eval_tokens_are_refused_with_the_possible_number(trained, wiki, monkeypatch, capsys):
    there = 16 * TokenData(wiki, 16, 300).n_val_windows
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', str(trained), f'--eval_tokens={there + 1}', '--device=cpu'])
    with pytest.raises(SystemExit) as end:
        configurator.run(evaluate.main)
    said = capsys.readouterr()
    assert end.value.code == 2 and '{' not in said.out
    assert said.err == (f'--eval_tokens={there + 1}: the val split of {wiki} has only {there} tokens to predict in windows of 16: '
                        'use a smaller number, or 0 for all\n')


@pytest.mark.parametrize('words, message', [
    ([], 'name a run directory'), (['nowhere'], 'nowhere: no such run'), (['x', '--eval_tokens=-2'], 'eval_tokens=-2 must not'),
    (['x', '--batch_size=-1'], 'batch_size=-1 must not be negative'), (['x', '--stride=-1'], 'stride=-1 must not be negative'),
    (['x', '--items=3'], 'items=3: this option needs --hellaswag'),
    (['{run}', '--stride=17'], '--stride=17 is more than the context of 16'),
    (['{run}', '--context=900000'], '--context=10068 or less'), (['{run}', '--stride=4', '--eval_tokens=90000'], 'has only'),
    (['{run}', '--hellaswag=nowhere'], 'nowhere: No such file'),
    (['config/trix_tiny.py'], 'config/trix_tiny.py is a config file, but evaluate.py takes a run: python evaluate.py runs/x'),
    (['{run}', 'nowhere'], 'nowhere: no such run or checkpoint'), (['x', '--page=x.pdf'], "page='x.pdf' must end in .html or .md"),
    (['{run}', '--checkpoint=3'], '--checkpoint=3: '),
], ids=str)
def test_a_mistake_is_one_line(trained, words, message):
    assert message in refused(evaluate.main, [word.format(run=trained) for word in words] + ['--device=cpu'])


# ---- strided

def test_a_hand_computed_loss_is_found_with_and_without_a_stride():
    model = Bigrams([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.5, 0.25]])
    ids = np.array([0, 1, 1, 2, 0, 0, 2])
    p = [0.25, 0.75, 0.125, 0.25, 0.5, 0.25]  # of 1 after 0, 1 after 1, 2 after 1, 0 after 2, 0 after 0, 2 after 0
    for context, stride in ((3, 3), (3, 1), (4, 2), (5, 3), (9, 9)):
        strided = Strided(lambda _, start, stop: ids[start:stop], 1, 7, context, stride)
        result = evaluate.validate(model, strided, np.array([1, 2, 3]), strided.windows(), 2, CPU, FP32)
        assert result['tokens'] == 6 and result['loss'] == pytest.approx(-sum(map(math.log, p)) / 6)
        assert result['perplexity'] == pytest.approx(math.prod(p) ** (-1 / 6))
        assert result['bits_per_byte'] == pytest.approx(-sum(map(math.log2, p)) / (2 + 2 + 3 + 1 + 1 + 3))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 4), st.integers(2, 40), st.integers(1, 20), st.data())
def test_with_a_stride_every_token_but_the_first_counts_once_with_enough_context(texts, length, context, data):
    stride, targets = data.draw(st.integers(1, context)), texts * (length - 1)
    limit = data.draw(st.integers(0, targets))
    strided = Strided(lambda text, start, stop: np.arange(start, stop) + 1000 * text, texts, length, context, stride, limit)
    windows = strided.windows()
    x, y = strided.val_batch(windows)
    rows, columns = np.nonzero(y >= 0)
    assert strided.targets == targets and x.dtype == y.dtype == np.int64 and len(x) == len(windows)
    assert (y[rows, columns] == x[rows, columns] + 1).all()
    expected = [1000 * text + i for text in range(texts) for i in range(1, length)][:limit or None]
    assert y[rows, columns].tolist() == expected  # in order, each once
    assert set(rows) == set(range(len(windows)))  # no window in vain
    before = np.minimum(y[rows, columns] % 1000, context - stride + 1)
    assert (columns + 1 >= before).all()
    assert all((x[row, :column + 1] == x[row, column] - np.arange(column, -1, -1)).all() for row, column in zip(rows, columns))


def direct_loop(model, ids, context, stride):
    """Mean loss over all tokens but the first, a target at a time."""
    nats = []
    for i in range(1, len(ids)):
        start = max(0, -(-(i - context) // stride)) * stride
        with torch.no_grad():
            nats.append(F.cross_entropy(model(ids[None, start:i])[0, -1:], ids[i:i + 1]).item())
    return sum(nats) / len(nats)


@pytest.mark.parametrize('keys', [dict(), dict(positions='learned', ffn='trix'), dict(mixer='resonance')], ids=str)
def test_a_strided_loss_equals_a_loop_over_the_tokens(saved, wiki, keys, capsys):
    path, model = saved(**keys)
    ids = torch.from_numpy(TokenData(wiki, 16, 300).read('val', 0, 121).astype(np.int64))
    for stride in (5, 16):
        result, _ = run_of(capsys, path, f'--stride={stride}', '--eval_tokens=120', '--batch_size=3')
        assert result['tokens'] == 120 and result['stride'] == stride
        assert result['loss'] == pytest.approx(direct_loop(model, ids, 16, stride), rel=1e-5)


def test_a_stride_predicts_the_whole_split(trained, wiki, capsys):
    tokens = json.loads((wiki / 'meta.json').read_text())['files']['val'][0]['tokens']
    apart, near = (run_of(capsys, trained, f'--stride={stride}')[0] for stride in (16, 2))
    assert apart['tokens'] == near['tokens'] == tokens - 1
    assert near['loss'] != apart['loss']
    assert near['bits_per_byte'] / apart['bits_per_byte'] == pytest.approx(near['loss'] / apart['loss'])
    message = refused(evaluate.main, [str(trained), '--stride=2', f'--eval_tokens={tokens}', '--device=cpu'])
    assert f'has only {tokens - 1} tokens to predict' in message


def test_a_stride_over_shards_stays_inside_the_rows(saved, tmp_path, capsys):
    draw = np.random.default_rng(0)
    for k in range(3):
        (tmp_path / 'in').mkdir(exist_ok=True)
        np.save(tmp_path / 'in' / f'{k}.npy', draw.integers(0, 300, (2, 32), np.uint16))
    shards.split(tmp_path / 'in', tmp_path / 'out', 0.3, vocab_size=300, say=lambda text: None)
    path, model = saved(prepared=tmp_path / 'out')
    rows = open_data(tmp_path / 'out', 32, 300).gather('val', np.arange(2))[0]
    result, _ = run_of(capsys, path, '--stride=6')
    assert result['tokens'] == 2 * 31 and result['bits_per_byte'] is None
    assert result['loss'] == pytest.approx(sum(direct_loop(model, row, 16, 6) for row in map(torch.from_numpy, rows)) / 2, rel=1e-5)
    for words in (['--test'], ['--hellaswag=x']):
        assert 'no tokenizer.json beside these shards' in refused(evaluate.main, [str(path), *words, '--device=cpu'])


# ---- another context

@pytest.mark.parametrize('keys', [dict(), dict(positions='none'), dict(mixer='resonance', ffn='resonance'),
                                  dict(trix_router='hash', ffn='trix')], ids=str)
def test_a_longer_context_equals_a_longer_model_with_the_same_weights(saved, wiki, keys, capsys):
    path, model = saved(**keys)
    longer = GPT(replace(model.config, block_size=48)).eval()
    longer.load_state_dict(model.state_dict())
    data = TokenData(wiki, 48, 300)
    x, y = map(torch.from_numpy, data.val_batch(data.val_windows()))
    result, said = run_of(capsys, path, '--context=48')
    assert result['loss'] == pytest.approx(longer(x, y).item(), rel=1e-5) and result['tokens'] == y.numel()
    assert result['context'] == 48 and 'stride' not in result and 'same as' not in said


def test_learned_positions_end_where_training_did(saved, wiki, capsys):
    path, model = saved(positions='learned')
    assert refused(evaluate.main, [str(path), '--context=17', '--device=cpu']) == \
        f'--context=17: {path} has learned positions, and only 16 of them'
    data = TokenData(wiki, 8, 300)
    x, y = map(torch.from_numpy, data.val_batch(data.val_windows()))
    assert run_of(capsys, path, '--context=8')[0]['loss'] == pytest.approx(model(x, y).item(), rel=1e-5)


# ---- comparisons, and the loss by position

@pytest.mark.parametrize('keys', [dict(ffn='trix'), dict(logit_softcap=3.0, positions='learned')], ids=str)
def test_the_loss_by_position_averages_the_targets_at_each_position(saved, wiki, keys, monkeypatch, capsys):
    path, model = saved(**{**keys, 'block_size': 40})
    monkeypatch.setattr(comparison, 'POSITION_TOKENS', 7 * 40)
    monkeypatch.setattr(comparison, 'HEAD_ROWS', 33)
    result, said = run_of(capsys, path, '--by_position')
    data = TokenData(wiki, 40, 300)
    x, y = map(torch.from_numpy, data.val_batch(data.val_windows()[:7]))
    with torch.no_grad():
        losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction='none').view(y.shape).mean(0)
    assert [span[:2] for span in result['by_position']] == [[1, 20], [21, 40]]
    assert [span[2] for span in result['by_position']] == pytest.approx([losses[:20].mean().item(), losses[20:].mean().item()], rel=1e-5)
    assert f'positions 21 to 40: loss {losses[20:].mean():.4f}' in said


@given(st.integers(1, 70_000))
def test_ranges_of_positions_double_and_cover_the_context(T):
    found = comparison.ranges(T)
    assert found[0][0] == 1 and found[-1][1] == T and all(a[1] + 1 == b[0] for a, b in zip(found, found[1:]))
    assert all(b[1] // 2 == a[1] and a[1] >= 16 for a, b in zip(found, found[1:]))


@pytest.mark.parametrize('name', ['page.html', 'page.md'])
def test_models_are_compared_in_one_table_and_one_page(trained, saved, tmp_path, capsys, name):
    other, page = saved(ffn='trix', block_size=32)[0], tmp_path / 'made' / name
    alone, _ = run_of(capsys, other)
    result, said = run_of(capsys, trained, other, f'--page={page}', '--sample_tokens=5')
    assert [one['run'] for one in result['runs']] == [str(trained), str(other)] and result['page'] == str(page)
    assert {key: result['runs'][1][key] for key in alone} == alone
    rows = {cells[0]: cells[1:] for cells in (re.split('  +', line) for line in said.splitlines())}
    assert rows['loss'] == [f"{one['loss']:.4f}" for one in result['runs']] and len(rows['decoding, tokens/s']) == 2
    table = [line for line in said.splitlines() if line.startswith(('parameters  ', 'loss saved'))]
    assert len(table) == 2 and len({line.rindex('  ') for line in table}) == 1, 'a name shifts its line'
    assert rows['perplexity at 17 to 32'] == [f"{math.exp(result['runs'][1]['by_position'][1][2]):,.2f}"]  # the first ends at 16
    assert 'different contexts' in said and 'peak GPU memory' not in rows
    text = page.read_text()
    assert all(f"{one['bits_per_byte']:.4f}" in text for one in result['runs']) and 'Samples' in text
    assert ('<svg' in text and '<script' not in text) if name.endswith('html') else text.startswith('# 2 models\n\n|')


# ---- the test split

def uniform(model):
    model.lm_head.weight.zero_()


def test_word_perplexity_of_a_uniform_model_equals_the_hand_computation(saved, wiki, capsys):
    path, _ = saved(change=uniform)
    result, said = run_of(capsys, path, '--test')
    tokens = len(load_tokenizer(wiki).encode_ordinary(TEST))
    assert result['words'] == len(WORDS) == 17 and result['lines'] == 6
    assert result['word_perplexity'] == pytest.approx(300 ** (tokens / 23), rel=1e-5)
    assert result['test_loss'] == pytest.approx(math.log(300))
    assert result['test_bits_per_byte'] == pytest.approx(tokens * math.log2(300) / len(TEST.encode()))
    assert 'test split: 17 words and 6 lines: word-level perplexity' in said


def test_the_test_split_is_one_stream_behind_an_end_of_text(saved, wiki, capsys):
    encoding = load_tokenizer(wiki)
    ids = evaluate.as_stream(encoding, TEST)
    assert ids[0] == encoding.eot_token not in ids[1:] and encoding.decode(ids[1:].tolist()) == TEST and ids.dtype == np.uint16
    path, model = saved()
    for words, stride in (([], 8), (['--stride=3'], 3)):
        result, _ = run_of(capsys, path, '--test', *words)
        loss = direct_loop(model, torch.from_numpy(ids.astype(np.int64)), 16, stride)
        assert result['test_stride'] == stride and result['test_loss'] == pytest.approx(loss, rel=1e-5)
        assert result['word_perplexity'] == pytest.approx(math.exp(loss * (len(ids) - 1) / 23), rel=1e-4)


def test_a_long_stream_is_encoded_in_slices_as_documents_are(wiki, monkeypatch):
    encoding, text = load_tokenizer(wiki), 'the bird again ' * 50
    monkeypatch.setattr(tokenizer, 'SLICE', 100)
    ids = evaluate.as_stream(encoding, text)
    assert encoding.decode(ids[1:].tolist()) == text
    assert ids[1:].tolist() == [token for i in range(0, 750, 100) for token in encoding.encode_ordinary(text[i:i + 100])]


def test_without_its_test_split_a_directory_is_refused(saved, wiki, corpus, tmp_path):
    path, _ = saved(prepared=corpus)
    assert f'{corpus}: no test split here' in refused(evaluate.main, [str(path), '--test', '--device=cpu'])
    broken = shutil.copytree(wiki, tmp_path / 'broken')
    path, _ = saved(prepared=broken)
    (broken / 'test.txt').write_text(TEST + 'x')
    assert 'test.txt: damaged: its sha256 differs' in refused(evaluate.main, [str(path), '--test', '--device=cpu'])
    (broken / 'test.txt').unlink()
    assert 'test.txt: No such file' in refused(evaluate.main, [str(path), '--test', '--device=cpu'])
    meta = json.loads((broken / 'meta.json').read_text())
    (broken / 'meta.json').write_text(json.dumps({**meta, 'test': {'name': 'test.txt'}}))
    assert "meta.json: broken test split (KeyError('sha256'))" in refused(evaluate.main, [str(path), '--test', '--device=cpu'])


# ---- HellaSwag

ITEM = {'ind': 4, 'activity_label': 'Baking', 'ctx_a': 'Mix the flour.', 'ctx_b': 'the BAKER', 'ctx': '-', 'split': 'val',
        'endings': ['eats.', 'pours water into it. [substeps] Then  he stirs.', 'sings a song', 'leaves'], 'label': 1}


def items_of(n):
    """Made-up items, some with marks, blank contexts or long ones."""
    draw = np.random.default_rng(0)
    words = ['Bird', 'the', 'sang', 'tree', 'Ünder', 'again,', 'abcd efgh', '@-@', '[title]', '[step]', 'well.']

    def text(most):
        return ' '.join(draw.choice(words, draw.integers(1, most)))
    return [{'activity_label': text(3), 'ctx_a': text(4 + i), 'ctx_b': text(4) if i % 3 else '', 'label': int(draw.integers(4)),
             'endings': [text(2 + 2 * k) + '.' for k in range(4)]} for i in range(n)]


def written(path, items):
    path.write_text(''.join(json.dumps(item) + '\n' for item in items))
    return path


def test_items_are_put_together_and_cleaned_as_the_harness_does():
    endings = ['eats.', 'pours water into it. Then he stirs.', 'sings a song', 'leaves']
    assert parse_one(ITEM) == ('Baking: Mix the flour. The baker', endings, 1)
    assert clean(' [header] How to sail [title] Buy a boat.  [step] Look [a] round  ') == ' How to sail. Buy a boat.  Look round'
    assert parse_one({**ITEM, 'ctx_b': '', 'label': '3'})[::2] == ('Baking: Mix the flour.', 3)


@pytest.mark.parametrize('change, message', [
    ({'ctx_b': None}, 'activity_label, ctx_a and ctx_b: expected strings'), ({'label': 4}, 'label 4, expected 0, 1, 2 or 3'),
    ({'label': ''}, "label '', expected"), ({'label': True}, 'label True, expected'), ({'label': 1.0}, 'label 1.0, expected'),
    ({'endings': ['a', 'b', 'c']}, 'endings: expected a list of 4 strings'), ({'endings': 'abcd'}, 'endings: expected a list'),
    ({'endings': ['a', 'b', 'c', 4]}, 'endings: expected a list of 4 strings'), ({'ctx_a': '\ud800'}, 'surrogates not allowed'),
    *[({key: ...}, f'no {key}') for key in ('activity_label', 'ctx_a', 'ctx_b', 'endings', 'label')],
    ('not JSON', 'Expecting value'), ('', 'Expecting value'), ('[]', 'no activity_label, ctx_a'), ('[' * 100_000, 'recursion'),
    (b'\xff', "can't decode"),
], ids=lambda value: str(value)[:30])
def test_a_broken_item_is_refused_by_file_and_line_before_anything_is_computed(saved, tmp_path, monkeypatch, change, message):
    if isinstance(change, dict):
        change = json.dumps({key: value for key, value in {**ITEM, **change}.items() if value is not ...})
    good = json.dumps(ITEM).encode()
    (tmp_path / 'items.jsonl').write_bytes(b'\n'.join([good, change if isinstance(change, bytes) else change.encode(), good]))
    monkeypatch.setattr(evaluate, 'validate', lambda *_: pytest.fail('it has begun'))
    said = refused(evaluate.main, [str(saved()[0]), f'--hellaswag={tmp_path}/items.jsonl', '--device=cpu'])
    assert said.startswith(f'{tmp_path}/items.jsonl:2: no item of HellaSwag: ') and message in said
    assert len(read_items(tmp_path / 'items.jsonl', 1)) == 1


def test_an_empty_file_and_too_few_items_are_refused(tmp_path):
    file = written(tmp_path / 'x', [])
    assert refused(read_items, file) == f'{file}: 0 items in it'
    assert refused(read_items, written(file, [ITEM] * 3), 4) == f'{file}: 3 items in it, --items=4 asks for more'
    assert len(read_items(file, 2)) == 2 and len(read_items(file)) == 3


@pytest.mark.parametrize('start, line_end, end', [
    (b'', b'\n', b''), (b'', b'\n', b'\n\n'), (b'', b'\n', b'\n \t\n\n'), (b'', b'\r\n', b'\r\n'), (b'', b'\r\n', b'\r\n\r\n'),
    (b'\xef\xbb\xbf', b'\n', b'\n'), (b'\xef\xbb\xbf', b'\r\n', b'\r\n\r\n')])
def test_items_are_read_with_any_line_ends_blank_last_lines_and_a_mark_of_utf_8(tmp_path, start, line_end, end):
    file = tmp_path / 'items.jsonl'
    file.write_bytes(start + line_end.join([json.dumps(item).encode() for item in items_of(3)]) + end)
    assert read_items(file) == [parse_one(item) for item in items_of(3)]
    assert refused(read_items, file, 4) == f'{file}: 3 items in it, --items=4 asks for more'


def test_the_ending_starts_after_the_tokens_of_the_context(wiki):
    encoding = load_tokenizer(wiki)
    items = [('The bird ', ['sang', 'a', 'b c', 'd'], 0), ('', ['x', 'y', 'z', 'w'], 1)]
    rows = encode_items(encoding, items, 100, 'f')
    for (ids, n), ending in zip(rows[:4], items[0][1]):
        assert encoding.decode(ids[:-n].tolist()) == 'The bird' and encoding.decode(ids[-n:].tolist()) == f'  {ending}'
    assert all(ids[0] == encoding.eot_token and len(ids) == n + 1 for ids, n in rows[4:])


def test_a_long_context_is_cut_on_the_left_and_a_long_ending_refused(wiki):
    encoding, item = load_tokenizer(wiki), ('bird ' * 30 + 'tree', ['sang', 'well', 'xyzx', 'again'], 0)
    for (ids, n), (cut, m) in zip(encode_items(encoding, [item], 1000, 'f'), encode_items(encoding, [item], 12, 'f')):
        assert n == m and len(cut) == 13 < len(ids) and cut.tolist() == ids[-13:].tolist()
    message = refused(encode_items, encoding, [item, ('a', ['z' * 30, *'bcd'], 0)], 12, 'f.jsonl')
    assert message == "f.jsonl:2: an ending of 31 tokens can't be scored in a context of 12: --context=N gives a longer one"


@pytest.mark.parametrize('keys', [dict(), dict(positions='learned', ffn='trix'), dict(mixer='resonance', chunk_size=8)], ids=str)
def test_padded_batches_equal_single_items(wiki, keys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=300, n_layer=2, n_head=2, n_embd=16, **keys)).eval()
    draw = np.random.default_rng(1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    rows = [(draw.integers(0, 300, draw.integers(6, 26)).astype(np.uint16), int(draw.integers(1, 6))) for _ in range(23)]
    alone = []
    for ids, n in rows:
        ids = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            log_p = model(ids[None, :-1])[0].double().log_softmax(-1)
        alone.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))))
    for batch_size in (1, 7):
        assert log_likelihoods(model, rows, batch_size, CPU, FP32) == pytest.approx(np.array(alone), rel=1e-5)


def test_accuracies_by_hand():
    items = [('c', ['ab', 'abcd', 'a' * 10, 'b'], 1), ('c', ['ab', 'ab', 'ab', 'ab'], 3), ('c', ['', 'a', 'b', 'c'], 0)]
    log_p = np.array([-4.0, -6, -10.1, -3,    # likeliest: 3; by character -2, -1.5, -1.01, -3: 2
                      -9, -5, -7, -4.5,       # 3 and 3
                      -1, -2, -3, -4])        # 0; an ending of no characters never is the likeliest by character: 1
    assert accuracy(items, log_p) == {'acc': 2 / 3, 'acc_norm': 1 / 3, 'items': 3}


def test_acc_and_acc_norm_of_a_known_model_equal_the_hand_computation():
    """Letters are tokens: 'a' follows anything with 1/2, 'b' with 1/4, '.' with 1/8."""
    class Letters:
        eot_token = 3
        encode_ordinary = staticmethod(lambda text: ['ab. '.index(c) for c in text])
    model = Bigrams([[0.5, 0.25, 0.125, 0.125]] * 4)
    items = [('a', ['.', 'bb', 'aaaa', 'aab'], 0), ('b', ['aaaa', 'aaa', 'b', '..'], 0), ('', ['.', 'b', 'a', 'b.'], 2)]
    # Bits, with 3 for the space, and bits by character: the least are 6 and 1.75, 5 and 1.75, 4 and 4 (the first of two).
    log_p = log_likelihoods(model, encode_items(Letters, items, 9, 'f'), 5, CPU, FP32)
    assert log_p / -math.log(2) == pytest.approx([6, 7, 7, 7, 7, 6, 5, 9, 6, 5, 4, 8], rel=1e-6)
    assert accuracy(items, log_p) == {'acc': 2 / 3, 'acc_norm': 2 / 3, 'items': 3}


def test_the_json_includes_hellaswag(saved, wiki, tmp_path, capsys):
    path, model = saved(block_size=64)
    file = written(tmp_path / 'items.jsonl', items_of(10))
    result, said = run_of(capsys, path, f'--hellaswag={file}', '--items=9', '--test')
    assert list(result)[:6] == ['run', 'step', 'loss', 'perplexity', 'tokens', 'bits_per_byte'] and result['step'] == 7
    assert {'word_perplexity', 'acc', 'acc_norm'} < result.keys() and result['items'] == 9 and 'HellaSwag, 9 items: acc' in said
    items = read_items(file, 9)
    log_p = log_likelihoods(model, encode_items(load_tokenizer(wiki), items, 64, 'f'), 1, CPU, FP32)
    assert {key: result[key] for key in ('acc', 'acc_norm', 'items')} == accuracy(items, log_p)


def test_hellaswag_alone_downloads_it_once_and_whole_or_not_at_all(saved, tmp_path, monkeypatch, capsys):
    path, _ = saved(block_size=64)
    origin = written(tmp_path / 'origin.jsonl', items_of(4))
    monkeypatch.setattr(hellaswag, 'URL', f'file://{origin}')
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    message = refused(evaluate.main, [str(path), '--hellaswag', '--device=cpu'])
    assert message == f'file://{origin}: 4 items have arrived, expected 10,042: try again, or give --hellaswag=FILE'
    assert not list((tmp_path / 'here').rglob('*.jsonl*'))
    monkeypatch.setattr(hellaswag, 'ITEMS', 4)
    result, _ = run_of(capsys, path, '--hellaswag')
    assert (tmp_path / 'here/data/hellaswag_val.jsonl').read_bytes() == origin.read_bytes() and result['items'] == 4
    origin.unlink()
    assert run_of(capsys, path, '--hellaswag=download')[0] == result


def test_without_a_network_the_error_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, 'URL', f'file://{tmp_path}/nothing')
    monkeypatch.chdir(tmp_path)
    message = refused(hellaswag.find, 'download')
    assert message.startswith(f"can't download file://{tmp_path}/nothing (") and message.endswith('give --hellaswag=FILE')
    assert not (tmp_path / 'data').exists()


def test_the_harness_agrees_on_every_log_probability_and_both_accuracies(saved, wiki, tmp_path):
    """With lm-evaluation-harness itself, where it is installed: pip install lm_eval accelerate."""
    pytest.importorskip('lm_eval')
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.hellaswag.utils import process_docs
    (_, model), encoding = saved(block_size=48), load_tokenizer(wiki)
    file, scored = written(tmp_path / 'items.jsonl', items_of(40)), {}

    class Harness(HFLM):
        """Its own encoding, cutting and batching around our model; what loads one of Hugging Face's is left out."""
        backend, max_length, batch_size, device, rank, world_size = 'causal', 48, 4, CPU, 0, 1
        eot_token_id = prefix_token_id = encoding.eot_token
        logits_cache, softmax_dtype, enable_thinking = True, None, False
        tok_encode = staticmethod(lambda text, *_, **__: encoding.encode_ordinary(text))
        get_model_info = staticmethod(dict)

        def __init__(self):
            LM.__init__(self)

        def _model_call(self, inps, **_):
            with torch.no_grad():
                return model(inps)

        def loglikelihood(self, requests, disable_tqdm=False):
            answers = super().loglikelihood(requests, True)
            scored.update({request.args: answer[0] for request, answer in zip(requests, answers)})
            return answers
    task = {'task': 'hellaswag_made_up', 'dataset_path': 'json',
            'dataset_kwargs': {'data_files': {'validation': str(file)}, 'cache_dir': str(tmp_path)},
            'output_type': 'multiple_choice', 'validation_split': 'validation', 'process_docs': process_docs,
            'doc_to_text': '{{query}}', 'doc_to_target': '{{label}}', 'doc_to_choice': 'choices', 'num_fewshot': 0,
            'metric_list': [{'metric': key, 'aggregation': 'mean', 'higher_is_better': True} for key in ('acc', 'acc_norm')]}
    results = simple_evaluate(Harness(), tasks=[task], task_manager=TaskManager(), bootstrap_iters=0)['results']
    theirs = results['hellaswag_made_up']

    items = read_items(file)
    rows = encode_items(encoding, items, 48, file)
    log_p = log_likelihoods(model, rows, 7, CPU, FP32)
    pairs = [(context, f' {ending}') for context, endings, _ in items for ending in endings]
    assert log_p == pytest.approx(np.array([scored[pair] for pair in pairs]), rel=1e-5)
    ours = accuracy(items, log_p)
    assert (ours['acc'], ours['acc_norm']) == (theirs['acc,none'], theirs['acc_norm,none']) and 0 < ours['acc'] < 1
    assert sum(len(ids) == 49 for ids, _ in rows) > 8  # some were cut


def test_lines_with_windows_line_ends_are_read(tmp_path):
    assert parse(b'\r\n'.join([json.dumps(ITEM).encode()] * 2).splitlines(), 'x') == [parse_one(ITEM)] * 2
