"""
Convert a trained dense model into a ternary one, for export.py convert and bench.py convert. The weights are rearranged
and rounded so that the loss grows as little as possible. Training then recovers most of that (--init_from,
--distill_from, --anneal_steps).

    config, weights = split(model, tiles=8, top_k=6)  # dense FFN -> TriX: tiles of alike neurons
    config, weights = bitnet(model)                   # ternary blocks, or with 'bitnet_ffn' FFNs
    weights = ternarised(config, weights)
    convert('runs/dense', model, state, Path('runs/dense/trix'), 'trix')  # a run directory with recover.py for train.py
"""
import math
from dataclasses import fields, replace

import torch
import torch.nn.functional as F

import checkpoint
import settings
from configurator import UserError
from deploy.parity import PARITY_TOKENS, loss_of, real_text
from files import named_at_last
from model import ACTS, GPT, BitLinear, GPTConfig, TriX

# Options that the recovery does not copy from the run: paths, options that depend on the length of the run, hardware.
NOT_KEPT = ('out_dir', 'init_from', 'distill_from', 'anneal_steps', 'resume', 'other_data', 'verify', 'plan', 'card',
            'card_gb', 'price', 'profile', 'epochs', 'max_hours', 'stop_on', 'plateau_steps', 'max_steps',
            'warmup_steps', 'restart_steps', 'decay_steps', 'boundary_step', 'mandatory_steps', 'schedule',
            'min_lr_ratio', 'log_interval',
            'sample_interval', 'keep', 'save_on_best', 'device', 'dtype', 'compile', 'zero_init', *settings.INTERVALS,
            *(f'{key}_tokens' for key in settings.INTERVALS))


# ----------------------------------------------------------------------------------------------------------------------
# Weights

def balanced_kmeans(points, k, rounds=30, seed=0):
    """(N, C) -> (k, N / k) indices: k clusters of equal size by direction. Each round assigns the closest pairs of
    point and centre first, as long as the centre has places left."""
    points, size = F.normalize(points.float(), dim=1), len(points) // k
    centres = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:k]]
    before = None
    for _ in range(rounds):
        near = points @ centres.T  # (N, k)
        owner = [-1] * len(points)
        left = [size] * k  # free places of each cluster
        for pair in near.flatten().argsort(descending=True).tolist():
            point, centre = divmod(pair, k)
            if owner[point] < 0 and left[centre]:
                owner[point] = centre
                left[centre] -= 1
        if owner == before:
            break
        before, owner = owner, torch.tensor(owner)
        centres = F.normalize(torch.stack([points[owner == centre].sum(0) for centre in range(k)]), dim=1)
    return torch.tensor(before).argsort(stable=True).view(k, size)


def check_dense(model):
    """UserError if a model has ternary matrices already."""
    if any(isinstance(module, (BitLinear, TriX)) for module in model.modules()):
        raise UserError(f'ffn={model.config.ffn}, linear={model.config.linear}: this model is ternary already')


