"""
Learning rate and weight decay of every optimizer step. Both are pure functions of the step and the config, so a resumed
run needs no scheduler state. train.py and watch.py import this file. It does not import torch.

    python train.py config/x.py --schedule=wsd --decay_steps=200          # choose one of SCHEDULES
    python train.py config/x.py --schedule=restarts --plan                # plot the schedule before training

To add a schedule, write a function of (step, config) and add one line to SCHEDULES. The function returns the rate as a
fraction of the peak, from the end of the warm-up (step warmup_steps) to max_steps.
tests/test_schedule.py and --help find it there. Put its values at a few steps into VALUES in that test.
Steps are optimizer steps. A run takes steps 0 to max_steps - 1. The curves end at `max_steps`, one past the last step.
"""
import math


def schedule(step, config):
    """
    (learning rate, weight decay) of optimizer step `step`. Steps beyond max_steps get the values of max_steps.

    Warm-up: learning_rate * (step + 1) / warmup_steps for step < warmup_steps. It reaches the peak at step
    warmup_steps - 1. onecycle has its own warm-up. The weight decay is constant, except in two_stage: there it is 0
    from the boundary on.
    """
    step, edge = min(step, config.max_steps), boundary(config)
    weight_decay = config.weight_decay if edge is None or step < edge else 0.0
    if step < config.warmup_steps and config.schedule != 'onecycle':
        return config.learning_rate * (step + 1) / config.warmup_steps, weight_decay
    return config.learning_rate * SCHEDULES[config.schedule](step, config), weight_decay


def between(low, high, left):
    """Linear interpolation from `high` (left=1) down to `low` (left=0)."""
    return low + (high - low) * left


def half_cosine(part):
    """Half a cosine period, from 1 (part=0) down to 0 (part=1)."""
    return 0.5 * (1 + math.cos(math.pi * part))


def done(step, config):
    """The fraction of the steps after the warm-up that is done before `step`, 0 to 1."""
    return (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)


def cosine(step, config):
    """Half a cosine from the peak to min_lr_ratio at max_steps (arXiv:1608.03983, one cycle)."""
    return between(config.min_lr_ratio, 1, half_cosine(done(step, config)))


def restarts(step, config):
    """SGDR (arXiv:1608.03983): cosine cycles, each from the peak to min_lr_ratio.

    The cycles take restart_steps, restart_steps * restart_factor, ... steps. The values match torch's
    CosineAnnealingWarmRestarts, with one difference: max_steps itself ends a cycle and never starts one."""
    start, length = cycle(min(step, config.max_steps - 1), config)
    return between(config.min_lr_ratio, 1, half_cosine((step - start) / length))


def onecycle(step, config):
    """1cycle (arXiv:1708.07120), as in torch's OneCycleLR with default arguments.

    Half a cosine rises from 1/25 of the peak to the peak at step warmup_steps - 1. Another half cosine falls to
    1/250,000 of the peak at the last step, max_steps - 1."""
    top, last = config.warmup_steps - 1, config.max_steps - 1
    if step < top:
        return between(1, 1 / 25, half_cosine(step / top))
    return between(1 / 25 / 1e4, 1, half_cosine((min(step, last) - top) / max(1, last - top)))


