"""Text from a model, token by token: used by sample.py, and by train.py for the samples of a run.

    for token in generate(model, idx, n_vocab, max_new_tokens=200): ...       # idx (B, T) -> (B,) at a time
    sample_grid(model, encoding, ['The', 'def'], max_new_tokens=64, seed=1)   # every prompt in three modes
"""
import torch

from configurator import UserError


def choose(logits, temperature, top_k, top_p, generator):  # (B, V) -> (B,)
    if temperature < 1e-5:  # what is left of the others is nothing, and dividing by it could overflow
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    p, order = p.topk(min(top_k or p.size(-1), p.size(-1)))  # the likeliest first
    p[p.cumsum(-1) - p >= top_p] = 0  # keep a token while those before it hold less than top_p
    # On the CPU, whatever the device: a generator there gives the same text on any of them.
    weights = p.cpu()
    if not (weights.sum(-1) > 0).all():  # nan, too
        raise UserError('no token can be drawn: the logits of the model are not finite')
    pick = torch.multinomial(weights, 1, generator=generator).to(order.device)
    return order.gather(-1, pick).squeeze(-1)


@torch.no_grad()
def generate(model, idx, n_vocab, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=1337):
    """Yield the next token (B,) int64, up to max_new_tokens times, after the prompts idx (B, T >= 1).

    Only the first n_vocab ids are chosen from: a model's vocabulary may be padded beyond its tokenizer's. Every token costs one
    step with the cache. A full context goes on from its last half."""
    training, size = model.training, model.config.block_size
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    cache, part = model.new_cache(len(idx)), idx[:, -size:]
    try:
        for _ in range(max_new_tokens):
            if cache.pos + part.size(1) > size:
                cache, part = model.new_cache(len(idx)), idx[:, -(size // 2 or 1):]
            token = choose(model(part, cache=cache, last=True)[:, -1, :n_vocab], temperature, top_k, top_p, generator)
            yield token
            part = token[:, None]
            idx = torch.cat((idx, part), 1)[:, -size:]
    finally:
        model.train(training)


def encode(encoding, prompt):
    """Prompt -> token ids; a prompt starts a document, as every document in training did."""
    return [encoding.eot_token, *encoding.encode_ordinary(prompt)]


# As sample_grid decodes: what the model thinks likeliest (small models repeat themselves here first), the text a reader would be
# shown, and draws from the whole, flattened distribution, tail and all: does the text recover from an unlikely token?
MODES = {
    'greedy': dict(temperature=0, top_k=0, top_p=1.0),
    'typical': dict(temperature=0.8, top_k=50, top_p=1.0),
    'stress': dict(temperature=1.3, top_k=0, top_p=1.0),
}


def repetition(ids, n=4):
    """Share of the n-grams of ids that occurred before in them: seq-rep-n of arXiv:1908.04319; 0.0 for fewer than n ids."""
    grams = list(zip(*(ids[i:] for i in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def sample_grid(model, encoding, prompts, max_new_tokens, seed, stop=lambda: False):
    """Continue every prompt in every mode -> [{prompt, mode, text, tokens, entropy, repetition}], prompts outermost.

    All rows are one batch with one cache: a row whose prompt isn't over is fed its next token of the prompt, so that nothing
    is padded and a greedy row is what `generate` makes of its prompt, a full context included. A row ends after max_new_tokens
    (>= 1) or with its document. Row i draws with a generator of its own, seeded by (seed, i): the others don't matter to it.
    text, tokens and repetition leave the end-of-text token out; entropy counts it: nats of the distribution at temperature 1,
    the mean over the choices made. stop() is asked before every step; if it says so the result is []: rows that were cut
    short would have other figures."""
    training, size, device = model.training, model.config.block_size, next(model.parameters()).device
    grid = [(prompt, mode) for prompt in prompts for mode in MODES]
    ids = [encode(encoding, prompt)[-size:] for prompt, _ in grid]  # of each row, as far as known
    new, nats = [[] for _ in grid], [[] for _ in grid]
    generators = [torch.Generator().manual_seed((seed * 2**16 + row) % 2**63) for row in range(len(grid))]
    cache, start, end = model.new_cache(len(grid)), 0, min(map(len, ids), default=0)  # the first step: what all prompts have
    live = set(range(len(grid)))
    model.eval()
    try:
        while live:
            if stop():
                return []
            if cache.pos + end - start > size:
                cache, start = model.new_cache(len(grid)), end - (size // 2 or 1)
            part = torch.tensor([row[start:end] for row in ids], device=device)  # (B, 1), more into an empty cache
            logits = model(part, cache=cache, last=True)[:, -1, :encoding.n_vocab]  # (B, V)
            log_p = logits.float().log_softmax(-1)
            entropy = (log_p.exp() * -log_p).sum(-1).tolist()
            for row, (_, mode) in enumerate(grid):
                if len(ids[row]) > end:  # the prompt goes on
                    continue
                token = encoding.eot_token  # for a row that has ended: its place in the batch must hold something
                if row in live:
                    token = choose(logits[row:row + 1], **MODES[mode], generator=generators[row]).item()
                    nats[row].append(entropy[row])
                    if token != encoding.eot_token:
                        new[row].append(token)
                    if token == encoding.eot_token or len(new[row]) == max_new_tokens:
                        live.remove(row)
                ids[row].append(token)
            start, end = end, end + 1
    finally:
        model.train(training)
    return [dict(prompt=prompt, mode=mode, text=encoding.decode(new[row]), tokens=len(new[row]), repetition=repetition(new[row]),
                 entropy=sum(nats[row]) / len(nats[row])) for row, (prompt, mode) in enumerate(grid)]
