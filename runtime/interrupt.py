"""Signals: a run that is asked to stop does so at the next good moment; what does not come back by itself is broken off.

    interrupt = Interrupt()                                # from here on signals are remembered in interrupt.signals
    with interrupt.limit(600): compile_something()         # raises Overdue after 600 s, and 3 s after a signal
"""
import contextlib
import signal


def wanted_signals():
    """Signals that ask a run to end: kill, Ctrl-C, a lost terminal and SLURM's early warning (--signal=USR1@60); not those that whoever
    started it ignores, as nohup does SIGHUP."""
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    return [number for number in wanted if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN]


class Overdue(BaseException):
    """Inside of Interrupt.limit() time is up. Not an Exception, so that nobody's `except Exception` takes it for a failure."""


class Interrupt:
    patience = 3  # seconds that limited work has left after a signal

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
        signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # and again, because an exception that a destructor raises is lost

    @contextlib.contextmanager
    def limit(self, seconds):
        self.limited = True
        self.set_alarm(min(seconds, self.patience) if self.signals else seconds)
        try:
            yield
        finally:
            self.limited = False
            signal.setitimer(signal.ITIMER_REAL, 0)
