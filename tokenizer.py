"""
Converts text to token ids and back without loss: decoding the ids of a text gives back every byte.
Imported by every script:

    content = named('gpt2')                           # or 'byte', or a path: 'llama2/tokenizer.json'
    content = train_bpe(texts, 8192)                  # or characters(texts)
    encoding = load_tokenizer(content)                # or load_tokenizer('data/pylib'), a prepared directory
    ids = encoding.encode_ordinary('Hello world')     # all of it is plain text, even '<|endoftext|>'
    encoding.decode(ids) == 'Hello world'
    lengths = token_bytes(encoding)                   # for bits per byte

The content of a tokenizer is a dict of plain values that suffices to rebuild it.
tokenizer.json and every checkpoint hold this dict.
"""
import base64
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from configurator import UserError, read_json

VERSION = 1  # version of tokenizer.json
MAX_VOCAB = 2**20  # ids are stored in 16 bits if they fit, else in 32
EOT = '<|endoftext|>'
FIXED = ('gpt2', 'byte')  # tokenizers that are equal wherever they are made
FROM_TEXT = ('bpe', 'char')  # tokenizers that are made from the text of a corpus
ENDS = (EOT, '</s>', '<|end_of_text|>', '<eos>')  # end-of-text tokens in Hugging Face's files
# PATTERN is GPT-2's split into words as tiktoken writes it. FASTER splits every text identically and is twice as fast:
# its first group needs no lookahead, so tiktoken's fancy-regex passes that group to the automaton
# of the regex library below it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
FASTER = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"""
LONGEST_WORD = 4096  # longest word in bytes for BPE training; a merge takes longer in longer words
LONG_WORDS = 6_000_000  # total bytes of distinct words over 40 characters for BPE training: see `affordable`
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


def named(name):
    """
    The content of the tokenizer that --tokenizer=NAME means: gpt2, byte, or the path of a tokenizer.json or of a
    directory with one. Returns None for 'bpe' and 'char', which are made from a text, and for 'none'. Raises UserError.
    """
    if name in (*FROM_TEXT, 'none'):
        return None
    if name in FIXED:
        return gpt2() if name == 'gpt2' else byte()
    if not os.path.exists(name):
        raise UserError(f'--tokenizer={name}: no such file; expected {", ".join(FROM_TEXT + FIXED)}, '
                        'or the path of a tokenizer.json')
    return from_file(name)


def byte():
    """The content of the tokenizer with one token for each byte, and one for the end of text: 257 tokens."""
    return native('byte', [bytes([byte]) for byte in range(256)])


def characters(texts):
    """The content of the tokenizer with one token for each character of `texts`, sorted, and an end-of-text token."""
    found = ''.join(sorted(set().union(*texts)))
    return {'format': 'nanotrix-tokenizer', 'version': VERSION, 'name': 'char', 'special_tokens': {EOT: len(found)},
            'characters': found}


def train_bpe(texts, vocab_size):
    """
    Train a byte-level BPE on an iterable of str -> its content. Ranks: the 256 bytes, then tokens in merge order.

    Words of more than LONGEST_WORD bytes, as in a genome on one line, are cut for training. UserError if the texts
    yield fewer than vocab_size tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(LONGEST_WORD)])
    bpe.train_from_iterator(affordable(texts), trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=sorted(BYTE_OF), show_progress=False))
    vocab = bpe.get_vocab()
    if len(vocab) < vocab_size - 1:
        raise UserError(f'--vocab_size={vocab_size}: this corpus is too small for so many tokens: '
                        f'use --vocab_size={len(vocab) + 1} or less, or more text')
    merged = sorted(vocab, key=vocab.get)[256:]
    return native(f'nanotrix-{vocab_size}',
                  [bytes([byte]) for byte in range(256)] + [spelled(token) for token in merged])


def affordable(texts):
    """
    The texts, cut off where training on more would take over 1 GB of memory.

    The library keeps every distinct word at 100 bytes of memory a byte. In text without spaces (Chinese, Japanese,
    Thai) nearly every clause is a new word. English and code fit completely.
    """
    seen, size = set(), 0
    for text in texts:
        yield text
        new = {word for word in text.split() if len(word) > 40} - seen
        seen |= new
        size += sum(len(word.encode()) for word in new)
        if size > LONG_WORDS:
            print(f'tokenizer: trained on only the first {size / 1e6:.1f} MB of words over 40 characters, '
                  'to limit memory', flush=True)
            return


