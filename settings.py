"""All options of a training run, with defaults and descriptions. Model options are in model.py.

    config = load(['config/trix_tiny.py', '--max_steps=100'])     # config files and --key=value words, checked
    rows, micro_steps = micro_batches(config, world=4)            # how four processes divide the tokens of a step
    resolve_steps(config, data.n_windows)                         # epochs -> max_steps, when the data are open
"""
import math
import os
from dataclasses import dataclass
from pathlib import Path

import configurator
import schedule as schedules
from configurator import UserError
from model import GPTConfig
from optim import OPTIMIZERS

AUTOMATIC = {'warmup_steps': -1, 'restart_steps': 0, 'decay_steps': 0, 'boundary_step': 0}  # values for: automatic
INTERVALS = ('eval_interval', 'save_interval', 'keep_every', 'archive_every')  # in steps; each has a twin in tokens

SPELLINGS = {  # of values: another spelling -> the spelling here
    'dtype': {'bf16': 'bfloat16', 'fp16': 'float16', 'half': 'float16', 'fp32': 'float32', 'float': 'float32'},
    'dataset': {'wikitext-2': 'wikitext2', 'wikitext-103': 'wikitext103', 'wikitext_2': 'wikitext2',
                'wikitext_103': 'wikitext103', 'fineweb-edu': 'fineweb_edu'},
    'compile': {'yes': 'true', 'on': 'true', '1': 'true', 'no': 'false', 'off': 'false', '0': 'false'},
}
ACCUMULATION = 'set --batch_tokens = batch_size * block_size * accumulation steps'
ALIASES = {  # keys of other training programs -> the key here, or what to do
    'lr': 'learning_rate', 'max_lr': 'learning_rate', 'min_lr': 'use --min_lr_ratio, a fraction of learning_rate',
    'd_model': 'n_embd', 'hidden_size': 'n_embd', 'dim': 'n_embd', 'num_layers': 'n_layer',
    'n_layers': 'n_layer', 'num_heads': 'n_head', 'n_heads': 'n_head',
    'num_kv_heads': 'n_kv_head', 'n_kv_heads': 'n_kv_head', 'dim_feedforward': 'd_ff', 'max_seq_len': 'block_size',
    'seq_len': 'block_size', 'context_length': 'block_size', 'num_epochs': 'epochs', 'max_samples': 'max_windows',
    'max_iters': 'max_steps', 'num_steps': 'max_steps', 'warmup_iters': 'warmup_steps', 'eval_every': 'eval_interval',
    'save_every': 'save_interval', 'log_every': 'log_interval', 'gradient_checkpointing': 'activation_checkpointing',
    'gradient_accumulation': ACCUMULATION, 'gradient_accumulation_steps': ACCUMULATION, 'grad_accum': ACCUMULATION,
    'no_eval': 'use --eval_interval=0', 'run_id': 'use --out_dir=runs/NAME', 'output_dir': 'out_dir',
    'resume_from': 'use --resume=PATH', 'amp': 'use --dtype=float16 or --dtype=bfloat16',
    'fp16': 'use --dtype=float16', 'bf16': 'use --dtype=bfloat16',
}


