"""A trained model as a file that runs elsewhere, small and fast.

    python export.py pack runs/x                       # runs/x/packed.safetensors: 2 bits a ternary weight
    python export.py pack runs/x small.safetensors --embeddings=int8
    python sample.py small.safetensors                 # takes it in place of a run, as evaluate.py does
    python export.py gguf runs/x                       # runs/x/model.gguf, for llama.cpp: BitNet and Llama-like models
    python export.py gguf runs/x x.gguf --matrices=TQ1_0 --embeddings=Q8_0
    python export.py hf runs/x                         # runs/x/hf, for transformers: Llama, BitNet and GPT-2 layouts, in fp32
    python export.py convert runs/dense --to=trix --tiles=8 --top_k=6  # runs/dense/trix: its FFNs cut into ternary tiles
    python export.py convert runs/dense --to=bitnet    # runs/dense/bitnet: every matrix of its blocks ternary; bitnet_ffn: of its FFNs
    python train.py runs/dense/bitnet/recover.py       # what convert wrote beside it: brings back most of what rounding lost

Every export ends with a comparison of its outputs with those of the model that was trained, on text.
"""
import base64
import contextlib
import json
import math
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path

from configurator import UserError, load, run, utf8_path  # before torch, whose import Ctrl-C may interrupt
import numpy as np
import torch
from safetensors import SafetensorError

import checkpoint
from deploy import convert as conversion
from runtime import device as hardware
from deploy import packed
import settings
from deploy.packed import load_model
from data import TokenData
from model import GPT, BitLinear, GPTConfig, TriX, ternary_codes
from tokenizer import BYTE_OF, EOT, encode, load_tokenizer

PARITY_TOKENS, PROMPTS = 2048, 50
MATRICES = {'TQ2_0': 256, 'TQ1_0': 256, 'Q8_0': 32, 'F16': 1, 'F32': 1}  # types of GGUF: weights of a block, which must fill rows


@dataclass
class ExportConfig:
    command: str = ''  # pack, gguf, hf or convert; may stand without --command=
    run: str = ''  # run directory (its newest good checkpoint) or checkpoint file; may stand without --run=
    out: str = ''  # where to (empty: into the run); may stand without --out=
    embeddings: str = ''  # embedding and head; pack: float32 (the default), bfloat16 or int8 (a scale a row); gguf: F16 (the default), Q8_0 or F32
    matrices: str = ''  # gguf: TQ2_0 (the default of ternary models), TQ1_0, Q8_0, F16 (that of others) or F32
    to: str = ''  # convert: trix, bitnet (all matrices of the blocks) or bitnet_ffn
    tiles: int = 8  # convert --to=trix: tiles of a layer
    top_k: int = 6  # convert --to=trix: tiles that a token is sent to, in the end
    device: str = 'auto'  # of the comparison: auto, cpu, cuda, cuda:N or mps

    def problems(self):
        found = [] if self.command in COMMANDS else [f'{self.command or "no command"}: name one of {", ".join(COMMANDS)}']
        found += [] if self.run else ['name a run directory or a checkpoint: python export.py pack runs/x']
        if (self.command == 'convert') != (self.to in ('trix', 'bitnet', 'bitnet_ffn')):
            found.append(f'to={self.to!r}: convert needs --to=trix, bitnet or bitnet_ffn, and nothing else has it')
        if not 1 <= self.top_k <= self.tiles:
            found.append(f'top_k={self.top_k}, tiles={self.tiles}: a token is sent to at least one of the tiles and at most to all')
        choices = {'pack': {'embeddings': packed.EMBEDDINGS}, 'gguf': {'embeddings': ('F16', 'Q8_0', 'F32'), 'matrices': MATRICES}}
        for key in ('embeddings', 'matrices'):
            own, value = choices.get(self.command, {}).get(key, ()), getattr(self, key)
            if value and value not in own:
                found.append(f'{key}={value!r} is not one of {", ".join(own)}' if own else f'{key}={value!r} is not for {self.command}')
        return found


# ----------------------------------------------------------------------------------------------------------------------
# What an export computes beside what was trained