def wsd(step, config):
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): constant, then linear to min_lr_ratio over decay_steps."""
    return between(config.min_lr_ratio, 1, min(1, (config.max_steps - step) / decay(config)))


def linear(step, config):
    """Linear from the peak to min_lr_ratio at max_steps."""
    return between(config.min_lr_ratio, 1, 1 - done(step, config))


def constant(step, config):
    """Constant at the peak."""
    return 1


def two_stage(step, config):
    """Linear from the peak to mid_lr_ratio at the boundary, then linear to min_lr_ratio at max_steps.

    There is no weight decay from the boundary on. Adapted from BitNet b1.58 (arXiv:2504.12285), where both stages are
    cosines and the rate drops between them."""
    edge, mid = boundary(config), config.mid_lr_ratio
    if step < edge:
        return between(mid, 1, (edge - step) / (edge - config.warmup_steps))
    return between(config.min_lr_ratio, mid, (config.max_steps - step) / (config.max_steps - edge))


SCHEDULES = {'cosine': cosine, 'restarts': restarts, 'onecycle': onecycle, 'wsd': wsd, 'linear': linear,
             'constant': constant, 'two_stage': two_stage}


def top_k(step, config):
    """The number of tiles per token: falls from trix_tiles to trix_top_k over the first anneal_steps."""
    left = 1 - step / config.anneal_steps if step < config.anneal_steps else 0
    return math.ceil(between(config.trix_top_k, config.trix_tiles, left))


def ternary_share(step, config):
    """How far ternary weights have gone from latent weights to codes: from 0 to 1 in the ternary warm-up."""
    steps = config.ternary_warmup * config.max_steps
    return min(1.0, step / steps) if steps else 1.0


def boundary(config):
    """two_stage: the first step of the second stage. None for other schedules."""
    return (config.boundary_step or config.max_steps // 2) if config.schedule == 'two_stage' else None


def both_sides(config):
    """two_stage: the steps whose checkpoints lie on both sides of the boundary. Empty for other schedules."""
    edge = boundary(config)
    return set() if edge is None else {edge, edge + 1}


def decay(config):
    """wsd: the length of the decay in steps."""
    return config.decay_steps or max(1, config.max_steps // 5)


def cycle(step, config):
    """restarts: (first step, length) of the cycle that contains `step`. During the warm-up: the first cycle."""
    start, factor = config.warmup_steps, config.restart_factor
    length = config.restart_steps or max(1, config.max_steps - start)
    if factor == 1:
        return start + max(0, step - start) // length * length, length
    while step >= start + length:
        start, length = start + length, length * factor
    return start, length


# ----------------------------------------------------------------------------------------------------------------------

def problems(config):
    """All errors in the schedule options, one message each.

    Checks the options of the chosen schedule. Options of other schedules must only be finite and not negative."""
    name, run, warmup = config.schedule, config.max_steps, config.warmup_steps
    found = [] if name in SCHEDULES else [f'schedule={name!r} is not one of {", ".join(SCHEDULES)}']
    for key in ('learning_rate', 'weight_decay', 'warmup_steps', 'min_lr_ratio', 'mid_lr_ratio', 'decay_steps',
                'boundary_step', 'restart_steps', 'restart_factor'):
        value = getattr(config, key)
        if value < 0 or value == math.inf:
            found.append(f'{key}={value} must ' + ('not be negative' if value < 0 else 'be finite'))
    if 1 < config.min_lr_ratio < math.inf:
        found.append(f'min_lr_ratio={config.min_lr_ratio} must lie in [0, 1]')
    if 1 < config.mid_lr_ratio < math.inf and name == 'two_stage':
        found.append(f'mid_lr_ratio={config.mid_lr_ratio} must lie in [0, 1]')
    if config.restart_factor == 0 and name == 'restarts':
        found.append('restart_factor=0 must be at least 1 (1: cycles of equal length)')
    if warmup > run:
        found.append(f'warmup_steps={warmup} is longer than the run of max_steps={run}: '
                     f'use --warmup_steps={run // 10}')
    elif name == 'wsd' and warmup + decay(config) > run:
        found.append(f'warmup_steps={warmup} and a decay of {decay(config)} steps are longer than the run of '
                     f'max_steps={run}: shorten one of them (--warmup_steps, --decay_steps)')
    elif name == 'two_stage' and config.boundary_step >= 0 and run > 1 and not warmup < boundary(config) < run:
        given = config.boundary_step or f'0 (half of the run: {boundary(config)})'
        found.append(f'boundary_step={given} must lie between warmup_steps={warmup} and max_steps={run}: move it '
                     '(--boundary_step) or shorten the warm-up (--warmup_steps)')
    elif name == 'restarts' and config.restart_steps > run - warmup:
        found.append(f'restart_steps={config.restart_steps} is longer than the {run - warmup} steps after the warm-up '
                     f'(max_steps={run}): use --restart_steps=0 for a single cycle')
    return found


def marks(config):
    """{step: what changes at this step}, in order, for the steps of the run. Lists at most 12 restarts."""
    found = [(0, 'start'), (config.max_steps - 1, 'last step')]
    if config.warmup_steps:
        found.append((config.warmup_steps - (config.schedule == 'onecycle'), 'end of the warm-up'))
    if config.schedule == 'wsd':
        found.append((config.max_steps - decay(config), 'decay begins'))
    if config.schedule == 'two_stage':
        found.append((boundary(config), 'second stage, no weight decay'))
    if config.schedule == 'restarts':
        start, length = cycle(0, config)
        for number in range(1, 13):
            start, length = cycle(start + length, config)
            more = number == 12 and start + length < config.max_steps
            found.append((start, 'restart, more follow' if more else 'restart'))
    if config.ternary_warmup:
        found.append((math.ceil(config.ternary_warmup * config.max_steps), 'weights are ternary'))
    steps = sorted({step for step, _ in found if step < config.max_steps})
    return {step: ', '.join(what for at, what in found if at == step) for step in steps}


def stage(step, config):
    """(name of the part of the schedule that contains `step`, the step at which it ends)"""
    if step < config.warmup_steps - (config.schedule == 'onecycle'):
        return 'warm-up', config.warmup_steps - (config.schedule == 'onecycle')
    if config.schedule == 'wsd':
        start = config.max_steps - decay(config)
        return ('stable', start) if step < start else ('decay', config.max_steps)
    if config.schedule == 'two_stage':
        edge = boundary(config)
        return ('stage 1', edge) if step < edge else ('stage 2', config.max_steps)
    if config.schedule == 'restarts':
        start, length = cycle(step, config)
        return 'cosine cycle', min(start + length, config.max_steps)
    return config.schedule, config.max_steps


def corners(config):
    """The steps of the run at which something changes, in order."""
    return list(marks(config))


def picture(config, width=64, height=8):
    """A text plot of the learning rate (`width` x `height` characters) and a table of the steps where it changes."""
    lines = [*plot(config, width, height), '', f'{"step":>12}  {"lr":>10}  {"weight decay":>12}']
    for step, what in marks(config).items():
        rate, weight_decay = schedule(step, config)
        lines.append(f'{step:12,}  {rate:10.3e}  {weight_decay:12g}  {what}')
    return '\n'.join(lines)


def plot(config, width=64, height=8):
    """The lines of a text plot of the learning rate."""
    steps, parts = config.max_steps, 16  # a column averages 16 points: single points would alias short cycles

    def mean_rate(column):
        points = [int((column + (part + 0.5) / parts) * steps / width) for part in range(parts)]
        return sum(schedule(point, config)[0] for point in points) / parts
    rates = [mean_rate(column) for column in range(width)]
    # At least 1, so that nonzero rates stay visible.
    eighths = [max(rate > 0, round(8 * height * rate / (config.learning_rate or 1))) for rate in rates]
    edge, ticks = f'{config.learning_rate:.2e} ┤', {step * width // steps for step in corners(config)}
    lines = [f'learning rate, schedule={config.schedule}']
    for row in reversed(range(height)):
        lines.append((edge + ''.join(' ▁▂▃▄▅▆▇█'[max(0, min(8, n - 8 * row))] for n in eighths)).rstrip())
        edge = ' ' * (len(edge) - 1) + '│'
    lines.append('0 └'.rjust(len(edge)) + ''.join('┴' if column in ticks else '─' for column in range(width)))
    lines.append(' ' * len(edge) + f'0{steps:>{width - 1},}')
    return lines
