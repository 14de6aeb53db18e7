"""Training rows other than the plain windows of a token stream. Same interface as TokenData.

    data = TokenData('data/pylib', block_size=256, vocab_size=8192)
    data = DocumentStarts(data, share=0.05)   # --document_starts: more windows that begin with a document
    data = PackedRows(data)                   # --packing=best_fit: rows of whole documents; windows would cut them
    print(data.summary())                     # PackedRows: share of text and of cut documents

PackedRows implements "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv:2404.10830).
Best-fit-decreasing bin packing assigns documents to rows. Only documents longer than a row are cut.
"""
from bisect import bisect_left, insort

import numpy as np

from configurator import UserError
from data import TokenData
from tokenizer import load_tokenizer

SCANNED = 2**24  # tokens per read in the search for document ends
SEARCHED = 2**14  # tokens per read in the search for the next document
SEARCHES = 64  # reads of a search: it happens while the run trains, and a corpus may be one long document


def eot_id_of(data):
    """The id of the end-of-text token in the data, None if unknown."""
    if data.meta.get('eot_id') is not None:
        return data.meta['eot_id']
    return load_tokenizer(data.tokenizer).eot_token if data.tokenizer else None


class DocumentStarts(TokenData):
    """
    The windows of a TokenData, and more windows that begin with an end-of-text token and the document after it.

    Samples begin with an end-of-text token. Plain windows begin anywhere, so without these windows a model hardly ever
    sees an end-of-text token at its first position, and answers it with a second one.

    share: the share of the windows in an epoch that begin with a document. Every window comes once in an epoch. If the
    split has N tokens and there are S such windows, window j begins at the first document after token j N / S.
    """

    def __init__(self, data, share):
        vars(self).update(vars(data))
        if data.meta.get('kind') == 'shards':
            raise UserError(f'--document_starts: {data.path} holds shards, whose rows are fixed: '
                            'use prepared token bins, or --document_starts=0')
        self.eot = eot_id_of(data)
        self.plain_windows = data.n_windows
        self.extra_windows = round(data.n_windows * share / (1 - share))
        self.n_windows += self.extra_windows
        self.last = self.train_tokens - self.block_size - 1  # the last position where a window can begin

    def limit(self, windows):
        """Train on only the first windows of the data from now on. The share that begins with a document stays."""
        windows = min(windows, self.n_windows)
        self.extra_windows = round(windows * self.extra_windows / self.n_windows)
        self.n_windows, self.plain_windows = windows, windows - self.extra_windows
        self.last = min(self.last, self.plain_windows * self.block_size)

    def position(self, split, window):
        """The position of a window's first token in its split."""
        if split != 'train' or window < self.plain_windows:
            return super().position(split, window)
        target = (window - self.plain_windows) * self.last // self.extra_windows
        for start in range(target, self.last + 1, SEARCHED)[:SEARCHES]:
            found = np.flatnonzero(self.read('train', start, min(start + SEARCHED, self.last + 1)) == self.eot)
            if len(found):
                return start + int(found[0])
        return target  # no document begins soon after it: a window like any other


def document_ends(data, eot):
    """
    (documents,) int64: the position after the end of each training document, in order. The last document may lack its
    end-of-text token.
    """
    found = []
    for start in range(0, data.train_tokens, SCANNED):
        ids = data.read('train', start, min(start + SCANNED, data.train_tokens))
        found.append(np.flatnonzero(ids == eot) + start + 1)
    ends = np.concatenate(found)
    return ends if len(ends) and ends[-1] == data.train_tokens else np.append(ends, data.train_tokens)


