"""How good a trained model is on the validation split it has never seen.

    python evaluate.py runs/trix_tiny                  # all of the split; the last line is one JSON object
"""
import json
import math
import time
from dataclasses import dataclass

import torch

import device as hardware
from checkpoint import load_model
from configurator import UserError, load, run
from parallel import Group
from shards import open_data
from tokenizer import load_tokenizer, token_bytes


@dataclass
class EvaluateConfig:
    run: str = ''  # run directory (its newest good checkpoint) or checkpoint file; may stand without --run=
    data: str = ''  # prepared data directory (empty: the one of the run)
    eval_tokens: int = 0  # tokens to evaluate on (0: all of the validation split)
    batch_size: int = 16  # sequences at a time
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, tf32, bfloat16 or float16

    def problems(self):
        found = [] if self.run else ['name a run directory or a checkpoint: python evaluate.py runs/x']
        found += [] if self.batch_size > 0 else [f'batch_size={self.batch_size} must be at least 1']
        return found + ([] if self.eval_tokens >= 0 else [f'eval_tokens={self.eval_tokens} must not be negative'])


@torch.no_grad()
def validate(model, data, lengths, windows, batch_size, device, dtype, stop=lambda: False, group=Group()):
    """Mean loss over fixed windows of the validation split, dealt to the processes of the group in batches and summed.

    lengths (n_vocab,): bytes of each token, None if they are not known. Targets of -1 are not counted. -> {loss (nats a token),
    perplexity, bits_per_byte (None without lengths), tokens}, or None if stop() came true, which is asked before every batch."""
    training = model.training
    model.eval()
    total, tokens, size = 0.0, 0, 0
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    for i in range(0, len(batches), group.world):
        if stopped := stop():
            break
        mine = i + group.rank < len(batches)
        x, y = data.val_batch(batches[i + group.rank if mine else 0])  # (B, T) each
        with hardware.autocast(device, dtype):  # also by a process that has no batch left: a sharded model needs all of them
            loss = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        if mine:
            y = y[y >= 0]
            total, tokens = total + loss.item() * y.size, tokens + y.size
            size += 0 if lengths is None else int(lengths[y].sum())
    model.train(training)
    if stopped:
        return None
    total, tokens, size = group.sum(total, tokens, size)
    loss = total / tokens
    return {'loss': loss, 'perplexity': math.exp(min(loss, 700)), 'tokens': int(tokens),
            'bits_per_byte': None if lengths is None else total / math.log(2) / max(size, 1)}


def main(argv):
    config = load(argv, EvaluateConfig, positional=('run',), usage=__doc__)
    device, dtype, chosen = hardware.resolve(config.device, config.dtype)
    model, state = load_model(config.run, device)
    path = config.data or state['data']['path']
    data = open_data(path, model.config.block_size, model.config.vocab_size)
    if data.tokenizer != state['tokenizer']:
        raise UserError(f'{path}: its tokenizer is not the one that {config.run} was trained with')
    print(f'{config.run}, step {state["step"]:,}, on {path}, on {chosen}')
    start, lengths = time.perf_counter(), token_bytes(load_tokenizer(data.tokenizer)) if data.tokenizer else None
    result = validate(model, data, lengths, data.val_windows(config.eval_tokens), config.batch_size, device, dtype)
    print(f'{result["tokens"]:,} tokens in {time.perf_counter() - start:.1f} s')
    print(json.dumps({'run': config.run, 'step': state['step'], **result}))


if __name__ == '__main__':
    run(main)
