"""The Triton kernels of TriX compute the plain formula. They run in Triton's interpreter, which needs no GPU.

The interpreter must be on before triton is imported. So a test of this process starts pytest again, for the other tests.
"""
import functools
import os
import subprocess
import sys
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import fastest_tiles, gated_hidden, sparse_tiles
from model import GPTConfig, TriX
from runtime import compiler

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(not INTERPRETED, reason='runs in the process with the interpreter')
outside = pytest.mark.skipif(INTERPRETED, reason='runs in the process without the interpreter')


@pytest.fixture
def triton_kernels(monkeypatch):
    """The module, with sums in one part: the interpreter takes milliseconds for each program."""
    from triton.runtime import interpreter

    import triton_kernels
    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):  # numpy 2.4 converts no array of one number to an int
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: self.handle.data.item())

    def dot_of_bfloat16(builder, a, b, d, *options):  # the interpreter would multiply their bits as integers
        if a.dtype == interpreter.tl.bfloat16:
            a, b = (interpreter.TensorHandle((t.data.astype('uint32') << 16).view('float32'), interpreter.tl.float32)
                    for t in (a, b))
        return dot(builder, a, b, d, *options)
    monkeypatch.setattr(interpreter, '_patch_lang_tensor', patched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, 'create_dot', dot_of_bfloat16)
    monkeypatch.setattr(triton_kernels, 'PROGRAMS', 1)
    triton_kernels.checked.cache_clear()
    return triton_kernels


@pytest.fixture
def small_blocks(triton_kernels, monkeypatch):
    """The module, with small blocks, so that small shapes have several."""
    monkeypatch.setattr(triton_kernels, 'rows_per_block', lambda dtype: 16)
    monkeypatch.setattr(triton_kernels, 'launch_options', lambda x: {'INNER': 16})
    return triton_kernels


def inputs(N, C, h, E, k, dtype=torch.float32, empty=()):
    """x, up, down, tiles, gates. Tiles in `empty` get no tokens."""
    generator = torch.Generator().manual_seed(N)
    x, up, down = (torch.randn(shape, generator=generator).mul(scale).to(dtype).requires_grad_() for shape, scale in (
        ((N, C), 1), ((E, h, C), C ** -0.5), ((E, C, h), h ** -0.5)))
    order = torch.rand(N, E, generator=generator)
    order[:, list(empty)] = 2
    gates = torch.rand(N, k, generator=generator).add(0.1).requires_grad_()
    return x, up, down, order.argsort(-1)[:, :k], gates


def values_and_gradients(function, arguments):
    x, up, down, tiles, gates = arguments
    y = function(*arguments)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, up, down, gates), grad)]


def by_formula(x, up, down, tiles, gates):
    return sparse_tiles(x, up, down, tiles, gates, lambda z, gates, tiles: gated_hidden(z, gates), grouped=False)


SHAPES = {'odd': ((13, 34, 19, 3, 2), ()), 'one tile per token, empty tiles': ((18, 16, 17, 4, 1), (0, 2)),
          'every tile': ((9, 5, 16, 3, 3), ()), 'one token': ((1, 16, 16, 1, 1), ())}


@outside
def test_the_kernels_in_the_interpreter():
    pytest.importorskip('triton', reason='comes with torch for CUDA')
    done = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-n0', '-p', 'no:cacheprovider', __file__],
                          capture_output=True, text=True, env={**os.environ, 'TRITON_INTERPRET': '1'}, timeout=600)
    assert done.returncode == 0 and 'passed' in done.stdout, done.stdout[-3000:]


@interpreted
@pytest.mark.parametrize('shape', SHAPES)
def test_values_and_gradients_equal_the_formula(small_blocks, shape):
    arguments = inputs(*SHAPES[shape][0], empty=SHAPES[shape][1])
    found, expected = (values_and_gradients(f, arguments) for f in (small_blocks.tiles_by_triton, by_formula))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for e in SHAPES[shape][1]:
        assert not found[2][e].any() and not found[3][e].any(), 'an empty tile has a gradient of zero'


@interpreted
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_low_precision_is_close_to_fp32_and_repeats_its_bits(triton_kernels, dtype, tolerance):
    arguments = inputs(20, 24, 18, 3, 2, dtype)
    found, again = (values_and_gradients(triton_kernels.tiles_by_triton, arguments) for _ in range(2))
    assert all(map(torch.equal, found, again))
    exact = [t.detach().float().requires_grad_() if t.is_floating_point() else t for t in arguments]
    for a, b in zip(found, values_and_gradients(by_formula, exact)):
        assert a.dtype == (torch.float32 if a is found[-1] else dtype)
        assert (a.float() - b).norm() < tolerance * b.norm()


