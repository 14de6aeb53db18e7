"""Training with fp8 products in the dense matrices of the blocks: `train.py --dtype=fp8`.

    print(start(model, device))    # before training; everything else runs in bfloat16

The master weights, checkpoints, exports and evaluation do not change. See Fp8Product for the formula."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError


def start(model, device):
    """Switch the dense matrices of the blocks to fp8 products -> a line about it. UserError if this is not possible."""
    if problem := probe(device):
        raise UserError(f'--dtype=fp8: {problem}: use --dtype=bfloat16')
    layers = [module for block in model.blocks for module in block.modules() if type(module) is nn.Linear]
    if not layers:
        raise UserError('--dtype=fp8: this model has no dense matrix in its blocks: use --dtype=bfloat16')
    for layer in layers:
        layer.__class__ = Fp8Linear
    return f'fp8: {len(layers)} matrices of the blocks, the rest in bfloat16; MFU is relative to the peak of bfloat16'


def probe(device):
    """Why fp8 cannot be used on a device, from a small product. Empty if it can."""
    a, b = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(device) for n in (256, 48))
    expected = a @ b.T
    try:
        distance = ((fp8_product(a, b) - expected).norm() / expected.norm()).item()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return '' if distance < 0.1 else f'a product in fp8 differs from fp32 by {100 * distance:.0f} %'


def fp8_linear(x, weight, bias=None):
    """F.linear(x, weight, bias), with fp8 products if gradients are on and the sizes suit the kernels."""
    rows = x.numel() // x.size(-1)
    # fp8 kernels need multiples of 16. With other numbers of rows than multiples of 256, some read outside of the
    # scales (github.com/pytorch/pytorch/issues/133334).
    if not torch.is_grad_enabled() or rows % 256 or weight.size(0) % 16 or weight.size(1) % 16:
        return F.linear(x, weight, bias)
    y = Fp8Product.apply(x, weight)
    return y if bias is None else y + bias.type_as(y)


class Fp8Linear(nn.Linear):
    """A linear layer that trains with fp8 products."""
    product = staticmethod(fp8_linear)

    def forward(self, x):
        return fp8_linear(x, self.weight, self.bias)


class Fp8Product(torch.autograd.Function):
    """x (..., K), weight (N, K) -> x @ weight.T (..., N) in bf16.

    The product and the gradient of x multiply fp8 values. The gradient of the weight, where errors add up over all
    tokens, multiplies bf16 values. With one scale per row, e4m3 has the range for gradients, too."""

    @staticmethod
    def forward(ctx, x, weight):
        rows = x.flatten(0, -2).to(torch.bfloat16)
        ctx.save_for_backward(rows, weight)
        ctx.dtype = x.dtype
        return fp8_product(rows, weight).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        g = grad.flatten(0, -2)
        dx = fp8_product(g, weight.T).view(*grad.shape[:-1], -1)
        return dx.to(ctx.dtype), (g.T @ rows).to(weight.dtype)


def fp8_product(a, b):
    """a (M, K), b (N, K) -> a @ b.T (M, N) in bf16, of factors in fp8."""
    (a, a_scale), (b, b_scale) = fp8_codes(a), fp8_codes(b)
    if a.is_cuda:
        return torch._scaled_mm(a, b.T, a_scale, b_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True)
    return ((a.float() @ b.float().T) * a_scale * b_scale.T).bfloat16()  # for tests without a GPU


def fp8_codes(x):
    """x (n, K) -> (codes (n, K) in e4m3, scale (n, 1) fp32), with x close to codes * scale."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn).contiguous(), scale
