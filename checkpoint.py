"""Checkpoints: atomic save, verified load, resume, retention.

Imported by train.py and by every script that takes a run:

    save('runs/x/checkpoints/step_0001000.pt', state)
    path, state = find('runs/x')               # the newest good checkpoint of a run; a file also works
    model, state = load_model('runs/x', device)

Packed files of export.py are not checkpoints. deploy.packed.load_model reads checkpoints and packed files.

A checkpoint is one dict of tensors and plain containers in torch's zip format. It is always read with
weights_only=True, which unpickles only tensors and plain containers. A file from a stranger therefore can't run code.
"""
import math
import re
import zipfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import UserError, typed
from files import replacing
from model import GPT, GPTConfig
from optim import local_tensor, own_rows
from tokenizer import equivalent
from schedule import schedule, ternary_share, top_k
from settings import fit_steps, resolve_steps

VERSION = 1
# Every checkpoint has these keys. The tokenizer is None if the training shards had none.
KINDS = {'model': dict, 'optimizer': dict, 'step': int, 'config': dict, 'tokenizer': (dict, type(None)), 'data': dict}


def save(path, state, advice='continue with --resume=auto'):
    """Write `state` to `path` atomically. UserError, with advice, if the file can't be written."""
    try:
        with replacing(path) as file:
            torch.save({'format': 'nanotrix-checkpoint', 'version': VERSION, **state}, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, 'strerror', None) or str(cause).split('\n')[0]
        older = [p.name for p in steps(Path(path).parent)]
        raise UserError(f'{path}: could not be written ({reason}); '
                        + (f'{older[-1]} is the newest good checkpoint' if older else 'there is no older checkpoint')
                        + f'; free some space and {advice}') from error


def load(path, map_location='cpu', verify=True, mmap=False):
    """The dict in a checkpoint file. UserError if the file is no valid checkpoint.

    verify: read the whole file first and check every record's CRC-32.
    mmap: map the file into memory. A tensor is then read from the file when it is used."""
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f'{path}: damaged (record {damaged} fails its checksum)')
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise UserError(f'{path}: truncated, or not a checkpoint')
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or error}')
    except Exception as error:  # weights_only raises several types for objects that it refuses
        if 'weights_only' in str(error) or 'Unsupported' in str(error):
            raise UserError(f'{path}: refused: it holds Python objects other than plain tensors and containers')
        raise UserError(f'{path}: damaged ({type(error).__name__})')
    if not isinstance(state, dict) or state.get('format') != 'nanotrix-checkpoint':
        raise UserError(f'{path}: not a checkpoint of this project')
    if state.get('version') != VERSION:
        raise UserError(f'{path}: checkpoint version {state.get("version")}, but this code reads version {VERSION}')
    if wrong := [key for key, kind in KINDS.items() if key not in state or not isinstance(state[key], kind)]:
        raise UserError(f'{path}: broken: no valid {", ".join(wrong)} in it')
    return state


def steps(directory):
    """The step_*.pt files of a directory, oldest first."""
    return sorted(Path(directory).glob('step_*.pt'), key=lambda p: int(re.sub(r'\D', '', p.stem) or -1))


def find(run, map_location='cpu', say=print, mmap=False):
    """A checkpoint file, or a run directory (its newest good checkpoint) -> (path, state). UserError if there is none.

    Damaged checkpoints of a run directory are reported and skipped. mmap: see load."""
    run = Path(run)
    if run.is_file():
        return run, load(run, map_location, mmap=mmap)
    if not run.is_dir():
        raise UserError(f'{run}: no such run or checkpoint')
    for path in reversed(steps(run / 'checkpoints')):
        try:
            return path, load(path, map_location, mmap=mmap)
        except UserError as error:
            say(f'skipped: {error}')
    raise UserError(f'{run}: no good checkpoint in {run / "checkpoints"}')