@interpreted
def test_a_long_sum_in_parts_equals_the_formula(small_blocks, monkeypatch):
    monkeypatch.setattr(small_blocks, 'PROGRAMS', 6)  # three parts of two tiles with five blocks in all
    arguments = inputs(60, 16, 16, 2, 1)
    found, expected = (values_and_gradients(f, arguments) for f in (small_blocks.tiles_by_triton, by_formula))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@interpreted
def test_pairs_are_sorted_by_tile_and_padded_to_blocks(triton_kernels):
    tiles = torch.randint(3, (1100,), generator=torch.Generator().manual_seed(0))
    tiles[tiles == 1] = 2  # an empty tile
    pairs, ends = triton_kernels.sort(tiles, 3, rows=16)
    a, b = ((tiles == e).nonzero().flatten().tolist() for e in (0, 2))
    padded = [*a, *[1100] * (-len(a) % 16), *b, *[1100] * (-len(b) % 16)]
    assert pairs[:len(padded)].tolist() == padded and (pairs[len(padded):] == 1100).all()
    blocks = -(-len(a) // 16)
    assert ends.tolist() == [blocks, blocks, len(padded) // 16, len(padded) // 16]


@interpreted
def test_the_operators_keep_the_rules_of_torch(triton_kernels):
    x, up, down, tiles, gates = (t.detach() for t in inputs(9, 16, 16, 2, 1))
    x, up = x.T.contiguous().T, up.mT.contiguous().mT  # any layout
    torch.library.opcheck(triton_kernels.tiles_forward, (x, up, down, tiles, gates))
    _, *saved = triton_kernels.tiles_forward(x, up, down, tiles, gates)
    saved[0] = saved[0].nan_to_num()  # rows behind the last block are not written
    saved[1].nan_to_num_()
    torch.library.opcheck(triton_kernels.tiles_backward, (x, x, up, down, gates, *saved))


def layer(execution='auto', **keys):
    torch.manual_seed(0)
    trix = TriX(GPTConfig(n_embd=16, trix_tiles=4, trix_hidden=24, ffn='trix', **keys))
    for p in trix.parameters():
        torch.nn.init.normal_(p)
    trix.execution = execution
    return trix


def layer_gradients(trix, x, low=False, run=None):
    with torch.autocast('cpu', torch.bfloat16, enabled=low):
        y = (run or trix)(x)
    y.float().square().sum().backward()
    return [y.detach().float(), trix.up.grad, trix.down.grad]


@interpreted
def test_a_compiled_layer_chooses_the_kernels_after_a_check_and_has_no_graph_break(triton_kernels, monkeypatch, capsys):
    monkeypatch.setattr(compiler, 'BACKEND', 'aot_eager')
    monkeypatch.setattr(kernels, 'TRITON_DEVICES', {'cpu'})
    calls, product = [], triton_kernels.multiply
    monkeypatch.setattr(triton_kernels, 'multiply', lambda *a, **b: calls.append(1) or product(*a, **b))
    torch._dynamo.utils.counters.clear()
    trix = layer(trix_shared=True)
    compiled = torch.compile(trix, backend='aot_eager', fullgraph=True)
    for n in (5, 6, 8):  # the number of tokens changes, and the second size compiles for all that follow
        calls.clear()
        x = torch.randn(1, n, 16)
        trix.zero_grad()
        found = layer_gradients(compiled, x, low=True)
        assert len(calls) >= 4, 'the kernels ran'
        for a, b in zip(found, layer_gradients(layer('loop', trix_shared=True), x)):
            assert (a - b).norm() < 0.05 * b.norm()
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] <= 2
    assert capsys.readouterr().err == ''


@interpreted
@pytest.mark.parametrize('fault', ['raises', 'wrong'])
def test_kernels_that_fail_their_check_are_not_used(triton_kernels, monkeypatch, capsys, fault):
    def wrong(x, up, down, tiles, gates):
        if fault == 'raises':
            raise RuntimeError('out of resource: shared memory\nmore')
        return 1.1 * triton_kernels.plain_tiles(x.float(), up.float(), down.float(), tiles, gates)
    monkeypatch.setattr(triton_kernels, 'tiles_by_triton', wrong)
    monkeypatch.setattr(kernels, 'TRITON_DEVICES', {'cpu'})
    trix = layer()
    with torch.autocast('cpu', torch.bfloat16):
        assert trix.fastest(torch.randn(2, 16)) == trix.fastest(torch.randn(3, 16)) == 'loop'
    reason = 'RuntimeError: out of resource: shared memory' if fault == 'raises' else 'the results are 1.0e-01 apart'
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith(f'TriX runs without its Triton kernels, which is slower: {reason}')


@interpreted
def test_the_check_does_not_disturb_activation_checkpointing(triton_kernels, monkeypatch, capsys):
    monkeypatch.setattr(kernels, 'TRITON_DEVICES', {'cpu'})
    trix, x = layer(), torch.randn(1, 8, 16)
    found = layer_gradients(trix, x, low=True, run=functools.partial(checkpoint, trix, use_reentrant=False))
    assert triton_kernels.checked.cache_info().misses == 1 and capsys.readouterr().err == ''
    for a, b in zip(found, layer_gradients(layer('loop'), x)):
        assert (a - b).norm() < 0.05 * b.norm()


@outside
def test_every_launch_compiles_for_hopper_once_for_all_numbers_of_tokens(monkeypatch, tmp_path):
    """The interpreter checks values, not types or resources. The compiler needs no GPU: here it compiles without a launch."""
    pytest.importorskip('triton', reason='comes with torch for CUDA')
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    import triton_kernels
    hopper = types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0,
                                   get_current_target=lambda: GPUTarget('cuda', 90, 32))
    built, run = {}, JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        assert grid[0] > 0
        program = run(kernel, *arguments, grid=grid, warmup=True, **options)
        built[program.hash] = program
    monkeypatch.setattr(JITFunction, 'run', compile_only)
    monkeypatch.setattr(driver, '_active', hopper)
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(triton_kernels, 'launch_options', lambda x: {'INNER': 64, 'num_warps': 8, 'num_stages': 3})
    for n in (300, 1, 16):
        values_and_gradients(triton_kernels.tiles_by_triton, inputs(n, 256, 256, 8, 2, torch.bfloat16))
        # two that sort, four products, the hidden units, two gradients of weights
        assert len(built) == 9, 'no kernel is compiled again for another number of tokens'
    assert all(program.metadata.shared <= 113 * 1024 for program in built.values()), 'two programs fit a multiprocessor'
    assert sum('wgmma' in program.asm['ptx'] for program in built.values()) == 6, 'the products run on tensor cores'


