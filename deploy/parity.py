"""Comparisons of an exported model with the trained one, on real text. Used by export.py and the modules of this
folder.

    source, ids = real_text(state, model.config)
    compare('x.safetensors', logits_of(model, ids), logits_of(exported, ids), source, ids)
"""
import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError
from data import TokenData
from model import BitLinear
from tokenizer import encode, load_tokenizer

ROOT = Path(__file__).parent.parent
PARITY_TOKENS = 2048


def real_text(state, config, max_tokens=PARITY_TOKENS):
    """
    Up to `max_tokens` tokens for a model, given the dict of its checkpoint -> (name of the source, ids int64 (n, T)).
    They come from the validation split of the run, or from README.md if that is gone. Without a tokenizer they are
    random.
    """
    T = min(config.block_size, 256)
    try:
        data = TokenData(state['data'].get('path', ''), T, config.vocab_size)
        if data.tokenizer == state['tokenizer']:
            return f'{data.path}/val.bin', torch.from_numpy(data.val_batch(data.val_windows(max_tokens))[0])
    except UserError:
        pass  # no prepared data there any more
    if state['tokenizer'] is None:
        generator = torch.Generator().manual_seed(0)
        return 'random ids', torch.randint(config.vocab_size, (max_tokens // T, T), generator=generator)
    ids = encode(load_tokenizer(state['tokenizer']), (ROOT / 'README.md').read_text(encoding='utf-8'))
    n = max(1, min(len(ids), max_tokens) // T)
    return 'README.md', torch.from_numpy(np.resize(ids.astype(np.int64), (n, T)))


@torch.no_grad()
def logits_of(model, ids):
    """ids (n, T) -> (n T, V) fp32 on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(row[None].to(device))[0].float().cpu() for row in ids])


@torch.no_grad()
def loss_of(model, ids):
    """The mean cross-entropy of ids (n, T) in nats a token."""
    device = next(model.parameters()).device
    return sum(model(row[None, :-1].to(device), row[None, 1:].to(device)).item() for row in ids) / len(ids)


def compare(exported, trained_logits, exported_logits, source, ids=None):
    """
    Print how well two (N, V) fp32 tensors of logits agree -> (fraction of positions with the same most likely token,
    largest difference of log-probabilities). exported and source are names for the message.

    ids (n, T): the input tokens, N = n T. With them, the losses of both models are printed first.
    """
    top = (trained_logits.argmax(-1) == exported_logits.argmax(-1)).float().mean().item()
    largest = (trained_logits.log_softmax(-1) - exported_logits.log_softmax(-1)).abs().max().item()
    losses = '' if ids is None or ids.size(1) < 2 else (
        f'loss {next_token_loss(trained_logits, ids):.4f} -> {next_token_loss(exported_logits, ids):.4f}, ')
    print(f'{exported} compared with the trained model on {len(trained_logits):,} tokens of {source}: {losses}'
          f'same most likely token for {100 * top:.2f} %, largest difference of log-probabilities {largest:.2g}')
    return top, largest


def next_token_loss(logits, ids):
    """The mean cross-entropy in nats of logits (n T, V) that a model computed for ids (n, T)."""
    logits = logits.view(*ids.shape, -1)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device)).item()


def disable_document_mask(model):
    """Turn the document mask of a model off, because other programs have none, and say so."""
    if model.config.document_mask:
        print('This model was trained with document_mask, and other programs do not reset at an end of text: '
              'give them one document at a time, without an end-of-text token before it.')
        model.config.document_mask = False


def bit_linears(model):
    return [module for module in model.modules() if isinstance(module, BitLinear)]


@contextlib.contextmanager
def without_int8(model):
    """Inside, BitLinear layers keep their activations in fp32, as other programs do, instead of rounding them to
    int8."""
    layers = bit_linears(model)
    for layer in layers:
        layer.int8 = False
    try:
        yield
    finally:
        for layer in layers:
            layer.int8 = True


def activation_modes(model):
    """
    How to run a model that is compared with another program: [(note for the message, context manager)]. As trained, and
    with activations in fp32 if it has BitLinear layers.
    """
    modes = [('', contextlib.nullcontext())]
    return modes + [(', activations in fp32', without_int8(model))] if bit_linears(model) else modes
