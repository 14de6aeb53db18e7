"""
Converts text to token ids and back without loss: decoding the ids of a text gives back every byte.
Imported by every script:

    encoding = load_tokenizer('data/pylib')           # a prepared directory, a tokenizer.json, or its content
    ids = encoding.encode_ordinary('Hello world')     # all of it is plain text, even '<|endoftext|>'
    encoding.decode(ids) == 'Hello world'
    lengths = token_bytes(encoding)                   # for bits per byte

The content of a tokenizer is a dict of plain values that suffices to rebuild it.
tokenizer.json and every checkpoint hold this dict. corpora/vocabulary.py makes new ones.
"""
import base64
import json
import os
import re
from pathlib import Path

import numpy as np
import tiktoken

from configurator import UserError, read_json

VERSION = 1  # version of tokenizer.json
MAX_VOCAB = 2**20  # ids are stored in 16 bits if they fit, else in 32
EOT = '<|endoftext|>'
FIXED = ('gpt2', 'byte')  # tokenizers that are equal wherever they are made
# PATTERN is GPT-2's split into words as tiktoken writes it. FASTER splits every text identically and is twice as fast:
# its first group needs no lookahead, so tiktoken's fancy-regex passes that group to the automaton
# of the regex library below it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
FASTER = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"""
# Characters per call to a tokenizer library. Hugging Face's needs about 150 bytes of memory per character. tiktoken's
# stack overflows on a run of a million spaces.
SLICE = 2**19
SPACE = '\u2581'  # SentencePiece writes a space as this character
ASCII = re.compile('[\0-\x7f]')
BYTES = {f'<0x{byte:02X}>': bytes([byte]) for byte in range(256)}  # SentencePiece's byte fallback tokens
PRINTABLE = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
# A byte-level BPE writes a printable byte as its own character. The other bytes become, in order,
# the characters from 256 on.
OTHERS = sorted({*range(256)} - {*PRINTABLE})
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + k): byte for k, byte in enumerate(OTHERS)}
# A tokenizer is accepted only if it reproduces this text byte by byte.
HARD = "\0 I'll  say\t\r\n\n\xa0\x85\u2028 1234 e\u0301\xe9\ufb01\u212b\xc5İß 數据🙂\U000e0001 "
HARD += f'a{SPACE}b{SPACE}{SPACE}{SPACE.join(BYTES)}  '


def load_tokenizer(source):
    """
    The encoding of a tokenizer. source: path of a tokenizer.json, its directory, or its content.

    Returns a tiktoken.Encoding, or a `HuggingFace` or `Characters` object with the same methods.
    Raises UserError if the tokenizer is broken.
    """
    if isinstance(source, dict):
        return checked('the tokenizer', source, build)
    file = json_of(source)
    return checked(file, read_json(file), build)


def equivalent(a, b):
    """
    Whether two contents stand for the same tokenizer. GPT-2's, for example, has two contents: tiktoken's and Hugging
    Face's. a, b: contents, or None for no tokenizer.
    """
    if a == b or a is None or b is None:
        return a == b
    first, second = load_tokenizer(a), load_tokenizer(b)
    if (first.n_vocab, first.eot_token) != (second.n_vocab, second.eot_token):
        return False
    tokens = range(first.n_vocab)
    return (np.array_equal(token_bytes(first), token_bytes(second))
            and all(map(lambda i: first.decode_single_token_bytes(i) == second.decode_single_token_bytes(i), tokens))
            and all(first.encode_ordinary(text) == second.encode_ordinary(text) for text in (HARD, __doc__)))


def json_of(path):
    return Path(path, 'tokenizer.json') if os.path.isdir(path) else Path(path)


def checked(where, content, function):
    """function(content). Its errors become UserErrors that name the file."""
    try:
        return function(content)
    except UserError as error:
        raise UserError(f'{where}: {error}')
    except KeyError as error:
        raise UserError(f'{where}: broken tokenizer: no {error}')
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f'{where}: broken tokenizer: {error}')


def build(content):
    """Content -> encoding. Checks that the encoding reproduces a hard text byte by byte."""
    if (content['format'], content['version']) != ('nanotrix-tokenizer', VERSION):
        raise ValueError(f"format {content['format']!r} version {content['version']!r}, expected version {VERSION}")
    name, special = content['name'], content['special_tokens']
    if 'characters' in content:
        return Characters(name, special, content['characters'])
    encoding = HuggingFace(name, special, content['huggingface']) if 'huggingface' in content else from_ranks(content)
    text = HARD + SPACE.join(special)
    try:
        exact = encoding.decode_bytes(encoding.encode_ordinary(text)) == normalized(encoding, text).encode()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the Rust libraries is no Exception
        raise ValueError(error)
    if not exact:
        raise UserError('encoding and decoding changes a text: choose another tokenizer')
    return encoding


def from_ranks(content):
    """
    The tiktoken.Encoding for content in our own format. ValueError unless the ranks hold every byte, have no
    duplicates, and are followed directly by the special tokens.
    """
    special, ranks = content['special_tokens'], [base64.b64decode(rank, validate=True) for rank in content['ranks']]
    if missing := set(range(256)) - {rank[0] for rank in ranks if len(rank) == 1}:
        raise ValueError(f'no rank for the byte {min(missing)}')
    if len(set(ranks)) < len(ranks) or b'' in ranks:
        raise ValueError('a rank is empty or occurs twice')
    if EOT not in special or sorted(special.values()) != list(range(len(ranks), len(ranks) + len(special))):
        raise ValueError(f'special tokens {special}, expected {EOT} and ids from {len(ranks)} on')
    check_size(len(ranks) + len(special))
    pattern = FASTER if content['pattern'] == PATTERN else content['pattern']
    return tiktoken.Encoding(content['name'], pat_str=pattern, special_tokens=special,
                             mergeable_ranks={token: rank for rank, token in enumerate(ranks)})


def check_size(n_vocab):
    if n_vocab > MAX_VOCAB:
        raise UserError(f'{n_vocab} tokens: the largest possible vocabulary is {MAX_VOCAB}')


def id_dtype(n_vocab):
    """The type of an id in bins: 16 bits if they suffice (nanoGPT can read these), else 32."""
    return np.dtype('<u2' if n_vocab <= 2**16 else '<u4')


def normalized(encoding, text):
    """The text that decoding the ids of `text` gives: `text` itself, unless the tokenizer has a normalizer."""
    return encoding.normalize(text) if isinstance(encoding, HuggingFace) else text


def encode(encoding, text):
    """str of any length -> (n,) ids, uint16 or uint32. '<|endoftext|>' counts as plain text."""
    size = SLICE if isinstance(encoding, tiktoken.Encoding) else max(1, len(text))  # HuggingFace slices by itself
    parts = [encoding.encode_to_numpy(text[i:i + size], disallowed_special=()) for i in range(0, len(text), size)]
    dtype = id_dtype(encoding.n_vocab)
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


def token_bytes(encoding):
    """(n_vocab,) int32: length of every token in bytes, 0 for special tokens. Needed for bits per byte."""
    return np.array([0 if encoding.is_special_token(token) else len(encoding.decode_single_token_bytes(token))
                     for token in range(encoding.n_vocab)], np.int32)


# ----------------------------------------------------------------------------------------------------------------------
# One token for each character

class Characters:
    """
    A tokenizer with one token for each of its characters, in their order, and the end-of-text token after them. It has
    the methods of tiktoken.Encoding that this project uses. Encoding any other character raises a UserError.
    """

    def __init__(self, name, special, characters):
        self.name, self.special, self.eot_token = name, special, special[EOT]
        self.n_vocab = len(characters) + 1
        if special != {EOT: len(characters)} or list(characters) != sorted(set(characters)):
            raise ValueError(f'expected sorted characters, each once, and then {EOT}')
        check_size(self.n_vocab)
        self.bytes = [character.encode() for character in characters] + [EOT.encode()]
        self.codes = np.array([ord(character) for character in characters], np.uint32)

    @property
    def special_tokens_set(self):
        return set(self.special)

    def is_special_token(self, token):
        return token == self.eot_token

    def encode_to_numpy(self, text, *, disallowed_special=()):
        """(n,) uint32. `disallowed_special` matches tiktoken's signature. Special tokens are always plain text."""
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')
        ids = np.searchsorted(self.codes, codes)
        known = ids < len(self.codes)
        known[known] = self.codes[ids[known]] == codes[known]
        if not known.all():
            unknown = chr(codes[np.argmin(known)])
            raise UserError(f'the character {unknown!r} is not among the {len(self.codes):,} characters of the '
                            'tokenizer (--tokenizer=char): remove it from the text, or use --tokenizer=byte, '
                            'which encodes every text')
        return ids.astype(np.uint32)

    def encode_ordinary(self, text):
        return self.encode_to_numpy(text).tolist()

    def decode_single_token_bytes(self, token):
        return self.bytes[token]

    def decode_bytes(self, tokens):
        return b''.join(self.bytes[token] for token in tokens)

    def decode(self, tokens, errors='replace'):
        return self.decode_bytes(tokens).decode('utf-8', errors)


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face tokenizers