@outside
@pytest.mark.parametrize('works, low, keys, expected', [
    (True, torch.bfloat16, {}, 'triton'), (True, torch.float16, {}, 'triton'), (False, torch.bfloat16, {}, 'loop'),
    (True, None, {}, 'loop'), (True, torch.bfloat16, {'act_bits': 8}, 'loop'),
    (True, torch.bfloat16, {'trix_cut': 'gelu'}, 'loop'), (True, torch.bfloat16, {'trix_top_k': 4}, 'loop')], ids=str)
def test_the_kernels_are_chosen_in_low_precision_where_they_cover_the_block(monkeypatch, works, low, keys, expected):
    monkeypatch.setitem(sys.modules, 'triton_kernels', types.SimpleNamespace(works=lambda *shape: works))
    monkeypatch.setattr(kernels, 'HAS_TRITON', True)
    monkeypatch.setattr(kernels, 'TRITON_DEVICES', {'cpu'})
    trix = layer(**keys)
    with torch.autocast('cpu', low or torch.bfloat16, enabled=low is not None):
        assert trix.fastest(torch.randn(4, 16)) == expected
        monkeypatch.setattr(kernels, 'HAS_TRITON', False)
        assert trix.fastest(torch.randn(4, 16)) == 'loop'


@outside
@pytest.mark.parametrize('keys', [{'act_bits': 8}, {'trix_cut': 'swiglu'}], ids=str)
def test_blocks_that_the_kernels_do_not_cover_keep_their_values(keys):
    x = torch.randn(2, 9, 16)
    for a, b in zip(*(layer_gradients(layer(execution, **keys), x) for execution in ('triton', 'grouped'))):
        assert torch.equal(a, b)


@outside
@pytest.mark.parametrize('capability, dtype, h, C, expected', [
    ((9, 0), torch.bfloat16, 768, 768, 'triton'), ((9, 0), torch.bfloat16, 2048, 2048, 'grouped'),
    ((9, 0), torch.float16, 2048, 2048, 'triton'), ((9, 0), torch.bfloat16, 2049, 2048, 'triton'),
    ((9, 0), torch.float32, 768, 768, 'dense'), ((7, 5), torch.float16, 768, 768, 'dense')], ids=str)
def test_a_gpu_uses_the_kernels_where_passes_over_memory_cost_more_than_products(
        monkeypatch, capability, dtype, h, C, expected):
    monkeypatch.setitem(sys.modules, 'triton_kernels', types.SimpleNamespace(works=lambda *shape: True))
    monkeypatch.setattr(kernels, 'HAS_TRITON', True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    x = types.SimpleNamespace(device=torch.device('cuda', 0), dtype=dtype)
    assert fastest_tiles(x, torch.empty(8, h, C, device='meta'), 2, gated=True) == expected


@outside
def test_on_a_cpu_nothing_changes():
    with torch.autocast('cpu', torch.bfloat16):
        assert fastest_tiles(torch.randn(4, 16), torch.randn(4, 24, 16), 2, gated=True) == 'loop'