def gpt2():
    """The content of GPT-2's tokenizer (50,257 tokens). tiktoken downloads it once. UserError if the download fails."""
    try:
        encoding = tiktoken.get_encoding('gpt2')
    except Exception as error:  # tiktoken doesn't wrap the errors of its libraries: network, disk, sha256, ...
        raise UserError(f"tiktoken cannot download GPT-2's tokenizer ({error!r:.200}): give Hugging Face's "
                        'tokenizer.json of GPT-2 with --tokenizer=FILE, set TIKTOKEN_CACHE_DIR to a directory with '
                        "tiktoken's files, or do without it: --tokenizer=bpe for text, --tokenizer=none for rows of "
                        'ids')
    return native('gpt2', [encoding.decode_single_token_bytes(token) for token in range(encoding.eot_token)])


def native(name, ranks):
    return {'format': 'nanotrix-tokenizer', 'version': VERSION, 'name': name, 'pattern': PATTERN,
            'special_tokens': {EOT: len(ranks)}, 'ranks': [base64.b64encode(rank).decode() for rank in ranks]}


def spelled(token):
    """The bytes of a token of a byte-level BPE."""
    return bytes(BYTE_OF[character] for character in token)


def from_file(path):
    """
    The content of the tokenizer in a file, or in a directory's tokenizer.json.

    Accepts our own format and two kinds of Hugging Face tokenizers: byte-level BPE (GPT-2, SmolLM) and SentencePiece
    BPE with byte fallback (LLaMA-2, Mistral). Raises UserError for all others.
    """
    file = json_of(path)
    content = read_json(file, "expected a tokenizer.json, ours or Hugging Face's")
    if content.get('format') != 'nanotrix-tokenizer':
        if 'model' not in content:
            raise UserError(f"{file}: not a tokenizer: it is neither in our format (no 'format') "
                            "nor in Hugging Face's (no 'model')")
        content = checked(file, content, from_huggingface)
    checked(file, content, build)
    return content


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


