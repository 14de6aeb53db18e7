"""GPT-2 and Llama, as Hugging Face transformers computes them, are GPTs of this repository: same weights, same logits."""
import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')

V, T, C, NH, L, FF = 97, 48, 48, 6, 3, 101  # vocabulary, context, width, heads, layers, hidden width of the FFN
TOLERANCE = 1e-5  # of the largest logit, in fp32
VARIANTS = {
    'gpt2': dict(ffn='gelu', norm='layernorm', positions='learned', bias=True),
    'llama': dict(ffn='swiglu', tie_embeddings=False),
    'llama_tied': dict(ffn='swiglu'),
    'llama_grouped': dict(ffn='swiglu', tie_embeddings=False, n_kv_head=2),
    'llama_grouped_tied': dict(ffn='swiglu', n_kv_head=3),
}
GPT2_NAMES = {'transformer.h.': 'blocks.', 'transformer.ln_f': 'norm', 'transformer.': '', 'ln_1': 'mixer_norm',
              'ln_2': 'ffn_norm', 'attn.c_attn': 'mixer.qkv', 'attn.c_proj': 'mixer.o_proj', 'mlp.c_fc': 'ffn.up_proj',
              'mlp.c_proj': 'ffn.down_proj'}
LLAMA_NAMES = {'model.embed_tokens': 'wte', 'model.layers.': 'blocks.', 'model.norm': 'norm', 'self_attn': 'mixer', 'mlp': 'ffn',
               'input_layernorm': 'mixer_norm', 'post_attention_layernorm': 'ffn_norm'}


def renamed(key, names):
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


def gpt2_weights(state):
    """State dict of a GPT2LMHeadModel -> that of a GPT."""
    state = {renamed(key, GPT2_NAMES): w.t() if '.c_' in key else w for key, w in state.items()}  # Conv1D holds (in, out)
    for key in [key for key in state if 'qkv' in key]:
        for x, part in zip('qkv', state.pop(key).chunk(3)):  # (3 C, C) -> (C, C) each; biases (3 C,) -> (C,)
            state[key.replace('qkv', f'{x}_proj')] = part
    return state


def llama_weights(state):
    """State dict of a LlamaForCausalLM -> that of a GPT."""
    return {renamed(key, LLAMA_NAMES): w for key, w in state.items()}


@torch.no_grad()
def build(name, **changes):  # -> ours, theirs with `changes` in its config; both in eval mode
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=NH, n_embd=C, d_ff=FF, **VARIANTS[name]))
    keys = dict(vocab_size=V, bos_token_id=None, eos_token_id=None, attn_implementation='eager')
    if name == 'gpt2':
        keys.update(n_positions=T, n_embd=C, n_layer=L, n_head=NH, n_inner=FF, layer_norm_epsilon=1e-5)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**keys, **changes}))
    else:
        keys.update(max_position_embeddings=T, hidden_size=C, num_hidden_layers=L, num_attention_heads=NH, intermediate_size=FF,
                    num_key_value_heads=ours.config.n_kv_head or NH, tie_word_embeddings=ours.config.tie_embeddings,
                    rms_norm_eps=1e-6, rope_theta=10_000.0, attention_bias=False)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**keys, **changes}))
    for key, p in theirs.named_parameters():
        if 'wte' in key or 'wpe' in key or 'embed' in key:
            p.normal_(0, 0.02)  # small, so that the eps of the first norm shows
        else:
            p.normal_(0, 0.2) if p.dim() > 1 else p.normal_(0.0 if key.endswith('bias') else 1.0, 0.3)
    ours.load_state_dict((gpt2_weights if name == 'gpt2' else llama_weights)(theirs.state_dict()), strict=True)
    return ours.eval(), theirs.eval()


def tokens(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize('name', VARIANTS)
@torch.no_grad()
def test_logits_loss_and_cached_decoding_are_those_of_transformers(name):
    ours, theirs = build(name)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    for length in (1, 7, 31, T):
        idx, targets = tokens(3, length), tokens(3, length, seed=2)
        targets[0, 3:9] = -1  # ignored
        expected = theirs(idx).logits
        assert error(ours(idx), expected) < TOLERANCE
        assert error(ours(idx, targets), F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=-1)) < TOLERANCE
        for prefill in {1, length // 2 + 1}:
            cache = ours.new_cache(3)
            got = [ours(part, cache=cache) for part in idx.split([prefill] + [1] * (length - prefill), 1)]
            assert error(torch.cat(got, 1), expected) < TOLERANCE


@pytest.mark.parametrize('name', VARIANTS)
@torch.no_grad()
def test_a_missing_weight_or_swapped_queries_and_keys_change_the_logits(name):
    (ours, theirs), idx = build(name), tokens(3, T)
    expected, state = theirs(idx).logits, {key: p.clone() for key, p in ours.named_parameters()}
    q, k = (f'blocks.{L - 1}.mixer.{x}_proj.weight' for x in 'qk')
    if state[q].shape == state[k].shape:
        ours.load_state_dict({**state, q: state[k], k: state[q]}, strict=False)  # without lm_head.weight where it is tied
        assert error(ours(idx), expected) > 1000 * TOLERANCE
    for key, initial in GPT(ours.config).named_parameters():
        ours.load_state_dict({**state, key: initial}, strict=False)
        seen = error(ours(idx), expected) > 1000 * TOLERANCE
        assert seen != key.endswith('k_proj.bias'), key  # that one adds the same to all scores of a query: softmax drops it


@pytest.mark.parametrize('name, change', [
    ('gpt2', dict(layer_norm_epsilon=1e-6)), ('gpt2', dict(activation_function='gelu')),
    ('llama', dict(rms_norm_eps=1e-5)), ('llama', dict(rope_theta=20_000.0)), ('llama', dict(hidden_act='gelu'))])
@torch.no_grad()
def test_another_setting_of_the_reference_changes_the_logits(name, change):
    (ours, theirs), idx = build(name, **change), tokens(3, T)
    assert error(ours(idx), theirs(idx).logits) > 10 * TOLERANCE
