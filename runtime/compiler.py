"""Decide whether to use torch.compile, and set it up. compile_check.py checks its results against eager execution.

    use, why = choose('auto', device)                      # the option `compile`, and one line that says why
    fast = compiled(model)                                 # the first call compiles
"""
import importlib.util
import tempfile

import torch

from configurator import UserError

BACKEND = 'inductor'
# On a CPU, `auto` compiles only runs of at least this many tokens.
# Compilation pays off after 0.4 to 3.3 million tokens on two cores (measured by bench.py compile).
PAYS_ON_CPU = 10_000_000


def choose(setting, device, tokens=0):
    """The option `compile` (auto, true, false) -> (bool, one line that says why).

    tokens: the number of training tokens in the run. Raises UserError if `true` cannot work here."""
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
    """Why torch.compile cannot work on this device, as text. Empty if it can."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    try:
        tempfile.TemporaryFile(dir=cache_dir()).close()
    except OSError as error:
        return (f'{error.filename or "its cache"} cannot be written ({error.strerror}), '
                'set TORCHINDUCTOR_CACHE_DIR to another directory')
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) < (7, 0):
            return 'the GPU is older than Triton supports (compute capability 7.0)'
        return '' if importlib.util.find_spec('triton') else 'the package triton is missing'
    if device.type == 'cpu':
        from torch._inductor import cpp_builder, exc  # imported here because it takes seconds
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return 'no C++ compiler is installed'
    return ''


def compiled(model):
    """torch.compile(model), with the settings that exact resuming and --anneal_steps need."""
    import torch._functorch.config
    import torch._inductor.config
    # Activation checkpointing runs a block twice. Its side effects (TriX counts the tokens per tile) must count once.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch._dynamo.config.recompile_limit = 64  # --anneal_steps compiles once for each number of tiles
    torch._inductor.config.fallback_random = True  # dropout masks equal those of eager execution
    # Do not choose reductions by timing. Otherwise a killed run could not resume exactly.
    torch._inductor.config.deterministic = True
    # Compile everything in the first forward, in the main thread, where Interrupt.limit() can stop it.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    return torch.compile(model, backend=BACKEND)