def resume(config, data, world, say=print, find=find):
    """The checkpoint (path, state) that a run of train.py resumes, or (None, None) for a new run. Prints what changed.

    find: finds and reads the checkpoint. UserError if the checkpoint doesn't fit this config or data, or if the run
    would overwrite another run in config.out_dir."""
    out, source = Path(config.out_dir), Path(config.out_dir if config.resume == 'auto' else config.resume)
    there = steps(out / 'checkpoints')
    own = config.resume and out.resolve() in (source.resolve(), *source.resolve().parents)
    if not own and (there or (out / 'metrics.jsonl').exists()):
        raise UserError(f'{out} already holds a run: continue it with --resume=auto, '
                        f'or start another with --out_dir={out}-2')
    if not config.resume:
        return None, None
    if config.resume == 'auto' and not there:
        say(f'--resume=auto: no checkpoint in {out}, starting at step 0')
        return None, None
    path, state = find(source, say=say)
    # A file that export.py convert wrote has only weights.
    if not state['optimizer'] or not {'scaler', 'rng', 'tokens', 'best', 'skipped', 'seconds'} <= state.keys():
        raise UserError(f'{path}: this file has weights but no optimizer state, so no run can continue from it: '
                        f'start a new run with --init_from={path}')
    if path == source and own and path.name < there[-1].name:
        raise UserError(f'{path}: {out} has a later checkpoint, {there[-1].name}: continue from the later one with '
                        f'--resume=auto, or continue from this one in another directory with --out_dir={out}-2')
    theirs, ours = state['data'].get('fingerprint'), data.fingerprint
    state.setdefault('windows', state['tokens'] // config.block_size)  # older checkpoints don't count windows
    resolve_steps(config, data.n_windows, state['step'], state['windows'] if theirs == ours else 0)
    if config.max_hours and state.get('fitted_steps'):
        fit_steps(config, config.copy(), state['fitted_steps'])
    # Older checkpoints lack these options.
    older = {'packing': 'stream', 'document_starts': 0.0, 'max_windows': 0, 'weights_dtype': 'float32'}
    saved = {**vars(GPTConfig()), **older, **state['config']}
    changed = {key: (saved[key], value) for key, value in config.as_dict().items()
               if key in saved and saved[key] != value}
    # chunk_size does not change the result. eot_id comes from the tokenizer.
    fixed = {'optimizer', 'weights_dtype'}
    model_keys = {field.name for field in fields(GPTConfig)} - {'chunk_size', 'eot_id'} | fixed
    if wrong := [f'{path}: {key} is {old} in the checkpoint, {new} in the config: it cannot change when resuming'
                 for key, (old, new) in changed.items() if key in model_keys]:
        raise UserError(*wrong)
    same_tokenizer(state, data, path)
    if theirs != ours and not config.other_data:
        raise UserError(f'{path}: trained on other data than {data.path} (fingerprint {theirs}, here {ours}): '
                        f'use the old data (--dataset={state["data"].get("path")}), '
                        'or continue on the new data with --other_data')
    changed = {key: pair for key, pair in changed.items() if key not in ('resume', 'out_dir', 'plan')}
    if state.get('processes', 1) != world:
        changed['processes'] = state.get('processes', 1), world
    say(f'resuming from {path}, step {state["step"]:,}')
    for key, (old, new) in changed.items():
        say(f'  changed: {key} {old} -> {new}')
    if theirs != ours:
        state['windows'] = 0
        say('  other data: this run reads them from their first window on')
    if theirs != ours or 'eval_tokens' in changed:
        state['best'], state['best_step'] = math.inf, 0
        say('  other validation tokens: losses before and after are not comparable, so the best loss starts anew')
    for line in consequences(changed, saved, config, state):
        say(f'  {line}')
    return path, state


def consequences(changed, saved, config, state):
    """Lines on what changed options mean for the rest of a resumed run. saved: the checkpoint's config, a dict."""
    step = state['step']
    if 'batch_tokens' in changed and step < config.max_steps:
        left, (old, new) = config.max_steps - step, changed['batch_tokens']
        yield (f'the schedule counts steps: {left:,} more steps end the run at {state["tokens"] + left * new:,} tokens '
               f'(at {old:,} tokens a step: {state["tokens"] + left * old:,})')
    if 'seed' in changed and state['windows']:
        yield 'another seed changes the order of the data: this run may read a window of this epoch twice or not at all'
    if 'max_windows' in changed and state['windows']:
        yield ('another max_windows changes the order of the data: '
               'this run may read a window of this epoch twice or not at all')
    if ('packing' in changed or 'document_starts' in changed) and state['windows']:
        yield ('another packing or document_starts makes other rows: '
               'this run may read a text of this epoch twice or not at all')
    try:
        old_rate, old_decay = schedule(step, SimpleNamespace(**saved))
    except AttributeError:  # the config of an older version lacks some options
        return
    rate, decay = schedule(step, config)
    if not math.isclose(rate, old_rate):
        yield f'the learning rate continues at {rate:.3g} (without these changes: {old_rate:.3g})'
    if decay != old_decay:
        yield f'the weight decay continues at {decay:g} (without these changes: {old_decay:g})'


def same_tokenizer(state, data, path, option='--resume'):
    if data.tokenizer and not state['tokenizer']:
        raise UserError(f'{option}: {path} has no tokenizer: its ids may mean other tokens than the ids of {data.path}')
    if not equivalent(data.tokenizer, state['tokenizer']):
        raise UserError(f'{option}: {path}: trained with another tokenizer than {data.path} has: prepare the data with '
                        f'its tokenizer, --tokenizer={Path(state["data"].get("path", ""), "tokenizer.json")}')


def model_config(state, path, context=0):
    """The GPTConfig of a checkpoint, with block_size raised to `context` if that is larger.

    UserError if the checkpoint's config is broken, or if it has learned positions for fewer than `context` tokens."""
    try:
        config = GPTConfig(**{f.name: typed(state['config'][f.name], f.type) for f in fields(GPTConfig)
                              if f.name in state['config']})
    except (TypeError, ValueError, OverflowError):
        raise UserError(f'{path}: its config has values of the wrong type')
    if problems := config.problems():
        raise UserError(*(f'{path}: {problem}' for problem in problems))
    if config.document_mask and config.eot_id < 0:
        raise UserError(f'{path}: its config is broken: document_mask=True needs eot_id, the id that ends a document')
    steps = state['config'].get('anneal_steps', 0)
    if config.ffn == 'trix' and isinstance(steps, int) and steps > 0:  # tiles in use at the checkpoint's step
        trained = SimpleNamespace(anneal_steps=steps, trix_tiles=config.trix_tiles, trix_top_k=config.trix_top_k)
        config.trix_top_k = top_k(max(0, state['step']), trained)
    if context > config.block_size and config.positions == 'learned':
        raise UserError(f'--context={context}: {path} has learned positions, and only {config.block_size} of them')
    config.block_size = max(config.block_size, context)
    return config


@torch.no_grad()
def load_weights(model, state, path):
    """Copy a checkpoint's weights into the model. The UserError names weights that don't fit or are not finite.

    If FSDP has sharded the model, this process reads only its own rows of the weights."""
    try:
        saved, own = state['model'], model.state_dict()
        wrong = [name for name in sorted(saved.keys() | own.keys())
                 if name not in saved or name not in own or saved[name].shape != own[name].shape]
    except AttributeError:
        raise UserError(f'{path}: its weights are not a dict of tensors')
    if wrong:
        raise UserError(f'{path}: another architecture: {", ".join(wrong[:3])}'
                        + (f' and {len(wrong) - 3} more' if wrong[3:] else '') + ' do not fit the model')
    saved = {name: own_rows(value, own[name]) for name, value in saved.items()}
    if broken := [name for name, value in saved.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise UserError(f'{path}: {len(broken)} of its {len(saved)} tensors hold numbers that are not finite '
                        f'({broken[0]} is the first): use an earlier checkpoint')
    for name, value in saved.items():
        local_tensor(own[name]).copy_(value)


def load_model(run, device, context=0):
    """A run directory or checkpoint -> (GPT in eval mode on the device, the checkpoint's dict).

    context: the length of a window in tokens, if it is more than block_size. UserError if the model has fewer learned
    positions."""
    path, state = find(run, device)
    return build_model(state, path, device, context)


def build_model(state, path, device, context=0):
    """The dict of a checkpoint -> (GPT in eval mode on the device, the dict). Otherwise as load_model."""
    model = GPT(model_config(state, path, context)).to(device)
    load_weights(model, state, path)
    model.set_ternary(trained_share(state))
    return model.eval(), state


def trained_share(state):
    """How far the ternary weights of a checkpoint had gone to their codes at its step: 1 behind the ternary warm-up."""
    config = state['config']
    step, warmup, length = state.get('step'), config.get('ternary_warmup', 0.0), config.get('max_steps')
    if not all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in (step, warmup, length)):
        return 1.0  # a model that was not trained here, or a config of an older version
    return ternary_share(step, SimpleNamespace(ternary_warmup=warmup, max_steps=length))


def retain(newest, keep, forever):
    """Delete old checkpoints after `newest` was saved. Keeps the last `keep` up to `newest` and the steps in `forever`.

    keep=0 deletes nothing. A checkpoint later than `newest` is left alone: it must be a damaged one of the run that was
    resumed, and will soon be overwritten."""
    kept = {f'step_{step:07d}.pt' for step in forever}
    older = [path for path in steps(newest.parent) if path.name <= newest.name]
    for path in older[:-keep] if keep else []:
        if path.name not in kept:
            path.unlink(missing_ok=True)
