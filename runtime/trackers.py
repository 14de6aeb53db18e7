"""Send what a run logs to TensorBoard or Weights & Biases. For --tensorboard and --wandb.

    check_packages(config)                                     # UserError if a package is missing
    log.trackers = start(config, log.out, progress.step)       # log: a RunLog, which calls each tracker
"""
import importlib.util
import math
import os
import secrets
from pathlib import Path

from configurator import UserError


def check_packages(config):
    """Raises UserError if the package of a requested tracker is missing. Call it before creating any file."""
    missing = [name for name in ('tensorboard', 'wandb')
               if getattr(config, name) and not importlib.util.find_spec(name)]
    if missing:
        raise UserError(*(f'--{name} needs the package {name}: pip install {name}' for name in missing))


def start(config, out, step):
    """The requested trackers: functions of (name of a file, values of a line)."""
    found = [tensorboard(out, step)] if config.tensorboard else []
    return found + ([wandb(out, config.as_dict())] if config.wandb else [])


def tensorboard(out, step):
    """A tracker that writes metrics as TensorBoard scalars, and samples as text, to out/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(Path(out) / 'tensorboard'), purge_step=step + 1 if step else None)

    def track(name, values):
        for tag, value in scalars(values).items():
            writer.add_scalar(tag, value, values['step'])
        if name == 'samples.jsonl':
            writer.add_text(f'samples/{values["mode"]}', f'{values["prompt"]} | {values["text"]}', values['step'])
        writer.flush()
    return track


def wandb(out, config):
    """A tracker that sends metrics to Weights & Biases. A resumed run continues its wandb run.

    Raises UserError if wandb cannot start."""
    import wandb
    known = Path(out) / 'wandb.id'
    if not known.exists():
        known.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(project=os.environ.get('WANDB_PROJECT', 'nanotrix'), name=Path(out).name,
                         id=known.read_text().strip(), resume='allow', dir=str(out), config=config,
                         settings=wandb.Settings(silent=True))
    except Exception as error:  # many types: no login, no network, unwritable directory
        raise UserError(f'--wandb: {str(error).splitlines()[0]}: log in with `wandb login`, or set WANDB_MODE=offline')
    run.define_metric('*', step_metric='step')
    return lambda name, values: run.log({**scalars(values), 'step': values['step']}) if scalars(values) else None


def scalars(values):
    """The finite numbers of a train or eval line of metrics.jsonl, without the step: {'train/loss': 5.1, ...}."""
    kind = values.get('kind')
    return {f'{kind}/{key}': value for key, value in values.items() if kind in ('train', 'eval') and key != 'step'
            and isinstance(value, (int, float)) and math.isfinite(value)}
