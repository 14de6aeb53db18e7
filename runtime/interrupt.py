"""Handle signals. A run stops at its next safe point. Work inside limit() is interrupted if it takes too long.

    interrupt = Interrupt()                                # from now on, interrupt.signals records the signals to stop
    with interrupt.limit(600): compile_something()         # raises Overdue after 600 s, and 3 s after a signal
"""
import contextlib
import signal


def wanted_signals():
    """Signals that ask a run to stop: kill, Ctrl-C, a lost terminal, and SLURM's early warning (--signal=USR1@60).

    A signal that the parent process set to ignored stays ignored, as nohup does with SIGHUP. SIGTERM always counts."""
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    return [number for number in wanted if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN]


class Overdue(BaseException):
    """The time limit of Interrupt.limit() is over. A BaseException, so that no `except Exception` catches it."""


class Interrupt:
    patience = 3  # seconds that work inside limit() may continue after a signal

    def __init__(self):
        self.signals, self.limited = [], False
        for number in wanted_signals():
            signal.signal(number, self.ask)
        signal.signal(signal.SIGALRM, self.ring)

    def ask(self, number, frame):
        self.signals.append(number)
        if self.limited:
            self.set_alarm(self.patience)

    def ring(self, number, frame):
        if self.limited:
            raise Overdue

    def set_alarm(self, seconds):
        signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # repeat: an exception raised in a destructor is lost

    @contextlib.contextmanager
    def limit(self, seconds):
        self.limited = True
        self.set_alarm(min(seconds, self.patience) if self.signals else seconds)
        try:
            yield
        finally:
            self.limited = False
            signal.setitimer(signal.ITIMER_REAL, 0)
