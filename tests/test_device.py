"""Device and precision are chosen with a reason. test_gpu.py tests what needs a GPU."""
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


def test_the_requested_device_and_dtype_are_used():
    assert hardware.resolve('cpu', 'bfloat16')[1] == torch.bfloat16


def test_mfu_is_unknown_if_the_peak_is_unknown():
    assert hardware.peak_flops(torch.device('cpu'), torch.float32) is None


@pytest.mark.parametrize('name, key', [
    ('NVIDIA GeForce RTX 3060', 'RTX 3060'), ('NVIDIA A100-SXM4-80GB', 'A100'), ('NVIDIA A100-PCIE-40GB', 'A100'), ('Tesla T4', 'T4'),
    ('NVIDIA H100 80GB HBM3', 'H100'), ('NVIDIA H100 PCIe', 'H100 PCIe'), ('Tesla V100-SXM2-16GB', 'V100'), ('NVIDIA Thor', 'Jetson AGX Thor'),
    ('Tesla V100-PCIE-32GB', 'V100 PCIe'), ('NVIDIA RTX A6000', 'RTX A6000'), ('NVIDIA A10G', 'A10G'), ('rtx3060', 'RTX 3060'),
    ('4060ti 16 GB', 'RTX 4060 Ti'), ('NVIDIA GeForce RTX 4070 Ti', None), ('NVIDIA GeForce RTX 3060 Laptop GPU', None),
    ('NVIDIA GH200 480GB', None), ('', None)])
def test_a_card_is_found_by_its_whole_name_alone(name, key):
    assert hardware.find_card(name) == key
    if key and len(hardware.CARDS[key].gb) == 1:
        assert hardware.choose_card(name) == (key, hardware.CARDS[key].gb[0])


def test_the_peak_of_a_gpu_depends_on_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA A100-SXM4-80GB')
    cuda = torch.device('cuda')
    assert hardware.peak_flops(cuda, torch.bfloat16) == 312e12 and hardware.peak_flops(cuda, torch.float32) == 19.5e12
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'high')
    assert hardware.peak_flops(cuda, torch.float32) == 156e12  # TF32
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Tesla T4')
    assert hardware.peak_flops(cuda, torch.bfloat16) is hardware.peak_flops(cuda, torch.float32) is None


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
