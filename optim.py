"""The optimizers: AdamW for everything, or Muon or AdamW8bit for the matrices of the blocks and AdamW for the rest.

    optimizers = make_optimizers(model, config, device)      # {'optimizer': AdamW, 'muon': Muon}, the checkpoint keys
    for optimizer in optimizers.values(): set_rates(optimizer, lr, wd); optimizer.step()
"""
import itertools
import math
import random
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F

OPTIMIZERS = ('adamw', 'muon', 'adamw8bit')


def block_matrices(model):
    """The projections and the TriX tiles of the blocks."""
    return [p for name, p in model.named_parameters() if name.endswith(('proj.weight', '.up', '.down'))]


def cast_matrices(model, dtype):
    """Convert the matrices of the blocks to a dtype, given by name. All other weights stay as they are."""
    for p in block_matrices(model):
        p.data = p.data.to(getattr(torch, dtype))


def make_optimizers(model, config, device):
    """{'optimizer': AdamW} and, with config.optimizer='muon', {'muon': Muon}; the same for 'adamw8bit'.

    model.decay_params() lists the parameters with weight decay. Muon and AdamW8bit take the matrices of the blocks."""
    decay_params = model.decay_params()
    decay_ids = {id(p) for p in decay_params}
    other_params = [p for p in model.parameters() if id(p) not in decay_ids]
    matrices = block_matrices(model) if config.optimizer != 'adamw' else []
    matrix_ids = {id(p) for p in matrices}
    adamw_params = [p for p in decay_params if id(p) not in matrix_ids]
    groups = [{'params': adamw_params, 'weight_decay': config.weight_decay, 'decays': True},
              {'params': other_params, 'weight_decay': 0.0, 'decays': False}]
    betas = config.beta1, config.beta2
    optimizers = {'optimizer': torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas,
                                                 fused=device.type != 'mps')}
    if matrices:
        group = {'params': matrices, 'decays': True}
        words = dict(lr=config.learning_rate, weight_decay=config.weight_decay)
        if config.optimizer == 'muon':
            optimizers['muon'] = Muon([group], **words)
        else:
            optimizers['adamw8bit'] = AdamW8bit([group], **words, betas=betas, seed=config.seed)
    return optimizers


