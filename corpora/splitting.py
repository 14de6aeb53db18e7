"""
Splits a small corpus by position: the last part is val. Used by prepare.py:

    if is_lopsided(sizes, val_ratio):               # sizes of the splits by the hash of each document's text
        cut = find_cut(corpus, config, limit)       # None: the corpus is not small
        cut.split(number, text)                     # {'train': text, 'val': text}, the parts of a document

The default split by hash needs many documents to come near val_ratio. A text file of 95 kB has only five.
"""
import re
from itertools import accumulate, islice
from typing import NamedTuple

from configurator import UserError

LINE_END = re.compile('\r\n|[\n\r\u2028]')


def is_lopsided(sizes, val_ratio):
    """Whether a split is empty, or val has less than 0.5 or more than 1.5 times val_ratio. sizes: {split: bytes}"""
    share = sizes['val'] / (sizes['train'] + sizes['val'])
    return share in (0, 1) or not 0.5 * val_ratio <= share <= 1.5 * val_ratio


class Cut(NamedTuple):
    """Where train ends and val begins."""
    document: int  # number of the document with the cut, from 1; dropped documents count
    offset: int  # number of characters of this document that are train

    def split(self, number, text):
        """{split: part of the text} of the document with this number."""
        end = len(text) if number < self.document else self.offset if number == self.document else 0
        return {split: part for split, part in (('train', text[:end]), ('val', text[end:])) if part}


def find_cut(corpus, config, limit):
    """
    The Cut that gives val about val_ratio of the text. It lies between documents if that comes near val_ratio,
    otherwise at a line end, otherwise at any character. None if the corpus has `limit` bytes of text or more. Raises
    UserError if the corpus is a single character.
    """
    numbers, total = {}, 0  # {text: number of the first document with this text}
    for number, document in enumerate(islice(corpus.documents(), config.max_documents or None), 1):
        text = document.text
        if text and not text.isspace() and text not in numbers:
            numbers[text] = number
            total += len(text.encode())
            if total >= limit:
                return None
    texts = list(numbers)
    starts = list(accumulate((len(text.encode()) for text in texts), initial=0))[:-1]
    target = total * (1 - config.val_ratio)  # bytes that train should have

    def is_near(train_bytes):
        return not is_lopsided({'train': train_bytes, 'val': total - train_bytes}, config.val_ratio)

    boundary = min(range(1, len(texts)), key=lambda k: abs(starts[k] - target), default=0)  # cut before this document
    if boundary and is_near(starts[boundary]):
        return Cut(numbers[texts[boundary]], 0)
    last = max(k for k in range(len(texts)) if starts[k] <= target)
    text, number = texts[last], numbers[texts[last]]
    if len(text) == 1:
        if not boundary:
            raise UserError(f'{config.dataset}: a single character of text is not enough for train and val: '
                        'provide more text')
        return Cut(numbers[texts[boundary]], 0)
    offset = len(text.encode()[:int(target) - starts[last]].decode(errors='ignore'))
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())  # so that neither part is blank
    offset = min(max(offset, begin + 1), max(end, 2) - 1)
    line_ends = [match.end() for match in LINE_END.finditer(text) if begin < match.end() < end]
    nearest = min(line_ends, key=lambda end: abs(end - offset), default=0)
    if nearest and is_near(starts[last] + len(text[:nearest].encode())):
        offset = nearest
    return Cut(number, offset)
