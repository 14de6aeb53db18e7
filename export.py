"""A trained model as a file that runs elsewhere, small and fast.

    python export.py pack runs/x                       # runs/x/packed.safetensors: 2 bits a ternary weight
    python export.py pack runs/x small.safetensors --embeddings=int8
    python sample.py small.safetensors                 # takes it in place of a run, as evaluate.py does

Every export ends with a comparison of its outputs with those of the model that was trained, on text.
"""
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import device as hardware
import packed
from checkpoint import load_model
from configurator import UserError, load, run
from data import TokenData
from tokenizer import encode, load_tokenizer

PARITY_TOKENS = 2048


@dataclass
class ExportConfig:
    command: str = ''  # pack; may stand without --command=
    run: str = ''  # run directory (its newest good checkpoint) or checkpoint file; may stand without --run=
    out: str = ''  # where to (empty: into the run); may stand without --out=
    embeddings: str = 'float32'  # pack: embedding and head as float32, bfloat16 or int8 (a scale for each row)
    device: str = 'auto'  # of the comparison: auto, cpu, cuda, cuda:N or mps

    def problems(self):
        found = [] if self.command in COMMANDS else [f'{self.command or "no command"}: name one of {", ".join(COMMANDS)}']
        found += [] if self.run else ['name a run directory or a checkpoint: python export.py pack runs/x']
        if self.embeddings not in packed.EMBEDDINGS:
            found.append(f'embeddings={self.embeddings!r} is not one of {", ".join(packed.EMBEDDINGS)}')
        return found


# ----------------------------------------------------------------------------------------------------------------------
# What an export computes beside what was trained

def real_text(state, config):
    """(name, ids int64 (n, T)) of up to PARITY_TOKENS tokens: of the run's validation split, or of the README where it is gone."""
    T = min(config.block_size, 256)
    try:
        data = TokenData(state['data'].get('path', ''), T, config.vocab_size)
        if data.tokenizer == state['tokenizer']:
            return f'{data.path}/val.bin', torch.from_numpy(data.val_batch(data.val_windows(PARITY_TOKENS))[0])
    except UserError:
        pass
    if state['tokenizer'] is None:
        return 'random ids', torch.randint(config.vocab_size, (PARITY_TOKENS // T, T), generator=torch.Generator().manual_seed(0))
    ids = encode(load_tokenizer(state['tokenizer']), Path(__file__).with_name('README.md').read_text())
    ids = np.resize(ids.astype(np.int64), (max(1, min(len(ids), PARITY_TOKENS) // T), T))
    return 'README.md', torch.from_numpy(ids)


def parity(what, ours, theirs, source):
    """Say how far two (N, V) fp32 tensors of logits agree -> (share of rows with the same likeliest token, largest difference of
    log-probabilities)."""
    top = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    largest = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    print(f'parity of {what} with the trained model on {len(ours):,} tokens of {source}: the same likeliest token for {100 * top:.2f} %, '
          f'log-probabilities at most {largest:.2g} apart')
    return top, largest


@torch.no_grad()
def logits_of(model, ids):
    device = next(model.parameters()).device
    return torch.cat([model(row[None].to(device))[0].float().cpu() for row in ids])


# ----------------------------------------------------------------------------------------------------------------------

def pack(config):
    device, _, _ = hardware.resolve(config.device, 'float32')
    model, state = load_model(config.run, device)
    out = Path(config.out or Path(config.run if Path(config.run).is_dir() else Path(config.run).parent) / 'packed.safetensors')
    if out.suffix != '.safetensors':
        raise UserError(f'{out}: a packed model is a .safetensors file')
    if 'packed' in state:
        raise UserError(f'{config.run}: packed already')
    tensors = packed.pack(model, config.embeddings)
    packed.write(out, tensors, config.embeddings, state)

    kinds, fp32 = defaultdict(lambda: [0, 0]), 0
    for name, tensor in tensors.items():
        size, weights = tensor.nbytes, 4 * tensor.numel()
        if name.endswith('.codes'):
            kind, shape = 'ternary codes', model.get_parameter(name.removesuffix('.codes')).shape
            weights = 4 * shape.numel()
            print(f'{name.removesuffix(".codes"):36} {" x ".join(map(str, shape)):>16}  {weights:>12,} -> {size:>11,} bytes: {weights / size:.4g}x')
        else:
            kind = 'scales' if name.endswith('.scale') else 'embeddings' if name in ('wte.weight', 'lm_head.weight') else 'everything else'
            weights = 0 if kind == 'scales' else weights
        kinds[kind][0] += weights
        kinds[kind][1] += size
    total = sum(size for _, size in kinds.values())
    kinds['tokenizer, config, names'] = [0, out.stat().st_size - total]
    for kind, (before, after) in kinds.items():
        print(f'{kind:26} {before:>14,} -> {after:>12,} bytes' + f': {before / after:.4g}x' * bool(before))
    whole = sum(before for before, _ in kinds.values())
    print(f'{out}: {out.stat().st_size:,} bytes; the model {total:,}, {whole / total:.2f} times smaller than its {whole:,} in fp32')
    source, ids = real_text(state, model.config)
    parity(out, logits_of(model, ids), logits_of(load_model(out, device)[0], ids), source)


COMMANDS = {'pack': pack}


def main(argv):
    config = load(argv, ExportConfig, positional=('command', 'run', 'out'), usage=__doc__)
    COMMANDS[config.command](config)


if __name__ == '__main__':
    run(main)
