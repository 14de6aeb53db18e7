"""Generate text from a model, token by token. Used by sample.py, and by train.py for the samples of a run.

    for token in generate(model, idx, n_vocab, 200, eot_id=eot_id): ...      # idx (B, T), token (B,)
    for text in pieces(encoding, tokens): ...                                # token ids -> text, in whole characters
    sample_grid(model, encoding, ['The', 'def'], max_new_tokens=64, seed=1)  # each prompt in three modes
"""
import codecs
import math
import random

import torch

from configurator import UserError


# Device types on which a step is recorded as a CUDA graph, see runtime/decoding.py.
GRAPH_DEVICES = {'cuda'}


class Decoder:
    """Decodes tokens with a cache, by ordinary steps. The weights must not change in its lifetime.

        decoder.start(B)             # forget everything, B sequences
        logits = decoder(idx)        # the next tokens (B, T) -> (B, V), the logits of the last position"""

    def __init__(self, model):
        self.model, self.fixed = model, model.fixed_weights()

    def start(self, B):
        self.cache = self.model.new_cache(B)

    @property
    def pos(self):
        return self.cache.pos

    def __call__(self, idx):
        with self.fixed:  # for one forward, because the caller's code runs between two tokens
            return self.model(idx, cache=self.cache, last=True)[:, -1]


def decoder_for(model, compile=False):
    """The fastest decoder for a model. compile: on a GPU, whether to compile it, too. That takes a minute."""
    device = next(model.parameters()).device
    if device.type not in GRAPH_DEVICES or hasattr(model, 'unshard'):  # FSDP gathers weights at new addresses
        return Decoder(model)
    from runtime.decoding import GraphDecoder  # a run on a CPU does not need it
    return GraphDecoder(model, compile)


def choose(logits, temperature, top_k, top_p, generator):
    """Draw the next token of each row: logits (B, V) on any device -> (B,) int64 on the CPU. Costs one host sync.

    generator: of the CPU, so that all devices draw the same random numbers."""
    if temperature < 1e-5:  # the other tokens have no probability left, and a division could overflow
        return logits.argmax(-1).cpu()
    p = (logits.float() / temperature).softmax(-1)
    p, order = p.topk(min(top_k or p.size(-1), p.size(-1)))  # most likely first
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keep a token if the tokens before it sum to less than top_p
    # The largest of p / exponential noise is a draw from p, as in torch.multinomial. A GPU is still busy with p now.
    noise = torch.empty(p.shape, pin_memory=p.is_cuda).exponential_(generator=generator)
    pick = (p / noise.to(p.device, non_blocking=True)).argmax(-1, keepdim=True)
    token = order.gather(-1, pick).squeeze(-1).where(p.sum(-1) > 0, -1).cpu()  # the sum may be nan
    if (token < 0).any():
        raise UserError('no token can be drawn: the logits of the model are not finite')
    return token


def without(logits, token):  # (B, V) -> (B, V), in which `token` is never chosen
    return logits.index_fill(-1, torch.tensor([token], device=logits.device), -math.inf)