@dataclass
class TrainConfig:
    out_dir: str = ''  # directory of the run (empty: runs/<names of the config files, joined with hyphens>)
    dataset: str = 'pylib'  # pylib, shakespeare, wikitext2, wikitext103, fineweb_edu, text:PATH, shards:DIR, bins:PATH,
    # or a directory that prepare.py has made
    tokenizer: str = 'bpe'  # for a dataset that is not prepared yet: bpe (trained on it, with vocab_size tokens), char,
    # byte, gpt2, or a tokenizer.json; for token ids: the tokenizer that made them, or none (shards:DIR)
    document_starts: float = 0.0  # share of the training windows that begin with an end-of-text token and a document,
    # as samples do
    packing: str = 'stream'  # training rows: stream (windows of the token stream), or best_fit (whole documents)
    max_steps: int = 1000  # optimizer steps
    epochs: float = 0.0  # passes over the training data, instead of max_steps (0: max_steps decides)
    max_windows: int = 0  # train on only the first windows of the data, block_size tokens each (0: on all)
    max_hours: float = 0.0  # shorten the run and its schedule to end in this time, which includes the time before a
    # resume. The speed is measured during the run (0: no limit)
    stop_on: str = ''  # plateau: stop when the loss has not improved for plateau_steps steps (empty: train to the end)
    plateau_steps: int = 0  # stop_on=plateau: the number of steps; an improvement is 0.1 % of the validation loss, or
    # of the mean training loss if there is no validation
    batch_size: int = 16  # largest number of sequences in a micro-step of one process
    batch_tokens: int = 0  # tokens in an optimizer step, over all processes: a multiple of batch_size * block_size
    # (0: batch_size * block_size)
    learning_rate: float = 1e-3  # peak, after the warm-up
    matrix_lr: float = 0.0  # optimizer=muon: peak learning rate of the matrices that Muon trains (0: learning_rate)
    min_lr_ratio: float = 0.1  # learning rate at the end, as a fraction of the peak
    warmup_steps: int = -1  # steps of linear warm-up (-1: a twentieth of the run, a tenth for onecycle)
    schedule: str = 'cosine'  # after the warm-up: cosine, restarts, onecycle, wsd, linear, constant or two_stage
    restart_steps: int = 0  # restarts: steps of the first cycle (0: the whole run)
    restart_factor: int = 2  # restarts: each cycle is this many times as long as the cycle before
    decay_steps: int = 0  # wsd: steps of the decay at the end (0: a fifth of the run)
    boundary_step: int = 0  # two_stage: the first step of the second stage, without weight decay (0: half of the run)
    mid_lr_ratio: float = 2 / 3  # two_stage: learning rate at the boundary, as a fraction of the peak
    optimizer: str = 'adamw'  # adamw; muon: Muon for the matrices of the blocks, AdamW for the rest; or adamw8bit:
    # AdamW that keeps 8-bit state for the matrices of the blocks
    weights_dtype: str = 'float32'  # of the matrices of the blocks and their gradients: float32, or bfloat16, which
    # needs dtype=bfloat16 and optimizer=adamw8bit
    weight_decay: float = 0.1  # of matrices; norms, biases and other vectors have none
    beta1: float = 0.9  # AdamW: decay of the mean of the gradients
    beta2: float = 0.95  # AdamW: decay of the mean of the squared gradients
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    eval_interval: int = 100  # steps between validations (every interval: 0 switches it off)
    eval_interval_tokens: int = 0  # the same in tokens: due at the first step that passes a multiple (0: not used)
    eval_tokens: int = 65_536  # tokens of a validation, always the same windows (0: the whole split)
    log_interval: int = 10  # steps between lines on the console and in metrics.jsonl
    sample_interval: int = 100  # steps between samples, from every prompt in three modes: greedy, typical, stress
    sample_prompts: str = '|The|In this|def|import'  # prompts of the samples, separated by | (empty: a new document)
    sample_tokens: int = 64  # tokens of a sample
    save_interval: int = 100  # steps between checkpoints; a run also saves one at the end (0: no checkpoints)
    save_interval_tokens: int = 0  # the same in tokens (0: not used)
    save_on_best: bool = True  # also save a checkpoint whenever the validation loss improves
    keep: int = 3  # newest checkpoints to keep, besides the best one and the mandatory ones (0: all)
    keep_every: int = 0  # steps between checkpoints that are never deleted (0: none)
    keep_every_tokens: int = 0  # the same in tokens (0: not used)
    archive_every: int = 0  # steps between archives in archives/: only weights, never deleted (0: none)
    archive_every_tokens: int = 0  # the same in tokens (0: not used)
    mandatory_steps: tuple[int, ...] = ()  # steps with a checkpoint that is never deleted (two_stage adds the two steps
    # at its boundary)
    max_skipped: int = 5  # this many skipped steps in a row end the run: loss or gradient not finite, or a spike
    spike_z: float = 0.0  # skip a step whose loss is this many standard deviations above the mean (0: never)
    spike_window: int = 100  # steps that the mean covers; no step counts as a spike before half of them are done
    seed: int = 1337  # for the initialisation, the order of the data, and dropout
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, tf32, bfloat16, float16, or fp8 (bfloat16 with fp8 products in dense matrices)
    compile: str = 'auto'  # torch.compile: true, false, or auto (on a GPU; on a CPU in runs of at least 10M tokens)
    compile_timeout: int = 600  # seconds for the compilation; after that, the run continues without it
    activation_checkpointing: bool = False  # recompute activations in backward: less memory, more time
    parallel: str = 'ddp'  # several processes: ddp, or fsdp, which shards weights, gradients and optimizer state
    dist_timeout: int = 600  # seconds that a process waits for the others
    init_from: str = ''  # start with the weights of a run, a checkpoint or a pretrained model. The last sets the shape:
    # gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, hf:DIRECTORY or hf:NAME on the Hugging Face Hub
    distill_from: str = ''  # also learn from the predictions of this run or pretrained model; needs the same tokenizer
    distill_weight: float = 0.5  # w in the loss (1 - w) cross-entropy + w KL(teacher || model)
    ternary_warmup: float = 0.0  # ternary weights: share of the run in which they go from full precision to ternary
    anneal_steps: int = 0  # ffn=trix: steps in which the tiles of a token decrease from trix_tiles to trix_top_k
    resume: str = ''  # auto (or no value): continue from the newest good checkpoint in out_dir, if there is one;
    # or the path of a checkpoint or run to continue from
    other_data: bool = False  # let --resume continue with other data than before
    verify: bool = False  # read all tokens and compare their sha256, even if no file has changed since the last time
    plan: bool = False  # show parameters, memory, time, disk and schedule of the run, and exit
    card: str = ''  # --plan: for this GPU, such as "RTX 3060" or "A100 80GB", which need not be here (empty: no name)
    card_gb: float = 0.0  # --plan: for a GPU with this memory in GB (0: the memory of --card or of this machine)
    price: float = 0.0  # --plan: the price of a GPU per hour, in any currency, to print the cost of the run (0: none)
    profile: bool = False  # record three early steps with torch.profiler, and show the memory by kind
    tensorboard: bool = False  # also write scalars and samples for TensorBoard, in out_dir/tensorboard
    wandb: bool = False  # also send scalars to Weights & Biases (WANDB_MODE=offline needs no network)

    @staticmethod
    def choices():
        """{option: its allowed values}"""
        return {'schedule': schedules.SCHEDULES, 'optimizer': OPTIMIZERS, 'weights_dtype': ('float32', 'bfloat16'),
                'parallel': ('ddp', 'fsdp'), 'packing': ('stream', 'best_fit')}

    def problems(self):
        found = [f'{key}={getattr(self, key)} must be at least 1' for key in
                 ('max_steps', 'batch_size', 'max_skipped', 'spike_window', 'sample_tokens', 'compile_timeout',
                  'dist_timeout') if getattr(self, key) < 1]
        found += [f'{key}={getattr(self, key)} must not be negative' for key in
                  ('batch_tokens', 'matrix_lr', 'grad_clip', 'eval_tokens', 'log_interval', 'sample_interval', 'keep',
                   'spike_z', 'seed', 'anneal_steps', 'max_windows', 'plateau_steps', *INTERVALS,
                   *(f'{key}_tokens' for key in INTERVALS)) if getattr(self, key) < 0]
        if not 0 <= self.price < math.inf:
            found.append(f'price={self.price}: expected the price of a GPU for an hour, or 0')
        found += [f'{key}={getattr(self, key)} is for --plan' for key in ('card', 'card_gb', 'price')
                  if getattr(self, key) and not self.plan]
        found += [f'{key}={getattr(self, key)} must lie in [0, 1)' for key in ('beta1', 'beta2')
                  if not 0 <= getattr(self, key) < 1]
        if not 0 <= self.document_starts < 1:
            found.append(f'document_starts={self.document_starts} must lie in [0, 1)')
        elif self.document_starts and self.packing == 'best_fit':
            found.append(f'document_starts={self.document_starts} is for packing=stream: '
                         'with best_fit every row begins with a document. Add --document_starts=0')
        found += [f'{key}={getattr(self, key)!r} is not one of {", ".join(choices)}'
                  for key, choices in self.choices().items()
                  if key != 'schedule' and getattr(self, key) not in choices]  # schedule.problems checks that
        if self.learning_rate == 0:  # schedule.problems checks the rest
            found.append(f'learning_rate={self.learning_rate} must be greater than 0')
        if self.seed >= 2**63:
            found.append(f'seed={self.seed} must be below 2^63')
        if not 0 <= self.card_gb < math.inf:
            found.append(f'card_gb={self.card_gb}: expected the memory of a card in GB, or 0')
        if not 0 <= self.max_hours < math.inf:
            found.append(f'max_hours={self.max_hours}: expected a number of hours, or 0 for no limit')
        if not 0 <= self.distill_weight <= 1:
            found.append(f'distill_weight={self.distill_weight} must lie in [0, 1]')
        if self.stop_on not in ('', 'plateau'):
            found.append(f'stop_on={self.stop_on!r}: expected plateau, or nothing')
        elif bool(self.stop_on) != (self.plateau_steps > 0):
            found.append('--stop_on=plateau and --plateau_steps=N need each other: '
                         'N is the number of steps without an improvement')
        if self.matrix_lr and self.optimizer != 'muon':
            found.append(f'matrix_lr={self.matrix_lr} is for --optimizer=muon')
        if self.parallel == 'fsdp' and self.dtype == 'float16':
            found.append('dtype=float16 is not possible with sharded gradients: use --dtype=bfloat16 or --parallel=ddp')
        if self.parallel == 'fsdp' and self.optimizer == 'adamw8bit':
            found.append('optimizer=adamw8bit is not possible with sharded weights: use --parallel=ddp')
        if self.weights_dtype == 'bfloat16' and self.optimizer != 'adamw8bit':
            found.append('weights_dtype=bfloat16 needs --optimizer=adamw8bit, which rounds stochastically. '
                         f'{self.optimizer} would lose small updates')
        if self.weights_dtype == 'bfloat16' and self.dtype != 'bfloat16':
            found.append(f'weights_dtype=bfloat16 needs --dtype=bfloat16, not {self.dtype}')
        return found


