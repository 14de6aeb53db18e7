"""Train a language model, from corpus to checkpoint.

    python train.py config/trix_tiny.py                                  # a 2M-parameter TriX model on Python's own library
    python train.py config/trix_tiny.py --ffn=gelu --out_dir=runs/dense  # any knob on the command line; --help lists them
    python train.py config/trix_tiny.py --resume=auto                    # go on from the newest good checkpoint, exactly

Exit codes: 0 finished, 2 a mistake in the call or an input, 3 diverged, 75 interrupted (saved; try again with --resume=auto).
"""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import checkpoint
import configurator
import device as hardware
from configurator import UserError
from data import Prefetcher, TokenData, data_dir, load_tokenizer, read_json, token_bytes
from evaluate import validate
from model import GPT, GPTConfig
from sample import encode, generate


@dataclass
class TrainConfig:
    out_dir: str = ''  # directory of the run (empty: runs/<name of the last config file>)
    dataset: str = 'pylib'  # pylib, text:<file, directory or glob>, or a directory that prepare.py made
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences in a micro-step
    batch_tokens: int = 0  # tokens in an optimizer step, a multiple of batch_size * block_size (0: one micro-step)
    learning_rate: float = 1e-3  # peak, after the warm-up
    min_lr_ratio: float = 0.1  # learning rate at the end, as a part of the peak
    warmup_steps: int = 100  # steps of linear warm-up
    schedule: str = 'cosine'  # cosine or constant, after the warm-up
    weight_decay: float = 0.1  # on matrices; norms, biases and other vectors have none
    beta1: float = 0.9  # AdamW: decay of the mean of the gradients
    beta2: float = 0.95  # AdamW: decay of the mean of their squares
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    eval_interval: int = 100  # steps between validations; like every interval, 0 switches it off
    eval_tokens: int = 65_536  # tokens of a validation, always the same windows (0: all of the split)
    log_interval: int = 10  # steps between lines on the console and in metrics.jsonl
    sample_interval: int = 100  # steps between samples
    sample_prompts: str = ''  # prompts of those samples, '|' between them (empty prompt: the start of a document)
    save_interval: int = 100  # steps between checkpoints (there is one at the end and at every better validation, too)
    keep: int = 3  # newest checkpoints that are kept, beside the best and the mandatory ones (0: all)
    mandatory_steps: tuple[int, ...] = ()  # steps with a checkpoint that is never deleted
    max_skipped: int = 5  # steps in a row with a non-finite loss or gradient that end the run
    seed: int = 1337  # of the initialisation, the order of the data and dropout
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, bfloat16 or float16
    compile: str = 'auto'  # torch.compile: auto, true or false
    activation_checkpointing: bool = False  # recompute activations in backward: less memory, more time
    resume: str = ''  # auto: go on from the newest good checkpoint in out_dir, if any; or a checkpoint or run to go on from

    def problems(self):
        found = [f'{key}={getattr(self, key)} must be at least 1' for key in ('max_steps', 'batch_size', 'max_skipped')
                 if getattr(self, key) < 1]
        found += [f'{key}={getattr(self, key)} must not be negative' for key in
                  ('batch_tokens', 'learning_rate', 'min_lr_ratio', 'warmup_steps', 'weight_decay', 'grad_clip', 'eval_interval',
                   'eval_tokens', 'log_interval', 'sample_interval', 'save_interval', 'keep', 'seed') if getattr(self, key) < 0]
        found += [f'{key}={getattr(self, key)} must lie in [0, 1)' for key in ('beta1', 'beta2') if not 0 <= getattr(self, key) < 1]
        return found + ([] if self.schedule in ('cosine', 'constant') else [f'schedule={self.schedule!r} is not one of cosine, constant'])


