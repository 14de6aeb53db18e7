"""Pretrained models compute the same outputs here, decide the shape of a run, and are refused if they are unsupported."""
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import evaluate
import export
import sample
import settings
from configurator import UserError
from deploy import huggingface, packed, pretrained
from deploy.parity import without_int8
from runs import finish
from test_packed import trained
from tokenizer import equivalent

needs_transformers = pytest.mark.skipif(not find_spec('transformers'), reason='a development requirement')
GPT2 = {'architectures': ['GPT2LMHeadModel'], 'vocab_size': 300, 'n_positions': 32, 'n_embd': 16, 'n_layer': 2, 'n_head': 2}
LLAMA = {'architectures': ['LlamaForCausalLM'], 'vocab_size': 300, 'max_position_embeddings': 64, 'hidden_size': 32,
         'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 48}


def ids(n=20, rows=2):
    return torch.randint(300, (rows, n), generator=torch.Generator().manual_seed(1))


def written(folder, content, change=lambda tensors: None, name='model.safetensors'):
    """A directory with this config.json and random weights, after change(tensors)."""
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(content))
    kind, config, _ = pretrained.read_shape(folder)
    torch.manual_seed(0)
    tensors = {key: 0.1 * torch.randn(shape) for key, (shape, _) in pretrained.expected_tensors(kind, config).items()}
    change(tensors)
    save_file(tensors, folder / name)
    return folder