@torch.no_grad()
def split(model, tiles, top_k):
    """The FFNs of a dense model cut into tiles -> (config, weights) of the TriX model. It computes the same function if
    a token goes to all tiles and the tiles are `without_ternary`."""
    check_dense(model)
    shape, weights = model.config, dict(model.state_dict())
    if shape.ffn not in ACTS:
        raise UserError(f'ffn={shape.ffn}: only {", ".join(ACTS)} can be cut into tiles')
    hidden = model.blocks[0].ffn.up_proj.out_features
    if hidden % tiles:
        raise UserError(f'--tiles={tiles} does not divide the {hidden} hidden units of an FFN')
    for i in range(shape.n_layer):
        name = f'blocks.{i}.ffn'
        keys = [key for key in ('gate', 'up', 'down') if f'{name}.{key}_proj.weight' in weights]
        dense = {key: weights.pop(f'{name}.{key}_proj.weight') for key in keys}
        units = balanced_kmeans(dense['up'], tiles).to(dense['up'].device)  # (E, h)
        weights |= {f'{name}.up': torch.cat([dense[key][units] for key in keys if key != 'down'], 1),  # (E, h or 2h, C)
                    f'{name}.down': dense['down'].T[units].transpose(1, 2).contiguous()}  # (E, C, h)
        if shape.bias:
            dense_bias = {key: weights.pop(f'{name}.{key}_proj.bias') for key in keys}
            tile_biases = torch.cat([dense_bias[key][units] for key in keys if key != 'down'], 1)  # (E, h or 2h)
            weights |= {f'{name}.up_bias': tile_biases.flatten(), f'{name}.down_bias': dense_bias['down']}
        weights |= {f'{name}.{key}': torch.zeros(tiles) for key in ('slope', 'balance', 'pace')}
    shape = replace(shape, ffn='trix', trix_cut=shape.ffn, trix_tiles=tiles, trix_top_k=top_k,
                    trix_hidden=hidden // tiles, d_ff=0)
    return shape, weights


def bitnet(model, linear='bitnet'):
    """-> (config, weights) of the same model with ternary matrices in the blocks, or only in the FFNs
    (linear='bitnet_ffn'). The weights are not changed: the ternary model rounds them."""
    check_dense(model)
    return replace(model.config, linear=linear, sub_norm=False), dict(model.state_dict())


@torch.no_grad()
def ternarised(config, weights):
    """The weights of a ternary model, latent ones changed so that they are rounded to the nearest codes and scales."""
    with torch.device('meta'):
        model = GPT(config)
    names = [f'{name}.weight' for name, module in model.named_modules() if isinstance(module, BitLinear)]
    trix = [name for name, module in model.named_modules() if isinstance(module, TriX)]
    tiles = [f'{name}.{part}' for name in trix for part in ('up', 'down')]
    return {**weights, **{name: nearest(weights[name]) for name in names},
            **{name: torch.stack([nearest(tile) for tile in weights[name]]) for name in tiles}}


def nearest(weight):
    """
    Latent weights that training rounds to the codes and the scale that are nearest to `weight` in least squares.

    Training takes mean |w| as the scale and half of it as the threshold. The nearest codes are those of the n largest
    weights, with their mean magnitude as the scale, for the n with the largest (sum of magnitudes)^2 / n. Each latent
    weight keeps its sign and its place in the order of magnitudes, so that weights near the threshold stay near it.
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


# ----------------------------------------------------------------------------------------------------------------------
# Stages: what each part of a conversion costs

def without_ternary(model):
    """The model, with TriX tiles that compute with their latent weights from now on, not with ternary ones."""
    for layer in model.trix_layers():
        layer.ternary = False
    return model


def is_ternary(model):
    """Whether a model computes with ternary weights."""
    return any(isinstance(module, BitLinear) or isinstance(module, TriX) and module.ternary
               for module in model.modules())


def stages_of(model, to, tiles=8, top_k=6):
    """{stage of a conversion: model in eval mode}. The last one is the result."""
    device = next(model.parameters()).device
    if to != 'trix':
        config, weights = bitnet(model, to)
        return {'ternary': build(config, ternarised(config, weights), device)}
    config, weights = split(model, tiles, top_k)
    all_tiles, ternary_weights = replace(config, trix_top_k=tiles), ternarised(config, weights)
    return {f'cut into {tiles} tiles': without_ternary(build(all_tiles, weights, device)),
            f'{top_k} of them for a token': without_ternary(build(config, weights, device)),
            f'all {tiles}, ternary': build(all_tiles, ternary_weights, device),
            f'{top_k} of them, ternary': build(config, ternary_weights, device)}


def build(config, weights, device):
    model = GPT(config).to(device)
    model.load_state_dict(weights)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# From a run to a run

def convert(run, model, state, out, to, tiles=8, top_k=6):
    """
    Convert the model of a run, print the loss after every stage, and write the result to the new directory `out`: a run
    with a checkpoint of step 0, and recover.py, the config of the training that follows.

    run: the path of the run. state: the dict of its checkpoint. to: 'trix', 'bitnet' or 'bitnet_ffn'. UserError if the
    model can't be converted.
    """
    stages = stages_of(model, to, tiles, top_k)
    options = {key: value for key, value in state['config'].items() if key in settings.TrainConfig.__dataclass_fields__}
    missing = [key for key in ('batch_size', 'batch_tokens', 'max_steps', 'learning_rate') if key not in options]
    if missing:
        raise UserError(f'{run}: its config has no {", ".join(missing)}, '
                        'and the training that recovers the loss needs them')
    source, ids = real_text(state, model.config, 8 * PARITY_TOKENS)
    print(f'cross-entropy in nats per token, on {ids[:, 1:].numel():,} tokens of {source}:')
    for name, stage in {'as trained': model, **stages}.items():
        print(f'  {name:42} {loss_of(stage, ids):.4f}')
    converted = list(stages.values())[-1]
    options |= vars(converted.config)
    with named_at_last(out, parents=True) as folder:
        (folder / 'checkpoints').mkdir(parents=True)
        checkpoint.save(folder / 'checkpoints' / 'step_0000000.pt', {
            'model': converted.state_dict(), 'optimizer': {}, 'step': 0,
            'config': {**options, 'out_dir': str(out), 'anneal_steps': 0},
            'tokenizer': state['tokenizer'], 'data': state['data']}, advice='try again')
        text = recovery(run, out, to, options)  # with paths that may not be UTF-8
        (folder / 'recover.py').write_text(text, encoding='utf-8', errors='backslashreplace')


def recovery(run, out, to, options):
    """
    The config file of the training that follows a conversion, on a tenth of the tokens of the run. options: its config.

    The learning rate is the best of 1, 2 and 5e-3 for dense_tiny. For other widths it is scaled, not tuned, and never
    above the rate of the run. The optimizer is AdamW: Muon recovers less.
    """
    defaults = {field.name: field.default for kind in (GPTConfig, settings.TrainConfig) for field in fields(kind)}
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
            if key in defaults and key not in NOT_KEPT}
    # Half as many sequences per step as in the run, so there are twice as many steps.
    sequences = max(1, options['batch_tokens'] // options['block_size'] // 2)
    batch_tokens = sequences * options['block_size']
    steps = max(1, options['max_steps'] * options['batch_tokens'] // 10 // batch_tokens)
    kept |= {'init_from': str(out), 'distill_from': run, 'distill_weight': 1.0,
             'max_steps': steps, 'schedule': 'linear', 'min_lr_ratio': 0.0,
             'batch_size': math.gcd(sequences, options['batch_size']), 'batch_tokens': batch_tokens,
             'optimizer': 'adamw', 'matrix_lr': 0.0,
             'learning_rate': min(options['learning_rate'], 2e-3 * 128 / options['n_embd']),
             'eval_interval': max(1, steps // 4), 'save_interval': max(1, steps // 4), 'sample_interval': 0,
             'out_dir': str(out / 'recovered')}
    if to == 'trix':
        kept['anneal_steps'] = steps // 4
    lines = [f'{key} = {value!r}' for key, value in kept.items() if value != defaults[key]]
    return f'# Recovers what export.py convert lost of {run}, on a tenth of its tokens.\n' + '\n'.join(lines) + '\n'