def spelled(token):
    """The bytes of a token of a byte-level BPE."""
    return bytes(BYTE_OF[character] for character in token)


def spaces_of(vocab, prefix):
    """
    The added tokens of a content that has no list of added tokens. A byte-level vocabulary writes a space as another
    character, so any token of real spaces was added.
    """
    return [{'content': text, 'normalized': False} for text in vocab if prefix is None and text.isspace()]


class HuggingFace:
    """
    A Hugging Face tokenizer with the methods of tiktoken.Encoding that this project uses.

    The ids are the original's, but every text survives encoding and decoding. Special tokens in a text are plain text,
    and SentencePiece's character for a space is spelled byte by byte.

    SentencePiece tokenizers put one space in front of a text. decode() and decode_bytes() remove it at the start and
    after a special token. decode_single_token_bytes() has no context and keeps it, which is right for tokens that
    continue a text.
    """

    def __init__(self, name, special, parts):
        from tokenizers import Tokenizer, normalizers  # most runs do not need it
        self.name, self.prefix, self.eot_token, self.special = name, parts['prefix'], special[EOT], special
        vocab = parts['model']['vocab']
        ids = [*vocab.values(), *special.values()]
        if not all(type(token) is int and token >= 0 for token in ids) or len(set(ids)) < len(ids):
            raise ValueError('an id occurs twice or is not a whole number')
        self.n_vocab = max(ids) + 1
        check_size(self.n_vocab)
        if missing := (BYTE_OF.keys() if self.prefix is None else {SPACE, *BYTES}) - vocab.keys():
            raise ValueError(f'no token {min(missing)}')
        added = parts.get('text_tokens', spaces_of(vocab, self.prefix))
        written = {token['content'] for token in added}
        self.bytes = [b''] * self.n_vocab  # an unused id stands for no bytes
        for text, token in vocab.items():
            if self.prefix is None:
                is_spelled = BYTE_OF.keys() >= {*text} and text not in written
                self.bytes[token] = spelled(text) if is_spelled else text.encode()
            else:
                self.bytes[token] = BYTES.get(text) or text.replace(SPACE, ' ').encode()
        for text, token in special.items():
            self.bytes[token] = text.encode()
        self.space = [vocab.get(f'<0x{byte:02X}>') for byte in SPACE.encode()]  # spell the character SPACE in bytes
        flags = dict.fromkeys(('special', 'lstrip', 'rstrip', 'single_word'), False)
        normalizer = parts.get('normalizer')
        if normalizer not in (None, {'type': 'NFC'}):
            raise ValueError(f'normalizer {normalizer!r}, expected NFC or none')
        self.normalizer = normalizers.NFC() if normalizer else None
        try:
            tokens = [{'id': vocab[token['content']], **token, **flags} for token in added]
            self.bpe = Tokenizer.from_str(json.dumps({
                'version': '1.0', 'normalizer': normalizer, 'pre_tokenizer': parts['pre_tokenizer'],
                'model': parts['model'], 'added_tokens': tokens}))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(error)

    @property
    def special_tokens_set(self):
        return set(self.special)

    def is_special_token(self, token):
        return token in self.special.values()

    def encode_ordinary(self, text):
        if self.prefix is None:
            return self.encode_part(text)
        ids = []
        for i, part in enumerate((self.prefix + text if text else '').split(SPACE)):
            ids += self.space if i else []
            ids += self.encode_part(part.replace(' ', SPACE))
        return ids

    def encode_part(self, text):
        return [token for part in self.slices(text) for token in self.bpe.encode(part, add_special_tokens=False).ids]

    def slices(self, text):
        """
        Parts of SLICE characters. With a normalizer a part ends before an ASCII character, which never combines with
        the characters before it.
        """
        start = 0
        while start < len(text):
            end = start + SLICE
            if self.normalizer and (found := ASCII.search(text, end)):
                end = found.start()
            elif self.normalizer:
                end = len(text)
            yield text[start:end]
            start = end

    def normalize(self, text):
        """The text that decoding gives back."""
        if not self.normalizer or text.isascii():
            return text
        return ''.join(map(self.normalizer.normalize_str, self.slices(text)))

    def encode_to_numpy(self, text, *, disallowed_special=()):
        """(n,) uint32. `disallowed_special` matches tiktoken's signature. Special tokens are always plain text."""
        return np.array(self.encode_ordinary(text), np.uint32)

    def decode_single_token_bytes(self, token):
        return self.bytes[token]

    def decode_bytes(self, tokens):
        parts, start = [], bool(self.prefix)
        for token in tokens:
            parts.append(self.bytes[token][1:] if start and self.bytes[token][:1] == b' ' else self.bytes[token])
            start = self.prefix and self.is_special_token(token)
        return b''.join(parts)

    def decode(self, tokens, errors='replace'):
        return self.decode_bytes(tokens).decode('utf-8', errors)
