"""Llama-like and BitNet models as GGUF files for llama.cpp, and how well it agrees with them. Used by export.py.

    write('x.gguf', model, state['tokenizer'], matrices='TQ2_0', embeddings='Q8_0')
    compare_with_llama_cpp('x.gguf', model, state)

`vocabulary`, `check_graph` and `matrix_weight` are also what the export for transformers is made of.
"""
import base64
from pathlib import Path

import numpy as np
import torch

from configurator import UserError, utf8_path
from deploy.parity import activation_modes, bit_linears, real_text
from kernels import ternary_codes
from model import BitLinear
from tokenizer import BYTE_OF, EOT, load_tokenizer

PROMPTS = 50  # texts of a comparison
MATRICES = {'TQ2_0': 256, 'TQ1_0': 256, 'Q8_0': 32, 'F16': 1, 'F32': 1}  # type: weights in a block
EMBEDDINGS = ('F16', 'Q8_0', 'F32')
LARGEST_FP16 = 65_504
# llama.cpp refuses a byte-level BPE without merges. A vocabulary of single bytes has none: it gets one that never
# occurs.
NO_MERGE = '[none] [none]'


# ----------------------------------------------------------------------------------------------------------------------
# What other programs can express

def uses_bitnet_graph(config):
    """Whether a model needs the bitnet graph of other programs: only that has norms before the last matrices."""
    return config.linear == 'bitnet' and config.sub_norm


def check_graph(config, program):
    """UserError that names every option of a model that the llama and bitnet models of `program` don't have."""
    supported = {
        'mixer': config.mixer == 'attention', 'ffn': config.ffn in ('swiglu', 'bitnet'),
        'norm': config.norm == 'rmsnorm',
        'positions': config.positions == 'rotary', 'qk_norm': not config.qk_norm, 'embed_norm': not config.embed_norm,
        'embed_taps': not config.embed_taps, 'logit_softcap': not config.logit_softcap, 'bias': not config.bias}
    problems = [f'{key}={getattr(config, key)}: the llama and bitnet models of {program} have no such part'
                for key, good in supported.items() if not good]
    only_ffn_is_ternary = config.ffn == 'bitnet' and config.linear != 'bitnet' or config.linear == 'bitnet_ffn'
    if only_ffn_is_ternary and config.sub_norm:
        problems.append(f'ffn={config.ffn} with linear={config.linear}: {program} has the norm before the last matrix '
                        'in both attention and FFN, or in neither: use sub_norm=false or linear=bitnet')
    if problems:
        raise UserError(*problems)


def matrix_weight(layer):
    """The weight of a linear layer as training uses it, (out, in) fp32. For a BitLinear: ternary codes times their
    scale."""
    if isinstance(layer, BitLinear):
        codes, scale = ternary_codes(layer.weight)
        return codes * scale
    return layer.weight.detach().float()


# ----------------------------------------------------------------------------------------------------------------------
# The vocabulary

def merges(ranks):
    """
    The merges of a byte-level BPE with these ranks (a list of bytes), in order. They are written like 'Ġ the', in the
    letters that stand for bytes in the files of GPT-2.
    """
    letter = {byte: character for character, byte in BYTE_OF.items()}
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    pairs = []
    for token in ranks:
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:  # all merges but the last, which makes the token itself
            first = min(range(len(parts) - 1), key=lambda i: rank_of.get(parts[i] + parts[i + 1], len(ranks)))
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            pairs.append(' '.join(''.join(letter[byte] for byte in part) for part in parts))
    return pairs


def vocabulary(tokenizer, size):
    """
    The content of a tokenizer, padded to `size` ids -> (tokens in GPT-2's letters, the kind of each, the merges, the id
    of the end of a text). UserError if it is not a byte-level BPE of this project or GPT-2's.
    """
    if tokenizer is None:
        raise UserError('the model has no tokenizer, and the export needs one: train on data with a tokenizer.json')
    if 'characters' in tokenizer:
        raise UserError('its tokenizer has one token for each character (--tokenizer=char), '
                        'which this format does not support: train with --tokenizer=byte or bpe')
    if 'ranks' not in tokenizer:
        raise UserError(f'its tokenizer, {tokenizer["name"]}, came from Hugging Face: '
                        'only tokenizers of prepare.py and GPT-2 can be exported')
    letter = {byte: character for character, byte in BYTE_OF.items()}
    ranks, special = [base64.b64decode(rank) for rank in tokenizer['ranks']], tokenizer['special_tokens']
    tokens = [''.join(letter[byte] for byte in token) for token in ranks] + sorted(special, key=special.get)
    padding = [f'[PAD{i}]' for i in range(len(tokens), size)]
    kinds = ['NORMAL'] * len(ranks) + ['CONTROL'] * len(special) + ['UNUSED'] * len(padding)
    return tokens + padding, kinds, merges(ranks), special[EOT]


