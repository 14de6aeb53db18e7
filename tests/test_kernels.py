"""Gradients that are written by hand equal those that autograd makes of the plain formula."""
import pytest
import torch
import torch.nn.functional as F

from kernels import chunked_cross_entropy, gated_hidden, rms, short_filter


def agree(fast, plain, *inputs):
    inputs = [x.requires_grad_() for x in inputs]
    a, b = fast(*inputs), plain(*inputs)
    weight = torch.randn_like(b)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for x, y in zip(torch.autograd.grad(a, inputs, weight), torch.autograd.grad(b, inputs, weight)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_rms_norm():
    torch.manual_seed(0)
    agree(rms, lambda x: F.rms_norm(x, (24,), eps=1e-6), 3 * torch.randn(2, 5, 24))
    agree(rms, lambda x, w: F.rms_norm(x, (24,), w, eps=1e-6), 3 * torch.randn(2, 5, 24), torch.randn(24))
    agree(rms, lambda x: F.rms_norm(x, (24,), eps=1e-6), 1e-3 * torch.randn(2, 5, 24))  # where eps shows


@pytest.mark.parametrize('T', [1, 3, 9])
def test_short_filter(T):
    torch.manual_seed(0)
    agree(short_filter, lambda z, w: sum(w[j] * F.pad(z, (0, 0, j, 0))[:, :T] for j in range(4)), torch.randn(2, T, 6), torch.randn(4, 6))


def test_gated_hidden():
    torch.manual_seed(0)

    def plain(z, gate):
        u = z.relu() ** 2
        return gate * u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    agree(gated_hidden, plain, torch.randn(20, 12), torch.rand(20, 1))


@pytest.mark.parametrize('softcap', [0.0, 2.0])
def test_cross_entropy_with_and_without_a_softcap(softcap):
    torch.manual_seed(0)
    targets = torch.randint(-1, 50, (300,))

    def plain(x, w):
        logits = x @ w.T
        return F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, ignore_index=-1)
    agree(lambda x, w: chunked_cross_entropy(x, w, targets, softcap), plain, torch.randn(300, 16), torch.randn(50, 16))


@pytest.mark.parametrize('share', [0.3, 1.0])
@pytest.mark.parametrize('softcap, theirs', [(0.0, 0.0), (2.0, 0.0), (0.0, 3.0)])
def test_cross_entropy_with_a_teacher(share, softcap, theirs):
    torch.manual_seed(0)
    targets, x_t, w_t = torch.randint(-1, 50, (300,)), torch.randn(300, 8), torch.randn(50, 8)

    def capped(logits, cap):
        return cap * torch.tanh(logits / cap) if cap else logits

    def plain(x, w):
        logits, q = capped(x @ w.T, softcap), capped(x_t @ w_t.T, theirs).softmax(1)
        distance = F.kl_div(logits.log_softmax(1), q, reduction='none').sum(1)[targets >= 0].mean()
        return (1 - share) * F.cross_entropy(logits, targets, ignore_index=-1) + share * distance
    agree(lambda x, w: chunked_cross_entropy(x, w, targets, softcap, (x_t, w_t, theirs, share)), plain, torch.randn(300, 16), torch.randn(50, 16))
