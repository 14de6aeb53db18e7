"""
Shows what a prepared dataset contains: metadata, sample windows, statistics of tokens and documents, and a plot.

    python prepare.py show data/pylib --n=3     # three windows; writes the plot to runs/data_pylib.png

It reads bins and shards. If the tokenizer is unknown, the windows are shown as ids. For a large split, the statistics
come from an evenly spread sample.
"""
from collections import Counter
from pathlib import Path

import numpy as np

from configurator import UserError, columns, read_json
from files import replacing
from corpora.prepared import open_data
from tokenizer import load_tokenizer, token_bytes

WINDOW = 80  # tokens of a sample window
CHUNK, LIMIT = 2**20, 200_000_000  # tokens per read, and in total; a larger split is sampled in evenly spread chunks
LONGER = (256, 1024, 4096, 32_768)  # document lengths in tokens; they span the block sizes of the presets


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def open_whole(path):
    """The loader of a prepared directory. For shards, each window is one row. Raises UserError for any problem."""
    file = Path(path) / 'meta.json'
    row = read_json(file).get('row') if file.is_file() else None
    return open_data(path, row - 1 if isinstance(row, int) and row > 1 else 1, 2**62)


def row_of(data):
    """Tokens per row, None for bins."""
    return data.meta['row'] if data.meta.get('kind') == 'shards' else None


