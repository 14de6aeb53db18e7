"""Find reasons to stop a run early in its logs: a plateau, a rising loss, repetitive text.

    for hint in hints(evals, samples, train):   # [{step, loss}], [{step, mode, repetition}], [{step, loss}]
        print(hint)                             # 'plateau: ...': a hint starts with its kind
"""
from statistics import linear_regression

# Plateau: the last PATIENCE validations improve the best loss by less than the fraction LEAST_GAIN.
# At least PATIENCE validations must come before them.
PATIENCE, LEAST_GAIN = 5, 0.001
# Without validation: a line through the last quarter of the training losses falls by less than the fraction LEAST_FALL,
# even with two standard errors added. The quarter needs LEAST_LINES losses. A short or noisy run gives no hint.
LEAST_FALL, LEAST_LINES = 0.005, 50
# Rising loss: it rises RISES times in a row, to more than the fraction ABOVE_BEST above the best loss.
RISES, ABOVE_BEST = 3, 0.01
# Repetition over the last ROUNDS rounds of samples: it rises to above REPETITIVE, or always exceeds VERY_REPETITIVE.
ROUNDS, REPETITIVE, VERY_REPETITIVE = 3, 0.3, 0.5


def numbers(lines, key):
    """[(step, line[key])] for the lines where both are numbers. A file may be damaged, and a loss may be 'nan'."""
    def sound(value, kind):  # the bound rejects nan, inf and integers too large for a float
        return isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < 1e15
    return [(line['step'], line[key]) for line in lines if isinstance(line, dict)
            and sound(line.get('step'), int) and sound(line.get(key), (int, float))]


def rises(values):
    return all(a < b for a, b in zip(values, values[1:]))


def training_plateau(losses):
    """The hint for a training loss [(step, loss)] that no longer falls, or None."""
    last = losses[-(len(losses) // 4):]
    if len(losses) < 4 * LEAST_LINES or last[0][0] >= last[-1][0]:
        return None
    steps, values = zip(*last)
    slope, start = linear_regression(steps, values)
    span, middle = steps[-1] - steps[0], sum(steps) / len(steps)
    residual = sum((value - start - slope * step) ** 2 for step, value in last) / (len(last) - 2)
    error = (residual / sum((step - middle) ** 2 for step in steps)) ** 0.5
    if (2 * error - slope) * span >= LEAST_FALL * sum(values) / len(values):
        return None
    return (f'plateau: the training loss fell by less than {100 * LEAST_FALL:g} % from step {steps[0]} to {steps[-1]}: '
            'stop, or lower the learning rate')


def hints(evals, samples, train=()):
    """A list of reasons to stop, one line each, empty if all is well. Never raises, whatever the lines contain.

    train: lines of metrics.jsonl. Those of training are judged only if the run has no validation."""
    found, losses, rounds = [], numbers(evals, 'loss'), {}
    if losses:
        step, last = losses[-1]
        best_step, best = min(losses, key=lambda pair: pair[1])
        where = f'best {best:.4f} at step {best_step}'
    if len(losses) >= 2 * PATIENCE:
        before, recent = (min(loss for _, loss in part) for part in (losses[:-PATIENCE], losses[-PATIENCE:]))
        if recent > before * (1 - LEAST_GAIN):
            found.append(f'plateau: the validation loss has not improved by {100 * LEAST_GAIN:g} % '
                         f'over the last {PATIENCE} validations ({where}): stop, or lower the learning rate')
    if not losses:
        training = [line for line in train if isinstance(line, dict) and line.get('kind', 'train') == 'train']
        hint = training_plateau(numbers(training, 'loss'))
        found += [hint] if hint else []
    if len(losses) > RISES and rises([loss for _, loss in losses[-RISES - 1:]]) and last > best * (1 + ABOVE_BEST):
        found.append(f'rising loss: the validation loss rose {RISES} times in a row, to {last:.4f} at step {step} '
                     f'({where}): the model overfits, or the learning rate is too high: '
                     'stop, and use the best checkpoint')

    typical = [line for line in samples if isinstance(line, dict) and line.get('mode') == 'typical']
    for step, share in numbers(typical, 'repetition'):
        rounds.setdefault(step, []).append(share)
    means = [sum(shares) / len(shares) for shares in rounds.values()][-ROUNDS:]
    if len(means) == ROUNDS and (means[-1] > REPETITIVE and rises(means) or min(means) > VERY_REPETITIVE):
        shares = ', '.join(f'{100 * mean:.0f} %' for mean in means)
        found.append(f'repetition: {shares} of the 4-grams in typical samples are repeated '
                     f'(the latest sample is from step {step}): look at the text, and stop or lower the learning rate')
    return found
