"""
Packed models: ternary matrices as codes of 2 bits in one safetensors file, and decoding directly from them.

    write('model.safetensors', pack(model, 'int8'), 'int8', state)  # export.py pack; state: the dict of a checkpoint
    model, state = load_model('model.safetensors', 'cpu')  # or a run directory, or a checkpoint

A byte holds four codes, the first in its low bits: 00 = 0, 01 = +1, 10 = -1. Every row of a matrix starts at a new
byte. An int8 embedding has a scale per row. If TriX routes by its values, the input embedding has a second byte per
weight, because a small error there sends tokens to other tiles. Such files have format 2. Dense matrices of the blocks
may have 16 bits, in files of format 3. They are computed in fp32.

int8 activations are multiplied directly with the packed codes, by ternary.cpp, which is compiled on first use. So are a
few rows of other activations: TriX has them in fp32, unless act_bits=8. In all other cases, and where ternary.cpp can't
be compiled, the matrix is unpacked for the product.
"""
import ctypes
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

import checkpoint
from configurator import UserError
from deploy import pretrained
from files import replacing
from kernels import bit_product, custom_op, int8, int8_codes, one_line, rms, ternary_codes, traced
from model import GPT, Attention, BitLinear, TriX, rotary_tables

# 2: wte.weight.low, the second byte of an int8 embedding; 3: `matrices` in the metadata, the type of dense matrices
FORMATS = 'nanotrix-packed-1', 'nanotrix-packed-2', 'nanotrix-packed-3'
LOW = 254  # the second byte counts 1 / LOW of the scale of its row
EMBEDDINGS = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'int8': torch.int8}
MATRICES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
KEPT = ('config', 'tokenizer', 'step', 'data')  # entries of a checkpoint that a packed file keeps
TRITON_DEVICES = set()  # types of devices on which ternary_triton.py works, see check_triton
ROWS = 4  # up to so many rows of activations go one by one through TriX or an int8 head; more are a matrix product


# ----------------------------------------------------------------------------------------------------------------------
# Codes

def pack_codes(codes):
    """(..., K) in {-1, 0, 1} -> (..., ceil(K / 4)) uint8"""
    codes = F.pad(codes, (0, -codes.size(-1) % 4)).unflatten(-1, (-1, 4)).remainder(3).to(torch.uint8)  # -1 -> 2
    return codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6


@cache
def table(device):
    """(256, 4) fp32: the codes of every byte."""
    codes = torch.arange(256)[:, None] >> torch.tensor([0, 2, 4, 6]) & 3
    return torch.tensor([0.0, 1.0, -1.0, math.nan])[codes].to(device)


def unpack_codes(packed, K):
    """(..., ceil(K / 4)) uint8 -> (..., K) fp32 in {-1, 0, 1}"""
    return F.embedding(packed.int(), table(packed.device)).flatten(-2)[..., :K]


# ----------------------------------------------------------------------------------------------------------------------
# The library of ternary.cpp

def flags():
    found, capability = [], torch.backends.cpu.get_cpu_capability()
    if capability.startswith('AVX'):
        found = ['-mavx2']
    if capability.startswith('AVX512') and torch.cpu._is_vnni_supported():
        found += ['-mavx512bw', '-mavx512vl', '-mavx512vnni']
    return ['-O3', '-fopenmp', '-fno-math-errno', '-fno-trapping-math', '-shared', '-fPIC', *found]


def compiled(flags):
    """The library of ternary.cpp, compiled now or before, in torch's directory for extensions. OSError or
    CalledProcessError if it can't be compiled."""
    source = Path(__file__).with_name('ternary.cpp').read_bytes()
    name = hashlib.sha256(source + ' '.join(flags).encode()).hexdigest()[:16] + '.so'
    folder = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or Path.home() / '.cache' / 'torch_extensions') / 'nanotrix'
    if not (folder / name).exists():
        from torch.utils import cpp_extension
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # other processes may compile it, too
            command = [cpp_extension.get_cxx_compiler(), *flags, '-x', 'c++', '-', '-o', f'{work}/{name}']
            subprocess.run(command, input=source, check=True, capture_output=True)
            os.replace(f'{work}/{name}', folder / name)
    found = ctypes.CDLL(str(folder / name))
    for function in (found.ternary, found.tiles, found.int8_rows, found.embed, found.step):
        function.restype = None
    found.instructions.restype = ctypes.c_char_p
    return found


