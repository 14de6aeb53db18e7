"""A dense model becomes a ternary one: tiles are cut exactly, rounding is optimal, and distillation recovers the loss."""
import os
from types import SimpleNamespace

import pytest
import torch

import checkpoint
from deploy import convert
import evaluate
import export
from configurator import UserError
from kernels import ternary_codes
from model import GPT, GPTConfig
from runs import arguments, assert_same_run, finish, lines
from schedule import top_k
from test_packed import ids, trained

DENSE = dict(n_embd=32, n_layer=2, n_head=2, qk_norm=True, embed_taps=3)
each_ffn = pytest.mark.parametrize('ffn', ['gelu', 'relu2', 'swiglu'])


# ---- cutting

def test_clusters_are_of_equal_size_and_of_neighbours():
    torch.manual_seed(0)
    kind = torch.randperm(40) % 4
    points = 3 * torch.eye(4, 9)[kind] + 0.1 * torch.randn(40, 9)
    clusters = convert.balanced_kmeans(points, 4)
    assert sorted(clusters.flatten().tolist()) == list(range(40)) and clusters.shape == (4, 10)
    assert sorted(sorted(set(kind[cluster].tolist())) for cluster in clusters) == [[0], [1], [2], [3]]
    assert convert.balanced_kmeans(torch.randn(21, 5), 7).shape == (7, 3)


