"""Muon moves as torch's own, and which parameter goes where."""
import pytest
import torch

import train
from configurator import UserError
from model import GPT
from optim import Muon, make_optimizers, orthogonal, set_rates


@pytest.mark.parametrize('shape', [(24, 24), (16, 48), (48, 16)])
def test_a_step_in_fp32_is_that_of_torch_up_to_its_bf16(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    ours.data.copy_(w := torch.randn(shape)), theirs.data.copy_(w)
    words = dict(lr=0.1, weight_decay=0.1)
    optimizers = Muon([ours], **words), torch.optim.Muon([theirs], **words, adjust_lr_fn='match_rms_adamw')
    for step in range(5):
        for p in (ours, theirs):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (ours - w).norm()
    assert torch.equal(optimizers[0].state[ours]['momentum_buffer'], optimizers[1].state[theirs]['momentum_buffer'])


def test_orthogonal_has_singular_values_near_one_and_the_same_directions():
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    y, = orthogonal(x[None])
    s = torch.linalg.svdvals(y)
    assert 0.6 < s.min() and s.max() < 1.3
    torch.testing.assert_close(u.T @ y @ v.T, torch.diag((u.T @ y @ v.T).diagonal()), rtol=0, atol=1e-5)


def test_matrices_in_company_and_in_stacks_move_as_they_do_alone(monkeypatch):
    shapes, draw = [(8, 24), (3, 24, 8), (8, 24), (2, 8, 24), (16, 16)], torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=draw) for shape in shapes]
    grads = [[torch.randn(shape, generator=draw) for shape in shapes] for _ in range(3)]

    def moved(split):  # a stack -> the parameters that it is
        params = [torch.nn.Parameter(w.clone()) for w in sum(map(split, whole), [])]
        optimizer = Muon(params, lr=0.1)
        for each in grads:
            for p, grad in zip(params, sum(map(split, each), [])):
                p.grad = grad
            optimizer.step()
        return [p.detach() for p in params]
    alone = moved(lambda w: list(w.view(-1, *w.shape[-2:])))
    for limit in (2**20, 100):  # all of a shape at once, and each parameter by itself
        monkeypatch.setattr('optim.LARGEST_IN_A_BATCH', limit)
        matrices = [matrix for p in moved(lambda w: [w]) for matrix in p.view(-1, *p.shape[-2:])]
        assert len(matrices) == len(alone) == 8
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(matrices, alone))


@pytest.mark.parametrize('ffn, hidden', [('swiglu', 14), ('trix', 12), ('resonance', None)])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_everything_else_once(ffn, hidden):
    config = train.load(['--optimizer=muon', f'--ffn={ffn}', '--n_layer=2', '--n_embd=16', '--n_head=2', '--vocab_size=99'])
    model = GPT(config.pick(train.GPTConfig))
    optimizers = make_optimizers(model, config, torch.device('cpu'))
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {key: [names[id(p)] for group in optimizer.param_groups for p in group['params']] for key, optimizer in optimizers.items()}
    assert sorted(taken['optimizer'] + taken['muon']) == sorted(names.values())
    assert all(name.startswith('blocks.') and name.endswith(('proj.weight', '.up', '.down')) for name in taken['muon'])
    assert hidden is None or len(taken['muon']) == hidden
    assert not any(name.endswith(('magnitude', 'phase')) for name in taken['muon'])


def test_rates_are_set_for_all_and_decay_only_where_it_belongs():
    config = train.load(['--optimizer=muon', '--n_layer=1', '--n_embd=16', '--n_head=2', '--vocab_size=99'])
    optimizers = make_optimizers(GPT(config.pick(train.GPTConfig)), config, torch.device('cpu'))
    for optimizer in optimizers.values():
        set_rates(optimizer, 0.25, 0.5)
    rates = [(group['lr'], group['weight_decay']) for optimizer in optimizers.values() for group in optimizer.param_groups]
    assert rates == [(0.25, 0.5), (0.25, 0.0), (0.25, 0.5)]


def test_the_matrices_have_a_learning_rate_of_their_own_on_the_same_schedule():
    config = train.load(['--optimizer=muon', '--learning_rate=4e-3', '--matrix_lr=2e-2'])
    assert config.matrix_lr == 2e-2
    with pytest.raises(UserError, match='matrix_lr=0.02 is for --optimizer=muon'):
        train.load(['--matrix_lr=2e-2'])
