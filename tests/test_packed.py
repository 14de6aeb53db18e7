"""Packed models with 2 bits per weight equal the trained models, and files that are not packed models are refused."""
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import export
from deploy import packed
import sample
from configurator import UserError
from kernels import BitProduct, ternary_codes
from model import GPT, BitLinear, GPTConfig, TriX
from runs import arguments, finish, lines

CPU = torch.device('cpu')
SMALL = dict(block_size=24, vocab_size=97, n_layer=2, n_head=2, n_embd=24)
VARIANTS = {
    'bitnet': dict(ffn='swiglu', linear='bitnet'),
    'bitnet, odd widths, biases': dict(ffn='gelu', linear='bitnet', d_ff=37, bias=True, sub_norm=False, norm='layernorm', positions='learned',
                                       tie_embeddings=False),
    'bitnet FFN': dict(ffn='bitnet', n_kv_head=1, embed_taps=3, embed_norm=True, qk_norm=True),
    'relu2': dict(ffn='relu2', linear='bitnet', positions='none', logit_softcap=3.0),
    'no FFN': dict(ffn='none', linear='bitnet'),
    'trix': dict(ffn='trix', trix_hidden=19),
    'trix, int8, shared': dict(ffn='trix', trix_shared=True, act_bits=8, linear='bitnet'),
    'trix, hash': dict(ffn='trix', trix_router='hash'),
    'trix, cut': dict(ffn='trix', trix_cut='gelu', trix_shared=True, bias=True),
    'trix, cut from a swiglu': dict(ffn='trix', trix_cut='swiglu', trix_hidden=13, act_bits=8, bias=True),
    'resonance': dict(mixer='resonance', ffn='trix', linear='bitnet'),
    'hybrid': dict(mixer='resonance', attention_every=2, ffn='bitnet', qk_norm=True),
}
each_variant = pytest.mark.parametrize('name', VARIANTS)
needs_library = pytest.mark.skipif(packed.library() is None, reason='no C++ compiler')