@torch.no_grad()
def generate(model, idx, n_vocab, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=1337, eot_id=None,
             decoder=None):
    """Continue the prompts idx (B, T >= 1). Yields the next token (B,) int64 on the CPU, up to max_new_tokens times.

    Only the first n_vocab ids can be chosen, because the model's vocabulary may be padded beyond the tokenizer's.
    eot_id: the end-of-text token. It is never the first new token, so a text that ends there is never empty.
    decoder: of decoder_for(model), to use again for several texts.
    The weights must not change before the last token. Each token costs one step with the cache. When the context is
    full, generation continues from its last half."""
    training, size, device = model.training, model.config.block_size, idx.device
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    decoder = decoder or decoder_for(model)
    decoder.start(len(idx))
    idx = idx[:, -size:].cpu()
    part = idx
    try:
        for i in range(max_new_tokens):
            if decoder.pos + part.size(1) > size:
                decoder.start(len(idx))
                part = idx[:, -(size // 2 or 1):]
            logits = decoder(part.to(device))[:, :n_vocab]
            if i == 0 and eot_id is not None:
                logits = without(logits, eot_id)
            token = choose(logits, temperature, top_k, top_p, generator)
            yield token
            part = token[:, None]
            idx = torch.cat((idx, part), 1)[:, -size:]
    finally:
        model.train(training)


def encode(encoding, prompt):
    """Prompt -> token ids. They start with the end-of-text token, because every document in training did."""
    return [encoding.eot_token, *encoding.encode_ordinary(prompt)]


def pieces(encoding, tokens):
    """Yield the text of token ids as they arrive. A character whose bytes span several tokens comes with the last."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    for token in tokens:
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b'', final=True)


def sample_seed(seed, i):
    """The seed of sample number `i` of a prompt. Number 0 uses `seed` itself; the others have seeds of 63 random bits.

    So no sample of one seed is a sample of another seed. (With seed + i, sample 1 of seed 1 was sample 0 of seed 2.)"""
    return random.Random(f'{seed} {i}').getrandbits(63) if i else seed


# The decoding modes of sample_grid.
# greedy: the most likely token. Small models start to repeat themselves here first.
# typical: the text that a reader would see.
# stress: draws from the full, flattened distribution, tail included. Does the text recover from an unlikely token?
MODES = {
    'greedy': dict(temperature=0, top_k=0, top_p=1.0),
    'typical': dict(temperature=0.8, top_k=50, top_p=1.0),
    'stress': dict(temperature=1.3, top_k=0, top_p=1.0),
}


def repetition(ids, n=4):
    """Fraction of the n-grams of ids that occurred earlier in ids: seq-rep-n of arXiv:1908.04319.

    Returns 0.0 for fewer than n ids."""
    grams = list(zip(*(ids[i:] for i in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def sample_grid(model, encoding, prompts, max_new_tokens, seed, stop=lambda: False):
    """Continue every prompt in every mode.

    Returns [{prompt, mode, text, tokens, entropy, repetition}], ordered by prompt, then mode.
    All rows form one batch with one cache. While a row's prompt lasts, the row receives its next prompt token.
    So there is no padding, and a greedy row equals the output of `generate`, even with a full context.
    A row ends after max_new_tokens (>= 1) or at an end-of-text token, which is never its first new token.
    Row i has its own generator, seeded by (seed, i), so the other rows do not affect it.
    text, tokens and repetition exclude the end-of-text token.
    entropy: of the distribution at temperature 1, in nats, averaged over the chosen tokens, end-of-text included.
    It is that of the model: an end-of-text token counts as possible at the first new token, too.
    stop() is called before every step. If it returns True, the result is [], because the statistics of truncated rows
    would be wrong."""
    training, size, device = model.training, model.config.block_size, next(model.parameters()).device
    grid = [(prompt, mode) for prompt in prompts for mode in MODES]
    ids = [encode(encoding, prompt)[-size:] for prompt, _ in grid]  # the tokens of each row so far
    new, nats = [[] for _ in grid], [[] for _ in grid]
    generators = [torch.Generator().manual_seed((seed * 2**16 + row) % 2**63) for row in range(len(grid))]
    # The first step feeds as many tokens as the shortest prompt has.
    start, end = 0, min(map(len, ids), default=0)
    live = set(range(len(grid)))
    decoder = decoder_for(model)
    decoder.start(len(grid))
    model.eval()
    try:
        while live:
            if stop():
                return []
            if decoder.pos + end - start > size:
                decoder.start(len(grid))
                start = end - (size // 2 or 1)
            part = torch.tensor([row[start:end] for row in ids], device=device)  # (B, 1); longer if the cache is empty
            logits = decoder(part)[:, :encoding.n_vocab]  # (B, V)
            log_p = logits.float().log_softmax(-1)
            entropy = (log_p.exp() * -log_p).sum(-1).tolist()
            for row, (_, mode) in enumerate(grid):
                if len(ids[row]) > end:  # still inside the prompt
                    continue
                token = encoding.eot_token  # filler: an ended row keeps its place in the batch
                if row in live:
                    options = logits[row:row + 1] if new[row] else without(logits[row:row + 1], encoding.eot_token)
                    token = choose(options, **MODES[mode], generator=generators[row]).item()
                    nats[row].append(entropy[row])
                    if token != encoding.eot_token:
                        new[row].append(token)
                    if token == encoding.eot_token or len(new[row]) == max_new_tokens:
                        live.remove(row)
                ids[row].append(token)
            start, end = end, end + 1
    finally:
        model.train(training)
    return [dict(prompt=prompt, mode=mode, text=encoding.decode(new[row]), tokens=len(new[row]),
                 repetition=repetition(new[row]), entropy=sum(nats[row]) / len(nats[row]))
            for row, (prompt, mode) in enumerate(grid)]
