"""Find reasons to stop a run early in its logs: a plateau, a rising loss, repetitive text.

    for hint in hints(evals, samples):   # evals: [{step, loss}], samples: [{step, mode, repetition}], both in order
        print(hint)                      # 'plateau: ...': a hint starts with its kind
"""
# Plateau: the last PATIENCE validations improve the best loss by less than the fraction LEAST_GAIN.
# At least PATIENCE validations must come before them.
PATIENCE, LEAST_GAIN = 5, 0.001
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


def hints(evals, samples):
    """A list of reasons to stop, one line each, empty if all is well. Never raises, whatever the lines contain."""
    found, losses, rounds = [], numbers(evals, 'loss'), {}
    if losses:
        step, last = losses[-1]
        best_step, best = min(losses, key=lambda pair: pair[1])
        where = f'best {best:.4f} at step {best_step}'
    if len(losses) >= 2 * PATIENCE:
        before, recent = (min(loss for _, loss in part) for part in (losses[:-PATIENCE], losses[-PATIENCE:]))
        if recent > before * (1 - LEAST_GAIN):
            found.append(f'plateau: the validation loss has not improved by {100 * LEAST_GAIN:g} % over the last {PATIENCE} '
                         f'validations ({where}): stop, or lower the learning rate')
    if len(losses) > RISES and rises([loss for _, loss in losses[-RISES - 1:]]) and last > best * (1 + ABOVE_BEST):
        found.append(f'rising loss: the validation loss rose {RISES} times in a row, to {last:.4f} at step {step} ({where}): '
                     'it overfits or the learning rate is too high: stop, and use the best checkpoint')

    typical = [line for line in samples if isinstance(line, dict) and line.get('mode') == 'typical']
    for step, share in numbers(typical, 'repetition'):
        rounds.setdefault(step, []).append(share)
    means = [sum(shares) / len(shares) for shares in rounds.values()][-ROUNDS:]
    if len(means) == ROUNDS and (means[-1] > REPETITIVE and rises(means) or min(means) > VERY_REPETITIVE):
        shares = ', '.join(f'{100 * mean:.0f} %' for mean in means)
        found.append(f'repetition: {shares} of the 4-grams of typical samples occurred before in them (the latest at step {step}): '
                     'look at the text, and stop or lower the learning rate')
    return found
