"""
Measure a trained model on text that it has never seen. The last line of the output is one JSON object.

    python evaluate.py runs/trix_tiny                     # the run's own validation again, to the last bit
    python evaluate.py runs/trix_tiny --eval_tokens=0     # all of the validation split
    python evaluate.py runs/trix_tiny runs/dense          # compare: a table, and the page runs/evaluation.html
    python evaluate.py runs/x --checkpoint=best           # or last, or a step
    python evaluate.py runs/x --context=2048 --stride=512 # every token once, with at least 1,536 tokens before it
    python evaluate.py runs/x --by_position               # also the loss by position in the context
    python evaluate.py runs/wikitext_tiny --test          # word-level perplexity on WikiText's test split
    python evaluate.py runs/x --hellaswag                 # acc and acc_norm; or --hellaswag=FILE
"""
import json
import math
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

from configurator import UserError, answer_help, load, run, typed  # before torch, so that Ctrl-C ends its import
answer_help(__name__, __doc__, 'evaluate.EvaluateConfig')
import numpy as np
import torch

from runtime import comparison
from runtime import device as hardware
from benchmarks import hellaswag
from deploy.packed import load_model
from runtime.choice import choose_checkpoint
from runtime.runlog import plain, read_lines
from corpora.prepared import holds_rows, open_data
from tokenizer import encode, equivalent, load_tokenizer, token_bytes
from training import validate


@dataclass
class EvaluateConfig:
    run: str = ''  # run directory or checkpoint file; may stand without --run=. Several runs are compared
    checkpoint: str = 'last'  # of a run directory: last (the newest good one), best (lowest validation loss) or a step
    data: str = ''  # prepared directory, or rows of ids: a directory or shards:DIR (empty: the data of the run)
    eval_tokens: int = -1  # tokens to validate on (0: the whole split; -1: as many as the run did; all with --stride)
    batch_size: int = 0  # sequences per batch (0: as in a micro-step of the run)
    context: int = 0  # tokens per window (0: the run's block_size); learned positions cannot exceed block_size
    stride: int = 0  # tokens from one window to the next; shared ones count once (0: no overlap; --test: half a window)
    by_position: bool = False  # also the loss by position in the context (always in a comparison)
    test: bool = False  # also word-level perplexity on the test split of WikiText
    hellaswag: str = ''  # also HellaSwag, from this hellaswag_val.jsonl (download, or no value: download it to data/)
    items: int = 0  # use only the first items of HellaSwag (0: all)
    page: str = 'runs/evaluation.html'  # page of a comparison; a name that ends in .md makes it Markdown
    sample_tokens: int = 64  # maximum length of the samples of a comparison, in tokens
    verify: bool = False  # read and check all tokens, even if no file has changed since the last check
    device: str = 'auto'  # auto, cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # auto, float32, tf32, bfloat16 or float16

    def problems(self):
        found = [] if self.run else ['name a run directory or a checkpoint: python evaluate.py runs/x']
        sizes = ('batch_size', 'context', 'stride', 'items')
        found += [f'{key}={getattr(self, key)} must not be negative' for key in sizes if getattr(self, key) < 0]
        if self.eval_tokens < -1:
            found.append(f'eval_tokens={self.eval_tokens} must not be negative')
        if self.sample_tokens < 1:
            found.append(f'sample_tokens={self.sample_tokens} must be at least 1')
        if self.items and not self.hellaswag:
            found.append(f'items={self.items}: this option needs --hellaswag')
        if Path(self.page).suffix not in ('.html', '.md'):
            found.append(f'page={self.page!r} must end in .html or .md')
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Overlapping windows, and the test split

