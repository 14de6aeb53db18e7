"""
A trained dense model as a ternary one, for export.py convert: its weights rearranged, and rounded as well as they can be. What is
lost thereby is for train.py to bring back (--init_from, --distill_from, --anneal_steps).

    config, weights = split(model, tiles=8, top_k=6)   # dense FFN -> TriX: tiles of neurons that answer to alike inputs
    config, weights = bitnet(model)                    # every matrix of the blocks ternary, with 'bitnet_ffn' of the FFNs
    weights = ternarised(config, weights)
"""
from dataclasses import replace

import torch
import torch.nn.functional as F

from configurator import UserError
from model import ACTS, GPT, BitLinear, TriX


def balanced_kmeans(points, k, rounds=30, seed=0):
    """(N, C) -> (k, N / k) indices: k clusters of equal size by direction. Each round gives the closest pairs of point and centre to
    one another first, while a centre has places left."""
    points, size = F.normalize(points.float(), dim=1), len(points) // k
    centres = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:k]]
    before = None
    for _ in range(rounds):
        near = points @ centres.T  # (N, k)
        owner, left = [-1] * len(points), [size] * k
        for pair in near.flatten().argsort(descending=True).tolist():
            point, centre = divmod(pair, k)
            if owner[point] < 0 and left[centre]:
                owner[point], left[centre] = centre, left[centre] - 1
        if owner == before:
            break
        before, owner = owner, torch.tensor(owner)
        centres = F.normalize(torch.stack([points[owner == centre].sum(0) for centre in range(k)]), dim=1)
    return torch.tensor(before).argsort(stable=True).view(k, size)


def dense(model):
    """UserError if a model has something ternary already."""
    if any(isinstance(module, (BitLinear, TriX)) for module in model.modules()):
        raise UserError(f'ffn={model.config.ffn}, linear={model.config.linear}: this model is ternary already')


@torch.no_grad()
def split(model, tiles, top_k):
    """The FFNs of a dense model cut into tiles -> (config, weights) of the TriX model. The same function while a token goes to all
    tiles and TriX.ternary is False."""
    dense(model)
    shape, weights = model.config, dict(model.state_dict())
    if shape.ffn not in ACTS:
        raise UserError(f'ffn={shape.ffn}: only {", ".join(ACTS)} can be cut into tiles')
    if shape.bias:
        raise UserError('bias=True: tiles have no biases; train the dense model with bias=False')
    hidden = model.blocks[0].ffn.up_proj.out_features
    if hidden % tiles:
        raise UserError(f'--tiles={tiles} does not divide the {hidden} hidden units of an FFN')
    for i in range(shape.n_layer):
        name = f'blocks.{i}.ffn'
        part = {key: weights.pop(f'{name}.{key}_proj.weight') for key in ('gate', 'up', 'down') if f'{name}.{key}_proj.weight' in weights}
        own = balanced_kmeans(part['up'], tiles).to(part['up'].device)  # (E, h)
        weights |= {f'{name}.up': torch.cat([part[key][own] for key in ('gate', 'up') if key in part], 1),
                    f'{name}.down': part['down'].T[own].transpose(1, 2).contiguous(), f'{name}.slope': torch.zeros(tiles),
                    f'{name}.balance': torch.zeros(tiles), f'{name}.pace': torch.zeros(tiles)}
    return replace(shape, ffn='trix', trix_cut=shape.ffn, trix_tiles=tiles, trix_top_k=top_k, trix_hidden=hidden // tiles, d_ff=0), weights


def bitnet(model, linear='bitnet'):
    """-> (config, weights) of the model with the matrices of the blocks to be rounded, or with bitnet_ffn of the FFNs; no other change."""
    dense(model)
    return replace(model.config, linear=linear, sub_norm=False), dict(model.state_dict())


@torch.no_grad()
def ternarised(config, weights):
    """The weights of a ternary model with the latent ones changed so that they are rounded to the nearest codes and scales."""
    with torch.device('meta'):
        model = GPT(config)
    names = [f'{name}.weight' for name, module in model.named_modules() if isinstance(module, BitLinear)]
    tiles = [f'{name}.{part}' for name, module in model.named_modules() if isinstance(module, TriX) for part in ('up', 'down')]
    return {**weights, **{name: nearest(weights[name]) for name in names},
            **{name: torch.stack([nearest(tile) for tile in weights[name]]) for name in tiles}}


def nearest(weight):
    """
    Latent weights that training rounds (scale mean |w|, threshold half of it) to those codes and that scale which are nearest to
    `weight` in least squares: codes of the n largest, scale their mean magnitude, n where (their sum)^2 / n is largest. Each keeps its
    sign and its place in the order of magnitudes, so that those near the threshold stay near it.
    """
    size = weight.abs().double().flatten()
    order = size.sort(descending=True).values
    n = int((order.cumsum(0).square() / torch.arange(1, len(order) + 1, device=order.device)).argmax()) + 1
    scale = order[:n].mean()
    fence = (order[n - 1] + (order[n] if n < len(order) else 0)) / 2
    if not scale > 0:
        return weight
    small = size < fence
    latent = torch.where(small, 0.5 * scale * size / fence, 0.5 * scale)
    over = torch.where(small, 0, size - fence)
    latent += over * (scale * len(size) - latent.sum()) / over.sum()  # their mean magnitude is the scale
    return (latent.view(weight.shape) * weight.sign()).to(weight.dtype)
