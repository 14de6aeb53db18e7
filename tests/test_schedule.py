"""What every schedule promises. A new one is tested by itself; its own values join by one line in VALUES."""
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule import SCHEDULES, boundary, corners, picture, problems, schedule


def config_of(name='cosine', **options):
    """A run of 110 steps whose rates are exact in binary: peak 2, end 0.5."""
    defaults = dict(learning_rate=2.0, min_lr_ratio=0.25, warmup_steps=10, max_steps=110, schedule=name,
                    weight_decay=0.1, restart_steps=0, restart_factor=1, decay_steps=0, boundary_step=0,
                    mid_lr_ratio=0.5)
    return SimpleNamespace(**{'ternary_warmup': 0.0, **defaults, **options})


def rates(config, steps=None):
    return [schedule(step, config)[0] for step in (range(config.max_steps) if steps is None else steps)]


KNOWN = ('cosine', 'restarts', 'onecycle', 'wsd', 'linear', 'constant', 'two_stage')  # schedules whose slopes are known


# ----------------------------------------------------------------------------------------------------------------------
# Values

# The warm-up takes 10 steps (0.2 per step), then there are 100 more.
# Half a cosine has lost (1 - sqrt(1/2)) / 2 of its height after a quarter of its length.
QUARTER = 0.5 + 1.5 * (2 + math.sqrt(2)) / 4  # between 2 and 0.5
VALUES = [
    ('cosine', {}, {10: 2.0, 35: QUARTER, 60: 1.25, 110: 0.5, 111: 0.5, 10_000: 0.5}),
    ('cosine', dict(min_lr_ratio=0.0), {10: 2.0, 60: 1.0, 110: 0.0}),
    ('cosine', dict(min_lr_ratio=1.0), {10: 2.0, 60: 2.0, 109: 2.0}),
    ('cosine', dict(warmup_steps=110), {10: 2 * 11 / 110, 108: 2 * 109 / 110, 109: 2.0}),
    # cycles of 20 steps from 10, 30, 50, 70, 90; max_steps is the end of the last
    ('restarts', dict(restart_steps=20),
     {10: 2.0, 15: QUARTER, 20: 1.25, 30: 2.0, 35: QUARTER, 50: 2.0, 70: 2.0, 90: 2.0, 100: 1.25, 110: 0.5, 120: 0.5}),
    # cycles of 8, 16, 32, 64: from 10, 18, 34, 66; cut off at max_steps, after 44 of 64 steps
    ('restarts', dict(restart_steps=8, restart_factor=2),
     {10: 2.0, 12: QUARTER, 14: 1.25, 18: 2.0, 26: 1.25, 34: 2.0, 42: QUARTER, 50: 1.25, 66: 2.0, 82: QUARTER, 98: 1.25,
      110: 0.5 + 0.75 * (1 + math.cos(math.pi * 44 / 64))}),
    ('restarts', {}, {10: 2.0, 35: QUARTER, 60: 1.25, 110: 0.5}),  # one cycle: cosine
    ('restarts', dict(warmup_steps=110), {108: 2 * 109 / 110, 109: 2.0, 110: 2.0}),
    ('restarts', dict(restart_steps=100, restart_factor=3), {10: 2.0, 60: 1.25, 110: 0.5}),
    # onecycle has its own warm-up: 0.08 at step 0, halfway at 5, the peak at 10; then halfway at 60, 8e-6 at 110
    ('onecycle', dict(warmup_steps=11, max_steps=111),
     {0: 0.08, 5: 1.04, 10: 2.0, 60: 1.000004, 110: 8e-6, 111: 8e-6, 999: 8e-6}),
    ('onecycle', dict(warmup_steps=1, max_steps=101), {0: 2.0, 50: 1.000004, 100: 8e-6}),
    ('onecycle', dict(warmup_steps=0, max_steps=100), {49: 1.000004, 99: 8e-6}),
    ('onecycle', dict(warmup_steps=5, max_steps=5), {0: 0.08, 2: 1.04, 4: 2.0}),
    ('wsd', {}, {10: 2.0, 50: 2.0, 88: 2.0, 99: 1.25, 110: 0.5, 500: 0.5}),  # a fifth: the last 22 steps
    ('wsd', dict(decay_steps=60), {10: 2.0, 50: 2.0, 60: 1.75, 80: 1.25, 100: 0.75, 110: 0.5}),
    ('wsd', dict(warmup_steps=0, max_steps=4), {0: 2.0, 3: 2.0, 4: 0.5}),  # a fifth, but at least a step
    ('linear', {}, {10: 2.0, 35: 1.625, 60: 1.25, 85: 0.875, 110: 0.5, 500: 0.5}),
    ('constant', {}, {10: 2.0, 60: 2.0, 109: 2.0, 500: 2.0}),
    ('two_stage', dict(boundary_step=50), {10: 2.0, 30: 1.5, 50: 1.0, 80: 0.75, 110: 0.5, 500: 0.5}),
    ('two_stage', {}, {10: 2.0, 55: 1.0, 110: 0.5}),  # half of the run
    ('two_stage', dict(learning_rate=1.5e-3, mid_lr_ratio=2 / 3, min_lr_ratio=0.01, warmup_steps=100, max_steps=1000),
     {0: 1.5e-5, 99: 1.5e-3, 100: 1.5e-3, 300: 1.25e-3, 500: 1e-3, 750: 5.075e-4, 1000: 1.5e-5}),
]


