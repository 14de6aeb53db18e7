"""
Opens a prepared directory: token bins, or shards. Imported by train.py, evaluate.py and prepare.py:

    data = open_data('data/pylib', block_size=256, vocab_size=8192)   # TokenData for bins, ShardData for shards
    advice_for('my/texts')   # 'holds text (a.txt): use --dataset=text:my/texts', for a directory that is not prepared

What reads shards is imported only for shards.
"""
from contextlib import suppress
from pathlib import Path

from configurator import UserError, read_json
from data import TokenData


def open_data(path, block_size, vocab_size, verify='once'):
    """
    The loader of a prepared directory: ShardData if meta.json has 'kind': 'shards', otherwise TokenData. Raises their
    UserErrors, or one with advice if the directory holds other data.
    """
    file = Path(path) / 'meta.json'
    if not file.is_file() and (advice := advice_for(path)):
        raise UserError(f'{path} is not prepared data (no meta.json). It {advice}')
    if file.is_file() and read_json(file).get('kind') == 'shards':
        from corpora.shards import ShardData  # a plain run does not need it
        return ShardData(path, block_size, vocab_size, verify)
    return TokenData(path, block_size, vocab_size, verify)


def holds_rows(path):
    """Whether `path` is a directory of shards that is not prepared."""
    if not Path(path).is_dir() or (Path(path) / 'meta.json').exists():
        return False
    from corpora.shards import find_shards  # a plain run does not need it
    with suppress(UserError):
        return bool(find_shards(path))
    return False


def advice_for(path):
    """
    The end of an error message for a directory that is not prepared: what it holds, and which dataset to give instead.
    '' if it holds no data.
    """
    if not Path(path).is_dir():
        return ''
    if holds_rows(path):
        return f'holds rows of token ids: use --dataset=shards:{path}'
    for ending in ('bin', 'txt', 'jsonl', 'parquet'):
        if found := sorted(Path(path).glob(f'*.{ending}')):
            content, kind = ('token files of another program', 'bins') if ending == 'bin' else ('text', 'text')
            return f'holds {content} ({found[0].name}): use --dataset={kind}:{path}'
    return ''
