"""
Makes the prepared directory for a set of options. Imported by prepare.py, and by opening.py for training runs:

    prepare(config, out)              # config: a PrepareConfig
    join(out)                         # joins the shards that several machines have prepared

A directory holds exactly the requested data. Its name contains the options. Options or source files that changed since
the preparation raise a UserError.
"""
import re
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from configurator import UserError, read_json
from corpora import linked, vocabulary
from corpora.building import build, hashes_of
from corpora.corpus import DATASETS, open_corpus
from corpora.encodings import encoding_name
from corpora.reading import SourceMissing
from corpora.workspace import compare, is_prepared, publish, workspace
from data import VERSION, data_dir
from files import write_json
from runtime.runlog import speak
from tokenizer import MAX_VOCAB, load_tokenizer
from verification import remember, unverified


@dataclass
class PrepareConfig:
    dataset: str = 'pylib'  # pylib, shakespeare, wikitext2, wikitext103, fineweb_edu, or what follows
    # text:PATH (file, directory, glob), or token ids: shards:DIR or bins:PATH
    source: str = ''  # read local files instead of a download: a directory, a file or a glob
    # fineweb_edu and wikitext*: .parquet or .jsonl files; shakespeare: the file input.txt
    subset: str = 'sample-10BT'  # fineweb_edu: the subset to read
    min_score: float = 3.0  # fineweb_edu: lowest educational score (0 to 5) of a document
    text_field: str = 'text'  # name of the text field in .jsonl and .parquet
    bad_text: str = 'refuse'  # text that is not UTF-8 or JSON: refuse, skip, or replace
    # replace: bad bytes become U+FFFD; lines that are not JSON are skipped
    bad_rows: float = 0.01  # largest fraction of rows without a text or a score; such rows are left out
    encoding: str = 'utf-8'  # of .txt and .jsonl without a byte order mark: cp1252, gb18030, shift_jis, utf-16-le ...
    tokenizer: str = 'bpe'  # bpe (trained on the text), char (one token per character), byte, gpt2, or a tokenizer.json
    # for token ids: the tokenizer that made them: gpt2, byte or a tokenizer.json; for shards:DIR also none
    vocab_size: int = 8192  # bpe: number of tokens, including the end-of-text token
    val_ratio: float = 0.05  # fraction of the documents for validation (wikitext*, shakespeare have their own splits)
    max_tokens: int = 0  # stop after this many train tokens (0: read all)
    max_documents: int = 0  # stop after this many documents (0: read all); if the corpus has its own splits, of train
    shard: str = ''  # i/n: prepare only part i (from 0) of n parts, for one of n machines
    out: str = ''  # directory to make (empty: data/NAME)
    num_proc: int = 0  # processes that encode (0: one per CPU)
    seed: int = 1337  # of the random split into train and val

    def problems(self):
        known = self.dataset in DATASETS or re.match('(text|shards|bins):.', self.dataset) or is_path(self.dataset)
        if not known:
            yield (f"--dataset={self.dataset}: unknown, expected {', '.join(DATASETS)}, text:PATH, shards:DIR or "
                   'bins:PATH')
        if self.tokenizer == 'char' and self.dataset.startswith(('shards:', 'bins:')):
            yield (f'--tokenizer=char: it is made from text, but {self.dataset} holds ids: expected gpt2, byte or a '
                   'tokenizer.json')
        if self.tokenizer == 'none' and not self.dataset.startswith('shards:'):
            yield f'--tokenizer=none: only for --dataset=shards:DIR, but --dataset={self.dataset} needs a tokenizer'
        if self.source and self.dataset not in DATASETS[1:]:
            yield (f'--source={self.source}: --dataset={self.dataset} has no such option (for your own files: '
                   f'--dataset=text:{self.source})')
        if self.bad_text not in ('refuse', 'skip', 'replace'):
            yield f'--bad_text={self.bad_text}: expected refuse, skip or replace'
        if not 0 <= self.bad_rows <= 1:
            yield f'--bad_rows={self.bad_rows}: expected a fraction from 0 to 1'
        if not encoding_name(self.encoding):
            yield (f'--encoding={self.encoding}: unknown, expected an encoding that Python knows, such as cp1252, '
                   'gb18030, shift_jis or utf-16-le')
        if not 257 <= self.vocab_size <= MAX_VOCAB:
            yield f'--vocab_size={self.vocab_size}: expected 257 (bytes and end of text) to {MAX_VOCAB}'
        if not 0 < self.val_ratio < 1:
            yield f'--val_ratio={self.val_ratio}: expected a fraction between 0 and 1'
        for key in ('max_tokens', 'max_documents', 'num_proc', 'seed'):
            if getattr(self, key) < 0:
                yield f'--{key}={getattr(self, key)}: must not be negative'
        if self.shard:
            i, _, n = self.shard.partition('/')
            if not (i.isdecimal() and n.isdecimal() and int(i) < int(n) <= 99_999):
                yield f'--shard={self.shard}: expected i/n with 0 <= i < n, as in --shard=0/4'
            if self.max_tokens:
                yield (f'--max_tokens={self.max_tokens}: with --shard, a machine cannot count the tokens of the other '
                       'machines: use --max_documents')