def trained(**keys):
    """A model that is not at its start: norms, biases and balances are something."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **keys}))
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(('bias', 'balance')) or p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def written(model, path, embeddings='float32'):
    state = {'config': asdict(model.config), 'tokenizer': None, 'step': 7, 'data': {'path': 'nowhere'}}
    packed.write(path, packed.pack(model, embeddings), embeddings, state)
    return path


def ids(n=20, rows=2):
    return torch.randint(97, (rows, n), generator=torch.Generator().manual_seed(1))


# ---- codes and products

@pytest.mark.parametrize('shape', [(1, 1), (3, 4), (5, 7), (2, 3, 130), (4, 0)])
def test_codes_come_back(shape):
    codes = torch.randint(-1, 2, shape).float()
    bits = packed.pack_codes(codes)
    assert bits.shape == (*shape[:-1], -(-shape[-1] // 4)) and bits.dtype == torch.uint8
    assert torch.equal(packed.unpack_codes(bits, shape[-1]), codes)


def test_the_first_code_is_in_the_low_bits():
    assert packed.pack_codes(torch.tensor([1.0, -1, 0, 1, -1])).tolist() == [0b01_00_10_01, 0b10]


@pytest.fixture(params=['as here', 'AVX2', ''])
def library(request, monkeypatch):
    """The library as it is built for this machine, and as for those with AVX2 alone and without it."""
    if request.param != 'as here':
        flags = [flag for flag in packed.flags() if flag == '-mavx2' and request.param or not flag.startswith('-mavx')]
        found = packed.compiled(flags)
        if found.instructions().decode() != request.param:
            pytest.skip('this machine has no AVX2')
        monkeypatch.setattr(packed, 'library', lambda: found)


@needs_library
@pytest.mark.parametrize('K, M', [(1, 1), (3, 7), (5, 2), (128, 9), (129, 33), (513, 3), (1024, 5), (3079, 4)])
def test_products_equal_the_plain_formula_to_the_bit(K, M, library):
    draw = torch.Generator().manual_seed(K)
    codes, x = torch.randint(-1, 2, (M, K), generator=draw).float(), 3 * torch.randn(11, K, generator=draw)
    x[1], x[2, K // 2] = 0, 1e4
    bits, scale = packed.pack_codes(codes), torch.tensor(0.37)
    assert torch.equal(packed.ternary(x, bits, scale.item(), 1), BitProduct.apply(x, codes, codes, scale))
    s = 1 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5) * (127 * 65536)
    exact = ((x * s).round().double() @ codes.double().T).float() * (scale / s)
    assert torch.equal(packed.ternary(x, bits, scale.item(), 3), exact)
    true = 0.37 * (x.double() @ codes.double().T)
    assert (packed.ternary(x, bits, scale.item(), 3) - true).abs().max() <= 1e-6 * x.abs().amax() * K ** 0.5


@needs_library
@pytest.mark.parametrize('K, V', [(1, 1), (15, 3), (16, 2), (100, 9), (2100, 2)])
def test_rows_of_int8_are_multiplied_to_16_bits(K, V, library):
    draw = torch.Generator().manual_seed(K)
    rows, scale = torch.randint(-127, 128, (V, K), generator=draw, dtype=torch.int8), torch.rand(V, generator=draw)
    x = torch.randn(3, K, generator=draw)
    head = packed.Int8Head(rows, scale)
    assert head(x).shape == (3, V)
    assert (head(x) - x @ head.weight.T).abs().max() < 2e-5 * x.abs().max() * 127 * K ** 0.5


@needs_library
def test_all_threads_compute_the_same(monkeypatch):
    model = packed.build(*opened(trained(ffn='trix', linear='bitnet', n_embd=256), 'int8'))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            cache = model.new_cache(1)
            found.append(torch.cat([model(ids()[:1, i:i + 1], cache=cache) for i in range(8)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def opened(model, embeddings='float32'):
    """The arguments of packed.build for a model that is packed, without a file."""
    return model.config, {'packed': packed.pack(model, embeddings), 'embeddings': embeddings}, 'here', CPU


# ---- models

@each_variant
def test_a_packed_model_equals_the_trained_model(name, tmp_path):
    model = trained(**VARIANTS[name])
    other, state = packed.load_model(written(model, tmp_path / 'x.safetensors'), CPU)
    assert state['step'] == 7 and other.config == model.config and not other.training
    seen = {}

    def keep(of):
        return lambda module, inputs, output: seen.update({of: (inputs[0], output)})
    for key, module in model.named_modules():
        if isinstance(module, (BitLinear, TriX)) and key:
            module.register_forward_hook(keep(key))
    logits = model(ids())
    assert torch.allclose(other(ids()), logits, rtol=0, atol=1e-5)
    assert other(ids(), ids()).item() == pytest.approx(model(ids(), ids()).item(), abs=1e-6)
    for key, (x, y) in seen.items():  # layer by layer, from the same inputs
        module = other.get_submodule(key)
        if VARIANTS[name].get('trix_router') == 'hash':
            module.idx = ids()
        assert (module(x) - y).norm() <= 1e-5 * y.norm(), key
        if VARIANTS[name].get('trix_router') == 'hash':
            module.idx = ids()[:1, :1]
        assert (module(x[:1, :1]) - y[:1, :1]).norm() <= 1e-5 * y[:1, :1].norm(), key


@each_variant
@pytest.mark.parametrize('rows', [1, 3])
def test_decoding_step_by_step_equals_the_whole(name, rows):
    model = packed.build(*opened(trained(**VARIANTS[name])))
    whole, cache = model(ids(rows=rows)), model.new_cache(rows)
    parts = [model(ids(rows=rows)[:, :5], cache=cache), *(model(ids(rows=rows)[:, i:i + 1], cache=cache) for i in range(5, 20))]
    assert cache.pos == 20 and torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize('embeddings, apart', [('float32', 1e-5), ('bfloat16', 0.3), ('int8', 0.3)])
@pytest.mark.parametrize('tied', [True, False])
def test_embeddings_of_every_kind(embeddings, apart, tied):
    model = trained(ffn='trix', tie_embeddings=tied)
    other = packed.build(*opened(model, embeddings))
    assert (other(ids()) - model(ids())).abs().max() < apart
    cache = other.new_cache(1)
    steps = torch.cat([other(ids()[:1, i:i + 1], cache=cache) for i in range(20)], 1)
    assert torch.allclose(steps, other(ids()[:1]), rtol=0, atol=1e-4)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize('keys', [dict(), dict(positions='learned', embed_norm=True), dict(embed_taps=1),
                                  dict(embed_taps=4, embed_norm=True, ffn='trix')])
@pytest.mark.parametrize('embeddings', ['float32', 'int8'])  # with TriX, int8 has a second byte
def test_the_embedding_of_the_library_is_that_of_the_model(keys, embeddings, monkeypatch):
    model, seen = packed.build(*opened(trained(**{'linear': 'bitnet', **keys}), embeddings)), []
    monkeypatch.setattr(model, 'by_library', lambda x, *_: seen.append(x.clone()) or x)
    cache, tokens = model.new_cache(2), ids(9)
    wanted = model.embed(tokens)
    model(tokens[:, :3], cache=cache)
    for t in range(3, 9):
        model(tokens[:, t:t + 1], cache=cache)
        cache.pos += 1  # by_library would do it
    assert torch.allclose(torch.cat(seen, 1), wanted[:, 3:], rtol=1e-6, atol=1e-6)
    with pytest.raises(AssertionError, match='no token 97'):
        model(torch.tensor([[97], [1]]), cache=cache)


@torch.no_grad()
def test_int8_embeddings_do_not_move_the_routing_of_trix():
    """The second byte of the input embedding makes the worst log-probability at least ten times closer than one byte does."""
    model, off = trained(ffn='trix', embed_norm=True, n_layer=4), {}
    one_byte = packed.pack(model, 'int8')
    for name, tensors in (('two', dict(one_byte)), ('one', {key: value for key, value in one_byte.items() if key != 'wte.weight.low'})):
        other = packed.build(model.config, {'packed': tensors, 'embeddings': 'int8'}, 'here', CPU)
        off[name] = (other.wte.weight - model.wte.weight).abs().max() / model.wte.weight.abs().max()
        if name == 'two':
            hidden = [net.soft_targets(ids(), 1.0)[0] for net in (model, other)]
            assert (hidden[0] - hidden[1]).abs().max() < 1e-3  # another tile would change a unit-sized vector by far more
    assert off['two'] < 2e-5 and off['one'] > 2e-3


def test_only_models_that_route_by_values_have_a_second_byte_and_format_2(tmp_path):
    for keys, low in ((dict(ffn='trix'), True), (dict(ffn='trix', trix_router='hash'), False), (dict(linear='bitnet'), False)):
        path = written(trained(**keys), tmp_path / 'x.safetensors', 'int8')
        with packed.safe_open(path, 'pt') as file:
            assert file.metadata()['format'] == f'nanotrix-packed-{1 + low}' and ('wte.weight.low' in file.keys()) == low


def test_int8_files_of_format_1_still_load(good, tmp_path):
    def older(tensors, metadata):
        del tensors['wte.weight.low']
        metadata['format'] = 'nanotrix-packed-1'
    model, _ = packed.load_model(changed(good, tmp_path / 'x.safetensors', older), CPU)
    newer, _ = packed.load_model(good, CPU)
    assert model.wte.low is None and newer.wte.low is not None and (model.wte.weight - newer.wte.weight).abs().max() > 0
    assert torch.equal(model.lm_head.weight, newer.lm_head.weight)  # the head has one byte in both


def test_only_the_tiles_that_are_chosen_are_read():
    model = packed.build(*opened(trained(ffn='trix', n_layer=1, n_head=1)))
    trix, x = model.blocks[0].ffn, torch.randn(1, 1, 24)
    tiles, _ = trix.route(x[0], trix.signatures, trix.signatures)
    y = trix(x)
    for e in set(range(8)) - set(tiles.flatten().tolist()):
        trix.up_scale[e] = trix.down_scale[e] = torch.nan
    assert torch.equal(trix(x), y)


def test_without_a_compiler_a_warning_is_printed_and_results_are_equal(monkeypatch, capsys):
    model = trained(ffn='trix', linear='bitnet')
    other = packed.build(*opened(model))
    from torch.utils import cpp_extension
    monkeypatch.setattr(cpp_extension, 'get_cxx_compiler', lambda: 'no-such-compiler')
    monkeypatch.setattr(packed, 'flags', lambda: ['-Dnot-there-yet'])
    packed.library.cache_clear()
    try:
        cache = other.new_cache(1)
        steps = torch.cat([other(ids()[:1, i:i + 1], cache=cache) for i in range(20)], 1)
    finally:
        packed.library.cache_clear()
    assert torch.allclose(steps, model(ids()[:1]), rtol=0, atol=1e-5)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('ternary.cpp cannot be compiled here') and 'no-such-compiler' in line


# ---- the file

def test_ternary_matrices_take_a_sixteenth(tmp_path):
    model = trained(ffn='swiglu', linear='bitnet', n_embd=64, n_head=4)
    tensors = packed.pack(model)
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            assert 16 * tensors[f'{name}.weight.codes'].nbytes == module.weight.nbytes
            codes, scale = ternary_codes(module.weight)
            assert torch.equal(packed.unpack_codes(tensors[f'{name}.weight.codes'], module.in_features), codes)
            assert tensors[f'{name}.weight.scale'].item() == scale.item()


def test_a_model_without_ternary_matrices_is_not_packed():
    with pytest.raises(UserError, match='this model has no ternary matrix.*ffn=gelu, linear=dense'):
        packed.pack(trained())


@pytest.mark.parametrize('embeddings', ['bfloat16', 'int8'])
@pytest.mark.parametrize('keys', [
    dict(mixer='resonance', ffn='swiglu'), dict(ffn='resonance', bias=True), dict(ffn='gelu'),
    dict(mixer='resonance', attention_every=2, ffn='trix', trix_router='hash')], ids=str)
@torch.no_grad()
def test_dense_matrices_are_packed_in_16_bits_and_decoded_as_the_rounded_model(keys, embeddings, tmp_path):
    model, path = trained(**keys), tmp_path / 'x.safetensors'
    state = {'config': asdict(model.config), 'tokenizer': None, 'step': 7, 'data': {'path': 'nowhere'}}
    packed.write(path, packed.pack(model, embeddings, 'bfloat16'), embeddings, state, 'bfloat16')
    other, opened_state = packed.load_model(path, CPU)
    with packed.safe_open(path, 'pt') as file:
        assert file.metadata()['format'] == 'nanotrix-packed-3'
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}
    assert opened_state['matrices'] == 'bfloat16'
    dense = {name for name, dtype in dtypes.items() if name.endswith('_proj.weight') and dtype == torch.bfloat16}
    assert len(dense) >= 4 and all(dtype == torch.float32 for name, dtype in dtypes.items()
                                   if name.endswith(('nu', 'theta', 'magnitude', 'phase', 'D', 'short', 'norm.weight')))
    for name, p in model.named_parameters():
        if name in dense:
            p.copy_(p.bfloat16().float())
        elif name == 'wte.weight':
            p.copy_(other.wte.weight)  # rounded to its own type
    expected = model(ids())
    assert (other(ids()) - expected).abs().max() < 1e-4
    cache = other.new_cache(2)
    decoded = torch.cat([other(part, cache=cache) for part in ids().split([5, *[1] * 15], 1)], 1)
    assert (decoded - expected).abs().max() < 1e-4


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    return written(trained(ffn='trix', linear='bitnet'), tmp_path_factory.mktemp('packed') / 'good.safetensors', 'int8')


def changed(good, path, change, rehash=True):
    """A copy of a packed file after change(tensors, metadata), with a hash that is right again."""
    with packed.safe_open(good, 'pt') as file:
        metadata = file.metadata()
    tensors = load_file(good)
    change(tensors, metadata)
    if rehash:
        metadata['sha256'] = packed.digest(metadata, tensors)
    save_file(tensors, path, metadata)
    return path


CODES = 'blocks.0.mixer.q_proj.weight.codes'
DAMAGES = {
    'missing: blocks.0.ffn.up.scale': lambda t, m: t.pop('blocks.0.ffn.up.scale'),
    'unexpected: more': lambda t, m: t.update(more=torch.zeros(1)),
    f'{CODES} has a code of value 3': lambda t, m: t[CODES].__setitem__((0, 0), 0b11_00),
    'wte.weight.scale has values that are not finite': lambda t, m: t['wte.weight.scale'].__setitem__(0, torch.inf),
    'norm.weight is torch.float64': lambda t, m: t.update({'norm.weight': t['norm.weight'].double()}),
    'wte.weight is torch.int8 .96, 24., but its config': lambda t, m: t.update({'wte.weight': t['wte.weight'][:96]}),
    'not a packed model of this project': lambda t, m: m.update(format='other'),
    'or one of a later version': lambda t, m: m.update(format='nanotrix-packed-9'),
    'wte.weight.low is torch.int16': lambda t, m: t.update({'wte.weight.low': t['wte.weight.low'].short()}),
    'no valid step': lambda t, m: m.update(step='"7"'),
    'broken metadata': lambda t, m: m.update(config='{'),
    "embeddings='int4' is not one of": lambda t, m: m.update(embeddings='int4'),
    'wrong type': lambda t, m: m.update(config=json.dumps({**json.loads(m['config']), 'n_layer': 'two'})),
    'n_embd=24 is not divisible by n_head=5': lambda t, m: m.update(config=json.dumps({**json.loads(m['config']), 'n_head': 5})),
}


@pytest.mark.parametrize('what', DAMAGES)
def test_a_file_that_does_not_match_its_config_is_refused(good, tmp_path, what):
    path = changed(good, tmp_path / 'x.safetensors', DAMAGES[what])
    with pytest.raises(UserError, match=what) as error:
        packed.load_model(path, CPU)
    assert str(path) in str(error.value)


def test_a_wrong_hash_is_refused(good, tmp_path):
    path = changed(good, tmp_path / 'x.safetensors', lambda t, m: t[CODES].__setitem__((0, 0), 0b01), rehash=False)
    with pytest.raises(UserError, match='its content does not match its hash'):
        packed.load_model(path, CPU)
    path = changed(good, tmp_path / 'y.safetensors', lambda t, m: m.update(step='8'), rehash=False)
    with pytest.raises(UserError, match='its content does not match its hash'):
        packed.load_model(path, CPU)


@pytest.mark.parametrize('keep', [0, 5, 200, -1])
def test_a_truncated_file_is_refused(good, tmp_path, keep):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(UserError, match='truncated, damaged, or not a safetensors file'):
        packed.load_model(path, CPU)


def test_changed_bytes_at_random_places_are_noticed(good, tmp_path):
    content, draw, path = good.read_bytes(), np.random.default_rng(0), tmp_path / 'x.safetensors'
    for at in draw.integers(0, len(content), 60):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.integers(8)]) + content[at + 1:])
        with pytest.raises(UserError):
            packed.load_model(path, CPU)


# ---- the command

@pytest.fixture(scope='module')
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    code, said = finish(arguments(corpus, folder / 'run', '--ffn=trix', '--linear=bitnet', '--dropout=0', '--max_steps=5', '--sample_interval=0'))
    assert code == 0, said
    return folder / 'run'


def said_by(capsys, main, *words):
    main([*map(str, words), '--device=cpu'])
    return capsys.readouterr().out


def test_export_sample_and_evaluate(run, tmp_path, capsys):
    text = said_by(capsys, export.main, 'pack', run)
    assert 'blocks.0.ffn.up 4 x 16 x 16 4,096 -> 256 bytes: 16x' in re.sub(' +', ' ', text)
    assert re.search(r'tokens of .*: loss (\d\.\d{4}) -> \1, same most likely token for 100.00 %, largest difference', text.splitlines()[-1])
    file = run / 'packed.safetensors'
    assert f'{file.stat().st_size:,} bytes' in text
    assert said_by(capsys, sample.main, file, '--max_new_tokens=20') == said_by(capsys, sample.main, run, '--max_new_tokens=20')
    losses = [json.loads(said_by(capsys, evaluate.main, path).splitlines()[-1])['loss'] for path in (file, run)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for embeddings in ('bfloat16', 'int8'):
        said_by(capsys, export.main, 'pack', run, tmp_path / f'{embeddings}.safetensors', f'--embeddings={embeddings}')
    sizes = [path.stat().st_size for path in (file, tmp_path / 'bfloat16.safetensors', tmp_path / 'int8.safetensors')]
    assert sizes[0] > sizes[1] and sizes[0] > sizes[2]  # the input embedding has two bytes in both, because TriX routes by it


def test_a_packed_teacher_equals_the_teacher_from_its_run(run, corpus, tmp_path):
    model, state = packed.load_model(run, CPU)
    packed.write(tmp_path / 'teacher.safetensors', packed.pack(model), 'float32', state)
    losses = []
    for teacher in (run, tmp_path / 'teacher.safetensors'):
        out = tmp_path / f'student{len(losses)}'
        code, said = finish(arguments(corpus, out, '--dropout=0', '--max_steps=2', '--warmup_steps=0', '--sample_interval=0',
                                      f'--distill_from={teacher}', '--distill_weight=1.0'))
        assert code == 0, said
        losses.append([line['loss'] for line in lines(out, 'train')])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize('words, what', [
    ([], 'no command: name one of pack'), (['pak', 'RUN'], 'pak: name one of pack'), (['pack'], 'name a run directory'),
    (['pack', 'RUN', 'x.bin'], 'x.bin: the name of this export must end in .safetensors'), (['pack', 'RUN', '--embeddings=int4'], "embeddings='int4' is not one of"),
    (['pack', 'nowhere'], 'nowhere: no such run or checkpoint'), (['pack', 'PACKED'], 'is already packed'),
    (['pack', 'RUN', 'nowhere/x.safetensors'], 'nowhere/x.safetensors: could not be written')])
def test_what_cannot_be_exported_is_refused(run, good, words, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [{'RUN': str(run), 'PACKED': str(good)}.get(word, word) for word in words]
    with pytest.raises(UserError, match=what):
        export.main(words)
    assert not any(Path().iterdir())


def test_sampling_takes_little_more_memory_than_the_file(tmp_path):
    """What a file of 21 MB adds to Python and torch, beside 12 MB for what sampling loads: not an fp32 copy of it, which would be 235."""
    if packed.library() is None:
        pytest.skip('no C++ compiler')
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=8000, n_layer=4, n_embd=1024, n_head=8, ffn='swiglu', linear='bitnet')).eval()
    path = written(model, tmp_path / 'x.safetensors', 'int8')
    code = ('import sys, torch\n'
            'from deploy import packed\n'
            'from runtime import device\n'
            'from sample import generate\n'
            'before = device.peak_memory_gb(torch.device("cpu"))\n'
            'model, _ = packed.load_model(sys.argv[1], torch.device("cpu"))\n'
            'list(generate(model, torch.zeros(1, 1, dtype=torch.int64), 8000, 8))\n'
            'print((device.peak_memory_gb(torch.device("cpu")) - before) * 1e9)')
    done = subprocess.run([sys.executable, '-c', code, path], cwd=Path(packed.__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5 * path.stat().st_size + 12e6


# ---- on a GPU

TRITON = """
import sys, torch
from deploy import packed
from kernels import int8_codes
from model import GPT, GPTConfig
from test_packed import ids, opened, trained
from deploy import ternary_triton

