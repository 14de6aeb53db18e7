"""End a run early: on a plateau of the loss (--stop_on=plateau), or to fit into a time (--max_hours).

    note_loss(progress, loss)                        # after a validation, or after a step (see smooth)
    if on_plateau(config, progress): ...             # not better for plateau_steps steps
    limit = TimeLimit(hours=8)
    steps = limit.fitting_steps(...)                 # the max_steps that fits into the time

Imports no torch. The state is in Progress, so a checkpoint holds it.
"""
import math
import time

from runtime.hints import LEAST_GAIN

FIRST = 10  # steps of a process that are not measured: they compile and warm up
# Fractions of the time. If a run would end before LOWEST or after HIGHEST, its length changes, and it ends at TARGET.
TARGET, LOWEST, HIGHEST = 0.95, 0.9, 0.98


def smooth(progress, loss, config):
    """Update the running mean of the training loss. It averages over about a tenth of plateau_steps."""
    weight = min(1, 10 / config.plateau_steps)
    before = progress.smoothed
    progress.smoothed = loss if before is None else before + weight * (loss - before)
    return progress.smoothed


def note_loss(progress, loss):
    """Remember the loss and its step if it is below the remembered loss by at least the fraction LEAST_GAIN."""
    if loss < progress.plateau_loss * (1 - LEAST_GAIN):
        progress.plateau_loss, progress.plateau_step = loss, progress.step


def on_plateau(config, progress):
    """Whether the loss has not improved for plateau_steps steps."""
    if progress.step < config.ternary_warmup * config.max_steps:
        return False  # the weights are not ternary yet
    return (config.stop_on == 'plateau' and math.isfinite(progress.plateau_loss)
            and progress.step - progress.plateau_step >= config.plateau_steps)


class TimeLimit:
    """
    The max_steps that fits into a time, from the speed so far.

    The time of a step is the mean over all steps of this process but the first, with their validations, samples and
    checkpoints. It is measured after 20 steps, then after twice as many steps and so on, at least 20 times in a run.
    hours: for the whole run. spent: seconds that earlier processes of a resumed run have used of it.
    """

    def __init__(self, hours, spent=0.0, clock=time.monotonic):
        self.seconds, self.clock, self.start = 3600 * hours, clock, clock() - spent
        self.first = None  # time at which step FIRST was done
        self.check = 2 * FIRST  # steps of this process at the next measurement
        self.step_seconds = 0.0  # the result of the last measurement

    def spent(self):
        """Seconds of the run so far."""
        return self.clock() - self.start

    def is_due(self, steps, max_steps):
        """Whether to measure now. steps: steps done by this process. Call it after every step."""
        if steps == FIRST:
            self.first = self.clock()
        if steps < self.check:
            return False
        self.check = min(2 * steps, steps + max(2 * FIRST, max_steps // 20))
        return True

    def fitting_steps(self, step, steps, max_steps, longest, agree=lambda seconds: seconds):
        """
        The max_steps that fits. It stays max_steps if the run is expected to take LOWEST to HIGHEST of the time.

        step: steps done. steps: of these, the steps of this process. longest: max_steps without a time limit.
        agree: a function that gives all processes the number of one.
        """
        self.step_seconds = agree((self.clock() - self.first) / (steps - FIRST))
        spent = agree(self.spent())
        expected = spent + (max_steps - step) * self.step_seconds
        if expected <= HIGHEST * self.seconds and (expected >= LOWEST * self.seconds or max_steps == longest):
            return max_steps
        left = max(0.0, TARGET * self.seconds - spent)
        return min(longest, step + max(1, int(left / self.step_seconds)))
