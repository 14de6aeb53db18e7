"""Best-fit packing: documents stay whole in rows, only documents longer than a row are cut, and rows waste little."""
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import VOCAB, write

import train
from configurator import UserError
from data import TokenData
from model import GPT, GPTConfig
from corpora.packing import DocumentStarts, PackedRows, best_fit, document_ends
from runs import arguments, finish, finish_ranks, losses
from runtime.generation import generate

EOT, T = VOCAB - 1, 32


def corpus_of(lengths):
    """Documents of these lengths, their end included; all tokens of a document tell which one it is, and where."""
    return [np.append((7 * i + np.arange(n - 1)) % EOT, EOT) for i, n in enumerate(lengths)]


def packed(path, lengths, shards=1, ended=True, block_size=T):
    ids = np.concatenate(corpus_of(lengths))
    ids = ids if ended else ids[:-1]
    data = TokenData(write(path, {'train': np.array_split(ids, shards), 'val': [np.arange(300) % EOT]}), block_size, VOCAB)
    return PackedRows(data), ids


def texts(data):
    """The tokens of each row, without padding."""
    found = []
    for row in range(data.n_windows):
        x, y = data.gather('train', np.array([row]))
        n = int((y[0] >= 0).sum())
        assert (y[0, :n] >= 0).all() and (y[0, n:] == -1).all() and (y[0, :n - 1] == x[0, 1:n]).all()
        assert (x[0, n + 1:] == EOT).all(), 'padding'
        found.append(np.append(x[0, :n], y[0, n - 1]))
    return found


def split(row):  # at the ends of its documents
    return [part.tolist() for part in np.split(row, np.flatnonzero(row == EOT) + 1) if len(part)]


realistic = np.clip(np.random.default_rng(0).lognormal(2.6, 1.0, 3000).astype(int), 1, 400)