for K, M, E, N, k in ((24, 13, 1, 1, 1), (37, 9, 4, 2, 3), (300, 20, 2, 1, 2), (1, 1, 1, 3, 1)):
    codes, scale, x, chosen = torch.randint(-1, 2, (E, M, K)).float(), torch.rand(E) + 0.1, torch.randn(N, K), torch.randint(E, (N * k,))
    q, size = int8_codes(x)
    plain = torch.stack([q[p // k] @ codes[e].T * (scale[e] / size[p // k]) for p, e in enumerate(chosen.tolist())])
    assert torch.equal(ternary_triton.product(q.to(torch.int8), size.flatten(), packed.pack_codes(codes), scale, chosen), plain)
    plain = torch.stack([x[p // k] @ codes[e].T * scale[e] for p, e in enumerate(chosen.tolist())])
    assert (ternary_triton.product(x, None, packed.pack_codes(codes), scale, chosen) - plain).abs().max() < 1e-5

assert packed.check_triton(torch.device('cpu')) and packed.TRITON_DEVICES == {'cpu'}
packed.TRITON_DEVICES.clear()
small, cpp = packed.is_small_batch, packed.can_use_cpp
for keys in (dict(ffn='swiglu', linear='bitnet'), dict(ffn='trix', trix_shared=True), dict(ffn='trix', act_bits=8), dict(ffn='trix', trix_cut='swiglu', bias=True)):
    model = packed.build(*opened(trained(**keys)))
    whole = model(ids())
    packed.is_small_batch, packed.can_use_cpp = (lambda x: True), (lambda x: False)
    assert torch.allclose(model(ids()[:, :6]), whole[:, :6], rtol=0, atol=1e-5), keys
    packed.is_small_batch, packed.can_use_cpp = small, cpp
"""


def test_the_kernel_of_a_gpu_equals_the_plain_formula():
    """In Triton's interpreter, which needs no GPU."""
    pytest.importorskip('triton', reason='comes with torch for CUDA')
    root = Path(packed.__file__).parent.parent
    done = subprocess.run([sys.executable, '-c', TRITON], cwd=root, capture_output=True, text=True,
                          env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': os.pathsep.join(map(str, (root, root / 'tests', *sys.path)))})
    assert done.returncode == 0, done.stderr


def test_where_triton_fails_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(packed, 'ternary_product', lambda *inputs: torch.zeros(1, 13))
    packed.check_triton.cache_clear()
    assert not packed.check_triton(CPU) and not packed.check_triton(CPU) and not packed.TRITON_DEVICES
    packed.check_triton.cache_clear()
    assert capsys.readouterr().err == ('packed weights are multiplied in plain PyTorch, slowly, because Triton fails: '
                                       'its products are wrong\n')


def test_a_checkpoint_within_the_ternary_warm_up_is_read_as_trained_and_not_exported(corpus, tmp_path, capsys):
    out = tmp_path / 'run'
    options = ['--ternary_warmup=0.5', '--max_steps=8', '--warmup_steps=1', '--save_interval=2', '--keep=0', '--sample_interval=0']
    assert finish(arguments(corpus, out, *options))[0] == 0
    middle = out / 'checkpoints' / 'step_0000002.pt'
    model, _ = packed.load_model(middle, torch.device('cpu'))
    assert model.trix_layers()[0].share == 0.5 and 'its weights are 50 % ternary' in capsys.readouterr().err
    with pytest.raises(UserError, match='step 2 is in the ternary warm-up, its weights are 50 % ternary: export'):
        export.main(['pack', str(middle), str(tmp_path / 'x.safetensors'), '--device=cpu'])
    assert 'same most likely token' in said_by(capsys, export.main, 'pack', out)  # of step 8
