"""
All measurements and comparisons. Candidates run in turn, and a ratio compares two candidates within one repeat. Tables
and pictures go to runs/bench/<machine>/. `--out=results` renews the project's own tables.

    python bench.py                         # the speed of every block on this machine, on one page (five minutes)
    python bench.py blocks                  # steps of models of 9M, 21M and 70M, FFNs alone (six minutes)
    python bench.py amp                     # fp32, TF32, bf16 and fp16, as far as the device supports them
    python bench.py compile                 # what torch.compile gains on this machine, and its cost (fifteen minutes)
    python bench.py context                 # attention against resonance, 512 to 32,768 tokens (eight minutes)
    python bench.py decode                  # prompts and tokens of 1 and 16 sequences, packed or not (five minutes)
    python bench.py steps --model=FILE      # what each option gains for a config file: precision, compile, batch, ...
    python bench.py batch --model=FILE      # the largest batch of a config file that fits
    python bench.py memory --model=FILE     # estimated memory by batch, precision and checkpointing, on 8 to 24 GB
    python bench.py sweep config/x.py --learning_rate=1e-3,3e-3  # runs over a grid of options, and the best of them
    python bench.py head                    # the loss: ours with and without torch.compile, and others
    python bench.py quality                 # what each FFN learns from the same tokens, three seeds (hours on a CPU)
    python bench.py quality --preset=mixer  # or recall, routing, tiles, bitnet, speedrun, tiny;
                                            # --match=params, flops, bytes or time
    python bench.py quality --preset=trix   # TriX against dense FFNs at 6 x 256, rates tuned alike (a GPU, or a day)
    python bench.py frontier                # loss against compute, file size, decoding speed: dense, BitNet, TriX
    python bench.py peers --nanogpt=PATH    # a checkout of nanoGPT: its model and loop against ours; on a GPU the
                                            # speed of GPT-2 with 124M parameters (ten minutes)
    python bench.py peers --nanogpt=PATH --shakespeare  # its Shakespeare run against ours (half an hour)
    python bench.py peers --llama_cpp       # packed models decode beside llama.cpp (two minutes)
    python bench.py convert                 # a dense model made ternary: loss, size and speed of each stage
                                            # (six minutes after training)
    python bench.py scaling                 # one process against several, each with a thread or a GPU (five minutes)
    python bench.py plan                    # what train.py --plan estimates, and what the runs take (five minutes)
    python bench.py loop                    # what surrounds a step: loading, logging, a checkpoint (a minute)
    python bench.py data                    # encoding, preparing and loading: speed and memory (eight minutes)
    python bench.py tables                  # write the tables of results/README.md from the JSON files in results/
"""
import sys
from dataclasses import dataclass

from configurator import UserError, answer_help, load, run  # before torch, so Ctrl-C can interrupt torch's import
if sys.argv[1:2] != ['sweep']:  # it has its own --help
    answer_help(__name__, __doc__, 'bench.BenchConfig')
from benchmarks import blocks, deployed, frontier, loop, measure, nanogpt, preparing, presets, quality, sweep, tables


