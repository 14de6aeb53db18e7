"""Does the disk have room for the checkpoints of a run? Used by train.py before the first step, and by --plan.

    check_disk(config)                               # UserError if there is no room
    size, weights = checkpoint_bytes(config)         # bytes of a checkpoint, and of an archive
"""
import shutil
from dataclasses import replace
from pathlib import Path

import torch

import schedule as schedules
from configurator import UserError
from model import GPT, GPTConfig
from optim import cast_matrices, make_optimizers, state_bytes
from settings import due_steps, is_on


def shape_of(config):
    """The GPTConfig of a run with any eot_id. A plan can come before the data, and memory does not depend on the id."""
    return replace(config.pick(GPTConfig), eot_id=0)


def model_of(config):
    """The model of a run, with its weights in their dtype."""
    model = GPT(shape_of(config))
    cast_matrices(model, config.weights_dtype)
    return model


def checkpoint_bytes(config):
    """(bytes of one checkpoint, bytes of one archive). Both hold the model's weights. A checkpoint also holds the state
    of the optimizers."""
    with torch.device('meta'):
        model = model_of(config)
        optimizers = make_optimizers(model, config, torch.device('cpu')).values()
    tensors = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}  # a tied matrix counts once
    weights = sum(tensors.values())
    state = sum(state_bytes(optimizer, p) for optimizer in optimizers
                for group in optimizer.param_groups for p in group['params'])
    return weights + state, weights


def checkpoints_at_most(config, best=True):
    """
    (largest number of checkpoints on disk at once, a text that explains it).

    Counts the newest, the best, the permanent checkpoints, and a checkpoint that is being written. best=False: count no
    checkpoints for better validations, because their number is unknown.
    """
    if not is_on(config, 'save_interval'):
        return 1, 'only if the run is interrupted (--save_interval=0)'
    best = best and config.save_on_best and is_on(config, 'eval_interval')
    permanent = {*config.mandatory_steps, *schedules.both_sides(config), *due_steps(config, 'keep_every')}
    # A better validation also saves a checkpoint.
    regular = due_steps(config, 'save_interval') | (due_steps(config, 'eval_interval') if best else set())
    saves = len({config.max_steps} | permanent | regular)
    if not config.keep:
        return saves, 'all are kept (--keep=0)' + (', if every validation is better than those before' if best else '')
    words = [f'keep={config.keep}']
    if best:
        words.append('the best')
    if permanent:
        words.append(f'{len(permanent)} permanent')
    return min(saves, config.keep + best + len(permanent)) + 1, ', '.join([*words, 'one being written'])


def check_disk(config):
    """UserError if the disk has no room for the checkpoints and archives that the run will keep."""
    (n, reason), (each, weights) = checkpoints_at_most(config, best=False), checkpoint_bytes(config)
    archives = len(due_steps(config, 'archive_every'))
    out = Path(config.out_dir)
    present = sum(file.stat().st_size for folder in ('checkpoints', 'archives') for file in (out / folder).glob('*.pt'))
    needed, free = n * each + archives * weights, free_bytes(out) + present
    if needed > free and (archives or is_on(config, 'save_interval')):
        more = f' and {archives:,} archives of {readable(weights)}' if archives else ''
        raise UserError(f'{out}: no room for {n:,} checkpoints ({reason}) of {readable(each)}{more} = '
                        f'{readable(needed)}: '
                        f'{readable(free)} are free. Use a smaller --keep, longer intervals, or another --out_dir')


def free_bytes(path):
    """Free bytes on the file system of a path. The path need not exist."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


def readable(size):
    unit, name = next((u for u in ((1e9, 'GB'), (1e6, 'MB')) if size >= 0.9995 * u[0]), (1e3, 'kB'))
    return f'{size / unit:.1f} {name}'
