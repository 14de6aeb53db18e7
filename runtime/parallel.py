"""Several processes that train one model: what torchrun starts, and the difference between one process and many.

    torchrun --standalone --nproc_per_node=8 train.py config/trix_medium.py                  # DDP: each has the whole model
    torchrun --standalone --nproc_per_node=8 train.py config/resonance_xlarge.py --parallel=fsdp   # FSDP2: each has a part

    group = start(timeout=600)                  # alone, without torchrun: the same calls, nothing to wait for
    trained = group.wrap(model, device)         # or group.shard(model, device)
    with group.micro_step(trained, last): loss.backward()
    total, = group.sum(loss)                    # every process must make these calls, in the same order

CPUs talk by gloo, GPUs by NCCL (gloo for what stays on the CPU). A process that fails leaves its reason where the others
find it, and all of them end.
"""
import contextlib
import os
import sys
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from model import OncePerStep
from optim import full_tensor

ENVIRONMENT = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')  # torchrun sets all of them
LOST = ('gloo', 'connection', 'socket', 'timed out', 'timeout', 'nccl', 'broken pipe')  # in the words of a lost peer


class Ended(SystemExit):
    """Another process has failed; it has said why."""


class Group:
    """The processes of a run; .rank from 0, .world of them, .main in the one that writes files and speaks."""

    def __init__(self, rank=0, world=1, local_rank=0, timeout=600):
        self.rank, self.world, self.local_rank, self.timeout, self.main = rank, world, local_rank, timeout, rank == 0
        self.store = None

    def connect(self, device):
        """Meet the other processes. UserError if they don't come within the timeout."""
        if self.world == 1:
            return
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        try:
            dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(seconds=self.timeout))
        except (RuntimeError, ValueError) as error:
            raise UserError(f'rank {self.rank}: the {self.world} processes have not met at {os.environ["MASTER_ADDR"]}:'
                            f'{os.environ["MASTER_PORT"]} within {self.timeout} s ({first_line(error)}): is one missing, or the '
                            'address not reachable from all nodes? --dist_timeout gives them longer') from error
        self.store = dist.distributed_c10d._get_default_store()

    def disconnect(self):
        """The end of a run, whatever its exit code. The main process, which may keep the store, leaves last, but waits for none that is gone."""
        if self.store:
            with contextlib.suppress(RuntimeError):  # the process that kept the store may be the one that is gone
                self.store.set(f'the end/{self.rank}', '')
            if self.main:
                try:
                    self.wait_for('the end', min(self.timeout, 30))
                except UserError as error:  # what there was to do is done
                    print(error, file=sys.stderr, flush=True)
            dist.destroy_process_group()

    def sum(self, *values):
        """Numbers -> their sums over the processes, in fp64."""
        if self.world == 1:
            return list(map(float, values))
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag):
        return bool(self.sum(bool(flag))[0])

    def gather(self, values):
        """A list of numbers, as long in every process -> the lists of all processes, by rank."""
        if self.world == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        return [values.tolist() for values in every]

    def barrier(self, what):
        """Wait for all processes; UserError that names those that are missing after the timeout. Once for each `what`."""
        if self.store:
            self.store.set(f'{what}/{self.rank}', '')
            self.wait_for(what)

    def wait_for(self, what, timeout=None):
        timeout = timeout or self.timeout
        end, missing = time.monotonic() + timeout, range(self.world)
        while missing := [rank for rank in missing if not self.store.check([f'{what}/{rank}'])]:
            self.failed_elsewhere()
            if time.monotonic() > end:
                raise UserError(f'rank {self.rank}: {what} was not reached within {timeout} s by rank {", ".join(map(str, missing))}: see '
                                'what they said, or give them longer by --dist_timeout')
            time.sleep(0.02)

    def first(self, work):
        """work() in the main process and then, when that is done, in the others, which wait as long as it takes."""
        if self.main:
            result = work()
            if self.store:
                self.store.set('first', 'done')
            return result
        while not self.store.check(['first']):
            if self.store.check(['failure']) and not self.store.check(['first']):  # if now it is done, a later failure may be everyone's
                self.failed_elsewhere()
            time.sleep(0.2)
        return work()

    def same(self, what, value):
        """UserError unless `value`, a short text, is the same in all processes."""
        if self.store:
            self.store.set(f'{what} of rank {self.rank}', value)
            self.barrier(f'the comparison of {what}')
            if (other := self.store.get(f'{what} of rank 0').decode()) != value:
                raise UserError(f'rank {self.rank} on {os.uname().nodename} has another {what} than rank 0: {value}, there {other}')

    # ---- the model

    def shard(self, model, device):
        """FSDP2: split the parameters of a model over the processes, in place. A GPU never holds more than a block of it whole."""
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        OncePerStep.keep = False  # ternary codes kept over a step would take the memory that sharding saves

    def wrap(self, model, device):
        """DDP: what to call in training so that gradients are averaged over the processes."""
        # Buffers: TriX sums what its balance needs over the processes by itself. torch 2.13 has another name for "not in forward", which
        # broadcasts them once at the start; older ones lack it.
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*broadcast_buffers', FutureWarning)
            return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                           broadcast_buffers=False, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def micro_step(self, trained, last):
        """Around forward and backward: gradients are averaged over the processes in the last micro-step only."""
        if hasattr(trained, 'set_requires_gradient_sync'):  # FSDP2
            trained.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or not isinstance(trained, DistributedDataParallel) else trained.no_sync():
            yield

    # ---- failures

    def lost(self, error):
        """Whether an error says that another process can't be reached any more."""
        return self.world > 1 and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError)
                                   and any(word in str(error).lower() for word in LOST))

    def failed_elsewhere(self):
        """Raise Ended, with its exit code, if another process has left its reason."""
        with contextlib.suppress(RuntimeError):  # the process that kept the store may be the one that is gone
            if self.store.check(['failure']):
                code, rank, reason = self.store.get('failure').decode().split(' ', 2)
                if int(rank) != self.rank:
                    self.store.add('heard', 1)
                    print(f'rank {self.rank}: ended, because rank {rank} said: {reason}', file=sys.stderr, flush=True)
                    raise Ended(int(code))

    @contextlib.contextmanager
    def together(self):
        """Around all that the processes do: the failure of one, with its reason, ends all."""
        try:
            yield
        except UserError as error:
            if self.store:
                self.report(2, str(error))
            raise
        except Exception as error:
            if self.store and self.lost(error):
                time.sleep(1)  # the one that failed may still be writing why
                self.failed_elsewhere()
                print(f'rank {self.rank}: lost another process ({first_line(error)}); it was killed, its machine can\'t be reached, '
                      f'or it took over {self.timeout} s (--dist_timeout): go on with --resume=auto', file=sys.stderr, flush=True)
                raise Ended(1) from None
            if self.store:
                self.report(1, first_line(error))
            raise

    def report(self, code, reason):
        """Leave the reason of a failure for the others, unless one is there: then, if it is the same, end without repeating it."""
        mine = f'{code} {self.rank} {reason}'
        with contextlib.suppress(RuntimeError):
            there = self.store.compare_set('failure', '', mine).decode()
            if there != mine and there.split(' ', 2)[2:] == [reason]:
                self.store.add('heard', 1)
                raise Ended(code)
            patience = time.monotonic() + 3
            while self.main and self.store.add('heard', 0) < self.world - 1 and time.monotonic() < patience:
                time.sleep(0.05)  # without torchrun the store ends with rank 0


