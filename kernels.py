"""The numerics of model.py: ternary codes, tiles, long convolutions, documents, decoding caches, the chunked loss.

Each docstring states a formula of one or two lines. The tests compare the fast path with that formula.
model.py imports this file.

`traced()` decides which path runs. Eager execution uses the hand-written gradients. torch.compile traces one of these:
  - the plain formula, which the compiler fuses
  - an opaque operator (`torch.library.custom_op`)
  - an autograd.Function without in-place operations and without outputs that alias each other. With in-place operations
    or aliases, torch 2.11 silently computes wrong gradients (github.com/pytorch/pytorch/issues/180642).

The loss has two paths, for eager and for compiled models alike. The device decides:
  - eager_loss uses plain tensor operations, in chunks that stay in a CPU's cache.
  - fused_loss is for CUDA. torch.compile fuses all work on a chunk of logits between the matrix products into two
    passes over memory, in place. If that fails, the loss says so in one line and uses eager_loss.
"""
import contextlib
import functools
import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

OLDEST = (2, 11)  # the oldest torch version that passes the tests; .ci/run repeats this number
if tuple(map(int, torch.__version__.split('.')[:2])) < OLDEST:
    print(f'torch {torch.__version__} is too old: nanoTriX needs {".".join(map(str, OLDEST))} or newer '
          '(pip install torch==2.13.0)', file=sys.stderr)
    sys.exit(2)

custom_op, traced = torch.library.custom_op, torch.compiler.is_compiling


def one_line(error):
    """An error as one line for a message: its type and the first line of its text."""
    lines = [line for line in str(error).splitlines() if line.strip()] + ['', '']
    return f'{type(error).__name__}: {lines[0]}' + (f' {lines[1]}' if lines[0].endswith(':') else '')


def autocast(device, dtype):
    """Context for a forward pass: matrix products run in `dtype`. Does nothing for fp32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def autocast_dtype(x):
    """The dtype of a matrix product with x: the autocast dtype if autocast is on, else x.dtype."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def traced_operator(name, arguments, forward, gradients, fake):
    """An operator for torch.compile, which calls it as it is, without looking inside.

    forward(a, b, ...) -> Tensor. gradients(grad, a, b, ...) -> (gradient of a, gradient of b). fake(a, b, ...) -> an
    empty tensor like the result. arguments: the declaration 'Tensor a, Tensor b, ...' of tensors."""
    operator = custom_op(f'nanotrix::{name}', forward, mutates_args=(), schema=f'({arguments}) -> Tensor')
    operator_gradients = custom_op(f'nanotrix::{name}_gradients', gradients, mutates_args=(),
                                   schema=f'(Tensor grad, {arguments}) -> (Tensor, Tensor)')

    def backward(ctx, grad):
        return *operator_gradients(grad.contiguous(), *ctx.saved_tensors), *[None] * (len(ctx.saved_tensors) - 2)
    operator.register_fake(fake)
    operator_gradients.register_fake(lambda grad, a, b, *rest: (torch.empty_like(a), torch.empty_like(b)))
    operator.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return operator


# ----------------------------------------------------------------------------------------------------------------------
# Norm