def load(argv):
    """Command line -> checked config; a pure function."""
    config = configurator.load(argv, GPTConfig, TrainConfig, usage=__doc__, check=batch_problems)
    files = [Path(word).stem for word in argv if word.endswith('.py') and not word.startswith('--')]
    config.out_dir = config.out_dir or f'runs/{files[-1] if files else "default"}'
    config.batch_tokens = config.batch_tokens or config.batch_size * config.block_size
    return config


def batch_problems(config):
    micro = config.batch_size * config.block_size
    if micro < 1 or config.batch_tokens % micro == 0:
        return []
    below = config.batch_tokens // micro * micro
    nearest = ' or '.join(f'{n}' for n in (below, below + micro) if n)
    return [f'batch_tokens={config.batch_tokens} is no multiple of batch_size * block_size = {micro}; the nearest are {nearest}']


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop

def find_data(config):
    """The directory of the tokens that config.dataset names; prepared now if it is missing and can be."""
    path, name = data_dir(config.dataset), config.dataset
    can_prepare = name == 'pylib' or name.startswith('text:')
    if can_prepare and (path / 'meta.json').is_file() and read_json(path / 'meta.json').get('vocab_size') != config.vocab_size:
        path = path.with_name(f'{path.name}-{config.vocab_size}')  # the same corpus in another vocabulary
    if can_prepare and not (path / 'meta.json').is_file():
        print(f'{path} is not there yet: preparing {name} (once; under a minute for pylib)', flush=True)
        command = [sys.executable, str(Path(__file__).with_name('prepare.py')), f'--dataset={name}',
                   f'--vocab_size={config.vocab_size}', f'--out={path}']
        if code := subprocess.run(command).returncode:
            sys.exit(code)  # prepare.py has said why
    if not path.is_dir() and not can_prepare:
        raise UserError(f'dataset={name}: no directory {path}, and prepare.py can make pylib and text:PATH alone: bring the tokens '
                        'there, or choose --dataset=pylib')
    return TokenData(path, config.block_size, config.vocab_size)


def find_checkpoint(config, data):
    """(path, state) to resume from, or (None, None) to start afresh. UserError if it can't go on with this config and data."""
    out, source = Path(config.out_dir), Path(config.out_dir if config.resume == 'auto' else config.resume)
    there = checkpoint.steps(out / 'checkpoints')
    own = config.resume and out.resolve() in (source.resolve(), *source.resolve().parents)
    if not own and (there or (out / 'metrics.jsonl').exists()):
        raise UserError(f'{out} already holds a run: go on with it by --resume=auto, or start another by --out_dir={out}-2')
    if not config.resume:
        return None, None
    if config.resume == 'auto' and not there:
        print(f'--resume=auto: no checkpoint in {out}, starting at step 0')
        return None, None
    path, state = checkpoint.find(source)
    if path == source and own and path.name < there[-1].name:
        raise UserError(f'{path}: {out} has a later checkpoint, {there[-1].name}: go on from there by --resume=auto, '
                        f'or from here in another directory by --out_dir={out}-2')
    saved = state['config']
    changed = {key: (saved[key], value) for key, value in config.as_dict().items() if key in saved and saved[key] != value}
    model_keys = {field.name for field in fields(GPTConfig)} - {'chunk_size'}  # which changes how, not what is computed
    if wrong := [f'{path}: {key} is {old} in the checkpoint, {new} in the config: an architecture can\'t change on the way'
                 for key, (old, new) in changed.items() if key in model_keys]:
        raise UserError(*wrong)
    if data.tokenizer != state['tokenizer']:
        raise UserError(f'{path}: trained with another tokenizer than that of {data.path}')
    if data.fingerprint != state['data']['fingerprint'] and 'dataset' not in changed:
        raise UserError(f'{path}: {data.path} is not the data that it was trained on; bring that back, '
                        'or name another by --dataset to go on with other data')
    print(f'resuming from {path}, step {state["step"]:,}')
    for key, (old, new) in changed.items():
        if key not in ('resume', 'out_dir'):
            print(f'  changed: {key} {old} -> {new}')
    return path, state


