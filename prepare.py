"""
Turns a corpus into what data.py reads: tokenizer.json, train.bin, val.bin and meta.json.

    python prepare.py                                               # pylib: the text of this machine's Python library
    python prepare.py --dataset=shakespeare --tokenizer=char        # nanoGPT's Shakespeare, one token per character
    python prepare.py --dataset=text:notes --vocab_size=4096        # a file, a directory or a 'glob' (see below)
    python prepare.py --dataset=fineweb_edu --max_tokens=5e8 --vocab_size=32000 --out=data/edu
    python prepare.py --dataset=wikitext103 --tokenizer=gpt2        # or a tokenizer.json, ours or Hugging Face's
    python prepare.py --dataset=bins:fineweb10B --tokenizer=gpt2    # token files of nanoGPT, llm.c, modded-nanogpt
    python prepare.py --dataset=fineweb_edu --shard=3/16 --out=data/edu    # one of 16 machines
    python prepare.py join data/edu                                 # joins the parts of all machines in data/edu
    python prepare.py show data/pylib --n=3                         # sample windows, statistics and a plot

text: reads .txt, .jsonl and .parquet files, the first two also as .gz or .zst.

Rows of token ids that another program made (.npy, .pt):

    python prepare.py validate DIR                                  # reads everything and names every broken file
    python prepare.py split DIR OUT --val_ratio=0.01 --tokenizer=gpt2    # OUT is for train.py: links to DIR's files
    python prepare.py pack --dataset=pylib --row=32768 --out=DIR    # writes any corpus as such rows
    python prepare.py recommend DIR                                 # presets to train on it, with size, time, memory

Documents are read as a stream. Exact duplicates are dropped. The hash of a document's text assigns it to train or val.
The byte-level BPE is trained on the train documents of the first 64 MB, then several processes encode the text.
Everything is written to .NAME.tmp beside the result, which is renamed once it is complete. After a kill, the same
command continues from the last finished part.
If the corpus is too small for a split by hash, it is split by position: its last part is val.
"""
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, load, run
from corpora import vocabulary
from corpora.preparation import PrepareConfig, directory, is_bins, is_path, join, link, prepare


@dataclass
class PackConfig:
    row: int = 32_768  # ids in a row
    rows_per_shard: int = 100  # rows in a file

    def problems(self):
        for key in ('row', 'rows_per_shard'):
            if getattr(self, key) < 1:
                yield f'--{key}={getattr(self, key)}: must be at least 1'


@dataclass
class SplitConfig:
    path: str = ''  # .npy and .pt files: a directory, a file or a glob
    out: str = ''  # directory to make
    val_ratio: float = 0.01  # fraction of the files for validation
    tokenizer: str = ''  # that made the ids: gpt2, byte or a tokenizer.json (empty: tokenizer.json beside the files)
    vocab_size: int = 0  # without a tokenizer: ids must be below it (0: any id)
    seed: int = 1337  # of the random split

    def problems(self):
        if not self.path or not self.out:
            yield 'name the shards and the directory to make: python prepare.py split DIR OUT'
        if self.tokenizer in vocabulary.FROM_TEXT:
            yield (f'--tokenizer={self.tokenizer}: it is made from text, but these are ids: expected gpt2, byte or a '
                   'tokenizer.json')
        if not 0 < self.val_ratio < 1:
            yield f'--val_ratio={self.val_ratio}: expected a fraction between 0 and 1'


@dataclass
class PathConfig:
    path: str = ''  # a prepared directory, or rows of token ids
    vocab_size: int = 0  # validate: ids must be below it (0: any id)
    n: int = 3  # show: windows to print
    card_gb: float = 0.0  # recommend: memory in GB of the GPU to train on (0: this machine)

    def problems(self):
        if not self.path:
            yield 'name a directory: python prepare.py validate|recommend|show|join DIR'
        for key in ('vocab_size', 'n', 'card_gb'):
            if getattr(self, key) < 0:
                yield f'--{key}={getattr(self, key)}: must not be negative'


def main(argv):
    command, *rest = argv if argv and argv[0] in COMMANDS else ('', *argv)
    try:
        COMMANDS.get(command, prepare_command)(rest)
    except BrokenPipeError:  # the reader of our output went away: `run` knows
        raise
    except OSError as error:  # a file that can't be read names itself, a full disk doesn't
        raise UserError(f"{error.filename or ' '.join(['prepare.py', *argv])}: {error.strerror or error}")


def prepare_command(argv):
    config = load(argv, PrepareConfig, usage=__doc__)
    out = Path(config.out) if config.out else directory(config)
    if config.dataset.startswith('shards:'):
        from corpora import shards
        vocab_size = config.vocab_size if config.origin['vocab_size'] != 'default' else 0
        content = vocabulary.named(config.tokenizer)
        path = config.dataset.removeprefix('shards:')
        shards.split(path, out, config.val_ratio, vocab_size, config.seed, content=content)
    elif is_bins(config.dataset):
        link(config, out)
    else:
        prepare(config, out)


def pack_command(argv):
    config = load(argv, PrepareConfig, PackConfig, usage=__doc__)
    if not config.out:
        raise UserError('--out is missing: python prepare.py pack --dataset=NAME --row=32768 --out=DIR')
    from corpora import shards
    prepared = directory(config)
    if is_bins(config.dataset):
        link(config, prepared)
    elif is_path(config.dataset):
        for key in ('max_tokens', 'max_documents', 'shard'):
            if value := getattr(config, key):
                raise UserError(f'--{key}={value}: {config.dataset} is already prepared, and all of it is packed: '
                                'leave the option out')
    else:
        prepare(config, prepared)
    shards.pack(prepared, config.row, Path(config.out), config.rows_per_shard)


def split_command(argv):
    config = load(argv, SplitConfig, positional=('path', 'out'), usage=__doc__)
    from corpora import shards
    content = vocabulary.named(config.tokenizer or 'none')
    shards.split(config.path, Path(config.out), config.val_ratio, config.vocab_size, config.seed, content=content)


def path_command(function):
    def command(argv):
        config = load(argv, PathConfig, positional=('path',), usage=__doc__)
        function(config)
    return command


def validate(config):
    from corpora import shards
    shards.validate(config.path, config.vocab_size)


def show(config):
    from corpora import show as module
    module.show(config.path, config.n)


def recommend(config):
    from corpora import recommend as module
    module.recommend(config.path, card_gb=config.card_gb)


COMMANDS = {
    'pack': pack_command, 'split': split_command, 'validate': path_command(validate), 'show': path_command(show),
    'recommend': path_command(recommend), 'join': path_command(lambda config: join(Path(config.path), ask=True))}


if __name__ == '__main__':
    for number in (signal.SIGINT, signal.SIGTERM):  # leave through `workspace`
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    run(main)