def first_line(error):
    return str(error).strip().split('\n')[0]


def start(timeout):
    """The Group that torchrun's environment describes; not connected yet. UserError if that is broken."""
    there = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
    if 'RANK' not in there:
        return Group()
    if missing := [key for key in ENVIRONMENT if key not in there]:
        raise UserError(f'the environment has RANK but no {", ".join(missing)}: start several processes by torchrun')
    numbers = {key: there[key] for key in ENVIRONMENT if key != 'MASTER_ADDR'}
    if wrong := [f'{key}={value!r}' for key, value in numbers.items() if not value.isdecimal()]:
        raise UserError(f'the environment has {", ".join(wrong)}, expected numbers: start several processes by torchrun')
    rank, world, local_rank = (int(there[key]) for key in ENVIRONMENT[:3])
    if not rank < world:
        raise UserError(f'the environment has RANK={rank}, but WORLD_SIZE={world}: start several processes by torchrun')
    return Group(rank, world, local_rank, timeout)


# ----------------------------------------------------------------------------------------------------------------------
# State, whole and sharded

def whole(state, main):
    """A state dict with every sharded tensor put together in the main process (None in the others, which take part in that);
    without sharded tensors just the state."""
    if isinstance(state, dict):
        return {key: whole(value, main) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, main) for value in state)
    if not hasattr(state, 'full_tensor'):
        return state
    tensor = full_tensor(state)
    return tensor.cpu() if main else None


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict(state) for parameters that may be sharded; what the config says of the groups stays."""
    groups = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group['params']]

    def fitting(value, p):
        if hasattr(p, 'full_tensor') and torch.is_tensor(value) and value.shape == p.shape:
            from torch.distributed.tensor import distribute_tensor
            return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        return value
    moments = {i: {key: fitting(value, params[i]) for key, value in entry.items()} for i, entry in state['state'].items()}
    optimizer.load_state_dict({**state, 'state': moments})
    for group, said in zip(optimizer.param_groups, groups):
        group.update(said)
