"""Multiply vectors with matrices of packed ternary codes on a GPU, in Triton. ternary.cpp does the same on the CPU.

packed.py imports this file if there is a GPU. Without one, TRITON_INTERPRET=1 runs the kernel on the CPU, slowly.
"""
import torch
import triton
import triton.language as tl

PROGRAMS = 256  # fewer programs would leave some of a GPU's processors idle

@triton.jit
def kernel(x, size, codes, scale, chosen, y, K, M, n_bytes: tl.constexpr, FAN: tl.constexpr, EXACT: tl.constexpr,
           ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Program (r, p): ROWS rows of matrix chosen[p], times row p / FAN of x."""
    p = tl.program_id(1)
    matrix = tl.load(chosen + p)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BYTES), tl.int32 if EXACT else tl.float32)  # summed over its columns once, at the end
    for first in range(0, n_bytes, BYTES):
        byte = first + tl.arange(0, BYTES)
        four = tl.load(codes + (matrix * M + row[:, None]) * n_bytes + byte[None, :],
                       mask=(row[:, None] < M) & (byte[None, :] < n_bytes), other=0).to(tl.int32)
        for j in tl.static_range(4):
            code = (four >> (2 * j)) & 3
            code = tl.where(code == 2, -1, code)
            value = tl.load(x + p // FAN * K + 4 * byte + j, mask=4 * byte + j < K, other=0)
            total += code * value.to(tl.int32)[None, :] if EXACT else code.to(tl.float32) * value[None, :]
    unit = tl.load(scale + matrix)
    unit = unit / tl.load(size + p // FAN) if EXACT else unit
    tl.store(y + p * M + row, tl.sum(total, 1).to(tl.float32) * unit, mask=row < M)


def product(x, size, codes, scale, chosen):
    """
    The products of P pairs of a matrix and a vector -> (P, M) fp32.

    Pair p multiplies matrix chosen[p] (scale * codes) with row p N / P of x.
    x (N, K), codes (E, M, ceil(K / 4)) uint8, scale (E,), chosen (P,) int64, P a multiple of N
    size (N,): x is int8 and stands for x / size, and the sums are exact. None: x is fp32.
    """
    (N, K), (_, M, n_bytes), P = x.shape, codes.shape, len(chosen)
    y = torch.empty(P, M, device=x.device)
    n = min(256, max(16, triton.next_power_of_2(n_bytes)))
    rows = min(8, triton.next_power_of_2(max(1, M * P // PROGRAMS)))
    kernel[triton.cdiv(M, rows), P](x.contiguous(), scale if size is None else size, codes, scale, chosen.contiguous(),
                                    y, K, M, n_bytes, P // N, size is not None, rows, n)
    return y
