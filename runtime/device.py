"""Choose the device and precision, and report peak speed and memory. Every script that runs a model imports this file.

    device, dtype, why = resolve('auto', 'auto')
    with autocast(device, dtype): loss = model(idx, targets)
"""
import re
import resource
import sys
from pathlib import Path

import torch

from configurator import UserError

DTYPES = {'float32': torch.float32, 'tf32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
# Dense bf16/fp16 tensor-core peaks in TFLOP/s, as the vendors state them. Check yours before you quote an MFU.
# A key is a part of the device's name. The first key that matches wins.
PEAK_TFLOPS = {
    'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'B200': 2250, 'A100': 312, 'L40S': 362, 'L4': 121, 'A10G': 70, 'A10': 125,
    'V100': 125, 'T4': 65, 'RTX 5090': 210, 'RTX 4090': 165, 'RTX 3090': 71, 'RTX A6000': 155,
}


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
        raise UserError(f'--device={wanted}: no cuda:{index or 0}, this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}'
                        + ('' if local_rank is None else ': fewer processes by --nproc_per_node'))
    device = torch.device(device)

    if dtype != 'auto' and dtype not in DTYPES:
        raise UserError(f'--dtype={dtype}: expected auto, {", ".join(DTYPES)}')
    if dtype == 'float16' and kind == 'cpu':
        raise UserError('--dtype=float16 needs a GPU; on the CPU use float32')
    if dtype == 'tf32' and (kind != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f'--dtype=tf32 needs an NVIDIA GPU of capability 8.0 (Ampere) or later; on {device} use float32')
    if dtype == 'auto':
        if kind != 'cuda':
            dtype, why = 'float32', 'half precision is slow on most CPUs' if kind == 'cpu' else 'the safe choice on MPS'
        elif torch.cuda.is_bf16_supported(including_emulation=False):
            dtype, why = 'bfloat16', 'the GPU has it'
        else:
            dtype, why = 'float16', 'the GPU has no bfloat16; gradients are scaled'
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
    if device.type != 'cuda' or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gb(device):
    """Peak memory so far, in GB: tensors on a CUDA GPU, otherwise the resident memory of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    if Path('/proc/self/status').exists():  # ru_maxrss also counts the memory that the process held before exec
        return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024 / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
