"""Generate text from a trained model. A run directory, a checkpoint or a packed file is enough: it holds the tokenizer.

    python sample.py runs/trix_tiny --prompt='def main(' --num=3 --temperature=0.8
    python sample.py runs/trix_tiny --prompts=prompts.txt        # one prompt per line
    python sample.py runs/trix_tiny --interactive                # type prompts; --conversation keeps the text so far
    python sample.py runs/trix_tiny --checkpoint=best            # or last, or a step
    python sample.py runs/trix_tiny --serve                      # a web page and /v1/completions on this machine
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, answer_help, as_utf8, load, run  # before torch, so that Ctrl-C ends its import
answer_help(__name__, __doc__, 'sample.SampleConfig')
import torch

from checkpoint import trained_share
from deploy import packed
from kernels import autocast
from runtime import device as hardware
from runtime.choice import choose_checkpoint
from runtime.generation import decoder_for, encode, generate, pieces, sample_seed
from tokenizer import load_tokenizer

COMPILE_TOKENS = 50_000  # from so many new tokens on, `auto` compiles the step (an estimate, not measured)


@dataclass
class SampleConfig:
    run: str = ''  # run directory or checkpoint file; may stand without --run=
    checkpoint: str = 'last'  # of a run directory: last (the newest good one), best (lowest validation loss) or a step
    prompt: str = ''  # text to continue (empty: the start of a document)
    prompts: str = ''  # file with one prompt per line (\\n in a line is a line break)
    interactive: bool = False  # type prompts, until an empty one
    conversation: bool = False  # with --interactive: a prompt continues all text before it
    num: int = 1  # samples per prompt
    max_new_tokens: int = 200  # maximum length of a sample, in tokens
    temperature: float = 0.8  # 0: always the most likely token; higher values: more varied text
    top_k: int = 0  # choose among the k most likely tokens (0: all)
    top_p: float = 1.0  # choose among the most likely tokens that sum to this probability
    seed: int = 1337  # the same seed gives the same text on the same machine
    stop: bool = True  # stop at the end of a document
    pack: str = 'auto'  # ternary weights in 2 bits while sampling: yes, no, or auto (where decoding is faster)
    compile: str = 'auto'  # on a GPU, compile the decoding step: true, false, or auto (for many tokens)
    serve: bool = False  # answer on 127.0.0.1: a web page, and /v1/completions for OpenAI clients
    port: int = 8000  # port of --serve
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, bfloat16 or float16

    def problems(self):
        found = [] if self.run else ['name a run directory or a checkpoint: python sample.py runs/x']
        found += [f'{key}={getattr(self, key)} must be at least 1' for key in ('num', 'max_new_tokens')
                  if getattr(self, key) < 1]
        found += [f'{key}={getattr(self, key)} must not be negative' for key in ('temperature', 'top_k')
                  if getattr(self, key) < 0]
        if not 0 < self.top_p <= 1:
            found.append(f'top_p={self.top_p} must lie in (0, 1]')
        if bool(self.prompt) + bool(self.prompts) + self.interactive + self.serve > 1:
            found.append('--prompt, --prompts, --interactive and --serve: give only one of them')
        if self.conversation and not self.interactive:
            found.append('--conversation works only with --interactive')
        if self.conversation and self.num > 1:
            found.append(f'num={self.num}: a --conversation continues one sample, so --num must be 1')
        if self.pack not in ('auto', 'yes', 'no'):
            found.append(f'pack={self.pack!r} is not one of auto, yes, no')
        if self.compile not in ('auto', 'true', 'false'):
            found.append(f'compile={self.compile!r} is not one of auto, true, false')
        if not 0 <= self.port < 65536:
            found.append(f'port={self.port} must lie in 0 to 65535 (0: any free port)')
        return found


@dataclass
class Speed:
    """Tokens and seconds, of prompts and of generated text."""
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def __str__(self):
        parts = (('prompt', self.prompt_tokens, self.prompt_seconds), ('decoding', self.new_tokens, self.new_seconds))
        return '; '.join(f'{name}: {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s'
                         for name, tokens, seconds in parts if seconds)


def main(argv):
    config = load(argv, SampleConfig, positional=('run',), usage=__doc__)
    device, dtype, reason = hardware.resolve(config.device, config.dtype)
    source = choose_checkpoint(config.run, config.checkpoint)
    model, state = packed.load_model(source, device)
    encoding = find_encoding(model, state, source)
    print(f'{source}, step {state["step"]:,}, on {reason}', file=sys.stderr)
    model = packed_in_memory(model, state, config.pack, dtype)
    decoder = decoder_for(model, compiles(config, device))
    if config.serve:
        from runtime import serve  # here because only --serve needs an HTTP server
        return serve.run(config, model, encoding, device, dtype, decoder)
    number, speed, text = 0, Speed(), ''
    for prompt in prompts(config):
        for i in range(config.num):
            number += 1
            if config.num > 1 or config.prompts:
                print(f'--- {number}')
            print(prompt, end='', flush=True)
            seed = sample_seed(config.seed, i)
            tokens = sample(config, model, encoding, text + prompt, seed, device, dtype, speed, decoder)
            new = show(pieces(encoding, tokens))
        if config.conversation:
            text += prompt + new + '\n'
    print(speed, file=sys.stderr)


def find_encoding(model, state, source):
    """The tokenizer of a model. UserError if it has none, or one with more tokens than the model knows."""
    if state['tokenizer'] is None:
        raise UserError(f'{source}: no tokenizer in this file, because its training shards had no tokenizer.json: '
                        'it cannot generate text')
    encoding = load_tokenizer(state['tokenizer'])
    if encoding.n_vocab > model.config.vocab_size:
        raise UserError(f'{source}: the tokenizer has {encoding.n_vocab} tokens, '
                        f'but the model only {model.config.vocab_size}')
    return encoding


def packed_in_memory(model, state, pack, dtype):
    """The model for sampling: with packed ternary weights if pack is yes, or auto and decoding is faster with them.

    Prints one line if it packs."""
    if 'packed' in state or pack == 'no' or trained_share(state) < 1:  # weights in the ternary warm-up are not ternary
        return model
    device = next(model.parameters()).device
    if pack == 'auto' and device.type == 'cuda' and not (packed.has_ternary(model) and packed.check_triton(device)):
        return model
    if pack == 'auto' and device.type != 'cuda' and not (
            device.type == 'cpu' and dtype == torch.float32 and packed.decodes_in_cpp(model)):
        return model
    model = packed.in_memory(model)
    print('ternary weights packed in memory for faster decoding (--pack=no: off; texts rarely differ, by rounding)',
          file=sys.stderr)
    return model


def compiles(config, device):
    """Whether to compile the decoding step. Prints one line if that takes time."""
    many = config.serve or config.interactive or config.num * config.max_new_tokens >= COMPILE_TOKENS
    if config.compile == 'true' and device.type != 'cuda':
        print('decoding is not compiled: --compile is for a GPU', file=sys.stderr)
    if device.type != 'cuda' or config.compile == 'false' or config.compile == 'auto' and not many:
        return False
    from runtime import compiler  # here because most samples do without it
    missing = compiler.obstacle(device)
    if missing:
        print(f'decoding is not compiled: {missing}', file=sys.stderr)
        return False
    print('compiling the decoding step, about a minute (--compile=false: off)', file=sys.stderr)
    return True


def sample(config, model, encoding, text, seed, device, dtype, speed, decoder=None):
    """Yield the token ids that continue `text`. Adds tokens and seconds to `speed`."""
    idx = torch.tensor([encode(encoding, text)], device=device)
    start = time.perf_counter()
    speed.prompt_tokens += min(idx.size(1), model.config.block_size)
    first = True
    with autocast(device, dtype):
        for token in generate(model, idx, encoding.n_vocab, config.max_new_tokens, config.temperature, config.top_k,
                              config.top_p, seed, encoding.eot_token, decoder):
            token = token.item()
            now = time.perf_counter()
            if first:
                speed.prompt_seconds += now - start
            else:
                speed.new_tokens += 1
                speed.new_seconds += now - start
            first, start = False, now
            if config.stop and token == encoding.eot_token:
                return
            yield token


def show(texts):
    """Print pieces of text as they arrive, and a line break -> the whole text."""
    shown = ''
    for text in texts:
        print(text, end='', flush=True)
        shown += text
    print()
    return shown


def prompts(config):
    """Yield the requested prompts. UserError if the file of --prompts is unreadable or has no prompt."""
    if config.interactive:
        while prompt := ask():
            yield prompt
    elif config.prompts:
        try:
            # Not splitlines, which would also split at form feeds. They belong to prompts.
            lines = Path(config.prompts).read_text(encoding='utf-8-sig').split('\n')
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--prompts={config.prompts}: {getattr(error, "strerror", None) or error}')
        if not any(lines):
            raise UserError(f'--prompts={config.prompts}: the file has no prompt')
        yield from (line.replace('\\n', '\n') for line in lines if line)
    else:
        yield as_utf8(config.prompt)


def ask():
    if sys.stdin is None:
        raise UserError('--interactive reads prompts from standard input, but it is closed')
    try:
        return input('> ')
    except EOFError:
        print()
        return ''


if __name__ == '__main__':
    run(main)