class FastRMS(torch.autograd.Function):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last dimension.

    On a CPU it is two to three times faster than F.rms_norm, which has no fused CPU kernel (torch 2.13)."""

    @staticmethod
    def forward(ctx, x, weight):
        inverse = x.square().mean(-1, keepdim=True).add_(1e-6).rsqrt_()
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal if weight is None else normal * weight

    @staticmethod
    def backward(ctx, grad):
        normal, inverse, weight = ctx.saved_tensors
        along = grad * normal
        d_weight = None
        if weight is not None:
            d_weight, grad = along.flatten(0, -2).sum(0), grad * weight
            along = (along @ weight).unsqueeze(-1)
        else:
            along = along.sum(-1, keepdim=True)
        return torch.addcmul(grad, normal, along, value=-1 / normal.size(-1)).mul_(inverse), d_weight


def rms(x, weight=None):  # RMSNorm over the last dimension
    if x.device.type == 'cpu' and x.dtype == torch.float32 and not traced():
        return FastRMS.apply(x, weight)
    return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Embedding

@custom_op('nanotrix::embedding_gradient', mutates_args=())
def embedding_gradient(grad: Tensor, idx: Tensor, n: int) -> Tensor:
    """The gradient of an (n, C) embedding, deterministic.

    inductor would sum the rows with atomic operations, in a different order each time."""
    return torch.ops.aten.embedding_dense_backward(grad, idx, n, -1, False)


embedding_gradient.register_fake(lambda grad, idx, n: grad.new_empty(n, grad.size(-1)))


class TracedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, weight):
        ctx.save_for_backward(idx)
        ctx.n = weight.size(0)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, grad):
        return None, embedding_gradient(grad.contiguous(), *ctx.saved_tensors, ctx.n)


def embedding(idx, weight):
    """idx (...) int64, weight (n, C) -> (..., C). The gradient is deterministic."""
    return TracedEmbedding.apply(idx, weight) if traced() else F.embedding(idx, weight)


# ----------------------------------------------------------------------------------------------------------------------
# Dense matrices

JOINT_DEVICES = {'cuda'}  # device types on which a compiled training step joins matrices that share their input


def joint_linear(x, *layers):
    """[layer(x) for layer in layers]. A compiled training step on a GPU computes it as one product.

    One large product should be faster than several small ones, above all in backward (not measured yet). Each layer
    keeps a weight of its own, so checkpoints and optimizers see no difference. The weights are cast anyway.
    It works for nn.Linear, and for its subclasses that say with `product` what they compute instead of F.linear."""
    kind = type(layers[0])
    product = F.linear if kind is nn.Linear else getattr(kind, 'product', None)
    joint = product and traced() and torch.is_grad_enabled() and x.device.type in JOINT_DEVICES
    if not joint or any(type(layer) is not kind for layer in layers):
        return [layer(x) for layer in layers]
    low = autocast_dtype(x)
    weight = torch.cat([layer.weight.to(low) for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.to(low) for layer in layers])
    return product(x, weight, bias).split([layer.out_features for layer in layers], -1)


# ----------------------------------------------------------------------------------------------------------------------
# Ternary weights (BitNet b1.58, arXiv:2402.17764)

def ternary_codes(weight, dims=None):
    """Latent weights -> (codes in {-1, 0, 1}, scale), both fp32. scale is mean |weight| over dims, with keepdim."""
    weight = weight.detach().float()  # fp32, because bf16 would flip 0.2 % of the codes
    scale = weight.abs().mean(dims or tuple(range(weight.dim())), keepdim=True).clamp(min=1e-5)
    return (weight / scale).round_().clamp_(-1, 1), scale


class CachedCodes:
    """make(weight), called once per weight inside `with model.fixed_weights():`, and in every forward elsewhere.

    A compiled model does not cache: it fuses make() with the code that follows."""

    def __init__(self, make):
        self.make = make
        self.contexts = []  # the FixedWeights that are entered

    def __getstate__(self):  # a copy of a model starts without contexts
        return {'make': self.make, 'contexts': []}

    def __call__(self, weight):
        if traced():
            return self.make(weight)
        contexts = self.contexts[-1:]  # a copy, because another thread may leave its context now
        if not contexts:
            return self.make(weight)
        made = contexts[0].made
        if weight not in made:
            with torch.inference_mode(False):  # codes that training can use, too
                made[weight] = self.make(weight)
        return made[weight]


class FixedWeights:
    """Context: no weight changes inside, so ternary codes are made once per weight. See GPT.fixed_weights.

    It can be entered several times, for example once per token. It keeps the codes in between."""

    def __init__(self, caches):
        self.caches, self.made = caches, {}  # {weight: its codes}

    def __enter__(self):
        for cache in self.caches:
            cache.contexts.append(self)
        return self

    def __exit__(self, *_):
        for cache in self.caches:
            cache.contexts.remove(self)

    def tensors(self):
        return [tensor for made in self.made.values() for tensor in made]


class StraightThrough(torch.autograd.Function):
    """straight_through without the addition."""

    @staticmethod
    def forward(ctx, x, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def straight_through(x, value):
    """Returns value in forward. Passes the gradient to x in backward."""
    if not traced():
        return StraightThrough.apply(x, value)
    return value.detach() + (x - x.detach())  # exactly value, because x - x is exactly 0


def ternary_weight(weight, value, share):
    """straight_through(weight, value). With `share` (0-dim): the weight has gone this part of the way to its value."""
    return straight_through(weight, value if share is None else weight.detach().lerp(value, share))


def ternary_statistics(weight, codes, scale, before):
    """Statistics of the codes -> (statistics, int8 codes now). before: the int8 codes of the last call, or None."""
    now = codes.to(torch.int8)
    found = {'ternary_minus': codes < 0, 'ternary_zero': codes == 0, 'ternary_plus': codes > 0, 'ternary_scale': scale,
             'ternary_flips': codes != (codes if before is None else before),
             'ternary_fence': ((weight.detach() / scale).abs() - 0.5).abs() < 0.05}
    means = torch.stack([values.float().mean() for values in found.values()]).tolist()  # one device sync
    found = dict(zip(found, means))
    return found | ({'ternary_flips': None} if before is None else {}), now


def int8(x):
    """Round each token to 255 levels of its largest magnitude in the last dimension. Straight-through gradient."""
    codes, scale = int8_codes(x.detach())
    return straight_through(x, (codes / scale).type_as(x))


def int8_codes(x):
    """x (..., C) -> (codes (..., C), scale (..., 1)), both fp32, with x close to codes / scale.

    The codes are integers in [-127, 127]."""
    x = x.float()
    scale = 127 / torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).clamp_(min=1e-5)
    return (x * scale).round_(), scale


class BitProduct(torch.autograd.Function):
    """bit_product that saves the int8 codes for backward, not x."""

    @staticmethod
    def forward(ctx, x, weight, codes, scale):
        low = autocast_dtype(x)
        q, s = int8_codes(x)
        codes, unit = codes.to(low), fp16_unit(low)
        ctx.save_for_backward(q.to(torch.int8), s, codes, scale)
        return F.linear((q / unit if unit > 1 else q).to(low), codes).mul_(scale * unit / s)

    @staticmethod
    def backward(ctx, grad):
        q, s, codes, scale = ctx.saved_tensors
        dx = (grad @ codes).mul_(scale)
        dw = grad.flatten(0, -2).T @ (q / s).to(grad.dtype).flatten(0, -2)
        return dx, dw.float(), None, None


def fp16_unit(dtype):  # integer sums could overflow fp16, and a factor of 1/128 is exact in fp16
    return 128 if dtype == torch.float16 else 1


def bit_product(x, weight, codes, scale):
    """x (..., in), ternary codes (out, in) -> (..., out): int8 codes of x times ternary codes times both scales.

    The gradients are straight-through. The product of the codes is an integer of at most 127 * in < 2^24.
    So it is exact in any summation order."""
    if not traced():
        return BitProduct.apply(x, weight, codes, scale)
    (q, s), unit = int8_codes(x.detach()), fp16_unit(autocast_dtype(x))
    sums = F.linear(straight_through(x * (s / unit), q / unit), straight_through(weight / scale, codes))
    return (sums * (scale * unit / s)).type_as(sums)


def tile_codes(weight):
    """Latent tiles (E, m, n) -> (scale * codes, signs of the column sums of the codes (E, n))."""
    codes, scale = ternary_codes(weight, (1, 2))
    return codes * scale, codes.sum(1).sign()  # sums integers, which is exact; a sum of scaled codes is not


# ----------------------------------------------------------------------------------------------------------------------
# TriX: token-to-tile permutation, the hidden layer, one matrix per tile

def spread(x, order, back, k):  # (N, C) -> (N k, C): repeats every row k times, sorted by tile
    return x.index_select(0, order // k if k > 1 else order)


def gather(x, order, back, k):  # (N k, C) -> (N, C): sums the k rows of each token
    x = x.index_select(0, back)
    return x.view(-1, k, x.size(-1)).sum(1) if k > 1 else x


class Spread(torch.autograd.Function):
    """spread, with its adjoint `gather` as gradient. It avoids scatter-add, so it is fast and deterministic."""

    @staticmethod
    def forward(ctx, x, order, back, k):
        ctx.save_for_backward(order, back)
        ctx.k = k
        return spread(x, order, back, k)

    @staticmethod
    def backward(ctx, grad):
        return gather(grad, *ctx.saved_tensors, ctx.k), None, None, None


class Gather(torch.autograd.Function):
    """gather, with its adjoint `spread` as gradient."""

    @staticmethod
    def forward(ctx, x, order, back, k):
        ctx.save_for_backward(order, back)
        ctx.k = k
        return gather(x, order, back, k)

    @staticmethod
    def backward(ctx, grad):
        return spread(grad, *ctx.saved_tensors, ctx.k), None, None, None


class GatedHidden(torch.autograd.Function):
    """gated_hidden with fewer passes over memory than the plain formula."""

    @staticmethod
    def forward(ctx, z, gate):
        r = z.float().clamp(min=0)
        u = r.square()
        inverse = (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt_()
        u.mul_(inverse)
        ctx.save_for_backward(r, u, inverse, gate)
        return (u * gate).type_as(z)

    @staticmethod
    def backward(ctx, grad):
        r, u, inverse, gate = ctx.saved_tensors
        d_gate = (grad * u).sum(-1, keepdim=True)
        dz = (grad * gate).addcmul_(u, gate * d_gate / -u.size(-1)).mul_(r).mul_(2 * inverse)
        return dz.type_as(grad), d_gate


def gated_hidden(z, gate):
    """gate * RMSNorm(relu(z)^2): z (..., h), gate (..., 1) fp32 -> (..., h). Computes in fp32, returns z.dtype."""
    if not traced():
        return GatedHidden.apply(z, gate)
    u = F.relu(z.float()).square()
    return (gate * u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).type_as(z)


def product_per_tile(x, weights, sizes):  # sizes: list of the number of rows per tile
    out = x.new_empty(len(x), weights.size(1))
    for rows, weight, to in zip(x.split(sizes), weights, out.split(sizes)):
        torch.mm(rows, weight.T, out=to)
    return out


def product_per_tile_gradients(grad, x, weights, sizes):
    dx, dw = torch.empty_like(x), torch.empty_like(weights)
    for e, (rows, g, to) in enumerate(zip(x.split(sizes), grad.split(sizes), dx.split(sizes))):
        torch.mm(g, weights[e], out=to)
        torch.mm(g.T, rows, out=dw[e])
    return dx, dw


class TileLoop(torch.autograd.Function):
    """grouped_linear as a loop over tiles."""

    @staticmethod
    def forward(ctx, x, weights, sizes):
        ctx.save_for_backward(x, weights)
        ctx.sizes = sizes
        return product_per_tile(x, weights, sizes)

    @staticmethod
    def backward(ctx, grad):
        return *product_per_tile_gradients(grad, *ctx.saved_tensors, ctx.sizes), None


# TileLoop for torch.compile, which cannot trace sizes that depend on the data
tile_loop = traced_operator(
    'tile_loop', 'Tensor x, Tensor weights, Tensor sizes',
    lambda x, weights, sizes: product_per_tile(x, weights, sizes.tolist()),
    lambda grad, x, weights, sizes: product_per_tile_gradients(grad, x, weights, sizes.tolist()),
    fake=lambda x, weights, sizes: x.new_empty(x.size(0), weights.size(1)))


class GroupedMM(torch.autograd.Function):
    """grouped_linear by F.grouped_mm, without a host sync. ends (E,) int32: the end row of each tile."""

    @staticmethod
    def forward(ctx, x, weights, ends):
        ctx.save_for_backward(x, weights, ends)
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, grad):
        x, weights, ends = ctx.saved_tensors
        grad = grad.contiguous()
        # Some GPUs leave garbage in the gradient of an empty tile (github.com/pytorch/pytorch/issues/172439).
        empty = ends == F.pad(ends[:-1], (1, 0))
        dw = F.grouped_mm(grad.T, x, offs=ends).masked_fill(empty[:, None, None], 0)
        return F.grouped_mm(grad, weights, offs=ends), dw, None


def grouped_linear(x, weights, sizes):
    """x (N, in) sorted by tile, weights (E, out, in) -> (N, out), in the autocast dtype.

    Each tile multiplies its rows by its own weight. The type of `sizes` chooses the method:
      list or int64 tensor   the number of rows per tile: one product per tile
      int32 tensor           the end row of each tile: one F.grouped_mm"""
    x, weights = x.to(autocast_dtype(x)), weights.to(autocast_dtype(x))
    if not torch.is_tensor(sizes):
        return TileLoop.apply(x, weights, sizes)
    return GroupedMM.apply(x, weights, sizes) if sizes.dtype == torch.int32 else tile_loop(x, weights, sizes)


def dense_tiles(x, up, down, tiles, gates, hidden):
    """Every tile multiplies every token. A gate of 0 removes the tiles that a token does not use.

    x (N, C), up (E, h, C), down (E, C, h), tiles and gates (N, k) -> (N, C).
    hidden: a function of pre-activations (..., h), gates (..., 1) and the index of each row's tile -> (..., h)."""
    weight = torch.zeros(len(x), len(up), device=x.device).scatter(1, tiles, gates)  # (N, E)
    z = F.linear(x, up.flatten(0, 1)).view(len(x), len(up), -1)  # (N, E, h)
    h = hidden(z, weight.unsqueeze(-1), slice(None))
    return F.linear(h.flatten(1), down.transpose(0, 1).flatten(1))


