"""Measure the memory and time of a training step. Used by --plan, by --profile, and when a run is out of memory.

    rows = memory_breakdown(model, [optimizer], config.batch_size, device, dtype)
    print(breakdown_table(rows, device))               # parameters, ..., activations, their total, the peak so far
    print(advice(model, [optimizer], config, device, dtype))  # out of memory: ...: --batch_size=8 ... saves 3.0 GB, ...
    profile = Profile('runs/x', device)                # profile.step() after every step, profile.close() at the end

All memory figures are for eager execution. A compiled model keeps less. --plan and advice() suggest what to change from
one list, memory_options().
"""
import contextlib
import functools
import os
import sys
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from files import replacing
from kernels import FUSED_DEVICES, autocast, loss_chunk
from optim import local_tensor, state_bytes
from runtime import device as hardware
from runtime.disk import readable


# ----------------------------------------------------------------------------------------------------------------------
# Memory that forward keeps for backward

@contextlib.contextmanager
def untouched(model, device):
    """Context that restores what a forward changes: attributes and buffers of every module, and random states."""
    modules, buffers = [(m, dict(vars(m))) for m in model.modules()], [(b, b.clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            yield
    finally:
        for module, before in modules:
            vars(module).clear()
            vars(module).update(before)
            if hasattr(module, 'reshard'):  # FSDP2 keeps weights outside of blocks unsharded until backward
                module.reshard()
        for buffer, before in buffers:
            buffer.copy_(before)


def kept(model, rows, device, dtype):
    """Bytes that a forward of `rows` random sequences keeps until backward: (plain, with activation checkpointing).

    Each storage that autograd saves counts once. Parameters and buffers do not count.
    The forward here only counts bytes and keeps nothing, so it fits in memory even if a training step does not."""
    saved, inputs, place, known = {}, {}, None, {StorageWeakRef(b.untyped_storage()) for b in model.buffers()}

    def note(where, tensor):
        ref = StorageWeakRef(tensor.untyped_storage())  # while this lives, the address is not reused
        if ref not in known:
            where.setdefault(ref, (tensor.untyped_storage().nbytes(), place))

    def enter(module, args):  # looks up parameters inside forward, where FSDP has gathered them
        nonlocal place
        known.update(StorageWeakRef(local_tensor(p).untyped_storage()) for p in module.parameters())
        if module is not model:
            place = module
            note(inputs, args[0])

    def leave(*_):
        nonlocal place
        place = None

    generator, shape = torch.Generator().manual_seed(0), (rows, model.config.block_size)
    idx = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
    with untouched(model, device), contextlib.ExitStack() as stack:
        model.train()
        model.activation_checkpointing = False
        for module in (model, *model.blocks):
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        with torch.enable_grad(), autocast(device, dtype), model.fixed_weights() as fixed, \
                torch.autograd.graph.saved_tensors_hooks(lambda t: note(saved, t), lambda _: None):
            model(idx, idx)
        for t in fixed.tensors():
            note(saved, t)
    own = Counter()  # bytes per block; the key None is outside of blocks
    for ref, (size, block) in saved.items():
        own[block] += 0 if ref in inputs else size
    always = own.pop(None) + sum(size for size, _ in inputs.values())
    # Checkpointing recomputes one block at a time, so only the largest block counts.
    return sum(size for size, _ in saved.values()), always + max(own.values())


def measured(model, device, dtype):
    """Measure the bytes that forward keeps, with one and with two sequences.

    Returns (bytes per sequence, bytes per sequence with activation checkpointing, bytes independent of the batch)."""
    (one, one_checkpointed), (two, two_checkpointed) = (kept(model, rows, device, dtype) for rows in (1, 2))
    return two - one, two_checkpointed - one_checkpointed, 2 * one - two


class PeakMemory(TorchDispatchMode):
    """Context that counts the bytes of the tensors made inside: `live` exist now, `peak` is the most so far."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.storages = {}  # address: bytes of the storages that exist, 0 for those made outside

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.note(tensor, made_here=False)
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.note(tensor, made_here=True)
        return result

    def note(self, tensor, made_here):
        storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
        if storage is None or storage._cdata in self.storages:
            return
        self.storages[storage._cdata] = size = storage.nbytes() if made_here else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, address):
        self.live -= self.storages.pop(address)


def working_bytes(model, rows, device, dtype):
    """(bytes that the forward of a block keeps for its backward, bytes that the two take on top at their peak).

    The bytes on top are mostly gradients of activations. Of several kinds of blocks, the largest counts."""
    arguments, found = {}, []  # {kind of mixer: (a block, the arguments of its forward)}

    def note(block, args):
        arguments[type(block.mixer)] = block, args

    idx = torch.zeros(rows, model.config.block_size, dtype=torch.int64, device=device)
    with untouched(model, device), contextlib.ExitStack() as stack:
        model.train()
        model.activation_checkpointing = False
        for block in model.blocks:
            stack.callback(block.register_forward_pre_hook(note).remove)
        with torch.no_grad(), autocast(device, dtype):
            model(idx)
        for block, (x, *rest) in arguments.values():
            for p in block.parameters():
                p.grad = torch.zeros_like(p)  # as after an earlier micro-step
            with torch.enable_grad(), PeakMemory() as memory:
                with autocast(device, dtype):
                    y = block(x.detach().requires_grad_(), *rest)
                live = memory.live
                y.backward(torch.ones_like(y))
            found.append((live - y.nbytes, memory.peak - live))  # y is the input of the next block
            block.zero_grad(set_to_none=True)
    return max(found, key=sum)


def logit_bytes(model, rows, device, dtype):
    """Bytes of one chunk of logits in the loss. In kernels.eager_loss: in fp32, plus a copy in a lower precision."""
    positions = rows * model.config.block_size
    chunk, columns = loss_chunk(device.type, model.config.vocab_size, dtype, positions)
    if device.type in FUSED_DEVICES:
        return chunk * columns * dtype.itemsize
    return min(chunk, positions) * columns * (4 if dtype == torch.float32 else 4 + dtype.itemsize)


# ----------------------------------------------------------------------------------------------------------------------
# Memory of a whole step

COPIES = 'ternary codes, weights in low precision, the gradient of the head'


def counted(model, optimizers, world=1, sharded=False):
    """The exact memory that does not depend on the batch: [(kind, bytes, how)].

    sharded: tensors that FSDP has not sharded yet count as sharded over `world` processes."""
    def share(t):
        return local_tensor(t).nbytes // (world if sharded and local_tensor(t) is t else 1)

    optimizer_bytes, how = 0, []
    for optimizer in optimizers:
        trained = [p for group in optimizer.param_groups for p in group['params'] if p.requires_grad]
        later = sum(state_bytes(optimizer, p) for p in trained) / max(1, sum(p.nbytes for p in trained))
        kept_state = 'its state' if optimizer.state else f'{later:.3g} x the parameters after its first step'
        how.append(f'{type(optimizer).__name__}: {kept_state}')
        for p in trained:
            state = [share(t) for t in optimizer.state.get(p, {}).values() if torch.is_tensor(t)]
            optimizer_bytes += sum(state) or round(later * share(p))
    parameters = list(model.parameters())
    part = f', 1/{world} of them in this process' if sharded else ''
    return [('parameters', sum(map(share, parameters)), f'{sum(p.numel() for p in parameters):,}{part}'),
            ('buffers', sum(local_tensor(b).nbytes for b in model.buffers()), 'tables and counters'),
            ('gradients', sum(share(p) for p in parameters if p.requires_grad), f'as large as the parameters{part}'),
            ('optimizer', optimizer_bytes, '; '.join(how) + part)]


def memory_breakdown(model, optimizers, rows, device, dtype, world=1, sharded=False):
    """The memory at the end of a forward with micro-steps of `rows` sequences: [(kind, bytes, how)].

    The last row is the total. The rows include the gradients of an earlier micro-step.
    sharded: FSDP shards the model over `world` processes."""
    *a_sequence, copies = measured(model, device, dtype)
    how = 'inputs of the blocks, and one block at a time' if model.activation_checkpointing else 'kept for backward'
    activations = rows * a_sequence[model.activation_checkpointing]
    table = counted(model, optimizers, world, sharded) + [
        ('copies', copies, COPIES),
        ('activations', activations, f'{rows} x {model.config.block_size} tokens: {how}'),
        ('loss', logit_bytes(model, rows, device, dtype), 'chunks of logits')]
    total = sum(size for _, size, _ in table)
    return table + [('total', total, 'an estimate, without the workspace of kernels and libraries')]


def breakdown_table(rows, device):
    """The rows of memory_breakdown as text, plus the real peak memory of this process so far."""
    total = rows[-1][1]
    lines = ['memory of a training step:']
    lines += [f'  {kind:11s} {readable(size):>9s} {size / total:9.1%}  {how}' for kind, size, how in rows]
    peak = readable(hardware.peak_memory_gb(device) * 1e9)
    what = 'of tensors' if device.type == 'cuda' else 'of this process, Python and torch included'
    lines.append(f'  {"peak":11s} {peak:>9s} {"":9s}  measured so far, {what}')  # without a share: no part of the total
    return '\n'.join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Out of memory

def has_bfloat16(device):
    return (device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
            or device.type == 'mps' and torch.backends.mps.is_macos_or_newer(14, 0))


@dataclass(frozen=True)
class MemoryOption:
    """How a training step is run: as now (words=''), or with options that need less memory."""
    words: str  # the options, as on the command line
    note: str  # what else they change
    rows: int  # sequences in a micro-step of one process
    checkpointing: bool
    dtype: torch.dtype
    shards: int = 1  # processes that share weights, gradients and optimizer state

    def __str__(self):
        return self.words + (f' ({self.note})' if self.note else '')


def memory_options(config, rows, dtype, half, world):
    """
    Every way to save memory that the run does not use yet: a list of MemoryOption. --plan and the advice of a run that
    is out of memory show these.

    rows: sequences per micro-step. half: the 16-bit precision that the device has, or None. Smaller batches come in
    descending order, each alone and with activation checkpointing.
    """
    now = MemoryOption('', '', rows, config.activation_checkpointing, dtype)
    checkpointing = '--activation_checkpointing=true'
    smaller = [replace(now, words=f'--batch_size={n} --batch_tokens={config.batch_tokens}', note='same results', rows=n)
               for n in range(rows - 1, 0, -1) if config.batch_tokens % (n * config.block_size * world) == 0]
    options = list(smaller)
    if not config.activation_checkpointing:
        options.append(replace(now, words=checkpointing, note='same results, slower', checkpointing=True))
        options += [replace(each, words=f'{each.words} {checkpointing}', note=options[-1].note, checkpointing=True)
                    for each in smaller]
    if dtype == torch.float32 and half:
        name = str(half).removeprefix('torch.')
        options.append(replace(now, words=f'--dtype={name}', note='faster, rounds more', dtype=half))
    # train.py does not shard the scaled gradients of float16.
    if config.parallel != 'fsdp' and dtype != torch.float16:
        processes = world if world > 1 else 8
        note = f'on {processes} devices, same results'
        options.append(replace(now, words='--parallel=fsdp', note=note, shards=processes))
    return options


def advice(model, optimizers, config, device, dtype, world=1):
    """One line for a run that is out of memory: what uses the memory, and how much each unused option would save.

    Call it after the `except` clause. Inside the clause, the error still holds the tensors of the step.
    A model sharded by FSDP is not measured, because the measurement would wait for the other processes."""
    sizes = {kind: size for kind, size, _ in counted(model, optimizers, world, world > 1 and config.parallel == 'fsdp')}
    # Sequences of a micro-step in one process.
    rows = min(config.batch_size, max(1, config.batch_tokens // config.block_size // world))
    state = sizes['parameters'] + sizes['gradients'] + sizes['optimizer']
    measure = functools.cache(functools.partial(measured, model, device))

    def needed(option):
        """Bytes of weights, gradients, optimizer and one micro-step."""
        *a_sequence, copies = measure(option.dtype)
        loss = logit_bytes(model, option.rows, device, option.dtype)
        return state / option.shards + option.rows * a_sequence[option.checkpointing] + copies + loss

    half = torch.bfloat16 if has_bfloat16(device) else torch.float16 if device.type == 'cuda' else None
    now = MemoryOption('', '', rows, config.activation_checkpointing, dtype)
    options = memory_options(config, rows, dtype, half, world)
    smaller = [option for option in options if option.rows < rows and option.checkpointing == now.checkpointing]
    others = [option for option in options if option.rows == rows and (world > 1 or option.shards == 1)]
    options = smaller[:1] + others
    listed = ', '.join(f'{kind} {readable(size)}' for kind, size in sizes.items() if size and kind != 'buffers')
    text, tokens = f'out of memory: {listed}', f'{rows} x {config.block_size} tokens'
    last = 'a smaller --block_size or --n_embd (another model)'
    try:
        # Measure only if all parameters are unsharded and on this device.
        measurable = all(local_tensor(p) is p and p.device.type == device.type for p in model.parameters())
        activations = needed(now) - state if measurable else None
        saved = [(needed(now) - needed(option), str(option)) for option in options] if measurable else []
    except Exception as error:
        if not hardware.is_out_of_memory(error):
            raise
        measurable = False
    if not measurable:
        listed = ', '.join(map(str, options)) or last
        return f'{text}, and the activations of {tokens}, which could not be measured: try {listed}'
    helpful = sorted((each for each in saved if each[0] > 0.01 * (state + activations)), reverse=True)
    listed = ', '.join(f'{option} saves {readable(size)}' for size, option in helpful)
    return f'{text}, activations {readable(activations)} for {tokens}: ' + (
        listed or f'all memory options are already on; try {last}')


# ----------------------------------------------------------------------------------------------------------------------
# Time

class Profile:
    """Profiles optimizer steps and writes out_dir/profile/trace.json and table.txt.

    The `first` steps (at least 1) are warm-up. The next `steps` steps are recorded. Work between two steps, such as a
    validation, counts toward the later step. With several processes, only one creates a Profile."""

    def __init__(self, out_dir, device, first=3, steps=3, say=print):
        self.out, self.device, self.say = Path(out_dir) / 'profile', device, say
        self.first, self.steps = first, steps
        self.done = 0  # optimizer steps so far
        self.old_block = torch.empty(1)  # see step()
        kinds = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(
            activities=[kinds.CPU, kinds.CUDA] if device.type == 'cuda' else [kinds.CPU],
            record_shapes=True, profile_memory=True,
            schedule=torch.profiler.schedule(wait=first - 1, warmup=1, active=steps, repeat=1))
        with quiet_libraries():
            self.profiler.start()

    def step(self, last=False):
        """Call after every optimizer step. Does nothing once the recording is complete. last: of the run, so what
        follows (validation, samples, saving) does not count."""
        if self.profiler:
            self.done += 1
            if self.done < self.first + self.steps and not last:
                with quiet_libraries():
                    self.profiler.step()
                    # torch warns when the first block is freed whose allocation it has not seen. Free one here.
                    self.old_block = None if self.done == self.first else self.old_block
            else:
                self.close()

    def close(self):
        """Write the recorded profile, unless it is already written."""
        if not self.profiler:
            return
        profiler, self.profiler = self.profiler, None
        steps = self.done - self.first
        with quiet_libraries():
            profiler.stop()
        if steps < 1:
            return self.say(f'--profile has recorded nothing: it begins with step {self.first + 1}, and the run ended '
                            f'after step {self.done}')
        self.out.mkdir(parents=True, exist_ok=True)
        with quiet_libraries():
            table = operator_table(profiler.key_averages(), self.device, steps)
            with replacing(self.out / 'trace.json') as file:
                profiler.export_chrome_trace(file.name)
        with replacing(self.out / 'table.txt') as file:
            file.write(table.encode())
        self.say(f'{table}profile of steps {self.first + 1} to {self.done} in {self.out}: table.txt, and trace.json '
                 'for https://ui.perfetto.dev or chrome://tracing')


@contextlib.contextmanager
def quiet_libraries():
    """
    Drops what is written to standard error. The profiler's C++ libraries write lines there that mean nothing to a
    user ("USDT:...", "[W..."), and have no option that switches all of them off. Exceptions are raised as usual.
    """
    sys.stderr.flush()
    with warnings.catch_warnings(), open(os.devnull, 'wb') as nowhere:
        warnings.simplefilter('ignore')
        saved = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def operator_table(averages, device, steps, rows=15):
    """A table of the operators with the most self time, per step. MB: memory allocated minus memory freed."""
    gpu = device.type == 'cuda'
    # The time of a kernel counts for the operator that launched it.
    operators = [e for e in averages if e.device_type == torch.autograd.DeviceType.CPU]

    def time(e):
        return e.self_device_time_total if gpu else e.self_cpu_time_total
    total = sum(map(time, operators)) or 1
    slowest = sorted(operators, key=time, reverse=True)[:rows]
    names = shortened([operator_name(e.key) for e in slowest])
    width = max(map(len, [*names, 'operator']))
    gpu_title = f'{"GPU ms":>9s} ' if gpu else ''
    lines = [f'{total / steps / 1e3:.1f} ms of {"GPU" if gpu else "CPU"} time a step:',
             f'{"operator":{width}s} {"calls":>7s} {"CPU ms":>9s} {gpu_title}{"share":>6s} {"MB":>9s}']
    for name, e in zip(names, slowest):
        memory = e.self_device_memory_usage if gpu else e.self_cpu_memory_usage
        gpu_time = f'{e.self_device_time_total / steps / 1e3:9.2f} ' if gpu else ''
        lines.append(f'{name:{width}s} {e.count / steps:7.0f} {e.self_cpu_time_total / steps / 1e3:9.2f} {gpu_time}'
                     f'{time(e) / total:6.1%} {memory / steps / 1e6:9.2f}')
    return '\n'.join(lines) + '\n'


def operator_name(key):
    return 'Python between operators' if key.startswith('ProfilerStep') else key.removeprefix('autograd::engine::')


def shortened(names, width=44):
    """
    The names, each of at most `width` characters. A long name keeps its start and its end. Long names that are then
    equal, as of kernels with template arguments, get numbers.
    """
    half = (width - 7) // 2
    short = [name if len(name) <= width else f'{name[:half]}...{name[-half:]}' for name in names]
    numbers = Counter()
    for i, name in enumerate(short):
        if short.count(name) > 1 or numbers[name]:
            numbers[name] += 1
            short[i] = f'{name} #{numbers[name]}'
    return short
