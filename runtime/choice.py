"""Which checkpoint of a run a script uses: --checkpoint=last, best or a step. For sample.py, evaluate.py, export.py.

    path = choose_checkpoint('runs/x', 'best')
"""
import re
from pathlib import Path

from configurator import UserError
from runtime.runlog import read_lines


def choose_checkpoint(run, choice):
    """
    The path to load. `last` returns `run` itself: a run directory then means its newest good checkpoint.

    best: the checkpoint with the lowest validation loss in metrics.jsonl. Weights-only files in archives/ count, too.
    UserError if there is no such checkpoint.
    """
    if choice == 'last':
        return run
    if not (choice == 'best' or choice.isdecimal()):
        raise UserError(f'--checkpoint={choice}: expected last, best or a step')
    if not Path(run).is_dir():
        raise UserError(f'--checkpoint={choice} chooses in a run directory, but {run} is '
                        + ('a file' if Path(run).exists() else 'not there'))
    files = saved_steps(run)
    if choice == 'best':
        losses = {line['step']: line['loss'] for line in read_lines(Path(run) / 'metrics.jsonl')
                  if line.get('kind') == 'eval' and isinstance(line.get('loss'), float)
                  and isinstance(line.get('step'), int) and line['step'] in files}
        if not losses:
            raise UserError(f'--checkpoint=best: {run} has no checkpoint with a validation loss in metrics.jsonl: '
                            'use --checkpoint=last')
        return str(files[min(losses, key=losses.get)])
    if int(choice) not in files:
        steps = ', '.join(f'{step}' for step in list(files)[-8:])
        raise UserError(f'--checkpoint={choice}: {run} has no checkpoint of this step; '
                        + (f'the newest are {steps}' if steps else 'it has none at all'))
    return str(files[int(choice)])


def saved_steps(run):
    """{step: path} of a run's checkpoints and archived weights, in order. A full checkpoint hides its archived twin."""
    found = {}
    for folder in ('archives', 'checkpoints'):
        for path in Path(run, folder).glob('step_*.pt'):
            if re.fullmatch(r'step_\d+', path.stem):
                found[int(path.stem.removeprefix('step_'))] = path
    return dict(sorted(found.items()))