def load(argv, usage=__doc__, import_pretrained=None):
    """
    Command line -> checked config. A pure function. UserError with one line per problem.

    import_pretrained: returns the module deploy.pretrained, for runs that may start from a pretrained model: the model
    that --init_from names then decides the shape. Without it, --init_from is only an option like any other.
    """
    words = dict(folder='config', bare={'resume': 'auto'})
    source = configurator.peek(argv, 'init_from', GPTConfig, TrainConfig, **words) if import_pretrained else ''
    pretrained = import_pretrained() if source and not {'--help', '-h'} & {*argv} else None
    shape = pretrained.options(source) if pretrained else {}

    def check(config):
        conflicts = pretrained.conflicts(config, source, shape) if shape else []
        return conflicts + problems(config)

    config = configurator.load(argv, GPTConfig, TrainConfig, usage=usage, check=check, spellings=SPELLINGS,
                               aliases=ALIASES, defaults=shape, source=source, **words)
    names = [Path(file).stem for file in config.files]
    config.out_dir = os.path.expanduser(config.out_dir) or f'runs/{"-".join(names) or "default"}'
    return config


def problems(config):
    """The problems of options that depend on each other, one string each. Also completes the config."""
    found = choose_one_of_two(config) + batch_problems(config)
    config.batch_tokens = config.batch_tokens or config.batch_size * config.block_size
    if config.precedence('epochs') and not 0 < config.epochs < math.inf:
        found.append(f'epochs={config.epochs:g} must be greater than 0: leave it out to train for max_steps')
    if config.epochs and config.dataset == 'fineweb_edu':
        found.append(f'epochs={config.epochs:g}: max_steps decides how much of fineweb_edu is prepared: '
                     'give --max_steps, or a prepared directory as --dataset')
    if config.anneal_steps and (config.ffn != 'trix' or config.trix_router == 'hash'):
        found.append(f'anneal_steps={config.anneal_steps} needs ffn=trix, and a trix_router other than hash')
    is_ternary = config.ffn in ('trix', 'bitnet') or config.linear != 'dense'
    if config.ternary_warmup and not is_ternary:
        found.append(f'ternary_warmup={config.ternary_warmup:g} needs ternary weights (ffn=trix, ffn=bitnet or '
                     'linear=bitnet)')
    if not 0 <= config.ternary_warmup <= 0.9:
        found.append(f'ternary_warmup={config.ternary_warmup:g} must lie between 0 and 0.9, a share of the run')
    if config.weights_dtype == 'bfloat16' and is_ternary:
        found.append(f'weights_dtype=bfloat16 is not for ternary weights (ffn={config.ffn}, linear={config.linear})')
    return found if config.epochs else found + step_problems(config)  # with epochs, the data decide the steps