def sparse_tiles(x, up, down, tiles, gates, hidden, grouped):
    """dense_tiles, but each tile multiplies only its own tokens. grouped: by F.grouped_mm, without a host sync."""
    k, tiles = tiles.size(1), tiles.flatten()
    order = tiles.argsort(stable=True)  # (N k,): index sorted by tile -> index in token order
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    sizes = torch.zeros(len(up), dtype=tiles.dtype, device=x.device).scatter_add_(0, tiles, torch.ones_like(tiles))
    if grouped:
        sizes = sizes.cumsum(0, dtype=torch.int32)
    elif not traced():
        sizes = sizes.tolist()  # one transfer to the host for all tiles
    z = grouped_linear(Spread.apply(x, order, back, k), up, sizes)  # (N k, h), sorted by tile
    h = hidden(z, Spread.apply(gates.view(-1, 1), order, back, 1), tiles[order])
    return Gather.apply(grouped_linear(h, down, sizes), order, back, k)


def triton_tiles(x, up, down, tiles, gates):
    """sparse_tiles with gated_hidden as `hidden`, in the kernels of triton_kernels.py, in the autocast dtype."""
    from triton_kernels import tiles_by_triton
    low = autocast_dtype(x)
    return tiles_by_triton(x.to(low), up.to(low), down.to(low), tiles, gates)


HAS_TRITON = importlib.util.find_spec('triton') is not None
TRITON_DEVICES = {'cuda'}  # device types whose tiles triton_kernels.py may multiply


def fastest_tiles(x, up, k, gated):
    """The execution of tiles that is expected to be fastest -> 'loop', 'dense', 'grouped' or 'triton'.

    up (E, h, C), k: tiles of a token, gated: the hidden units are gated_hidden.
    'triton' has the same products as 'grouped' and saves 14 of about 33 passes over the rows (see triton_kernels.py).
    It is chosen on a GPU in bf16 or fp16, where it covers the block and has passed its check. There are exceptions:
      - C h over 1536^2. The products would lose what the passes save, if Triton reaches 450 TFLOP/s and F.grouped_mm
        600 (an estimate, not measured)
      - fp32, where cuBLAS is much faster than Triton
      - tokens that go to every tile, because there is nothing to sort"""
    E, h, C = up.shape
    low, kind = autocast_dtype(x), x.device.type
    has_tensor_cores = kind != 'cuda' or torch.cuda.get_device_capability(x.device) >= (8, 0)
    # grouped_mm needs rows of a multiple of 16 bytes
    can_group = kind == 'cuda' and has_tensor_cores and low == torch.bfloat16 and h % 8 == C % 8 == 0
    can_fuse = HAS_TRITON and kind in TRITON_DEVICES and has_tensor_cores and low.itemsize == 2
    if can_fuse and gated and k < E <= 256 and (C * h <= 1536 ** 2 or not can_group):
        from triton_kernels import works
        if works(x.device, low, E, k, C, h):
            return 'triton'
    if kind == 'cpu':
        return 'loop'
    return 'grouped' if can_group else 'dense'


# ----------------------------------------------------------------------------------------------------------------------
# Resonance: causal convolutions along T

def convolve(u, h):
    n = fft_size(2 * len(h) - 1)
    spectrum = torch.fft.rfft(u, n, dim=1).mul_(torch.fft.rfft(h, n, dim=0))
    return torch.fft.irfft(spectrum, n, dim=1)[:, :len(h)].contiguous()


def convolve_gradients(grad, u, h, need_u=True, need_h=True):
    n, du, dh = fft_size(2 * len(h) - 1), None, None
    g = torch.fft.rfft(grad, n, dim=1)
    if need_h:
        dh = torch.fft.irfft((torch.fft.rfft(u, n, dim=1).conj() * g).sum(0), n, dim=0)[:len(h)].contiguous()
    if need_u:
        du = torch.fft.irfft(g.mul_(torch.fft.rfft(h, n, dim=0).conj()), n, dim=1)[:, :len(h)].contiguous()
    return du, dh


class CausalConvolution(torch.autograd.Function):
    """causal_convolution that saves u and h for backward, not their spectra."""

    @staticmethod
    def forward(ctx, u, h):
        ctx.save_for_backward(u, h)
        return convolve(u, h)

    @staticmethod
    def backward(ctx, grad):
        return convolve_gradients(grad, *ctx.saved_tensors, *ctx.needs_input_grad)


# CausalConvolution for torch.compile, which would otherwise save the spectra
convolution = traced_operator('causal_convolution', 'Tensor u, Tensor h', convolve, convolve_gradients,
                              fake=lambda u, h: torch.empty_like(u))


def causal_convolution(u, h):
    """u (B, T, C), h (T, C), fp32 -> y (B, T, C): y[:, t] = sum over s <= t of h[t - s] u[:, s].

    The FFTs have at least 2T - 1 points, so nothing wraps around."""
    return convolution(u, h) if traced() else CausalConvolution.apply(u, h)