def read(data, start, stop):
    """
    Tokens [start, stop) of the train split. Rows of shards are concatenated. Raises UserError for an id outside the
    vocabulary.
    """
    if not (row := row_of(data)):
        ids = data.read('train', start, stop)
        if ids.max() >= data.n_vocab:
            at = int(np.argmax(ids >= data.n_vocab))
            raise UserError(f'{data.path}: id {ids[at]} at position {start + at} of the train split is outside the '
                            f'vocabulary of {data.n_vocab}: {data.again}')
        return ids
    first = start // row
    x, y = data.gather('train', np.arange(first, -(-stop // row)))
    return np.concatenate([x, y[:, -1:]], 1).ravel()[start - first * row:stop - first * row]


def survey(data):
    """
    Statistics of the train split: (counts, lengths, tail).

    counts: (n_vocab,) how often each id occurs.
    lengths: {document length in tokens, without the end-of-text token: number of documents}.
    tail: number of tokens after the last end-of-text token.

    In a sample, only documents that lie within consecutive chunks are counted, and tail is None. Memory holds one chunk
    and the distinct lengths, of which there are fewer than sqrt(2 LIMIT).
    """
    n, eot = -(-data.train_tokens // CHUNK), data.meta.get('eot_id')
    some = min(n, max(1, LIMIT // CHUNK)) if data.train_tokens > LIMIT else n
    # since: tokens after the last end-of-text token, None after a gap between chunks.
    counts, lengths, since, previous = np.zeros(data.n_vocab, np.int64), Counter(), 0, -1
    for k in (np.arange(some) * n // some).tolist():
        ids = read(data, k * CHUNK, min((k + 1) * CHUNK, data.train_tokens))
        counts += np.bincount(ids, minlength=data.n_vocab)
        since, previous = since if k == previous + 1 else None, k
        ends = np.flatnonzero(ids == eot)  # empty if eot is None
        if len(ends):
            gaps = np.diff(ends) - 1
            gaps = gaps if since is None else np.append(gaps, ends[0] + since)
            lengths.update(dict(zip(*map(np.ndarray.tolist, np.unique(gaps, return_counts=True)))))
            since = len(ids) - 1 - int(ends[-1])
        elif since is not None:
            since += len(ids)
    return counts, lengths, since if some == n else None


# ----------------------------------------------------------------------------------------------------------------------
# Show

def show(path, n=3, seed=1337, say=print, out=''):
    """
    Print the contents of a prepared directory: metadata, `n` decoded windows, and statistics of tokens and documents of
    the train split. Plot the statistics to `out` (by default runs/data_<name>.png) and return its
    path. Raises UserError.
    """
    if n < 0:
        raise UserError(f'--n={n}: the number of windows must not be negative')
    data = open_whole(path)
    encoding = load_tokenizer(data.tokenizer) if data.tokenizer else None
    try:
        say(columns(meta_rows(data.meta)) + '\n\n' + columns(split_rows(data.meta)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{data.path / 'meta.json'}: broken ({error!r}): {data.again}")
    for where, ids in windows(data, n, seed):
        say(f'\n--- {where}\n{readable_text(ids, encoding)}')

    counts, lengths, tail = survey(data)
    total = int(counts.sum())
    if total < data.train_tokens:
        say(f'\nthe figures come from a sample: {total:,} of {data.train_tokens:,} train tokens, '
            f'in evenly spread chunks of {CHUNK:,}')
    say('\n' + columns(token_rows(counts, encoding)))
    say('\n' + columns(document_rows(lengths, tail, data.meta.get('eot_id'))))

    name = Path(path).resolve().name
    out = Path(out or f'runs/data_{name}.png')
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw(counts, lengths, f'{name}: {total:,} train tokens', out)
    except OSError as error:
        raise UserError(f'{out}: {error.strerror}: start prepare.py in a directory that can be written')
    say(f'\npicture: {out}')
    return out


def meta_rows(meta):
    """(name, value) for each key of meta.json except 'files', in file order."""
    def text(value):
        if isinstance(value, dict):
            return ', '.join(f'{key} {text(item)}' for key, item in value.items())
        return f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else str(value)
    names = {'vocab_size': 'vocabulary', 'eot_id': 'end of text', 'row': 'tokens per row'}
    return [(names.get(key, key), str(value) if key == 'seed' else text(value))
            for key, value in meta.items() if key != 'files']


def split_rows(meta):
    rows = [('split', 'documents', 'tokens', 'bytes', 'bytes/token', 'files', 'sha256')]
    documents = meta.get('documents', {})
    for split, files in meta['files'].items():
        tokens, size = (sum(file.get(key, 0) for file in files) for key in ('tokens', 'bytes'))
        of_text = size and meta.get('kind') != 'shards'  # for shards, bytes is the file size
        more = f' and {len(files) - 1:,} more' if len(files) > 1 else ''
        rows.append((split, f'{documents[split]:,}' if split in documents else '-', f'{tokens:,}',
                     f'{size:,}' if size else '-', f'{size / tokens:.2f}' if of_text else '-', f'{len(files):,}',
                     files[0]['sha256'][:12] + more))
    return rows


def windows(data, n, seed):
    """
    Yields n times (location, ids). Each window is at a random position in one of n equal parts of the train split. In
    shards, a window stays inside one row.
    """
    row, draw = row_of(data), np.random.default_rng(seed)
    size = min(WINDOW, row or data.train_tokens)
    for k, u in enumerate(draw.random(n)):
        start = int((k + u) * (data.train_tokens - size + 1) / n)
        where = f'token {start:,}'
        if row:
            start = min(start, start // row * row + row - size)
            where = f'row {start // row:,}, token {start % row:,}'
        yield f'{where} of the train split', read(data, start, start + size)


def readable_text(ids, encoding):
    """
    The decoded text. Incomplete characters at the edges and control characters become U+FFFD, because control
    characters could change the terminal. Without an encoding, the ids.
    """
    if not encoding:
        return ' '.join(map(str, ids.tolist()))
    text = encoding.decode_bytes(ids.tolist()).decode('utf-8', 'replace')
    return ''.join(c if c.isprintable() or c in '\n\t' else '\N{REPLACEMENT CHARACTER}' for c in text)


def token_rows(counts, encoding):
    total, order = int(counts.sum()), np.argsort(-counts, kind='stable')
    ranked = counts[order][:np.count_nonzero(counts)]
    p = ranked / total
    entropy = float((p * np.log2(1 / p)).sum())
    rows = [('tokens that occur', f'{len(ranked):,} of {len(counts):,}, {len(counts) - len(ranked):,} never')]
    for k, share in enumerate(p[:10]):
        token = int(order[k])
        shown = repr(encoding.decode_single_token_bytes(token).decode('utf-8', 'replace')) if encoding else ''
        rows.append(('most common' if k == 0 else '', f'{share:7.3%}  {token:>6}  {shown}'.rstrip()))
    rows += [(f'the {top:,} most common', f'{p[:top].sum():.2%} of all tokens') for top in (100, 1000)]
    rows.append(('entropy of a token', f'{entropy:.3f} bits'))
    if encoding and (size := int(counts @ token_bytes(encoding))):
        bits = entropy * total / size
        rows.append(('coded by frequency alone', f'{bits:.3f} bits per byte of text, {bits / 8:.1%} of its size'))
    return rows


def document_rows(lengths, tail, eot):
    if not (n := sum(lengths.values())):
        return [('documents', 'no end-of-text id' if eot is None else f'no end-of-text token (id {eot}) occurs')]
    values = np.array(sorted(lengths))
    up_to = np.cumsum([lengths[value] for value in values.tolist()])  # documents of this length or shorter

    def quantile(q):
        return values[np.searchsorted(up_to, q * n)]
    mean = sum(value * count for value, count in lengths.items()) / n
    figures = {'mean': f'{mean:,.1f}', 'median': f'{quantile(0.5):,}', '10 % have at most': f'{quantile(0.1):,}',
               '90 % have at most': f'{quantile(0.9):,}', 'longest': f'{values[-1]:,}'}
    longer = {edge: sum(lengths[value] for value in lengths if value > edge) / n for edge in LONGER}
    return [('documents', f'{n:,}' + (f', and {tail:,} tokens of an unfinished one' if tail else '')),
            ('tokens, without the end of text', ', '.join(map(' '.join, figures.items()))),
            *((f'longer than {edge:,}', f'{share:.2%}') for edge, share in longer.items())]


def zipf_fit(ranked):
    """
    Fit a line to log frequency over log rank. Every decade of ranks has the same weight. Returns (slope, log frequency
    at rank 1).
    """
    ranks = np.unique(np.geomspace(1, len(ranked), 200).astype(int))
    return np.polyfit(np.log(ranks), np.log(ranked[ranks - 1]), 1).tolist()


def draw(counts, lengths, heading, out):
    """
    Plot token frequency against rank and a histogram of document lengths to a PNG file. Raises OSError if it can't be
    written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('the picture needs matplotlib: pip install matplotlib')
    ranked = np.sort(counts[counts > 0])[::-1]
    figure = Figure(figsize=(11, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    rank = np.arange(1, len(ranked) + 1)
    left.loglog(rank, ranked, label='tokens')
    if len(ranked) > 1:
        slope, first = zipf_fit(ranked)
        left.loglog(rank, np.exp(first + slope * np.log(rank)), '--', label=f'slope {slope:.2f}')
    left.set(title='how often a token occurs', xlabel='rank', ylabel='times')
    left.legend(frameon=False)
    if lengths:
        values = np.maximum(list(lengths), 1)  # the log axis can't show length 0
        right.hist(values, bins=np.geomspace(1, values.max() + 1, 60), weights=list(lengths.values()))
        right.set(xscale='log')
    right.set(title='documents by length' if lengths else 'no end-of-text token, so no documents',
              xlabel='tokens', ylabel='documents')
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(heading.replace('$', r'\$'))
    with replacing(out) as file:
        figure.savefig(file, format='png', dpi=120)

