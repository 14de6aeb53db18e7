"""
Recommends presets for a prepared dataset, with model size, time and memory of a run, and the commands to start it.

    python prepare.py recommend data/pylib                # for this machine
    python prepare.py recommend shards --card_gb=16       # for shards before `split`, and a card with 16 GB
"""
import math
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import settings
from configurator import UserError, columns
from corpora.shards import check_tokenizer, nearest, read_all, tokenizer_beside
from corpora.show import open_whole, row_of
from corpora.vocabulary import from_file
from model import GPT
from runtime import device as hardware
from runtime.plan import achieved, count, estimate, number, room, shape_of
from runtime.profiling import readable
from runtime.runlog import duration
from tokenizer import load_tokenizer

CONFIGS = Path(__file__).parent.parent / 'config'
LONGEST = 365 * 86_400  # seconds; presets whose run takes longer are left out
GPT2_IDS = 50_257
TOKENS_A_PARAMETER = 20  # compute-optimal (Hoffmann et al., arXiv:2203.15556)
EPOCHS = 4  # up to 4 epochs, repeated data are almost as good as new data (Muennighoff et al., arXiv:2305.16264)


@dataclass
class Corpus:
    dataset: str  # as --dataset= names it
    tokens: int  # of the train split
    val_tokens: int = 0  # 0: not split yet
    vocab_size: int = 0  # 0: unknown
    row: int = 0  # tokens of a row, 0: bins
    words: tuple = ()  # further options of a command that trains on it


@dataclass
class Plan:
    name: str  # of the preset
    parameters: int
    flops: float  # a token
    batch_tokens: int
    max_steps: int
    memory: float  # bytes of a training step with these words
    epochs: float = 0.0  # passes over the data, instead of max_steps (0: max_steps)
    words: tuple = ()  # options with which it fits into the memory, if it does not without


def recommend(path, device='auto', card_gb=0.0, say=print):
    """
    Print which presets of config/ suit the data, the cost of a run of each, and the commands for the best ones.

    path: prepared data, or shards that were not split yet. device: the device for the estimates. card_gb: assume a card
    with this much memory, in GB. Raises UserError.
    """
    if not 0 <= card_gb < math.inf:
        raise UserError(f'--card_gb={card_gb}: expected the memory of a card in GB, or 0')
    corpus = corpus_of(path)
    device, dtype, _ = hardware.resolve(device, 'auto')
    kind = 'cpu' if device.type == 'cpu' and not card_gb else 'cuda'
    dtype = torch.bfloat16 if card_gb and device.type == 'cpu' else dtype  # a GPU supports bfloat16
    size, whose = room(device, card_gb)
    speed, how = 0, f'No time: {whose} is not here to be measured'
    if device.type != 'cpu' or not card_gb:
        speed, how = achieved(device, dtype if device.type != 'cpu' else torch.float32)
        how = f'Time on one device at {speed / 1e12:.3g} TFLOP/s: {how}'
    presets, left_out = suited(path, corpus)
    plans = [plan(name, config, kind, dtype, size) for name, config in presets]
    plans, too_long = runnable(plans, corpus, speed)
    left_out += too_long

    N = corpus.tokens / TOKENS_A_PARAMETER
    say(f'{path}: {corpus.tokens:,} train tokens' + (f' in rows of {corpus.row:,}' if corpus.row else '')
        + f', vocabulary {corpus.vocab_size:,}' + ('' if corpus.val_tokens else ', validation not split off yet'))
    if '--tokenizer=none' in corpus.words:
        say('no tokenizer.json beside these rows: give --tokenizer=NAME instead of none to get samples from a run'
            + (" (the highest id is gpt2's highest id)" if corpus.vocab_size == GPT2_IDS else ''))
    say(f'compute-optimal for one epoch: {count(N)} parameters, {TOKENS_A_PARAMETER} tokens each (arXiv:2203.15556); '
        f'{EPOCHS} epochs lose little (arXiv:2305.16264): {count(EPOCHS * N)}')
    if left_out:
        say('\nleft out:\n' + columns([(f'  {name}', reason) for name, reason in left_out]))
    if presets and not plans:
        return say('\nnone of the presets can be trained here: --card_gb=N shows what a GPU with N GB could train')
    if not plans:
        sizes = f', --block_size={" or ".join(map(str, nearest(corpus.row, 1024)))}' if corpus.row else ''
        return say(f'\nno preset suits these data: use the nearest one with --vocab_size={corpus.vocab_size}{sizes}')
    say('\n' + columns(plan_rows(plans, corpus, speed, size)))
    say('tokens/parameter is for one epoch, the other figures are for the whole run of the preset (max_steps). '
        f'{how}.\n'
        'Memory is an estimate: weights, gradients, optimizer state, and what a micro-step keeps in '
        f'{str(dtype).removeprefix("torch.")}. The memory of {whose} is {readable(size)}.')
    for each in best(plans, corpus.tokens, size):
        say('\n' + advice(each, corpus, speed, size))


