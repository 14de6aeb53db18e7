"""Device and precision are chosen with a reason; what a GPU must do is tested where there is one."""
import pytest
import torch

import device as hardware
from configurator import UserError
from model import GPT, GPTConfig


def test_the_cpu_computes_in_fp32_and_says_why():
    device, dtype, why = hardware.resolve('cpu', 'auto')
    assert (device.type, dtype) == ('cpu', torch.float32) and 'half precision is slow' in why


def test_what_was_asked_for_is_done():
    assert hardware.resolve('cpu', 'bfloat16')[1] == torch.bfloat16


def test_mfu_is_unknown_where_the_peak_is():
    assert hardware.peak_flops(torch.device('cpu'), torch.float32) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_a_missing_device_is_refused():
    with pytest.raises(UserError, match='--device=cuda: torch .* finds no such device here; use --device=cpu'):
        hardware.resolve('cuda', 'auto')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('ffn', ['gelu', 'swiglu', 'trix'])
def test_cuda_gives_the_loss_of_the_cpu(ffn):
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(ffn=ffn, n_layer=2, vocab_size=512)), torch.randint(512, (2, 65))
    on_cpu = model(idx[:, :-1], idx[:, 1:]).item()
    model, idx = model.cuda(), idx.cuda()
    assert abs(model(idx[:, :-1], idx[:, 1:]).item() - on_cpu) < 2e-3
    with hardware.autocast(torch.device('cuda'), torch.bfloat16):
        loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert abs(loss.item() - on_cpu) < 2e-2 and all(p.grad.isfinite().all() for p in model.parameters())
