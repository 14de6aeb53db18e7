"""The processes of a run: one, or several that torchrun has started.

    torchrun --standalone --nproc_per_node=8 train.py config/trix_medium.py                  # DDP: a full model each
    torchrun --standalone --nproc_per_node=8 train.py config/resonance_xlarge.py --parallel=fsdp  # FSDP2: sharded model

    group = start(timeout=600)                  # OneProcess, or for several processes a Group with the same methods
    total, = group.sum(loss)

What only several processes need is in group.py, and what only sharded models need is in sharding.py.
"""
import contextlib
import os
import time

from configurator import UserError

ENVIRONMENT = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')  # torchrun sets all of them


class Ended(SystemExit):
    """Another process failed and reports the reason."""


def end_silently(code):
    """End this process after another one has printed the reason.

    torchrun kills all processes when the first one ends, so this one waits."""
    if 'TORCHELASTIC_RUN_ID' in os.environ:  # set by torchrun
        time.sleep(10)
    raise Ended(code)


@contextlib.contextmanager
def once_per_machine():
    """Context for checks that fail in all processes of a machine or in none. Only one process prints the error."""
    try:
        yield
    except UserError:
        if os.environ.get('LOCAL_RANK', '0') != '0':
            end_silently(2)
        raise


class OneProcess:
    """
    A run of one process. A Group, for several processes, has the same methods and describes them.

    rank: the number of this process, from 0. world: the number of processes. local_rank: the number on this machine.
    main: True only in the process that writes files and prints.
    """
    rank, world, local_rank, main = 0, 1, 0, True

    def connect(self, device):
        """There is no other process."""

    def disconnect(self):
        """There is no other process."""

    def together(self):
        return contextlib.nullcontext()

    def micro_step(self, trained, last):
        return contextlib.nullcontext()

    def lost(self, error):
        return False

    def sum(self, *values):
        return list(map(float, values))

    def any(self, flag):
        return bool(flag)

    def gather(self, values):
        return [list(values)]

    def barrier(self, what):
        """There is no other process to wait for."""

    def same(self, what, value):
        """There is no other process to compare with."""

    def first(self, work):
        return work()

    def in_main(self, what, work):
        return work()

    def whole(self, state):
        return state

    def load_optimizer(self, optimizer, state):
        load_optimizer(optimizer, state)


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict(state), but the group settings of the config stay."""
    groups = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, groups):
        group.update(settings)


def start(timeout):
    """The processes that torchrun's environment variables describe, not connected yet: a OneProcess or a Group.

    Raises UserError if the variables are invalid."""
    there = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
    if 'RANK' not in there:
        return OneProcess()
    if missing := [key for key in ENVIRONMENT if key not in there]:
        raise UserError(f'the environment has RANK but no {", ".join(missing)}: start several processes with torchrun')
    numbers = {key: there[key] for key in ENVIRONMENT if key != 'MASTER_ADDR'}
    if wrong := [f'{key}={value!r}' for key, value in numbers.items() if not value.isdecimal()]:
        raise UserError(f'the environment has {", ".join(wrong)}, expected numbers: '
                        'start several processes with torchrun')
    rank, world, local_rank = (int(there[key]) for key in ENVIRONMENT[:3])
    if not rank < world:
        raise UserError(f'the environment has RANK={rank}, but WORLD_SIZE={world}: '
                        'start several processes with torchrun')
    if world == 1:
        return OneProcess()
    from runtime.group import Group  # a plain run does not need it
    return Group(rank, world, local_rank, timeout)
