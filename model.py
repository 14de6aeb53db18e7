"""The language model: its config, its blocks, the loss, the initialisation, parameter and FLOP counts.

    from model import GPT, GPTConfig
    model  = GPT(GPTConfig(ffn='trix'))
    logits = model(idx)                   # (B, T) int64 -> (B, T, vocab_size)
    loss   = model(idx, targets)          # mean cross-entropy in nats, fp32; never holds all logits; target -1 is ignored
    logits = model(part, cache=cache)     # cache = model.new_cache(B); the values of the full forward, position by position

A block is pre-norm with the residual outside: x + mixer(norm(x)), then x + ffn(norm(x)). To add one, write a class that
maps (B, T, C) to (B, T, C) and name it in MIXERS or FFNS.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 256  # context length in tokens
    vocab_size: int = 8192  # entries of the vocabulary, at most 65,536 (token bins are uint16)
    n_layer: int = 3  # blocks
    n_head: int = 4  # query heads of an attention layer
    n_kv_head: int = 0  # key/value heads, shared by n_head / n_kv_head queries each (0: n_head)
    n_embd: int = 128  # width of the residual stream
    d_ff: int = 0  # hidden width of a dense FFN (0: 4 n_embd; swiglu: 8/3 n_embd, up to a multiple of 32)
    ffn: str = 'gelu'  # gelu, relu2, swiglu, trix or none
    mixer: str = 'attention'  # attention
    norm: str = 'rmsnorm'  # rmsnorm or layernorm
    positions: str = 'rotary'  # rotary, learned or none
    qk_norm: bool = False  # RMS-normalise queries and keys, which bounds the attention logits
    tie_embeddings: bool = True  # one matrix for the token embedding and the head
    bias: bool = False  # biases in linear layers and LayerNorm
    dropout: float = 0.0  # after the embedding, on attention weights and on both branches
    trix_tiles: int = 8  # tiles of a TriX FFN
    trix_top_k: int = 2  # tiles a token is sent to
    trix_hidden: int = 0  # hidden units of a tile (0: n_embd)
    trix_shared: bool = False  # one more tile that is always on
    act_bits: int = 0  # 8: activations that enter a ternary product are rounded to int8, per token (0: not)

    def problems(self):
        """Impossible settings, one line each; empty if the model can be built."""
        found = []
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                found.append(f'{key}={getattr(self, key)!r} is not one of {", ".join(choices)}')
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'trix_tiles', 'trix_top_k'):
            if getattr(self, key) < 1:
                found.append(f'{key}={getattr(self, key)} must be at least 1')
        for key in ('n_kv_head', 'd_ff', 'trix_hidden'):
            if getattr(self, key) < 0:
                found.append(f'{key}={getattr(self, key)} must not be negative')
        if not 0 <= self.dropout < 1:
            found.append(f'dropout={self.dropout} must lie in [0, 1)')
        if self.act_bits not in (0, 8):
            found.append(f'act_bits={self.act_bits} must be 0 or 8')
        if found:
            return found
        if self.vocab_size > 65_536:
            found.append(f'vocab_size={self.vocab_size} is over 65,536: token bins hold 16 bits a token')
        if self.n_embd % self.n_head:
            found.append(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        elif self.positions == 'rotary' and (self.n_embd // self.n_head) % 2:
            found.append(f'rotary positions need an even head size, n_embd / n_head is {self.n_embd // self.n_head}')
        if self.n_kv_head and self.n_head % self.n_kv_head:
            found.append(f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}')
        if self.ffn == 'trix' and self.trix_top_k > self.trix_tiles:
            found.append(f'trix_top_k={self.trix_top_k} is more than trix_tiles={self.trix_tiles}')
        if self.act_bits and self.ffn != 'trix':
            found.append(f'act_bits={self.act_bits} needs a ternary block: ffn=trix')
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Ternary weights (BitNet b1.58, arXiv:2402.17764)

class Ternary(torch.autograd.Function):
    """Latent weights -> (scale * codes, codes); the gradient of the first goes straight through to the latent weights."""

    @staticmethod
    def forward(ctx, weight, dims):
        codes, scale = ternary_codes(weight, dims)
        ctx.mark_non_differentiable(codes)
        return codes * scale, codes

    @staticmethod
    def backward(ctx, grad, _):
        return grad, None


def ternary_codes(weight, dims):
    """Latent weights -> (codes in {-1, 0, 1}, scale = mean |weight| over dims, kept as size 1), both fp32."""
    weight = weight.detach().float()  # in bf16 0.2 % of the codes would flip
    scale = weight.abs().mean(dims, keepdim=True).clamp(min=1e-5)
    return (weight / scale).round_().clamp_(-1, 1), scale


class Int8(torch.autograd.Function):
    """Round to 255 levels of the largest magnitude in the last dimension, that is per token; straight-through."""

    @staticmethod
    def forward(ctx, x):
        scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return ((x * scale).round().clamp(-128, 127) / scale).type_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


# ----------------------------------------------------------------------------------------------------------------------
# Mixers: (B, T, C) -> (B, T, C) across positions, causally

class KVCache:
    """Keys and values of one attention layer for up to block_size positions; `pos` counts those that are filled."""

    def __init__(self, B, block_size):
        self.B, self.block_size, self.pos, self.k, self.v = B, block_size, 0, None, None

    def append(self, k, v):  # (B, n_kv_head, T, hs) each -> all positions so far, (B, n_kv_head, pos + T, hs)
        _, nh, T, hs = k.shape
        if self.k is None:  # not earlier: under autocast the dtype is known only now
            self.k, self.v = (k.new_empty(self.B, nh, self.block_size, hs) for _ in 'kv')
        self.k[:, :, self.pos:self.pos + T], self.v[:, :, self.pos:self.pos + T] = k, v
        self.pos += T
        return self.k[:, :, :self.pos], self.v[:, :, :self.pos]


class Attention(nn.Module):
    """Causal multi-head attention with grouped queries (arXiv:2305.13245) and rotary positions (arXiv:2104.09864)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.block_size, self.dropout, self.qk_norm = config.block_size, config.dropout, config.qk_norm
        hs = config.n_embd // config.n_head
        self.q_proj = nn.Linear(config.n_embd, self.n_head * hs, bias=config.bias)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv_head * hs, bias=config.bias)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv_head * hs, bias=config.bias)
        self.o_proj = nn.Linear(self.n_head * hs, config.n_embd, bias=config.bias)
        self.rotary = config.positions == 'rotary'
        if self.rotary:
            angle = torch.outer(torch.arange(config.block_size).float(), 10_000.0 ** (-torch.arange(0, hs, 2) / hs))
            self.register_buffer('cos', angle.cos(), persistent=False)  # (block_size, hs / 2)
            self.register_buffer('sin', angle.sin(), persistent=False)

    def new_cache(self, B):
        return KVCache(B, self.block_size)

    def rotate(self, x, start):  # (B, nh, T, hs); pairs are (i, i + hs/2), the layout of Llama checkpoints
        cos, sin = self.cos[start:start + x.size(2)], self.sin[start:start + x.size(2)]
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = self.k_proj(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, hs)
        v = self.v_proj(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)
        start = cache.pos if cache else 0
        if self.qk_norm:
            q, k = rms(q), rms(k)
        if self.rotary:
            q, k = self.rotate(q, start), self.rotate(k, start)
        mask = None
        if cache:
            k, v = cache.append(k, v)
            if start and T > 1:  # a chunk that continues: row i sees start + i + 1 keys
                mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=start == 0, enable_gqa=self.n_kv_head != self.n_head)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


