"""
Makes the tokenizer of a corpus. Imported by prepare.py and what it calls:

    content = named('gpt2')               # or 'byte', or a path: 'llama2/tokenizer.json'
    content = train_bpe(texts, 8192)      # or characters(texts)
    encoding = load_tokenizer(content)    # in tokenizer.py, which encodes and decodes

A content is the dict in tokenizer.json. It suffices to rebuild the tokenizer.
"""
import base64
import hashlib
import json
import os
import textwrap

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from configurator import UserError, read_json
from tokenizer import (BYTE_OF, BYTES, EOT, FIXED, PATTERN, SPACE, VERSION, build, checked, json_of, spaces_of,
                       spelled)

FROM_TEXT = ('bpe', 'char')  # tokenizers that are made from the text of a corpus
ENDS = (EOT, '</s>', '<|end_of_text|>', '<eos>')  # end-of-text tokens in Hugging Face's files
LONGEST_WORD = 4096  # longest word in bytes for BPE training; a merge takes longer in longer words
LONG_WORDS = 6_000_000  # total bytes of distinct words over 40 characters for BPE training: see `affordable`


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
        reason = textwrap.shorten(f'{type(error).__name__}: {error}', 160, placeholder=' ...')
        raise UserError(f"tiktoken cannot download GPT-2's tokenizer ({reason}): give Hugging Face's "
                        'tokenizer.json of GPT-2 with --tokenizer=FILE, set TIKTOKEN_CACHE_DIR to a directory with '
                        "tiktoken's files, or do without it: --tokenizer=bpe for text, --tokenizer=none for rows of "
                        'ids')
    return native('gpt2', [encoding.decode_single_token_bytes(token) for token in range(encoding.eot_token)])


def native(name, ranks):
    return {'format': 'nanotrix-tokenizer', 'version': VERSION, 'name': name, 'pattern': PATTERN,
            'special_tokens': {EOT: len(ranks)}, 'ranks': [base64.b64encode(rank).decode() for rank in ranks]}


def label(content):
    """The name of a tokenizer for meta.json. content: from tokenizer.json."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]
    return content['name'] if content['name'] in FIXED else f"{content['name']}-{digest}"


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face tokenizers

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


def normalizer_of(content):
    """'NFC' if the tokenizer normalises a text to NFC before encoding, else ''."""
    return (content.get('huggingface', {}).get('normalizer') or {}).get('type', '')
