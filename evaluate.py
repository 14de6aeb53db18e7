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
from data import TokenData, load_tokenizer, token_bytes


@dataclass
class EvaluateConfig:
    run: str = ''  # run directory (its newest good checkpoint) or checkpoint file; may stand without --run=
    data: str = ''  # prepared data directory (empty: the one of the run)
    eval_tokens: int = 0  # tokens to evaluate on (0: all of the validation split)
    batch_size: int = 16  # sequences at a time
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, bfloat16 or float16

    def problems(self):
        found = [] if self.run else ['name a run directory or a checkpoint: python evaluate.py runs/x']
        found += [] if self.batch_size > 0 else [f'batch_size={self.batch_size} must be at least 1']
        return found + ([] if self.eval_tokens >= 0 else [f'eval_tokens={self.eval_tokens} must not be negative'])


@torch.no_grad()
def validate(model, data, lengths, windows, batch_size, device, dtype, stop=lambda: False):
    """Mean loss over fixed windows of the validation split.

    lengths (n_vocab,): bytes of each token. -> {loss (nats a token), perplexity, bits_per_byte, tokens}, or None if
    stop() came true, which is asked before every batch."""
    training = model.training
    model.eval()
    total, tokens, size = 0.0, 0, 0
    for i in range(0, len(windows), batch_size):
        if stop():
            break
        x, y = data.val_batch(windows[i:i + batch_size])  # (B, T) each
        with hardware.autocast(device, dtype):
            loss = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        total, tokens, size = total + loss.item() * y.size, tokens + y.size, size + int(lengths[y].sum())
    else:
        loss = total / tokens
        model.train(training)
        return {'loss': loss, 'perplexity': math.exp(min(loss, 700)), 'tokens': tokens,
                'bits_per_byte': total / math.log(2) / max(size, 1)}
    model.train(training)


def main(argv):
    config = load(argv, EvaluateConfig, positional=('run',), usage=__doc__)
    device, dtype, chosen = hardware.resolve(config.device, config.dtype)
    model, state = load_model(config.run, device)
    path = config.data or state['data']['path']
    data = TokenData(path, model.config.block_size, model.config.vocab_size)
    if data.tokenizer != state['tokenizer']:
        raise UserError(f'{path}: its tokenizer is not the one that {config.run} was trained with')
    print(f'{config.run}, step {state["step"]:,}, on {path}, on {chosen}')
    start = time.perf_counter()
    result = validate(model, data, token_bytes(load_tokenizer(data.tokenizer)), data.val_windows(config.eval_tokens),
                      config.batch_size, device, dtype)
    print(f'{result["tokens"]:,} tokens in {time.perf_counter() - start:.1f} s')
    print(json.dumps({'run': config.run, 'step': state['step'], **result}))


if __name__ == '__main__':
    run(main)