def choose_one_of_two(config):
    """
    Of two options that exclude each other, the one that is set later stays: the command line comes after all files.
    Resets the other one to its default. Returns the problems: pairs that are set in the same place.
    """
    found = []
    for steps, other in (('max_steps', 'epochs'), *((key, f'{key}_tokens') for key in INTERVALS)):
        first, second = config.precedence(steps), config.precedence(other)
        if not first or not second or not getattr(config, other):
            continue
        if first == second:
            found.append(f'{config.origin[other]}: {steps} and {other} are both set: leave one of them out')
            continue
        loser = steps if first < second else other
        config.origin[loser] = 'default'
        setattr(config, loser, TrainConfig.__dataclass_fields__[loser].default)
    return found


def resolve_steps(config, n_windows, step=0, windows=0):
    """
    Set max_steps from `epochs`, and all step counts that depend on it. Without `epochs`, nothing changes.

    The run reads round(epochs * n_windows) windows. If this is no multiple of the windows per step, the last step also
    reads the first windows of the next pass.
    n_windows: windows of the training data. step, windows: the steps done and windows read so far, of a resumed run.
    UserError with one line per problem.
    """
    if not config.epochs:
        return
    per_step = config.batch_tokens // config.block_size
    left = max(0, round(config.epochs * n_windows) - windows)
    config.max_steps = max(1, step + -(-left // per_step))
    if found := step_problems(config):
        raise UserError(*(f'epochs={config.epochs:g} is {config.max_steps:,} steps here: {problem}'
                          for problem in found))


def epoch_lines(config, n_windows):
    """What max_windows and epochs mean for data with n_windows windows: one line each."""
    lines = []
    if config.max_windows:
        lines.append(f'max_windows={config.max_windows:,}: training reads only the first {n_windows:,} windows '
                     'of the data')
    if config.epochs:
        more = config.max_steps * config.batch_tokens // config.block_size - round(config.epochs * n_windows)
        lines.append(f'epochs={config.epochs:g}: {config.max_steps:,} steps of {config.batch_tokens:,} tokens'
                     + (f'; the last step also reads {more:,} windows of the next pass' if more > 0 else ''))
        lines += [f'{key}={getattr(config, key)}: {config.origin[key]}' for key in (*AUTOMATIC, 'mandatory_steps')
                  if config.origin[key].startswith('automatic')]
    return lines


def fit_steps(config, asked, max_steps):
    """
    Let the run of `config` end at max_steps, because max_hours asks for it. The schedule then ends there, too.

    asked: the config before any such change. Step counts of the schedule that don't fit any longer become automatic.
    """
    for key in AUTOMATIC:
        setattr(config, key, getattr(asked, key))
        config.origin[key] = asked.origin[key]
    config.max_steps = min(asked.max_steps, max_steps)
    if schedule_problems(config):
        for key, value in AUTOMATIC.items():
            setattr(config, key, value)
            config.origin[key] = f'automatic, for the {config.max_steps:,} steps of max_hours'
        schedule_problems(config)


def step_problems(config):
    """The problems of options that count steps, one string each. Also sets the automatic warm-up."""
    found = schedule_problems(config)
    if config.anneal_steps > max(1, config.max_steps):
        found.append(f'anneal_steps={config.anneal_steps} is longer than the run of max_steps={config.max_steps}')
    if wrong := [step for step in config.mandatory_steps if not 0 < step <= config.max_steps]:
        if is_shortened(config) and config.origin['mandatory_steps'] != 'command line':
            config.mandatory_steps = tuple(step for step in config.mandatory_steps if step not in wrong)
            source = config.origin['mandatory_steps']
            config.origin['mandatory_steps'] = f'automatic, for a run shorter than the run of {source}'
        else:
            found.append(f'mandatory_steps={",".join(map(str, wrong))}: the run ends at max_steps={config.max_steps}')
    return found


def is_shortened(config):
    """
    Whether the run may be shorter than a config file expects: the command line sets its length, or the data do, which
    the file cannot know.
    """
    return bool(config.epochs) or 'command line' in (config.origin[key] for key in ('max_steps', 'max_windows'))


def schedule_problems(config):
    """
    The problems of the schedule, one string each. Also completes the config: it sets automatic warm-up steps. If the
    command line shortens the run of a config file and the file's step counts no longer fit, it sets the automatic step
    counts.
    """
    if config.warmup_steps == -1:
        config.origin['warmup_steps'] = 'default'
    for _ in range(2):
        if config.origin['warmup_steps'].startswith(('default', 'automatic')):
            config.warmup_steps = max(0, config.max_steps // (10 if config.schedule == 'onecycle' else 20))
        found = schedules.problems(config) if config.max_steps >= 1 else []
        short = [key for key in AUTOMATIC if config.origin[key] not in ('default', 'command line')]
        if not found or not is_shortened(config) or not short:
            break
        for key in short:
            setattr(config, key, AUTOMATIC[key])
            config.origin[key] = f'automatic, for a run shorter than the run of {config.origin[key]}'
    return found


def batch_problems(config):
    micro = config.batch_size * config.block_size
    if micro < 1 or config.batch_tokens % micro == 0:
        return []
    below = config.batch_tokens // micro * micro
    nearest = ' or '.join(str(tokens) for tokens in (below, below + micro) if tokens)
    return [f'batch_tokens={config.batch_tokens} is not a multiple of batch_size * block_size = {micro}; '
            f'the nearest are {nearest}']


def micro_batches(config, world):
    """(sequences per micro-step and process, micro-steps per step). UserError if the processes can't split a step."""
    rows = config.batch_tokens // config.block_size
    size = min(config.batch_size, max(1, rows // world))
    if rows % (world * size):
        unit = world * size * config.block_size
        below = config.batch_tokens // unit * unit
        nearest = ' or '.join(str(tokens) for tokens in (below, below + unit) if tokens)
        raise UserError(f'batch_tokens={config.batch_tokens} is {rows} sequences. {world} processes cannot divide them '
                        f'into micro-steps of {size}; the nearest batch_tokens that divide are {nearest} '
                        '(or change batch_size, or the number of processes)')
    return size, rows // (world * size)


def is_on(config, key):
    """Whether an interval of INTERVALS, or another one in steps, is not switched off."""
    return bool(getattr(config, f'{key}_tokens', 0) or getattr(config, key))


def is_due(config, key, step, tokens):
    """Whether the action with the interval `key` is due after `step` steps and `tokens` tokens."""
    if every := getattr(config, f'{key}_tokens', 0):
        return tokens // every > (tokens - config.batch_tokens) // every  # this step has passed a multiple
    every = getattr(config, key)
    return every > 0 and step % every == 0


def due_steps(config, key):
    """The steps from 1 to max_steps at which the action with the interval `key` is due."""
    if every := getattr(config, f'{key}_tokens', 0):
        times = config.max_steps * config.batch_tokens // every
        return {-(-number * every // config.batch_tokens) for number in range(1, times + 1)}
    every = getattr(config, key)
    return set(range(every, config.max_steps + 1, every)) if every else set()