# ----------------------------------------------------------------------------------------------------------------------
# FFNs: (B, T, C) -> (B, T, C), position by position

class MLP(nn.Module):
    """act(x W_up) W_down."""

    def __init__(self, config, act):
        super().__init__()
        self.act, hidden = act, config.d_ff or 4 * config.n_embd
        self.up_proj = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))


def gelu(x):
    return F.gelu(x, approximate='tanh')  # as in GPT-2


def relu2(x):
    return F.relu(x).square()  # arXiv:2109.08668


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down, arXiv:2002.05202."""

    def __init__(self, config):
        super().__init__()
        hidden = config.d_ff or -(-8 * config.n_embd // 3 // 32) * 32
        self.gate_proj = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.up_proj = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TriX(nn.Module):
    """A ternary mixture of tiles that routes by its own weights.

    Tile e has ternary up (h, C) and down (C, h). Its signature, the sign of the column sums of its own up codes, is the
    router: score s_e = x . sig_e / sqrt(C). The k tiles with the largest s_e + balance_e are chosen; each adds
    2 sigmoid(s_e) / k * down_e(RMSNorm(relu(up_e x)^2)). `balance` chooses and never weighs: it is moved once an
    optimizer step towards even load (loss-free balancing, arXiv:2408.15664). No token is ever dropped.

    The two executions are one function: masked-dense (every tile, two matrix products) and sparse (tokens sorted by tile).
    """
    execution = 'auto'  # 'dense' or 'sparse' force one of them

    def __init__(self, config):
        super().__init__()
        E, self.k, self.n_embd = config.trix_tiles, config.trix_top_k, config.n_embd
        h = config.trix_hidden or config.n_embd
        self.n_routed, self.shared, self.int8 = E, config.trix_shared, config.act_bits == 8
        self.up = nn.Parameter(torch.empty(E + self.shared, h, config.n_embd))  # a shared tile is the last one
        self.down = nn.Parameter(torch.empty(E + self.shared, config.n_embd, h))
        self.register_buffer('balance', torch.zeros(E))
        self.register_buffer('load', torch.zeros(E), persistent=False)  # tokens a tile got since the last optimizer step
        self.counts = None  # (E,) tokens a tile got in the latest training forward

    def route(self, x, up, codes):  # (N, C), (E + shared, h, C) twice -> tiles (N, k + shared) int64, gates alike in fp32
        with torch.autocast(x.device.type, enabled=False):
            mean = up[:self.n_routed].mean(1)  # (E, C)
            slope = mean / mean.detach().abs().mean(-1, keepdim=True).clamp(min=1e-8)
            sign = codes[:self.n_routed].sum(1).sign()  # of integers: exact, unlike that of the mean
            signature = slope + (sign - slope).detach()  # the sign, with the gradient of the scaled mean
            scores = F.linear(x.float(), signature) / math.sqrt(self.n_embd)  # (N, E)
            tiles = (scores.detach() + self.balance).topk(self.k, -1).indices
            gates = 2 / self.k * scores.gather(-1, tiles).sigmoid()
        if self.training:
            self.counts = torch.zeros_like(self.load).scatter_add_(0, tiles.flatten(), torch.ones_like(gates).flatten())
        if self.shared:
            tiles, gates = F.pad(tiles, (0, 1), value=self.n_routed), F.pad(gates, (0, 1), value=1.0)
        return tiles, gates

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)  # (N, C)
        (up, codes), (down, _) = Ternary.apply(self.up, (1, 2)), Ternary.apply(self.down, (1, 2))
        tiles, gates = self.route(x, up, codes)
        if self.int8:
            x = Int8.apply(x)
        sparse = self.execution == 'sparse' or self.execution == 'auto' and x.device.type == 'cpu'
        return (self.sparse if sparse else self.dense)(x, up, down, tiles, gates).view(shape)

    def hidden(self, z, gates):  # pre-activations (..., h), gates (..., 1) -> (..., h)
        h = GatedHidden.apply(z, gates)
        return Int8.apply(h) if self.int8 else h

    def dense(self, x, up, down, tiles, gates):
        weight = torch.zeros(len(x), len(up), device=x.device).scatter(1, tiles, gates)  # (N, E), 0 where not chosen
        z = F.linear(x, up.flatten(0, 1)).view(len(x), len(up), -1)  # (N, E, h)
        h = self.hidden(z, weight.unsqueeze(-1))
        return F.linear(h.flatten(1), down.transpose(0, 1).flatten(1))  # (N, C)

    def sparse(self, x, up, down, tiles, gates):
        k = tiles.size(1)
        order = tiles.flatten().argsort(stable=True)  # (N k,): sorted by tile -> by token
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        sizes = torch.bincount(tiles.flatten(), minlength=len(up)).tolist()  # one transfer to the host for all tiles
        z = GroupedLinear.apply(Spread.apply(x, order, back, k), up, sizes)  # (N k, h), sorted by tile
        h = self.hidden(z, Spread.apply(gates.view(-1, 1), order, back, 1))
        return Gather.apply(GroupedLinear.apply(h, down, sizes), order, back, k)

    @torch.no_grad()
    def statistics(self):
        """How even the load of the last optimizer step was, and where the codes stand."""
        load = self.load / self.load.sum().clamp(min=1)
        codes = torch.cat([ternary_codes(w, (1, 2))[0].flatten() for w in (self.up, self.down)])
        return {'trix_overload': (load.max() * len(load) - 1).item(),
                'trix_entropy': (-(load * load.clamp(min=1e-9).log()).sum() / math.log(max(len(load), 2))).item(),
                'trix_dead': (load == 0).float().mean().item(),
                'ternary_minus': (codes < 0).float().mean().item(), 'ternary_zero': (codes == 0).float().mean().item(),
                'ternary_plus': (codes > 0).float().mean().item()}

    @torch.no_grad()
    def update_balance(self, rate):
        if dist.is_initialized():
            dist.all_reduce(self.load)
        self.balance += rate * (self.load.mean() - self.load).sign()
        self.balance -= self.balance.mean()
        self.load.zero_()


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
    """x (N, in), sorted by group, weights (E, out, in), sizes: rows of each group -> (N, out), each group by its own weight."""

    @staticmethod
    def forward(ctx, x, weights, sizes):
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weights = x.to(low), weights.to(low)
        ctx.save_for_backward(x, weights)
        ctx.sizes = sizes
        out = x.new_empty(len(x), weights.size(1))
        for rows, weight, to in zip(x.split(sizes), weights, out.split(sizes)):
            torch.mm(rows, weight.T, out=to)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weights = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.empty_like(weights)
        for e, (rows, g, to) in enumerate(zip(x.split(ctx.sizes), grad.split(ctx.sizes), dx.split(ctx.sizes))):
            torch.mm(g, weights[e], out=to)
            torch.mm(g.T, rows, out=dw[e])
        return dx, dw, None


MIXERS = {'attention': Attention}
FFNS = {
    'gelu': lambda config: MLP(config, gelu),
    'relu2': lambda config: MLP(config, relu2),
    'swiglu': SwiGLU,
    'trix': TriX,
    'none': lambda config: None,
}


# ----------------------------------------------------------------------------------------------------------------------
# The model

def rms(x):  # parameter-free RMSNorm over the last dimension
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class LayerNorm(nn.Module):
    """nn.LayerNorm with an optional bias on every version of torch."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