def directory(config):
    """The default directory for the data that `config` requests. --out overrides it."""
    # These options are passed to data_dir below or do not change the data.
    ignored = {'dataset', 'tokenizer', 'vocab_size', 'max_tokens', 'shard', 'out', 'num_proc', 'bad_rows'}
    options = {field.name: getattr(config, field.name) for field in fields(PrepareConfig)
               if field.name not in ignored and getattr(config, field.name) != field.default}
    if config.dataset == 'shakespeare':  # its text is the same, wherever it comes from
        options.pop('source', None)
    return data_dir(config.dataset, config.tokenizer, max_tokens=config.max_tokens, vocab_size=config.vocab_size,
                    **options)


def is_path(dataset):
    """Whether `dataset` is the path of a prepared directory, as in pack --dataset=data/x."""
    return '/' in dataset and (Path(dataset) / 'meta.json').is_file()


def is_bins(dataset):
    """
    Whether `dataset` names token files of another project. False for the .parquet text files of nanochat, which are a
    normal corpus.
    """
    return dataset.startswith('bins:') and linked.find_bins(dataset.removeprefix('bins:')) is not None


def link(config, out):
    """Make a prepared directory `out` from token files of another project."""
    path = config.dataset.removeprefix('bins:')
    for key in ('max_tokens', 'max_documents', 'shard'):
        if value := getattr(config, key):
            raise UserError(f'--{key}={value}: the files of {path} are used as they are: leave it out')
    linked.link(path, out, vocabulary.named(config.tokenizer), config.val_ratio)


# ----------------------------------------------------------------------------------------------------------------------
# A corpus

def prepare(config, out):
    start = time.time()
    corpus = open_corpus(config)
    content = vocabulary.named(config.tokenizer)
    known = tokenizer_entries(config.tokenizer, config.vocab_size, content)
    if known.get('vocab_size') != config.vocab_size and config.origin['vocab_size'] != 'default':
        size = f"{known['vocab_size']} tokens" if content else 'one token for each character'
        raise UserError(f'--vocab_size={config.vocab_size}: --tokenizer={config.tokenizer} has {size}: '
                        'leave --vocab_size out')
    request = make_request(config, corpus, known)
    if is_prepared(out, request, bool(config.shard)):
        print(f'{out} is already prepared: nothing to do')
        return
    whole, part = out, request
    if config.shard:
        i, n = map(int, config.shard.split('/'))
        out, part = out / f'shard-{i:05d}-of-{n:05d}', request | {'shard': config.shard}
        check_shards(whole, request, n)
    with workspace(out, part) as work:
        if work:
            if not (work / 'meta.json').exists():
                build(config, corpus, content, part, work, start)
            publish(work, out)
    summary(out)
    if config.shard:
        join(whole)
    elif not config.out:
        vocab_size = read_json(out / 'meta.json')['vocab_size']
        print(f'train on it: python train.py config/trix_tiny.py --dataset={out}'
              + (f' --vocab_size={vocab_size}' if vocab_size != 8192 else ''))


def tokenizer_entries(name, vocab_size, content):
    """
    The entries of meta.json about the tokenizer that are known before the preparation. The characters of
    --tokenizer=char are not counted yet.

    name: the option. vocab_size: of a BPE. content: the tokenizer, or None if it will be made from the text.
    """
    if content:
        return {'tokenizer': vocabulary.label(content), 'vocab_size': load_tokenizer(content).n_vocab}
    return {'tokenizer': name} | ({'vocab_size': vocab_size} if name == 'bpe' else {})


def make_request(config, corpus, known):
    """
    The entries of meta.json that are known before the preparation: everything that determines its content.
    known: the result of tokenizer_entries().
    """
    filters = [] if corpus.own_splits else ['no exact duplicates, no empty documents']
    filters = ', '.join([*filters, *filter(None, [corpus.filter])])
    request = {'version': VERSION, 'source': corpus.source, 'filter': filters, 'seed': config.seed,
               'val_ratio': None if corpus.own_splits else config.val_ratio, 'max_tokens': config.max_tokens,
               'max_documents': config.max_documents, 'bad_text': config.bad_text, **known}
    if (encoding := encoding_name(config.encoding)) != 'utf-8':
        request['encoding'] = encoding
    return request | {'inputs': corpus.inputs} if corpus.inputs else request