def state_bytes(optimizer, p):
    """Bytes of the state that an optimizer keeps for a parameter after its first step."""
    if isinstance(optimizer, AdamW8bit):
        return 2 * -(-p.numel() // BLOCK) * (BLOCK + 4)
    return p.nbytes * (1 if isinstance(optimizer, Muon) else 2)


def set_rates(optimizer, lr, weight_decay):
    for group in optimizer.param_groups:
        group['lr'], group['weight_decay'] = lr, weight_decay if group['decays'] else 0.0


def full_tensor(tensor):
    """The full tensor if FSDP has sharded it, else the tensor itself. With FSDP, all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def local_tensor(tensor):
    """This process's shard if FSDP has sharded the tensor, else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def own_rows(full, tensor):
    """The rows of the tensor `full` that this process holds of `tensor`. All rows if FSDP has not sharded it."""
    if not hasattr(tensor, 'device_mesh'):
        return full
    rank, world = tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()
    parts = full.chunk(world)  # FSDP2 shards the first dimension in the same way
    return parts[rank] if rank < len(parts) else full[:0]


class Muon(torch.optim.Optimizer):
    """Keller Jordan's Muon (2024) for matrices (m, n) and stacks of matrices (E, m, n).

    It uses the learning rate of AdamW: the RMS of an update is 0.2 lr (Moonshot, arXiv:2502.16982).
    It differs from torch.optim.Muon in three ways. It accepts stacks, such as TriX tiles. It orthogonalizes matrices of
    equal shape in one batch. It multiplies in fp32 on a CPU, because most CPUs are many times slower in bf16."""

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            whole, rows = [], []  # parameters with whole matrices in this process, and matrices with sharded rows
            for p in group['params']:
                if p.grad is not None:
                    (rows if hasattr(p, 'device_mesh') and p.dim() == 2 else whole).append(p)
            updates = {p: self.momentum_update(p, group['momentum']) for p in whole + rows}
            for p, update in itertools.chain(orthogonal_batches(whole, updates), orthogonal_shards(rows, updates)):
                weight = local_tensor(p)
                weight.mul_(1 - group['lr'] * group['weight_decay'])
                weight.add_(update.reshape(weight.shape), alpha=-group['lr'] * 0.2 * math.sqrt(max(p.shape[-2:])))
        return loss

    def momentum_update(self, p, momentum):
        """Nesterov momentum of the gradient. If FSDP has sharded p: of the own rows."""
        if 'momentum_buffer' not in self.state[p]:
            self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        grad = local_tensor(p.grad)
        mean = local_tensor(self.state[p]['momentum_buffer']).lerp_(grad, 1 - momentum)
        return grad.lerp(mean, momentum)


# A parameter with more weights is orthogonalized alone: a batch is no faster and takes more memory. Four times this
# on a GPU, which one matrix of GPT-2 does not fill.
LARGEST_IN_A_BATCH = 2**20


def orthogonal_batches(params, updates):
    """Yields (p, orthogonalized updates[p]). Matrices of equal shape are orthogonalized in one batch.

    A stack of matrices may be sharded by FSDP: each process has some of its matrices, all of them whole."""
    together = defaultdict(list)
    for p in params:
        limit = LARGEST_IN_A_BATCH * (4 if p.is_cuda else 1)
        together[p.shape[-2:], id(p) if p.numel() > limit else 0].append(p)
    for (shape, _), batch in together.items():
        stacks = [updates.pop(p).reshape(-1, *shape) for p in batch]
        yield from zip(batch, orthogonal(torch.cat(stacks)).split([len(stack) for stack in stacks]))


def orthogonal_shards(params, updates):
    """Yields (p, this process's rows of the orthogonalized update) for matrices p whose rows FSDP has sharded.

    updates[p]: the own rows of the update. The processes share the work. In each round, every process collects the rows
    of one matrix, orthogonalizes the matrix and sends the rows back."""
    params = sorted(params, key=lambda p: p.shape)  # equal work for all processes in a round
    world = params[0].device_mesh.size() if params else 1
    for start in range(0, len(params), world):
        batch = params[start:start + world]
        yield from zip(batch, orthogonal_round([updates.pop(p) for p in batch], batch))


def orthogonal_round(shards, params):
    """One round of orthogonal_shards: shards (rows, n) of at most one matrix per process -> the orthogonalized rows."""
    mesh = params[0].device_mesh
    rank, world = mesh.get_local_rank(), mesh.size()
    own = params[rank].shape if rank < len(params) else torch.Size((0, 0))  # of the matrix that this process collects
    sent = [shard.numel() for shard in shards] + [0] * (world - len(shards))
    most = -(-own[0] // world)  # rows of a shard
    received = [max(0, min(most, own[0] - i * most)) * own[1] for i in range(world)]

    def exchange(x, sizes_to, sizes_from):
        result = x.new_empty(sum(sizes_from))
        dist.all_to_all_single(result, x, sizes_from, sizes_to, group=mesh.get_group())
        return result
    matrix = exchange(torch.cat([shard.flatten() for shard in shards]), sent, received).view(own)
    matrix = orthogonal(matrix[None]).to(matrix.dtype) if matrix.numel() else matrix
    rows = exchange(matrix.flatten(), received, sent)
    return [part.view_as(shard) for part, shard in zip(rows.split(sent[:len(shards)]), shards)]


def orthogonal(x, coefficients=(3.4445, -4.7750, 2.0315), steps=5):
    """x (K, m, n) -> (K, m, n): approximately U V' of each matrix's SVD U S V', by quintic Newton-Schulz iteration."""
    a, b, c = coefficients
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).to(torch.float32 if x.device.type == 'cpu' else torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# ----------------------------------------------------------------------------------------------------------------------
# AdamW with 8-bit state

BLOCK = 256  # values that share a scale
MEAN = torch.int8, 2  # code of the mean of the gradients: its type and its power
SQUARE = torch.uint8, 4  # code of the mean of the squared gradients, which spans more magnitudes


class AdamW8bit(torch.optim.Optimizer):
    """AdamW for fp32 or bf16 matrices that keeps both running means in 8 bits (Dettmers et al., arXiv:2110.02861).

    Each block of 256 values has one fp32 scale. It differs from the paper in two ways. The code is a formula, not a
    table. Codes and bf16 weights are rounded stochastically, so a change below the distance of two codes is not lost:
    the expected value is the exact one. The seed and the step decide all roundings, so a resumed run repeats them, and
    all processes round alike."""

    def __init__(self, params, lr, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, seed=0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.seed = seed

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for index, p in enumerate(group['params']):
                if p.grad is not None:
                    self.update(p, self.state[p], index, **group)
        return loss

    def update(self, p, state, index, lr, weight_decay, betas, eps, **_):
        state['step'] = step = state.get('step', 0) + 1
        noise = torch.Generator(p.device).manual_seed(random.Random(f'{self.seed} {step} {index}').getrandbits(63))
        grad = F.pad(p.grad.flatten().float(), (0, -p.numel() % BLOCK)).view(-1, BLOCK)
        mean, square = torch.zeros_like(grad), torch.zeros_like(grad)
        if step > 1:
            mean = decoded(state['mean'], state['mean_scale'], MEAN)
            # Code 0 counts as code 1, because the update divides by this mean.
            square = decoded(state['square'].clamp(min=1), state['square_scale'], SQUARE)
        mean.lerp_(grad, 1 - betas[0])
        square.lerp_(grad.square(), 1 - betas[1])
        state['mean'], state['mean_scale'] = encoded(mean, MEAN, noise)
        state['square'], state['square_scale'] = encoded(square, SQUARE, noise)
        mean /= 1 - betas[0] ** step
        square /= 1 - betas[1] ** step
        update = (mean / square.sqrt_().add_(eps)).flatten()[:p.numel()].view_as(p)
        weight = p.float().mul(1 - lr * weight_decay).sub_(update, alpha=lr)
        p.copy_(rounded_to_bfloat16(weight, noise) if p.dtype == torch.bfloat16 else weight)

    def load_state_dict(self, state_dict):
        """Also undoes that the base class converts the codes and scales to the dtype of the parameters."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group['params']]
        for index, state in state_dict['state'].items():
            p = params[index]
            self.state[p] = {key: value.to(p.device, copy=True) if torch.is_tensor(value) else value
                             for key, value in state.items()}


def encoded(x, code, noise):
    """x (n, BLOCK) fp32 -> codes q (n, BLOCK), scales (n, 1) with x = scale sign(q) (|q| / top)^power on average."""
    dtype, power = code
    top = torch.iinfo(dtype).max
    size = x.abs()
    scale = size.amax(1, keepdim=True)
    size = size / scale.clamp(min=torch.finfo(scale.dtype).tiny)  # in [0, 1]
    q = (size ** (1 / power) * top).floor_().clamp_(max=top - 1)
    below, above = (q / top) ** power, ((q + 1) / top) ** power
    up = torch.rand(x.shape, generator=noise, device=x.device) < (size - below) / (above - below)
    return ((q + up) * x.sign()).to(dtype), scale


def decoded(q, scale, code):
    dtype, power = code
    q = q.float() / torch.iinfo(dtype).max
    return q.sign() * q.abs() ** power * scale


def rounded_to_bfloat16(x, noise):
    """x fp32 -> bf16: one of the two nearest values, x on average. bf16 is the upper half of the bits of fp32."""
    low_bits = torch.randint(2**16, x.shape, generator=noise, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + low_bits) & -2**16).view(torch.float32).bfloat16()