NORMS = {'rmsnorm': lambda config: nn.RMSNorm(config.n_embd, eps=1e-6), 'layernorm': LayerNorm}
CHOICES = {'mixer': MIXERS, 'ffn': FFNS, 'norm': NORMS, 'positions': ('rotary', 'learned', 'none')}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mixer_norm, self.mixer = NORMS[config.norm](config), MIXERS[config.mixer](config)
        self.ffn = FFNS[config.ffn](config)
        self.ffn_norm = NORMS[config.norm](config) if self.ffn else None
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        x = x + self.drop(self.mixer(self.mixer_norm(x), cache))
        if self.ffn:
            x = x + self.drop(self.ffn(self.ffn_norm(x)))
        return x


class GPT(nn.Module):
    """A stack of blocks between a token embedding and a head.

    Initialisation:
      embeddings, head                    N(0, 0.02), so that the loss starts at ln(vocab_size)
      matrices of the blocks              N(0, 0.02)
      o_proj, down_proj, down (last ones) N(0, 0.02 / sqrt(2 n_layer)), so that the residual stream keeps its scale
      norms 1, biases 0, TriX balance 0
    """

    def __init__(self, config):
        super().__init__()
        assert not config.problems(), '; '.join(config.problems())
        self.config = config
        self.activation_checkpointing = False  # recompute each block in backward instead of keeping its activations
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == 'learned' else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = NORMS[config.norm](config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self):
        for name, p in self.named_parameters():
            if p.dim() == 1:
                (nn.init.zeros_ if name.endswith('bias') else nn.init.ones_)(p)
            else:
                last = name.endswith(('o_proj.weight', 'down_proj.weight', '.down'))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if last else 0.02)

    def new_cache(self, B):
        """One empty cache a layer for B sequences, for `model(idx, cache=cache)`."""
        return [block.mixer.new_cache(B) for block in self.blocks]

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size); with targets (B, T): the mean loss in nats, a scalar."""
        start, T = cache[0].pos if cache else 0, idx.size(1)
        assert start + T <= self.config.block_size, f'{start + T} positions, but block_size is {self.config.block_size}'
        x = self.wte(idx)  # (B, T, C)
        if self.wpe:
            x = x + self.wpe.weight[start:start + T]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache[i] if cache else None)
        if self.training and torch.is_grad_enabled():
            for trix in self.trix_layers():  # here, because activation checkpointing runs a block twice
                trix.load += trix.counts
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x)
        return chunked_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def trix_layers(self):
        return [block.ffn for block in self.blocks if isinstance(block.ffn, TriX)]

    def update_balance(self, rate):
        """Once an optimizer step: move every TriX layer towards even load."""
        for trix in self.trix_layers():
            trix.update_balance(rate)

    def statistics(self):
        """What the blocks have to say about the last optimizer step: the worst layer's overload, means of the rest."""
        layers = [trix.statistics() for trix in self.trix_layers()]
        return {key: max(s[key] for s in layers) if key == 'trix_overload' else sum(s[key] for s in layers) / len(layers)
                for key in (layers[0] if layers else ())}

    # ---- counts

    def parameter_table(self):
        """[(kind, parameters, of which a token uses)]; a tied matrix counts once, as the head that multiplies it."""
        kinds = {'embedding': [0, 0], 'mixer': [0, 0], 'ffn': [0, 0], 'norm': [0, 0], 'head': [0, 0]}
        for name, p in self.named_parameters():
            part = name.split('.')[2] if name.startswith('blocks.') else name.split('.')[0]
            kind = {'wte': 'head' if self.config.tie_embeddings else 'embedding', 'wpe': 'embedding',
                    'lm_head': 'head', 'mixer': 'mixer', 'ffn': 'ffn'}.get(part, 'norm')
            used = p.numel()
            if name.endswith(('.up', '.down')):  # (tiles, ., .)
                used = used // p.size(0) * (self.config.trix_top_k + self.config.trix_shared)
            kinds[kind][0] += p.numel()
            kinds[kind][1] += used
        return [(kind, *counts) for kind, counts in kinds.items()]

    def flops_per_token(self, T=None):
        """Forward + backward FLOPs a token at context length T, as the field counts them (PaLM, arXiv:2204.02311,
        appendix B): 6 a used matrix weight and 12 n_embd T an attention layer, the causal half not taken off."""
        T, c = T or self.config.block_size, self.config
        table = {kind: used for kind, _, used in self.parameter_table()}
        biases = sum(p.numel() for name, p in self.named_parameters() if name.endswith('proj.bias'))
        matrices = table['mixer'] + table['ffn'] - biases + c.vocab_size * c.n_embd
        routing = c.n_layer * c.trix_tiles * c.n_embd if c.ffn == 'trix' else 0
        return 6 * (matrices + routing) + 12 * c.n_layer * c.n_embd * T


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
    def forward(ctx, x, weight, targets):
        rows = max(64, 2 ** 20 // len(weight) // 64 * 64)  # 4 MB of fp32 logits stay in a core's cache
        if x.device.type != 'cpu':
            rows *= 32  # enough work to fill a GPU
        need = any(ctx.needs_input_grad)
        low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        w, loss = weight.to(low), torch.zeros((), device=x.device)
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)) if need else (None, None)
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), rows):
                xs, ts = x[i:i + rows].to(low), targets[i:i + rows, None]
                keep, ts = ts >= 0, ts.clamp(min=0)
                logits = (xs @ w.T).float()  # (rows, V)
                at = logits.gather(1, ts)
                peak = logits.amax(1, keepdim=True)
                total = logits.sub_(peak).exp_().sum(1, keepdim=True)
                loss += ((peak + total.log() - at) * keep).sum()
                if need:
                    p = logits.mul_(keep / total).scatter_add_(1, ts, -keep.float()).to(low)  # d loss / d logits
                    dx[i:i + rows] = p @ w
                    dw.addmm_(p.T, xs) if low == torch.float32 else dw.add_(p.T @ xs)
        if need:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None


def chunked_cross_entropy(x, weight, targets):
    """Mean cross-entropy in nats of logits x @ weight.T, over the rows whose target is not -1.

    x (N, C), weight (V, C), targets (N,) int64 -> scalar fp32; nan if every target is -1, as F.cross_entropy."""
    return ChunkedCrossEntropy.apply(x, weight, targets) / (targets >= 0).sum()
