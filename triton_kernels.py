"""The tiles of a TriX FFN on a GPU, in Triton: gather the rows of a tile, multiply, gate, multiply, add back by token.

    y = tiles_by_triton(x, up, down, tiles, gates)  # kernels.sparse_tiles with kernels.gated_hidden, in fewer passes

kernels.py imports this file if the tiles run on a GPU. Without one, TRITON_INTERPRET=1 runs the kernels on the CPU,
slowly. Ideas: MegaBlocks (arXiv:2211.15841), ScatterMoE (arXiv:2403.08245), SonicMoE (arXiv:2512.14080).

A pair is a token and one of its k tiles: pair p belongs to token p // k. The pairs are sorted by tile, and the rows of
every tile are padded to a multiple of ROWS rows. So a block of ROWS rows has one tile, and a matrix product needs no
other schedule than `ends`, the end block of each tile. The padding costs at most E ROWS rows. The number of rows has an
upper bound that depends on shapes only, so nothing waits for the GPU.

Forward:
  z = x up^T         reads the rows of tokens in place, and sums relu(z)^4 of each row for the norm
  y = hidden down^T  makes the hidden units from z on the way, and writes the row of each pair in the order of tokens
  the k rows of a token are added
Backward reads z again, and saves no hidden units:
  d_hidden = d_y down, and the dot product of each row for the gradient of the gate
  d_z and hidden, in one pass
  d_x = d_z up, then the k rows of a token are added
  d_up = d_z^T x and d_down = d_y^T hidden, per tile: a long sum over rows is split, and the parts are added in order

Nothing is added by atomic operations, and no block size is chosen by timing. So equal inputs give equal bits, which
exact resuming needs.

What it costs, by arithmetic, for N tokens, width C, k = 2 and h = C. The products need 24 N C^2 FLOPs, forward and
backward, and those of a dense FFN of width 4C need 48 N C^2. At 500 TFLOP/s these are 0.9 and 1.9 ms for 32,768 tokens
of width 768, but 0.05 and 0.1 ms for 65,536 tokens of width 128. There, memory decides. A pass over the N k rows in
bf16 is 34 MB, 8 us at 4 TB/s. The kernels take 19 passes, the dense FFN takes 27, and F.grouped_mm with separate
gathers, norm and sums takes about 33. Fewer, larger tiles would save nothing: with 8 tiles of 16,384 rows, the padding
is below 1 % of the rows. One tile of width 2C per token instead of two of width C would save 4 of the 19 passes, but
that is another model.
"""
import functools
import sys

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import one_line

EPS = tl.constexpr(1e-6)  # of the norm, as in kernels.gated_hidden
PROGRAMS = 512  # that a sum over many rows is split into: about four for each multiprocessor of an H100


# ----------------------------------------------------------------------------------------------------------------------
# Kernels. E: tiles, up to a power of two. PAIRS: pairs that a program sorts. ROWS: rows of a block.