def make_optimizer(model, config, device):
    """AdamW; which parameters decay, the model says."""
    decayed = model.decayed()
    names = {id(p) for p in decayed}
    groups = [{'params': decayed, 'weight_decay': config.weight_decay},
              {'params': [p for p in model.parameters() if id(p) not in names], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=device.type != 'mps')


def random_state(device):
    return {'cpu': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state(device) if device.type == 'cuda' else None}


def set_random_state(state, device):
    torch.set_rng_state(state['cpu'].cpu())
    if device.type == 'cuda' and state['cuda'] is not None:
        torch.cuda.set_rng_state(state['cuda'].cpu(), device)


def learning_rate(step, config):
    """Rate of optimizer step `step` (from 0): linear warm-up, then cosine down to min_lr_ratio, or constant."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == 'constant':
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    low = config.min_lr_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Log:
    """The files of a run: log.txt (what the console says), metrics.jsonl, samples.jsonl, status.json."""

    def __init__(self, out):
        self.out = Path(out)

    def say(self, text):
        print(text, flush=True)
        self.append('log.txt', text)

    def line(self, name, **values):
        self.append(name, json.dumps(values, allow_nan=True))

    def append(self, name, text):
        with self.writing(name), open(self.out / name, 'a') as file:
            file.write(text + '\n')

    def status(self, **values):
        with self.writing('status.json'), checkpoint.replacing(self.out / 'status.json') as file:
            file.write(json.dumps({**values, 'pid': os.getpid(), 'time': time.time()}).encode())

    @contextlib.contextmanager
    def writing(self, name):
        try:
            yield
        except OSError as error:
            raise UserError(f'{self.out / name}: can\'t be written ({error.strerror}): make room there and go on with '
                            '--resume=auto, or choose another --out_dir')

    def cut(self, step):
        """Drop what a resumed run will say again: training after `step`, validation and samples from `step` on."""
        for name in ('metrics.jsonl', 'samples.jsonl'):
            if (self.out / name).exists():
                with checkpoint.replacing(self.out / name) as file:
                    for raw in (self.out / name).read_bytes().splitlines(keepends=True):
                        try:
                            line = json.loads(raw)
                        except ValueError:  # torn by a kill
                            continue
                        if line['step'] < step or line['step'] == step and line.get('kind') in ('train', 'event'):
                            file.write(raw)


# ----------------------------------------------------------------------------------------------------------------------

def main(argv):
    config = load(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # nothing to save before the loop
    print(config.table())
    device, dtype, why = hardware.resolve(config.device, config.dtype)
    use_compile, why_compile = hardware.choose_compile(config.compile, device)
    data = find_data(config)
    origin, state = find_checkpoint(config, data)
    out, encoding = Path(config.out_dir), load_tokenizer(data.tokenizer)
    lengths, windows = token_bytes(encoding), data.val_windows(config.eval_tokens)

    torch.manual_seed(config.seed)
    model = GPT(config.pick(GPTConfig)).to(device)
    model.activation_checkpointing = config.activation_checkpointing
    optimizer = make_optimizer(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, best_step, skipped, seconds = 0, math.inf, 0, 0, 0.0
    if state:
        checkpoint.load_weights(model, state, origin)
        optimizer.load_state_dict(state['optimizer'])
        scaler.load_state_dict(state['scaler'])
        set_random_state(state['rng'], device)
        step, best, best_step, skipped, seconds = (state[key] for key in ('step', 'best', 'best_step', 'skipped', 'seconds'))
        del state
    compiled = torch.compile(model) if use_compile else model

    micro_steps = config.batch_tokens // (config.batch_size * config.block_size)
    batch_rows = config.batch_tokens // config.block_size
    per_token, peak = model.flops_per_token(), hardware.peak_flops(device, dtype)
    log = Log(out)
    with log.writing(''):
        (out / 'checkpoints').mkdir(parents=True, exist_ok=True)
        log.cut(step)
        for stale in [*out.glob('*.tmp'), *(out / 'checkpoints').glob('*.tmp')]:  # of a run that was killed
            stale.unlink()
        with checkpoint.replacing(out / 'config.json') as file:
            file.write(json.dumps(config.as_dict(), indent=1).encode())
    log.say(f'on {why}; {why_compile}')
    for kind, total, used in model.parameter_table():
        log.say(f'  {kind:10s} {total:12,} parameters' + (f', of which a token uses {used:,}' if used != total else ''))
    log.say(f'{sum(p.numel() for p in model.parameters()):,} parameters, {per_token / 1e6:.1f} MFLOP a token; '
            f'{data.train_tokens:,} training tokens in {data.path}; {config.max_steps:,} steps of {config.batch_tokens:,} tokens '
            f'= {micro_steps} micro-step{"s" * (micro_steps > 1)} of {config.batch_size} x {config.block_size}: '
            f'{config.max_steps * config.batch_tokens / data.train_tokens:.2f} epochs')

    asked = []  # signals: the loop looks at them between micro-steps, so that it stops where it can save
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))

    def batch(step, micro):
        x, y = data.batch(step, micro, config.batch_size, batch_rows, seed=config.seed)
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        return (x.pin_memory(), y.pin_memory()) if device.type == 'cuda' else (x, y)

    def save():
        path = out / 'checkpoints' / f'step_{step:07d}.pt'
        checkpoint.save(path, {
            'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
            'step': step, 'tokens': step * config.batch_tokens, 'best': best, 'best_step': best_step, 'skipped': skipped,
            'seconds': seconds, 'config': config.as_dict(), 'tokenizer': data.tokenizer,
            'data': {'path': str(data.path), 'fingerprint': data.fingerprint},
            'rng': random_state(device)})
        checkpoint.retain(path, config.keep, {best_step, *config.mandatory_steps})
        return path

    def draw_samples():
        for i, prompt in enumerate(config.sample_prompts.split('|')):
            idx, ids = torch.tensor([encode(encoding, prompt)], device=device), []
            with hardware.autocast(device, dtype):
                for token in generate(model, idx, encoding.n_vocab, 64, top_k=50, seed=config.seed + i):
                    if asked or token.item() == encoding.eot_token:
                        break
                    ids.append(token.item())
            text = encoding.decode(ids)
            log.line('samples.jsonl', step=step, prompt=prompt, text=text, tokens=len(ids))
            log.say(f'  sample: {prompt + text!r}')

    def status(state, **more):
        log.status(state=state, step=step, max_steps=config.max_steps, tokens=step * config.batch_tokens, best=best,
                   best_step=best_step, checkpoint=str(saved) if saved else None, **more)

    last_loss, saved = None, origin
    batches = Prefetcher(batch, ((s, m) for s in range(step, config.max_steps) for m in range(micro_steps)))
    since, waited, mark = 0, 0.0, time.perf_counter()  # steps and loader seconds since the last log line, its time
    status('running')
    model.statistics()  # flip rates count from here
    while True:
        # ---- at the top, `step` steps are done: validate, sample, save
        last = step >= config.max_steps
        paused = time.perf_counter()

        def due(interval):
            return interval and (step % interval == 0 or last)
        better = False
        if due(config.eval_interval) and (result := validate(model, data, lengths, windows, config.batch_size, device, dtype,
                                                             stop=lambda: asked)):
            log.line('metrics.jsonl', kind='eval', step=step, **{**result, 'tokens': step * config.batch_tokens})
            log.say(f'step {step:,}: validation loss {result["loss"]:.4f}, perplexity {result["perplexity"]:.1f}, '
                    f'{result["bits_per_byte"]:.4f} bits per byte')
            better = result['loss'] < best
            if better:
                best, best_step = result['loss'], step
        if due(config.sample_interval) and not asked:
            draw_samples()
        now = out / 'checkpoints' / f'step_{step:07d}.pt'
        wanted = step and config.save_interval and (due(config.save_interval) or better or step in config.mandatory_steps)
        if (wanted or asked) and saved != now:
            saved = save()
        if last or asked:
            break
        mark += time.perf_counter() - paused  # those don't count as training time

        # ---- one optimizer step
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group['lr'] = lr
        loss, before = torch.zeros((), device=device), random_state(device)
        for micro in range(micro_steps):
            x, y = next(batches)
            with hardware.autocast(device, dtype):
                part = compiled(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) / micro_steps
            scaler.scale(part).backward()
            loss += part.detach()
            if asked:
                break
        if asked:  # the step is not whole: it is done again, with the same dropout, after the resume
            set_random_state(before, device)
            continue
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        last_loss, norm = loss.item(), norm.item()  # the one wait for the device in a step
        finite = math.isfinite(last_loss) and (math.isfinite(norm) or scaler.is_enabled())  # fp16: the scaler skips by itself
        if finite:
            scaler.step(optimizer)
            scaler.update()
        logged = config.log_interval and ((step + 1) % config.log_interval == 0 or step + 1 == config.max_steps)
        model.update_balance(1e-3 if finite else 0.0)
        statistics = model.statistics() if logged else {}
        optimizer.zero_grad(set_to_none=True)
        skipped = 0 if finite else skipped + 1
        step, since = step + 1, since + 1
        if not finite:
            rows = [data.rows(step - 1, m, config.batch_size, batch_rows, seed=config.seed).tolist() for m in range(micro_steps)]
            log.line('metrics.jsonl', kind='event', event='skipped', step=step, loss=last_loss, grad_norm=norm, lr=lr, windows=rows)
            log.say(f'step {step:,} skipped: loss {last_loss}, gradient norm {norm} ({skipped} in a row, {config.max_skipped} end the run)')
            if skipped == config.max_skipped:
                status('diverged', loss=last_loss)
                log.say(f'diverged; the last good checkpoint is {saved}: lower the learning rate, and --resume={saved}'
                        if saved else 'diverged before the first checkpoint: lower the learning rate')
                sys.exit(3)

        if logged:
            hardware.synchronize(device)
            span = time.perf_counter() - mark
            seconds, mark = seconds + span, mark + span
            speed, memory = since * config.batch_tokens / span, hardware.peak_memory_gb(device)
            eta = (config.max_steps - step) * config.batch_tokens / speed
            log.line('metrics.jsonl', kind='train', step=step, tokens=step * config.batch_tokens, loss=last_loss, lr=lr,
                     wd=config.weight_decay, grad_norm=norm, tokens_per_s=speed, mfu=per_token * speed / peak if peak else None,
                     mem_gb=memory, loader_wait=(batches.wait - waited) / span, **statistics)
            log.say(f'step {step:,}/{config.max_steps:,} ({100 * step / config.max_steps:.0f} %)  loss {last_loss:.4f}  lr {lr:.2e}  '
                    f'norm {norm:.2f}  {speed:,.0f} tokens/s  {memory:.2f} GB  {int(eta // 60)}:{int(eta % 60):02d} left')
            status('running', loss=last_loss, tokens_per_s=speed, eta=eta)
            since, waited = 0, batches.wait

    if asked:
        status('interrupted', loss=last_loss)
        log.say(f'interrupted at step {step:,}, saved {saved}: go on with the same command and --resume=auto')
        sys.exit(75)
    status('finished', loss=last_loss)
    log.say(f'finished: {step:,} steps, {step * config.batch_tokens / 1e6:.1f}M tokens in {seconds / 60:.1f} minutes of training; '
            + (f'best validation loss {best:.4f} at step {best_step:,}' if math.isfinite(best) else f'last loss {last_loss}'))
    if saved:
        log.say(f'sample from it: {Path(sys.executable).name} sample.py {out} --num=3')


if __name__ == '__main__':
    configurator.run(main)
