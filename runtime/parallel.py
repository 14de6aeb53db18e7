"""Train one model with several processes, started by torchrun.

    torchrun --standalone --nproc_per_node=8 train.py config/trix_medium.py                  # DDP: a full model each
    torchrun --standalone --nproc_per_node=8 train.py config/resonance_xlarge.py --parallel=fsdp  # FSDP2: sharded model

    group = start(timeout=600)                  # without torchrun: a group of one process, with the same calls
    trained = group.wrap(model, device)         # or group.shard(model, device)
    with group.micro_step(trained, last): loss.backward()
    total, = group.sum(loss)                    # every process must make these calls, in the same order

GPU tensors use NCCL. CPU tensors use gloo. A process that fails publishes its reason in the store. The other processes
read the reason and exit.
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
from optim import full_tensor

ENVIRONMENT = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')  # torchrun sets all of them
# Words that errors about a lost process contain.
LOST = ('gloo', 'connection', 'socket', 'timed out', 'timeout', 'nccl', 'broken pipe')


class Ended(SystemExit):
    """Another process failed and has already reported the reason."""


class Group:
    """The processes of a run.

    .rank: the number of this process, from 0. .world: the number of processes.
    .main: True only in the process that writes files and prints."""

    def __init__(self, rank=0, world=1, local_rank=0, timeout=600):
        self.rank, self.world, self.local_rank, self.timeout, self.main = rank, world, local_rank, timeout, rank == 0
        self.store = None

    def connect(self, device):
        """Connect to the other processes. Raises UserError if some are missing after the timeout."""
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
        """End the run, whatever its exit code. The main process leaves last, because it may host the store.

        It waits 30 seconds at most, so a dead process cannot block it."""
        if self.store:
            with contextlib.suppress(RuntimeError):  # the process that hosts the store may be gone
                self.store.set(f'the end/{self.rank}', '')
            if self.main:
                try:
                    self.wait_for('the end', min(self.timeout, 30))
                except UserError as error:  # the work is done: a warning is enough
                    print(error, file=sys.stderr, flush=True)
            dist.destroy_process_group()

    def sum(self, *values):
        """Sum numbers over the processes, in fp64. Returns a list of floats."""
        if self.world == 1:
            return list(map(float, values))
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag):
        return bool(self.sum(bool(flag))[0])

    def gather(self, values):
        """A list of numbers, of equal length in every process -> the lists of all processes, ordered by rank."""
        if self.world == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        return [values.tolist() for values in every]

    def barrier(self, what):
        """Wait for all processes. Use each `what` only once.

        After the timeout, raises a UserError that names the missing ranks."""
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
        """Run work() in the main process first, then in the others. The others wait without a timeout."""
        if self.main:
            result = work()
            if self.store:
                self.store.set('first', 'done')
            return result
        while not self.store.check(['first']):
            # A failure that is reported after 'first' does not concern this wait.
            if self.store.check(['failure']) and not self.store.check(['first']):
                self.failed_elsewhere()
            time.sleep(0.2)
        return work()

    def same(self, what, value):
        """Raises UserError unless all processes have the same `value`, a short text."""
        if self.store:
            self.store.set(f'{what} of rank {self.rank}', value)
            self.barrier(f'the comparison of {what}')
            if (other := self.store.get(f'{what} of rank 0').decode()) != value:
                raise UserError(f'rank {self.rank} on {os.uname().nodename} has another {what} than rank 0: {value}, there {other}')

    # ---- the model

    def shard(self, model, device):
        """FSDP2: shard the parameters over the processes, in place. A GPU never holds more than one block unsharded."""
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def wrap(self, model, device):
        """DDP: wrap the model for training, so that gradients are averaged over the processes."""
        # DDP need not broadcast buffers, because TriX itself sums its balance statistics over the processes.
        # torch 2.13 deprecates broadcast_buffers. Its new option broadcasts once at the start.
        # Older versions lack that option.
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*broadcast_buffers', FutureWarning)
            return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                           broadcast_buffers=False, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def micro_step(self, trained, last):
        """Context for forward and backward. Gradients are averaged over the processes only in the last micro-step."""
        if hasattr(trained, 'set_requires_gradient_sync'):  # FSDP2
            trained.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or not isinstance(trained, DistributedDataParallel) else trained.no_sync():
            yield

    # ---- failures

    def lost(self, error):
        """Whether an error means that another process cannot be reached."""
        return self.world > 1 and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError)
                                   and any(word in str(error).lower() for word in LOST))

    def failed_elsewhere(self):
        """Raises Ended with the exit code of another process if that process has reported a failure."""
        with contextlib.suppress(RuntimeError):  # the process that hosts the store may be gone
            if self.store.check(['failure']):
                code, rank, reason = self.store.get('failure').decode().split(' ', 2)
                if int(rank) != self.rank:
                    self.store.add('heard', 1)
                    print(f'rank {self.rank}: ended, because rank {rank} said: {reason}', file=sys.stderr, flush=True)
                    raise Ended(int(code))

    @contextlib.contextmanager
    def together(self):
        """Context for all work of a run. If one process fails, all processes end and print its reason."""
        try:
            yield
        except UserError as error:
            if self.store:
                self.report(2, str(error))
            raise
        except Exception as error:
            if self.store and self.lost(error):
                time.sleep(1)  # the failed process may still be writing its reason
                self.failed_elsewhere()
                print(f'rank {self.rank}: lost another process ({first_line(error)}); it was killed, its machine can\'t be reached, '
                      f'or it took over {self.timeout} s (--dist_timeout): go on with --resume=auto', file=sys.stderr, flush=True)
                raise Ended(1) from None
            if self.store:
                self.report(1, first_line(error))
            raise

    def report(self, code, reason):
        """Publish the reason of a failure for the other processes, unless a reason is already there.

        If that earlier reason is identical, raises Ended, so that it is not printed twice."""
        mine = f'{code} {self.rank} {reason}'
        with contextlib.suppress(RuntimeError):
            there = self.store.compare_set('failure', '', mine).decode()
            if there != mine and there.split(' ', 2)[2:] == [reason]:
                self.store.add('heard', 1)
                raise Ended(code)
            patience = time.monotonic() + 3
            while self.main and self.store.add('heard', 0) < self.world - 1 and time.monotonic() < patience:
                time.sleep(0.05)  # without torchrun, the store dies with rank 0


def first_line(error):
    return str(error).strip().split('\n')[0]


def start(timeout):
    """The Group that torchrun's environment variables describe. It is not connected yet.

    Raises UserError if the variables are invalid."""
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
# State dicts, full and sharded

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


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict(state) for parameters that may be sharded. The group settings from the config stay."""
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