@triton.jit(do_not_specialize=['n_pairs'])
def count_kernel(tiles, counts, n_pairs, E: tl.constexpr, PAIRS: tl.constexpr):
    """Program b: counts[b, e], how many of its PAIRS pairs have tile e."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    tile = tl.load(tiles + pair, mask=pair < n_pairs, other=-1)
    e = tl.arange(0, E)
    tl.store(counts + tl.program_id(0) * E + e, tl.sum((tile[:, None] == e[None, :]).to(tl.int32), 0))


@triton.jit(do_not_specialize=['n_pairs', 'n_programs'])
def sort_kernel(tiles, counts, pairs, ends, n_pairs, n_programs, E: tl.constexpr, PAIRS: tl.constexpr,
                ROWS: tl.constexpr):
    """Program b writes its pairs to their rows. The order within a tile is that of the pairs. ends: see tile_of."""
    e = tl.arange(0, E)
    total = tl.zeros((E,), tl.int32)
    before = tl.zeros((E,), tl.int32)  # pairs of earlier programs
    for first in range(0, n_programs, 32):
        program = first + tl.arange(0, 32)
        count = tl.load(counts + program[:, None] * E + e[None, :], mask=(program < n_programs)[:, None], other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((program < tl.program_id(0))[:, None], count, 0), 0)
    blocks = (total + ROWS - 1) // ROWS
    end = tl.cumsum(blocks, 0)
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    tile = tl.load(tiles + pair, mask=pair < n_pairs, other=-1)
    is_tile = (tile[:, None] == e[None, :]).to(tl.int32)
    row = (end - blocks) * ROWS + before + tl.cumsum(is_tile, 0) - 1
    tl.store(pairs + tl.sum(is_tile * row, 1), pair, mask=pair < n_pairs)
    if tl.program_id(0) == 0:
        tl.store(ends + e, end)


@triton.jit
def tile_of(block, ends, E: tl.constexpr):
    """The tile of a block of rows: the number of tiles that end before. E behind the last block."""
    return tl.sum((tl.load(ends + tl.arange(0, E)) <= block).to(tl.int32), 0)


@triton.jit
def row_sum(parts, row, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """parts (rows, PARTS) -> the sum of each row. PADDED: PARTS, up to a power of two."""
    part = tl.arange(0, PADDED)
    values = tl.load(parts + row[:, None] * PARTS + part[None, :], mask=(part < PARTS)[None, :], other=0.0)
    return tl.sum(values, 1)


@triton.jit(do_not_specialize=['n_pairs'])
def product_kernel(a, weights, out, pairs, ends, n_pairs, gates, squares, z, dots, TOP: tl.constexpr, E: tl.constexpr,
                   K: tl.constexpr, N: tl.constexpr, GATHER: tl.constexpr, FORWARD: tl.constexpr, PARTS: tl.constexpr,
                   PADDED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   INNER: tl.constexpr):
    """A block of rows, times the matrix of their tile: (ROWS, K) -> (ROWS, COLUMNS of N).

    FORWARD: the matrix of a tile is (N, K). Backward: (K, N).
    GATHER:  a has a row for each token, and out has the rows sorted by tile. Without: a is sorted by tile, and out has
             a row for each pair, in the order of tokens.
    GATHER, FORWARD     z = x up^T. squares: for each row, the sum of relu(z)^4 over COLUMNS columns
    not GATHER, FORWARD y = hidden down^T. a is z
    GATHER, backward    d_hidden = d_y down. dots: for each row, the sum of d_hidden relu(z)^2 over COLUMNS columns
    not GATHER, backward  d_x = d_z up"""
    column_blocks: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks  # neighbours share their rows, which stay in the cache
    tile = tile_of(block, ends, E)
    if tile == E:
        return
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.load(pairs + row)
    is_pair = pair < n_pairs  # not padding
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    a_row = (pair // TOP).to(tl.int64) if GATHER else row
    matrix = weights + tile.to(tl.int64) * (K * N)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if FORWARD and not GATHER:
        mean = row_sum(squares, row, PARTS, PADDED) / K
        factor = tl.load(gates + pair, mask=is_pair, other=0.0) * tl.rsqrt(mean + EPS)
    for first in range(0, K, INNER):
        inner = first + tl.arange(0, INNER)
        left = tl.load(a + a_row[:, None] * K + inner[None, :], mask=is_pair[:, None] & (inner < K)[None, :], other=0.0)
        if FORWARD and not GATHER:
            r = tl.maximum(left.to(tl.float32), 0.0)
            left = (r * r * factor[:, None]).to(left.dtype)
        place = inner[:, None] + column[None, :] * K if FORWARD else inner[:, None] * N + column[None, :]
        right = tl.load(matrix + place, mask=(inner < K)[:, None] & (column < N)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    y = total.to(out.dtype.element_ty)
    if GATHER:
        place = row[:, None] * N + column[None, :]
        inside = (column < N)[None, :] & (row >= 0)[:, None]
        tl.store(out + place, y, mask=inside)  # zeros in the padding
        r = tl.maximum((y if FORWARD else tl.load(z + place, mask=inside, other=0.0)).to(tl.float32), 0.0)
        sums = tl.sum(r * r * (r * r if FORWARD else y.to(tl.float32)), 1)
        tl.store((squares if FORWARD else dots) + row * column_blocks + column_block, sums)
    else:
        place = pair.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(out + place, y, mask=is_pair[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=['n_pairs'])
def hidden_kernel(z, d_hidden, d_z, hidden, gates, d_gates, squares, dots, pairs, ends, n_pairs, E: tl.constexpr,
                  H: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, FEW: tl.constexpr):
    """The backward of hidden = gate RMSNorm(relu(z)^2), and hidden again. A program has FEW rows of a block."""
    group = tl.program_id(0) // PARTS
    column_block = tl.program_id(0) % PARTS
    if tile_of(group * FEW // ROWS, ends, E) == E:
        return
    row = group.to(tl.int64) * FEW + tl.arange(0, FEW)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    pair = tl.load(pairs + row)
    inverse = tl.rsqrt(row_sum(squares, row, PARTS, PADDED) / H + EPS)
    d_gate = row_sum(dots, row, PARTS, PADDED) * inverse
    if column_block == 0:
        tl.store(d_gates + pair, d_gate, mask=pair < n_pairs)
    gate = tl.load(gates + pair, mask=pair < n_pairs, other=0.0)
    place = row[:, None] * H + column[None, :]
    inside = (column < H)[None, :] & (row >= 0)[:, None]
    r = tl.maximum(tl.load(z + place, mask=inside, other=0.0).to(tl.float32), 0.0)
    normal = r * r * inverse[:, None]
    d = tl.load(d_hidden + place, mask=inside, other=0.0).to(tl.float32) - normal * (d_gate / H)[:, None]
    tl.store(d_z + place, (2 * r * (inverse * gate)[:, None] * d).to(d_z.dtype.element_ty), mask=inside)
    tl.store(hidden + place, (normal * gate[:, None]).to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['n_pairs'])
def weight_kernel(a, b, out, pairs, ends, n_pairs, TOP: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                  N_TILES: tl.constexpr, SPLITS: tl.constexpr, GATHER_A: tl.constexpr, PRECISION: tl.constexpr,
                  ROWS: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """The gradient of the matrices: for each tile, a^T b over its rows: a (rows, M), b (rows, N) -> out (SPLITS, tiles,
    M, N). Part s sums its share of the blocks. GATHER_A: a has a row for each token, and b is sorted by tile. Without:
    the other way round."""
    tl.static_assert(ROWS % INNER == 0, 'a step of the sum must not leave the rows of a tile')
    side_blocks: tl.constexpr = (M + SIDE - 1) // SIDE
    column_blocks: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    side = program // column_blocks % side_blocks * SIDE + tl.arange(0, SIDE)
    column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    matrix = program // (column_blocks * side_blocks)  # split * N_TILES + tile
    tile = matrix % N_TILES
    begin = tl.load(ends + tile - 1, mask=tile > 0, other=0)
    end = tl.load(ends + tile)
    share = (end - begin + SPLITS - 1) // SPLITS
    begin += matrix // N_TILES * share
    end = tl.minimum(begin + share, end)
    total = tl.zeros((SIDE, COLUMNS), tl.float32)
    for first in range(begin * ROWS, end * ROWS, INNER):
        row = first + tl.arange(0, INNER)
        pair = tl.load(pairs + row)
        token = (pair // TOP).to(tl.int64)
        a_row = token if GATHER_A else row.to(tl.int64)
        b_row = row.to(tl.int64) if GATHER_A else token
        is_pair = (pair < n_pairs)[:, None]
        left = tl.load(a + a_row[:, None] * M + side[None, :], mask=is_pair & (side < M)[None, :], other=0.0)
        right = tl.load(b + b_row[:, None] * N + column[None, :], mask=is_pair & (column < N)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    place = matrix.to(tl.int64) * (M * N) + side[:, None] * N + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(side < M)[:, None] & (column < N)[None, :])


# ----------------------------------------------------------------------------------------------------------------------
# Operators

def rows_per_block(dtype):
    return 128 if dtype.itemsize == 2 else 64


def columns_per_block(n, dtype):
    return min(rows_per_block(dtype), max(16, triton.next_power_of_2(n)))


def launch_options(x):
    """Depth of a product's steps, warps and stages. By rule, not by timing, which could change the bits of a run."""
    if x.dtype.itemsize == 4:
        return {'INNER': 32, 'num_warps': 4, 'num_stages': 2}
    # A100, H100 and B200 have 160 KB and more of shared memory per multiprocessor, other cards have 100 KB
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    large = capability == (8, 0) or capability[0] in (9, 10)
    return {'INNER': 64 if large else 32, 'num_warps': 8, 'num_stages': 3}


