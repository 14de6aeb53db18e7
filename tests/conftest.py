"""Settings of all tests: one thread and no GPU. The models of the tests are so small that more would be slower.

Tests fork runs of train.py, and a process that has used CUDA can't be forked. So no test process sees a GPU; test_gpu.py shows it
to the processes that it starts.
"""
import os
import random

VISIBLE = os.environ.get('CUDA_VISIBLE_DEVICES')
os.environ['CUDA_VISIBLE_DEVICES'] = ''

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# The first backward of a process starts a thread for each GPU, and a process with such threads cannot be forked. A process that
# has traced a model believes that it has a GPU, if torch is built for CUDA. So the first backward is here.
if not torch.accelerator.is_available():
    torch.zeros((), requires_grad=True).backward()


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A directory of tokens from 60 kB of made-up sentences."""
    import prepare
    draw, folder = random.Random(0), tmp_path_factory.mktemp('corpus')
    words = [''.join(draw.choices('abcdefghij', k=draw.randint(2, 7))) for _ in range(80)]
    for i in range(60):
        (folder / f'{i:02d}.txt').write_text('. '.join(' '.join(draw.choices(words, k=8)) for _ in range(20)))
    out = folder / 'tokens'
    prepare.main([f'--dataset=text:{folder}/*.txt', '--vocab_size=300', f'--out={out}', '--val_ratio=0.2', '--num_proc=1'])
    return out