@dataclass
class BenchConfig:
    command: str = ''  # one of the commands above; can be given without --command=
    repeats: int = 15  # timed repeats of each candidate; fewer in the commands whose repeats take long
    quick: bool = False  # fewer repeats, contexts up to 4096, smaller corpora, no time to nanoGPT's loss
    preset: str = 'ffn'  # quality: ffn, mixer, recall, routing, tiles, bitnet, speedrun, tiny or trix
    shape: str = '6x256'  # quality --preset=trix: layers x width
    rates: str = ''  # quality: values of matrix_lr to try for each run; the best is used for all seeds (muon)
    match: str = ''  # quality: equal params, flops (of a token) or bytes (packed) by width, or time by steps
    tokens: int = 0  # quality, frontier: tokens of each run; 0: the usual length (1.25M for most presets)
    seeds: int = 3  # quality: runs of each config, with seeds 1337 (the default), 1, 2, ...
    nanogpt: str = ''  # peers: directory of a checkout of nanoGPT
    shakespeare: bool = False  # peers --nanogpt: only nanoGPT's Shakespeare run against config/shakespeare.py
    llama_cpp: bool = False  # peers: decode beside llama.cpp, with the package xllamacpp
    model: str = 'config/trix_tiny.py'  # steps, batch and memory: a config file
    batch_sizes: tuple[int, ...] = (8, 16, 32)  # memory: sequences in a micro-step
    card_gb: float = 0.0  # batch: memory of a card in GB; 0: the memory of this machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, tf32, bfloat16 or float16
    out: str = 'runs/bench'  # directory of tables and pictures; results: the project's own tables

    def problems(self):
        presets = [*quality.PRESETS, 'trix', 'recall']
        problems = []
        if self.command == 'sweep':
            problems.append('sweep must be the first word: python bench.py sweep config/x.py --learning_rate=1e-3,3e-3')
        elif self.command not in ('', *COMMANDS):
            problems.append(f'command {self.command!r} is not one of {", ".join(COMMANDS)}')
        if self.preset not in presets:
            problems.append(f'preset {self.preset!r} is not one of {", ".join(presets)}')
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            problems.append('batch_sizes must be numbers of at least 1, such as 8,16,32')
        for key in ('repeats', 'seeds'):
            if getattr(self, key) < 1:
                problems.append(f'{key}={getattr(self, key)} must be at least 1')
        if self.match not in ('', 'time', *quality.MATCHES):
            problems.append(f'match={self.match!r} is not one of {", ".join(quality.MATCHES)}, time')
        if self.preset != 'trix' and self.shape != '6x256':
            problems.append('shape is for quality --preset=trix')
        try:
            quality.shape_of(self)
            quality.numbers(self.rates)
        except UserError as error:
            problems += error.args
        if self.tokens < 0:
            problems.append(f'tokens={self.tokens} must not be negative')
        if self.llama_cpp and self.command != 'peers':
            problems.append('--llama_cpp is for peers')
        if self.shakespeare and not self.nanogpt:
            problems.append('--shakespeare is for peers --nanogpt=PATH')
        if self.command == 'peers' and (self.nanogpt or not self.llama_cpp):
            missing = nanogpt.missing_from_nanogpt(self.nanogpt)
            if missing:
                problems.append(f'--nanogpt={self.nanogpt}: not a checkout of nanoGPT ({missing}): '
                                'clone nanoGPT and give its directory')
        return problems


def peers(config):
    if config.nanogpt:
        nanogpt.peers(config)
    if config.llama_cpp:
        deployed.llama_cpp(config)


COMMANDS = {
    'blocks': blocks.blocks,
    'amp': blocks.amp,
    'compile': blocks.compilation,
    'context': blocks.context,
    'decode': deployed.decode,
    'steps': presets.steps,
    'batch': presets.batch,
    'memory': presets.memory,
    'head': blocks.head,
    'quality': quality.quality,
    'frontier': frontier.frontier,
    'peers': peers,
    'convert': deployed.convert,
    'scaling': loop.scaling,
    'plan': loop.plan,
    'loop': loop.loop,
    'data': preparing.data,
    'tables': lambda config: tables.write(tables.RESULTS)}
ONE_PAGE = ('blocks', 'amp', 'context', 'decode', 'head')  # without a command


def main(argv):
    if argv[:1] == ['sweep']:  # its options are those of train.py
        return sweep.sweep(argv[1:])
    config = load(argv, BenchConfig, positional=('command',), usage=__doc__)
    config.quick = config.quick or not config.command
    if config.command != 'tables':  # its page is in results/
        measure.check_can_write(config.out)
    for command in [config.command] if config.command else ONE_PAGE:
        COMMANDS[command](config)


if __name__ == '__main__':
    run(main)
