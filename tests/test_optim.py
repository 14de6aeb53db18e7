"""Muon and AdamW8bit move as torch's own optimizers, and which parameter goes where."""
import functools

import pytest
import torch

import checkpoint
import optim
import train
from configurator import UserError
from model import GPT
from optim import AdamW8bit, Muon, make_optimizers, orthogonal, set_rates, state_bytes
from runs import arguments, end, start
from runtime import plan
from runtime.disk import model_of


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


# ---- AdamW with 8-bit state

def test_codes_and_bfloat16_are_the_exact_value_on_average_and_one_of_the_two_nearest():
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(4, optim.BLOCK, generator=noise) * torch.tensor([1, 1e-6, 1e4, 0])[:, None]
    for code, values, distance in ((optim.MEAN, x, 2 / 127), (optim.SQUARE, x.square(), 4 / 255)):
        found = torch.stack([optim.decoded(*optim.encoded(values, code, noise), code) for _ in range(400)])
        largest = values.abs().amax(1, keepdim=True)
        assert ((found - values).abs() <= 1.001 * distance * largest).all()
        assert ((found.mean(0) - values).abs() <= 0.25 * distance * largest).all()
        assert found[0].eq(largest).any(1).all()  # the largest value of a block is exact
    x = torch.randn(1000, generator=noise)
    found = torch.stack([optim.rounded_to_bfloat16(x, noise).float() for _ in range(400)])
    assert ((found - x).abs() <= x.abs() / 128).all() and ((found.mean(0) - x).abs() <= x.abs() / 128 / 4).all()


def moved(optimizer_of, dtype, steps=40, shape=(24, 40), lr=1e-2):
    """The weights after some steps on the loss |w - target|^2, which starts at 1 on average."""
    draw = torch.Generator().manual_seed(0)
    p, target = torch.nn.Parameter(torch.zeros(shape, dtype=dtype)), torch.randn(shape, generator=draw)
    optimizer = optimizer_of([p], lr=lr)
    for _ in range(steps):
        p.grad = (p.detach().float() - target).to(dtype)
        optimizer.step()
    return p.detach().float(), optimizer


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 0.05), (torch.bfloat16, 0.06)], ids=str)
def test_8_bit_state_moves_weights_as_32_bit_state_does(dtype, tolerance):
    ours, optimizer = moved(AdamW8bit, dtype)
    exact, _ = moved(functools.partial(torch.optim.AdamW, weight_decay=0.1, betas=(0.9, 0.95)), torch.float32)
    assert (ours - exact).norm() < tolerance * exact.norm()
    state, = optimizer.state.values()
    assert sum(t.nbytes for t in state.values() if torch.is_tensor(t)) == state_bytes(optimizer, *optimizer.state)


def test_bfloat16_weights_do_not_lose_steps_below_their_precision():
    weights = {}
    for kind in (AdamW8bit, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = kind([p], lr=1e-4, weight_decay=0.0)  # bfloat16 has 1 - 2^-8 = 0.996 next to 1
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        weights[kind] = p.detach().float().mean().item()
    assert weights[AdamW8bit] == pytest.approx(1 - 20 * 1e-4, abs=3e-4) and weights[torch.optim.AdamW] == 1


def test_a_weight_without_a_gradient_comes_to_rest():
    """Both running means fade. The quotient of two codes must not grow, as it would if the second became 0 first."""
    p = torch.nn.Parameter(torch.zeros(2, 256))
    optimizer = AdamW8bit([p], lr=1.0, weight_decay=0.0)
    for step in range(150):
        p.grad = torch.ones_like(p)
        p.grad[1] *= step == 0  # row 1 has one gradient, beside a row that always has one
        before = p.detach().clone()
        optimizer.step()
        assert (p.detach() - before).abs().max() < 5
    assert (p.detach() - before)[1].abs().max() < 0.1


def test_a_run_in_bfloat16_resumes_exactly_and_its_checkpoint_holds_plain_tensors(corpus, tmp_path):
    words = ['--ffn=swiglu', '--optimizer=adamw8bit', '--dtype=bfloat16', '--weights_dtype=bfloat16', '--max_steps=8',
             '--eval_interval=0', '--sample_interval=0', '--save_interval=4']
    end([start(arguments(corpus, tmp_path / 'a', *words))])
    half = tmp_path / 'a/checkpoints/step_0000004.pt'
    end([start(arguments(corpus, tmp_path / 'b', *words, f'--resume={half}'))])
    whole, resumed = (checkpoint.load(tmp_path / run / 'checkpoints/step_0000008.pt') for run in 'ab')
    assert all(torch.equal(whole['model'][name], resumed['model'][name]) for name in whole['model'])
    states = [run['adamw8bit']['state'] for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 7
    for ours, theirs in zip(*(states.values() for states in states)):
        assert ours['mean'].dtype == torch.int8 and ours['square'].dtype == torch.uint8 and ours['step'] == 8
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != 'step')
    matrices = {name: t.dtype for name, t in whole['model'].items() if name.endswith('proj.weight')}
    assert set(matrices.values()) == {torch.bfloat16} and whole['model']['wte.weight'].dtype == torch.float32
    model, _ = checkpoint.load_model(tmp_path / 'b', torch.device('cpu'))
    assert all(torch.equal(p, resumed['model'][name].float()) for name, p in model.named_parameters())
    with pytest.raises(UserError, match='weights_dtype is bfloat16 in the checkpoint, float32 in the config'):
        train.main(arguments(corpus, tmp_path / 'c', *words, '--weights_dtype=float32', f'--resume={half}'))


@pytest.mark.parametrize('words, message', [
    (['--weights_dtype=bfloat16', '--dtype=bfloat16'], 'needs --optimizer=adamw8bit, which rounds stochastically'),
    (['--weights_dtype=bfloat16', '--dtype=bfloat16', '--optimizer=muon'], 'muon would lose small updates'),
    (['--weights_dtype=bfloat16', '--optimizer=adamw8bit'], 'weights_dtype=bfloat16 needs --dtype=bfloat16, not auto'),
    (['--weights_dtype=bfloat16', '--dtype=float16', '--optimizer=adamw8bit'], 'needs --dtype=bfloat16, not float16'),
    (['--weights_dtype=bfloat16', '--dtype=bf16', '--optimizer=adamw8bit', '--ffn=trix'], 'is not for ternary weights'),
    (['--weights_dtype=float16'], 'weights_dtype=.float16. is not one of float32, bfloat16'),
    (['--optimizer=adamw8bit', '--parallel=fsdp'], 'adamw8bit is not possible with sharded weights')], ids=str)
def test_combinations_that_are_not_possible_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        train.load(words)


def test_the_recipe_for_44_gb_has_a_billion_parameters_and_fits():
    config = train.load(['config/recipes/resonance_1b_44gb.py'])
    with torch.device('meta'):
        assert sum(p.numel() for p in model_of(config).parameters()) == 1_029_514_240
    memory = plan.estimate(config, 'cuda', torch.bfloat16)(config.batch_size, config.activation_checkpointing)
    weights, state = memory['parameters'] + memory['gradients'], memory['optimizer']
    others = 122_364_928  # parameters that are fp32: the embedding, norms, filters and oscillators
    matrices = 1_029_514_240 - others
    assert weights == 4 * matrices + 8 * others and state == matrices * 2 * 260 / 256 + 8 * others
    assert sum(memory.values()) < 0.7 * 44e9