# ----------------------------------------------------------------------------------------------------------------------
# The data, and the presets that suit them

def corpus_of(path):
    """The Corpus at `path`, from meta.json. Shards without meta.json are read completely. Raises UserError."""
    path = Path(path).expanduser()
    if (path / 'meta.json').exists() or path.is_dir() and any(path.glob('*.bin')):
        data = open_whole(path)
        named = str(path) if '/' in str(path) else f'./{path}'  # a name without a slash would mean data/NAME
        if row := row_of(data):
            return Corpus(named, data.train_tokens, data.n_val_windows * row, data.n_vocab, row)
        return Corpus(named, data.train_tokens, data.n_val_windows + 1, data.n_vocab)  # windows have one token
    files, checked, _ = read_all(path, {}, 0, lambda line: None)
    rows, row = sum(found['rows'] for found in checked), checked[0]['length']
    if rows < 2:
        raise UserError(f"{files[0]}: a single row cannot be both train and val: provide more rows")
    vocab_size, words = 1 + max(found['max_id'] for found in checked), ('--tokenizer=none',)
    if file := tokenizer_beside(path, files):
        vocab_size, words = load_tokenizer(from_file(file)).n_vocab, ()
        check_tokenizer(checked, vocab_size, file, lambda line: None)
    return Corpus(f'shards:{path}', rows * row, 0, vocab_size, row, words)


def suited(path, corpus):
    """
    Returns ([(name, config)] of presets that suit the data, [(name, reason)] of the others). Raises UserError if bins
    are too small for all presets.
    """
    presets, left_out, shortest = [], [], math.inf
    for file in sorted(CONFIGS.glob('*.py')):
        try:
            config = settings.load([str(file)])
            shortest = min(shortest, config.block_size)
            reason = unsuited(config, corpus)
            if config.init_from:
                reason = f'it finetunes {config.init_from}, which has its own tokenizer'
        except UserError as error:
            reason = ' '.join(str(error).splitlines())
        if reason:
            left_out.append((file.stem, reason))
        else:
            presets.append((file.stem, config))
    if not corpus.row and min(corpus.tokens, corpus.val_tokens) < shortest + 1:
        raise UserError(f'{path}: {corpus.tokens:,} train and {corpus.val_tokens:,} val tokens, but each split needs '
                        f'one window of the smallest preset, block_size + 1 = {shortest + 1}: prepare more text')
    return presets, left_out


def unsuited(config, corpus):
    """The reason why this config can't be trained on the data, '' if it can."""
    T, row = config.block_size, corpus.row
    if corpus.vocab_size > config.vocab_size:
        return f'its vocabulary of {config.vocab_size:,} is smaller than the {corpus.vocab_size:,} of the data'
    if row and (T > row or row % T and (row - 1) % T):
        return f'its block_size of {T:,} divides neither rows of {row:,} tokens nor {row - 1:,}'
    if not row:
        for split, tokens in (('train', corpus.tokens), ('val', corpus.val_tokens)):
            if tokens < T + 1:
                return f'the {split} split has {tokens:,} tokens, fewer than one window of block_size + 1 = {T + 1:,}'
    return ''


# ----------------------------------------------------------------------------------------------------------------------
# Estimates

def plan(name, config, kind, dtype, size):
    """
    The Plan of a preset: its size, FLOPs and memory. If it does not fit into `size` bytes, the plan has smaller
    micro-steps and activation checkpointing, as far as needed.
    """
    with torch.device('meta'):
        model = GPT(shape_of(config))
    parameters = sum(p.numel() for p in model.parameters())
    memory_of = estimate(config, kind, dtype)
    own, checkpointing = config.batch_size, config.activation_checkpointing
    smaller = [rows for rows in range(own, 0, -1) if own % rows == 0]  # divisors: batch_tokens stays a multiple
    choices = [(rows, recompute) for recompute in sorted({checkpointing, True}) for rows in smaller]
    memory = {choice: sum(memory_of(*choice).values()) for choice in choices}
    rows, recompute = next((choice for choice in choices if memory[choice] <= size), (own, checkpointing))
    words = [f'--batch_size={rows}'] if rows != own else []
    words += ['--activation_checkpointing=true'] if recompute != checkpointing else []
    return Plan(name, parameters, model.flops_per_token(), config.batch_tokens, config.max_steps,
                memory[rows, recompute], config.epochs, tuple(words))


def tokens_of(p, corpus):
    """The tokens of the preset's own run."""
    return p.epochs * corpus.tokens or p.max_steps * p.batch_tokens