def real_text(state, config, tokens=PARITY_TOKENS):
    """(name, ids int64 (n, T)) of up to so many tokens: of the run's validation split, or of the README where it is gone."""
    T = min(config.block_size, 256)
    try:
        data = TokenData(state['data'].get('path', ''), T, config.vocab_size)
        if data.tokenizer == state['tokenizer']:
            return f'{data.path}/val.bin', torch.from_numpy(data.val_batch(data.val_windows(tokens))[0])
    except UserError:
        pass
    if state['tokenizer'] is None:
        return 'random ids', torch.randint(config.vocab_size, (tokens // T, T), generator=torch.Generator().manual_seed(0))
    ids = encode(load_tokenizer(state['tokenizer']), Path(__file__).with_name('README.md').read_text(encoding='utf-8'))
    ids = np.resize(ids.astype(np.int64), (max(1, min(len(ids), tokens) // T), T))
    return 'README.md', torch.from_numpy(ids)


def parity(what, ours, theirs, source):
    """Say how far two (N, V) fp32 tensors of logits agree -> (share of rows with the same likeliest token, largest difference of
    log-probabilities)."""
    top = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    largest = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    print(f'parity of {what} with the trained model on {len(ours):,} tokens of {source}: the same likeliest token for {100 * top:.2f} %, '
          f'log-probabilities at most {largest:.2g} apart')
    return top, largest


def without_mask(model):
    """Leave the document mask out of what a model computes, as other programs do, and say so."""
    if model.config.document_mask:
        print('this model was trained with document_mask, and other programs do not reset at an end of text: '
              'give them one document at a time, without an end-of-text token in front')
        model.config.document_mask = False


@torch.no_grad()
def logits_of(model, ids):
    device = next(model.parameters()).device
    return torch.cat([model(row[None].to(device))[0].float().cpu() for row in ids])


# ----------------------------------------------------------------------------------------------------------------------

def opened(config, name):
    """(model, state, path of the export) for a command that writes a file; `name` is what it has in the directory of the run."""
    model, state = load_model(config.run, hardware.resolve(config.device, 'float32')[0])
    out, suffix = Path(config.out or Path(config.run if Path(config.run).is_dir() else Path(config.run).parent) / name), Path(name).suffix
    if suffix and out.suffix != suffix:
        raise UserError(f'{out}: this export is a {suffix} file')
    if not suffix and out.exists():
        raise UserError(f'{out}: there already; give another directory, or remove it')
    if config.command != 'convert' and utf8_path(out) is None:
        raise UserError(f'{out}: this path is not UTF-8, and the programs that read this format open no other: give the export another place')
    if 'packed' in state:
        raise UserError(f'{config.run}: packed already, so give the run or the checkpoint itself')
    return model, state, out


@contextlib.contextmanager
def replacing_directory(out):
    """A new directory to fill, which becomes `out` when all is in it; nothing is left if that fails."""
    partial = out.with_name(out.name + '.tmp')
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{out}: could not be written ({getattr(error, "strerror", None) or error})')
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def pack(config):
    model, state, out = opened(config, 'packed.safetensors')
    embeddings = config.embeddings or 'float32'
    tensors = packed.pack(model, embeddings)
    packed.write(out, tensors, embeddings, state)

    kinds = defaultdict(lambda: [0, 0])
    for name, tensor in tensors.items():
        size, weights = tensor.nbytes, 4 * tensor.numel()
        if name.endswith('.codes'):
            kind, shape = 'ternary codes', model.get_parameter(name.removesuffix('.codes')).shape
            weights = 4 * shape.numel()
            print(f'{name.removesuffix(".codes"):36} {" x ".join(map(str, shape)):>16}  {weights:>12,} -> {size:>11,} bytes: {weights / size:.4g}x')
        else:
            kind = 'scales' if name.endswith('.scale') else 'embeddings' if name in ('wte.weight', 'lm_head.weight') else 'everything else'
            weights = 0 if kind == 'scales' else weights
        kinds[kind][0] += weights
        kinds[kind][1] += size
    total = sum(size for _, size in kinds.values())
    kinds['tokenizer, config, names'] = [0, out.stat().st_size - total]
    for kind, (before, after) in kinds.items():
        print(f'{kind:26} {before:>14,} -> {after:>12,} bytes' + f': {before / after:.4g}x' * bool(before))
    whole = sum(before for before, _ in kinds.values())
    print(f'{out}: {out.stat().st_size:,} bytes; the model {total:,}, {whole / total:.2f} times smaller than its {whole:,} in fp32')
    source, ids = real_text(state, model.config)
    parity(out, logits_of(model, ids), logits_of(load_model(out, next(model.parameters()).device)[0], ids), source)


# ----------------------------------------------------------------------------------------------------------------------
# GGUF

def only_llama(config, target):
    """UserError that names every part of a model that neither the `llama` nor the `bitnet` graph of another program can express."""
    parts = {'mixer': config.mixer == 'attention', 'ffn': config.ffn in ('swiglu', 'bitnet'), 'norm': config.norm == 'rmsnorm',
             'positions': config.positions == 'rotary', 'qk_norm': not config.qk_norm, 'embed_norm': not config.embed_norm,
             'embed_taps': not config.embed_taps, 'logit_softcap': not config.logit_softcap, 'bias': not config.bias}
    found = [f'{key}={getattr(config, key)}: {target} has no such part in its llama or bitnet models' for key, good in parts.items() if not good]
    if (config.ffn == 'bitnet' and config.linear != 'bitnet' or config.linear == 'bitnet_ffn') and config.sub_norm:
        found.append(f'ffn={config.ffn} with linear={config.linear}: {target} has the norm before the last matrix in both branches of a block '
                     'or in none; sub_norm=false or linear=bitnet would do')
    if found:
        raise UserError(*found)


def is_bitnet(config):  # with norms before the last matrices, which only the bitnet graph has
    return config.linear == 'bitnet' and config.sub_norm


def exact(matrix):
    """(out, in) fp32: the weight as training uses it."""
    if isinstance(matrix, BitLinear):
        codes, scale = ternary_codes(matrix.weight)
        return codes * scale
    return matrix.weight.detach().float()


def merges(ranks):
    """The pairs that a byte-level BPE of `ranks` merges, in order, in the letters in which such files write bytes: 'Ġ the'."""
    letter = {byte: character for character, byte in BYTE_OF.items()}
    order, found = {token: rank for rank, token in enumerate(ranks)}, []
    for token in ranks:
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:  # all but the last merge of what makes this token
            at = min(range(len(parts) - 1), key=lambda i: order.get(parts[i] + parts[i + 1], len(ranks)))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append(' '.join(''.join(letter[byte] for byte in part) for part in parts))
    return found


def vocabulary(content, size):
    """(tokens as GGUF writes them, their kinds, the pairs that are merged, the id of the end of a text) for a model with `size` ids.
    UserError if the tokenizer is no byte-level BPE of ours."""
    if content is None or 'ranks' not in content:
        raise UserError(('there is no tokenizer in it' if content is None else f'its tokenizer, {content["name"]}, came from Hugging Face')
                        + ': only those of ours and GPT-2 can be written')
    ranks, special = [base64.b64decode(rank) for rank in content['ranks']], content['special_tokens']
    letter = {byte: character for character, byte in BYTE_OF.items()}
    tokens = [''.join(letter[byte] for byte in token) for token in ranks] + sorted(special, key=special.get)
    padding = [f'[PAD{i}]' for i in range(len(tokens), size)]
    return (tokens + padding, ['NORMAL'] * len(ranks) + ['CONTROL'] * len(special) + ['UNUSED'] * len(padding), merges(ranks), special[EOT])


def gguf(config):
    model, state, out = opened(config, 'model.gguf')
    kinds = write_gguf(out, model, state['tokenizer'], config.matrices, config.embeddings)
    print(f'{out}: {out.stat().st_size:,} bytes, {kinds}')
    without_mask(model)
    compare_with_llama_cpp(out, model, state)


LARGEST_FP16 = 65_504
# llama.cpp refuses a byte-level BPE without a list of merges, and a vocabulary of bytes has none. No two symbols of a text are these.
NO_MERGE = '[none] [none]'


def write_gguf(path, model, tokenizer, matrices='', embeddings=''):
    """Write a model and the content of its tokenizer as a GGUF file, whole or not at all -> what it holds, in words. UserError if llama.cpp
    has no such model, or no such tokenizer."""
    try:
        import gguf
    except ImportError:
        raise UserError('export.py gguf needs the package gguf: pip install gguf')
    shape, ternary = model.config, any(isinstance(module, BitLinear) for module in model.modules())
    only_llama(shape, 'llama.cpp')
    if is_bitnet(shape) and not shape.tie_embeddings:
        raise UserError('tie_embeddings=False: the bitnet models of llama.cpp have the head tied to the embedding')
    matrices, embeddings = matrices or ('TQ2_0' if ternary else 'F16'), embeddings or 'F16'
    if matrices.startswith('TQ') and not ternary:
        raise UserError(f'--matrices={matrices}: nothing in this model is ternary: F32, F16 or Q8_0')
    tokens, kinds, pairs, end = vocabulary(tokenizer, shape.vocab_size)
    arch, hidden, heads = 'bitnet' if is_bitnet(shape) else 'llama', model.blocks[0].ffn.up_proj.out_features, shape.n_kv_head or shape.n_head
    tensors = {'token_embd': (model.wte.weight, embeddings), 'output_norm': (model.norm.weight, 'F32')}
    if not shape.tie_embeddings:
        tensors['output'] = model.lm_head.weight, embeddings
    for i, block in enumerate(model.blocks):
        own = {'attn_norm': (block.mixer_norm.weight, 'F32'), 'ffn_norm': (block.ffn_norm.weight, 'F32')}
        mixer, ffn = block.mixer, block.ffn
        for name, part in {'attn_q': mixer.q_proj, 'attn_k': mixer.k_proj, 'attn_v': mixer.v_proj, 'attn_output': mixer.o_proj,
                           'ffn_gate': ffn.gate_proj, 'ffn_up': ffn.up_proj, 'ffn_down': ffn.down_proj}.items():
            weight, kind = exact(part), matrices if isinstance(part, BitLinear) or not matrices.startswith('TQ') else 'F16'
            if name in ('attn_q', 'attn_k') and arch == 'llama':  # its rotary pairs are neighbours; those of the bitnet graph are halves, as ours
                weight = weight.unflatten(0, (shape.n_head if name == 'attn_q' else heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            own[name] = weight, kind
        if arch == 'bitnet':
            own |= {'attn_sub_norm': (torch.ones(shape.n_embd), 'F32'), 'ffn_sub_norm': (torch.ones(hidden), 'F32')}
        tensors |= {f'blk.{i}.{name}': value for name, value in own.items()}
    if wrong := [f'{name}: rows of {weight.size(-1)}, and {kind} is made of blocks of {MATRICES[kind]}: choose another type, F16 for instance'
                 for name, (weight, kind) in tensors.items() if weight.size(-1) % MATRICES[kind]]:
        raise UserError(*wrong[:2])
    if large := [name for name, (weight, kind) in tensors.items() if kind in ('F16', 'Q8_0') and weight.detach().abs().max() > LARGEST_FP16]:
        raise UserError(f'{large[0]} and {len(large) - 1} more tensors have weights over {LARGEST_FP16:,}, the largest number of F16: '
                        'use --matrices=F32 --embeddings=F32')
    partial = Path(f'{path}.tmp')
    try:
        writer = gguf.GGUFWriter(partial, arch)
        pairs = pairs or [NO_MERGE]
        for key, value in {'name': Path(path).stem, 'context_length': shape.block_size, 'embedding_length': shape.n_embd,
                           'block_count': shape.n_layer, 'feed_forward_length': hidden, 'head_count': shape.n_head, 'head_count_kv': heads,
                           'vocab_size': shape.vocab_size,
                           'rope_dimension_count': shape.n_embd // shape.n_head, 'rope_freq_base': 10_000.0, 'layer_norm_rms_eps': 1e-6,
                           'tokenizer_model': 'gpt2', 'tokenizer_pre': 'gpt-2', 'token_list': tokens,
                           'token_types': [gguf.TokenType[kind] for kind in kinds], 'token_merges': pairs, 'bos_token_id': end,
                           # A text starts with the end of the one before it, as in training, unless a mask hid that.
                           'eos_token_id': end, 'add_bos_token': not shape.document_mask}.items():
            getattr(writer, f'add_{key}')(value)
        for name, (weight, kind) in tensors.items():
            kind = gguf.GGMLQuantizationType[kind]
            weight = gguf.quants.quantize(np.ascontiguousarray(weight.detach().float().cpu().numpy()), kind)
            writer.add_tensor(f'{name}.weight', weight, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    except OSError as error:  # numpy says only how many numbers it could write
        raise UserError(f'{path}: could not be written ({error.strerror or f"{error}: is the disk full?"})')
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written nothing can be deleted
            partial.unlink()
    return f'{arch}, matrices {matrices}, embeddings {embeddings}'


def compare_with_llama_cpp(path, model, state):
    """Parity of a GGUF file, by llama.cpp itself, if it is here: the next token after PROMPTS texts."""
    try:
        llama = Llama(path, model.config.block_size)
    except ImportError:
        return print('no parity: the package xllamacpp is not installed (pip install xllamacpp)')
    except RuntimeError as error:
        raise UserError(f'{path}: is written, but llama.cpp does not load it ({error})')
    source, ids = real_text(state, model.config)
    eot = load_tokenizer(state['tokenizer']).eot_token
    T = max(0, min(32, ids.size(1) - 2))  # with eot before it, one less than the context: llama.cpp wants room for an answer
    prompts = [[eot, *row[:T].tolist()] for row in ids.flatten().unfold(0, T, max(1, (ids.numel() - T) // PROMPTS))[:PROMPTS]]
    theirs = [llama.next_token(prompt) for prompt in prompts]
    for rounds in (True, False) if any(isinstance(module, BitLinear) for module in model.modules()) else (True,):
        with torch.no_grad(), activations(rounds):
            ids = [torch.tensor([prompt], device=model.norm.weight.device) for prompt in prompts]
            ours = torch.stack([model(each, last=True)[0, -1].float().cpu() for each in ids]).log_softmax(-1)
        apart = max((abs(ours[i, token].item() - value) for i, own in enumerate(theirs) for token, value in own.items()), default=0.0)
        top = sum(max(own, key=own.get, default=eot) == ours[i].argmax().item() for i, own in enumerate(theirs)) / len(prompts)
        print(f'parity of {path} in llama.cpp with the trained model' + ' without int8 activations' * (not rounds)
              + f' after {len(prompts)} texts of {source}: the same likeliest token for {100 * top:.0f} %, '
              f'log-probabilities of the ten likeliest at most {apart:.2g} apart')
    return top, apart


@contextlib.contextmanager
def activations(rounds):
    """BitLinear layers with their activations rounded to int8, as they were trained, or not."""
    BitLinear.rounds = rounds
    try:
        yield
    finally:
        BitLinear.rounds = True


@contextlib.contextmanager
def as_they_are(yes=True):
    """TriX tiles with their weights as they are, not ternary."""
    TriX.ternary = not yes
    try:
        yield
    finally:
        TriX.ternary = True


class Llama:
    """llama.cpp on a GGUF file, by the package xllamacpp. ImportError where that is missing."""

    def __init__(self, path, context, threads=0):
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = utf8_path(path), context, 1, 0, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        self.server = xllamacpp.Server(params)

    def complete(self, ids, n=1, **options):
        answer = self.server.handle_completions({'prompt': ids, 'n_predict': n, 'temperature': 0.0, 'cache_prompt': False, **options})
        if 'error' in answer:
            raise UserError(f'llama.cpp: {answer["error"].get("message", answer["error"])}')
        return answer

    def next_token(self, ids):
        """{token: log-probability} of the ten likeliest tokens after ids; {} where it says nothing of them: the end of the
        text, or bytes that make no character."""
        said = self.complete(ids, 4, logprobs=10)['choices'][0]['logprobs']  # 4: it says nothing of a part of a character
        return {each['id']: each['logprob'] for each in said['content'][0]['top_logprobs']} if said else {}


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face

def hf(config):
    try:
        import transformers
    except ImportError:
        raise UserError('export.py hf needs the package transformers: pip install transformers')
    transformers.utils.logging.disable_progress_bar()
    model, state, out = opened(config, 'hf')
    shape, ternary = model.config, any(isinstance(module, BitLinear) for module in model.modules())
    end = load_tokenizer(state['tokenizer']).eot_token if state['tokenizer'] else None
    ids = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)  # the library's own defaults are those of other vocabularies
    if shape.norm == 'layernorm':
        other = as_gpt2(model, transformers, ids)
    else:
        only_llama(shape, 'transformers')
        other = as_llama(model, transformers, ids)
    other.generation_config = transformers.GenerationConfig(**ids)
    with replacing_directory(out) as partial:
        other.save_pretrained(partial)
        if state['tokenizer'] is not None:
            (partial / 'tokenizer.json').write_text(huggingface_tokenizer(state['tokenizer']).to_str(pretty=True), encoding='utf-8')
            (partial / 'tokenizer_config.json').write_text(json.dumps({
                'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': EOT, 'bos_token': EOT, 'model_max_length': shape.block_size}) + '\n')
    print(f'{out}: {type(other).__name__}, {sum(file.stat().st_size for file in out.iterdir()):,} bytes')
    without_mask(model)
    source, ids = real_text(state, shape)
    other = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = torch.cat([other(row[None]).logits[0] for row in ids])
    if (written := (other.config.eos_token_id, other.generation_config.eos_token_id)) != (end, end):
        raise UserError(f'{out}: transformers reads {written} as the end of a text, which is {end} here')
    for rounds in (True, False) if ternary else (True,):
        with activations(rounds):
            parity(f'{out} in transformers', logits_of(model, ids), theirs, source + ', activations in fp32' * (not rounds))


def as_llama(model, transformers, ids):
    """The Llama or BitNet model of transformers with the weights of a model: ternary ones as training uses them, in fp32."""
    shape, block = model.config, model.blocks[0]
    keys = dict(vocab_size=shape.vocab_size, hidden_size=shape.n_embd, intermediate_size=block.ffn.up_proj.out_features, hidden_act='silu',
                num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head, num_key_value_heads=shape.n_kv_head or shape.n_head,
                max_position_embeddings=shape.block_size, rms_norm_eps=1e-6, tie_word_embeddings=shape.tie_embeddings, rope_theta=10_000.0, **ids)
    kind = 'BitNet' if is_bitnet(shape) else 'Llama'
    other = getattr(transformers, f'{kind}ForCausalLM')(getattr(transformers, f'{kind}Config')(**keys))
    weights = {'model.embed_tokens.weight': model.wte.weight, 'model.norm.weight': model.norm.weight, 'lm_head.weight': model.lm_head.weight}
    for i, block in enumerate(model.blocks):
        own = {'input_layernorm.weight': block.mixer_norm.weight, 'post_attention_layernorm.weight': block.ffn_norm.weight}
        own |= {f'self_attn.{key}_proj.weight': exact(getattr(block.mixer, f'{key}_proj')) for key in 'qkvo'}
        own |= {f'mlp.{key}_proj.weight': exact(getattr(block.ffn, f'{key}_proj')) for key in ('gate', 'up', 'down')}
        if kind == 'BitNet':
            own |= {'self_attn.attn_sub_norm.weight': torch.ones(shape.n_embd), 'mlp.ffn_sub_norm.weight': torch.ones(keys['intermediate_size'])}
        weights |= {f'model.layers.{i}.{name}': weight for name, weight in own.items()}
    other.load_state_dict(weights)
    return other


def as_gpt2(model, transformers, ids):
    """The GPT-2 of transformers with the weights of a model. UserError that names what GPT-2 has not."""
    shape = model.config
    parts = {'mixer': shape.mixer == 'attention', 'ffn': shape.ffn == 'gelu', 'linear': shape.linear == 'dense',
             'positions': shape.positions == 'learned', 'n_kv_head': shape.n_kv_head in (0, shape.n_head),
             'tie_embeddings': shape.tie_embeddings, 'qk_norm': not shape.qk_norm, 'embed_norm': not shape.embed_norm,
             'embed_taps': not shape.embed_taps, 'logit_softcap': not shape.logit_softcap}
    if found := [f'{key}={getattr(shape, key)}: not in a GPT-2, which a model with norm=layernorm must be'
                 for key, good in parts.items() if not good]:
        raise UserError(*found)
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd, n_layer=shape.n_layer, n_head=shape.n_head,
        n_inner=model.blocks[0].ffn.up_proj.out_features, activation_function='gelu_new', **ids))

    def filled(weight, bias, like):  # theirs always have biases
        return weight, torch.zeros(like) if bias is None else bias
    weights = {'transformer.wte.weight': model.wte.weight, 'transformer.wpe.weight': model.wpe.weight, 'lm_head.weight': model.lm_head.weight}
    pairs = {'transformer.ln_f': filled(model.norm.weight, model.norm.bias, shape.n_embd)}
    for i, block in enumerate(model.blocks):
        qkv = [getattr(block.mixer, f'{key}_proj') for key in 'qkv']
        together = torch.cat([each.weight for each in qkv]), torch.cat([each.bias for each in qkv]) if shape.bias else None
        linears = {'attn.c_attn': together, **{name: (each.weight, each.bias) for name, each in (
            ('attn.c_proj', block.mixer.o_proj), ('mlp.c_fc', block.ffn.up_proj), ('mlp.c_proj', block.ffn.down_proj))}}
        pairs |= {f'transformer.h.{i}.{name}': (filled(weight.T, bias, len(weight))) for name, (weight, bias) in linears.items()}  # (in, out)
        pairs |= {f'transformer.h.{i}.{name}': filled(norm.weight, norm.bias, shape.n_embd)
                  for name, norm in (('ln_1', block.mixer_norm), ('ln_2', block.ffn_norm))}
    for name, (weight, bias) in pairs.items():
        weights |= {f'{name}.weight': weight, f'{name}.bias': bias}
    other.load_state_dict(weights)
    return other


def huggingface_tokenizer(content):
    """The tokenizers.Tokenizer that encodes every text as ours does. UserError if it is no byte-level BPE of ours."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokens, kinds, pairs, _ = vocabulary(content, 0)
    special = [token for token, kind in zip(tokens, kinds) if kind == 'CONTROL']
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(pair.split(' ')) for pair in pairs]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return bpe


# ----------------------------------------------------------------------------------------------------------------------
# Dense models as ternary ones

# Knobs of a run that its recovery does not take over: places, what belongs to its own length, and its end.
NOT_KEPT = ('out_dir', 'init_from', 'distill_from', 'anneal_steps', 'resume', 'other_data', 'verify', 'plan', 'card_gb', 'profile', 'max_steps', 'warmup_steps',
            'restart_steps', 'decay_steps', 'boundary_step', 'mandatory_steps', 'schedule', 'min_lr_ratio', 'eval_interval', 'save_interval',
            'sample_interval', 'log_interval', 'keep', 'device', 'dtype', 'compile', 'zero_init')


def convert(config):
    model, state, out = opened(config, config.to)
    stages = stages_of(model, config.to, config.tiles, config.top_k)
    train_keys = {key: value for key, value in state['config'].items() if key in settings.TrainConfig.__dataclass_fields__}
    if missing := [key for key in ('batch_size', 'batch_tokens', 'max_steps', 'learning_rate') if key not in train_keys]:
        raise UserError(f'{config.run}: its config has no {", ".join(missing)}, of which the recipe of the recovery is made')
    source, ids = real_text(state, model.config, 8 * PARITY_TOKENS)
    print(f'cross-entropy in nats a token, on {ids[:, 1:].numel():,} tokens of {source}:')
    for name, (other, ternary) in {'as trained': (model, True), **stages}.items():
        with as_they_are(not ternary):
            print(f'  {name:42} {loss_of(other, ids):.4f}')
    shape = {**vars(other.config), 'trix_top_k': config.top_k} if config.to == 'trix' else vars(other.config)
    with replacing_directory(out) as partial:
        (partial / 'checkpoints').mkdir()
        checkpoint.save(partial / 'checkpoints' / 'step_0000000.pt', {
            'model': other.state_dict(), 'optimizer': {}, 'step': 0, 'config': {**train_keys, **shape, 'out_dir': str(out), 'anneal_steps': 0},
            'tokenizer': state['tokenizer'], 'data': state['data']}, advice='try again')
        text = recovery(config, out, {**train_keys, **shape})
        (partial / 'recover.py').write_text(text, encoding='utf-8', errors='backslashreplace')  # of a path that is not UTF-8
    print(f'{out}: the last of these. To bring back what is lost: {Path(sys.executable).name} train.py {out / "recover.py"}')


def stages_of(model, to, tiles=8, top_k=6):
    """{stage of a conversion: (model in eval mode, whether its weights are ternary)}; what is saved is the last."""
    if to != 'trix':
        shape, weights = conversion.bitnet(model, to)
        return {'ternary': (built(shape, conversion.ternarised(shape, weights), model), True)}
    shape, weights = conversion.split(model, tiles, top_k)
    whole, last = replace(shape, trix_top_k=tiles), conversion.ternarised(shape, weights)
    return {f'cut into {tiles} tiles': (built(whole, weights, model), False),
            f'{top_k} of them for a token': (built(shape, weights, model), False),
            f'{top_k} of them, ternary': (built(shape, last, model), True),
            f'all {tiles}, ternary': (built(whole, last, model), True)}


def built(shape, weights, like):
    model = GPT(shape).to(next(like.parameters()).device)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def loss_of(model, ids):
    device = next(model.parameters()).device
    return sum(model(row[None, :-1].to(device), row[None, 1:].to(device)).item() for row in ids) / len(ids)


def recovery(config, out, knobs):
    """
    The config file of the training that follows a conversion: a tenth of the run's tokens. The rate is the best of 1, 2 and 5e-3 for
    dense_tiny, which Muon brings back less of; for other widths it is scaled and not tuned, and the run's own is its limit.
    """
    defaults = {field.name: field.default for kind in (GPTConfig, settings.TrainConfig) for field in fields(kind)}
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in knobs.items() if key in defaults and key not in NOT_KEPT}
    rows = max(1, knobs['batch_tokens'] // knobs['block_size'] // 2)  # of a step: half as many, so there are twice the steps
    steps = max(1, knobs['max_steps'] * knobs['batch_tokens'] // 10 // (rows * knobs['block_size']))
    kept |= {'init_from': str(out), 'distill_from': config.run, 'distill_weight': 1.0, 'max_steps': steps, 'schedule': 'linear', 'min_lr_ratio': 0.0,
             'batch_size': math.gcd(rows, knobs['batch_size']), 'batch_tokens': rows * knobs['block_size'],
             'optimizer': 'adamw', 'matrix_lr': 0.0, 'learning_rate': min(knobs['learning_rate'], 2e-3 * 128 / knobs['n_embd']),
             'eval_interval': max(1, steps // 4), 'save_interval': max(1, steps // 4), 'sample_interval': 0, 'out_dir': str(out / 'recovered')}
    if config.to == 'trix':
        kept['anneal_steps'] = steps // 4
    lines = [f'{key} = {value!r}' for key, value in kept.items() if value != defaults[key]]
    return f'# What export.py convert lost of {config.run}, brought back on a tenth of its tokens.\n' + '\n'.join(lines) + '\n'


COMMANDS = {'pack': pack, 'gguf': gguf, 'hf': hf, 'convert': convert}


def main(argv):
    config = load(argv, ExportConfig, positional=('command', 'run', 'out'), usage=__doc__)
    COMMANDS[config.command](config)


if __name__ == '__main__':
    run(main)
