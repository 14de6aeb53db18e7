"""The language model: config, blocks, loss, initialisation, parameter and FLOP counts.

    from model import GPT, GPTConfig
    model  = GPT(GPTConfig(ffn='trix'))
    logits = model(idx)                   # (B, T) int64 -> (B, T, vocab_size)
    loss   = model(idx, targets)          # mean cross-entropy in nats, fp32; ignores targets of -1
    logits = model(part, cache=cache)     # cache = model.new_cache(B); decoding, same values as the full forward

The loss never holds all logits at once.
A block is pre-norm with an outer residual: x + mixer(norm(x)), then x + ffn(norm(x)). To add a mixer or an FFN, write a
class that maps (B, T, C) to (B, T, C) and add it to MIXERS or FFNS.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from kernels import (Cache, CachedCodes, Documents, FixedWeights, KVCache, ResonanceCache, bit_product,
                     chunked_cross_entropy, dense_tiles, document_ages, document_convolution, document_groups,
                     document_mask, embedding, fastest_tiles, fft_size, flex_document_mask, gated_hidden, int8,
                     int8_codes, joint_linear, mode_convolution, mode_powers, real_product, rms, rows, short_filter,
                     sparse_tiles, straight_through, ternary_codes, ternary_statistics, ternary_weight, tile_codes,
                     traced, triton_tiles)


@dataclass
class GPTConfig:
    block_size: int = 256  # context length in tokens
    vocab_size: int = 8192  # entries of the vocabulary, at most 1,048,576
    n_layer: int = 3  # blocks
    n_head: int = 4  # query heads of an attention layer
    n_kv_head: int = 0  # key/value heads, shared by n_head / n_kv_head queries each (0: n_head)
    n_embd: int = 128  # width of the residual stream
    d_ff: int = 0  # hidden width of a dense FFN (0: 4 n_embd; swiglu: 8/3 n_embd, up to a multiple of 32)
    ffn: str = 'gelu'  # gelu, relu2, swiglu, trix, bitnet (a ternary swiglu), resonance or none
    mixer: str = 'attention'  # attention or resonance
    linear: str = 'dense'  # dense; bitnet: every matrix of the blocks is ternary; bitnet_ffn: the matrices of the FFNs
    norm: str = 'rmsnorm'  # rmsnorm or layernorm
    positions: str = 'rotary'  # rotary, learned or none
    rope_theta: float = 10_000.0  # rotary positions: the base of the frequencies; larger for long contexts
    qk_norm: bool = False  # RMS-normalise queries and keys, where there is attention: it bounds the attention logits
    zero_init: bool = False  # the last matrix of every branch starts at 0, so that every block starts as the identity
    embed_norm: bool = False  # RMSNorm behind the embedding, without weights
    embed_taps: int = 0  # taps of a causal filter over the embeddings, one weight per tap and channel (0: no filter)
    logit_softcap: float = 0.0  # logits become softcap * tanh(logits / softcap) (0: unchanged)
    tie_embeddings: bool = True  # one matrix for the token embedding and the head
    bias: bool = False  # biases in linear layers and LayerNorm
    dropout: float = 0.0  # after the embedding, on attention weights and on both branches
    # the masks depend on the seed and the sequences, so they are the same for any number of processes
    attention_every: int = 0  # attention in every n-th layer of a resonance model (0: in none)
    num_frequencies: int = 64  # damped oscillators of a resonance layer
    chunk_size: int = 2048  # positions that a resonance layer convolves at a time, at most: memory, not the function
    sub_norm: bool = True  # RMSNorm before the last matrix of a bitnet block (false: the plain Llama layout)
    trix_tiles: int = 8  # tiles of a TriX FFN
    trix_top_k: int = 2  # tiles a token is sent to
    trix_hidden: int = 0  # hidden units of a tile (0: n_embd)
    trix_shared: bool = False  # one more tile that is always on
    trix_router: str = 'signature'  # signature; baselines: hash (fixed tiles per token id), first (the first tiles)
    trix_cut: str = ''  # set by export.py convert: activation of the dense FFN that was cut (gelu, relu2, swiglu)
    act_bits: int = 0  # 8: activations that enter a TriX tile are rounded to int8, per token (bitnet's always are)
    document_mask: bool = False  # a token sees only its own document; a document ends with its end-of-text token
    eot_id: int = -1  # document_mask: the id of the end-of-text token (train.py takes it from the data)

    @staticmethod
    def choices():
        """{option: its allowed values}"""
        return CHOICES

    def mixers(self):
        """The name of the mixer of each layer."""
        every = self.attention_every
        return ['attention' if every and i % every == 0 else self.mixer for i in range(1, self.n_layer + 1)]

    def problems(self):
        """A list of invalid settings, one message each. Empty if the config is valid."""
        found = []
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                found.append(f'{key}={getattr(self, key)!r} is not one of {", ".join(choices)}')
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'num_frequencies', 'chunk_size',
                    'trix_tiles', 'trix_top_k'):
            if getattr(self, key) < 1:
                found.append(f'{key}={getattr(self, key)} must be at least 1')
        for key in ('n_kv_head', 'd_ff', 'trix_hidden', 'attention_every', 'embed_taps'):
            if getattr(self, key) < 0:
                found.append(f'{key}={getattr(self, key)} must not be negative')
        if not 0 <= self.dropout < 1:
            found.append(f'dropout={self.dropout} must lie in [0, 1)')
        if not 0 <= self.logit_softcap < math.inf:
            found.append(f'logit_softcap={self.logit_softcap} must not be negative')
        if not 1 < self.rope_theta < math.inf:
            found.append(f'rope_theta={self.rope_theta} must be greater than 1')
        if self.act_bits not in (0, 8):
            found.append(f'act_bits={self.act_bits} must be 0 or 8')
        if found:
            return found
        if not -1 <= self.eot_id < self.vocab_size:
            found.append(f'eot_id={self.eot_id} is outside the vocabulary of {self.vocab_size} (-1: none)')
        if self.vocab_size > 2**20:
            found.append(f'vocab_size={self.vocab_size} is over 1,048,576, the most that a tokenizer may have')
        mixers = self.mixers()
        if 'attention' in mixers:
            if self.n_embd % self.n_head:
                found.append(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
            elif self.positions == 'rotary' and (self.n_embd // self.n_head) % 2:
                head_size = self.n_embd // self.n_head
                found.append(f'rotary positions need an even head size, n_embd / n_head is {head_size}')
            if self.n_kv_head and self.n_head % self.n_kv_head:
                found.append(f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}')
        if self.attention_every and self.mixer == 'attention':
            found.append(f'attention_every={self.attention_every} is for mixer=resonance: '
                         'with mixer=attention every layer has attention')
        elif self.attention_every > self.n_layer:
            found.append(f'attention_every={self.attention_every} is more than n_layer={self.n_layer}: '
                         'no layer would have attention')
        if self.dropout and ('resonance' in mixers or self.ffn == 'resonance'):
            found.append(f'dropout={self.dropout} with resonance: a spectrum can\'t be dropped causally; use dropout=0')
        if self.ffn == 'trix' and self.trix_top_k > self.trix_tiles:
            found.append(f'trix_top_k={self.trix_top_k} is more than trix_tiles={self.trix_tiles}')
        if self.trix_cut and self.ffn != 'trix':
            found.append(f'trix_cut={self.trix_cut} needs ffn=trix')
        if self.act_bits and self.ffn not in ('trix', 'bitnet') and self.linear == 'dense':
            found.append(f'act_bits={self.act_bits} needs a ternary block: ffn=trix')
        return found


# ----------------------------------------------------------------------------------------------------------------------
# A matrix of a block, dense or ternary (BitNet b1.58, arXiv:2402.17764)

class BitLinear(nn.Linear):
    """Linear layer with ternary weights and int8 activations. `sub_norm` adds a parameter-free RMSNorm before it."""

    def __init__(self, n_in, n_out, bias, sub_norm):
        super().__init__(n_in, n_out, bias=bias)
        self.sub_norm = sub_norm
        self.int8 = True  # False: don't round activations, to compare with programs that don't round them
        self.codes = CachedCodes(ternary_codes)
        self.share = None  # set_ternary()
        self.logged = None  # int8 codes at the latest statistics()
        self.use = None  # a few tokens of the latest training forward, for statistics()

    def forward(self, x):
        x = rms(x) if self.sub_norm else x
        if self.training:
            self.use = x.detach().flatten(0, -2)[:16].clone()
        codes, scale = self.codes(self.weight)
        if self.share is not None:
            y = F.linear(int8(x), ternary_weight(self.weight, codes * scale, self.share))
        else:
            y = bit_product(x, self.weight, codes, scale) if self.int8 else F.linear(x, codes * scale)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def statistics(self):
        found, self.logged = ternary_statistics(self.weight, *ternary_codes(self.weight), self.logged)
        found['act_utilisation'] = None if self.use is None else int8_codes(self.use)[0].abs().mean().item() / 127
        return found


def linear(config, n_in, n_out, last=False):
    """A matrix of a block, of the type config.linear. `last` marks the last matrix before the residual stream."""
    if config.linear == 'bitnet':
        return BitLinear(n_in, n_out, config.bias, sub_norm=last and config.sub_norm)
    return nn.Linear(n_in, n_out, bias=config.bias)


# ----------------------------------------------------------------------------------------------------------------------
# Mixers: (B, T, C) -> (B, T, C), causal, across positions

def rotary_tables(config, device=None):
    """Cosines and sines of the rotary angles of every position, (block_size, hs / 2) each."""
    hs = config.n_embd // config.n_head
    frequency = config.rope_theta ** (-torch.arange(0, hs, 2, device=device) / hs)
    angle = torch.outer(torch.arange(config.block_size, device=device).float(), frequency)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Causal multi-head attention with grouped queries (arXiv:2305.13245) and rotary positions (arXiv:2104.09864)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.block_size, self.dropout, self.qk_norm = config.block_size, config.dropout, config.qk_norm
        hs = config.n_embd // config.n_head
        self.q_proj = linear(config, config.n_embd, self.n_head * hs)
        self.k_proj = linear(config, config.n_embd, self.n_kv_head * hs)
        self.v_proj = linear(config, config.n_embd, self.n_kv_head * hs)
        self.o_proj = linear(config, self.n_head * hs, config.n_embd, last=True)
        self.rotary = config.positions == 'rotary'
        if self.rotary:
            for name, table in zip(('cos', 'sin'), rotary_tables(config)):
                self.register_buffer(name, table, persistent=False)

    def new_cache(self, B):
        return KVCache(B, self.block_size)

    def flops_per_token(self, T):  # forward FLOPs, without the matrices
        return 4 * self.o_proj.in_features * T

    def rotate(self, x, start):  # (B, nh, T, hs); rotates pairs (i, i + hs/2), the layout of Llama checkpoints
        cos, sin = rows(self.cos, start, x.size(2)), rows(self.sin, start, x.size(2))
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)

    def forward(self, x, cache=None, documents=None):
        B, T, C = x.shape
        q, k, v = joint_linear(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k, v = (z.view(B, T, self.n_kv_head, -1).transpose(1, 2) for z in (k, v))  # (B, n_kv_head, T, hs)
        start = cache.pos if cache else 0
        if self.qk_norm:
            q, k = rms(q), rms(k)
        if self.rotary:
            q, k = self.rotate(q, start), self.rotate(k, start)
        mask, gqa = documents.mask if documents else None, self.n_kv_head != self.n_head
        if cache:
            k, v, mask = cache.append(k, v, mask)
        if isinstance(mask, BlockMask):
            y = flex_attention(q.type_as(v), k.type_as(v), v, block_mask=mask, enable_gqa=gqa)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None and not start, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class Resonance(nn.Module):
    """A bank of damped oscillators: y = q * (h (*) u + D u) with u = k v. It is causal by construction.

    A causal depthwise convolution of width 4 filters z = W x (3C). The result splits into q, k and v.
    All channels of a layer share K modes lambda_k = exp(-exp(nu_k) + i theta_k). Channel c weighs mode k by
    a_kc = magnitude e^(i phase). Its filter is h_c[t] = Re sum_k a_kc lambda_k^t, t >= 0.
    kernels.mode_convolution computes it. Decoding costs O(C K) per token at any context length. The matrices have
    4 C^2 weights, as in attention. The gates and the short filter come from Hyena (arXiv:2302.10866), the modes from
    LRU (arXiv:2303.06349). A Resonance layer can replace the mixer or the FFN.
    """
    width = 4  # taps of the short filter

    def __init__(self, config):
        super().__init__()
        C, K = config.n_embd, config.num_frequencies
        self.block_size, self.chunk_size = config.block_size, config.chunk_size
        self.in_proj = linear(config, C, 3 * C)
        self.out_proj = linear(config, C, C, last=True)
        self.short = nn.Parameter(torch.empty(self.width, 3 * C))  # tap j weighs position t - j
        self.nu, self.theta = nn.Parameter(torch.empty(K)), nn.Parameter(torch.empty(K))
        self.magnitude, self.phase = nn.Parameter(torch.empty(K, C)), nn.Parameter(torch.empty(K, C))
        self.D = nn.Parameter(torch.empty(C))

    def init_weights(self):
        """Log-spaced time constants tau from 2 to block_size, one turn per tau. h has energy 1/2 per channel."""
        K = len(self.nu)
        tau = torch.logspace(math.log10(2), math.log10(max(self.block_size, 2)), K)
        with torch.no_grad():
            self.nu.copy_(-tau.log())
            self.theta.copy_(2 * math.pi / tau)
            self.magnitude.normal_().mul_((2 / (K * tau)).sqrt()[:, None].to(self.magnitude.device))
            self.phase.uniform_(-math.pi, math.pi)
            self.short.normal_(std=0.02)[0] += 1
            nn.init.ones_(self.D)
            # q, k and v start at size 1, because they are multiplied.
            nn.init.normal_(self.in_proj.weight, std=self.in_proj.in_features ** -0.5)

    def amplitudes(self):  # real and imaginary part, (K, C) each
        return self.magnitude * self.phase.cos(), self.magnitude * self.phase.sin()

    def convolve(self, u, documents=None, dtype=torch.float32):
        """u (B, T, C) fp32 -> (B, T, C): h (*) u. With `documents`, convolves each document alone, without chunks."""
        T, (re, im) = u.size(1), self.amplitudes()
        if documents is None:
            return mode_convolution(u, self.nu, self.theta, re, im, self.chunk(T), dtype)
        h = real_product(mode_powers(self.nu, self.theta, 0, T), torch.complex(re, im))  # (T, C)
        return document_convolution(u, h, documents.age, documents.groups)

    def chunk(self, T):
        """Chunk length for T positions. At most 128 chunks, because carry_matrix has an entry per pair."""
        return min(max(self.chunk_size, -(-T // 128)), T)

    def new_cache(self, B):
        return ResonanceCache(B, self)

    def flops_per_token(self, T):  # forward FLOPs, without the matrices: two FFTs, chunk states in and out
        S, (K, C) = self.chunk(T), self.magnitude.shape
        n, chunks = fft_size(2 * S - 1), -(-T // S)
        return C * chunks / T * (5 * n * math.log2(n) + (8 * K * (S + chunks) if S < T else 0))

    def forward(self, x, cache=None, documents=None):
        z, age = self.in_proj(x), documents.age if documents else None  # (B, T, 3C)
        z = cache.short.filter(z, self.short, age) if cache else short_filter(z, self.short.type_as(z), age)
        q, k, v = z.chunk(3, -1)
        with torch.autocast(x.device.type, enabled=False):  # half-precision FFTs fail or overflow
            u = k.float() * v.float()
            y = cache.convolve(u, documents) if cache else self.convolve(u, documents, z.dtype)
            y = (q.float() * torch.addcmul(y, self.D, u)).type_as(z)
        return self.out_proj(y)


# ----------------------------------------------------------------------------------------------------------------------
# FFNs: (B, T, C) -> (B, T, C), position by position

class MLP(nn.Module):
    """act(x W_up) W_down."""

    def __init__(self, config, act):
        super().__init__()
        self.act, hidden = act, config.d_ff or 4 * config.n_embd
        self.up_proj = linear(config, config.n_embd, hidden)
        self.down_proj = linear(config, hidden, config.n_embd, last=True)

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))


def gelu(x):
    return F.gelu(x, approximate='tanh')  # as in GPT-2


def relu2(x):
    return F.relu(x).square()  # arXiv:2109.08668


def swiglu(x):
    gate, x = x.chunk(2, -1)
    return F.silu(gate) * x


ACTS = {'gelu': gelu, 'relu2': relu2, 'swiglu': swiglu}


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down, arXiv:2002.05202."""

    def __init__(self, config):
        super().__init__()
        hidden = config.d_ff or -(-8 * config.n_embd // 3 // 32) * 32
        self.gate_proj = linear(config, config.n_embd, hidden)
        self.up_proj = linear(config, config.n_embd, hidden)
        self.down_proj = linear(config, hidden, config.n_embd, last=True)

    def forward(self, x):
        gate, up = joint_linear(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class TriX(nn.Module):
    """A ternary mixture of tiles that routes by its own weights.

    Tile e has ternary matrices up (h, C) and down (C, h). Its signature sig_e is the sign of the column sums of its up
    codes. The signature is the router: the score is s_e = x . sig_e / sqrt(C). A token goes to the k tiles with the
    largest s_e + balance_e. Each tile adds 2 sigmoid(s_e) / k * down_e(RMSNorm(relu(up_e x)^2)).
    `balance` affects the choice of tiles, never the gates. Each optimizer step moves it towards even load (loss-free
    balancing, arXiv:2408.15664). No token is ever dropped.

    With trix_cut, each tile adds 2 sigmoid(slope_e s_e) * down_e(act(up_e x)). The slope starts at 0, so all tiles
    together equal the dense FFN that they were cut from. For swiglu, up is (2h, C): h gates, then h units.
    With bias, the biases of the dense FFN stay: the biases of up in their tiles, the bias of down for the whole layer.

    Four executions compute the same function:
      'dense'    every tile, masked, in two matrix products
      'loop'     tokens sorted by tile, one product per tile; the fastest on a CPU
      'grouped'  tokens sorted by tile, F.grouped_mm, no host sync
      'triton'   the same in fused kernels; 'grouped' where they do not cover the block (act_bits, trix_cut)
    """

    def __init__(self, config):
        super().__init__()
        self.execution = 'auto'  # or 'dense', 'loop', 'grouped', 'triton'
        self.share = None  # set_ternary()
        self.ternary = True  # False: use the latent weights, to compare with the dense FFN that the tiles were cut from
        E, self.k, self.n_embd = config.trix_tiles, config.trix_top_k, config.n_embd
        h = config.trix_hidden or config.n_embd
        self.n_routed, self.shared, self.int8 = E, config.trix_shared, config.act_bits == 8
        self.act = ACTS.get(config.trix_cut)
        self.slope = nn.Parameter(torch.empty(E)) if self.act else None
        # A shared tile is the last tile.
        self.up = nn.Parameter(torch.empty(E + self.shared, h * (1 + (self.act is swiglu)), config.n_embd))
        self.down = nn.Parameter(torch.empty(E + self.shared, config.n_embd, h))
        has_bias = self.act is not None and config.bias
        self.up_bias = nn.Parameter(torch.empty(self.up.shape[:2].numel())) if has_bias else None  # (E h,)
        self.down_bias = nn.Parameter(torch.empty(config.n_embd)) if has_bias else None
        self.codes = CachedCodes(tile_codes)
        self.logged = {}  # int8 codes of up and down at the latest statistics()
        self.router, self.idx = config.trix_router, None  # idx (B, T): tokens, only for the hash baseline
        if self.router == 'hash':  # k different random tiles per token id, fixed
            self.register_buffer('table', torch.rand(config.vocab_size, E).argsort(-1)[:, :self.k].contiguous())
        self.register_buffer('balance', torch.zeros(E))
        self.register_buffer('pace', torch.zeros(E))  # the latest change of the balance
        self.register_buffer('load', torch.zeros(E), persistent=False)  # tokens per tile since the last optimizer step
        self.register_buffer('seen', torch.zeros(E), persistent=False)  # tokens per tile since the last statistics()
        self.counts = None  # (E,) tokens per tile in the latest training forward

    def weights(self):
        """-> (ternary up, ternary down, signatures (E + shared, C)). Without `ternary`: the latent up and down."""
        if not self.ternary:
            return self.up, self.down, self.up.detach().sum(1).sign()
        (up, signature), (down, _) = self.codes(self.up), self.codes(self.down)
        return ternary_weight(self.up, up, self.share), ternary_weight(self.down, down, self.share), signature

    def route(self, x, up, signature):
        # x (N, C), up (E + shared, h, C), signature (E + shared, C) -> tiles, fp32 gates, both (N, k + shared)
        up, signature = up[:self.n_routed], signature[:self.n_routed]
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # the sign gets the gradient of mean / |mean|, with |mean| averaged over C
                mean = up.mean(1)  # (E, C)
                size = mean.detach().abs().mean(-1, keepdim=True).clamp(min=1e-8)
                signature = straight_through(mean / size, signature)
            scores = F.linear(x.float(), signature) / math.sqrt(self.n_embd)  # (N, E)
            if self.router == 'signature':
                tiles = (scores.detach() + self.balance).topk(self.k, -1).indices
            elif self.router == 'first':
                tiles = torch.arange(self.k, device=x.device).expand(len(x), -1)
            else:
                assert self.idx is not None and self.idx.numel() == len(x), 'hash routing: first set idx to the tokens'
                tiles = self.table[self.idx.flatten()]
            # (N, E)
            weight = 2 / self.k * scores.sigmoid() if self.act is None else 2 * (self.slope * scores).sigmoid()
            gates = weight.gather(-1, tiles)
        if self.training:
            self.counts = torch.zeros_like(self.load).scatter_add_(0, tiles.flatten(), torch.ones_like(gates).flatten())
        if self.shared:
            tiles, gates = F.pad(tiles, (0, 1), value=self.n_routed), F.pad(gates, (0, 1), value=1.0)
        return tiles, gates

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)  # (N, C)
        up, down, signature = self.weights()
        tiles, gates = self.route(x, up, signature)
        x = int8(x) if self.int8 else x
        how = self.execution if self.execution != 'auto' else self.fastest(x)
        if how == 'triton' and self.act is None and not self.int8:
            y = triton_tiles(x, up, down, tiles, gates)
        elif how == 'dense':
            y = dense_tiles(x, up, down, tiles, gates, self.hidden)
        else:
            y = sparse_tiles(x, up, down, tiles, gates, self.hidden, grouped=how != 'loop')
        return (y if self.down_bias is None else y + self.down_bias.type_as(y)).view(shape)

    def fastest(self, x):
        return fastest_tiles(x, self.up, self.k + self.shared, gated=self.act is None and not self.int8)

    def flops_per_token(self, T):  # forward FLOPs, without the matrices: the scores
        return 2 * self.n_routed * self.n_embd

    def hidden(self, z, gates, tiles=None):
        """Pre-activations z (..., h), gates (..., 1) -> (..., h). tiles: the tile of each row of z, for its biases."""
        if self.up_bias is not None:
            z = z + self.up_bias.view(-1, z.size(-1))[tiles].type_as(z)
        h = self.act(z) * gates.type_as(z) if self.act else gated_hidden(z, gates)
        return int8(h) if self.int8 else h

    @torch.no_grad()
    def statistics(self):
        """Load balance since the last call, and statistics of the codes."""
        load, found = self.seen / self.seen.sum().clamp(min=1), []
        self.seen.zero_()
        for name in ('up', 'down'):
            codes, scale = ternary_codes(getattr(self, name), (1, 2))
            part, self.logged[name] = ternary_statistics(getattr(self, name), codes, scale, self.logged.get(name))
            found.append(part)
        return {'trix_overload': (load.max() * len(load) - 1).item(),
                'trix_entropy': (-(load * load.clamp(min=1e-9).log()).sum() / math.log(max(len(load), 2))).item(),
                'trix_dead': (load == 0).float().mean().item(), **average(found)}

    @torch.no_grad()
    def update_balance(self, rate):
        """balance += u sign(mean(load) - load), with one u per tile.

        u is multiplied by 1.5 while the sign stays, up to 0.5. It halves when the sign changes, down to `rate` (as in
        Rprop, Riedmiller and Braun 1993). So the balance moves fast at first and settles later."""
        if dist.is_initialized():
            dist.all_reduce(self.load)
        if rate:
            sign = (self.load.mean() - self.load).sign()
            u = self.pace.abs() * torch.where(sign == self.pace.sign(), 1.5, 0.5)
            self.pace = u.clamp(rate, max(rate, 0.5)) * sign
            self.balance += self.pace
            self.balance -= self.balance.mean()
        self.seen += self.load
        self.load.zero_()


def average(found):  # [{key: number or None}] -> {key: mean, or None if any is None}
    values = {key: [f[key] for f in found] for key in found[0]}
    return {key: None if None in numbers else sum(numbers) / len(numbers) for key, numbers in values.items()}


MIXERS = {'attention': Attention, 'resonance': Resonance}
FFNS = {
    'gelu': lambda config: MLP(config, gelu),
    'relu2': lambda config: MLP(config, relu2),
    'swiglu': SwiGLU,
    'trix': TriX,
    'bitnet': lambda config: SwiGLU(replace(config, linear='bitnet')),
    'resonance': Resonance,
    'none': lambda config: None,
}


# ----------------------------------------------------------------------------------------------------------------------
# The model

class RMSNorm(nn.Module):
    """arXiv:1910.07467, eps 1e-6."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        return rms(x, self.weight)


NORMS = {'rmsnorm': RMSNorm, 'layernorm': lambda config: nn.LayerNorm(config.n_embd, bias=config.bias)}
CHOICES = {'mixer': MIXERS, 'ffn': FFNS, 'linear': ('dense', 'bitnet', 'bitnet_ffn'), 'norm': NORMS,
           'positions': ('rotary', 'learned', 'none'), 'trix_router': ('signature', 'hash', 'first'),
           'trix_cut': ('', *ACTS)}


class Block(nn.Module):
    def __init__(self, config, mixer):
        super().__init__()
        self.mixer_norm, self.mixer = NORMS[config.norm](config), MIXERS[mixer](config)
        self.ffn = FFNS[config.ffn](replace(config, linear='bitnet') if config.linear == 'bitnet_ffn' else config)
        self.ffn_norm = NORMS[config.norm](config) if self.ffn else None
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, caches=(None, None), documents=None):
        y, cache = self.mixer_norm(x), caches[0]
        y = self.mixer(y, cache, documents) if documents else self.mixer(y, cache)  # a simple mixer takes no documents
        x = x + self.drop(y)
        if self.ffn:
            y = self.ffn_norm(x)
            if documents and hasattr(self.ffn, 'new_cache'):  # an FFN that uses other positions: resonance
                y = self.ffn(y, caches[1], documents)
            else:
                y = self.ffn(y, caches[1]) if caches[1] else self.ffn(y)
            x = x + self.drop(y)
        return x


def new_cache(part, B):
    return part.new_cache(B) if hasattr(part, 'new_cache') else None


class GPT(nn.Module):
    """A stack of blocks between a token embedding and a head.

    Initialisation:
      embeddings, head                    N(0, 0.02), or N(0, 0.6 / sqrt(C)) at widths C over 900. So the loss starts
                                          at ln(vocab_size). Tied embeddings with embed_norm: N(0, 2.56 / C) at widths
                                          over 128, because the logit of a token for itself is C std
      matrices of the blocks              N(0, 0.02); in_proj of a resonance layer N(0, 1 / sqrt(C))
      o_proj, down_proj, out_proj, down   N(0, 0.02 / sqrt(2 n_layer)), so that the residual stream keeps its scale;
                                          0 with zero_init
      norms                               1
      biases, slopes, TriX balance        0
      taps                                identity: 1 for the current token, 0 for earlier tokens
      oscillators                         Resonance.init_weights
    """

    def __init__(self, config):
        super().__init__()
        assert not config.problems(), '; '.join(config.problems())
        assert config.eot_id >= 0 or not config.document_mask, (
            'document_mask=True needs to know which token ends a document: '
            'set eot_id to the id of the end-of-text token in GPTConfig(document_mask=True, eot_id=...)')
        self.config = config
        self.flex_devices = ('cuda',)  # where a compiled model uses FlexAttention for documents, not a mask tensor
        self.activation_checkpointing = False  # recompute each block in backward instead of keeping its activations
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == 'learned' else None
        self.taps = nn.Parameter(torch.empty(config.embed_taps, config.n_embd)) if config.embed_taps else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in config.mixers())
        self.norm = NORMS[config.norm](config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        # Tokens are counted per process, so DDP must not copy rank 0's counts.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.endswith(('.load', '.seen'))]
        if not self.wte.weight.is_meta:  # for FSDP, sharding.draw_weights draws the weights shard by shard
            self.init_weights()

    def init_weights(self):
        for name, p in self.named_parameters():
            self.init_weight(name, p)
        for module in self.modules():
            if module is not self and hasattr(module, 'init_weights'):
                module.init_weights()

    def init_weight(self, name, p):
        if name == 'taps':
            nn.init.zeros_(p.data)[0] = 1
        elif p.dim() == 1:
            (nn.init.zeros_ if name.endswith(('bias', 'slope')) else nn.init.ones_)(p)
        elif name.startswith(('wte', 'wpe', 'lm_head')):
            std = min(0.02, 0.6 / math.sqrt(self.config.n_embd))
            if self.config.embed_norm and self.config.tie_embeddings:
                std = min(std, 2.56 / self.config.n_embd)
            nn.init.normal_(p, std=std)
        else:
            last = name.endswith(('o_proj.weight', 'down_proj.weight', 'out_proj.weight', '.down'))
            scale = (0 if self.config.zero_init else 1 / math.sqrt(2 * self.config.n_layer)) if last else 1
            nn.init.normal_(p, std=0.02 * scale)

    def new_cache(self, B):
        """An empty cache to decode B sequences with `model(idx, cache=cache)`. Without gradients."""
        layers = [(new_cache(block.mixer, B), new_cache(block.ffn, B)) for block in self.blocks]
        return Cache(B, self.config.block_size, layers)

    def fixed_weights(self):
        """A context that promises that nothing changes a weight inside. Ternary codes are then made once per weight.

            with model.fixed_weights():                 # around the micro-steps of an optimizer step, or a validation
                for x, y in batches:
                    model(x, y).backward()

        Everywhere else, codes are made in every forward. So any change of a weight takes effect at once.
        Weights that FSDP shards get no cache, because the codes would need the memory that sharding saves."""
        sharded = hasattr(self, 'unshard')
        return FixedWeights([] if sharded else [m.codes for m in self.modules() if isinstance(m, (BitLinear, TriX))])

    def forward(self, idx, targets=None, cache=None, last=False, teacher=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size).

        With last=True, only the logits of the last position: (B, 1, vocab_size). With targets (B, T), the mean loss in
        nats, a scalar. teacher: the result of a teacher model's soft_targets() for idx."""
        x = self.hidden_states(idx, cache, last)
        cap = self.config.logit_softcap
        if targets is None:
            logits = self.lm_head(x)
            return cap * torch.tanh(logits / cap) if cap else logits
        return chunked_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), cap, teacher)

    @torch.no_grad()
    def soft_targets(self, idx, distill_weight):
        """Distillation with this model as the teacher: the `teacher` argument of the student's forward.

        distill_weight: the weight of the distillation term in the loss."""
        return self.hidden_states(idx).flatten(0, 1), self.lm_head.weight, self.config.logit_softcap, distill_weight

    def hidden_states(self, idx, cache=None, last=False):
        """idx (B, T) -> (B, T or 1, C): the hidden states that enter the head."""
        documents = self.documents(idx, cache) if self.config.document_mask else None
        x = self.run_blocks(self.embed(idx, cache, documents), cache, documents)
        if cache:
            cache.pos += idx.size(1)
        if self.training and torch.is_grad_enabled():
            for trix in self.trix_layers():  # not in the block, because activation checkpointing runs a block twice
                trix.load += trix.counts
        return self.norm(x[:, -1:] if last else x)

    def documents(self, idx, cache=None):
        """The Documents of idx (B, T). With a cache, idx continues the cached sequence."""
        config, start = self.config, cache.pos if cache else 0
        before = idx.new_zeros(len(idx)) if cache is None or cache.age is None else cache.age
        found = Documents(document_ages(idx, config.eot_id, before))
        if cache:
            cache.keep_age((found.age[:, -1] + 1).masked_fill(idx[:, -1] == config.eot_id, 0))
        mixers = config.mixers()
        if 'attention' in mixers:
            can_flex = not cache and not config.dropout and config.n_embd // config.n_head >= 16
            flex = traced() and idx.device.type in self.flex_devices and can_flex
            n = config.block_size if torch.is_tensor(start) else start + idx.size(1)
            found.mask = flex_document_mask(found.age) if flex else document_mask(found.age, start, n)
        if ('resonance' in mixers or config.ffn == 'resonance') and not traced() and not (cache and idx.size(1) == 1):
            found.groups = document_groups(found.age)
        return found

    def embed(self, idx, cache=None, documents=None):  # (B, T) -> (B, T, C): the input of the first block
        start, T = cache.pos if cache else 0, idx.size(1)
        assert T <= self.config.block_size, f'{T} positions, but block_size is {self.config.block_size}'
        if cache:
            cache.check(idx)
        x = embedding(idx, self.wte.weight) if traced() and not cache else self.wte(idx)  # (B, T, C)
        age = documents.age if documents else None
        if self.wpe and documents:  # positions restart in each document
            x = x + (embedding(age, self.wpe.weight) if traced() else self.wpe(age))
        elif self.wpe:
            x = x + rows(self.wpe.weight, start, T)
        x = rms(x) if self.config.embed_norm else x
        if self.taps is not None:
            x = cache.short.filter(x, self.taps, age) if cache else short_filter(x, self.taps.type_as(x), age)
        x = self.drop(x)
        if self.config.trix_router == 'hash':
            for trix in self.trix_layers():
                trix.idx = idx
        return x

    def run_blocks(self, x, cache, documents=None):  # (B, T, C) -> (B, T, C): all blocks
        for i, block in enumerate(self.blocks):
            caches = cache.layers[i] if cache else (None, None)
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                arguments = (x, caches, documents) if documents else (x,)
                x = checkpoint(block, *arguments, use_reentrant=False)
            elif documents:
                x = block(x, caches, documents)
            else:
                x = block(x, caches) if cache else block(x)
        return x

    def trix_layers(self):
        return [block.ffn for block in self.blocks if isinstance(block.ffn, TriX)]

    def set_top_k(self, k):
        for trix in self.trix_layers():
            trix.k = k

    def set_ternary(self, share):
        """Below 1, ternary weights have gone this share of the way from their latent weights to their codes."""
        for module in self.modules():
            if isinstance(module, (BitLinear, TriX)):
                if module.share is None and share < 1:
                    module.share = torch.empty((), device=next(module.parameters()).device)
                module.share = module.share.fill_(share) if share < 1 else None

    def update_balance(self, rate):
        """Move every TriX layer towards even load. Call once per optimizer step."""
        for trix in self.trix_layers():
            trix.update_balance(rate)

    def statistics(self):
        """Statistics of the blocks since the last call: overload of the worst layer, means of the other values."""
        found = []
        for block in self.blocks:
            sharded = hasattr(block, 'unshard')  # FSDP2: each process holds one shard of the weights
            if sharded:
                block.unshard()
            found += [module.statistics() for module in block.modules() if hasattr(module, 'statistics')]
            if sharded:
                block.reshard()
        keys = dict.fromkeys(key for f in found for key in f)
        result = {key: average([{key: f[key]} for f in found if key in f])[key] for key in keys}
        if self.trix_layers():
            result['trix_overload'] = max(f['trix_overload'] for f in found if 'trix_overload' in f)
        return result

    def decay_params(self):
        """The parameters with weight decay: matrices, but not norms, biases, taps or oscillator parameters."""
        return [p for name, p in self.named_parameters()
                if p.dim() > 1 and not name.endswith(('magnitude', 'phase', 'taps'))]

    # ---- counts

    def parameter_table(self):
        """[(kind, parameters, parameters that a token uses)]. A tied matrix counts once, as the head."""
        kinds = {'embedding': [0, 0], 'mixer': [0, 0], 'ffn': [0, 0], 'norm': [0, 0], 'head': [0, 0]}
        for name, p in self.named_parameters():
            part = name.split('.')[2] if name.startswith('blocks.') else name.split('.')[0]
            kind = {'wte': 'head' if self.config.tie_embeddings else 'embedding', 'wpe': 'embedding',
                    'taps': 'embedding', 'lm_head': 'head', 'mixer': 'mixer', 'ffn': 'ffn'}.get(part, 'norm')
            kinds[kind][0] += p.numel()
            kinds[kind][1] += self.active_params(name, p)
        return [(kind, *counts) for kind, counts in kinds.items()]

    def active_params(self, name, p):
        """The number of weights in parameter p that one token uses."""
        if name.endswith(('.up', '.down', '.up_bias')):
            shared = self.config.trix_shared
            return p.numel() // (self.config.trix_tiles + shared) * (self.config.trix_top_k + shared)
        return p.numel()

    def flops_per_token(self, T=None):
        """Forward + backward FLOPs per token at context length T, counted as in PaLM (arXiv:2204.02311, appendix B).

        6 per used matrix weight. 12 n_embd T per attention layer, without halving for causality. 2.5 n log2 n per real
        FFT of size n. Work that does not grow with the batch (filters, ternary codes) does not count."""
        T, c = T or self.config.block_size, self.config
        matrices = c.vocab_size * c.n_embd + sum(self.active_params(name, p) for name, p in self.named_parameters()
                                                 if name.endswith(('proj.weight', '.up', '.down')))
        mixing = sum(part.flops_per_token(T) for block in self.blocks for part in (block.mixer, block.ffn)
                     if hasattr(part, 'flops_per_token'))
        return 6 * matrices + 3 * mixing
