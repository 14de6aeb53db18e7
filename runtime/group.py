"""Several processes that train one model, started by torchrun.

    group = start(timeout=600)                  # in parallel.py
    group.connect(device)
    trained = group.wrap(model, device)         # or, for model = sharding.meta_model(make), group.shard(model, device)
    with group.micro_step(trained, last): loss.backward()
    total, = group.sum(loss)                    # every process must make these calls, in the same order

GPU tensors use NCCL. CPU tensors use gloo. A process that fails publishes its reason in the store. The other processes
read the reason and exit.
"""
import contextlib
import os
import sys
import threading
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from runtime import sharding
from runtime.parallel import Ended, end_silently, load_optimizer

# Words that errors about a lost process contain.
LOST = ('gloo', 'connection', 'socket', 'timed out', 'timeout', 'nccl', 'broken pipe')


class Group:
    """
    Several processes of a run, with the methods of OneProcess.

    rank: the number of this process, from 0. world: the number of processes. local_rank: the number on this machine.
    timeout: seconds that a process waits for the others. Nothing but connect() may be called before connect().
    """

    def __init__(self, rank, world, local_rank=0, timeout=600):
        self.rank, self.world, self.local_rank, self.timeout, self.main = rank, world, local_rank, timeout, rank == 0
        self.store = None

    def connect(self, device):
        """Connect to the other processes. Raises UserError if some are missing after the timeout."""
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        try:
            dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo',
                                    timeout=timedelta(seconds=self.timeout))
        except (RuntimeError, ValueError) as error:
            raise UserError(f'rank {self.rank}: the {self.world} processes did not all connect to '
                            f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]} within {self.timeout} s '
                            f'({first_line(error)}): check that all of them run and can reach this address, '
                            'or wait longer with --dist_timeout') from error
        self.store = dist.distributed_c10d._get_default_store()

    def disconnect(self):
        """End the run, whatever its exit code. The main process leaves last, because it may host the store.

        It waits 30 seconds at most, so a dead process cannot block it."""
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
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag):
        return bool(self.sum(bool(flag))[0])

    def gather(self, values):
        """A list of numbers, of equal length in every process -> the lists of all processes, ordered by rank."""
        mine = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        return [values.tolist() for values in every]

    def barrier(self, what):
        """Wait for all processes. Use each `what` only once.

        After the timeout, raises a UserError that names the missing ranks."""
        self.store.set(f'{what}/{self.rank}', '')
        self.wait_for(what)

    def wait_for(self, what, timeout=None):
        timeout = timeout or self.timeout
        end, missing = time.monotonic() + timeout, range(self.world)
        while missing := [rank for rank in missing if not self.store.check([f'{what}/{rank}'])]:
            self.failed_elsewhere()
            if time.monotonic() > end:
                raise UserError(f'rank {self.rank}: {what} was not reached within {timeout} s by rank '
                                f'{", ".join(map(str, missing))}: see what they printed, '
                                'or wait longer with --dist_timeout')
            time.sleep(0.02)

    def first(self, work):
        """Run work() in the main process first, then in the others. The others wait as long as in `in_main`."""
        result = []
        self.in_main('first', lambda: result.append(work()))
        return result[0] if self.main else work()

    def in_main(self, what, work):
        """Run work() in the main process. All processes return its result, a text or None. Use each `what` only once.

        The others wait however long it takes, while the main process shows that it is alive. After `timeout` seconds
        without a sign of life, they raise a UserError."""
        if self.main:
            with self.heartbeat():
                result = work()
            self.store.set(what, result or '')
            return result
        self.wait_for_main(what)
        return self.store.get(what).decode()

    @contextlib.contextmanager
    def heartbeat(self):
        """Context in which a thread shows the other processes that this one is alive."""
        ended = threading.Event()

        def beat():
            with contextlib.suppress(RuntimeError):  # the store may be gone at the end of the program
                while not ended.wait(min(1, self.timeout / 4)):
                    self.store.add('heartbeat', 1)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def wait_for_main(self, what):
        beats, last_change, pause = 0, time.monotonic(), 0.005
        while not self.store.check([what]):
            # A failure that is reported after `what` does not concern this wait.
            if self.store.check(['failure']) and not self.store.check([what]):
                self.failed_elsewhere()
            before, beats = beats, self.store.add('heartbeat', 0)
            if beats != before:
                last_change = time.monotonic()
            if time.monotonic() - last_change > self.timeout:
                raise UserError(f'rank {self.rank}: no sign of life from rank 0 for {self.timeout} s: '
                                'see what rank 0 printed, and continue with --resume=auto')
            time.sleep(pause)
            pause = min(0.2, 1.5 * pause)

    def same(self, what, value):
        """Raises UserError unless all processes have the same `value`, a short text."""
        self.store.set(f'{what} of rank {self.rank}', value)
        self.barrier(f'the comparison of {what}')
        if (other := self.store.get(f'{what} of rank 0').decode()) != value:
            raise UserError(f'rank {self.rank} on {os.uname().nodename} has another {what} than rank 0: '
                            f'{value}, but rank 0 has {other}')

    # ---- the model

    def shard(self, model, device):
        """FSDP2: shard the parameters of a model on the meta device, in place. Its weights are not initialised."""
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        buffers = dict(model.named_buffers())
        model.to_empty(device=device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])

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
        skip_sync = isinstance(trained, DistributedDataParallel) and not last
        with trained.no_sync() if skip_sync else contextlib.nullcontext():
            yield

    # ---- checkpoints

    def whole(self, state):
        """A state dict with full tensors on the CPU of the main process. Every process must call this."""
        return sharding.whole(state, self.main)

    def load_optimizer(self, optimizer, state):
        load_optimizer(optimizer, sharding.own_rows_of_state(optimizer, state))

    # ---- failures

    def lost(self, error):
        """Whether an error means that another process cannot be reached."""
        return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError)
                                                     and any(word in str(error).lower() for word in LOST))

    def failed_elsewhere(self):
        """Raises Ended with the exit code of another process if that process has reported a failure."""
        with contextlib.suppress(RuntimeError):  # the process that hosts the store may be gone
            if self.store.check(['failure']):
                code, rank, reason = self.store.get('failure').decode().split(' ', 2)
                if int(rank) != self.rank:
                    self.store.add('heard', 1)
                    print(f'rank {self.rank}: ended because rank {rank} failed: {reason}', file=sys.stderr, flush=True)
                    raise Ended(int(code))

    @contextlib.contextmanager
    def together(self):
        """Context for all work of a run. If one process fails, all processes end and print its reason."""
        try:
            yield
        except UserError as error:
            self.report(2, str(error))
            raise
        except Exception as error:
            if self.lost(error):
                time.sleep(1)  # the failed process may still be writing its reason
                self.failed_elsewhere()
                print(f'rank {self.rank}: lost another process ({first_line(error)}). It was killed, its machine '
                      f'cannot be reached, or it took over {self.timeout} s (--dist_timeout): '
                      'continue with --resume=auto',
                      file=sys.stderr, flush=True)
                raise Ended(1) from None
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
                end_silently(code)
            patience = time.monotonic() + 3
            while self.main and self.store.add('heard', 0) < self.world - 1 and time.monotonic() < patience:
                time.sleep(0.05)  # without torchrun, the store dies with rank 0


def first_line(error):
    return str(error).strip().split('\n')[0]