@pytest.mark.parametrize('shards', [1, 3])
def test_documents_that_fit_stay_whole_and_only_longer_ones_are_cut(tmp_path, shards):
    lengths = [T + 1, T + 2, 1, 2, 3 * T, T, 5, 2 * T + 1, *realistic[:300]]
    data, ids = packed(tmp_path / 'd', lengths, shards)
    whole = sorted(part for row in texts(data) for part in split(row))
    documents = corpus_of(lengths)
    expected = []
    for document in documents:
        expected += [document[i:i + T + 1].tolist() for i in range(0, max(1, len(document) - 1), T)]
    assert whole == sorted(expected)
    assert data.cut == sum(n > T + 1 for n in lengths) and data.documents == len(lengths)
    cut = sum(e > s // T * T + T + 1 for s, e in zip(np.cumsum([0, *lengths]), np.cumsum(lengths)))
    assert data.cut_by_stream == cut > data.cut


def test_documents_of_a_row_keep_the_order_of_the_corpus(tmp_path):
    data, _ = packed(tmp_path / 'd', realistic[:300])
    for row in range(len(data.first) - 1):
        begins = data.begin[data.first[row]:data.first[row + 1]]
        assert (np.diff(begins) > 0).all()


def test_a_last_document_without_an_end_stands_alone(tmp_path):
    data, ids = packed(tmp_path / 'd', [9] * 20 + [6], ended=False)
    assert document_ends(data, EOT)[-1] == len(ids)
    row, = [row for row in texts(data) if row[-1] != EOT]
    assert row.tolist() == ids[-5:].tolist()


def test_rows_are_nearly_full_of_a_realistic_distribution(tmp_path):
    data, ids = packed(tmp_path / 'd', realistic, block_size=256)
    assert data.n_windows <= 1.03 * np.ceil(len(ids) / 257)
    assert f'{100 * data.text_share:.1f} % of them is text' in data.summary()
    assert data.text_share == pytest.approx(sum(map(len, texts(data))) / data.n_windows / 257)


def one_by_one(lengths, capacity):
    """Best-fit decreasing as the paper has it -> the room that each row has left."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 40))
def test_the_packing_is_best_fit_decreasing(lengths, capacity):
    row, n = best_fit(np.array(lengths), capacity)
    assert sorted(capacity - np.bincount(row, lengths, n).astype(int)) == one_by_one(lengths, capacity)


def test_many_documents_are_packed_in_seconds():
    lengths = np.clip(np.random.default_rng(1).lognormal(6, 1.2, 200_000).astype(int), 1, 1025)  # about 100M tokens
    start = time.process_time()
    row, n = best_fit(lengths, 1025)
    assert time.process_time() - start < 20
    assert n <= 1.01 * np.ceil(lengths.sum() / 1025) and np.bincount(row, lengths).max() <= 1025


def test_every_number_of_processes_sees_the_same_global_batch_and_an_epoch_every_row(tmp_path):
    data, _ = packed(tmp_path / 'd', realistic[:500])
    for step in (0, 3, 50):
        expected = sorted(x.tolist() for x in data.batch(step, 0, 8, 8, seed=3)[0])
        for world in (2, 4):
            got = [x.tolist() for rank in range(world) for x in data.batch(step, 0, 8 // world, 8, rank, world, 3)[0]]
            assert sorted(got) == expected
    rows = data.rows(0, 0, data.n_windows, data.n_windows, seed=3)
    assert sorted(rows.tolist()) == list(range(data.n_windows))


def test_validation_keeps_its_windows(tmp_path):
    data, _ = packed(tmp_path / 'd', realistic[:300])
    plain = TokenData(data.path, T, VOCAB)
    windows = data.val_windows()
    assert all(np.array_equal(a, b) for a, b in zip(data.val_batch(windows), plain.val_batch(plain.val_windows())))


def test_shards_are_refused(tmp_path):
    from corpora import shards
    packed(tmp_path / 'd', realistic[:300])
    shards.pack(tmp_path / 'd', 33, tmp_path / 's')
    with pytest.raises(UserError, match='--packing=best_fit: .* holds shards, whose rows are fixed'):
        PackedRows(shards.open_data(tmp_path / 's', 32, VOCAB))
    with pytest.raises(UserError, match='--document_starts: .* holds shards, whose rows are fixed'):
        DocumentStarts(shards.open_data(tmp_path / 's', 32, VOCAB), 0.1)


# ---- in a run

RUN = ['--packing=best_fit', '--document_mask=true', '--max_steps=8', '--sample_interval=4']


def test_a_run_says_what_is_packed_and_resumes_exactly_and_evaluates(corpus, tmp_path):
    import checkpoint
    import evaluate
    code, said = finish(arguments(corpus, tmp_path / 'whole', *RUN))
    assert code == 0 and 'packing: ' in said and '% of them is text' in said, said
    _, state = checkpoint.find(tmp_path / 'whole')
    eot = json.loads((corpus / 'meta.json').read_text())['eot_id']
    assert state['config']['eot_id'] == eot and state['config']['document_mask'] is True
    assert finish(arguments(corpus, tmp_path / 'parts', *RUN, '--max_steps=4', '--schedule=constant'))[0] == 0
    assert finish(arguments(corpus, tmp_path / 'same', *RUN, '--schedule=constant'))[0] == 0
    code, said = finish(arguments(corpus, tmp_path / 'parts', *RUN, '--schedule=constant', '--resume=auto'))
    assert code == 0, said
    assert losses(tmp_path / 'parts')[-3:] == losses(tmp_path / 'same')[-3:]
    model, _ = checkpoint.load_model(tmp_path / 'whole', 'cpu')
    assert model.config.document_mask and model.config.eot_id == eot
    evaluate.main([str(tmp_path / 'whole'), '--device=cpu'])
    code, said = finish(arguments(corpus, tmp_path / 'whole', *RUN, '--document_mask=false', '--resume=auto'))
    assert code == 2 and "document_mask is True in the checkpoint, False in the config" in said


def test_two_processes_train_like_one(corpus, tmp_path):
    words = [*RUN, '--mixer=resonance', '--ffn=gelu', '--dropout=0', '--sample_interval=0', '--max_steps=4']
    assert finish(arguments(corpus, tmp_path / 'one', *words))[0] == 0
    codes, said = finish_ranks(arguments(corpus, tmp_path / 'two', *words), 2)
    assert codes == [0, 0], said
    for a, b in zip(losses(tmp_path / 'one'), losses(tmp_path / 'two'), strict=True):
        assert a[2] == pytest.approx(b[2], rel=1e-4)


def test_a_checkpoint_whose_mask_has_no_end_of_text_is_refused():
    import checkpoint
    with pytest.raises(UserError, match='document_mask=True needs eot_id'):
        checkpoint.model_config({'config': {'document_mask': True}, 'step': 0}, 'x.pt')


def test_data_without_an_end_of_text_is_refused(tmp_path):
    from corpora import shards
    rows = np.random.default_rng(0).integers(0, 50, (40, 33)).astype(np.uint16)
    (tmp_path / 'rows').mkdir()
    np.save(tmp_path / 'rows/a.npy', rows)
    shards.split(tmp_path / 'rows', tmp_path / 's', 0.2)
    code, said = finish(arguments(tmp_path / 's', tmp_path / 'run', '--document_mask=true', '--vocab_size=50'))
    assert code == 2 and 'has no tokenizer.json, so it is unknown which id ends a document' in said, said
    code, said = finish(arguments(tmp_path / 's', tmp_path / 'run', '--packing=worst', '--vocab_size=50'))
    assert code == 2 and "packing='worst' is not one of stream, best_fit" in said


# ----------------------------------------------------------------------------------------------------------------------
# --document_starts

def with_starts(path, lengths, share, shards=1):
    ids = np.concatenate(corpus_of(lengths))
    data = TokenData(write(path, {'train': np.array_split(ids, shards), 'val': [np.arange(300) % EOT]}), T, VOCAB)
    return DocumentStarts(data, share), data, ids


@pytest.mark.parametrize('shards', [1, 3])
def test_the_extra_windows_begin_with_an_end_of_text_token_and_the_plain_ones_stay(tmp_path, shards):
    data, plain, ids = with_starts(tmp_path / 'd', realistic[:400], 0.25, shards)
    assert data.n_windows == plain.n_windows + round(plain.n_windows / 3)
    windows = np.arange(data.n_windows)
    x, y = data.gather('train', windows)
    assert (x[:plain.n_windows] == plain.gather('train', windows[:plain.n_windows])[0]).all()
    assert (x[plain.n_windows:, 0] == EOT).all() and (x[:, 1:] == y[:, :-1]).all()
    begins = [data.position('train', window) for window in windows[plain.n_windows:]]
    assert begins == sorted(begins) and begins[-1] > 0.9 * len(ids), 'they come from all of the corpus'
    for begin, row, targets in zip(begins, x[plain.n_windows:], y[plain.n_windows:]):
        assert (ids[begin:begin + T + 1] == np.append(row, targets[-1])).all()
    assert (data.val_batch(data.val_windows())[0] == plain.val_batch(plain.val_windows())[0]).all()


def test_an_epoch_has_each_window_once_and_the_share_of_document_starts_that_was_asked_for(tmp_path):
    data, _, _ = with_starts(tmp_path / 'd', realistic[:400], 0.25)
    rows = np.concatenate([data.rows(step, 0, 4, 4, seed=7) for step in range(-(-data.n_windows // 4))])[:data.n_windows]
    assert sorted(rows) == list(range(data.n_windows))
    assert (rows >= data.plain_windows).mean() == pytest.approx(0.25, abs=0.01)


def test_a_corpus_of_one_document_has_no_start_to_find_and_still_gives_whole_windows(tmp_path):
    data, _, ids = with_starts(tmp_path / 'd', [40 * T], 0.5)
    x, _ = data.gather('train', np.arange(data.n_windows))
    begins = [data.position('train', window) for window in range(data.plain_windows, data.n_windows)]
    assert len(begins) == data.plain_windows and max(begins) + T + 1 <= len(ids)
    assert (x[-1] == ids[begins[-1]:begins[-1] + T]).all()


def test_the_search_for_a_start_ends_soon_in_a_corpus_of_one_long_document(tmp_path, monkeypatch):
    monkeypatch.setattr('corpora.packing.SEARCHED', 8)
    monkeypatch.setattr('corpora.packing.SEARCHES', 3)
    data, _, ids = with_starts(tmp_path / 'd', [60, 900, 300], 0.5)
    begins = [data.position('train', window) for window in range(data.plain_windows, data.n_windows)]
    targets = [j * data.last // data.extra_windows for j in range(data.extra_windows)]
    ends = [int(np.flatnonzero(ids[target:target + 3 * 8] == EOT)[0]) + target
            if EOT in ids[target:target + 3 * 8] else target for target in targets]
    assert begins == ends and any(b > t for b, t in zip(begins, targets)) and any(b == t for b, t in zip(begins, targets))


def trained_on(data, steps=200, rate=2e-2, seed=3):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=VOCAB, block_size=T, n_layer=1, n_embd=32, n_head=2, ffn='trix', trix_tiles=2, trix_top_k=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        x, y = map(torch.from_numpy, data.batch(step, 0, 16, 16, seed=seed))
        model(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def of_topics(documents, words=290):
    """Documents that use three words each and repeat none at once: a word, its separator, another word, ..., a word, the end.

    Their length is a multiple of T, so that no plain window begins with an end-of-text token."""
    draw, ids = np.random.default_rng(0), []
    for _ in range(documents):
        topic = draw.choice(words, 3, replace=False)
        chosen = draw.choice(topic, 4 * T)
        ids += np.stack((chosen, words + chosen % 4), 1).flatten().tolist()[:-1] + [EOT]
    return np.array(ids)


def test_a_model_trained_on_document_starts_repeats_no_token_at_a_start_and_no_sample_is_empty(tmp_path):
    ids = of_topics(120)
    data = TokenData(write(tmp_path / 'd', {'train': [ids], 'val': [ids[:300]]}), T, VOCAB)
    assert not (ids[1:] == ids[:-1]).any(), 'the corpus repeats no token at once'
    model, plain = trained_on(DocumentStarts(data, 0.2)), trained_on(data)
    start, word = torch.full((290, 1), EOT), torch.arange(290)[:, None]
    with torch.no_grad():
        first = model(start[:1])[0, -1].softmax(-1)
        second = model(torch.cat((start, word), 1))[:, -1].softmax(-1).gather(1, word)
        without = plain(start[:1])[0, -1].softmax(-1)
    assert first[EOT] < 0.05 and second.mean() < 0.02
    assert first[:290].sum() > 0.9, 'a document begins with a word'
    assert without[EOT] > 0.1 and without[:290].sum() < 0.2, 'without document starts a model does worse'
    drawn = torch.stack(list(generate(model, start[:200], VOCAB, 8, temperature=1.0, eot_id=EOT)))  # (8, 200)
    assert (drawn[0] != EOT).all() and (drawn[1:] != EOT).float().mean() > 0.95


@pytest.mark.parametrize('options, message', [
    (['--document_starts=1'], 'document_starts=1.0 must lie in [0, 1)'),
    (['--document_starts=-0.1'], 'document_starts=-0.1 must lie in [0, 1)'),
    (['--document_starts=0.1', '--packing=best_fit'], 'document_starts=0.1 is for packing=stream'),
])
def test_document_starts_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError) as error:
        train.load(options)
    assert message in str(error.value)