@pytest.mark.parametrize('name,options,expected', VALUES)
def test_closed_form_values(name, options, expected):
    config = config_of(name, **options)
    assert problems(config) == []
    assert dict(zip(expected, rates(config, expected))) == pytest.approx(expected, rel=1e-14, abs=1e-16)


@pytest.mark.parametrize('name', SCHEDULES)
def test_warm_up_is_a_line_that_reaches_the_peak_one_step_before_its_end(name):
    config = config_of(name, decay_steps=20, boundary_step=50)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
    if name == 'onecycle':  # 0.08 to 2 along a cosine over 9 steps
        expected = [0.08 + 0.96 * (1 - math.cos(math.pi * step / 9)) for step in range(10)]
    elif name in KNOWN:  # they go on from the peak
        expected.append(2.0)
    assert rates(config, range(len(expected))) == pytest.approx(expected, rel=1e-14)
    config.warmup_steps = 0
    assert name == 'onecycle' or name not in KNOWN or schedule(0, config)[0] == 2.0
    config.warmup_steps = 1
    assert schedule(0, config)[0] == 2.0


@pytest.mark.parametrize('warmup_steps,max_steps,low', [
    (10, 110, 0.1), (0, 97, 0.0), (99, 999, 0.1), (33, 77, 1 / 3), (7, 7, 0.1)])
def test_cosine_and_constant_equal_earlier_runs_bit_for_bit(warmup_steps, max_steps, low):
    config = config_of(warmup_steps=warmup_steps, max_steps=max_steps, min_lr_ratio=low, learning_rate=6e-4)

    def earlier(step):
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        if config.schedule == 'constant':
            return config.learning_rate
        done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    for config.schedule in ('cosine', 'constant'):
        assert rates(config, range(max_steps + 1)) == [earlier(step) for step in range(max_steps + 1)]


@pytest.mark.parametrize('name', SCHEDULES)
def test_weight_decay_is_constant_but_gone_in_the_second_stage(name):
    config = config_of(name, boundary_step=50, decay_steps=20)
    edge = 50 if name == 'two_stage' else 1000
    assert [schedule(step, config)[1] for step in range(130)] == [0.1 if step < edge else 0.0 for step in range(130)]


