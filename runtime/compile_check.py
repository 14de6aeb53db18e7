"""Check the results of a compiled model against eager execution. For runs with torch.compile.

    problem, note = check(model, fast, compute, device, dtype, limit, sharded_sum, lost)
"""
import time

import torch

from kernels import one_line
from optim import local_tensor
from runtime.device import is_out_of_memory
from runtime.profiling import untouched

# Allowed relative difference between compiled and eager execution: (loss, gradient norm, gradient of any parameter).
# Rounding alone causes 1e-6 in fp32, 1e-3 in TF32 and 1e-2 in half precision. Rounding can also route a few tokens to
# another TriX tile, or flip int8 codes of BitNet. Then the gradients of those tokens change by 100 %. A wrong formula
# changes a whole gradient by 100 %.
TOLERANCE = {torch.float32: (1e-3, 0.02, 0.3), torch.bfloat16: (1e-2, 0.1, 0.6), torch.float16: (1e-2, 0.1, 0.6)}
# Ignore a gradient difference below this fraction of the norm of the whole gradient.
# A tiny gradient may be pure rounding.
NEGLIGIBLE = 1e-3


def check(model, fast, compute, device, dtype, limit, sharded_sum, lost):
    """Run one micro-batch with `model` and with `fast`, its compiled version, and compare.

    Returns (problem, note). One of them is empty.
    The model, its buffers and the random state do not change. No gradients remain in the parameters.
    compute(module): returns the loss of one micro-batch.
    limit: a context manager around the compilation.
    sharded_sum: sums per-parameter numbers over the processes if FSDP has sharded the parameters.
    lost(error): whether another process is gone. That is not a failure of the compiler."""
    def gradients(module):
        with untouched(model, device):
            loss = compute(module)
            loss.backward()
        grads = [None if p.grad is None else local_tensor(p.grad) for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return loss.item(), grads

    training = model.training
    model.train()
    try:
        expected = gradients(model)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        expected = None  # go on without a comparison: a compiled step takes less memory
    start = time.perf_counter()
    try:
        with limit:
            found = gradients(fast)
    except Exception as error:
        model.zero_grad(set_to_none=True)
        if is_out_of_memory(error) or lost(error):
            raise
        return one_line(error), ''
    finally:
        model.train(training)
    note = f'compiled in {time.perf_counter() - start:.0f} s'
    if expected is None:
        return '', f'{note}; not compared with eager execution, because the memory is too small for it'
    problem, distance = compare(model, expected, found, dtype, sharded_sum)
    if problem:
        return problem, ''
    return '', f'{note}; one micro-batch compared with eager execution: gradients {distance:.1e} apart'


def compare(model, expected, found, dtype, sharded_sum):
    """Returns (problem, distance).

    problem: the first difference beyond rounding, as text, or empty.
    distance: the norm of the difference of the whole gradients, relative to the eager norm.
    If there is a problem, distance is not relative. It is nan if the eager gradient is not finite."""
    loss_tolerance, norm_tolerance, tolerance = TOLERANCE[dtype]
    sums = []  # per parameter, sums of squares: eager gradient, compiled gradient, difference
    for a, b in zip(expected[1], found[1]):
        a, b = (torch.zeros(()) if g is None else g.double() for g in (a, b))
        sums += [a.square().sum(), b.square().sum(), (a - b).square().sum()]
    sums = torch.tensor(sharded_sum(*(float(s) for s in sums))).view(-1, 3)  # (parameters, 3)
    whole = sums.sum(0).sqrt()
    if not whole[0].isfinite():  # no comparison is possible; the training loop reports such a step
        return '', float('nan')
    (norm, other, distance), names = whole.tolist(), [name for name, _ in model.named_parameters()]
    if not abs(found[0] - expected[0]) <= loss_tolerance * abs(expected[0]):
        return f'the loss is {found[0]:.6g}, in eager execution {expected[0]:.6g}', distance
    if not abs(other - norm) <= norm_tolerance * norm:
        return f'the norm of the gradient is {other:.4g}, in eager execution {norm:.4g}', distance
    apart = [name for name, (a, b, d) in zip(names, sums.sqrt().tolist()) if d > max(tolerance * a, NEGLIGIBLE * norm)]
    if apart:
        return f'{len(apart)} of {len(names)} gradients are wrong ({apart[0]} is the first)', distance
    return '', distance / norm if norm else 0.0
