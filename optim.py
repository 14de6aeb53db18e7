"""The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    optimizers = make_optimizers(model, config, device)      # {'optimizer': AdamW, 'muon': Muon}, the checkpoint keys
    for optimizer in optimizers.values(): set_rates(optimizer, lr, wd); optimizer.step()
"""
import itertools
import math
from collections import defaultdict

import torch
import torch.distributed as dist

OPTIMIZERS = ('adamw', 'muon')


def make_optimizers(model, config, device):
    """{'optimizer': AdamW} and, with config.optimizer='muon', {'muon': Muon}.

    model.decay_params() lists the parameters with weight decay. Among them, Muon takes the projections and the TriX
    tiles of the blocks."""
    names = {id(p): name for name, p in model.named_parameters()}
    decay_params = model.decay_params()
    decay_ids = {id(p) for p in decay_params}
    other_params = [p for p in model.parameters() if id(p) not in decay_ids]
    muon_params = []
    if config.optimizer == 'muon':
        muon_params = [p for p in decay_params if names[id(p)].endswith(('proj.weight', '.up', '.down'))]
    muon_ids = {id(p) for p in muon_params}
    adamw_params = [p for p in decay_params if id(p) not in muon_ids]
    groups = [{'params': adamw_params, 'weight_decay': config.weight_decay, 'decays': True},
              {'params': other_params, 'weight_decay': 0.0, 'decays': False}]
    optimizers = {'optimizer': torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                                 fused=device.type != 'mps')}
    if muon_params:
        group = {'params': muon_params, 'decays': True}
        optimizers['muon'] = Muon([group], lr=config.learning_rate, weight_decay=config.weight_decay)
    return optimizers


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


# A parameter with more weights than this is orthogonalized alone: a batch is no faster and takes more memory.
LARGEST_IN_A_BATCH = 2**20


def orthogonal_batches(params, updates):
    """Yields (p, orthogonalized updates[p]). Matrices of equal shape are orthogonalized in one batch.

    A stack of matrices may be sharded by FSDP: each process has some of its matrices, all of them whole."""
    together = defaultdict(list)
    for p in params:
        together[p.shape[-2:], id(p) if p.numel() > LARGEST_IN_A_BATCH else 0].append(p)
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