def label(content):
    """The name of a tokenizer for meta.json. content: from tokenizer.json."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]
    return content['name'] if content['name'] in FIXED else f"{content['name']}-{digest}"


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


def normalizer_of(content):
    """'NFC' if the tokenizer normalises a text to NFC before encoding, else ''."""
    return (content.get('huggingface', {}).get('normalizer') or {}).get('type', '')


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

def from_huggingface(file):
    """
    The JSON of a Hugging Face tokenizer.json -> our content. Keeps only what determines how a text is encoded.

    Special tokens are removed from the vocabulary and the merges, so no text is ever encoded as a special token. Added
    tokens that are plain text stay. Raises UserError for a tokenizer that can lose text or has no end-of-text token.
    """
    model, added = file['model'], file.get('added_tokens') or []
    kind = model.get('type') or ('BPE' if 'merges' in model else None)  # the oldest files have no type
    if kind != 'BPE':
        raise UserError(f'a model of type {kind} can lose text: expected a byte-level BPE or a BPE with byte fallback')
    if any(model.get(key) for key in ('continuing_subword_prefix', 'end_of_word_suffix')):
        raise UserError('a BPE that marks the parts of a word can lose spaces: '
                        'expected a BPE without prefix and suffix')
    before, after = file.get('normalizer'), file.get('pre_tokenizer')
    normalizer, pre_tokenizer, prefix = spacing(before, after, model.get('byte_fallback'))

    texts = [token for token in added if is_text(token, prefix)]
    special = {token['content']: token['id'] for token in added if token not in texts}
    vocab = model['vocab'] | {token['content']: token['id'] for token in texts}
    for token in added:
        if model['vocab'].get(token['content'], token['id']) != token['id']:
            raise ValueError(f"{token['content']!r} occurs twice, as {token['id']} and as "
                             f"{model['vocab'][token['content']]}")
    end = next((name for name in ENDS if name in special or name in vocab), None)
    if end is None:
        raise UserError(f"no end-of-text token: expected one of {' '.join(ENDS)}, "
                        f"but the special tokens are {' '.join(special) or 'none'}")
    special = {EOT: special.pop(end, vocab.get(end)), **special}
    vocab = {text: token for text, token in vocab.items() if text not in special and text != end}
    pairs = [tuple(merge.split(' ') if isinstance(merge, str) else merge) for merge in model['merges']]
    never = {end, *special, *BYTES}
    pairs = [pair for pair in pairs if never.isdisjoint({*pair, ''.join(pair)})]
    parts = {'prefix': prefix, 'pre_tokenizer': pre_tokenizer,
             'model': {'type': 'BPE', 'vocab': vocab, 'merges': [list(pair) for pair in pairs],
                       'byte_fallback': prefix is not None, 'ignore_merges': bool(model.get('ignore_merges'))}}
    if normalizer:
        parts['normalizer'] = normalizer
    if (text_tokens := matched(texts, prefix, model['vocab'], end)) != spaces_of(vocab, prefix):
        parts['text_tokens'] = text_tokens
    n_vocab = max([*vocab.values(), *special.values()]) + 1
    return {'format': 'nanotrix-tokenizer', 'version': VERSION, 'name': f'huggingface-{n_vocab}',
            'special_tokens': special, 'huggingface': parts}


def is_text(token, prefix):
    """
    Whether an added token is plain text, such as <table>, or a run of spaces in a tokenizer for code.

    With prefix ' ' the library puts a space in front of a text, and also after such a token. This changes the text, so
    with this prefix only runs of spaces count as plain text.
    """
    plain = not any(token.get(key) for key in ('special', 'lstrip', 'rstrip', 'single_word'))
    return plain and (token['content'].isspace() or prefix != ' ')


def matched(texts, prefix, vocab, end):
    """
    [{content, normalized}] of the added tokens that are matched in a text before the BPE runs. UserError for an added
    token that would change the text.
    """
    tokens = [{'content': token['content'], 'normalized': bool(token.get('normalized'))} for token in texts]
    if prefix is None:
        for text in (token['content'] for token in tokens):
            if text in vocab and BYTE_OF.keys() >= {*text} and spelled(text) != text.encode():
                raise UserError(f'the added token {text!r} is also in the vocabulary, where it stands for other bytes')
    elif prefix == ' ':
        return []
    else:
        if spaced := [token['content'] for token in tokens if ' ' in token['content']]:
            raise UserError(f'the added token {spaced[0]!r} has a space, which this kind of BPE writes as {SPACE}')
        # A token that is not normalised matches the character SPACE, never a space. SPACE is spelled in bytes here.
        tokens = [token for token in tokens if token['normalized'] or SPACE not in token['content']]
    return [token for token in tokens if token['content'] != end]


def spaces_of(vocab, prefix):
    """
    The added tokens of a content that has no list of added tokens. A byte-level vocabulary writes a space as another
    character, so any token of real spaces was added.
    """
    return [{'content': text, 'normalized': False} for text in vocab if prefix is None and text.isspace()]


def spacing(normalizer, pre_tokenizer, byte_fallback):
    """
    (normalizer, pre-tokenizer, prefix): how a text is changed and split before the BPE, and what is put in front of it.

    Byte-level BPE: (None or NFC, pre-tokenizer, None). SentencePiece BPE, which writes a space as SPACE: (None, None or
    pre-tokenizer, ' ' or ''). Raises UserError if text could be lost.
    """
    before, after = steps(normalizer), steps(pre_tokenizer)
    if any(step['type'] == 'ByteLevel' for step in after):
        lossy = [] if before == [{'type': 'NFC'}] else [*before]
        lossy += [step for step in after if step['type'] not in ('ByteLevel', 'Split', 'Digits', 'Punctuation')
                          or step.get('behavior') == 'Removed' or step.get('add_prefix_space')]
        if lossy:
            raise UserError(f"{lossy[0]['type']} before the BPE can change a text: "
                            'expected no normalizer except NFC, and a pre-tokenizer that keeps every character')
        return before[0] if before else None, pre_tokenizer, None
    if not byte_fallback:
        raise UserError('a BPE that is not byte-level and has no byte fallback loses unknown characters: '
                        'choose another tokenizer')
    replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
    # Gemma has this step. It has no effect, because all spaces were replaced before it.
    no_effect = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious', 'invert': False}
    if after in ([], [no_effect]) and before in ([replace], [{'type': 'Prepend', 'prepend': SPACE}, replace]):
        return None, None, ' ' if before[1:] else ''
    if not before and len(after) == 1 and after[0]['type'] == 'Metaspace' and after[0]['replacement'] == SPACE:
        never = after[0].get('prepend_scheme') == 'never' or after[0].get('add_prefix_space') is False
        words = {'type': 'Split', 'pattern': {'String': SPACE}, 'behavior': 'MergedWithNext', 'invert': False}
        return None, words if after[0].get('split', True) else None, '' if never else ' '
    kinds = ', '.join(step['type'] for step in before + after) or 'nothing'
    raise UserError(f'{kinds} before the BPE can change a text: '
                    f'expected steps that write a space as {SPACE} and change nothing else')


def steps(part):
    """A normalizer or pre-tokenizer as a list of steps."""
    if part and part['type'] == 'Sequence':
        return [step for inner in part.get('normalizers') or part['pretokenizers'] for step in steps(inner)]
    return [part] if part else []


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
