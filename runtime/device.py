"""Choose the device and precision, and report peak speed and memory. Every script that runs a model imports this file.

    device, dtype, why = resolve('auto', 'auto')
    with autocast(device, dtype): loss = model(idx, targets)
"""
import difflib
import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import UserError

DTYPES = {'float32': torch.float32, 'tf32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16,
          'fp8': torch.bfloat16}  # fp8: see runtime/fp8.py


class Card(NamedTuple):
    """
    A GPU: its memory in GB (one number a variant) and its peak speeds in TFLOP/s.

    The maker states these speeds for dense matrices, never for sparse ones. fp16 and bf16 are tensor-core speeds with
    fp32 accumulation. fp32 is the speed of the ordinary cores. None: the card has no such mode, or the maker
    states no speed.
    """
    gb: tuple
    fp16: float
    bf16: float | None
    tf32: float | None
    fp32: float


# Keys are the makers' names without NVIDIA, GeForce, Tesla, SXM and HBM. Check yours before you quote an MFU.
CARDS = {
    'RTX 3060': Card((12,), 25.5, 25.5, 12.7, 12.7),
    'RTX 3080': Card((10,), 59.5, 59.5, 29.8, 29.8),
    'RTX 3090': Card((24,), 71, 71, 35.6, 35.6),
    'RTX 4060 Ti': Card((16, 8), 44.1, 44.1, 22.1, 22.1),
    'RTX 4070': Card((12,), 58.3, 58.3, 29.1, 29.1),
    'RTX 4080': Card((16,), 97.5, 97.5, 48.7, 48.7),
    'RTX 4090': Card((24,), 165.2, 165.2, 82.6, 82.6),
    'RTX 5070': Card((12,), 61.7, 61.7, 30.9, 30.9),
    'RTX 5080': Card((16,), 112.6, 112.6, 56.3, 56.3),
    'RTX 5090': Card((32,), 209.5, 209.5, 104.8, 104.8),
    'RTX A4000': Card((16,), 76.7, 76.7, 38.3, 19.2),
    'RTX A5000': Card((24,), 111.1, 111.1, 55.6, 27.8),
    'RTX A6000': Card((48,), 154.8, 154.8, 77.4, 38.7),
    'T4': Card((16,), 65, None, None, 8.1),
    'V100': Card((16, 32), 125, None, None, 15.7),
    'V100 PCIe': Card((16, 32), 112, None, None, 14),
    'A10': Card((24,), 125, 125, 62.5, 31.2),
    'A10G': Card((24,), 70, 70, 35, 31.5),
    'A100': Card((40, 80), 312, 312, 156, 19.5),
    'L4': Card((24,), 121, 121, 60, 30.3),
    'L40S': Card((48,), 362, 362, 183, 91.6),
    'H100': Card((80,), 989, 989, 494, 67),
    'H100 PCIe': Card((80,), 756, 756, 378, 51),
    'H200': Card((141,), 989, 989, 494, 67),
    'B200': Card((180,), 2250, 2250, 1125, 75),
    'Jetson AGX Thor': Card((122.8,), 259, 259, None, 8.1),  # a quarter of the 1,035 dense FP4 TFLOP/s stated
    'Apple M1': Card((8, 16), 2.6, 2.6, None, 2.6),  # Apple states fp32; fp16 is as fast
    'Apple M1 Max': Card((32, 64), 10.4, 10.4, None, 10.4),
    'Apple M1 Ultra': Card((64, 128), 21, 21, None, 21),
    'Apple M2': Card((8, 16, 24), 3.6, 3.6, None, 3.6),
    'Apple M2 Max': Card((32, 64, 96), 13.6, 13.6, None, 13.6),
    'Apple M2 Ultra': Card((64, 128, 192), 27.2, 27.2, None, 27.2),
}
FILLER = {'nvidia', 'geforce', 'tesla', 'rtx', 'jetson', 'agx', 'apple'}  # words that tell no card from another


def name_words(name):
    """The words that identify a card, and its GB if the name has them: 'NVIDIA A100-SXM4-80GB' -> ({'a100'}, 80.0)."""
    name = re.sub(r'(\d) ?gb', r'\1gb', name.lower())
    name = re.sub(r'rtx(\w*\d)', r'rtx \1', name)
    name = re.sub(r'(\d)ti\b', r'\1 ti', name)
    words = re.findall(r'[a-z0-9.]+', name)
    sizes = [float(word[:-2]) for word in words if re.fullmatch(r'[\d.]+gb', word)]
    ignored = re.compile(r'[\d.]+gb|sxm\d?|hbm\d?e?')
    return {word for word in words if word not in FILLER and not ignored.fullmatch(word)}, sizes[0] if sizes else None


def find_card(name):
    """The key of CARDS for the name of a card, as a user or its driver writes it. None if no card has this name.

    A word more makes another card: 'RTX 4070 Ti' and 'RTX 3060 Laptop GPU' are not in the table."""
    words, _ = name_words(name)
    keys = {frozenset(name_words(key)[0]): key for key in CARDS}
    return keys.get(frozenset(words)) or keys.get(frozenset(words - {'pcie'}))