def of_torch(make, lr, steps):
    """The rates of `steps` optimizer steps under a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize('warmup_steps,max_steps', [(30, 100), (2, 50), (99, 100), (7, 23), (0, 40), (0, 1), (49, 490)])
def test_onecycle_equals_torch(warmup_steps, max_steps):
    config = config_of('onecycle', learning_rate=3e-3, warmup_steps=warmup_steps, max_steps=max_steps)
    options = dict(max_lr=3e-3, total_steps=max_steps, pct_start=warmup_steps / max_steps, cycle_momentum=False)
    expected = of_torch(lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, **options), 3e-3, max_steps)
    assert rates(config) == pytest.approx(expected, rel=1e-9, abs=1e-17)


@pytest.mark.parametrize('restart_steps,restart_factor', [(20, 1), (10, 2), (7, 3), (1, 1), (1, 2), (190, 2), (64, 1)])
def test_restarts_equal_torch(restart_steps, restart_factor):
    config = config_of('restarts', learning_rate=3e-3, min_lr_ratio=0.1, warmup_steps=10, max_steps=200,
                       restart_steps=restart_steps, restart_factor=restart_factor)
    expected = of_torch(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=restart_steps, T_mult=restart_factor, eta_min=3e-4), 3e-3, 190)
    assert rates(config, range(10, 200)) == pytest.approx(expected, rel=1e-12)


def test_a_step_far_into_a_run_of_short_cycles_costs_nothing():
    config = config_of('restarts', warmup_steps=0, max_steps=10**15 + 10, restart_steps=2)
    assert rates(config, [10**15, 10**15 + 1]) == [2.0, 1.25]


# ----------------------------------------------------------------------------------------------------------------------
# Properties. The first test holds for every schedule, those on slopes for the KNOWN ones.

@st.composite
def configs(draw, names=tuple(SCHEDULES)):
    name = draw(st.sampled_from(names))
    steps = draw(st.integers(2, 250))
    ratio = st.floats(0, 1)
    warmup = draw(st.integers(0, steps - 2 if name == 'two_stage' else steps - 1))
    factor = draw(st.integers(1, 4))
    return config_of(
        name, learning_rate=draw(st.floats(1e-6, 10)), min_lr_ratio=draw(ratio), mid_lr_ratio=draw(ratio),
        warmup_steps=warmup, max_steps=steps, restart_factor=factor, restart_steps=draw(st.integers(0, steps - warmup)),
        decay_steps=draw(st.integers(1, steps - warmup)),
        boundary_step=draw(st.integers(warmup + 1, steps - 1)) if name == 'two_stage' else 0)


def restarts_of(config):
    """The steps after the warm-up at which a rate may jump, counted cycle by cycle."""
    steps, length = [], config.restart_steps
    if config.schedule == 'restarts' and length:
        start = config.warmup_steps + length
        while start < config.max_steps:
            length *= config.restart_factor
            steps.append(start)
            start += length
    return steps


@settings(deadline=None)
@given(configs())
def test_every_rate_lies_between_zero_and_the_peak_and_the_floor_holds(config):
    assert problems(config) == []
    seen = rates(config, range(config.max_steps + 3))
    peak = config.learning_rate * (1 + 1e-12)
    floors = {'onecycle': 1 / 25 / 1e4, 'constant': 1.0, 'two_stage': min(config.min_lr_ratio, config.mid_lr_ratio)}
    floor = floors.get(config.schedule, config.min_lr_ratio if config.schedule in KNOWN else 0)
    after = seen[config.warmup_steps:]
    assert all(0 <= rate <= peak for rate in seen), f'{config.schedule}: return a fraction of the peak, 0 to 1'
    assert all(rate >= (floor - 1e-12) * config.learning_rate for rate in after)
    assert seen[-1] == seen[-2] == seen[-3]  # max_steps and beyond


@settings(deadline=None)
@given(configs(KNOWN))
def test_rates_rise_in_the_warm_up_and_then_fall_but_at_restarts(config):
    seen, slack = rates(config), 1e-12 * config.learning_rate
    jumps = restarts_of(config)
    for step in range(1, config.max_steps):
        change = seen[step] - seen[step - 1]
        if step < config.warmup_steps:
            assert change > 0, step
        elif step in jumps:
            assert seen[step] == pytest.approx(config.learning_rate)
        elif config.schedule != 'two_stage' or step <= boundary(config) or config.min_lr_ratio <= config.mid_lr_ratio:
            assert change <= slack, step


@settings(deadline=None)
@given(configs(KNOWN))
def test_no_rate_changes_faster_than_the_steepest_slope_of_its_phase(config):
    seen, warmup, steps = rates(config, range(config.max_steps + 1)), config.warmup_steps, config.max_steps
    drop, bend = 1 - config.min_lr_ratio, math.pi / 2  # a cosine is pi/2 times as steep as the line
    jumps = [*restarts_of(config), steps]
    for step in range(1, steps + 1):
        if step < warmup:
            slope = bend * 24 / 25 / (warmup - 1) if config.schedule == 'onecycle' else 1 / warmup
        elif config.schedule == 'onecycle':
            slope = bend / (steps - warmup)
        elif config.schedule == 'restarts':
            end = next(end for end in jumps if step <= end)
            if step == end < steps:
                continue
            start = max([warmup, *(jump for jump in jumps if jump < step)])
            length = config.restart_steps * config.restart_factor ** jumps.index(end) or steps - warmup
            assert start + length >= end
            slope = bend * drop / length
        elif config.schedule == 'two_stage':
            first, edge = step <= boundary(config), boundary(config)
            slope = (1 - config.mid_lr_ratio) / (edge - warmup) if first else (
                abs(config.mid_lr_ratio - config.min_lr_ratio) / (steps - edge))
        else:
            slope = {'cosine': bend * drop / (steps - warmup), 'linear': drop / (steps - warmup),
                     'wsd': drop / config.decay_steps, 'constant': 0.0}[config.schedule]
        assert abs(seen[step] - seen[step - 1]) <= config.learning_rate * (slope + 1e-12), step


@settings(deadline=None)
@given(configs())
def test_corners_and_picture_of_any_run(config):
    found = corners(config)
    assert found == sorted(set(found)) and found[0] == 0 and found[-1] == config.max_steps - 1
    assert set(restarts_of(config)[:12]) <= set(found)
    lines = picture(config, width=20, height=3).split('\n')
    assert max(map(len, lines[1:4])) <= 30 and len(lines[4]) == len(lines[5]) == 30  # 10 for the axis
    assert [int(line.split()[0]) for line in lines[8:]] == found
    shown = [float(line.split()[1]) for line in lines[8:]]
    assert shown == pytest.approx(rates(config, found), rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Boundary, corners, picture

def test_boundary_is_resolved_for_two_stage_alone():
    assert boundary(config_of('two_stage')) == 55
    assert boundary(config_of('two_stage', boundary_step=70)) == 70
    assert {boundary(config_of(name, boundary_step=70)) for name in SCHEDULES if name != 'two_stage'} == {None}


@pytest.mark.parametrize('name,options,expected', [
    ('cosine', {}, [0, 10, 109]),
    ('cosine', dict(warmup_steps=0), [0, 109]),
    ('cosine', dict(warmup_steps=1, max_steps=1), [0]),
    ('linear', dict(warmup_steps=110), [0, 109]),
    ('constant', {}, [0, 10, 109]),
    ('onecycle', {}, [0, 9, 109]),
    ('wsd', {}, [0, 10, 88, 109]),
    ('wsd', dict(decay_steps=100), [0, 10, 109]),
    ('two_stage', {}, [0, 10, 55, 109]),
    ('two_stage', dict(boundary_step=109), [0, 10, 109]),
    ('restarts', {}, [0, 10, 109]),
    ('restarts', dict(warmup_steps=110), [0, 109]),
    ('restarts', dict(restart_steps=25), [0, 10, 35, 60, 85, 109]),
    ('restarts', dict(restart_steps=10, restart_factor=3), [0, 10, 20, 50, 109]),
    ('restarts', dict(restart_steps=2), [0, 10, *range(12, 36, 2), 109]),
])
def test_corners(name, options, expected):
    assert corners(config_of(name, **options)) == expected


def test_picture_of_two_stages():
    # columns of two steps, bars of the 32 eighths that the peak has: 6 14 22 30, 31 27 23 19, 16 14 12 10 8 6 4 2
    config = config_of('two_stage', warmup_steps=8, max_steps=32, boundary_step=16, min_lr_ratio=0.0)
    assert picture(config, width=16, height=4) == """\
