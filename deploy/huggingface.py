"""Llama-like, BitNet and GPT-2 models as directories for Hugging Face transformers, and how well it agrees with them.
Used by export.py.

    write('runs/x/hf', model, state)        # state: the dict of a checkpoint
    compare_with_transformers('runs/x/hf', model, state)

Weights are written in fp32, ternary ones as training uses them: codes times their scale.
"""
import json

import torch
from safetensors import SafetensorError

from configurator import UserError
from deploy.gguf import check_graph, matrix_weight, uses_bitnet_graph, vocabulary
from deploy.parity import activation_modes, compare, logits_of, real_text
from tokenizer import EOT, load_tokenizer


def load_transformers():
    """The package. UserError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError('export.py hf needs the package transformers: pip install transformers')
    transformers.utils.logging.disable_progress_bar()
    return transformers


def end_of_text(tokenizer):
    return load_tokenizer(tokenizer).eot_token if tokenizer else None


def write(out, model, state):
    """Write a model and its tokenizer to a new directory -> the name of its class in transformers. UserError if there
    is none."""
    transformers, config, end = load_transformers(), model.config, end_of_text(state['tokenizer'])
    special_ids = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)  # the defaults are of other vocabularies
    if config.norm == 'layernorm':
        other = to_gpt2(model, transformers, special_ids)
    else:
        check_graph(config, 'transformers')
        other = to_llama(model, transformers, special_ids)
    other.generation_config = transformers.GenerationConfig(**special_ids)
    try:
        out.mkdir()
        other.save_pretrained(out)
        if state['tokenizer'] is not None:
            content = to_tokenizers(state['tokenizer']).to_str(pretty=True)
            (out / 'tokenizer.json').write_text(content, encoding='utf-8')
            tokenizer_config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': EOT, 'bos_token': EOT,
                                'model_max_length': config.block_size}
            (out / 'tokenizer_config.json').write_text(json.dumps(tokenizer_config) + '\n')
    except (OSError, SafetensorError) as error:
        raise UserError(f'{out}: could not be written ({getattr(error, "strerror", None) or error})')
    return type(other).__name__


def compare_with_transformers(out, model, state, name=None):
    """Print how well transformers agrees with the trained model. name: what the message calls the export.

    UserError if transformers reads another end-of-text token."""
    transformers, end = load_transformers(), end_of_text(state['tokenizer'])
    source, ids = real_text(state, model.config)
    other = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = torch.cat([other(row[None]).logits[0] for row in ids])
    found = other.config.eos_token_id, other.generation_config.eos_token_id
    if found != (end, end):
        raise UserError(f'{out}: transformers reads {found} as the end-of-text tokens, and this model has {end}')
    for note, mode in activation_modes(model):
        with mode:
            compare(f'{name or out} in transformers', logits_of(model, ids), theirs, source + note, ids)


def to_llama(model, transformers, special_ids):
    """The Llama or BitNet model of transformers with the weights of a model."""
    config, hidden = model.config, model.blocks[0].ffn.up_proj.out_features
    kind = 'BitNet' if uses_bitnet_graph(config) else 'Llama'
    shape = getattr(transformers, f'{kind}Config')(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=hidden, hidden_act='silu',
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head or config.n_head, max_position_embeddings=config.block_size,
        rms_norm_eps=1e-6, tie_word_embeddings=config.tie_embeddings, rope_theta=config.rope_theta, **special_ids)
    other = getattr(transformers, f'{kind}ForCausalLM')(shape)
    weights = {'model.embed_tokens': model.wte.weight, 'model.norm': model.norm.weight, 'lm_head': model.lm_head.weight}
    for i, block in enumerate(model.blocks):
        layer = {'input_layernorm': block.mixer_norm.weight, 'post_attention_layernorm': block.ffn_norm.weight}
        layer |= {f'self_attn.{key}_proj': matrix_weight(getattr(block.mixer, f'{key}_proj')) for key in 'qkvo'}
        layer |= {f'mlp.{key}_proj': matrix_weight(getattr(block.ffn, f'{key}_proj')) for key in ('gate', 'up', 'down')}
        if kind == 'BitNet':  # our sub-norms have no weight
            layer |= {'self_attn.attn_sub_norm': torch.ones(config.n_embd), 'mlp.ffn_sub_norm': torch.ones(hidden)}
        weights |= {f'model.layers.{i}.{name}': weight for name, weight in layer.items()}
    other.load_state_dict({f'{name}.weight': weight for name, weight in weights.items()})
    return other


def check_gpt2(config):
    """UserError that names every option of a model that GPT-2 does not have."""
    supported = {
        'mixer': config.mixer == 'attention', 'ffn': config.ffn == 'gelu', 'linear': config.linear == 'dense',
        'positions': config.positions == 'learned', 'n_kv_head': config.n_kv_head in (0, config.n_head),
        'tie_embeddings': config.tie_embeddings, 'qk_norm': not config.qk_norm, 'embed_norm': not config.embed_norm,
        'embed_taps': not config.embed_taps, 'logit_softcap': not config.logit_softcap}
    problems = [f'{key}={getattr(config, key)}: GPT-2 has no such part, and norm=layernorm is exported as a GPT-2'
                for key, good in supported.items() if not good]
    if problems:
        raise UserError(*problems)


def to_gpt2(model, transformers, special_ids):
    """The GPT-2 of transformers with the weights of a model. It always has biases: they are 0 where the model has
    none."""
    config = model.config
    check_gpt2(config)
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=model.blocks[0].ffn.up_proj.out_features, activation_function='gelu_new',
        **special_ids))

    layers = {'ln_f': (model.norm.weight, model.norm.bias)}  # name: (weight, bias or None), matrices as (in, out)
    for i, block in enumerate(model.blocks):
        mixer = block.mixer
        qkv = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
        qkv_bias = torch.cat([each.bias for each in qkv]) if config.bias else None
        layers[f'h.{i}.attn.c_attn'] = torch.cat([each.weight for each in qkv]).T, qkv_bias
        linears = {'attn.c_proj': mixer.o_proj, 'mlp.c_fc': block.ffn.up_proj, 'mlp.c_proj': block.ffn.down_proj}
        for name, linear in linears.items():
            layers[f'h.{i}.{name}'] = linear.weight.T, linear.bias
        for name, norm in (('ln_1', block.mixer_norm), ('ln_2', block.ffn_norm)):
            layers[f'h.{i}.{name}'] = norm.weight, norm.bias

    weights = {'transformer.wte.weight': model.wte.weight, 'transformer.wpe.weight': model.wpe.weight,
               'lm_head.weight': model.lm_head.weight}
    for name, (weight, bias) in layers.items():
        weights[f'transformer.{name}.weight'] = weight
        weights[f'transformer.{name}.bias'] = torch.zeros(weight.size(-1)) if bias is None else bias
    other.load_state_dict(weights)
    return other


def to_tokenizers(content):
    """The tokenizers.Tokenizer that encodes every text as this project does. UserError as of vocabulary()."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokens, kinds, pairs, _ = vocabulary(content, 0)
    special = [token for token, kind in zip(tokens, kinds) if kind == 'CONTROL']
    ids = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(ids, [tuple(pair.split(' ')) for pair in pairs]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return bpe
