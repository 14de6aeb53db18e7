"""The files of a run: written by train.py alone, read by watch.py and by whoever likes, also while they are being written.

    log = RunLog('runs/x')                                     # one writer at a time: the directory is locked
    log.say('step 10 ...')                                     # console and log.txt
    log.line('metrics.jsonl', kind='train', step=10, loss=5.1)
    log.status(state='running', step=10)                       # status.json, replaced whole
    lines = read_lines('runs/x/metrics.jsonl')                 # whole lines that are JSON objects; what is torn is left out

A number that JSON has no word for (nan, inf) is written as a string, so that every reader can read the line.
"""
import contextlib
import importlib.util
import json
import math
import os
import secrets
import shutil
import socket
import sys
import time
from pathlib import Path

from configurator import UserError
from files import replacing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


def speak(text='', end='\n'):
    """print() for what a run says: a console that is gone (`| head`, a lost terminal, a full disk) ends nothing -> whether it is there.
    What is printed after that goes nowhere."""
    try:
        print(text, end=end, flush=True)
        return True
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return False


def read_lines(path):
    """The JSON objects of a .jsonl file, in order. A missing file has none; a torn or damaged line is left out."""
    found = []
    with contextlib.suppress(OSError):
        for raw in Path(path).read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(line := json.loads(raw), dict):
                    found.append(line)
    return found


def plain(value):
    """A value as strict JSON can hold it: nan and inf become 'nan' and 'inf'."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class RunLog:
    """The writer. `active` is False in all processes of a run but the main one: there nothing is written or said."""

    def __init__(self, out, active=True):
        """Makes and locks the directory. UserError if it can't be written or another run writes there."""
        self.out, self.active, self.trackers, self.last = Path(out), active, [], {}
        self.terminal, self.open_line = active and sys.stdout.isatty(), False
        if active:
            with self.writing(''):
                (self.out / 'checkpoints').mkdir(parents=True, exist_ok=True)
                self.lock = open(self.out / 'lock', 'a+', encoding='utf-8', errors='replace')
            if fcntl and not locked(self.lock):
                self.lock.seek(0)
                raise UserError(f'{self.out}: another run is writing there ({self.lock.read().strip()}): stop it first, '
                                f'or choose another --out_dir')
            self.lock.truncate(0)
            print(f'process {os.getpid()} on {socket.gethostname()}', file=self.lock, flush=True)

    def say(self, text, progress=False):
        """A line on the console and in log.txt. A line of progress is written over by the next one on a terminal."""
        if self.active:
            start = '\r\x1b[K' if self.open_line else ''
            self.open_line = progress and self.terminal
            shown = text[:shutil.get_terminal_size().columns - 1] if self.open_line else text  # a wrapped line can't be written over
            there = speak(start + shown, end='' if self.open_line else '\n')
            self.append('log.txt', text)
            if not there:
                self.append('log.txt', 'the console is gone: from here on what the run says is in this file alone')

    def line(self, name, **values):
        if self.active:
            self.append(name, json.dumps(plain(values), allow_nan=False))
            with self.writing(name):
                for tracker in self.trackers:
                    tracker(name, values)

    def append(self, name, text):
        with self.writing(name), open(self.out / name, 'a', encoding='utf-8', errors='backslashreplace') as file:
            file.write(text + '\n')

    def status(self, **values):
        if self.active:
            self.last = values
            with self.writing('status.json'), replacing(self.out / 'status.json', sync=False) as file:
                file.write(json.dumps(plain({**values, 'pid': os.getpid(), 'host': socket.gethostname(), 'time': time.time()})).encode())

    @contextlib.contextmanager
    def failing(self):
        """Around a run: an error is in its files, too, as far as they can still be written. Unlocks the directory at the end."""
        try:
            yield
        except Exception as error:
            if self.open_line:
                speak()
            with contextlib.suppress(UserError):
                self.status(**{**self.last, 'state': 'failed', 'reason': str(error)})
                if self.active:
                    self.append('log.txt', str(error))
            raise
        finally:
            if self.active:
                self.lock.close()

    def config(self, values):
        if self.active:
            with self.writing('config.json'), replacing(self.out / 'config.json') as file:
                file.write(json.dumps(values, indent=1).encode())

    @contextlib.contextmanager
    def writing(self, name):
        try:
            yield
        except OSError as error:
            raise UserError(f'{self.out / name}: can\'t be written ({error.strerror}): make room there and go on with '
                            '--resume=auto, or choose another --out_dir')

    def cut(self, step):
        """Drop what a resumed run will say again, training after `step`, validation and samples from `step` on, and what a
        killed one left half-written."""
        if not self.active:
            return
        for name in ('metrics.jsonl', 'samples.jsonl'):
            if (self.out / name).exists():
                kept = [line for line in read_lines(self.out / name) if isinstance(at := line.get('step'), int)
                        and (at < step or at == step and line.get('kind') in ('train', 'event'))]
                with self.writing(name), replacing(self.out / name) as file:
                    file.write(''.join(json.dumps(plain(line)) + '\n' for line in kept).encode())
        for stale in [*self.out.glob('*.tmp'), *(self.out / 'checkpoints').glob('*.tmp')]:
            stale.unlink()


def locked(file):
    """Whether this process could lock the file. The lock ends with the process, however it ends."""
    for _ in range(10):  # a run that was just killed may not be quite gone
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False


def check_packages(**wanted):
    """UserError, before anything is made, if a tracker is asked for whose package is missing."""
    if missing := [name for name, asked in wanted.items() if asked and not importlib.util.find_spec(name)]:
        raise UserError(*(f'--{name} needs the package {name}: pip install {name}' for name in missing))


def tensorboard(out, step):
    """A tracker: the numbers of metrics.jsonl as TensorBoard scalars under out/tensorboard, and the samples as text."""
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
    """A tracker: the numbers of metrics.jsonl for Weights & Biases; a resumed run goes on there, too. UserError if it won't."""
    import wandb
    known = Path(out) / 'wandb.id'
    if not known.exists():
        known.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(project=os.environ.get('WANDB_PROJECT', 'nanotrix'), name=Path(out).name, id=known.read_text().strip(),
                         resume='allow', dir=str(out), config=config, settings=wandb.Settings(silent=True))
    except Exception as error:  # several types: no login, no network, a directory that can't be written
        raise UserError(f'--wandb: {str(error).splitlines()[0]}: log in by `wandb login`, or set WANDB_MODE=offline')
    run.define_metric('*', step_metric='step')
    return lambda name, values: run.log({**scalars(values), 'step': values['step']}) if scalars(values) else None


def scalars(values):
    """{'train/loss': 5.1, ...} of a line of metrics.jsonl."""
    kind = values.get('kind')
    return {f'{kind}/{key}': value for key, value in values.items() if kind in ('train', 'eval') and key != 'step'
            and isinstance(value, (int, float)) and math.isfinite(value)}