class Strided:
    """Splits texts of equal length into overlapping windows for `validate`. Each target counts once.

    The targets are all tokens except the first of each text. Windows start every `stride` tokens of a text. In the
    first window all targets count. In later windows the last `stride` targets count; each has at least context - stride
    tokens before it.

    read(text, start, stop): returns ids of a text
    texts, length: number of texts, and tokens in each
    limit: number of targets, counted from the first (0: all)"""

    def __init__(self, read, texts, length, context, stride, limit=0):
        self.read, self.length, self.stride, self.context = read, length, stride, min(context, length - 1)
        self.targets = texts * (length - 1)
        self.limit = limit or self.targets

    def windows(self):
        """(n,) int64"""
        return np.arange(self.window_of(self.limit - 1) + 1)

    def window_of(self, target):
        """The window in which a target counts. Windows and targets are numbered over all texts."""
        text, k = divmod(target, self.length - 1)
        inside = 0 if k < self.context else 1 + (k - self.context) // self.stride
        return inside + (text * (1 + self.window_of(self.length - 2)) if text else 0)

    def val_batch(self, windows):
        """x, y: (len(windows), context) int64. x is 0 after a text's end. y is -1 where no target counts here."""
        x, y = np.zeros((len(windows), self.context), np.int64), np.full((len(windows), self.context), -1)
        for row, window in enumerate(windows.tolist()):
            text, k = divmod(window, 1 + self.window_of(self.length - 2))
            start, skip = k * self.stride, self.context - self.stride if k else 0
            ids = self.read(text, start, min(start + self.context + 1, self.length)).astype(np.int64)
            x[row, :len(ids) - 1] = ids[:-1]
            stop = min(len(ids) - 1, self.limit - text * (self.length - 1) - start)
            y[row, skip:stop] = ids[skip + 1:stop + 1]
        return x, y


def strided(data, stride, limit):
    """A Strided over the first `limit` validation targets (0: all). In shards each row is a separate text."""
    from corpora.shards import ShardData  # most evaluations do not need it
    if isinstance(data, ShardData):
        rows = ShardData(data.path, data.row, data.n_vocab)  # a window is a whole row

        def read_row(row, start, stop):
            return rows.gather('val', np.array([row]))[0][0, start:stop]
        return Strided(read_row, rows.n_val_windows, data.row, data.block_size, stride, limit)

    def read(_, start, stop):
        ids = data.read('val', start, stop)
        if ids.max() >= data.n_vocab:  # the file may have changed since it was verified
            raise UserError(f'{data.path}: id {ids.max()} in the val split is outside the vocabulary of {data.n_vocab}')
        return ids
    return Strided(read, 1, data.starts['val'][-1] + len(data.shards['val'][-1]), data.block_size, stride, limit)


def validation(config, data, usual):
    """(object with val_batch, windows) for the requested validation. usual: the run's eval_tokens.

    UserError if the split has fewer tokens than requested."""
    asked, there = max(0, config.eval_tokens), data.n_val_windows * data.block_size
    if config.stride:
        loader = strided(data, config.stride, asked)
        windows, there = loader.windows(), loader.targets
    else:
        loader, windows = data, data.val_windows(usual if config.eval_tokens < 0 else asked)
    if asked > there:
        raise UserError(f'--eval_tokens={asked}: the val split of {data.path} has only {there} tokens to predict in '
                        f'windows of {data.block_size}: use a smaller number, or 0 for all')
    return loader, windows


def read_test(data):
    """(text, {words, lines}) of the test split that prepare.py stores. UserError if it is missing or damaged."""
    from corpora.corpus import count_words  # here because its imports are slow
    if 'test' not in data.meta:
        raise UserError(f'{data.path}: no test split here; prepare.py stores one only for wikitext2 and wikitext103')
    try:
        file, digest = data.path / data.meta['test']['name'], data.meta['test']['sha256']
    except (KeyError, TypeError) as error:
        raise UserError(f"{data.path / 'meta.json'}: broken test split ({error!r}): {data.again}")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}: {data.again}')
    if sha256(content).hexdigest() != digest or not content.strip():
        raise UserError(f'{file}: damaged: its sha256 differs from meta.json: {data.again}')
    text = content.decode()
    return text, count_words(text)


def as_stream(encoding, text):
    """(n,) ids: an end-of-text token, as before every document in training, then all of `text` as one stream."""
    ids = encode(encoding, text)
    return np.concatenate([np.array([encoding.eot_token], ids.dtype), ids])


def evaluate_test(model, encoding, text, counts, context, stride, batch_size, device, dtype):
    """
    -> {word_perplexity, words, lines, test_loss (nats a token), test_bits_per_byte, test_stride}.

    The text is one stream without end-of-text tokens between articles, as in Megatron-LM and in Hugging Face's guide to
    perplexity. Only the text is measured, and each token counts once. Word-level perplexity is
    exp(nats / (words + lines)), because word-level models predict an <eos> for every line. Unlike token-level
    perplexity, it compares models with different tokenizers.
    """
    ids = as_stream(encoding, text)
    strided = Strided(lambda _, start, stop: ids[start:stop], 1, len(ids), context, stride)
    result = validate(model, strided, None, strided.windows(), batch_size, device, dtype)
    nats = result['loss'] * result['tokens']
    return {'word_perplexity': math.exp(min(nats / (counts['words'] + counts['lines']), 700)), **counts,
            'test_loss': result['loss'], 'test_bits_per_byte': nats / math.log(2) / len(text.encode()),
            'test_stride': stride}


