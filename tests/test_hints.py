"""Hints appear when there is a reason to stop, not before. No content of a file breaks them."""
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.hints import hints


def history(*losses):
    return [{'step': 100 * i, 'loss': loss} for i, loss in enumerate(losses)]


def rounds(*shares, mode='typical'):
    """Rounds of two samples whose mean is the share."""
    return [{'step': 100 * i, 'mode': mode, 'repetition': share + d} for i, share in enumerate(shares) for d in (-0.1, 0.1)]


FALLING = (9.0, 6.0, 5.0, 4.5, 4.0)


@pytest.mark.parametrize('losses, expected', [
    ((*FALLING, 4.0, 4.0, 3.9999, 4.0, 4.0), True),
    ((*FALLING, 4.0, 4.0, 3.9961, 4.0, 4.0), True),  # better, but by less than 0.1 %
    ((*FALLING, 4.0, 4.0, 3.9959, 4.0, 4.0), False),
    ((*FALLING, 4.0, 4.0, 4.0, 4.0), False),  # 9 validations: too early to say
    ((*FALLING, 3.9, 3.8, 3.8, 3.8, 3.8), False),
    ((*FALLING, 3.9, 3.8, 3.8, 3.8, 3.8, 3.8, 3.8), True),
    ((*FALLING, 3.9, 4.1, 4.0, 4.1, 4.0, 3.95, 3.3), False),
    ((5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 'nan', math.nan, None, 4.0, 3.0), False),  # 9 that count
])
def test_a_plateau_is_five_validations_without_a_gain(losses, expected):
    assert any(hint.startswith('plateau: ') for hint in hints(history(*losses), [])) == expected


def training(n, loss):
    """n lines of training whose losses have the noise of real ones."""
    draw = random.Random(0)
    return [{'kind': 'train', 'step': 100 * i, 'loss': loss(i) + draw.gauss(0, 0.05)} for i in range(n)]


@pytest.mark.parametrize('lines, expected', [
    (training(4000, lambda i: 3.0), True), (training(400, lambda i: 3.0), False),  # 400 are too noisy to say
    (training(4000, lambda i: 3.0 + 6 * math.exp(-i / 100)), True),
    (training(4000, lambda i: 3.0 + 1e-4 * (i - 2000)), True),  # it rises
    (training(400, lambda i: 9 / (1 + i) ** 0.3), False), (training(4000, lambda i: 9 / (1 + i) ** 0.3), False),
    (training(4000, lambda i: 4 - i / 4000), False), (training(199, lambda i: 3.0), False),  # too early to say
    ([{'kind': 'train', 'step': 5, 'loss': 3.0}] * 400, False), ([{'kind': 'event', 'step': i, 'loss': 3.0} for i in range(400)], False),
])
def test_without_validation_a_plateau_is_a_quarter_of_the_run_without_a_fall(lines, expected):
    assert any(hint.startswith('plateau: the training loss') for hint in hints([], [], lines)) == expected
    assert not hints(history(5.0), [], lines)  # with validation, the training loss is not judged


def test_a_plateau_is_reported_with_its_numbers():
    assert hints(history(*FALLING, 3.85123, 3.86, 3.86, 3.86, 3.86, 3.855), []) == [
        'plateau: the validation loss has not improved by 0.1 % over the last 5 validations (best 3.8512 at step 500): '
        'stop, or lower the learning rate']


@pytest.mark.parametrize('losses, expected', [
    ((4.0, 4.1, 4.2, 4.3), True),
    ((4.1, 4.2, 4.3), False),  # two rises
    ((4.0, 4.1, 4.2, 4.2), False),
    ((4.0, 4.2, 4.1, 4.3), False),
    ((4.0, 4.01, 4.02, 4.03), False),  # 0.75 % above the best
    ((4.0, 4.01, 4.02, 4.05), True),
    ((4.0, 4.5, 4.1, 4.2, 4.3), False),
    ((4.0, 4.5, 4.1, 4.2, 4.3, 4.4), True),
    ((4.0, 4.1, 4.2, 4.3, 4.2), False),  # it fell again
])
def test_a_rising_loss_is_three_rises_to_above_the_best(losses, expected):
    found = hints(history(*losses), [])
    assert [hint.split(':')[0] for hint in found] == ['rising loss'] * expected