def best_fit(lengths, capacity):
    """
    Best-fit-decreasing bin packing: lengths (n,) int64, each 1 to capacity -> (row indices (n,) int64, number of rows).

    The longest documents are placed first. Each goes into the fullest row that still has room, or into a new row. Equal
    lengths are placed together, which takes a few steps per length instead of one step per document.
    """
    order = np.argsort(-lengths, kind='stable')
    row_of, n_rows = np.empty(len(lengths), np.int64), 0
    rooms, rows = [], {}  # sorted values of free space; {free space: rows with it}
    begin = 0
    while begin < len(order):
        length = lengths[order[begin]]
        end = begin + int(np.searchsorted(-lengths[order[begin:]], -length, 'right'))
        while begin < end:
            at = bisect_left(rooms, length)
            if at == len(rooms):  # open as many new rows as needed
                count = -(-(end - begin) // (capacity // length))
                room, free, n_rows = capacity, np.arange(n_rows, n_rows + count), n_rows + count
            else:
                room = rooms.pop(at)
                free = rows.pop(room)
            each = room // length  # documents per row; the last used row may get fewer
            used = min(len(free), -(-(end - begin) // each))
            count = min(end - begin, used * each)
            row_of[order[begin:begin + count]] = np.repeat(free[:used], each)[:count]
            last = count - (used - 1) * each
            full, partial, untouched = np.split(free, [used - 1, used])
            for left, own in ((room - each * length, full), (room - last * length, partial), (room, untouched)):
                if left and len(own):
                    if left not in rows:
                        insort(rooms, left)
                    rows[left] = np.concatenate((rows.get(left, own[:0]), own))
            begin += count
    return row_of, n_rows


class PackedRows(TokenData):
    """
    Training rows of whole documents. Validation uses the windows of the given TokenData unchanged.

    A row has T + 1 = block_size + 1 tokens: T inputs, and targets shifted by one. A document of at most T + 1 tokens,
    including its end-of-text token, stays whole in one row. A longer document is cut into pieces of T + 1 tokens. The
    pieces overlap by one token, so that every token except the first is a target once. The remainder is packed like a
    document. Documents in a row keep their order. Padding has the end-of-text token as input and -1 as target, which
    the loss ignores. Rows are permuted in each epoch, as windows are.

    The loss of a micro-batch is the mean over its own targets. Micro-batches and processes have equal weights, as with
    windows. So a target in a micro-batch with more padding has a slightly larger weight.
    """

    def __init__(self, data):
        if data.meta.get('kind') == 'shards':
            raise UserError(f'--packing=best_fit: {data.path} holds shards, whose rows are fixed: '
                            'use prepared token bins, or --packing=stream')
        vars(self).update(vars(data))
        self.eot = eot_id_of(data)
        T, ends = self.block_size, document_ends(data, self.eot)
        starts = np.concatenate(([0], ends[:-1]))
        lengths = ends - starts
        self.documents = len(lengths)
        self.cut = int((lengths > T + 1).sum())
        self.cut_by_stream = int((ends > starts // T * T + T + 1).sum())

        pieces = np.maximum(1, -(-(lengths - 1) // T))  # number of pieces of each document
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = np.repeat(starts, pieces) + (np.arange(pieces.sum()) - first) * T
        size = np.minimum(np.repeat(ends, pieces) - begin, T + 1)
        occupied = size.copy()
        if self.read('train', self.train_tokens - 1, self.train_tokens)[0] != self.eot:
            occupied[-1] = T + 1  # it has no end token to separate it from others, so it gets its own row
        row, n_rows = best_fit(occupied, T + 1)
        order = np.argsort(row, kind='stable')  # keeps corpus order within a row
        self.begin, self.size = begin[order], size[order]
        self.first = np.searchsorted(row[order], np.arange(n_rows + 1))  # row r: pieces first[r] to first[r + 1] - 1
        text = np.add.reduceat(self.size, self.first[:-1])
        self.used_rows = np.flatnonzero(text > 1)  # a row with one token has no target
        self.n_windows = len(self.used_rows)
        self.text_share = text[self.used_rows].sum() / (self.n_windows * (T + 1))

    def gather(self, split, windows):
        """(n,) rows -> x, y: (n, T) int64"""
        if split != 'train':
            return super().gather(split, windows)
        T = self.block_size
        x, y = np.full((len(windows), T), self.eot, np.int64), np.full((len(windows), T), -1, np.int64)
        for i, row in enumerate(self.used_rows[windows].tolist()):
            part = slice(self.first[row], self.first[row + 1])
            ids = np.concatenate([self.read('train', begin, begin + size)
                                  for begin, size in zip(self.begin[part].tolist(), self.size[part].tolist())])
            x[i, :len(ids)], y[i, :len(ids) - 1] = ids[:T], ids[1:]
        return x, y

    def limit(self, windows):
        """Train on only the first rows of the data from now on, in the order of their first documents."""
        order = np.argsort(self.begin[self.first[self.used_rows]], kind='stable')
        self.used_rows = self.used_rows[order[:windows]]
        self.n_windows = len(self.used_rows)

    def summary(self):
        """One line: the share of text in the rows and the share of cut documents."""
        return (f'packing: {self.n_windows:,} rows; {100 * self.text_share:.1f} % of them is text, the rest padding; '
                f'{100 * self.cut / self.documents:.1f} % of {self.documents:,} documents are cut '
                f'(stream: {100 * self.cut_by_stream / self.documents:.1f} %)')
