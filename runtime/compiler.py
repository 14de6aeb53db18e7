"""torch.compile: whether it is used, how, and a check that it computes what eager execution computes.

    use, why = choose('auto', device)                      # the option `compile`, and one line that says why
    fast = compiled(model)                                 # compilation itself comes with the first call
    problem, note = check(model, fast, compute, dtype)     # compute(module) -> loss of one micro-batch
"""
import importlib.util
import tempfile
import time

import torch

from configurator import UserError
from optim import local_tensor
from runtime.profiling import is_out_of_memory, untouched

# How far compiled and eager may be apart: the loss, the norm of the gradient, and the gradient of any parameter, all relative.
# Rounding alone makes 1e-6 in fp32, 1e-3 in TF32 and 1e-2 in half precision. It also sends a few tokens to another TriX tile and tips int8 codes
# of BitNet over, which moves the gradients of those tokens by their own size. A wrong formula moves a whole gradient by its own size.
TOLERANCE = {torch.float32: (1e-3, 0.02, 0.3), torch.bfloat16: (1e-2, 0.1, 0.6), torch.float16: (1e-2, 0.1, 0.6)}
BACKEND = 'inductor'
NEGLIGIBLE = 1e-3  # a parameter whose gradient is smaller than this part of the whole is not compared: it may be nothing but rounding


PAYS_ON_CPU = 10_000_000  # tokens of a run: it is repaid after 0.4 to 3.3 million on two cores (bench.py compile)


def choose(setting, device, tokens=0):
    """The option `compile` (auto, true, false) -> (bool, one line that says why), for a run of so many tokens. UserError for true
    where it can't work."""
    if setting in ('false', '0'):
        return False, 'compile off, as asked'
    if setting not in ('auto', 'true', '1'):
        raise UserError(f'--compile={setting}: expected auto, true or false')
    if setting == 'auto' and device.type == 'cpu' and tokens < PAYS_ON_CPU:
        return False, f'compile off: it pays from {PAYS_ON_CPU / 1e6:.0f}M tokens on (--compile=true to try)'
    if setting == 'auto' and device.type not in ('cpu', 'cuda'):
        return False, f'compile off: not measured on {device.type} yet (--compile=true to try)'
    missing = obstacle(device)
    if missing and setting == 'auto':
        return False, f'compile off: {missing}'
    if missing:
        raise UserError(f'--compile=true: {missing}; use --compile=false')
    return True, 'compile on: the first step takes a minute' if setting == 'auto' else 'compile on, as asked'


def obstacle(device):
    """What torch.compile lacks on this device, in words; empty if nothing."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    try:
        tempfile.TemporaryFile(dir=cache_dir()).close()
    except OSError as error:
        return f'{error.filename or "its cache"} can\'t be written ({error.strerror}), set TORCHINDUCTOR_CACHE_DIR to another directory'
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) < (7, 0):
            return 'the GPU is older than Triton supports (compute capability 7.0)'
        return '' if importlib.util.find_spec('triton') else 'the package triton is missing'
    if device.type == 'cpu':
        from torch._inductor import cpp_builder, exc  # here, because it takes seconds
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return 'no C++ compiler is installed'
    return ''


def compiled(model):
    """torch.compile(model)"""
    import torch._functorch.config
    import torch._inductor.config
    # With activation checkpointing a block runs twice. What it counts on the side (TriX: tokens a tile) counts once.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch._dynamo.config.recompile_limit = 64  # --anneal_steps: one compilation for each number of tiles
    torch._inductor.config.fallback_random = True  # dropout draws the masks that eager execution draws
    torch._inductor.config.deterministic = True  # no choice between reductions by timing, so that a run goes on exactly after a kill
    torch._functorch.config.force_non_lazy_backward_lowering = True  # all in the first forward, in the main thread: it can be broken off
    return torch.compile(model, backend=BACKEND)


def check(model, fast, compute, device, dtype, limit, sharded_sum, lost):
    """Compute one micro-batch by `model` and by `fast`, the same model compiled, and compare -> (problem, note), one of them empty.

    compute(module) -> loss, whose gradients are left in no parameter. The model, its buffers and the random state are left as they
    were. limit: a context in which the compilation happens. sharded_sum: of numbers of parameters, over the
    processes where FSDP has split them. lost(error): whether another process is gone, which is no failure of the compiler."""
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
        expected = None  # a compiled step takes less memory
    start = time.perf_counter()
    try:
        with limit:
            found = gradients(fast)
    except Exception as error:
        model.zero_grad(set_to_none=True)
        if is_out_of_memory(error) or lost(error):
            raise
        return f'{type(error).__name__}: {first_line(error)}', ''
    finally:
        model.train(training)
    note = f'compiled in {time.perf_counter() - start:.0f} s'
    if expected is None:
        return '', f'{note}; not compared with eager execution, for which the memory is too small'
    problem, distance = compare(model, expected, found, dtype, sharded_sum)
    return problem, '' if problem else f'{note}; one micro-batch compared with eager execution: gradients {distance:.1e} apart'


def compare(model, expected, found, dtype, sharded_sum):
    """-> (what differs by more than rounding, in words, or empty; relative distance of the whole gradients)"""
    loss_tolerance, norm_tolerance, tolerance = TOLERANCE[dtype]
    sums = []  # of each parameter: squares of the eager gradient, of the compiled one, of their difference
    for a, b in zip(expected[1], found[1]):
        a, b = (torch.zeros(()) if g is None else g.double() for g in (a, b))
        sums += [a.square().sum(), b.square().sum(), (a - b).square().sum()]
    sums = torch.tensor(sharded_sum(*(float(s) for s in sums))).view(-1, 3)  # (parameters, 3)
    whole = sums.sum(0).sqrt()
    if not whole[0].isfinite():  # nothing to compare with; the loop says what is wrong with such a step
        return '', float('nan')
    (norm, other, distance), names = whole.tolist(), [name for name, _ in model.named_parameters()]
    if not abs(found[0] - expected[0]) <= loss_tolerance * abs(expected[0]):
        return f'the loss is {found[0]:.6g}, in eager execution {expected[0]:.6g}', distance
    if not abs(other - norm) <= norm_tolerance * norm:
        return f'the norm of the gradient is {other:.4g}, in eager execution {norm:.4g}', distance
    apart = [name for name, (a, b, d) in zip(names, sums.sqrt().tolist()) if d > max(tolerance * a, NEGLIGIBLE * norm)]
    if apart:
        return f'{len(apart)} of {len(names)} gradients are wrong, that of {apart[0]} first', distance
    return '', distance / norm if norm else 0.0


def first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()] + ['', '']
    return f'{lines[0]} {lines[1]}' if lines[0].endswith(':') else lines[0]