def choose_card(name, gb=0.0):
    """
    (key of CARDS, GB of its memory) for --card=name. gb: --card_gb, which replaces the memory of the table.

    UserError if the name is unknown, or if the card has several sizes and the name does not say which."""
    key = find_card(name)
    if not key:
        names = {' '.join(sorted(name_words(known)[0])): known for known in CARDS}
        near = difflib.get_close_matches(' '.join(sorted(name_words(name)[0])), names, 4, 0.5)
        listed = ', '.join(names[each] for each in near)
        known = f'The nearest names are {listed}' if near else f'The names are {", ".join(CARDS)}'
        raise UserError(f'--card={name}: this card is not in the table. {known}. For another card, give its memory '
                        'alone: --card_gb=12')
    if gb:
        return key, gb
    sizes, written = CARDS[key].gb, name_words(name)[1]
    listed = ' or '.join(f'{size:g}' for size in sizes)
    if written and written not in sizes:
        raise UserError(f'--card={name}: {key} comes with {listed} GB. For another size, add --card_gb={written:g}')
    if not written and len(sizes) > 1:
        raise UserError(f'--card={name}: {key} comes with {listed} GB. Say which: --card="{key} {sizes[0]}GB"')
    return key, float(written or sizes[0])


def card_dtype(key):
    """The name of the precision that --dtype=auto chooses on a card of the table, as `resolve` does."""
    if key.startswith('Apple'):
        return 'float32'
    return 'bfloat16' if CARDS[key].bf16 else 'float16'


def card_flops(key, dtype, tf32=False):
    """Peak FLOP/s of a card of the table in a precision. None if the card does not have it."""
    card = CARDS[key]
    kinds = {torch.float16: card.fp16, torch.bfloat16: card.bf16, torch.float32: card.tf32 if tf32 else card.fp32}
    return kinds[dtype] * 1e12 if kinds[dtype] else None


def resolve(device, dtype, local_rank=None):
    """Config values -> (torch.device, torch.dtype, one line that says what was chosen and why).

    local_rank: the number of this process on its machine if there are several processes. Each process has its own GPU.
    Raises UserError if the device is missing or does not support the precision."""
    wanted = device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind, _, index = device.partition(':')
    if local_rank is not None and kind != 'cpu':
        if kind == 'mps' or index:
            raise UserError(f'--device={wanted}: several processes need --device=cpu, or cuda with a GPU for each')
        device, index = f'{kind}:{local_rank}', str(local_rank)
    if kind not in ('cpu', 'cuda', 'mps') or index and not index.isdigit():
        raise UserError(f'--device={wanted}: expected auto, cpu, cuda, cuda:N or mps')
    there = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}[kind]
    if not there:
        raise UserError(f'--device={wanted}: torch {torch.__version__} finds no such device here; use --device=cpu')
    if kind == 'cuda' and int(index or 0) >= torch.cuda.device_count():
        advice = '' if local_rank is None else ': start fewer processes with --nproc_per_node'
        raise UserError(f'--device={wanted}: no cuda:{index or 0}, this machine has cuda:0 to '
                        f'cuda:{torch.cuda.device_count() - 1}{advice}')
    device = torch.device(device)

    if dtype != 'auto' and dtype not in DTYPES:
        raise UserError(f'--dtype={dtype}: expected auto, {", ".join(DTYPES)}')
    if dtype == 'float16' and kind == 'cpu':
        raise UserError('--dtype=float16 needs a GPU; on the CPU use float32')
    if dtype == 'tf32' and (kind != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError('--dtype=tf32 needs an NVIDIA GPU of capability 8.0 (Ampere) or later; '
                        f'on {device} use float32')
    if dtype == 'fp8' and (kind != 'cuda' or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError('--dtype=fp8 needs an NVIDIA GPU of capability 8.9 (Ada, Hopper) or later; '
                        f'on {device} use --dtype={"bfloat16" if kind == "cuda" else "float32"}')
    if dtype == 'auto':
        if kind != 'cuda':
            dtype, why = 'float32', 'half precision is slow on most CPUs' if kind == 'cpu' else 'the safe choice on MPS'
        elif torch.cuda.is_bf16_supported(including_emulation=False):
            dtype, why = 'bfloat16', 'the GPU has it'
        else:
            dtype, why = 'float16', 'the GPU has no bfloat16; gradients are scaled'
    elif dtype == 'fp8':
        why = 'for the training steps of train.py; everything else runs in bfloat16'
    else:
        why = 'as asked'
    if kind == 'cuda':  # TF32 rounds fp32 factors to 10 mantissa bits: no loss next to half precision
        torch.set_float32_matmul_precision('highest' if dtype == 'float32' else 'high')
    name = torch.cuda.get_device_name(device) if kind == 'cuda' else f'{torch.get_num_threads()} threads'
    return device, DTYPES[dtype], f'{device} ({name}), {dtype}: {why}'


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def peak_flops(device, dtype):
    """Peak FLOP/s of the device. None if unknown, because no MFU is better than a false MFU."""
    key = find_card(torch.cuda.get_device_name(device)) if device.type == 'cuda' else None
    return card_flops(key, dtype, tf32=torch.get_float32_matmul_precision() != 'highest') if key else None


def peak_memory_gb(device):
    """Peak memory so far, in GB: tensors on a CUDA GPU, otherwise the resident memory of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    if Path('/proc/self/status').exists():  # ru_maxrss also counts the memory that the process held before exec
        return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024 / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# Words in the out-of-memory errors of CPU, CUDA and MPS.
OUT_OF_MEMORY = ("can't allocate memory", 'not enough memory', 'out of memory', 'CUBLAS_STATUS_ALLOC_FAILED',
                 'bad_alloc')


def is_out_of_memory(error):
    """Whether an exception, or one of its causes, is an out-of-memory error."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
