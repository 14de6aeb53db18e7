"""Device and precision are chosen with a reason; what a GPU must do is tested where there is one."""
import pytest
import torch

import device as hardware
from configurator import UserError


def test_the_cpu_computes_in_fp32_and_says_why():
    device, dtype, why = hardware.resolve('cpu', 'auto')
    assert (device.type, dtype) == ('cpu', torch.float32) and 'half precision is slow' in why


def test_what_was_asked_for_is_done():
    assert hardware.resolve('cpu', 'bfloat16')[1] == torch.bfloat16


def test_mfu_is_unknown_where_the_peak_is():
    assert hardware.peak_flops(torch.device('cpu'), torch.float32) is None


def test_a_missing_device_is_refused():
    with pytest.raises(UserError, match='--device=cuda: torch .* finds no such device here; use --device=cpu'):
        hardware.resolve('cuda', 'auto')