def test_a_rising_loss_is_reported_with_its_numbers():
    found, = hints(history(5.0, 3.8, 3.9, 4.0, 4.01234), [])
    assert '3 times in a row, to 4.0123 at step 400 (best 3.8000 at step 100)' in found and found.startswith('rising loss: ')


@pytest.mark.parametrize('shares, expected', [
    ((0.2, 0.25, 0.31), True),
    ((0.2, 0.25, 0.29), False),
    ((0.25, 0.2, 0.4), False),
    ((0.3, 0.3, 0.4), False),
    ((0.2, 0.31), False),
    ((0.1, 0.2, 0.25, 0.31, 0.3), False),
    ((0.55, 0.53, 0.51), True),
    ((0.55, 0.53, 0.49), False),
    ((0.45, 0.6, 0.55), False),
    ((0.9, 0.9, 0.2, 0.15, 0.1), False),  # long ago
])
def test_repetition_is_three_rounds_that_rise_or_are_high(shares, expected):
    found = hints([], rounds(*shares))
    assert [hint.split(':')[0] for hint in found] == ['repetition'] * expected
    assert hints([], rounds(*shares, mode='greedy')) == []  # greedy text repeats itself anyway


def test_repetition_is_reported_with_its_numbers():
    found, = hints([], rounds(0.9, 0.22, 0.31, 0.41) + [{'step': 900, 'mode': 'greedy', 'repetition': 1.0}])
    assert found.startswith('repetition: 22 %, 31 %, 41 % of the 4-grams in typical samples') and 'from step 300' in found


def test_several_hints_come_together():
    found = hints(history(*FALLING, 4.1, 4.2, 4.3, 4.4, 4.5), rounds(0.6, 0.6, 0.6))
    assert [hint.split(':')[0] for hint in found] == ['plateau', 'rising loss', 'repetition']
    assert all('\n' not in hint for hint in found)


@pytest.mark.parametrize('junk', [math.nan, math.inf, -math.inf, 10**400, 'nan', None, True, [], {}], ids=str)
def test_values_that_are_not_numbers_are_skipped(junk):
    """A damaged value changes nothing, wherever in a line it stands."""
    evals, samples = history(*FALLING, 3.85123, 3.86, 3.86, 3.86, 3.86, 3.855), rounds(0.2, 0.3, 0.4)
    damaged_evals = [{'step': junk, 'loss': 1.0}, *evals, {'step': 9, 'loss': junk}, {}, {'step': 9}, {'loss': 1.0}, junk]
    damaged_samples = [{'step': junk, 'mode': 'typical', 'repetition': 1.0}, {'step': 9, 'mode': 'typical', 'repetition': junk},
                       {'step': 9, 'mode': junk, 'repetition': 1.0}, junk, *samples]
    assert hints(damaged_evals, damaged_samples) == hints(evals, samples) != []


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(['nan', 'typical', 'greedy', 10**400])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                      max_leaves=5)
lines = st.dictionaries(st.sampled_from(['step', 'loss', 'mode', 'repetition']), values, max_size=4)
good = st.fixed_dictionaries({'step': st.integers(0, 9), 'loss': st.floats(0, 20), 'mode': st.just('typical'),
                              'repetition': st.floats(0, 1)})
damaged_lines = st.lists(values | lines | good | good, max_size=20)


@settings(max_examples=200, deadline=None)
@given(damaged_lines, damaged_lines)
def test_hints_never_raise(evals, samples):
    assert all(isinstance(hint, str) for hint in hints(evals, samples))


def test_hints_need_no_torch():
    code = 'import sys; from runtime import hints; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent.parent).returncode == 0