def check_prepared(config, path, say=speak):
    """
    Raises UserError if the prepared directory at `path` does not match `config`: another corpus, changed source files,
    another tokenizer or other options. If the source files no longer exist, it prints a message and accepts the data.
    """
    is_linked = is_bins(config.dataset)
    try:
        corpus = None if is_linked else open_corpus(config, check=False)
    except SourceMissing as error:
        say(f'{error}. Using the data in {path}, which were prepared from it earlier')
        return
    if config.tokenizer == 'gpt2':  # known without the file, which may need a download
        known = {'tokenizer': 'gpt2', 'vocab_size': 50_257}
    else:
        known = tokenizer_entries(config.tokenizer, config.vocab_size, vocabulary.named(config.tokenizer))
    if is_linked:
        request = linked.make_request(config.dataset.removeprefix('bins:'), known, config.val_ratio)
    else:
        request = make_request(config, corpus, known)
    compare(read_json(path / 'meta.json'), request, f'{path} was prepared',
            f'remove it to prepare it again, or use it as it is with --dataset={path}')


def summary(out):
    meta = read_json(out / 'meta.json')
    train, val = (meta['files'][split] for split in ('train', 'val'))
    tokens, size = (sum(file[key] for file in train + val) for key in ('tokens', 'bytes'))
    counts = meta['documents']
    drops = {name: count for name, count in counts.items() if name not in ('read', 'train', 'val') and count}
    dropped = ''.join(f', {count:,} {name}' for name, count in drops.items())
    kept, not_dropped = counts['train'] + counts['val'], counts['read'] - sum(drops.values())
    cut = ''
    if kept > not_dropped:  # the document at the cut of a split by position
        kept, cut = not_dropped, ' (one is cut, and counts in train and in val)'
    print(f"{counts['read']:,} documents read, {kept:,} kept{cut}{dropped}")
    train_tokens, val_tokens = (sum(file['tokens'] for file in split) for split in (train, val))
    print(f"{out}: {train_tokens:,} train + {val_tokens:,} val tokens from "
          f"{counts['train'] + counts['val']:,} documents, {size / 1e6:.1f} MB, {size / tokens:.2f} bytes per token, "
          f"{meta['seconds']} s")


# ----------------------------------------------------------------------------------------------------------------------
# Several machines

def check_shards(out, request, n):
    """Raises UserError if an existing shard in `out` does not match this request."""
    for meta in out.glob('shard-*/meta.json'):
        theirs = {**read_json(meta), 'inputs': request.get('inputs')}  # file times differ between machines
        compare(theirs, request | {'shard': f"{int(meta.parent.name[6:11])}/{n}"}, f'{meta.parent} was prepared',
                'remove it, or choose another --out')


def join(out, ask=False):
    """
    Write one meta.json for all shards in `out`. If shards are missing, prints which, or raises UserError with ask=True.
    """
    metas = {file.parent.name: read_json(file) for file in sorted(out.glob('shard-*-of-*/meta.json'))}
    if not metas:
        raise UserError(f'{out}: no directories shard-00000-of-... with a meta.json: make them with --shard=i/n')
    n = int(next(iter(metas))[-5:])
    if missing := [i for i in range(n) if f'shard-{i:05d}-of-{n:05d}' not in metas]:
        numbers = [*map(str, missing[:10]), *(['...'] if len(missing) > 10 else [])]
        need = f"{out}: {len(missing)} of {n} shards are missing ({', '.join(numbers)})"
        if ask:
            raise UserError(f'{need}: copy their directories here')
        print(f'{need}. Copy them here, then run: python prepare.py join {out}')
        return
    first = next(iter(metas.values()))
    own = ('shard', 'inputs', 'documents', 'files', 'test', 'created', 'seconds')  # these differ between shards
    request = {key: value for key, value in first.items() if key not in own}
    tokenizers = {name: read_json(out / name / 'tokenizer.json') for name in metas}
    for name, meta in metas.items():
        compare(meta, request | {'shard': f'{int(name[6:11])}/{n}'}, f'{out / name} was prepared',
                'it does not belong to this corpus')
        if tokenizers[name] != next(iter(tokenizers.values())):
            raise UserError(f'{out / name}: its tokenizer differs from the tokenizer of the other shards: '
                            'prepare it again')
    files = {'train': [], 'val': []}
    for name, meta in metas.items():
        for split in files:
            files[split] += [{**file, 'name': f"{name}/{file['name']}"} for file in meta['files'][split]]
    counts = Counter()
    for meta in metas.values():
        counts.update(meta['documents'])  # update() keeps zero counts, + would drop them
    test = {}
    if 'test' in first:
        test['test'] = {**first['test'], 'name': f"{next(iter(metas))}/{first['test']['name']}"}
    write_json(out / 'tokenizer.json', next(iter(tokenizers.values())))
    known = {}
    for name, meta in metas.items():
        hashes, n_vocab = hashes_of(meta['files']), meta['vocab_size']
        unknown = unverified(out / name, hashes, n_vocab)  # copied files are verified on first use
        known |= {f'{name}/{file}': sha256 for file, sha256 in hashes.items() if file not in unknown}
    remember(out, known, first['vocab_size'])
    write_json(out / 'meta.json', {
        **request, 'shards': n, 'documents': counts, 'files': files, **test,
        'created': max(meta['created'] for meta in metas.values()),
        'seconds': max(meta['seconds'] for meta in metas.values())})
    summary(out)