# ----------------------------------------------------------------------------------------------------------------------

def of_the_run(state, path):
    """(eval_tokens, tokens per micro-step and process) of the run's own validation. UserError for a broken config."""
    try:
        eval_tokens, size, batch, T, world = (typed(value, int) for value in (
            *(state['config'].get(key, 0) for key in ('eval_tokens', 'batch_size', 'batch_tokens', 'block_size')),
            state.get('processes', 1)))
        return max(0, eval_tokens), T * max(1, min(size, batch // T // world))  # as in settings.micro_batches
    except (ValueError, OverflowError, ZeroDivisionError):
        raise UserError(f'{path}: its config has values of the wrong type')


def own_loss(path, step):
    """The validation loss that a run recorded at a step, or None. path: a run, or one of its checkpoints or exports."""
    folder = Path(path) if Path(path).is_dir() else Path(path).absolute().parent
    if not (folder / 'metrics.jsonl').exists():
        folder = folder.parent  # the checkpoints of a run are in a folder of their own
    losses = [line.get('loss') for line in read_lines(folder / 'metrics.jsonl')
              if line.get('kind') == 'eval' and line.get('step') == step]
    return losses[-1] if losses else None


def open_rows(options, state, verify):
    """
    The loader of the rows of ids that options.dataset names, a directory or shards:DIR. Splits them as train.py does.

    If the run was trained on these rows, it is the run's own split. Rows without a tokenizer.json are taken as ids of
    the run's tokenizer.
    """
    from corpora.opening import open_dataset  # here because its imports are slow
    rows = Path(options.dataset.removeprefix('shards:')).expanduser()
    trained_on = str(state['config'].get('dataset', ''))
    trained_rows = Path(trained_on.removeprefix('shards:')).expanduser()
    own = state['data'].get('path', '')
    same = trained_on.startswith('shards:') and rows.absolute() == trained_rows.absolute()
    if same and Path(own, 'meta.json').is_file():
        return open_data(own, options.block_size, options.vocab_size, verify)
    options.dataset = f'shards:{rows}'
    if state['tokenizer']:  # the model's vocabulary may be padded beyond it
        options.vocab_size = load_tokenizer(state['tokenizer']).n_vocab
    data = open_dataset(options, verify=verify)
    if not data.tokenizer and state['tokenizer']:
        print(f"{rows}: no tokenizer.json beside these rows: read as ids of the run's tokenizer", flush=True)
        data.tokenizer = state['tokenizer']
    return data


def open_validation(config, model, state):
    """The requested data. UserError if its tokenizer is not the run's, or if it doesn't fit the options."""
    path = config.data or state['data'].get('path', '')
    if not path:
        raise UserError(f'{config.run}: this checkpoint does not name its data: --data=DIR')
    options = SimpleNamespace(dataset=path, tokenizer='none', block_size=config.context or model.config.block_size,
                              vocab_size=model.config.vocab_size)
    verify = 'always' if config.verify else 'once'
    try:
        if path.startswith('shards:') or holds_rows(path):
            data = open_rows(options, state, verify)
        else:
            data = open_data(path, options.block_size, options.vocab_size, verify)
    except UserError as error:
        raise UserError(*(problem.replace('--block_size', '--context') for problem in error.args))
    if not equivalent(data.tokenizer, state['tokenizer']):
        raise UserError(f'{path}: this data has another tokenizer than {config.run} was trained with: prepare the data '
                        f'with --tokenizer={Path(state["data"].get("path", ""), "tokenizer.json")}')
    if config.stride > data.block_size:
        raise UserError(f'--stride={config.stride} is more than the context of {data.block_size}: '
                        'tokens would be skipped')
    if (config.test or config.hellaswag) and not data.tokenizer:
        raise UserError(f'{path}: no tokenizer.json beside these shards, but --test and --hellaswag need one')
    return data


def main(argv):
    argv = ['--hellaswag=download' if word == '--hellaswag' else word for word in argv]
    runs = [word for word in argv if not word.startswith('-')]
    for word in runs:
        if word.endswith('.py'):
            raise UserError(f'{word} is a config file, but evaluate.py takes a run: python evaluate.py runs/x')
    if len(runs) < 2:
        result, _ = evaluate(load(argv, EvaluateConfig, positional=('run',), usage=__doc__))
        return print(json.dumps(plain(result)))
    if missing := [word for word in runs if not Path(word).exists()]:
        raise UserError(*(f'{word}: no such run or checkpoint' for word in missing))
    options = [word for word in argv if word.startswith('-')]
    configs = [load([*options, word], EvaluateConfig, positional=('run',), usage=__doc__) for word in runs]
    found = [evaluate(config, compare=True) for config in configs]
    results, details = [result for result, _ in found], [detail for _, detail in found]
    print('\n' + comparison.text(results, details))
    comparison.write_page(configs[0].page, results, details)
    print(f'wrote {configs[0].page}')
    print(json.dumps(plain({'runs': results, 'page': configs[0].page})))


def evaluate(config, compare=False):
    """
    Everything that `config` asks for -> (result for JSON, comparison.Detail). Prints progress.

    compare: also measure what only a comparison shows. Otherwise the Detail is None.
    """
    device, dtype, reason = hardware.resolve(config.device, config.dtype)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    source = choose_checkpoint(config.run, config.checkpoint)
    model, state = load_model(source, device, config.context)
    data = open_validation(config, model, state)
    T, (usual, micro) = data.block_size, of_the_run(state, config.run)
    loader, windows = validation(config, data, usual)
    encoding = load_tokenizer(data.tokenizer) if data.tokenizer else None
    test, items = read_test(data) if config.test else None, []
    if config.hellaswag:
        file = hellaswag.find(config.hellaswag)
        items = hellaswag.read_items(file, config.items)
        endings = hellaswag.encode_items(encoding, items, T, file)
    batch_size = config.batch_size or max(1, micro // T)
    print(f'{source}, step {state["step"]:,}, on {data.path}, on {reason}', flush=True)

    lengths = token_bytes(encoding) if encoding else None
    start = time.perf_counter()
    try:
        result = validate(model, loader, lengths, windows, batch_size, device, dtype)
        seconds = time.perf_counter() - start
        stride = f', stride {config.stride}' if config.stride else ''
        print(f'loss {result["loss"]:.4f} on {result["tokens"]:,} tokens, context {T}{stride}, {seconds:.1f} s',
              flush=True)
        own_windows = config.context in (0, state['config']['block_size']) and config.eval_tokens in (-1, usual)
        if own_windows and not config.stride:
            print_own_loss(source, state['step'], result['loss'])
        result |= {key: getattr(config, key) for key in ('context', 'stride') if getattr(config, key)}
        if config.by_position or compare:
            result['by_position'] = comparison.loss_by_position(model, data, device, dtype)
            if not compare:
                print(comparison.position_lines(result['by_position']), flush=True)
        if test:
            result |= evaluate_test(model, encoding, *test, T, config.stride or (T + 1) // 2, batch_size, device, dtype)
            print(f'test split: {result["words"]:,} words and {result["lines"]:,} lines: word-level perplexity '
                  f'{result["word_perplexity"]:.2f}', flush=True)
        if items:
            result |= hellaswag.accuracy(items, hellaswag.log_likelihoods(model, endings, batch_size, device, dtype))
            deviation = math.sqrt(result['acc_norm'] * (1 - result['acc_norm']) / len(items))
            print(f'HellaSwag, {len(items):,} items: acc {result["acc"]:.4f}, acc_norm {result["acc_norm"]:.4f} '
                  f'(chance 0.25; standard error {deviation:.4f})')
        detail = None
        if compare:
            speed = result['tokens'] / seconds
            detail = comparison.measure(model, encoding, state, speed, config.sample_tokens, device, dtype)
    except Exception as error:
        if not hardware.is_out_of_memory(error):
            raise
        raise UserError(f'out of memory on {device}: use a smaller --batch_size than {batch_size}, '
                        f'or a smaller --context than {T}')
    return {'run': config.run, 'step': state['step'], **result}, detail


def print_own_loss(source, step, loss):
    """Say whether the run itself recorded the same validation loss at this step."""
    own = own_loss(source, step)
    answer = 'yes' if own == loss else 'the run recorded none' if own is None else (
        f'no, the run recorded {own} (other data, hardware, precision, packing or batch size)')
    print(f"same as the run's own loss at step {step:,}: {answer}", flush=True)


if __name__ == '__main__':
    run(main)