def precision(x):
    return 'tf32' if x.is_cuda and torch.get_float32_matmul_precision() != 'highest' else 'ieee'


def sort(tiles, E, rows):
    """tiles (pairs,) -> (pairs sorted by tile and padded, end block of each tile), both int32."""
    n, E = len(tiles), max(2, triton.next_power_of_2(E))
    per_program = max(16, min(1024, 8192 // E))
    n_programs = triton.cdiv(n, per_program)
    counts = torch.empty(n_programs, E, dtype=torch.int32, device=tiles.device)
    pairs = tiles.new_full((padded_rows(n, E, rows),), n, dtype=torch.int32)  # n: padding
    ends = torch.empty(E, dtype=torch.int32, device=tiles.device)
    count_kernel[(n_programs,)](tiles, counts, n, E, per_program)
    sort_kernel[(n_programs,)](tiles, counts, pairs, ends, n, n_programs, E, per_program, rows)
    return pairs, ends


def padded_rows(n_pairs, E, rows):
    """An upper bound of the rows when the rows of each tile are padded to blocks of `rows`."""
    return (n_pairs // rows + max(2, triton.next_power_of_2(E))) * rows


def multiply(a, weights, pairs, ends, gates, squares, z=None, dots=None, *, gather, forward):
    """product_kernel with all of its rows -> out."""
    (N, K), n_pairs = weights.shape[1:] if forward else weights.shape[:0:-1], gates.numel()
    rows, columns = rows_per_block(a.dtype), columns_per_block(N, a.dtype)
    out = a.new_empty(len(pairs) if gather else n_pairs, N)
    product_kernel[(len(pairs) // rows * triton.cdiv(N, columns),)](
        a, weights, out, pairs, ends, n_pairs, gates, squares, z, dots, gates.size(1), len(ends), K, N, gather, forward,
        squares.size(1), triton.next_power_of_2(squares.size(1)), precision(a), rows, columns, **launch_options(a))
    return out


def weight_gradient(a, b, pairs, ends, gates, weights, gather_a):
    """weight_kernel with all of its matrices -> the gradient of `weights`."""
    E, M, N = weights.shape
    side, columns = columns_per_block(M, a.dtype), columns_per_block(N, a.dtype)
    blocks = E * triton.cdiv(M, side) * triton.cdiv(N, columns)
    splits = min(32, triton.cdiv(PROGRAMS, blocks))
    out = a.new_empty(splits, E, M, N, dtype=torch.float32 if splits > 1 else weights.dtype)
    weight_kernel[(splits * blocks,)](
        a, b, out, pairs, ends, gates.numel(), gates.size(1), len(ends), M, N, E, splits, gather_a, precision(a),
        rows_per_block(a.dtype), side, columns, **launch_options(a))
    return out.sum(0).to(weights.dtype) if splits > 1 else out[0]


@torch.library.custom_op('nanotrix::tiles_forward', mutates_args=())
def tiles_forward(x: Tensor, up: Tensor, down: Tensor, tiles: Tensor, gates: Tensor) -> tuple[
        Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (rows of the pairs (N k, C), and for backward: z, squares, pairs, ends)."""
    x, up, down, tiles, gates = (t.contiguous() for t in (x, up, down, tiles, gates))
    with torch.cuda.device_of(x):
        rows, h = rows_per_block(x.dtype), up.size(1)
        pairs, ends = sort(tiles.flatten(), len(up), rows)
        squares = torch.empty(len(pairs), triton.cdiv(h, columns_per_block(h, x.dtype)), device=x.device)
        z = multiply(x, up, pairs, ends, gates, squares, gather=True, forward=True)
        return multiply(z, down, pairs, ends, gates, squares, gather=False, forward=True), z, squares, pairs, ends


@tiles_forward.register_fake
def _(x, up, down, tiles, gates):
    E, h, C = up.shape
    rows = padded_rows(tiles.numel(), E, rows_per_block(x.dtype))
    parts = triton.cdiv(h, columns_per_block(h, x.dtype))
    return (x.new_empty(tiles.numel(), C), x.new_empty(rows, h), x.new_empty(rows, parts, dtype=torch.float32),
            x.new_empty(rows, dtype=torch.int32), x.new_empty(max(2, triton.next_power_of_2(E)), dtype=torch.int32))


@torch.library.custom_op('nanotrix::tiles_backward', mutates_args=())
def tiles_backward(grad: Tensor, x: Tensor, up: Tensor, down: Tensor, gates: Tensor, z: Tensor, squares: Tensor,
                   pairs: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (rows of the gradient of x (N k, C), gradients of up, down and gates). grad (N, C): of the sums of rows."""
    grad, x, up, down, gates = (t.contiguous() for t in (grad, x, up, down, gates))
    with torch.cuda.device_of(x):
        h, rows = up.size(1), rows_per_block(x.dtype)
        columns, parts = columns_per_block(h, x.dtype), squares.size(1)
        dots, d_gates = torch.empty_like(squares), torch.empty_like(gates)
        d_hidden = multiply(grad, down, pairs, ends, gates, squares, z, dots, gather=True, forward=False)
        d_z, hidden = torch.empty_like(z), torch.empty_like(z)
        hidden_kernel[(len(pairs) // 16 * parts,)](
            z, d_hidden, d_z, hidden, gates, d_gates, squares, dots, pairs, ends, gates.numel(), len(ends), h, parts,
            triton.next_power_of_2(parts), rows, columns, 16)
        dx = multiply(d_z, up, pairs, ends, gates, squares, gather=False, forward=False)
        return (dx, weight_gradient(d_z, x, pairs, ends, gates, up, gather_a=False),
                weight_gradient(grad, hidden, pairs, ends, gates, down, gather_a=True), d_gates)


@tiles_backward.register_fake
def _(grad, x, up, down, gates, z, squares, pairs, ends):
    return (x.new_empty(gates.numel(), x.size(1)), up.new_empty(up.shape), down.new_empty(down.shape),
            gates.new_empty(gates.shape))


class TilesByTriton(torch.autograd.Function):
    """The sums over the k rows of a token stand outside of the operators, so that a compiler can fuse them."""

    @staticmethod
    def forward(ctx, x, up, down, tiles, gates):
        rows, *saved = tiles_forward(x, up, down, tiles, gates)
        ctx.save_for_backward(x, up, down, gates, *saved)
        return rows.view(*tiles.shape, -1).sum(1)

    @staticmethod
    def backward(ctx, grad):
        x, up, down, gates, *saved = ctx.saved_tensors
        grad = grad.to(x.dtype)  # under autocast, a sum has an fp32 result
        dx, d_up, d_down, d_gates = tiles_backward(grad, x, up, down, gates, *saved)
        return dx.view(*gates.shape, -1).sum(1), d_up, d_down, None, d_gates


def tiles_by_triton(x, up, down, tiles, gates):
    """The sum over the k tiles of a token of down_e(gate RMSNorm(relu(up_e x)^2)), deterministic, with gradients.

    x (N, C), up (E, h, C) and down (E, C, h) in one dtype, tiles (N, k) int64, gates (N, k) fp32 -> (N, C)."""
    return TilesByTriton.apply(x, up, down, tiles, gates)


# ----------------------------------------------------------------------------------------------------------------------
# The check before the first use

def plain_tiles(x, up, down, tiles, gates):
    """The formula of tiles_by_triton, one tile after the other."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, place = (tiles == e).nonzero(as_tuple=True)
        u = F.relu(x[token] @ up[e].T).square()
        hidden = gates[token, place, None] * u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        y = y.index_add(0, token, hidden @ down[e].T)
    return y


@functools.cache
def checked(device, dtype, E, k, C, h):
    """Whether tiles_by_triton works on this device for this shape. If not, prints one line."""
    generator = torch.Generator().manual_seed(0)  # the random state of the run must not change
    N = 300
    x, up, down, gates, grad = (scale * torch.randn(shape, generator=generator) for scale, shape in (
        (1, (N, C)), (C ** -0.5, (E, h, C)), (h ** -0.5, (E, C, h)), (1, (N, k)), (1, (N, C))))
    tiles = torch.rand(N, E, generator=generator).argsort(-1)[:, :k]
    results = []
    try:
        # Runs inside a forward: no autocast, and no hooks of activation checkpointing.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), \
                torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            for function, precision in ((tiles_by_triton, dtype), (plain_tiles, torch.float32)):
                # both start from the values in the lower precision
                inputs = [t.to(device, dtype).to(precision).requires_grad_() for t in (x, up, down)]
                inputs.append(gates.to(device).requires_grad_())
                y = function(*inputs[:3], tiles.to(device), inputs[3])
                gradients = torch.autograd.grad(y, inputs, grad.to(device, dtype).to(precision))
                results.append([t.detach().float() for t in (y, *gradients)])
        distance = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))
        if distance < (0.03 if dtype.itemsize == 2 else 3e-3):
            return True
        reason = f'the results are {distance:.1e} apart from the formula'
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, or a card without the shared memory that the kernels need
        reason = one_line(error)
    print(f'TriX runs without its Triton kernels, which is slower: {reason}', file=sys.stderr, flush=True)
    return False


@torch.compiler.assume_constant_result
def works(device, dtype, E, k, C, h):
    """checked(), once per shape. torch.compile does not trace it. Under a dispatch mode (fake tensors) it is False."""
    return not torch._C._len_torch_dispatch_stack() and checked(device, dtype, E, k, C, h)
