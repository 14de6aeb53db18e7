"""
HellaSwag (arXiv:1905.07830): which of four endings continues a context? Scored as by EleutherAI's
lm-evaluation-harness. evaluate.py uses it:

    file = find('download')  # or the path of a file
    items = read_items(file)
    rows = encode_items(encoding, items, T, file)
    accuracy(items, log_likelihoods(model, rows, ...))  # {'acc': .., 'acc_norm': .., 'items': 10042}
"""
import json
import re
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from files import replacing
from kernels import autocast

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
ITEMS = 10_042  # in that file


def find(file):
    """The path of the items: `file`, or for 'download' data/hellaswag_val.jsonl, downloaded if it doesn't exist."""
    if file != 'download':
        return Path(file)
    path = Path('data/hellaswag_val.jsonl')
    if not path.exists():
        download(path)
    return path


def read_items(file, count=0):
    """
    The first `count` lines of a file (0: all) -> [(context, 4 endings, label)]. UserError names the first line that is
    not an item.
    """
    try:
        items = parse(file.read_bytes().rstrip().splitlines(), file, count)  # without blank lines at the end
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}: expected the hellaswag_val.jsonl of {URL}')
    if len(items) < max(1, count):
        more = f', --items={count} asks for more' if count else ''
        raise UserError(f'{file}: {len(items):,} items in it{more}')
    return items


def download(file):
    """Download HellaSwag's validation items. `file` is only written if all of them have arrived."""
    from http.client import HTTPException
    from urllib.request import urlopen
    print(f'downloading {URL}', flush=True)
    try:
        with urlopen(URL, timeout=30) as source:
            content = source.read()
    except (OSError, HTTPException) as error:
        raise UserError(f"can't download {URL} ({error}): copy that file here and give --hellaswag=FILE")
    received = len(parse(content.rstrip().splitlines(), URL))
    if received != ITEMS:
        raise UserError(f'{URL}: {received:,} items have arrived, expected {ITEMS:,}: try again, or give '
                        '--hellaswag=FILE')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as target:
            target.write(content)
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror}): download {URL} and give --hellaswag=FILE")


def parse(lines, where, count=0):
    """
    The first `count` lines (0: all) -> [(context, 4 endings, label)]. UserError names the first line that is not an
    item.
    """
    items = []
    for number, line in enumerate(lines[:count or None], 1):
        try:
            items.append(parse_one(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f'{where}:{number}: no item of HellaSwag: {error}')
    return items


def parse_one(item):
    """The JSON object of a line -> (context, endings, label). ValueError says what is wrong."""
    names = ('activity_label', 'ctx_a', 'ctx_b', 'endings', 'label')
    missing = [name for name in names if not isinstance(item, dict) or name not in item]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    activity, a, b, endings, label = (item[name] for name in names)
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(ending, str) for ending in endings):
        raise ValueError('endings: expected a list of 4 strings')
    if not all(isinstance(text, str) for text in (activity, a, b)):
        raise ValueError('activity_label, ctx_a and ctx_b: expected strings')
    if str(label) not in ('0', '1', '2', '3'):
        raise ValueError(f'label {label!r:.50}, expected 0, 1, 2 or 3')
    ''.join((activity, a, b, *endings)).encode()  # ValueError for half a surrogate pair, which JSON allows
    return clean(f'{activity}: {a} {b.capitalize()}'), [clean(ending) for ending in endings], int(label)


def clean(text):
    """Removes the markup of WikiHow's articles."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


def encode_items(encoding, items, T, file):
    """
    [(ids int32, number of ids in the ending)], four for each item. Context and ending are encoded together; the ending
    is what follows as many tokens as the context has alone. Rows longer than T inputs and a last target are cut on the
    left. UserError if an ending alone is longer.
    """
    rows = []
    for number, (context, endings, _) in enumerate(items, 1):
        stripped = context.rstrip()  # spaces belong to the word after them
        spaces = context[len(stripped):]
        context_ids = encoding.encode_ordinary(stripped)
        for ending in endings:
            ids = encoding.encode_ordinary(f'{stripped}{spaces} {ending}')
            n = len(ids) - len(context_ids)
            if not 1 <= n <= T:
                advice = ': --context=N gives a longer one' if n > T else ''
                raise UserError(f"{file}:{number}: an ending of {n} tokens can't be scored in a context of {T}{advice}")
            if not context_ids:
                ids = [encoding.eot_token, *ids]
            rows.append((np.array(ids[-T - 1:], np.int32), n))
    return rows


@torch.no_grad()
def log_likelihoods(model, rows, batch_size, device, dtype):
    """
    Rows (ids, n) -> (len(rows),) fp64: the log-probability, in nats, of the last n ids of each row given those before
    them. Rows of similar length form a batch, padded on the right, where no position attends.
    """
    log_p = np.zeros(len(rows))
    fixed = model.fixed_weights()
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for first in range(0, len(rows), batch_size):
        batch = by_length[first:first + batch_size]
        idx = np.zeros((len(batch), len(rows[batch[0]][0])), np.int64)
        for i, row in enumerate(batch):
            ids, _ = rows[row]
            idx[i, :len(ids)] = ids
        idx = torch.from_numpy(idx).to(device)
        with autocast(device, dtype), fixed:
            logits = model(idx[:, :-1])  # (B, T, vocab_size)
        for i, row in enumerate(batch):
            ids, n = rows[row]
            end = len(ids)
            ending_log_p = logits[i, end - 1 - n:end - 1].float().log_softmax(-1)  # (n, vocab_size)
            log_p[row] = ending_log_p.gather(1, idx[i, end - n:end, None]).double().sum().item()
    return log_p


def accuracy(items, log_p):
    """
    log_p: (4 * len(items),) -> {acc, acc_norm, items}. acc: the share of items whose true ending has the highest
    log-probability. acc_norm: the same with the log-probability divided by the number of characters.
    """
    log_p, labels = log_p.reshape(-1, 4), [label for *_, label in items]
    characters = np.array([[len(ending) for ending in endings] for _, endings, _ in items], float)
    with np.errstate(divide='ignore'):  # an ending that was nothing but markup
        by_character = log_p / characters
    return {'acc': float((log_p.argmax(1) == labels).mean()),
            'acc_norm': float((by_character.argmax(1) == labels).mean()), 'items': len(items)}