# ----------------------------------------------------------------------------------------------------------------------
# The file

def write(path, model, tokenizer, matrices='', embeddings=''):
    """
    Write a model and the content of its tokenizer as a GGUF file, whole or not at all -> a description of it.

    matrices: the type of the matrices in the blocks, of the ternary ones if it is TQ2_0 or TQ1_0. embeddings: the type
    of embedding and head. UserError if llama.cpp has no such model or tokenizer.
    """
    try:
        import gguf
    except ImportError:
        raise UserError('export.py gguf needs the package gguf: pip install gguf')
    config, is_ternary = model.config, bool(bit_linears(model))
    check_graph(config, 'llama.cpp')
    if uses_bitnet_graph(config) and not config.tie_embeddings:
        raise UserError('tie_embeddings=False: the bitnet models of llama.cpp have the head tied to the embedding')
    matrices, embeddings = matrices or ('TQ2_0' if is_ternary else 'F16'), embeddings or 'F16'
    if matrices.startswith('TQ') and not is_ternary:
        raise UserError(f'--matrices={matrices}: this model has no ternary matrix: choose F32, F16 or Q8_0')
    keys = metadata(path, model, tokenizer, gguf.TokenType)
    tensors = named_tensors(model, matrices, embeddings)
    check_types(tensors)
    arch = architecture(config)
    try:
        writer = gguf.GGUFWriter(path, arch)
        for key, value in keys.items():
            getattr(writer, f'add_{key}')(value)
        for name, (weight, kind) in tensors.items():
            kind = gguf.GGMLQuantizationType[kind]
            weight = gguf.quants.quantize(np.ascontiguousarray(weight.detach().float().cpu().numpy()), kind)
            writer.add_tensor(f'{name}.weight', weight, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:  # numpy gives no strerror, only how many numbers it has written
        raise UserError(f'{path}: could not be written ({error.strerror or f"{error}: is the disk full?"})')
    return f'{arch}, matrices {matrices}, embeddings {embeddings}'


def architecture(config):
    return 'bitnet' if uses_bitnet_graph(config) else 'llama'


def metadata(path, model, tokenizer, token_types):
    """{name of an add_ method of GGUFWriter: value}"""
    config = model.config
    tokens, kinds, pairs, end = vocabulary(tokenizer, config.vocab_size)
    return {
        'name': Path(path).stem, 'context_length': config.block_size, 'embedding_length': config.n_embd,
        'block_count': config.n_layer, 'feed_forward_length': model.blocks[0].ffn.up_proj.out_features,
        'head_count': config.n_head, 'head_count_kv': config.n_kv_head or config.n_head,
        'vocab_size': config.vocab_size,
        'rope_dimension_count': config.n_embd // config.n_head, 'rope_freq_base': config.rope_theta,
        'layer_norm_rms_eps': 1e-6,
        'tokenizer_model': 'gpt2', 'tokenizer_pre': 'gpt-2', 'token_list': tokens,
        'token_types': [token_types[kind] for kind in kinds],
        'token_merges': pairs or [NO_MERGE], 'bos_token_id': end, 'eos_token_id': end,
        # In training a text follows the end-of-text token of the one before, unless a mask hid that.
        'add_bos_token': not config.document_mask}


def named_tensors(model, matrices, embeddings):
    """{name in the file, without .weight: (weight, type)}"""
    config, is_bitnet = model.config, uses_bitnet_graph(model.config)
    tensors = {'token_embd': (model.wte.weight, embeddings), 'output_norm': (model.norm.weight, 'F32')}
    if not config.tie_embeddings:
        tensors['output'] = model.lm_head.weight, embeddings
    for i, block in enumerate(model.blocks):
        mixer, ffn = block.mixer, block.ffn
        linears = {'attn_q': mixer.q_proj, 'attn_k': mixer.k_proj, 'attn_v': mixer.v_proj, 'attn_output': mixer.o_proj,
                   'ffn_gate': ffn.gate_proj, 'ffn_up': ffn.up_proj, 'ffn_down': ffn.down_proj}
        block_tensors = {'attn_norm': (block.mixer_norm.weight, 'F32'), 'ffn_norm': (block.ffn_norm.weight, 'F32')}
        for name, layer in linears.items():
            weight = matrix_weight(layer)
            if name in ('attn_q', 'attn_k') and not is_bitnet:
                heads = config.n_head if name == 'attn_q' else config.n_kv_head or config.n_head
                weight = interleaved_rotary(weight, heads)
            kind = 'F16' if matrices.startswith('TQ') and not isinstance(layer, BitLinear) else matrices
            block_tensors[name] = weight, kind
        if is_bitnet:  # our sub-norms have no weight
            block_tensors['attn_sub_norm'] = torch.ones(config.n_embd), 'F32'
            block_tensors['ffn_sub_norm'] = torch.ones(ffn.up_proj.out_features), 'F32'
        tensors |= {f'blk.{i}.{name}': value for name, value in block_tensors.items()}
    return tensors


def interleaved_rotary(weight, heads):
    """Rows of weight (heads hs, C) in the order of the llama graph. It rotates pairs of neighbours, where this project
    and the bitnet graph rotate the two halves of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def check_types(tensors):
    """UserError if a weight of {name: (weight, type)} can't be stored as its type."""
    wrong = [f'{name}: its rows of {weight.size(-1)} weights do not divide into the blocks of {MATRICES[kind]} '
             f'that {kind} has: choose another type, such as '
             + ('--embeddings=F16' if name in ('token_embd', 'output') else '--matrices=F16')
             for name, (weight, kind) in tensors.items() if weight.size(-1) % MATRICES[kind]]
    if wrong:
        raise UserError(*wrong[:2])
    large = [name for name, (weight, kind) in tensors.items()
             if kind in ('F16', 'Q8_0') and weight.detach().abs().max() > LARGEST_FP16]
    if large:
        raise UserError(f'{large[0]} and {len(large) - 1} more tensors have weights over {LARGEST_FP16:,}, '
                        'the largest number of F16: use --matrices=F32 --embeddings=F32')


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp

class Llama:
    """llama.cpp with a GGUF file, by the package xllamacpp. ImportError if that is not installed."""

    def __init__(self, path, context, threads=0):
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = utf8_path(path), context, 1
        params.n_gpu_layers, params.verbosity = 0, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        self.server = xllamacpp.Server(params)

    def complete(self, ids, n=1, **options):
        request = {'prompt': ids, 'n_predict': n, 'temperature': 0.0, 'cache_prompt': False, **options}
        answer = self.server.handle_completions(request)
        if 'error' in answer:
            raise UserError(f'llama.cpp: {answer["error"].get("message", answer["error"])}')
        return answer

    def next_token(self, ids):
        """
        {token: log-probability} of the ten most likely tokens after ids. It is empty if llama.cpp gives none: after the
        end of a text, and for bytes that are not a whole character.
        """
        answer = self.complete(ids, 4, logprobs=10)  # 4 tokens: the first may be only a part of a character
        logprobs = answer['choices'][0]['logprobs']
        return {each['id']: each['logprob'] for each in logprobs['content'][0]['top_logprobs']} if logprobs else {}


def compare_with_llama_cpp(path, model, state, name=None):
    """
    Print how well llama.cpp with a GGUF file agrees with the trained model on the next token after PROMPTS texts ->
    (fraction with the same most likely token, largest difference of log-probabilities) of the last comparison. Returns
    None, with a message, if llama.cpp is not installed. name: what the message calls the file.
    """
    try:
        llama = Llama(path, model.config.block_size)
    except ImportError:
        print('not compared with llama.cpp: the package xllamacpp is not installed (pip install xllamacpp)')
        return None
    except RuntimeError as error:
        raise UserError(f'{path}: llama.cpp cannot load it ({error})')
    source, ids = real_text(state, model.config)
    end = load_tokenizer(state['tokenizer']).eot_token
    T = max(0, min(32, ids.size(1) - 2))  # room in the context for the end-of-text token and for an answer
    windows = ids.flatten().unfold(0, T, max(1, (ids.numel() - T) // PROMPTS))[:PROMPTS]
    prompts = [[end, *row[:T].tolist()] for row in windows]
    theirs = [llama.next_token(prompt) for prompt in prompts]
    for note, mode in activation_modes(model):
        with mode:
            ours = next_log_probs(model, prompts)
        differences = [abs(ours[i, token].item() - value)
                       for i, answer in enumerate(theirs) for token, value in answer.items()]
        largest = max(differences, default=0.0)
        same = [max(answer, key=answer.get, default=end) == ours[i].argmax().item() for i, answer in enumerate(theirs)]
        top = sum(same) / len(prompts)
        print(f'{name or path} in llama.cpp compared with the trained model{note} after {len(prompts)} texts of '
              f'{source}: same most likely token for {100 * top:.0f} %, '
              f'largest difference of log-probabilities of the ten most likely {largest:.2g}')
    return top, largest


@torch.no_grad()
def next_log_probs(model, prompts):
    """Prompts, lists of ids -> (N, V) fp32 log-probabilities of the token after each."""
    device = model.norm.weight.device
    logits = [model(torch.tensor([prompt], device=device), last=True)[0, -1].float().cpu() for prompt in prompts]
    return torch.stack(logits).log_softmax(-1)
