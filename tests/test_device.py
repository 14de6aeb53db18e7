"""Device and precision are chosen with a reason; what a GPU must do is tested where there is one."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import device as hardware
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


def test_an_older_torch_than_the_tests_pass_with_is_refused_in_one_line():
    root = Path(hardware.__file__).parent.parent
    done = subprocess.run([sys.executable, '-c', 'import torch; torch.__version__ = "2.10.1+cu128"; import train'], cwd=root, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'torch 2.10.1+cu128 is too old: nanoTriX needs 2.11 or newer (pip install torch==2.13.0)\n'
    assert re.findall(r'torch==([\d.]+)', (root / '.ci' / 'run').read_text()) == ['2.11.0'], 'the oldest version is tested, too'
