"""What model.py computes in fewer passes over memory than autograd would: functions with gradients written by hand.

Each is a formula of one or two lines, stated in its docstring, and tested against that formula. Imported by model.py.
"""
import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------------------------------------------------------
# Norm

class FastRMS(torch.autograd.Function):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last dimension, in two to three times less time than F.rms_norm on a CPU,
    which has no fused kernel there (torch 2.13)."""

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
    if x.device.type == 'cpu' and x.dtype == torch.float32:
        return FastRMS.apply(x, weight)
    return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# TriX: rows to their tiles, the hidden layer, a matrix for each tile

def spread(x, order, back, k):  # (N, C) -> (N k, C): every row k times, in the order of the tiles
    return x.index_select(0, order // k if k > 1 else order)


def gather(x, order, back, k):  # (N k, C) -> (N, C): the sum of a token's k rows
    x = x.index_select(0, back)
    return x.view(-1, k, x.size(-1)).sum(1) if k > 1 else x


class Spread(torch.autograd.Function):
    """spread, with its adjoint `gather` as gradient: no scatter-add, so it is fast and the same every time."""

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
    """gate * RMSNorm(relu(z)^2), (..., h) and (..., 1) -> (..., h), in fewer passes over memory than the plain formula."""

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


class GroupedLinear(torch.autograd.Function):
    """x (N, in), sorted by group, weights (E, out, in) -> (N, out), each group by its own weight.

    sizes: a list, the rows of each group, for a loop; or an int32 tensor, where each group ends, for F.grouped_mm."""

    @staticmethod
    def forward(ctx, x, weights, sizes):
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weights = x.to(low), weights.to(low)
        ctx.save_for_backward(x, weights)
        ctx.sizes = sizes
        if torch.is_tensor(sizes):
            return F.grouped_mm(x, weights.transpose(1, 2), offs=sizes)
        out = x.new_empty(len(x), weights.size(1))
        for rows, weight, to in zip(x.split(sizes), weights, out.split(sizes)):
            torch.mm(rows, weight.T, out=to)
        return out

    @staticmethod
    def backward(ctx, grad):
        (x, weights), sizes = ctx.saved_tensors, ctx.sizes
        if torch.is_tensor(sizes):
            grad = grad.to(x.dtype).contiguous()
            empty = sizes == F.pad(sizes[:-1], (1, 0))  # some GPUs leave rubbish there (github.com/pytorch/pytorch/issues/172439)
            dw = F.grouped_mm(grad.T, x, offs=sizes).masked_fill_(empty[:, None, None], 0)
            return F.grouped_mm(grad, weights, offs=sizes), dw, None
        dx, dw = torch.empty_like(x), torch.empty_like(weights)
        for e, (rows, g, to) in enumerate(zip(x.split(sizes), grad.split(sizes), dx.split(sizes))):
            torch.mm(g, weights[e], out=to)
            torch.mm(g.T, rows, out=dw[e])
        return dx, dw, None


# ----------------------------------------------------------------------------------------------------------------------
# Resonance: convolutions along T, causal

class CausalConvolution(torch.autograd.Function):
    """u (B, T, C), h (T, C) -> y[:, t] = sum over s <= t of h[t - s] u[:, s]: FFTs of at least 2T - 1, so that nothing wraps
    around. u and h are kept for backward, their spectra are not."""

    @staticmethod
    def forward(ctx, u, h):
        ctx.save_for_backward(u, h)
        n = fft_size(2 * len(h) - 1)
        return torch.fft.irfft(torch.fft.rfft(u, n, dim=1).mul_(torch.fft.rfft(h, n, dim=0)), n, dim=1)[:, :len(h)].contiguous()

    @staticmethod
    def backward(ctx, grad):
        u, h = ctx.saved_tensors
        n = fft_size(2 * len(h) - 1)
        g, du, dh = torch.fft.rfft(grad, n, dim=1), None, None
        if ctx.needs_input_grad[1]:
            dh = torch.fft.irfft((torch.fft.rfft(u, n, dim=1).conj() * g).sum(0), n, dim=0)[:len(h)]
        if ctx.needs_input_grad[0]:
            du = torch.fft.irfft(g.mul_(torch.fft.rfft(h, n, dim=0).conj()), n, dim=1)[:, :len(h)].contiguous()
        return du, dh


def fft_size(n):
    """The smallest 2^a, 3 2^a or 5 2^a that is at least n: sizes that every FFT library is fast at."""
    return min(base << max(0, (-(-n // base) - 1).bit_length()) for base in (1, 3, 5))


class ShortFilter(torch.autograd.Function):
    """z (B, T, C), w (n, C) -> sum over j of w[j] z[:, t - j], zeros before the start."""

    @staticmethod
    def forward(ctx, z, w):
        ctx.save_for_backward(z, w)
        y = z * w[0]
        for j in range(1, min(len(w), z.size(1))):
            y[:, j:].addcmul_(z[:, :-j], w[j])
        return y

    @staticmethod
    def backward(ctx, grad):
        z, w = ctx.saved_tensors
        dz, dw = grad * w[0], torch.zeros_like(w)
        dw[0] = (grad * z).sum((0, 1))
        for j in range(1, min(len(w), z.size(1))):
            dz[:, :-j].addcmul_(grad[:, j:], w[j])
            dw[j] = (grad[:, j:] * z[:, :-j]).sum((0, 1))
        return dz, dw


# ----------------------------------------------------------------------------------------------------------------------
# The loss

class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of x W^T, a few rows of logits at a time.

    Loss and gradients are made in one pass, so that no logits are kept and none are computed twice: beside its inputs
    this holds one chunk of logits and the two gradients. (Idea: Liger Kernel, arXiv:2410.10989.) On two CPU cores it
    is level, within the noise, with F.linear_cross_entropy of torch 2.13 in chunks of 128 and faster than its default:
    `bench.py head`.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, soft):
        rows = max(64, 2 ** 20 // len(weight) // 64 * 64)  # 4 MB of fp32 logits stay in a core's cache
        if x.device.type != 'cpu':
            rows *= 32  # enough work to fill a GPU
        need = any(ctx.needs_input_grad)
        low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        w, loss = weight.to(low), torch.zeros((), device=x.device)
        teacher, teacher_w, teacher_cap, share = (*soft[:1], soft[1].to(low), *soft[2:]) if soft else (None, None, 0.0, 0.0)
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)) if need else (None, None)
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), rows):
                xs, ts = x[i:i + rows].to(low), targets[i:i + rows, None]
                keep, ts = ts >= 0, ts.clamp(min=0)
                logits = (xs @ w.T).float()  # (rows, V)
                if softcap:
                    logits.div_(softcap).tanh_()
                    slope = 1 - logits.square() if need else None
                    logits.mul_(softcap)
                at = (1 - share) * logits.gather(1, ts)
                if soft:
                    log_q = (teacher[i:i + rows].to(low) @ teacher_w.T).float()
                    log_q = (log_q.div_(teacher_cap).tanh_().mul_(teacher_cap) if teacher_cap else log_q).log_softmax(1)
                    q = log_q.exp()
                    at += share * (q * logits.sub(log_q)).sum(1, keepdim=True)
                peak = logits.amax(1, keepdim=True)
                total = logits.sub_(peak).exp_().sum(1, keepdim=True)
                loss += ((peak + total.log() - at) * keep).sum()
                if need:
                    p = logits.mul_(keep / total).scatter_add_(1, ts, (share - 1) * keep.float())  # d loss / d logits
                    if soft:
                        p.addcmul_(q, keep.float(), value=-share)
                    p = (p.mul_(slope) if softcap else p).to(low)
                    dx[i:i + rows] = p @ w
                    dw.addmm_(p.T, xs) if low == torch.float32 else dw.add_(p.T @ xs)
                    del p
                del logits  # before the next chunk is made, not after
        if need:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None


def chunked_cross_entropy(x, weight, targets, softcap=0.0, soft=None):
    """Mean cross-entropy in nats of logits x @ weight.T, or softcap * tanh(logits / softcap), over the rows whose target is not -1.

    x (N, C), weight (V, C), targets (N,) int64 -> scalar fp32; nan if every target is -1, as F.cross_entropy. soft: (x (N, C'),
    weight (V, C'), softcap, share) of a teacher with distribution q; the loss is then (1 - share) cross-entropy + share KL(q || p)."""
    return ChunkedCrossEntropy.apply(x, weight, targets, softcap, soft) / (targets >= 0).sum()