def steps_of(p, corpus):
    """The recommended number of steps: enough for the parameters, but no more than EPOCHS of the data."""
    return max(1, min(TOKENS_A_PARAMETER * p.parameters, EPOCHS * corpus.tokens) // p.batch_tokens)


def runnable(plans, corpus, speed):
    """
    (plans, smallest first, [(name, reason)] of the plans that are left out). A plan is left out if train.py would not
    accept its command, or if its run takes over a year. speed: FLOP/s, 0 if unknown.
    """
    kept, left_out = [], []
    for p in sorted(plans, key=lambda p: p.parameters):
        tokens = max(tokens_of(p, corpus), steps_of(p, corpus) * p.batch_tokens)
        seconds = p.flops * tokens / speed if speed else 0
        if seconds > LONGEST:
            left_out.append((p.name, 'its run would take over a year on this machine'))
            continue
        try:
            command(p, corpus)
        except UserError as error:
            left_out.append((p.name, ' '.join(str(error).splitlines())))
        else:
            kept.append(p)
    return kept, left_out


def command(p, corpus):
    """(the words of the command behind train.py, its config). Raises UserError if train.py would not accept them."""
    words = [f'--dataset={corpus.dataset}', f'--max_steps={steps_of(p, corpus)}', *corpus.words, *p.words]
    config = settings.load([str(CONFIGS / f'{p.name}.py'), *words])
    out = config.out_dir
    while Path(out).exists():  # train.py does not overwrite a run
        out += '-2'
    if out != config.out_dir:
        words.append(f'--out_dir={out}')
    return [f'config/{p.name}.py', *words], config


# ----------------------------------------------------------------------------------------------------------------------
# Output

def plan_rows(plans, corpus, speed, size):
    rows = [('preset', 'parameters', 'tokens/parameter', 'epochs', 'FLOPs', 'time', 'memory', 'fits')]
    for p in plans:
        tokens = tokens_of(p, corpus)
        time_taken = duration(p.flops * tokens / speed) if speed else '-'
        fits = ' '.join(('with', *p.words)) if p.words else 'yes' if p.memory <= size else 'no'
        rows.append((p.name, f'{p.parameters:,}', number(corpus.tokens / p.parameters), number(tokens / corpus.tokens),
                     f'{p.flops * tokens:.2e}', time_taken, readable(p.memory), fits))
    return rows


def mismatch(parameters, tokens):
    """
    Distance of a model size from the compute-optimal range, as the log of the ratio. The range goes from the size for
    one epoch of the data to the size for EPOCHS epochs. 0 inside the range.
    """
    fed = tokens / TOKENS_A_PARAMETER
    return max(0.0, math.log(fed / parameters), math.log(parameters / (EPOCHS * fed)))


def best(plans, tokens, size):
    """
    The best preset for the data, plus the second best if its mismatch is below log(2). Presets that do not fit into
    memory are considered only if none fits.
    """
    fitting = [p for p in plans if p.memory <= size] or plans
    first, *others = sorted(fitting, key=lambda p: (mismatch(p.parameters, tokens), -p.parameters))
    return [first, *[p for p in others[:1] if mismatch(p.parameters, tokens) < math.log(2)]]


def advice(p, corpus, speed, size):
    """Text for a preset: the reason for it, the length of a run, and the commands."""
    wanted = TOKENS_A_PARAMETER * p.parameters
    tokens, epochs = steps_of(p, corpus) * p.batch_tokens, wanted / corpus.tokens
    reason = (f'config/{p.name}.py: {TOKENS_A_PARAMETER} tokens for each of {count(p.parameters)} parameters: '
              f'{number(epochs)} epochs of the data')
    if epochs > EPOCHS:
        reason += (f'. More than {EPOCHS} epochs bring little, and {EPOCHS} epochs are '
                   f'{tokens / p.parameters:.2g} tokens per parameter: '
                   'a smaller model (--n_layer, --n_embd) or more text would suit better')
    elif epochs < 1:
        reason += '. The data are enough for a larger model'
    time_taken = f', about {duration(p.flops * tokens / speed)} on one device' if speed else ''
    lines = [reason, f'  {steps_of(p, corpus):,} steps of {p.batch_tokens:,} tokens, {p.flops * tokens:.2e} FLOPs'
                     f'{time_taken}']
    if p.memory > size:
        lines.append(f'  {readable(p.memory)} do not fit into memory: use a smaller model (--n_layer, --n_embd), '
                     'or --parallel=fsdp on several devices')
        return '\n'.join(lines)
    words, config = command(p, corpus)
    lines.append(f'  python train.py {shlex.join(words)}')
    processes = max(2, torch.cuda.device_count())
    with suppress(UserError):  # so many processes may not be able to split a step
        settings.micro_batches(config, processes)
        if torch.cuda.device_count() != 1:
            lines.append(f'  torchrun --standalone --nproc_per_node={processes} train.py {shlex.join(words)}')
    return '\n'.join(lines)