@each_ffn
@pytest.mark.parametrize('execution, bias', [('dense', False), ('loop', False), ('dense', True), ('loop', True)])
def test_all_tiles_together_equal_the_ffn(ffn, execution, bias):
    model = trained(ffn=ffn, bias=bias, **DENSE)
    config, weights = convert.split(model, 4, 4)
    assert (config.trix_cut, config.trix_hidden) == (ffn, 96 // 4 if ffn == 'swiglu' else 32)
    tiles = convert.without_ternary(GPT(config).eval())
    tiles.load_state_dict(weights)
    for trix in tiles.trix_layers():
        trix.execution = execution
    a, b = tiles(ids()), model(ids())
    assert (a - b).norm() < 1e-5 * b.norm()
    tiles.set_top_k(3)
    assert (tiles(ids()) - b).norm() > 1e-3 * b.norm()


def test_gates_begin_at_one_and_learn():
    config, weights = convert.split(trained(ffn='relu2', **DENSE), 4, 2)
    model = GPT(config)
    model.load_state_dict(weights)
    model(ids(), ids()).backward()
    assert all(trix.slope.grad.abs().min() > 0 and trix.up.grad.abs().sum() > 0 for trix in model.trix_layers())
    assert model.trix_layers()[0].route(torch.randn(5, 32), *[model.trix_layers()[0].weights()[i] for i in (0, 2)])[1].eq(1).all()


# ---- rounding

@pytest.mark.parametrize('shape', [(7, 9), (1, 4), (64, 64)])
def test_codes_and_scale_are_the_nearest_in_least_squares(shape):
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(shape) + 0.005
    codes, scale = ternary_codes(convert.nearest(weight))
    found = ((scale * codes - weight) ** 2).sum()
    size = weight.abs().flatten().sort().values

    def error(fence):  # of the best scale for all those over a threshold
        on = weight.abs() > fence
        return ((weight.abs() - weight.abs()[on].mean() * on) ** 2).sum()
    assert found <= min(error(fence) for fence in [0, *size[:-1].tolist()]) * (1 + 1e-5)
    assert torch.equal(codes, codes.abs() * weight.sign())


def test_latent_weights_keep_their_order():
    weight = torch.randn(30, 30)
    latent = convert.nearest(weight)
    order = weight.abs().flatten().argsort()
    assert (latent.abs().flatten()[order].diff() >= 0).all() and torch.equal(latent.sign(), weight.sign())
    before, _ = ternary_codes(weight)
    after, scale = ternary_codes(latent)
    plain = ((ternary_codes(weight)[1] * before - weight) ** 2).mean()
    assert ((scale * after - weight) ** 2).mean() < 0.8 * plain, 'no better than the mean of magnitudes'


def test_weights_without_a_spread():
    assert convert.nearest(torch.zeros(3, 4)).eq(0).all()
    codes, scale = ternary_codes(convert.nearest(torch.full((3, 4), -0.5)))
    assert codes.eq(-1).all() and scale.item() == pytest.approx(0.5)


# ---- from a run to a run

@pytest.fixture(scope='module')
def dense(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp('dense') / 'run'
    code, said = finish(arguments(corpus, out, '--ffn=gelu', '--dropout=0', '--sample_interval=0', '--max_steps=200', '--save_interval=50',
                                  '--eval_interval=50', '--log_interval=50'))
    assert code == 0, said
    return out


@pytest.mark.parametrize('to, words', [('trix', ('--tiles=4', '--top_k=2')), ('bitnet', ()), ('bitnet_ffn', ())])
def test_training_on_a_tenth_of_the_tokens_recovers_most_of_the_loss(dense, to, words, tmp_path, capsys):
    export.main(['convert', str(dense), str(tmp_path / to), f'--to={to}', *words, '--device=cpu'])
    said = capsys.readouterr().out
    stages = [float(line.split()[-1]) for line in said.splitlines() if line.startswith('  ')]
    assert to != 'trix' or stages[1] == pytest.approx(stages[0], abs=1e-4)
    assert stages[-1] > stages[0] + 0.02 and said.splitlines()[-1].endswith(f'train.py {tmp_path / to}/recover.py')
    code, said = finish([str(tmp_path / to / 'recover.py'), f'--out_dir={tmp_path / "back"}', '--log_interval=1', '--learning_rate=3e-3'])
    assert code == 0, said
    losses = [line['loss'] for line in lines(tmp_path / 'back', 'eval')]
    lost = stages[-1] - stages[0]
    assert len(lines(tmp_path / 'back', 'train')) == 40 and lines(tmp_path / 'back', 'train')[-1]['tokens'] == 200 * 128 // 10
    assert losses[-1] - lines(dense, 'eval')[-1]['loss'] < 0.6 * lost, (losses, stages)
    model, state = checkpoint.load_model(tmp_path / 'back', 'cpu')
    assert (model.config.linear, state['config']['distill_from']) == ('dense' if to == 'trix' else to, str(dense))
    evaluate.main([str(tmp_path / 'back'), '--device=cpu'])
    assert f'"loss": {losses[-1]}' in capsys.readouterr().out, 'a model with other tiles than that of the run'


def test_annealing_reduces_the_tiles_and_a_resumed_run_has_as_many(dense, tmp_path, capsys):
    export.main(['convert', str(dense), str(tmp_path / 'trix'), '--to=trix', '--top_k=2', '--device=cpu'])
    words = [str(tmp_path / 'trix' / 'recover.py'), '--sample_interval=10', '--sample_tokens=8', '--eval_interval=5', '--save_interval=5', '--log_interval=1',
             '--keep=0']
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    assert finish([*words, f'--out_dir={whole}'])[0] == 0
    found = {step: checkpoint.load_model(whole / 'checkpoints' / f'step_{step:07d}.pt', 'cpu')[0].trix_layers()[0].k for step in (5, 10, 40)}
    assert found == {5: 5, 10: 2, 40: 2}
    evaluate.main([str(whole / 'checkpoints' / 'step_0000005.pt'), '--device=cpu'])
    assert f'"loss": {lines(whole, "eval")[1]["loss"]}' in capsys.readouterr().out
    (cut / 'checkpoints').mkdir(parents=True)
    os.link(whole / 'checkpoints' / 'step_0000005.pt', cut / 'checkpoints' / 'step_0000005.pt')
    for name in ('metrics.jsonl', 'samples.jsonl'):
        (cut / name).write_bytes((whole / name).read_bytes())
    assert finish([*words, f'--out_dir={cut}', '--resume=auto'])[0] == 0
    assert_same_run(cut, whole)


def test_annealing_begins_with_all_tiles_and_ends_at_its_step():
    config = SimpleNamespace(anneal_steps=10, trix_tiles=8, trix_top_k=2)
    found = [top_k(step, config) for step in range(12)]
    assert found[0] == 8 and found[9] == 3 and found[10] == found[11] == 2 and found == sorted(found, reverse=True)
    assert top_k(0, SimpleNamespace(anneal_steps=0, trix_tiles=8, trix_top_k=2)) == 2


# ---- refusals

@pytest.mark.parametrize('keys, words, what', [
    (dict(ffn='trix'), ['--to=trix'], 'ffn=trix, linear=dense: this model is ternary already'),
    (dict(linear='bitnet'), ['--to=bitnet'], 'ternary already'),
    (dict(ffn='bitnet'), ['--to=trix'], 'ternary already'),
    (dict(ffn='none'), ['--to=trix'], 'ffn=none: only gelu, relu2, swiglu can be cut'),
    (dict(d_ff=50), ['--to=trix'], '--tiles=8 does not divide the 50 hidden units'),
    ({}, ['--to=gguf'], "to='gguf': convert needs --to=trix, bitnet or bitnet_ffn"),
    ({}, [], "to='': convert needs"),
    ({}, ['--to=trix', '--top_k=9'], 'top_k=9, tiles=8: a token needs at least one tile'),
    ({}, ['--to=bitnet'], 'its config has no batch_size, batch_tokens, max_steps, learning_rate, and the training'),
])
def test_what_cannot_be_converted_is_refused(keys, words, what, tmp_path):
    model = GPT(GPTConfig(**{**dict(n_embd=16, n_layer=1, n_head=2, vocab_size=97, block_size=16), **keys}))
    checkpoint.save(tmp_path / 'x.pt', {'model': model.state_dict(), 'optimizer': {}, 'step': 3, 'config': vars(model.config), 'tokenizer': None,
                                        'data': {}})
    with pytest.raises(UserError, match=what):
        export.main(['convert', str(tmp_path / 'x.pt'), *words, '--device=cpu'])
    assert [path.name for path in tmp_path.iterdir()] == ['x.pt']


def test_an_existing_directory_is_not_overwritten(dense, tmp_path):
    with pytest.raises(UserError, match='already exists'):
        export.main(['convert', str(dense), str(tmp_path), '--to=bitnet', '--device=cpu'])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('option', ['distill_from', 'init_from'])
def test_a_model_of_another_vocabulary_is_refused(option, dense, corpus, tmp_path):
    path, state = checkpoint.find(dense)
    *ranks, first, second = state['tokenizer']['ranks']
    state['tokenizer'] = {**state['tokenizer'], 'ranks': [*ranks, second, first]}
    checkpoint.save(tmp_path / 'other.pt', state)
    code, said = finish(arguments(corpus, tmp_path / 'run', '--ffn=gelu', f'--{option}={tmp_path / "other.pt"}'))
    assert code == 2 and f'--{option}: {tmp_path}/other.pt: trained with another tokenizer' in said
    assert not (tmp_path / 'run').exists()


def test_a_teacher_with_more_entries_is_refused(dense, corpus, tmp_path):
    code, said = finish(arguments(corpus, tmp_path / 'run', '--vocab_size=320', f'--distill_from={dense}'))
    assert code == 2 and "its vocabulary has 300 entries, the vocabulary of this model has 320" in said


@pytest.mark.parametrize('words, what', [
    (['--init_from=RUN'], 'do not fit the model'), (['--init_from=nowhere'], 'nowhere: no such run or checkpoint'),
    (['--distill_from=nowhere'], 'nowhere: no such run or checkpoint'), (['--distill_weight=1.5'], 'distill_weight=1.5 must lie in [0, 1]'),
    (['--anneal_steps=99'], 'anneal_steps=99 is longer than the run of max_steps=40'), (['--anneal_steps=3', '--ffn=gelu'], 'anneal_steps=3 needs ffn=trix'),
    (['--trix_cut=gelu', '--ffn=relu2'], 'trix_cut=gelu needs ffn=trix'), (['--trix_cut=silu'], "trix_cut='silu' is not one of")])
def test_impossible_options_are_refused(words, what, dense, corpus, tmp_path):
    code, said = finish(arguments(corpus, tmp_path / 'run', *(word.replace('RUN', str(dense)) for word in words)))
    assert code == 2 and what in said
    assert not (tmp_path / 'run').exists()


def test_init_from_starts_with_the_weights_of_another_run(dense, corpus, tmp_path):
    code, said = finish(arguments(corpus, tmp_path / 'run', '--ffn=gelu', f'--init_from={dense}', '--max_steps=5', '--sample_interval=0'))
    assert code == 0 and f'weights from {dense}/checkpoints/step_0000200.pt' in said
    assert lines(tmp_path / 'run', 'eval')[0]['loss'] == lines(dense, 'eval')[-1]['loss']
