"""
HellaSwag (arXiv:1905.07830): which of four endings goes on from a context? As EleutherAI's lm-evaluation-harness scores it, for
evaluate.py:

    file = find('download')                                # or a file
    items = read_items(file)
    rows = encode_items(encoding, items, T, file)
    accuracy(items, log_likelihoods(model, rows, ...))     # {'acc': .., 'acc_norm': .., 'items': 10042}
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
    """The path of the items: `file`, or data/hellaswag_val.jsonl for 'download', which is brought if it isn't there."""
    if file != 'download':
        return Path(file)
    if not (there := Path('data/hellaswag_val.jsonl')).exists():
        download(there)
    return there


def read_items(file, count=0):
    """[(context, 4 endings, label)] of the first `count` lines of a file (0: all). UserError names the first that is no item."""
    try:
        items = parse(file.read_bytes().rstrip().splitlines(), file, count)  # blank lines at the end are no items
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}: expected the hellaswag_val.jsonl of {URL}')
    if len(items) < max(1, count):
        raise UserError(f'{file}: {len(items):,} items in it' + f', --items={count} asks for more' * bool(count))
    return items


def download(file):
    """Bring HellaSwag's validation items; they become `file` only if all of them have arrived."""
    from http.client import HTTPException
    from urllib.request import urlopen
    print(f'downloading {URL}', flush=True)
    try:
        with urlopen(URL, timeout=30) as source:
            content = source.read()
    except (OSError, HTTPException) as error:
        raise UserError(f"can't download {URL} ({error}): bring that file here and give --hellaswag=FILE")
    if (found := len(parse(content.rstrip().splitlines(), URL))) != ITEMS:
        raise UserError(f'{URL}: {found:,} items have arrived, expected {ITEMS:,}: try again, or give --hellaswag=FILE')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as target:
            target.write(content)
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror}): download {URL} and give --hellaswag=FILE")


def parse(lines, where, count=0):
    """The first `count` lines (0: all) -> [(context, 4 endings, label)]. UserError names the first line that is no item."""
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
    if missing := [name for name in names if not isinstance(item, dict) or name not in item]:
        raise ValueError(f"no {', '.join(missing)}")
    label, a, b, endings, gold = (item[name] for name in names)
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(ending, str) for ending in endings):
        raise ValueError('endings: expected a list of 4 strings')
    if not all(isinstance(text, str) for text in (label, a, b)):
        raise ValueError('activity_label, ctx_a and ctx_b: expected strings')
    if str(gold) not in ('0', '1', '2', '3'):
        raise ValueError(f'label {gold!r:.50}, expected 0, 1, 2 or 3')
    ''.join((label, a, b, *endings)).encode()  # half a surrogate pair, which JSON lets pass, is a ValueError
    return clean(f'{label}: {a} {b.capitalize()}'), [clean(ending) for ending in endings], int(gold)


def clean(text):
    """Without the marks of WikiHow's articles."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


def encode_items(encoding, items, T, file):
    """
    [(ids int32, how many of them are the ending)], four an item. Context and ending are encoded together, and the ending is what
    lies behind the tokens of the context alone; what is too long for T inputs and a last target is cut on the left. UserError
    for an ending that isn't whole then.
    """
    rows = []
    for number, (context, endings, _) in enumerate(items, 1):
        head = context.rstrip()  # spaces belong to the word behind them
        start = encoding.encode_ordinary(head)
        for ending in endings:
            ids = encoding.encode_ordinary(f'{head}{context[len(head):]} {ending}')
            n = len(ids) - len(start)
            if not 1 <= n <= T:
                raise UserError(f'{file}:{number}: an ending of {n} tokens can\'t be scored in a context of {T}'
                                + ': --context=N gives a longer one' * (n > T))
            rows.append((np.array((ids if start else [encoding.eot_token, *ids])[-T - 1:], np.int32), n))
    return rows


@torch.no_grad()
def log_likelihoods(model, rows, batch_size, device, dtype):
    """
    Rows (ids, n) -> (len(rows),) fp64: the log-probability, in nats, of the last n ids of each row after those before them.
    Rows of about one length are a batch, padded on the right, where no position looks.
    """
    found, order = np.zeros(len(rows)), sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
    for batch in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        idx = np.zeros((len(batch), len(rows[batch[0]][0])), np.int64)
        for i, row in enumerate(batch):
            idx[i, :len(rows[row][0])] = rows[row][0]
        idx = torch.from_numpy(idx).to(device)
        with autocast(device, dtype):
            logits = model(idx[:, :-1])  # (B, T, vocab_size)
        for i, row in enumerate(batch):
            end, n = len(rows[row][0]), rows[row][1]
            log_p = logits[i, end - 1 - n:end - 1].float().log_softmax(-1)  # (n, vocab_size)
            found[row] = log_p.gather(1, idx[i, end - n:end, None]).double().sum().item()
    return found


def accuracy(items, log_p):
    """log_p: (4 * len(items),) -> {acc, acc_norm, items}: the share of items of which the ending with the highest log-probability,
    for acc_norm that divided by its characters, is the true one."""
    log_p, labels = log_p.reshape(-1, 4), [label for *_, label in items]
    size = np.array([[len(ending) for ending in endings] for _, endings, _ in items], float)
    with np.errstate(divide='ignore'):  # an ending of nothing but marks
        by_character = log_p / size
    return {'acc': float((log_p.argmax(1) == labels).mean()), 'acc_norm': float((by_character.argmax(1) == labels).mean()),
            'items': len(items)}
