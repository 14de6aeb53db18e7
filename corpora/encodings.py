"""
The encodings of text files: conversion to UTF-8, and advice for text that is not UTF-8. Imported by reading.py:

    file = Utf8(file, path, 'cp1252', bad_text='refuse')      # a binary file whose bytes are UTF-8
    likely_encoding('naïve'.encode('cp1252'))                 # 'cp1252'
"""
import codecs
import io
import re

from configurator import UserError

HEAD = 64 * 1024  # bytes read to detect the content of a file
GO_ON = '; --bad_text=skip or replace continues'
MARKS = {codecs.BOM_UTF8: 'utf-8',
         # UTF-32 comes before UTF-16, because its marks start with the UTF-16 marks.
         codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}


def encoding_name(name):
    """The canonical name of a text encoding: UTF8 -> utf-8. '' if the name is not a text encoding."""
    try:
        'a'.encode(name)  # LookupError for codecs that are not text encodings, such as base64
        name = codecs.lookup(name).name.removesuffix('-sig')
    except (LookupError, ValueError):
        return ''
    not_of_files = ('idna', 'punycode', 'unicode-escape', 'raw-unicode-escape')
    return '' if name in not_of_files else name


def encoding_of(path, data, encoding):
    """The encoding given by the byte order mark at the start of a file, or `encoding` if there is no mark."""
    for mark, marked in MARKS.items():
        if data.startswith(mark):
            return marked
    if encoding in ('utf-16', 'utf-32') and data:
        raise UserError(f'{path}: no byte order mark, so the byte order is unknown: use --encoding={encoding}-le '
                        f'(on most machines) or --encoding={encoding}-be')
    return encoding


class Utf8(io.RawIOBase):
    """
    Converts a binary file from another encoding to UTF-8.

    Undecodable input raises a UserError with bad_text='refuse'. Otherwise it becomes a byte that is not valid UTF-8,
    and the readers handle that byte like any other bad byte.
    """
    def __init__(self, file, path, encoding, bad_text):
        self.file, self.path, self.encoding, self.bad_text = file, path, encoding, bad_text
        self.decoder = codecs.getincrementaldecoder(encoding)('strict' if bad_text == 'refuse' else 'bad_byte')
        self.read_bytes, self.ready, self.ended = 0, b'', False

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready and not self.ended:
            pending = len(self.decoder.getstate()[0])
            data = self.file.read(2**16)
            self.ended = not data
            try:
                text = self.decoder.decode(data, self.ended)
            except UnicodeDecodeError as error:
                position = self.read_bytes - pending + error.start
                raise UserError(f'{self.path}: not {self.encoding} at byte {position}{GO_ON}')
            self.read_bytes += len(data)
            self.ready = text.encode('utf-8', 'bad_byte')
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def bad_byte(error):
    """
    Codec error handler. Decoding turns bad input into a surrogate. UTF-8 cannot encode a surrogate, so encoding turns
    it into the byte 0xff, which is not valid UTF-8.
    """
    return b'\xff' if isinstance(error, UnicodeEncodeError) else '\udcff', error.end


codecs.register_error('bad_byte', bad_byte)


def not_utf8_at(data, final=False):
    """Index of the first byte that is not UTF-8, or None. final=False: data may end inside a character."""
    try:
        codecs.utf_8_decode(data, 'strict', final)
    except UnicodeDecodeError as error:
        return error.start


def wide_encoding(data):
    """
    Detects UTF-16 or UTF-32 without a byte order mark, returns its name or ''. It uses the fact that Latin letters have
    one NUL byte in UTF-16 and three in UTF-32.
    """
    for encoding, width in (('utf-32-le', 4), ('utf-32-be', 4), ('utf-16-le', 2), ('utf-16-be', 2)):
        whole = data[:len(data) - len(data) % width]
        nuls = [whole[k::width].count(0) for k in range(width)]
        low, high = (nuls[0], nuls[-1]) if encoding.endswith('le') else (nuls[-1], nuls[0])
        if width == 4 and nuls[1 if encoding.endswith('be') else 2] != high:
            continue
        if high > max(1, len(whole) / width / 20) and not low:
            try:
                codecs.getincrementaldecoder(encoding)().decode(whole)
                return encoding
            except UnicodeDecodeError:
                pass
    return ''


def encoding_hint(data):
    """Advice for an error message: which --encoding may read this text, which is not UTF-8."""
    guess = likely_encoding(data[:HEAD])
    return f', perhaps {guess} (--encoding={guess})' if guess else ' (--encoding=NAME reads other encodings)'


def likely_encoding(data):
    """Guesses the encoding of text that is not UTF-8. '' if there is no good guess or damaged UTF-8 is more likely."""
    def share(encoding, expected):
        """Share (0 to 1) of the characters beyond ASCII that match `expected`. 0 if the data can't be decoded."""
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(data)
        except UnicodeDecodeError:
            return 0
        others = re.sub('[\0-\x7f]+', '', text)
        return len(re.findall(expected, others)) / max(1, len(others))

    high, letters = len(re.findall(rb'[\x80-\xff]', data)), len(re.findall(rb'[A-Za-z]', data))
    if len(re.sub('[\0-\x7f]+', '', data.decode(errors='ignore')).encode()) > 0.8 * high:
        return ''
    kana, hangul, hanzi = '[\u3040-\u30ff]', '[\uac00-\ud7a3]', '[\u4e00-\u9fff\u3000-\u301f\uff00-\uff1f]'
    for encoding in ('shift_jis', 'cp932', 'euc_jp'):
        if share(encoding, kana) > 0.3:
            return encoding
    if high > letters:
        candidates = [('euc_kr', hangul, 0.9), ('gb2312', hanzi, 0.9), ('big5', hanzi, 0.9), ('gb18030', hanzi, 0.9),
                      ('cp1251', '[а-яё]', 0.6), ('koi8_r', '[а-яё]', 0.6)]
        for encoding, expected, least in candidates:
            if share(encoding, expected) > least:
                return 'gb18030' if encoding == 'gb2312' else encoding  # gb18030 contains gb2312
    elif share('cp1252', '[À-ÖØ-öø-ÿŒœŠšŽž€‘’“”–—…«»¡¿£§©°·]') > 0.9:
        return 'cp1252'
    return ''