def saved(folder, name, content, **how):
    """The randomly initialised model of transformers with this config, saved to a directory."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = getattr(transformers, f'{name}Config')(**content, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    model = getattr(transformers, content['architectures'][0])(config).eval()
    for p in model.parameters():
        if p.dim() == 1:  # biases and norms that are not at their start
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder, **how)
    return model


# ---- the same function

@needs_transformers
@pytest.mark.parametrize('name, content, how', [
    ('GPT2', GPT2, {}),
    ('GPT2', {**GPT2, 'n_inner': 40, 'tie_word_embeddings': False}, {}),
    ('Llama', {**LLAMA, 'rms_norm_eps': 1e-5, 'tie_word_embeddings': True}, {'max_shard_size': '20KB'}),
    ('Llama', {**LLAMA, 'rms_norm_eps': 1e-3, 'rope_theta': 500.0, 'attention_bias': True, 'mlp_bias': True}, {})])
def test_logits_equal_those_of_transformers(name, content, how, tmp_path):
    other = saved(tmp_path / 'x', name, content, **how)
    assert (tmp_path / 'x' / 'model.safetensors.index.json').exists() == bool(how)
    model, state = packed.load_model(f'hf:{tmp_path / "x"}', 'cpu')
    with torch.no_grad():
        theirs, ours = other(ids()).logits, model(ids())
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() < 1e-4
    assert state['step'] == 0 and state['tokenizer'] is None


@needs_transformers
def test_an_exported_bitnet_comes_back(tmp_path):
    import transformers
    model = trained(vocab_size=300, ffn='swiglu', linear='bitnet', n_kv_head=1, d_ff=40)
    huggingface.write(tmp_path / 'x', model, {'tokenizer': None})
    back, _ = packed.load_model(f'hf:{tmp_path / "x"}', 'cpu')
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'x').eval()
    with torch.no_grad(), without_int8(back):
        assert (back(ids()) - other(ids()).logits).abs().max() < 1e-4
    assert (back(ids()) - model(ids())).abs().max() < 1e-4


def test_older_files_without_a_prefix_and_with_constants_are_read(tmp_path):
    whole = written(tmp_path / 'a', GPT2)

    def older(tensors):
        tensors |= {'h.0.attn.bias': torch.ones(1, 1, 32, 32), 'lm_head.weight': tensors['wte.weight'].clone()}
    old = written(tmp_path / 'b', GPT2, older)
    a, b = (packed.load_model(f'hf:{folder}', 'cpu')[0](ids()) for folder in (whole, old))
    assert torch.equal(a, b)


# ---- the shape of a run

def load(*words):
    return settings.load(list(words), import_pretrained=lambda: pretrained)


def test_the_model_decides_the_shape_of_a_run(tmp_path):
    folder = written(tmp_path / 'x', {**LLAMA, 'rope_theta': 5000})
    (tmp_path / 'a.py').write_text(f'init_from = "hf:{folder}"\nbatch_tokens = 2 * batch_size * block_size\n')
    config = load(str(tmp_path / 'a.py'))
    assert (config.n_embd, config.n_kv_head, config.ffn, config.rope_theta) == (32, 2, 'swiglu', 5000.0)
    assert config.block_size == 64 and config.batch_tokens == 2 * 16 * 64, 'a config file can compute with the shape'
    assert config.origin['n_embd'] == f'hf:{folder}' and f'hf:{folder}: ' in config.changes()
    assert load(f'--init-from=hf:{folder}', '--block_size=128').block_size == 128, 'rotary positions have no end'
    (folder / 'tokenizer.json').write_text('{}')
    assert load(f'--init_from=hf:{folder}').tokenizer == f'{folder}/tokenizer.json'


@pytest.mark.parametrize('words, said', [
    (['--n_layer=3', '--qk_norm'], ['command line: n_layer=3, but hf:DIR has n_layer=2: leave n_layer out',
                                    'command line: qk_norm=True, but hf:DIR has qk_norm=False: leave qk_norm out']),
    (['--block_size=64'], ['command line: block_size=64, but hf:DIR has block_size=32: leave block_size out, or give fewer'])])
def test_options_that_contradict_the_model_are_refused(words, said, tmp_path):
    folder = written(tmp_path / 'x', GPT2)
    with pytest.raises(UserError) as error:
        load(f'--init_from=hf:{folder}', *words)
    assert str(error.value).replace(str(folder), 'DIR').splitlines() == said


def test_the_preset_for_finetuning_needs_no_shape(tmp_path, monkeypatch):
    folder = written(tmp_path / 'x', GPT2 | {'n_positions': 512})
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda name, allow_patterns: {
        'openai-community/gpt2': folder}[name])
    config = load(str(Path(settings.__file__).parent / 'config' / 'finetune_shakespeare.py'))
    assert (config.n_layer, config.bias, config.positions, config.dataset, config.tokenizer) == (2, True, 'learned', 'shakespeare', 'gpt2')
    assert config.block_size == 256 and len(pretrained.load('gpt2', 256, say=print)['model']['wpe.weight']) == 256


# ---- what is refused

@pytest.mark.parametrize('content, said', [
    (GPT2 | {'activation_function': 'gelu'}, "activation_function='gelu' is not supported, only gelu_new or gelu_pytorch_tanh"),
    (GPT2 | {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True is not supported, only False'),
    (GPT2 | {'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon=1e-06 is not supported, only 1e-05'),
    (GPT2 | {'architectures': ['GPTNeoForCausalLM']}, "architectures=['GPTNeoForCausalLM']: expected one of GPT2LMHeadModel"),
    (GPT2 | {'architectures': {}}, 'architectures=[]: expected one of'),
    (GPT2 | {'n_layer': '2'}, "n_layer='2': expected int"), (GPT2 | {'n_layer': True}, 'n_layer=True: expected int'),
    (GPT2 | {'n_embd': 10**30}, 'n_embd=1000000000000000000000000000000: expected 1 to 1,048,576'),
    ({key: value for key, value in GPT2.items() if key != 'n_head'}, 'n_head is missing'),
    (GPT2 | {'n_head': 3}, 'n_embd=16 is not divisible by n_head=3'),
    (GPT2 | {'quantization_config': {'bits': 4}}, "quantization_config={'bits': 4} is not supported"),
    (LLAMA | {'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "type='linear' is not supported, only default"),
    (LLAMA | {'rope_parameters': {'rope_type': 'llama3'}}, "rope_type='llama3' is not supported, only default"),
    (LLAMA | {'rope_scaling': 2}, 'rope_scaling=2: expected an object'),
    (LLAMA | {'rope_theta': float('nan')}, 'rope_theta=nan: expected float'),
    (LLAMA | {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 is not supported'),
    (LLAMA | {'sliding_window': 4096}, 'sliding_window=4096 is not supported'),
    (LLAMA | {'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported, only silu"),
    (LLAMA | {'head_dim': 16}, 'head_dim=16 is not supported, only 8'),
    (LLAMA | {'attention_bias': True}, 'mlp_bias=False is not supported, only True'),
    (LLAMA | {'rms_norm_eps': float('inf')}, 'rms_norm_eps=inf: expected 1e-12 to 1e-2'),
    (LLAMA | {'architectures': ['BitNetForCausalLM']}, "hidden_act='relu2' is not supported, only silu")])
def test_an_unsupported_shape_is_named(content, said, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        pretrained.options(f'hf:{tmp_path}')
    assert f'{tmp_path}/config.json: {said}' in str(error.value)


def test_a_broken_config_is_one_line(tmp_path):
    for content, said in (('{', 'broken'), ('[]', 'broken (no JSON object)'), (None, 'No such file')):
        (tmp_path / 'config.json').unlink(missing_ok=True)
        if content:
            (tmp_path / 'config.json').write_text(content)
        with pytest.raises(UserError, match=f'config.json: {said}'.replace('(', r'\(').replace(')', r'\)')):
            pretrained.options(f'hf:{tmp_path}')


def scaled(factor):
    def change(tensors):
        tensors['h.0.mlp.c_fc.weight'] = tensors['h.0.mlp.c_fc.weight'] * factor
    return change


@pytest.mark.parametrize('change, said', [
    (lambda t: t.pop('h.1.ln_1.bias'), 'missing: h.1.ln_1.bias'),
    (lambda t: t.update({'h.2.ln_1.bias': torch.ones(16)}), 'unknown: h.2.ln_1.bias'),
    (lambda t: t.update({'wte.weight': torch.ones(299, 16)}), 'wte.weight has shape (299, 16), but config.json makes it (300, 16)'),
    (lambda t: t.update({'wpe.weight': torch.ones(32, 16).to(torch.int8)}), 'wpe.weight is I8: expected one of F64, F32, F16, BF16'),
    (lambda t: t.update({'lm_head.weight': torch.ones(300, 16)}), 'tie_word_embeddings=true, but lm_head.weight is not the embedding'),
    (scaled(float('inf')), 'h.0.mlp.c_fc.weight has numbers that are not finite')])
def test_weights_that_do_not_fit_are_named(change, said, tmp_path):
    folder = written(tmp_path / 'x', GPT2, change)
    with pytest.raises(UserError) as error:
        pretrained.load(f'hf:{folder}')
    assert str(error.value).startswith(f'{folder}: ') and said in str(error.value) and len(error.value.args) == 1


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = written(tmp_path / 'x', GPT2)
    file, index = folder / 'model.safetensors', folder / 'model.safetensors.index.json'

    def refused(said):
        with pytest.raises(UserError) as error:
            pretrained.load(f'hf:{folder}')
        assert said in str(error.value) and '\n' not in str(error.value)
    content = file.read_bytes()
    for broken in (content[:-1], b'\xff' * 100, b'', (2**40).to_bytes(8, 'little') + content[8:]):
        file.write_bytes(broken)
        refused(f'{file}: truncated, damaged, or not a safetensors file')
    file.write_bytes(content)
    (folder / 'config.json').write_text(json.dumps(GPT2 | {'n_layer': 2**20}))
    refused('config.json has 1,048,576 layers, the files only 28 tensors')
    for names, said in (({'wte.weight': '../model.safetensors'}, "'../model.safetensors' is not the name of a safetensors file"),
                        ({'wte.weight': 'a.safetensors'}, 'a.safetensors is missing (1 of 1 files)'), ([], 'no valid weight_map')):
        index.write_text(json.dumps({'weight_map': names}))
        refused(said)
    index.unlink()
    file.rename(folder / 'pytorch_model.bin')
    refused('no model.safetensors: pytorch_model.bin is a pickle file')


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    def no_network(name, allow_patterns):
        raise OSError('no route to host\nmore')
    monkeypatch.setattr('huggingface_hub.snapshot_download', no_network)
    with pytest.raises(UserError) as error:
        load('--init_from=distilgpt2')
    assert str(error.value) == (
        'distilgpt2: distilbert/distilgpt2 is no directory here, and the download from the Hugging Face Hub failed (no route to '
        'host): without a network, download it elsewhere and give its directory as hf:PATH')
    with pytest.raises(UserError, match='hf:/no/where: no such directory'):
        load('--init_from=hf:/no/where')


@pytest.mark.parametrize('words, said', [
    (['convert', '--to=trix'], 'first finetune it with train.py --init_from='),
    (['gguf'], 'give the export a name: python export.py gguf')])
def test_an_export_of_a_pretrained_model_says_what_it_needs(words, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export.main([words[0], f'hf:{tmp_path}', *words[1:]])


# ---- all the way

@needs_transformers
def test_a_pretrained_gpt2_becomes_a_packed_trix(corpus, tmp_path, capsys):
    content = load_tokenizer_content(corpus)
    saved(tmp_path / 'hf', 'GPT2', GPT2 | {'n_positions': 256})
    (tmp_path / 'hf' / 'tokenizer.json').write_text(huggingface.to_tokenizers(content).to_str())
    source = f'hf:{tmp_path / "hf"}'
    assert pretrained.load(source)['tokenizer'] != content and equivalent(pretrained.load(source)['tokenizer'], content)
    words = [f'--dataset={corpus}', '--device=cpu', '--batch_size=4', '--sample_interval=0', '--eval_tokens=256']

    code, said = finish([f'--init_from={source}', *words, f'--out_dir={tmp_path / "run"}', '--max_steps=20', '--block_size=128',
                         f'--distill_from={source}'])
    assert code == 0 and f'weights from {source}' in said and 'of its 256 learned positions the first 128 are used' in said
    export.main(['convert', str(tmp_path / 'run'), str(tmp_path / 'trix'), '--to=trix', '--tiles=4', '--top_k=3', '--device=cpu'])
    stages = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith('  ')]
    assert stages[1] == pytest.approx(stages[0], abs=1e-4), 'with its biases, the cut model computes the same'
    export.main(['pack', str(tmp_path / 'trix'), str(tmp_path / 'x.safetensors'), '--device=cpu'])
    capsys.readouterr()
    for run in (tmp_path / 'x.safetensors', source):
        sample.main([str(run), '--prompt=ab', '--max_new_tokens=5', '--device=cpu'])
        assert capsys.readouterr().out.startswith('ab')
    evaluate.main([source, f'--data={corpus}', '--device=cpu'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['loss'] > 5, 'random weights of 300 tokens'
    assert 'blocks.0.ffn.up_bias' in checkpoint.find(tmp_path / 'trix')[1]['model']


def load_tokenizer_content(corpus):
    return json.loads((corpus / 'tokenizer.json').read_text())