def fft_size(n):
    """The smallest 2^a, 3 * 2^a or 5 * 2^a that is at least n. Every FFT library is fast at these sizes."""
    return min(base << max(0, (-(-n // base) - 1).bit_length()) for base in (1, 3, 5))


def flush(powers):
    """Set powers below 1e-17 to zero. Denormal numbers would make CPU products many times slower."""
    return powers.masked_fill(powers.detach().abs() < 1e-17, 0)


def real_product(a, b):  # complex (n, K), (..., K, C) -> Re(a b), as one real product
    a = torch.cat((a.real, -a.imag), -1)
    b = torch.cat((b.real, b.imag), -2)
    return a @ b if b.dim() == 2 else torch.bmm(a.expand(len(b), -1, -1), b)


def mode_powers(nu, theta, start, n, stride=1):
    """lambda^t for t = start, start + stride, ...: (n, K) complex64, with an error of about 1e-7 at any t.

    nu (K,), theta (K,): the modes lambda = exp(-exp(nu) + i theta)."""
    # Two tables of about sqrt(n) entries have fp64 exponents, for accuracy. MPS lacks fp64, so the CPU makes them.
    # Their outer product is fp32.
    device = 'cpu' if nu.device.type == 'mps' else nu.device
    log = torch.complex(-nu.to(device, torch.float64).exp(), theta.to(device, torch.float64))
    m = math.isqrt(n - 1) + 1
    step = stride * torch.arange(m, device=device, dtype=torch.float64)[:, None]
    fine, coarse = (flush(t.exp()).to(torch.complex64).to(nu.device) for t in (step * log, (step * m + start) * log))
    return flush(coarse[:, None] * fine).flatten(0, 1)[:n]


def carry_matrix(powers):
    """powers (n - 1, K) complex: lambda^(S j) for j = 0, 1, ... -> (K, 2n, 2n).

    For each mode, the matrix maps the contributions of n chunks to the states that enter them:
    state_j = sum over i < j of lambda^(S (j - 1 - i)) left_i. A chunk has S positions. left_i is the contribution of
    chunk i, state_j the state that enters chunk j. Real parts come before imaginary parts."""
    n = len(powers) + 1
    # (2, K, 2n - 1), the last n entries are 0
    powers = F.pad(torch.view_as_real(powers).permute(2, 1, 0), (n, 0)).flip(-1)
    # Row j is powers[n - 1 - j:][:n], so each diagonal holds one distance. Repeating the 2n - 1 entries and cutting
    # the result into rows of 2n - 2 shifts each row by one.
    rows = powers.repeat(1, 1, n)[..., n - 1:n - 1 + n * (2 * n - 2)].unflatten(-1, (n, 2 * n - 2))
    re, im = rows[..., :n]  # (K, n, n) each
    return torch.cat((torch.cat((re, -im), 2), torch.cat((im, re), 2)), 1)


def mode_convolution(u, nu, theta, re, im, S, dtype=torch.float32):
    """u (B, T, C) fp32 -> (B, T, C): y[:, t] = sum over s <= t of h[t - s] u[:, s], h[t] = Re sum_k a_k lambda_k^t.

    nu (K,), theta (K,): the modes, as in mode_powers. re (K, C), im (K, C): the amplitudes a.
    It convolves chunks of at most S positions. The states of the modes carry over from chunk to chunk. Chunks are
    convolved by FFT in fp32. A GPU uses product_convolution in `dtype` instead, if its results are right there."""
    if u.device.type in PRODUCT_DEVICES and dtype in PRODUCT_TOLERANCE and products_are_right(u.device, dtype):
        chunk = product_chunk(u.size(0) * u.size(1), u.size(1), len(nu), S)
        return product_convolution(u, nu, theta, re, im, chunk, dtype)
    return fft_convolution(u, nu, theta, re, im, S)


def fft_convolution(u, nu, theta, re, im, S):
    """mode_convolution by FFT in fp32, in chunks of S positions."""
    B, T, C = u.shape
    K, powers = len(nu), mode_powers(nu, theta, 0, S + 1)
    h = real_product(powers[:S], torch.complex(re, im))  # (S, C)
    if S == T:
        return causal_convolution(u, h)
    n = -(-T // S)  # number of chunks, the last chunk is padded
    u = F.pad(u, (0, 0, 0, n * S - T)).view(B * n, S, C)
    y = causal_convolution(u, h)  # the part within each chunk
    back = powers[:S].flip(0)  # a chunk contributes sum over its positions t of lambda^(S - 1 - t) u_t
    left = torch.bmm(torch.cat((back.real, back.imag), 1).T.expand(B * n, -1, -1), u)  # (B n, 2K, C)
    left = left.view(B, n, 2, K, C).permute(3, 2, 1, 0, 4).reshape(K, 2 * n, B * C)
    carry = carry_matrix(mode_powers(nu, theta, 0, n - 1, S))  # (K, 2n, 2n)
    # the state that enters each chunk, (2, B, n, K, C)
    state = torch.bmm(carry, left).view(K, 2, n, B, C).permute(1, 3, 2, 0, 4)
    # (B n, 2K, C)
    state = torch.cat((re * state[0] - im * state[1], -re * state[1] - im * state[0]), 2).flatten(0, 1)
    past = torch.bmm(torch.cat((powers[1:].real, powers[1:].imag), 1).expand(B * n, -1, -1), state)
    return (y + past).reshape(B, n * S, C)[:, :T]


PRODUCT_DEVICES = {'cuda'}  # device types that use product_convolution
# Allowed relative error of product_convolution in products_are_right: that of the worst result, rounding included.
# fp32 may mean TF32. fp16 is missing because the sums could overflow.
PRODUCT_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05}


def product_convolution(u, nu, theta, re, im, S, dtype):
    """mode_convolution as real matrix products in `dtype`, for tensor cores. There are n = T / S chunks:

        within a chunk    the (S, S) Toeplitz matrix of h, one per channel
        its states        Re and Im of sum over t of lambda^(S - 1 - t) u_t: a (2K, S) matrix for all channels
        carried states    sum over earlier chunks of lambda^(S j) states: a (2n, 2n) matrix per mode
        their effect      Re(a lambda^(t + 1) state): a (2K, S) matrix for all channels

    Per token and channel, these are S + 2K + 4 K T / S^2 + 2K multiplications. At T = 32,768, C = 1,024, K = 128 and
    S = 256, that is 69 GFLOP for a sequence. A product in bf16 sums in fp32. Tables of powers have fp64 exponents.
    Everything is plain real arithmetic, so torch.compile fuses it with the gates around it."""
    B, T, C = u.shape
    # len(range()) makes torch.compile compile each shape anew. Variable shapes take it minutes.
    B, T = len(range(B)), len(range(T))
    K, n = len(nu), -(-T // S)
    dense = torch.contiguous_format
    u = F.pad(u, (0, 0, 0, n * S - T)).view(B * n, S, C).permute(2, 0, 1).to(dtype, memory_format=dense)  # (C, B n, S)
    powers = real_powers(nu, theta, torch.arange(S + 1, device=u.device))  # (2, K, S + 1)
    back, ahead = powers[..., :S], powers[..., 1:]
    h = re.T @ back[0] - im.T @ back[1]  # (C, S)
    y = torch.bmm(u, toeplitz(h.to(dtype)))  # (C, B n, S)
    if n > 1:
        left = back.flip(2).flatten(0, 1).to(dtype) @ u.flatten(0, 1).T  # (2K, C B n)
        left = left.view(2, K, C * B, n).permute(1, 2, 0, 3).reshape(K, C * B, 2 * n)
        distance = S * torch.arange(n - 1, device=u.device)
        carry = toeplitz(F.pad(real_powers(nu, theta, distance), (1, 0)).to(dtype))  # (2, K, n, n)
        carry = torch.cat((torch.cat((carry[0], carry[1]), 2), torch.cat((-carry[1], carry[0]), 2)), 1)
        # the state that enters each chunk
        real, imaginary = torch.bmm(left, carry).view(K, C, B, 2, n).float().unbind(3)  # (K, C, B, n) each
        re, im = re[..., None, None], im[..., None, None]
        state = torch.stack((re * real - im * imaginary, -re * imaginary - im * real)).to(dtype)  # (2, K, C, B, n)
        y = torch.addmm(y.flatten(0, 1), state.view(2 * K, C * B * n).T, ahead.flatten(0, 1).to(dtype))
    return y.view(C, B, n * S)[..., :T].permute(1, 2, 0).to(torch.float32, memory_format=dense)


def real_powers(nu, theta, t):  # t (n,) -> Re and Im of lambda^t, (2, K, n) fp32, as accurate as mode_powers
    t, nu, theta = t.double(), nu.double()[:, None], theta.double()[:, None]
    size, angle = (-nu.exp() * t).exp(), theta * t
    return torch.stack((size * angle.cos(), size * angle.sin())).float()


def toeplitz(h):
    """h (..., S) -> (..., S, S): h[t - s] in row s and column t, and 0 below the diagonal."""
    S = h.size(-1)
    # Repeats (h, 0) of 2 S entries and cuts the result into rows of 2 S - 1. This shifts each row by one.
    rows = torch.cat((h, torch.zeros_like(h)), -1).repeat(*[1] * (h.dim() - 1), S)[..., :S * (2 * S - 1)]
    return rows.unflatten(-1, (S, 2 * S - 1))[..., :S].contiguous()


def product_chunk(tokens, T, K, limit):
    """The fastest chunk length of product_convolution, at most `limit`. tokens: B * T of the batch.

    An estimate from the shape, not a measurement: a killed run must resume with the same values."""
    def cost(S):  # per token and channel, in multiplications of a tensor core. A pass over memory costs as much as 40
        states = 0 if S >= T else 4 * K + 4 * K * T / S ** 2 + 40 * 16 * K / S  # 8 passes over 2K states
        passes = 40 * 5 * S ** 2 / tokens  # over the Toeplitz matrices
        return (S + states + passes) * -(-T // S) * S / T  # the last chunk is padded
    best = min(limit, 512)
    for S in (16, 32, 64, 128, 256):
        if S < min(limit, 512) and cost(S) < cost(best):
            best = S
    return best


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing
def products_are_right(device, dtype):
    """Whether product_convolution works on this device. Checked once per process. Prints a line if it does not."""
    fake = torch._C._len_torch_dispatch_stack()  # fake tensors, a FLOP counter
    return True if fake else not product_problem(device, dtype)


@functools.cache
def product_problem(device, dtype):
    """What is wrong with product_convolution on this device, as text. Compares it with FFTs on the CPU."""
    try:
        worst = product_error(device, dtype)
        problem = '' if worst <= PRODUCT_TOLERANCE[dtype] else f'relative error {worst:.2g}'
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an operation that this device lacks
        problem = one_line(error)
    if problem:
        print(f'resonance uses FFTs, which are slower: its matrix products in {str(dtype)[6:]} fail on {device}: '
              f'{problem}', file=sys.stderr, flush=True)
    return problem


def product_error(device, dtype):
    """The largest relative error of product_convolution in a small example: of the result and of each gradient."""
    B, T, C, K, S = 2, 150, 8, 8, 32
    random = torch.Generator().manual_seed(0)
    u, weight, re, im = (torch.randn(shape, generator=random) for shape in ((B, T, C), (B, T, C), (K, C), (K, C)))
    tau = torch.logspace(math.log10(2), math.log10(T), K)
    inputs = u, -tau.log(), 2 * math.pi / tau, re, im
    found = []
    # Runs inside a forward: no autocast, and no hooks of activation checkpointing.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), \
            torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        for where, function in ((torch.device('cpu'), functools.partial(fft_convolution, S=T)),
                                (device, functools.partial(product_convolution, S=S, dtype=dtype))):
            copies = [x.to(where, copy=True).requires_grad_() for x in inputs]
            y = function(*copies)
            found.append([y.detach(), *torch.autograd.grad((y * weight.to(where)).sum(), copies)])
    return max(((a.cpu() - b).abs().max() / b.abs().max()).item() for b, a in zip(*found))


class ShortFilter(torch.autograd.Function):
    """short_filter without padded copies."""

    @staticmethod
    def forward(ctx, z, w, age):
        ctx.save_for_backward(z, w, age)
        y = z * w[0]
        for j in range(1, min(len(w), z.size(1))):
            y[:, j:].addcmul_(reached(z[:, :-j], j, age), w[j])
        return y

    @staticmethod
    def backward(ctx, grad):
        z, w, age = ctx.saved_tensors
        dz, dw = grad * w[0], torch.zeros_like(w)
        dw[0] = (grad * z).sum((0, 1))
        for j in range(1, min(len(w), z.size(1))):
            dz[:, :-j].addcmul_(reached(grad[:, j:], j, age), w[j])
            dw[j] = (grad[:, j:] * reached(z[:, :-j], j, age)).sum((0, 1))
        return dz, dw, None


def reached(x, j, age):
    """Zero the entries of x (B, T - j, C) where tap j would reach across the start of a document.

    The second dimension of x stands for the positions t = j, j + 1, ... An entry stays if its position is at least j
    tokens after the start of its document. Returns x unchanged if age is None."""
    return x if age is None else x.masked_fill(age[:, j:, None] < j, 0)


def short_filter(z, w, age=None):
    """z (B, T, C), w (n, C) -> (B, T, C): sum over j of w[j] z[:, t - j].

    z counts as 0 before the first position. age (B, T) is the distance of each position from the start of its document.
    With age, z counts as 0 before the start of the document."""
    if not traced():
        return ShortFilter.apply(z, w, age)
    n, T = w.size(0), z.size(1)
    # Pad so that every tap has T rows: inductor can't fuse sums over different row counts (torch 2.11).
    z = F.pad(z, (0, 0, n - 1, 0))
    taps = [w[j] * z[:, n - 1 - j:n - 1 - j + T] for j in range(n)]
    return sum(taps if age is None else (tap.masked_fill(age[..., None] < j, 0) for j, tap in enumerate(taps)))


# ----------------------------------------------------------------------------------------------------------------------
# Several documents in a row of tokens (document_mask)

@dataclass
class Documents:
    """The documents in a batch of tokens (document_mask). Computed once per forward, for all layers.

    A document ends with its end-of-text token. The next token begins a new document at learned position 0 and sees no
    earlier token. The target of an end-of-text token is the first token of the next document. This target counts in the
    loss."""
    age: torch.Tensor  # (B, T) int64: how far each token is behind the first token of its document
    mask: torch.Tensor | BlockMask = None  # for attention: (B, 1, T, positions so far) bool, or for FlexAttention
    groups: list = None  # for resonance in eager execution: document_groups(age)

    def begun(self):
        """(B, T) bool: True if the token's document began before these T tokens (only with a cache)."""
        return self.age > torch.arange(self.age.size(1), device=self.age.device)


def document_ages(idx, eot_id, before):
    """idx (B, T) -> (B, T) int64: the number of earlier tokens in each token's document.

    before (B,): this number for the first token."""
    T = idx.size(1)
    positions = torch.arange(T, device=idx.device)
    begin = torch.where(idx[:, :-1] == eot_id, positions[1:], -2**62)  # (B, T - 1)
    return positions - torch.cat((-before[:, None], begin), 1).cummax(1).values


def document_mask(age, start, n):
    """age (B, T) -> (B, 1, T, n) bool: True where a token sees one of n positions. `start`: the first token's."""
    T = age.size(1)
    distance = start + torch.arange(T, device=age.device)[:, None] - torch.arange(n, device=age.device)
    return ((distance >= 0) & (distance <= age[..., None]))[:, None]


def flex_document_mask(age):
    """document_mask as a BlockMask. FlexAttention skips fully masked blocks."""
    B, T = age.shape

    def sees(b, h, q, k):
        return (k <= q) & (q - k <= age[b, q])
    return create_block_mask(sees, B, None, T, T, device=age.device)


def document_groups(age):
    """Group the documents of a batch by length, so that documents of similar length are convolved together.

    age (B, T) int64: the distance of each position from the start of its document. A document that began before the
    first position counts as beginning at the first position.

    Returns [(index (n, L), inside (n, L) bool)], one pair per power of two. A pair describes n documents of at most
    L positions. `index` holds their positions in the flat batch (B * T,). `inside` is True where one of the L positions
    belongs to the document. Costs one host sync."""
    B, T = age.shape
    first = (age == 0).cpu()
    first[:, 0] = True
    begin = first.flatten().nonzero()[:, 0]  # (documents,)
    length = torch.diff(begin, append=torch.tensor([B * T]))
    exponent = torch.frexp((length - 1).float()).exponent  # length <= 2^exponent < 2 length
    groups = []
    for e in exponent.unique().tolist():
        own, positions = exponent == e, torch.arange(min(2 ** e, T))
        inside = positions < length[own, None]
        index = torch.where(inside, begin[own, None] + positions, begin[own, None])
        groups.append((index.to(age.device), inside.to(age.device)))
    return groups


def convolve_documents(u, h, groups):
    flat, y = u.flatten(0, 1), torch.empty_like(u)
    for index, inside in groups:
        part = convolve(flat[index].masked_fill(~inside[..., None], 0), h[:index.size(1)])  # (n, L, C)
        y.flatten(0, 1)[index[inside]] = part[inside]
    return y


def convolve_documents_gradients(grad, u, h, groups):
    flat, flat_grad, du, dh = u.flatten(0, 1), grad.flatten(0, 1), torch.empty_like(u), torch.zeros_like(h)
    for index, inside in groups:
        L, outside = index.size(1), ~inside[..., None]
        g, part = (x[index].masked_fill(outside, 0) for x in (flat_grad, flat))  # (n, L, C) each
        part_gradient, h_gradient = convolve_gradients(g, part, h[:L])
        du.flatten(0, 1)[index[inside]] = part_gradient[inside]
        dh[:L] += h_gradient
    return du, dh


class DocumentConvolution(torch.autograd.Function):
    """document_convolution in eager execution. All layers share the groups."""

    @staticmethod
    def forward(ctx, u, h, groups):
        ctx.save_for_backward(u, h)
        ctx.groups = groups
        return convolve_documents(u, h, groups)

    @staticmethod
    def backward(ctx, grad):
        return *convolve_documents_gradients(grad.contiguous(), *ctx.saved_tensors, ctx.groups), None


# DocumentConvolution for torch.compile, which cannot trace group sizes that depend on the data
traced_document_convolution = traced_operator(
    'document_convolution', 'Tensor u, Tensor h, Tensor age',
    lambda u, h, age: convolve_documents(u, h, document_groups(age)),
    lambda grad, u, h, age: convolve_documents_gradients(grad, u, h, document_groups(age)),
    fake=lambda u, h, age: torch.empty_like(u))


def document_convolution(u, h, age, groups=None):
    """causal_convolution within documents: y[:, t] = sum over s of h[t - s] u[:, s] for t - age[:, t] <= s <= t.

    u (B, T, C) contiguous fp32, h (T, C) fp32, age (B, T) as in document_groups. `groups` is the result of
    document_groups(age), or None while the compiler is tracing.
    The result is exact: each document has its own transform. A document of n positions costs an FFT of fewer than 4n
    points, so a row of short documents takes less time than a row with one long document."""
    if groups is None:
        return traced_document_convolution(u, h, age)
    return DocumentConvolution.apply(u, h, groups)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding: what each layer keeps of earlier positions

class Cache:
    """Decoding state for B sequences. layers: (cache of the mixer, cache of the FFN) of each block, None where none.

    `pos` is the number of positions so far. It is an int, so the shapes of a step grow with it. Inside `at(position)`
    it is a tensor instead: the step attends to the whole buffer with a mask. Then all shapes and addresses stay the
    same, as a compiled step and a CUDA graph need."""

    def __init__(self, B, block_size, layers):
        self.B, self.block_size, self.layers = B, block_size, layers
        self.pos, self.short = 0, ShortCache()
        self.age = None  # with document_mask (B,): the document age of the next token

    def parts(self):
        return [self.short, *(part for pair in self.layers for part in pair if part is not None)]

    def check(self, idx):
        assert len(idx) == self.B, f'{len(idx)} sequences, but the cache was made for {self.B}'
        if not torch.is_tensor(self.pos):
            end = self.pos + idx.size(1)
            assert end <= self.block_size, f'{end} positions, but block_size is {self.block_size}'

    def keep_age(self, age):  # (B,)
        self.age = kept(self.age, age)

    def has_fixed_addresses(self):
        """Whether all layers can work inside `at`. A block of a fork may keep its state in another way."""
        return all(isinstance(part, (ShortCache, KVCache, ResonanceCache)) for part in self.parts())

    def tensors(self):
        """What a step changes beside keys and values. It exists after the first step."""
        own = [self.age, *(tensor for part in self.parts() for tensor in part.changing())]
        return [tensor for tensor in own if tensor is not None]

    def reset(self):
        """Forget all positions. Keeps the addresses of all tensors."""
        self.move(0)
        for part in self.parts():
            part.reset()
        if self.age is not None:
            self.age.zero_()

    def move(self, pos):
        self.pos = pos
        for part in self.parts():
            if isinstance(part, KVCache):
                part.pos = pos

    @contextlib.contextmanager
    def at(self, position):
        """Inside, `pos` is the tensor `position` (1,) int64. For steps of one token after at least one ordinary step.

        Afterwards `pos` is what it was."""
        before = self.pos
        self.move(position)
        try:
            yield
        finally:
            self.move(before)


def kept(tensor, value):
    """`value`, stored at the address of `tensor` if there is one already."""
    return value.clone() if tensor is None else tensor.copy_(value)


def rows(table, start, n):
    """Rows start to start + n of a table. start: an int, or the position of a cache, a tensor (1,)."""
    if torch.is_tensor(start):
        return table[start + torch.arange(n, device=table.device)]
    return table[start:start + n]


class KVCache:
    """Keys and values of one attention layer for up to block_size positions.

    `pos` counts the filled positions, see Cache."""

    def __init__(self, B, block_size):
        self.B, self.block_size, self.pos = B, block_size, 0
        self.k, self.v = None, None

    def tensors(self, like):
        """Keys and values (B, n_kv_head, block_size, hs), filled up to pos.

        The first call allocates them with the dtype and device of `like` (B, n_kv_head, T, hs)."""
        if self.k is None:  # allocated here, because autocast decides the dtype in the first call
            _, nh, _, hs = like.shape
            # Zeros, because a mask does not remove nan: 0 * nan is nan.
            self.k = like.new_zeros(self.B, nh, self.block_size, hs)
            self.v = torch.zeros_like(self.k)
        return self.k, self.v

    def append(self, k, v, mask):
        """k, v (B, n_kv_head, T, hs) -> keys, values and mask of all positions to attend to.

        mask: which positions each of the T tokens sees, (B, 1, T, positions), or None for all before it."""
        all_k, all_v = self.tensors(k)
        start, T = self.pos, k.size(2)
        if torch.is_tensor(start):
            own = start + torch.arange(T, device=k.device)
            all_k[:, :, own] = k.type_as(all_k)
            all_v[:, :, own] = v.type_as(all_v)
            if mask is None:
                mask = (torch.arange(self.block_size, device=k.device) <= own[:, None])[None, None]
            return all_k, all_v, mask
        self.pos += T
        all_k[:, :, start:self.pos] = k
        all_v[:, :, start:self.pos] = v
        if mask is None and start and T > 1:  # row i sees start + i + 1 keys
            mask = torch.ones(T, self.pos, dtype=torch.bool, device=k.device).tril(start)
        return all_k[:, :, :self.pos], all_v[:, :, :self.pos], mask

    def changing(self):
        return ()  # a position that is written again is written before it is seen

    def reset(self):
        pass


class ShortCache:
    """The last inputs that a short filter still needs. Without gradients."""

    def __init__(self):
        self.recent = None

    @torch.no_grad()
    def filter(self, x, weight, age=None):
        if self.recent is None:  # created here, because the device is unknown before the first call
            self.recent = x.new_zeros(len(x), len(weight) - 1, x.size(2))
        T, x = x.size(1), torch.cat((self.recent.type_as(x), x), 1)
        self.recent.copy_(x[:, T:])
        age = age if age is None else F.pad(age, (len(weight) - 1, 0))
        return short_filter(x, weight.type_as(x), age)[:, -T:]

    def changing(self):
        return self.recent,

    def reset(self):
        if self.recent is not None:
            self.recent.zero_()


class ResonanceCache:
    """Recurrent state of a resonance layer in fp64: s <- lambda s + u. Without gradients.

    Its size and the time per step do not depend on the context length."""

    def __init__(self, B, layer):
        self.B, self.layer, self.state, self.short = B, layer, None, ShortCache()

    @torch.no_grad()
    def begin(self):  # runs in the first forward, because FSDP may shard the parameters before it
        layer, B = self.layer, self.B
        real = torch.float32 if layer.nu.device.type == 'mps' else torch.float64  # fp32 would drift to 1e-4 at 32k
        parameters = layer.nu, layer.theta, layer.magnitude, layer.phase
        nu, theta, magnitude, phase = (p.detach().to(real) for p in parameters)
        self.fresh = True
        self.log = torch.complex(-nu.exp(), theta)  # (K,), log lambda
        self.factor = torch.view_as_real(self.log.exp()[:, None])  # (K, 1, 2), lambda
        # (K, C, 2): Re(a s) is the sum of weight * (Re s, Im s)
        self.weight = torch.stack((magnitude * phase.cos(), -magnitude * phase.sin()), -1)
        self.state = magnitude.new_zeros(B, *magnitude.shape, 2)  # (B, K, C, 2): real and imaginary parts

    @torch.no_grad()
    def convolve(self, u, documents=None):  # next positions (B, T, C) -> (B, T, C): h (*) u, within documents
        if self.state is None:
            self.begin()
        if u.size(1) == 1:
            return self.step(u, documents)
        y, state = self.layer.convolve(u, documents), torch.view_as_complex(self.state)
        if not self.fresh:  # add the part from earlier positions
            past = torch.view_as_complex(self.weight).conj() * state  # (B, K, C), a s
            powers = mode_powers(self.layer.nu, self.layer.theta, 1, u.size(1))
            past = real_product(powers, past.to(torch.complex64))  # (B, T, C)
            y = y + (past.masked_fill(~documents.begun()[..., None], 0) if documents else past)
        self.fresh = False
        if documents:  # the new state holds only the last document
            inside = torch.arange(u.size(1) - 1, -1, -1, device=u.device) <= documents.age[:, -1:]  # (B, T)
            u = u.masked_fill(~inside[..., None], 0)
            state.masked_fill_(~documents.begun()[:, -1, None, None], 0)
        for part in u.to(self.weight.dtype).split(1024, 1):
            steps = torch.arange(part.size(1), -1, -1, device=u.device, dtype=part.dtype)
            powers = (steps[:, None] * self.log).exp()  # (n + 1, K), lambda^n ... lambda^0
            gain = torch.cat((powers[1:].real, powers[1:].imag), 1).T @ part  # (B, 2K, C)
            state.mul_(powers[0, :, None]).add_(torch.complex(*gain.chunk(2, 1)))
        return y

    def step(self, u, documents):  # the next position (B, 1, C) -> (B, 1, C)
        self.fresh = False
        if documents:  # reset where a document begins. masked_fill, because inf * 0 would be nan
            self.state.masked_fill_(documents.age[:, :, None, None] == 0, 0)
        if traced():  # inductor fuses real numbers into one kernel, and has no complex numbers
            (re, im), (a, b) = self.state.unbind(-1), self.factor.unbind(-1)
            self.state.copy_(torch.stack((a * re - b * im + u, a * im + b * re), -1))
        else:
            torch.view_as_complex(self.state).mul_(torch.view_as_complex(self.factor)).add_(u)
        return (self.state * self.weight).sum((1, 3))[:, None].float()

    def changing(self):
        return self.state, self.short.recent

    def reset(self):
        self.short.reset()
        if self.state is not None:
            self.fresh = True
            self.state.zero_()


# ----------------------------------------------------------------------------------------------------------------------
# The loss

FUSED_DEVICES = {'cuda'}  # device types that use fused_loss
CHUNK_BYTES = 2 ** 30  # of logits in fused_loss: 8,192 rows of the vocabulary of GPT-2 in bf16


def loss_and_gradients(x, *arguments):
    """-> (sum of the losses (), gradient of x, gradient of weight). The arguments are those of eager_loss.

    One pass computes losses and gradients for a chunk of rows at a time. It stores no logits and computes no logits
    twice. Besides its inputs, it holds one chunk of logits and the two gradients (idea: Liger Kernel,
    arXiv:2410.10989)."""
    device = x.device.type
    # Under a dispatch mode (fake tensors, a FLOP counter), dynamo would mark the function as never to be compiled.
    if device in FUSED_DEVICES and not torch._C._len_torch_dispatch_stack():
        try:
            return fused_loss(x, *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, or an operation that this device lacks
            FUSED_DEVICES.discard(device)
            print(f'the loss runs without torch.compile, which is slower: {one_line(error)}', file=sys.stderr,
                  flush=True)
    return eager_loss(x, *arguments)


def loss_chunk(device, V, low, positions):
    """The shape of a chunk of logits -> (rows, columns). device: its type. low: the dtype of the matrix products."""
    if device in FUSED_DEVICES:
        columns = V + -V % 64
        rows = min(8192, max(128, CHUNK_BYTES // (columns * low.itemsize)))
        # Powers of two, so that few shapes are compiled.
        return min(2 ** (rows.bit_length() - 1), max(128, 2 ** (positions - 1).bit_length())), columns
    rows = max(64, 2 ** 20 // V // 64 * 64)  # 4 MB of fp32 logits stay in a core's cache
    return rows if device == 'cpu' else 32 * rows, V  # 32: enough work to fill a GPU


def chunk_loss(logits, targets, teacher_logits, V, softcap, teacher_cap, distill_weight, need):
    """The sum of the losses of a chunk, (). With `need`, replaces the logits (rows, columns) by their gradient.

    Columns from V on are padding. Their gradient is 0.
    Only the last line works in place. torch.compile fuses all lines into two passes over the logits."""
    targets, column = targets[:, None], torch.arange(logits.size(1), device=logits.device)
    keep, padding = targets >= 0, column >= V
    z = logits.float()
    if softcap:
        tanh = (z / softcap).tanh()
        z = softcap * tanh
    if len(column) > V:
        z = z.masked_fill(padding, -math.inf)
    peak = z.amax(1, keepdim=True)
    exp = (z - peak).exp()
    total = exp.sum(1, keepdim=True)
    at = (1 - distill_weight) * z.gather(1, targets.clamp(min=0))
    if teacher_logits is not None:
        log_q = teacher_logits.float()
        if teacher_cap:
            log_q = teacher_cap * (log_q / teacher_cap).tanh()
        if len(column) > V:
            log_q = log_q.masked_fill(padding, -math.inf)
        log_q = log_q.log_softmax(1)
        q = log_q.exp()
        difference = z - log_q
        if len(column) > V:
            difference = difference.masked_fill(padding, 0)  # not inf - inf
        at = at + distill_weight * (q * difference).sum(1, keepdim=True)
    loss = ((peak + total.log() - at) * keep).sum()
    if need:
        p = exp / total - (1 - distill_weight) * (column == targets)
        if teacher_logits is not None:
            p = p - distill_weight * q
        logits.copy_(p * keep * (1 - tanh.square()) if softcap else p * keep)
    return loss


@functools.cache
def compiled_chunk_loss():
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one for each shape
    # Reductions are not chosen by timing. Otherwise a killed run could not resume exactly.
    return torch.compile(chunk_loss, dynamic=False, fullgraph=True, options={'deterministic': True})


@torch.no_grad()
def fused_loss(x, weight, targets, softcap, teacher_x, teacher_w, teacher_cap, distill_weight, low, need):
    """eager_loss for GPUs. Every chunk has the same shape: rows without a token are zeros with the target -1.

    Tensor cores need aligned rows of logits, so the vocabulary is padded with rows of zeros in `weight`."""
    N, V = len(x), len(weight)
    rows, columns = loss_chunk(x.device.type, V, low, N)
    w = padded(weight.to(low), columns)
    teacher_w = teacher_w if teacher_w is None else padded(teacher_w.to(low), columns)
    logits = x.new_empty(rows, columns, dtype=low)
    teacher_logits = None if teacher_w is None else torch.empty_like(logits)
    targets = F.pad(targets, (0, -N % rows), value=-1)
    loss = torch.zeros((), device=x.device)
    dx, dw = x.new_empty(0), x.new_empty(0)
    if need:
        dx, dw = torch.empty_like(x), torch.zeros_like(w, dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        for i in range(0, N, rows):
            xs = x[i:i + rows].to(low)
            n = len(xs)
            product_into(logits, xs, w)
            if teacher_x is not None:
                product_into(teacher_logits, teacher_x[i:i + rows].to(low), teacher_w)
            loss += compiled_chunk_loss()(
                logits, targets[i:i + rows], teacher_logits, V, softcap, teacher_cap, distill_weight, need)
            if need:
                p = logits[:n]  # (n, columns), the gradient now
                torch.mm(p, w, out=dx[i:i + n]) if dx.dtype == low else dx[i:i + n].copy_(p @ w)
                add_product(dw, p.T, xs)
    return loss, dx, dw[:V].to(weight.dtype)


def padded(weight, n):  # (V, C) -> (n, C), with rows of zeros
    return F.pad(weight, (0, 0, 0, n - len(weight))) if len(weight) < n else weight


def product_into(logits, x, w):  # logits (rows, V) = x (n, C) @ w.T, and zeros below
    torch.mm(x, w.T, out=logits[:len(x)])
    logits[len(x):].zero_()


def add_product(total, a, b):
    """total += a @ b, with `total` in fp32. CUDA adds products of lower precision in fp32, too."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(a @ b)


def eager_loss(x, weight, targets, softcap, teacher_x, teacher_w, teacher_cap, distill_weight, low, need):
    """-> (sum of the losses (), gradient of x, gradient of weight). Without `need` the gradients are empty.

    low: the dtype of the matrix products.

    On two CPU cores it matches F.linear_cross_entropy of torch 2.13 with chunks of 128, within the noise, and is faster
    than the default of F.linear_cross_entropy. To measure: `bench.py head`."""
    w, teacher_w = weight.to(low), teacher_w if teacher_w is None else teacher_w.to(low)
    rows, _ = loss_chunk(x.device.type, len(weight), low, len(x))
    loss = torch.zeros((), device=x.device)
    dx, dw = x.new_empty(0), x.new_empty(0)
    if need:
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        for i in range(0, len(x), rows):
            xs, ts = x[i:i + rows].to(low), targets[i:i + rows, None]
            keep, ts = ts >= 0, ts.clamp(min=0)
            logits = (xs @ w.T).float()  # (rows, V)
            if softcap:
                logits.div_(softcap).tanh_()
                slope = 1 - logits.square() if need else None
                logits.mul_(softcap)
            at = (1 - distill_weight) * logits.gather(1, ts)
            if teacher_x is not None:
                log_q = (teacher_x[i:i + rows].to(low) @ teacher_w.T).float()
                log_q = (log_q.div_(teacher_cap).tanh_().mul_(teacher_cap) if teacher_cap else log_q).log_softmax(1)
                q = log_q.exp()
                at += distill_weight * (q * logits.sub(log_q)).sum(1, keepdim=True)
            peak = logits.amax(1, keepdim=True)
            total = logits.sub_(peak).exp_().sum(1, keepdim=True)
            loss += ((peak + total.log() - at) * keep).sum()
            if need:
                # d loss / d logits
                p = logits.mul_(keep / total).scatter_add_(1, ts, (distill_weight - 1) * keep.float())
                if teacher_x is not None:
                    p.addcmul_(q, keep.float(), value=-distill_weight)
                p = (p.mul_(slope) if softcap else p).to(low)
                dx[i:i + rows] = p @ w
                dw.addmm_(p.T, xs) if low == torch.float32 else dw.add_(p.T @ xs)
                del p
            del logits  # free this chunk before the next one is allocated
    return loss, dx, dw.to(weight.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses. Forward computes the gradients with loss_and_gradients."""

    @staticmethod
    def forward(ctx, *arguments):
        loss, dx, dw = loss_and_gradients(*arguments)
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, *8 * [None]


@custom_op('nanotrix::cross_entropy', mutates_args=())
def cross_entropy_op(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, teacher_x: Optional[Tensor],
                     teacher_w: Optional[Tensor], teacher_cap: float, distill_weight: float, low: torch.dtype,
                     need: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ChunkedCrossEntropy for torch.compile, which would otherwise unroll the loop over chunks."""
    return loss_and_gradients(x, weight, targets, softcap, teacher_x, teacher_w, teacher_cap, distill_weight, low, need)


@cross_entropy_op.register_fake
def _(x, weight, targets, softcap, teacher_x, teacher_w, teacher_cap, distill_weight, low, need):
    gradients = (torch.empty_like(x), torch.empty_like(weight)) if need else (x.new_empty(0), x.new_empty(0))
    return x.new_empty((), dtype=torch.float32), *gradients


def keep_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


cross_entropy_op.register_autograd(
    lambda ctx, grad, *_: (ctx.saved_tensors[0] * grad, ctx.saved_tensors[1] * grad, *8 * [None]),
    setup_context=keep_gradients)


def chunked_cross_entropy(x, weight, targets, softcap=0.0, teacher=None):
    """Mean cross-entropy in nats over the rows whose target is not -1.

    x (N, C), weight (V, C), targets (N,) int64 -> scalar fp32. The result is nan if every target is -1, as in
    F.cross_entropy. The logits are x @ weight.T, or softcap * tanh(x @ weight.T / softcap) if softcap is not 0.
    teacher: (x (N, C'), weight (V, C'), softcap, distill_weight) of a teacher model with distribution q. With a
    teacher, the loss is (1 - distill_weight) * cross-entropy + distill_weight * KL(q || p)."""
    teacher_x, teacher_w, teacher_cap, distill_weight = teacher or (None, None, 0.0, 0.0)
    need = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    arguments = x, weight, targets, softcap, teacher_x, teacher_w, teacher_cap, distill_weight, autocast_dtype(x), need
    loss = cross_entropy_op(*arguments)[0] if traced() else ChunkedCrossEntropy.apply(*arguments)
    return loss / (targets >= 0).sum()
