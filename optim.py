"""The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    optimizers = make_optimizers(model, config, device)      # {'optimizer': AdamW, 'muon': Muon}, the names they have in a checkpoint
    for optimizer in optimizers.values(): set_rates(optimizer, lr, wd); optimizer.step()
"""
import math

import torch

OPTIMIZERS = ('adamw', 'muon')


def make_optimizers(model, config, device):
    """Which parameters decay, the model says; Muon takes the projections of the blocks among them (not TriX tiles, which are 3-D)."""
    decayed = model.decayed()
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = [p for p in decayed if config.optimizer == 'muon' and names[id(p)].endswith('proj.weight')]
    elsewhere = {id(p) for p in hidden}
    matrices = [p for p in decayed if id(p) not in elsewhere]
    elsewhere |= {id(p) for p in matrices}
    groups = [{'params': matrices, 'weight_decay': config.weight_decay, 'decays': True},
              {'params': [p for p in model.parameters() if id(p) not in elsewhere], 'weight_decay': 0.0, 'decays': False}]
    found = {'optimizer': torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                            fused=device.type != 'mps')}
    if hidden:
        group = {'params': hidden, 'decays': True}
        found['muon'] = Muon([group], lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn='match_rms_adamw')
    return found


def set_rates(optimizer, lr, weight_decay):
    for group in optimizer.param_groups:
        group['lr'], group['weight_decay'] = lr, weight_decay if group['decays'] else 0.0


class Muon(torch.optim.Muon):
    """torch's Muon (Keller Jordan 2024) with the learning rate of AdamW (Moonshot, arXiv:2502.16982: the RMS of an update is 0.2 lr).

    torch's Newton-Schulz runs in bf16, which most CPUs multiply many times slower than fp32; there the same formula runs in fp32."""

    @torch.no_grad()
    def step(self, closure=None):
        if self.param_groups[0]['params'][0].device.type != 'cpu':
            return super().step(closure)
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault('momentum_buffer', torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(mean, group['momentum']) if group['nesterov'] else mean
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(orthogonal(update, group['ns_coefficients'], group['ns_steps'], group['eps']),
                       alpha=-group['lr'] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(x, coefficients, steps, eps):
    """x (m, n) -> about U V' of its singular value decomposition, by the quintic Newton-Schulz iteration."""
    a, b, c = coefficients
    wide = x.size(0) <= x.size(1)
    x = (x if wide else x.T) / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