@cache
def library():
    """ternary.cpp for this machine. Returns None, with a warning, if compilation fails."""
    try:
        return compiled(flags())
    except (OSError, subprocess.CalledProcessError) as error:
        output = (getattr(error, 'stderr', b'') or b'').decode(errors='replace').strip()
        print('ternary.cpp cannot be compiled here, so packed weights are multiplied in plain PyTorch, slowly: '
              + (output or str(error)).splitlines()[0], file=sys.stderr)


def can_use_cpp(x):
    """Whether ternary.cpp can multiply with x."""
    return x.device.type == 'cpu' and x.dtype == torch.float32 and not traced() and library() is not None


@custom_op('nanotrix::ternary_product', mutates_args=())
def ternary_product(x: Tensor, size: Optional[Tensor], codes: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    """ternary_triton.product, as an operator that torch.compile takes as it is."""
    from deploy import ternary_triton  # here because only a GPU needs Triton
    return ternary_triton.product(x, size, codes, scale, chosen)


ternary_product.register_fake(lambda x, size, codes, scale, chosen: x.new_empty(
    chosen.size(0), codes.size(1), dtype=torch.float32))


def is_small_batch(x):
    """Whether x (..., C) is on a GPU and has so few rows that a product with it takes as long as reading the matrix."""
    return x.device.type in TRITON_DEVICES and x.numel() <= 4 * ROWS * x.size(-1)


@cache
def check_triton(device):
    """Compare a product of ternary_triton.py on this device with the plain formula -> whether packed.py uses it there.

    Prints a line if not."""
    codes, scale = torch.arange(13 * 37).view(1, 13, 37).remainder(3) - 1, torch.tensor([0.5])
    x = torch.arange(37.0)[None] - 9
    arguments = x.to(torch.int8), torch.tensor([2.0]), pack_codes(codes), scale, torch.zeros(1, dtype=torch.int64)
    try:
        found = ternary_product(*(tensor.to(device) for tensor in arguments)).cpu()
        problem = '' if torch.equal(found, x @ codes[0].float().T / 4) else 'its products are wrong'
    except Exception as error:  # not installed, or a GPU that it does not support
        problem = one_line(error)
    if problem:
        print(f'packed weights are multiplied in plain PyTorch, slowly, because Triton fails: {problem}',
              file=sys.stderr)
    else:
        TRITON_DEVICES.add(torch.device(device).type)
    return not problem


def c_struct(name, pointers, rest):
    """The ctypes class of a struct of ternary.cpp: first pointers, then other fields."""
    return type(name, (ctypes.Structure,), {'_fields_': [(key, ctypes.c_void_p) for key in pointers.split()] + rest})


def c_ints(names):
    return [(key, ctypes.c_int) for key in names.split()]


Matrix = c_struct('Matrix', 'data bias', c_ints('rows cols sub_norm') + [('scale', ctypes.c_float)])
Head = c_struct('Head', 'norm norm_bias data scale', c_ints('rows cols layer_norm') + [('softcap', ctypes.c_float)])
Embedding = c_struct('Embedding', 'data scale positions taps low',
                     c_ints('cols norm n_taps') + [('unit', ctypes.c_float)])
Tiles = c_struct('Tiles', 'up down up_scale down_scale signatures balance slope up_bias down_bias',
                 c_ints('tiles shared k h digits act'))
Layer = c_struct('Layer', 'mixer_norm mixer_bias ffn_norm ffn_bias', [
    *[(key, Matrix) for key in 'q k v o gate up down'.split()],
    ('tiles', Tiles), ('keys', ctypes.c_void_p), ('values', ctypes.c_void_p),
    *c_ints('C n_head n_kv_head positions layer_norm rotary qk_norm act')])


ACT_CODES = {'gelu': 0, 'relu2': 1, 'swiglu': 2}


def data_ptr(tensor, offset=0):
    """The address of an element of a tensor, for ctypes; None for None."""
    return None if tensor is None else tensor.data_ptr() + offset * tensor.element_size()


def pointer(tensor, offset=0):
    """data_ptr as an argument of a function of ternary.cpp."""
    return ctypes.c_void_p(data_ptr(tensor, offset))


def ternary(x, codes, scale, digits):
    """x (..., K) fp32, codes (M, ceil(K / 4)) uint8, scale a number -> (..., M) fp32: scale * codes x, where x is
    rounded to int8 (digits=1) or to 24 bits (digits=3)."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(codes))
    library().ternary(pointer(x), x.numel() // x.size(-1), x.size(-1), digits, pointer(codes), ctypes.c_float(scale),
                      len(codes), pointer(y), torch.get_num_threads())
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Modules

class PackedLinear(nn.Module):
    """A BitLinear in eval mode with packed codes. In fp32 it is bit-exact."""

    def __init__(self, codes, scale, K, bias, sub_norm):
        super().__init__()
        self.in_features, self.out_features, self.sub_norm, self.bias = K, len(codes), sub_norm, bias
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale)
        self.register_buffer('only', torch.zeros(1, dtype=torch.int64, device=codes.device))
        self.number = scale.item()

    def forward(self, x):
        x = rms(x) if self.sub_norm else x
        if can_use_cpp(x):
            y = ternary(x, self.codes, self.number, 1)
        elif is_small_batch(x):
            q, size = int8_codes(x.flatten(0, -2))
            y = ternary_product(q.to(torch.int8), size.flatten(), self.codes[None], self.scale.view(1),
                                self.only.expand(len(q)))
            y = y.view(*x.shape[:-1], -1)
        else:
            codes = unpack_codes(self.codes, self.in_features)
            y = bit_product(x, codes, codes, self.scale)
        return y if self.bias is None else y + self.bias

    def matrix(self):
        return Matrix(data_ptr(self.codes), data_ptr(self.bias), self.out_features, self.in_features, self.sub_norm,
                      self.number)


class PackedTriX(TriX):
    """A TriX FFN in eval mode with packed codes. A token reads only the tiles that it is sent to."""

    def __init__(self, config, tensors, balance):
        with SkipInit():
            super().__init__(config)
        self.h, self.cut = self.down.size(2), config.trix_cut
        del self.up, self.down, self.slope
        for name in ('balance', 'pace', 'load', 'seen'):
            self.register_buffer(name, balance if name == 'balance' else torch.zeros_like(balance), persistent=False)
        for name, tensor in {'slope': None, **tensors}.items():
            self.register_buffer(name, tensor, persistent=False)
        signatures = [unpack_codes(tile, self.n_embd).sum(0).sign() for tile in self.up_codes]
        self.register_buffer('signatures', torch.stack(signatures), persistent=False)

    def weights(self):
        return (unpack_codes(self.up_codes, self.n_embd) * self.up_scale[:, None, None],
                unpack_codes(self.down_codes, self.h) * self.down_scale[:, None, None], self.signatures)

    def forward(self, x):
        if (x.device.type != 'cpu' or traced()) and not is_small_batch(x):
            return super().forward(x)
        shape, x = x.shape, x.reshape(-1, self.n_embd)
        tiles, gates = (part.contiguous() for part in self.route(x, self.signatures, self.signatures))
        if is_small_batch(x):
            z = self.chosen(x.float(), self.up_codes, self.up_scale, tiles)
            h = self.hidden(z, gates.view(-1, 1), tiles.flatten())
            y = self.chosen(h, self.down_codes, self.down_scale, tiles).view(*tiles.shape, -1).sum(1)
            return (y if self.down_bias is None else y + self.down_bias).view(shape)
        y, own = torch.zeros_like(x), self.tiles()
        if len(x) > ROWS or not can_use_cpp(x):
            for e in range(len(self.up_codes)):
                rows, place = (tiles == e).nonzero(as_tuple=True)
                z = self.product(x[rows], self.up_codes[e], self.up_scale[e], self.n_embd)
                h = self.hidden(z, gates[rows, place][:, None], e)
                y.index_add_(0, rows, self.product(h, self.down_codes[e], self.down_scale[e], self.h).type_as(y))
            return (y if self.down_bias is None else y + self.down_bias).view(shape)
        for i in range(len(x)):
            library().tiles(ctypes.byref(own), pointer(x[i]), self.n_embd, tiles.size(1), pointer(tiles[i]),
                            pointer(gates[i]), pointer(y[i]), torch.get_num_threads())
        return y.view(shape)

    def chosen(self, x, codes, scale, tiles):  # (N, K) or (N k, K) -> (N k, M): by the tiles (N, k) that are chosen
        if not self.int8:
            return ternary_product(x, None, codes, scale, tiles.flatten())
        q, size = int8_codes(x)
        return ternary_product(q.to(torch.int8), size.flatten(), codes, scale, tiles.flatten())

    def product(self, x, codes, scale, K):  # (n, K) times a tile (M, K) -> (n, M)
        if self.int8 and can_use_cpp(x):
            return ternary(x, codes, scale.item(), 1)
        return F.linear(int8(x) if self.int8 else x, (unpack_codes(codes, K) * scale).type_as(x))

    def tiles(self):
        tensors = (self.up_codes, self.down_codes, self.up_scale, self.down_scale, self.signatures, self.balance,
                   self.slope, self.up_bias, self.down_bias)
        return Tiles(*map(data_ptr, tensors), self.n_routed, self.shared, self.k, self.h, 1 if self.int8 else 3,
                     ACT_CODES.get(self.cut, -1))

    def fastest(self, x):
        return 'dense'


class Int8Embedding(nn.Module):
    """An embedding, or a head, of int8 rows with a scale each. low: a second byte per weight, or None."""

    def __init__(self, codes, scale, low=None):
        super().__init__()
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale)
        self.register_buffer('low', low)

    @property
    def weight(self):
        return self.rows(slice(None))

    def rows(self, idx):
        codes = self.codes[idx].float()
        if self.low is not None:
            codes = codes + self.low[idx].float() / LOW
        return codes * self.scale[idx][..., None]

    def forward(self, idx):
        return self.rows(idx)


class Int8Head(Int8Embedding):
    def forward(self, x):
        if traced() and x.numel() <= ROWS * x.size(-1):  # inductor reads the codes once, and stores no fp32 weights
            return (x[..., None, :] * self.codes).sum(-1) * self.scale
        if x.numel() > ROWS * x.size(-1) or not can_use_cpp(x):
            return F.linear(x, self.weight.type_as(x))
        x, K, V = x.contiguous(), x.size(-1), len(self.codes)
        y = x.new_empty(*x.shape[:-1], V)
        for i in range(x.numel() // K):
            library().int8_rows(pointer(x, i * K), K, pointer(self.codes), pointer(self.scale), V,
                                pointer(y, i * V), torch.get_num_threads())
        return y


def whole_step_in_cpp(config):
    """Whether ternary.cpp has all blocks of such a model, so that one call decodes a token."""
    only_attention = all(name == 'attention' for name in config.mixers())
    return only_attention and config.ffn != 'resonance' and config.trix_router == 'signature'


class PackedGPT(GPT):
    """A GPT with packed weights. On a CPU, ternary.cpp decodes a token in one call if all mixers are attention."""
    decodes_in_fp32 = True  # on a GPU: see runtime/decoding.py

    def ready(self):
        """Describe the blocks for ternary.cpp, once all weights are in place. Returns the model."""
        config, self.layers = self.config, None
        if not whole_step_in_cpp(config):
            return self
        self.layers = (Layer * config.n_layer)()
        for block, to in zip(self.blocks, self.layers):
            mixer, ffn = block.mixer, block.ffn
            to.mixer_norm = data_ptr(block.mixer_norm.weight)
            to.mixer_bias = data_ptr(getattr(block.mixer_norm, 'bias', None))
            if ffn:
                to.ffn_norm = data_ptr(block.ffn_norm.weight)
                to.ffn_bias = data_ptr(getattr(block.ffn_norm, 'bias', None))
            for key in ('q', 'k', 'v', 'o', 'gate', 'up', 'down'):
                part = getattr(mixer, f'{key}_proj', None) or getattr(ffn, f'{key}_proj', None)
                if part:
                    setattr(to, key, part.matrix() if isinstance(part, PackedLinear) else
                            Matrix(data_ptr(part.weight), data_ptr(part.bias), *part.weight.shape, False, 0.0))
            if isinstance(ffn, TriX):
                to.tiles = ffn.tiles()
            to.C, to.positions = config.n_embd, config.block_size
            to.n_head, to.n_kv_head = mixer.n_head, mixer.n_kv_head
            to.layer_norm, to.rotary, to.qk_norm = config.norm == 'layernorm', mixer.rotary, mixer.qk_norm
            to.act = ACT_CODES.get(config.ffn, 2)
        head, mixer = self.lm_head, self.blocks[0].mixer
        codes, scale = (head.codes, head.scale) if isinstance(head, Int8Head) else (head.weight, None)
        self.head = Head(data_ptr(self.norm.weight), data_ptr(getattr(self.norm, 'bias', None)), data_ptr(codes),
                         data_ptr(scale), *codes.shape, config.norm == 'layernorm', config.logit_softcap)
        self.angles = (mixer.cos, mixer.sin) if mixer.rotary else (None, None)
        wte, taps = self.wte, self.taps
        if isinstance(wte, Int8Embedding):
            table, scale, low = wte.codes, wte.scale, wte.low
        else:
            table, scale, low = wte.weight, None, None
        positions = self.wpe.weight if self.wpe else None
        self.embedding = Embedding(*map(data_ptr, (table, scale, positions, taps, low)), config.n_embd,
                                   config.embed_norm, 0 if taps is None else len(taps), LOW)
        return self

    def forward(self, idx, targets=None, cache=None, last=False, teacher=None):
        if cache is None or targets is not None or idx.size(1) > 1 or self.layers is None:
            return super().forward(idx, targets, cache, last, teacher)
        if idx.device.type != 'cpu' or traced() or torch.is_tensor(cache.pos) or library() is None:
            return super().forward(idx, targets, cache, last, teacher)
        documents = self.documents(idx, cache) if self.config.document_mask else None
        return self.by_library(self.embed_next(idx, cache, documents), cache, documents)

    def embed_next(self, idx, cache, documents):
        """The next tokens (B, 1) -> (B, 1, C) fp32, the input of the first block."""
        recent, taps = cache.short.recent, self.taps is not None
        if documents is not None or taps and (recent is None or recent.dtype != torch.float32):
            return self.embed(idx, cache, documents).float()
        cache.check(idx)
        x = self.norm.weight.new_empty(len(idx), 1, self.config.n_embd)
        for b, (token,) in enumerate(idx.tolist()):
            assert 0 <= token < self.config.vocab_size, f'no token {token}'
            library().embed(ctypes.byref(self.embedding), ctypes.c_int64(token), cache.pos,
                            pointer(recent[b]) if taps else None, pointer(x[b]))
        return x

    def by_library(self, x, cache, documents=None):
        """x (B, 1, C), embeddings of the next tokens, which are overwritten -> logits (B, 1, vocab_size)"""
        hs = self.layers[0].q.rows // self.layers[0].n_head
        if not hasattr(cache, 'native'):
            cache.native = [(Layer * len(self.layers))(*self.layers) for _ in x]  # of each sequence
            cache.starts = [-1] * len(x)
        starts = [0] * len(x) if documents is None else (cache.pos - documents.age[:, 0]).tolist()
        y = x.new_empty(len(x), 1, self.config.vocab_size)
        for b, (layers, start) in enumerate(zip(cache.native, starts)):
            if start != cache.starts[b]:  # a new document: the library sees keys and values from its first position on
                cache.starts[b] = start
                for i, (kv, _) in enumerate(cache.layers):
                    k, v = kv.tensors(x.new_empty(len(x), self.layers[i].n_kv_head, 0, hs))
                    layers[i].keys, layers[i].values = data_ptr(k[b], start * hs), data_ptr(v[b], start * hs)
            angles = (pointer(table, start * hs // 2) for table in self.angles)
            library().step(layers, len(layers), ctypes.byref(self.head), pointer(x[b]), cache.pos - start, *angles,
                           pointer(y[b]), torch.get_num_threads())
        cache.pos += 1
        for kv, _ in cache.layers:
            kv.pos += 1
        return y


# ----------------------------------------------------------------------------------------------------------------------
# The file

def parts(model):
    """{name: (weight, kind)} of a GPT, kind: ternary, matrix (dense), embedding or other. A tied head, and buffers only
    for training, are left out."""
    found, seen = {}, set()
    for prefix, module in model.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, tensor in own.items():
            only_training = name in module._non_persistent_buffers_set or isinstance(module, TriX) and name == 'pace'
            if id(tensor) in seen or only_training:
                continue
            seen.add(id(tensor))
            kind = 'embedding' if prefix in ('wte', 'lm_head') else 'other'
            if isinstance(module, nn.Linear) and name == 'weight' and prefix != 'lm_head':
                kind = 'ternary' if isinstance(module, BitLinear) else 'matrix'
            if isinstance(module, TriX) and name in ('up', 'down'):
                kind = 'ternary'
            found[f'{prefix}.{name}'.lstrip('.')] = tensor, kind
    return found


def has_ternary(model):
    return any(kind == 'ternary' for _, kind in parts(model).values())


def ternary_dims(weight):
    """The dimensions that share a scale: a tile of several, or all."""
    return (1, 2) if weight.dim() == 3 else None


def routes_by_values(config):
    """Whether small changes of the embedding can send tokens to other TriX tiles."""
    return config.ffn == 'trix' and config.trix_router == 'signature'


def layout(model, embeddings, matrices, two_bytes):
    """{name in the file: (shape, dtype)}. two_bytes: whether an int8 input embedding has a second byte per weight."""
    found = {}
    for name, (tensor, kind) in parts(model).items():
        if kind == 'ternary':
            found[f'{name}.codes'] = (*tensor.shape[:-1], -(-tensor.size(-1) // 4)), torch.uint8
            found[f'{name}.scale'] = tuple(tensor.shape[:-2]), torch.float32
        elif kind == 'embedding':
            found[name] = tuple(tensor.shape), EMBEDDINGS[embeddings]
            if embeddings == 'int8':
                found[f'{name}.scale'] = tuple(tensor.shape[:1]), torch.float32
                if two_bytes and name == 'wte.weight':
                    found[f'{name}.low'] = tuple(tensor.shape), torch.int8
        elif kind == 'matrix':
            found[name] = tuple(tensor.shape), MATRICES[matrices]
        else:
            found[name] = tuple(tensor.shape), torch.int64 if tensor.dtype == torch.int64 else torch.float32
    return found


@torch.no_grad()
def pack(model, embeddings='float32', matrices='float32'):
    """The weights of a GPT as in a packed file: {name: tensor}. matrices: the type of dense matrices of the blocks.
    UserError if no matrix would become smaller."""
    if matrices == 'float32' and not has_ternary(model):
        raise UserError('this model has no ternary matrix, so there is nothing to pack in 2 bits: it has '
                        f'ffn={model.config.ffn}, linear={model.config.linear} (export.py pack --matrices=bfloat16 '
                        'stores its matrices in 16 bits)')
    tensors = {}
    for name, (value, kind) in parts(model).items():
        value = value.detach().cpu()
        if kind == 'ternary':
            codes, scale = ternary_codes(value, ternary_dims(value))
            tensors |= {f'{name}.codes': pack_codes(codes), f'{name}.scale': scale.reshape(value.shape[:-2])}
        elif kind == 'embedding' and embeddings == 'int8':
            scale = value.abs().amax(1).clamp(min=1e-12) / 127
            codes = (value / scale[:, None]).round()
            tensors |= {name: codes.to(torch.int8), f'{name}.scale': scale}
            if name == 'wte.weight' and routes_by_values(model.config):
                rest = value / scale[:, None] - codes  # -0.5 to 0.5
                tensors[f'{name}.low'] = (LOW * rest).round().to(torch.int8)
        else:
            dtype = {'embedding': EMBEDDINGS[embeddings], 'matrix': MATRICES[matrices]}.get(kind, value.dtype)
            tensors[name] = value.to(dtype).contiguous()
    return tensors


def digest(metadata, tensors):
    """sha256 over the metadata and every tensor, by name."""
    total = hashlib.sha256(json.dumps({key: metadata[key] for key in sorted(metadata) if key != 'sha256'}).encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(memoryview(tensors[name].contiguous().flatten().view(torch.uint8).numpy()))
    return total.hexdigest()


def write(path, tensors, embeddings, state, matrices='float32'):
    """Write packed tensors, whole or not at all, with the entries KEPT of `state`, the dict of their checkpoint."""
    metadata = {'format': FORMATS['wte.weight.low' in tensors], 'embeddings': embeddings,
                **{key: json.dumps(state[key]) for key in KEPT}}
    if matrices != 'float32':
        metadata |= {'format': FORMATS[2], 'matrices': matrices}
    metadata['sha256'] = digest(metadata, tensors)
    try:
        with replacing(path) as file:
            file.write(save(tensors, metadata))
    except OSError as error:
        raise UserError(f'{path}: could not be written ({error.strerror or error})')


def read(path):
    """A packed file, verified -> a dict like a checkpoint's, with `packed` ({name: tensor}), `embeddings` and
    `matrices` (their types) in place of `model`. UserError for anything else."""
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            if metadata.get('format') not in FORMATS:
                raise UserError(f'{path}: not a packed model of this project (export.py pack makes them), '
                                'or one of a later version')
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if digest(metadata, tensors) != metadata.get('sha256'):
            raise UserError(f'{path}: damaged: its content does not match its hash')
        state = {key: json.loads(metadata[key]) for key in KEPT}
    except (SafetensorError, OSError) as error:
        raise UserError(f'{path}: truncated, damaged, or not a safetensors file ({error})')
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: broken metadata ({error})')
    kinds = {'config': dict, 'tokenizer': (dict, type(None)), 'step': int, 'data': dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(state[key], kind)]:
        raise UserError(f'{path}: broken: no valid {", ".join(wrong)} in it')
    types = {'embeddings': metadata.get('embeddings'), 'matrices': metadata.get('matrices', 'float32')}
    for key, allowed in (('embeddings', EMBEDDINGS), ('matrices', MATRICES)):
        if types[key] not in allowed:
            raise UserError(f'{path}: broken: {key}={types[key]!r} is not one of {", ".join(allowed)}')
    return {**state, 'packed': tensors, **types}


def check(path, tensors, expected):
    """UserError if the tensors of a file don't fit its config, or hold invalid codes or scales."""
    problems = []
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    for what, names in (('missing', missing), ('unexpected', unexpected)):
        if names:
            more = f' and {len(names) - 3} more' if len(names) > 3 else ''
            problems.append(f'{path}: {what}: {", ".join(sorted(names)[:3])}{more}')
    for name in sorted(expected.keys() & tensors.keys()):
        tensor, (shape, dtype) = tensors[name], expected[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            problems.append(f'{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, '
                            f'but its config makes it {dtype} {shape}')
        elif name.endswith('.codes') and (tensor & tensor >> 1 & 0x55).any():
            problems.append(f'{path}: {name} has a code of value 3, which is not valid')
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            problems.append(f'{path}: {name} has values that are not finite')
    if problems:
        raise UserError(*problems[:5])


class SkipInit(TorchFunctionMode):
    """Skips initialisation, so that new tensors take addresses but no memory. (The meta device would import 800
    modules, 70 MB.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return (*args, *kwargs.values())[0] if function in INITIALISERS else function(*args, **kwargs)


INITIALISERS = {nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.zeros_, torch.Tensor.normal_,
                torch.Tensor.uniform_}


def build(config, state, path, device):
    """The GPT of a packed file (state: from `read`), in eval mode, with its codes still packed. UserError if its
    tensors don't fit."""
    with SkipInit():
        model = PackedGPT(config)
    tensors = state['packed']
    matrices, two_bytes = state.get('matrices', 'float32'), 'wte.weight.low' in tensors
    check(path, tensors, layout(model, state['embeddings'], matrices, two_bytes))
    if torch.device(device).type == 'cuda':
        check_triton(device)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    tables = rotary_tables(config, device) if config.positions == 'rotary' and 'attention' in config.mixers() else None
    for name, module in list(model.named_modules()):
        parent, _, key = name.rpartition('.')
        if isinstance(module, Attention) and tables:
            module.cos, module.sin = tables  # all layers share them
        elif isinstance(module, BitLinear):
            bias = nn.Parameter(tensors[f'{name}.bias'], False) if module.bias is not None else None
            codes, scale = tensors[f'{name}.weight.codes'], tensors[f'{name}.weight.scale']
            packed = PackedLinear(codes, scale, module.in_features, bias, module.sub_norm)
            setattr(model.get_submodule(parent), key, packed)
        elif isinstance(module, TriX):
            own = {f'{part}_{what}': tensors[f'{name}.{part}.{what}']
                   for part in ('up', 'down') for what in ('codes', 'scale')}
            more = ['table'] * (module.router == 'hash') + ['slope'] * bool(config.trix_cut)
            own |= {part: tensors[f'{name}.{part}'] for part in more}
            setattr(model.get_submodule(parent), key, PackedTriX(config, own, tensors[f'{name}.balance']))
    if state['embeddings'] == 'int8':
        head = 'wte.weight' if config.tie_embeddings else 'lm_head.weight'
        model.wte = Int8Embedding(tensors['wte.weight'], tensors['wte.weight.scale'], tensors.get('wte.weight.low'))
        model.lm_head = Int8Head(tensors[head], tensors[f'{head}.scale'])
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        source = 'wte.weight' if name == 'lm_head.weight' and config.tie_embeddings else name
        parent, _, key = name.rpartition('.')
        setattr(model.get_submodule(parent), key, nn.Parameter(tensors[source].float(), False))
    if config.tie_embeddings and state['embeddings'] != 'int8':
        model.lm_head.weight = model.wte.weight
    return model.eval().requires_grad_(False).ready()


def decodes_in_cpp(model):
    """Whether ternary.cpp would decode a token of a trained model in one call. That is faster than plain PyTorch."""
    return whole_step_in_cpp(model.config) and has_ternary(model) and library() is not None


def in_memory(model):
    """A trained GPT with packed weights, without a file. UserError if it has no ternary matrix."""
    state = {'packed': pack(model), 'embeddings': 'float32'}
    return build(model.config, state, 'packed in memory', next(model.parameters()).device)


def load_model(run, device, context=0):
    """A run directory, checkpoint, packed file or pretrained model -> (GPT in eval mode on the device, dict).

    The dict is the checkpoint's, or for a packed file the dict of read(). context: tokens per window, if not
    block_size. UserError if the model has fewer learned positions than that."""
    def note(line):
        print(line, file=sys.stderr)

    if pretrained.is_pretrained(run):
        return checkpoint.build_model(pretrained.load(run, say=note), run, device, context)
    if not str(run).endswith('.safetensors'):
        model, state = checkpoint.load_model(run, device, context)
        if (share := checkpoint.trained_share(state)) < 1 and has_ternary(model):
            note(f'{run}: step {state["step"]:,} is in the ternary warm-up: '
                 f'its weights are {100 * share:.0f} % ternary')
        return model, state
    state = read(run)
    return build(checkpoint.model_config(state, run, context), state, run, device), state