learning rate, schedule=two_stage
2.00e+00 ┤   ▆▇▃
         │  ▆███▇▃
         │ ▆███████▆▄▂
         │▆████████████▆▄▂
       0 └┴───┴───┴──────┴
          0             32

        step          lr  weight decay
           0   2.500e-01           0.1  start
           8   2.000e+00           0.1  end of the warm-up
          16   1.000e+00             0  second stage, no weight decay
          31   6.250e-02             0  last step"""


def test_the_picture_shows_further_restarts_and_coinciding_events():
    assert 'restart, more follow\n' in picture(config_of('restarts', restart_steps=5))
    thirteen_cycles = config_of('restarts', restart_steps=8, max_steps=114)  # with twelve restarts
    assert 'more follow' not in picture(thirteen_cycles)
    assert picture(config_of(max_steps=1, warmup_steps=0)).endswith('  start, last step')


def test_the_picture_shows_small_rates_but_not_zero():
    assert picture(config_of('onecycle')).split('\n')[8][-3:] == '▁▁▁'  # a millionth of the peak
    assert not set('▁▂▃▄▅▆▇█') & set(picture(config_of(learning_rate=0.0)))


def test_importing_schedule_does_not_import_torch():
    code = "import schedule, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parents[1]).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# Refusals

@pytest.mark.parametrize('name,options,expected', [
    ('cosin', {}, [f"schedule='cosin' is not one of {', '.join(SCHEDULES)}"]),
    ('cosine', dict(warmup_steps=100, max_steps=50),
     ['warmup_steps=100 is longer than the run of max_steps=50: use --warmup_steps=5']),
    ('two_stage', dict(warmup_steps=100, max_steps=50),
     ['warmup_steps=100 is longer than the run of max_steps=50: use --warmup_steps=5']),  # and not what follows from it
    ('cosine', dict(min_lr_ratio=1.5), ['min_lr_ratio=1.5 must lie in [0, 1]']),
    ('two_stage', dict(mid_lr_ratio=1.01), ['mid_lr_ratio=1.01 must lie in [0, 1]']),
    ('wsd', dict(decay_steps=101), [
        'warmup_steps=10 and a decay of 101 steps are longer than the run of max_steps=110: '
        'shorten one of them (--warmup_steps, --decay_steps)']),
    ('wsd', dict(warmup_steps=90), [
        'warmup_steps=90 and a decay of 22 steps are longer than the run of max_steps=110: '
        'shorten one of them (--warmup_steps, --decay_steps)']),
    ('two_stage', dict(boundary_step=10), [
        'boundary_step=10 must lie between warmup_steps=10 and max_steps=110: '
        'move it (--boundary_step) or shorten the warm-up (--warmup_steps)']),
    ('two_stage', dict(boundary_step=110), [
        'boundary_step=110 must lie between warmup_steps=10 and max_steps=110: '
        'move it (--boundary_step) or shorten the warm-up (--warmup_steps)']),
    ('two_stage', dict(warmup_steps=60), [
        'boundary_step=0 (half of the run: 55) must lie between warmup_steps=60 and max_steps=110: '
        'move it (--boundary_step) or shorten the warm-up (--warmup_steps)']),
    ('restarts', dict(restart_steps=101), [
        'restart_steps=101 is longer than the 100 steps after the warm-up (max_steps=110): '
        'use --restart_steps=0 for a single cycle']),
    ('restarts', dict(restart_factor=0), ['restart_factor=0 must be at least 1 (1: cycles of equal length)']),
    ('constant', dict(learning_rate=math.inf), ['learning_rate=inf must be finite']),
    ('cosine', dict(min_lr_ratio=math.inf), ['min_lr_ratio=inf must be finite']),
    ('restarts', dict(restart_factor=0, restart_steps=200, min_lr_ratio=2.0, weight_decay=-1.0), [  # all at once
        'weight_decay=-1.0 must not be negative', 'min_lr_ratio=2.0 must lie in [0, 1]',
        'restart_factor=0 must be at least 1 (1: cycles of equal length)',
        'restart_steps=200 is longer than the 100 steps after the warm-up (max_steps=110): '
        'use --restart_steps=0 for a single cycle']),
])
def test_problems_are_named(name, options, expected):
    assert problems(config_of(name, **options)) == expected


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('key', [
    'learning_rate', 'weight_decay', 'warmup_steps', 'min_lr_ratio', 'mid_lr_ratio', 'decay_steps', 'boundary_step',
    'restart_steps', 'restart_factor'])
def test_a_negative_option_is_one_problem_in_every_schedule(name, key):
    assert problems(config_of(name, **{key: -3})) == [f'{key}=-3 must not be negative']


@pytest.mark.parametrize('name,options', [
    *((name, {}) for name in SCHEDULES),
    *((name, dict(warmup_steps=0)) for name in SCHEDULES),
    ('cosine', dict(warmup_steps=110, min_lr_ratio=1.0)),
    ('wsd', dict(decay_steps=100)),
    ('two_stage', dict(boundary_step=11, mid_lr_ratio=1.0)),
    ('two_stage', dict(boundary_step=109, mid_lr_ratio=0.0)),
    ('restarts', dict(restart_steps=100)),
    # options of other schedules
    *((name, dict(mid_lr_ratio=3.0, decay_steps=999, boundary_step=999, restart_steps=999, restart_factor=0))
      for name in ('constant', 'onecycle', 'cosine')),
    ('two_stage', dict(max_steps=1, warmup_steps=0)),
])
def test_valid_options_pass_and_options_of_other_schedules_are_ignored(name, options):
    assert problems(config_of(name, **options)) == []
