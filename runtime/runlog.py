"""Read and write the files of a run. Only train.py writes them. watch.py and other programs may read them at any time.

    log = RunLog('runs/x')                                     # locks the directory: one writer at a time
    log.say('step 10 ...')                                     # console and log.txt
    log.line('metrics.jsonl', kind='train', step=10, loss=5.1)
    log.status(state='running', step=10)                       # status.json, replaced atomically
    lines = read_lines('runs/x/metrics.jsonl')                 # the JSON objects, without incomplete lines

JSON cannot represent nan and inf. They are written as strings, so that every JSON parser can read the line.
"""
import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from configurator import UserError, silence_stdout
from files import replacing


def speak(text='', end='\n'):
    """print() that survives a lost console (`| head`, a lost terminal, a full disk).

    Returns whether the console is there. Once the console is lost, stdout goes to the null device."""
    try:
        print(text, end=end, flush=True)
        return True
    except OSError:
        silence_stdout()
        return False


def duration(seconds):
    """Seconds as text in the two largest units: 3 min 5 s, 2 h 5 min, 4 d 7 h, or in years."""
    seconds = max(0, round(seconds))
    if seconds >= 1000 * 86_400:
        return f'{seconds / 365 / 86_400:,.0f} years'
    for size, unit, part, smaller in ((86_400, 'd', 3600, 'h'), (3600, 'h', 60, 'min'), (60, 'min', 1, 's')):
        if seconds >= size:
            return f'{seconds // size} {unit} {seconds % size // part} {smaller}'.removesuffix(f' 0 {smaller}')
    return f'{seconds} s'


def read_lines(path):
    """The JSON objects of a .jsonl file, in order. Skips incomplete or damaged lines.

    A missing file gives an empty list."""
    found = []
    with contextlib.suppress(OSError):
        for raw in Path(path).read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(line := json.loads(raw), dict):
                    found.append(line)
    return found


def plain(value):
    """Convert a value for strict JSON: nan, inf and -inf become the strings 'nan', 'inf' and '-inf'."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class RunLog:
    """Writes the files of a run. `active` is True only in the main process. The others write and print nothing."""

    def __init__(self, out, active=True):
        """Creates and locks the directory. Raises UserError if it is not writable or another run writes there."""
        self.out, self.active, self.trackers, self.last = Path(out), active, [], {}
        self.terminal, self.open_line = active and sys.stdout.isatty(), False
        if active:
            with self.writing(''):
                (self.out / 'checkpoints').mkdir(parents=True, exist_ok=True)
                self.lock = open(self.out / 'lock', 'a+', encoding='utf-8', errors='replace')
            if not locked(self.lock):
                self.lock.seek(0)
                raise UserError(f'{self.out}: another run is writing there ({self.lock.read().strip()}): '
                                'stop it first, or choose another --out_dir')
            self.lock.truncate(0)
            print(f'process {os.getpid()} on {socket.gethostname()}', file=self.lock, flush=True)

    def say(self, text, progress=False):
        """Write a line to the console and to log.txt. On a terminal, the next line overwrites a progress line."""
        if self.active:
            start = '\r\x1b[K' if self.open_line else ''
            self.open_line = progress and self.terminal
            # Cut the text to the width of the terminal, because a wrapped line cannot be overwritten.
            shown = text[:shutil.get_terminal_size().columns - 1] if self.open_line else text
            there = speak(start + shown, end='' if self.open_line else '\n')
            self.append('log.txt', text)
            if not there:
                self.append('log.txt', 'the console is gone: from here on, the run prints only to this file')

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
                status = {**values, 'pid': os.getpid(), 'host': socket.gethostname(), 'time': time.time()}
                file.write(json.dumps(plain(status)).encode())

    @contextlib.contextmanager
    def failing(self):
        """Context for a run. Records an error in the run's files if they are still writable.

        Unlocks the directory at the end."""
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
            raise UserError(f'{self.out / name}: could not be written ({error.strerror}): free some space and '
                            'continue with --resume=auto, or choose another --out_dir')

    def cut(self, step):
        """Delete the lines that a resumed run will write again, and what a killed run left incomplete.

        Training lines and events go after `step`. Validations and samples go from `step` on.
        Incomplete lines and temporary files go, too."""
        if not self.active:
            return
        for name in ('metrics.jsonl', 'samples.jsonl'):
            if (self.out / name).exists():
                kept = [line for line in read_lines(self.out / name) if isinstance(at := line.get('step'), int)
                        and (at < step or at == step and line.get('kind') in ('train', 'event'))]
                with self.writing(name), replacing(self.out / name) as file:
                    file.write(''.join(json.dumps(plain(line)) + '\n' for line in kept).encode())
        for folder in (self.out, self.out / 'checkpoints', self.out / 'archives'):
            for stale in folder.glob('*.tmp'):
                stale.unlink()


def locked(file):
    """Try to lock the file. Returns whether it worked. The operating system drops the lock when the process ends."""
    for _ in range(10):  # a run that was just killed may still hold the lock
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False
