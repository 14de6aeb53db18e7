"""Compare trained models: a table, a page, and the loss by position in the context. For evaluate.py.

    by_position = loss_by_position(model, data, device, dtype)     # [[1, 16, 4.1], [17, 32, 3.8], ...]
    write_page('runs/evaluation.html', results, details)           # or .md
"""
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import UserError, columns
from files import replacing
from kernels import autocast
from runtime import device as hardware
from runtime import pages
from runtime.generation import encode, generate, sample_grid

POSITION_TOKENS = 2**15  # tokens for the loss by position; at least 4 windows
HEAD_ROWS = 1024  # positions whose logits are in memory at the same time
SAMPLE_SEED = 1337


@dataclass
class Detail:
    """What a comparison shows of a model beside its losses."""
    parameters: int
    bytes: int  # of all weights in memory
    peak_gb: float  # memory of the GPU; None on a CPU, where the peak of a process does not belong to one model
    speed: float  # tokens/s of the validation
    decode_speed: float  # tokens/s of one text; None without a tokenizer
    samples: dict  # {prompt: text}
    source: tuple  # what makes losses per token comparable: fingerprint of the data, and the tokenizer


def measure(model, encoding, state, speed, sample_tokens, device, dtype):
    """-> Detail. speed: tokens/s of the validation."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    samples, decode_speed = {}, None
    if encoding:
        prompts = str(state['config'].get('sample_prompts', '')).split('|')
        with autocast(device, dtype):
            grid = sample_grid(model, encoding, prompts, sample_tokens, SAMPLE_SEED)
            decode_speed = decoding_speed(model, encoding, device)
        samples = {sample['prompt']: sample['text'] for sample in grid if sample['mode'] == 'typical'}
    peak = hardware.peak_memory_gb(device) if device.type == 'cuda' else None
    source = state['data'].get('fingerprint') or state['data'].get('path'), repr(state['tokenizer'])
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Detail(parameters, size, peak, speed, decode_speed, samples, source)


def decoding_speed(model, encoding, device, n=32):
    """Tokens/s of one text, after a warm-up."""
    idx = torch.tensor([encode(encoding, '')], device=device)
    times = []
    for token in generate(model, idx, encoding.n_vocab, n, seed=SAMPLE_SEED):
        token.item()
        times.append(time.perf_counter())
    warm = times[n // 4:]
    return (len(warm) - 1) / (warm[-1] - warm[0])


@torch.no_grad()
def loss_by_position(model, data, device, dtype):
    """
    Mean loss by position in the window: [[first, last, nats per token]], positions counted from 1.

    Each range ends at twice the end of the one before. A model that uses its whole context has its lowest loss in the
    last range.
    """
    T = data.block_size
    windows = data.val_windows(0)[:max(4, POSITION_TOKENS // T)]
    total, counts = torch.zeros(T, dtype=torch.float64), torch.zeros(T, dtype=torch.float64)
    size = max(1, 4 * HEAD_ROWS // T)
    for i in range(0, len(windows), size):
        x, y = (torch.from_numpy(part).to(device) for part in data.val_batch(windows[i:i + size]))
        with autocast(device, dtype), model.fixed_weights():
            hidden, weight, cap, _ = model.soft_targets(x, 1.0)  # (B T, C), (V, C)
            losses = torch.cat([losses_of(*part, weight, cap) for part in zip(
                hidden.split(HEAD_ROWS), y.flatten().split(HEAD_ROWS))])  # (B T,)
        total += losses.view(y.shape).sum(0).double().cpu()
        counts += (y >= 0).sum(0).cpu()
    found = []
    for first, last in ranges(T):
        part = slice(first - 1, last)
        found.append([first, last, (total[part].sum() / counts[part].sum()).item()])
    return found


def losses_of(hidden, targets, weight, cap):
    """The loss of each position: hidden (N, C), targets (N,) -> (N,). 0 where the target is -1."""
    logits = F.linear(hidden, weight.type_as(hidden)).float()
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction='none')


def ranges(T, shortest=16):
    """[(first, last)] of positions 1 to T: the last half, the half of the rest, ..., down to a range of `shortest`."""
    ends = [T]
    while ends[-1] // 2 >= shortest:
        ends.append(ends[-1] // 2)
    ends = [0, *reversed(ends)]
    return [(start + 1, end) for start, end in zip(ends, ends[1:])]


def position_lines(by_position):
    return '\n'.join(f'positions {first:,} to {last:,}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}'
                     for first, last, loss in by_position)


# ----------------------------------------------------------------------------------------------------------------------
# Table and page

def remarks(results, details):
    """What makes a comparison unfair, one line each."""
    found = []
    if len({detail.source for detail in details}) > 1:
        found.append('different data or tokenizers: losses per token are not comparable, use bits per byte')
    if len({result['tokens'] for result in results}) > 1:
        found.append('different numbers of validation tokens: --eval_tokens=N makes them equal')
    if len({result['by_position'][-1][1] for result in results}) > 1:
        found.append('different contexts: a longer one helps; --context=N makes them equal')
    return found


def rows(results, details):
    """The table as lists of texts, header first: a row for each measurement, a column for each run."""
    def number(form, values):
        return ['' if value is None else form.format(value) for value in values]
    found = [['', *(result['run'] for result in results)]]
    for name, key, form in (
            ('step', 'step', '{:,}'), ('loss', 'loss', '{:.4f}'), ('bits per byte', 'bits_per_byte', '{:.4f}'),
            ('perplexity', 'perplexity', '{:,.2f}'), ('validation tokens', 'tokens', '{:,}'),
            ('word-level perplexity', 'word_perplexity', '{:,.2f}'), ('HellaSwag acc_norm', 'acc_norm', '{:.4f}')):
        found.append([name, *number(form, [result.get(key) for result in results])])
    spans = {(first, last): None for result in results for first, last, _ in result['by_position']}
    for span in sorted(spans):
        losses = [next((loss for first, last, loss in result['by_position'] if (first, last) == span), None)
                  for result in results]
        perplexities = [None if loss is None else math.exp(min(loss, 700)) for loss in losses]
        found.append([f'perplexity at {span[0]:,} to {span[1]:,}', *number('{:,.2f}', perplexities)])
    gains = [result['by_position'][-2][2] - result['by_position'][-1][2] if len(result['by_position']) > 1 else None
             for result in results]
    found.append(['loss saved, last half of context', *number('{:.4f}', gains)])
    found += [['parameters', *number('{:,}', [detail.parameters for detail in details])],
              ['weights', *number('{:,.1f} MB', [detail.bytes / 1e6 for detail in details])],
              ['peak GPU memory', *number('{:,.2f} GB', [detail.peak_gb for detail in details])],
              ['validation, tokens/s', *number('{:,.0f}', [detail.speed for detail in details])],
              ['decoding, tokens/s', *number('{:,.0f}', [detail.decode_speed for detail in details])]]
    return [row for row in found if any(row[1:])]


def text(results, details):
    return '\n'.join([*remarks(results, details), columns(rows(results, details))])


def sample_rows(results, details):
    prompts = dict.fromkeys(prompt for detail in details for prompt in detail.samples)
    return [['prompt', *(result['run'] for result in results)]] + [
        [repr(prompt), *(f'\n{detail.samples.get(prompt, "")}' for detail in details)] for prompt in prompts]


def draw_positions(results, axes):
    for i, result in enumerate(results):
        axes.plot([last for _, last, _ in result['by_position']], [loss for _, _, loss in result['by_position']],
                  marker='o', markersize=4, color=f'C{i % 10}', label=result['run'].replace('$', r'\$'))
    axes.set_xscale('log', base=2)
    axes.set(xlabel='position in the context', ylabel='nats per token')
    axes.legend()


def write_page(path, results, details):
    """Write an HTML page, or Markdown if the name ends in .md."""
    make = markdown if str(path).endswith('.md') else html_page
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(make(results, details).encode('utf-8', 'replace'))
    except OSError as error:
        raise UserError(f'{path}: could not be written ({error.strerror}): choose another --page')


def html_page(results, details):
    best = min(results, key=lambda result: result['bits_per_byte'] or result['loss'])
    value, name = best['bits_per_byte'], 'bits per byte'
    if not value:
        value, name = best['loss'], 'nats per token'
    notes = [[note] for note in remarks(results, details)]
    return pages.page(f'{len(results)} models', {
        ' best': pages.big_number(f'{value:.4f}', f'{name}, the best: {best["run"]}'),
        'Loss by position': pages.drawings({'loss by position': partial(draw_positions, results)}),
        'Measured': pages.table(rows(results, details)), 'Remarks': pages.table([['remark'], *notes]),
        'Samples': pages.table(sample_rows(results, details))})


def markdown(results, details):
    def cell(value):
        return value.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' ').strip()

    def table(lines):
        head, *body = [f'| {" | ".join(map(cell, line))} |' for line in lines]
        return '\n'.join([head, '|---' * len(lines[0]) + '|', *body])
    notes = ''.join(f'- {note}\n' for note in remarks(results, details))
    return (f'# {len(results)} models\n\n{table(rows(results, details))}\n\n{notes}\n## Samples\n\n'
            f'{table(sample_rows(results, details))}\n')
