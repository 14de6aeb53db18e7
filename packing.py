"""Rows of whole documents for training, in place of windows that cut them (--packing=best_fit).

    data = PackedRows(TokenData('data/pylib', block_size=256, vocab_size=8192))   # the same interface, other rows
    print(data.summary())                                                         # how full the rows are, what is cut

"Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv:2404.10830): documents are put into rows by best-fit
decreasing, so that only those longer than a row are cut.
"""
from bisect import bisect_left, insort

import numpy as np

from configurator import UserError
from data import TokenData
from tokenizer import load_tokenizer

SCANNED = 2**24  # tokens that are searched for the ends of documents at a time


def eot_id_of(data):
    """The id that ends a document in the data, None if nothing says which."""
    if data.meta.get('eot_id') is not None:
        return data.meta['eot_id']
    return load_tokenizer(data.tokenizer).eot_token if data.tokenizer else None


def document_ends(data, eot):
    """(documents,) int64: the position after the end of each training document, in order; the last one may lack its end-of-text token."""
    found = []
    for start in range(0, data.train_tokens, SCANNED):
        ids = data.read('train', start, min(start + SCANNED, data.train_tokens))
        found.append(np.flatnonzero(ids == eot) + start + 1)
    ends = np.concatenate(found)
    return ends if len(ends) and ends[-1] == data.train_tokens else np.append(ends, data.train_tokens)


def best_fit(lengths, capacity):
    """
    lengths (n,) int64, each 1 to capacity -> (row of each (n,) int64, number of rows), by best-fit decreasing: the longest first, each
    into the fullest row that still has room, or a new one. Equal lengths are placed together, so that it takes a few steps for
    each length, not one for each document.
    """
    order = np.argsort(-lengths, kind='stable')
    row_of, n_rows = np.empty(len(lengths), np.int64), 0
    rooms, rows = [], {}  # the room that is left, ascending, and the rows that have it
    begin = 0
    while begin < len(order):
        length = lengths[order[begin]]
        end = begin + int(np.searchsorted(-lengths[order[begin:]], -length, 'right'))
        while begin < end:
            at = bisect_left(rooms, length)
            if at == len(rooms):  # new rows, as many as these documents fill
                count = -(-(end - begin) // (capacity // length))
                room, free, n_rows = capacity, np.arange(n_rows, n_rows + count), n_rows + count
            else:
                room = rooms.pop(at)
                free = rows.pop(room)
            each = room // length  # documents that a row takes; all but the last row that is used take so many
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
    Training rows of whole documents; validation is that of the TokenData that it is made of.

    A row is block_size + 1 = T + 1 tokens: T inputs, and targets one further. A document, its end-of-text token included, stands whole
    in one row if it has at most T + 1 tokens. A longer one is cut into pieces of T + 1 tokens that overlap by one, so that every
    token but its first is a target once, and what is left is packed like a document. Documents of a row keep their order. What no
    document fills has the end-of-text token as input and -1 as target, which the loss ignores. Rows are permuted by epoch as windows are.

    The loss of a micro-batch is the mean over its own targets, and micro-batches and processes have equal weights, as with windows:
    a target in a micro-batch with more padding weighs a little more.
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

        pieces = np.maximum(1, -(-(lengths - 1) // T))  # of each document
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = np.repeat(starts, pieces) + (np.arange(pieces.sum()) - first) * T
        size = np.minimum(np.repeat(ends, pieces) - begin, T + 1)
        occupied = size.copy()
        if self.read('train', self.train_tokens - 1, self.train_tokens)[0] != self.eot:
            occupied[-1] = T + 1  # without an end it would run into the next one: a row of its own
        row, n_rows = best_fit(occupied, T + 1)
        order = np.argsort(row, kind='stable')  # documents of a row in the order of the corpus
        self.begin, self.size = begin[order], size[order]
        self.first = np.searchsorted(row[order], np.arange(n_rows + 1))  # of each row, among them; and the end
        text = np.add.reduceat(self.size, self.first[:-1])
        self.used_rows = np.flatnonzero(text > 1)  # one token alone has no target
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

    def summary(self):
        """How full the rows are, and what is cut, in a line."""
        return (f'packing: {self.n_windows:,} rows; {100 * self.text_share:.1f} % of them is text, the rest padding; '
                f'{100 * self.cut / self.documents:.1f} % of {self.documents:,} documents are cut '
                f'(stream: {100 * self.cut_by_stream / self.documents:.1f} %)')
