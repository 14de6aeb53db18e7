"""The weights and the optimizer state of an FSDP2 model, of which each process holds some rows. For --parallel=fsdp.

    model = meta_model(make)                            # no memory yet; then group.shard(model, device)
    draw_weights(model)                                 # the weights that an unsharded model has
    whole(model.state_dict(), group.main)               # every tensor in full, in the main process
    own_rows_of_state(optimizer, state)                 # the other way: the rows of this process
"""
import contextlib
import mmap

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from optim import full_tensor, local_tensor, own_rows


def meta_model(make, draw=True):
    """make() -> a model for Group.shard. Its parameters are on the meta device, without memory. Its buffers are
    ordinary tensors.

    draw: its constructors draw as many random numbers as usual, so that draw_weights draws the usual weights."""
    def to_meta(module, name, p):
        return None if p is None or p.is_meta else nn.Parameter(p.to('meta'), p.requires_grad)
    handle = register_module_parameter_registration_hook(to_meta)
    try:
        with UsualDraws() if draw else contextlib.nullcontext():
            return make()
    finally:
        handle.remove()


def full_empty(shape):
    """An empty fp32 tensor on the CPU that is needed for a moment. Its memory then returns to the system.

    malloc would keep most of this memory: after building a model, more than half of the size of the model."""
    memory = mmap.mmap(-1, 4 * shape.numel())
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


class UsualDraws(TorchDispatchMode):
    """Mode in which a draw on the meta device, which takes no random numbers, takes as many as on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_) and args[0].is_meta:
            func(full_empty(args[0].shape), *args[1:], **kwargs)
        return func(*args, **kwargs)


@torch.no_grad()
def draw_weights(model):
    """GPT.init_weights for a sharded model: the same weights, with one full parameter or module at a time in memory."""
    def draw(name, p):
        full = full_empty(p.shape)
        model.init_weight(name, full)
        local_tensor(p).copy_(own_rows(full, p))
    for name, p in model.named_parameters():
        draw(name, p)
    for module in model.modules():
        if module is not model and hasattr(module, 'init_weights'):
            with full_parameters(module):
                module.init_weights()


@contextlib.contextmanager
def full_parameters(module):
    """Context in which a sharded module has full, empty parameters.

    Afterwards, each process keeps its own rows of the parameters that were written."""
    shards = [(owner, name, p, nn.Parameter(full_empty(p.shape))) for owner in module.modules()
              for name, p in owner.named_parameters(recurse=False)]
    for owner, name, _, full in shards:
        setattr(owner, name, full)
    yield
    for owner, name, p, full in shards:
        setattr(owner, name, p)
        if full._version:  # counts the writes
            local_tensor(p).copy_(own_rows(full, p))


def whole(state, main):
    """A state dict with every sharded tensor gathered on the CPU of the main process.

    Every process must call this. In the other processes, None replaces a sharded tensor.
    Values that are not sharded stay as they are."""
    if isinstance(state, dict):
        return {key: whole(value, main) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, main) for value in state)
    if not hasattr(state, 'full_tensor'):
        return state
    tensor = full_tensor(state)
    return tensor.cpu() if main else None


def own_rows_of_state(optimizer, state):
    """An optimizer's state dict in which this process reads only its own rows of the tensors of sharded parameters."""
    params = [p for group in optimizer.param_groups for p in group['params']]

    def fitting(value, p):
        if not hasattr(p, 'device_mesh') or not torch.is_tensor(value):
            return value
        if value.shape != p.shape:  # the step count
            return value.clone()  # not a part of the mapped file
        from torch.distributed.tensor import DTensor
        rows = own_rows(value, p).to(p.device, copy=True)
        return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    moments = {i: {key: fitting(value, params[i]) for key, value in entry.items()}
               for i, entry in state['state'].items()}
    return {**state, 'state': moments}
