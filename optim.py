"""The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    optimizers = make_optimizers(model, config, device)      # {'optimizer': AdamW, 'muon': Muon}, the checkpoint keys
    for optimizer in optimizers.values(): set_rates(optimizer, lr, wd); optimizer.step()
"""
import math
from collections import defaultdict

import torch

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
            batches = defaultdict(list)  # {key: [(parameter, update (K, m, n))]}
            for p in group['params']:
                if p.grad is None:
                    continue
                if 'momentum_buffer' not in self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                mean = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(mean, group['momentum'])  # Nesterov momentum
                shape = p.shape[-2:]
                key = shape, id(p) if p.numel() > LARGEST_IN_A_BATCH else 0
                batches[key].append((p, update.reshape(-1, *shape)))
            for (shape, _), batch in batches.items():
                params, updates = zip(*batch)
                directions = orthogonal(torch.cat(updates)).split([len(update) for update in updates])
                for p, update in zip(params, directions):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.add_(update.reshape(p.shape), alpha=-group['lr'] * 0.2 * math.sqrt(max(shape)))
        return loss


# A parameter with more weights than this is orthogonalized alone: a batch is no faster and takes more memory.
LARGEST_IN_A_BATCH = 2**20


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
