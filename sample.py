"""Text from a trained model. A run directory, a checkpoint or a packed file is all it needs: the tokenizer is inside.

    python sample.py runs/trix_tiny --prompt='def main(' --num=3 --temperature=0.8
    python sample.py runs/trix_tiny --prompts=prompts.txt    # a prompt a line
    python sample.py runs/trix_tiny --interactive            # asks for one after the other
"""
import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, as_utf8, load, run  # before torch, so Ctrl-C can interrupt torch's import
import torch

from deploy.packed import load_model
from kernels import autocast
from runtime import device as hardware
from runtime.generation import encode, generate
from tokenizer import load_tokenizer


@dataclass
class SampleConfig:
    run: str = ''  # run directory (its newest good checkpoint) or checkpoint file; may stand without --run=
    prompt: str = ''  # text to continue (empty: the start of a document)
    prompts: str = ''  # a file of prompts, one a line (\\n in it: a new line), each continued on its own
    interactive: bool = False  # ask for prompts, until an empty one
    num: int = 1  # samples of each prompt
    max_new_tokens: int = 200  # tokens of each, at most
    temperature: float = 0.8  # 0: always the likeliest token; below 1: safer, above: wilder
    top_k: int = 0  # choose among the k likeliest tokens (0: all)
    top_p: float = 1.0  # choose among the likeliest tokens that hold this much probability together
    seed: int = 1337  # same seed, same text (on the same machine)
    stop: bool = True  # stop at the end of a document
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, bfloat16 or float16

    def problems(self):
        found = [] if self.run else ['name a run directory or a checkpoint: python sample.py runs/x']
        found += [f'{key}={getattr(self, key)} must be at least 1' for key in ('num', 'max_new_tokens') if getattr(self, key) < 1]
        found += [f'{key}={getattr(self, key)} must not be negative' for key in ('temperature', 'top_k') if getattr(self, key) < 0]
        if bool(self.prompt) + bool(self.prompts) + self.interactive > 1:
            found.append('--prompt, --prompts and --interactive: give one of them')
        return found + ([] if 0 < self.top_p <= 1 else [f'top_p={self.top_p} must lie in (0, 1]'])


def stream(encoding, tokens, say):
    """Pass the text of token ids to `say` as they arrive, in whole characters. Returns the number of tokens."""
    decoder, count = codecs.getincrementaldecoder('utf-8')('replace'), 0
    for count, token in enumerate(tokens, 1):
        say(decoder.decode(encoding.decode_single_token_bytes(token)))
    say(decoder.decode(b'', final=True))
    return count


def main(argv):
    config = load(argv, SampleConfig, positional=('run',), usage=__doc__)
    device, dtype, chosen = hardware.resolve(config.device, config.dtype)
    model, state = load_model(config.run, device)
    if state['tokenizer'] is None:
        raise UserError(f'{config.run}: there is no tokenizer in it, its data were shards without a tokenizer.json: no text')
    encoding = load_tokenizer(state['tokenizer'])
    if encoding.n_vocab > model.config.vocab_size:
        raise UserError(f'{config.run}: its tokenizer has {encoding.n_vocab} tokens, its model {model.config.vocab_size}')
    print(f'{config.run}, step {state["step"]:,}, on {chosen}', file=sys.stderr)
    made, seconds, tokens = 0, [0.0, 0.0], [0, 0]  # [of prompts, of generated tokens]
    for prompt in prompts(config):
        idx = torch.tensor([encode(encoding, prompt)], device=device)
        for i in range(config.num):
            if config.num > 1 or config.prompts:
                print(f'--- {made + 1}')
            print(prompt, end='', flush=True)
            times = [time.perf_counter()]

            def ids():
                with autocast(device, dtype):
                    for token in generate(model, idx, encoding.n_vocab, config.max_new_tokens, config.temperature,
                                          config.top_k, config.top_p, config.seed + i):
                        token = token.item()
                        times.append(time.perf_counter())
                        if config.stop and token == encoding.eot_token:
                            return
                        yield token
            stream(encoding, ids(), lambda text: print(text, end='', flush=True))
            print()
            made += 1
            tokens = [tokens[0] + min(idx.size(1), model.config.block_size), tokens[1] + len(times) - 2]
            seconds = [seconds[0] + times[1] - times[0], seconds[1] + times[-1] - times[1]]
    print('; '.join(f'{what} {n:,} tokens, {n / s:,.0f} tokens/s' for what, n, s in zip(('prompt:', 'decoding:'), tokens, seconds) if s),
          file=sys.stderr)


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
            raise UserError(f'--prompts={config.prompts}: no prompt in it')
        yield from (line.replace('\\n', '\n') for line in lines if line)
    else:
        yield as_utf8(config.prompt)


def ask():
    if sys.stdin is None:
        raise UserError('--interactive needs an input to read prompts from: it is closed')
    try:
        return input('> ')
    except EOFError:
        print()
        return ''


if __name__ == '__main__':
    run(main)
