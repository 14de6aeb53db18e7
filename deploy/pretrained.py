"""
Pretrained models of others as starting points: GPT-2, Llama and BitNet in safetensors files.

    python train.py --init_from=gpt2 --dataset=text:notes.txt     # from the Hugging Face Hub; also hf:OWNER/NAME
    python train.py --init_from=hf:path/to/model                  # from a directory, without a network
    python sample.py hf:path/to/model                             # takes it in place of a run, as evaluate.py does

    options('gpt2')      # {option: value}: the shape of the model, from its config.json
    load('gpt2')         # a dict like a checkpoint's, with the weights

A model is accepted only if GPTConfig expresses it exactly. Pickle files are never opened.
"""
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from configurator import KINDS, UserError, read_json, typed
from corpora.vocabulary import from_file
from deploy.convert import nearest
from model import GPT, GPTConfig

NAMES = {'gpt2': 'openai-community/gpt2', 'gpt2-medium': 'openai-community/gpt2-medium',
         'gpt2-large': 'openai-community/gpt2-large', 'gpt2-xl': 'openai-community/gpt2-xl',
         'distilgpt2': 'distilbert/distilgpt2'}  # short names: name on the Hugging Face Hub
KINDS_OF = {'GPT2LMHeadModel': 'gpt2', 'LlamaForCausalLM': 'llama', 'BitNetForCausalLM': 'bitnet'}
LARGEST = 2**20  # of a width, a number of layers, of tokens or of positions
OUR_EPS = 1e-6  # of RMSNorm
# Buffers in older files. They hold constants, such as the causal mask.
CONSTANTS = re.compile(r'.*\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)')
FLOATS = ('F64', 'F32', 'F16', 'BF16')
# Options that do not change the function of a model, and may differ from the pretrained model's.
FREE = {'dropout', 'document_mask', 'eot_id', 'chunk_size', 'zero_init'}


def is_pretrained(source):
    """Whether a name given as a run means a pretrained model. A run directory called gpt2 is a run."""
    source = str(source)
    return source.startswith('hf:') or source in NAMES and not Path(source).exists()


def options(source):
    """
    The options that a pretrained model decides: {name: value}, its shape and its tokenizer. Downloads no weights.
    UserError if our model does not express it exactly. Empty for any other source, such as a run.
    """
    if not is_pretrained(source):
        return {}
    folder = folder_of(source, ('config.json', 'tokenizer.json'))
    config = vars(read_shape(folder)[1])
    tokenizer = {'tokenizer': str(folder / 'tokenizer.json')} if (folder / 'tokenizer.json').is_file() else {}
    if source in NAMES:
        tokenizer = {'tokenizer': 'gpt2'}
    return {key: value for key, value in config.items() if key not in FREE} | tokenizer


def conflicts(config, source, shape):
    """
    A list of options in `config` that contradict the pretrained model, one message each. shape: options(source).

    Fewer positions than the model has are fine. More are fine with rotary positions.
    """
    def fits(key, value, expected):
        if key == 'block_size':
            return value <= expected or shape['positions'] != 'learned'
        return value == expected or key == 'tokenizer' or key.startswith('trix_')  # tiles: no part of these models
    return [f'{config.origin[key]}: {key}={getattr(config, key)}, but {source} has {key}={value}: leave {key} out'
            + (', or give fewer' if key == 'block_size' else '')
            for key, value in shape.items() if not fits(key, getattr(config, key), value)]


def load(source, block_size=0, say=print):
    """
    A pretrained model as the dict of a checkpoint at step 0: its weights, its config and the content of its tokenizer
    (None if it has no tokenizer.json).

    block_size: positions that are needed, if not all. say: prints what a user should know about the model.
    UserError if files are missing or broken, or if our model does not express it exactly.
    """
    folder = folder_of(source, ('config.json', 'tokenizer.json', 'model*.safetensors', 'model*.safetensors.index.json'))
    kind, config, eps = read_shape(folder)
    weights = read_weights(folder, kind, config)
    if kind == 'bitnet':
        say(f'{source}: its activations are rounded to int8 here, as in training')
    if eps != OUR_EPS:
        rescale(weights, config, math.sqrt(OUR_EPS / eps))
        say(f'{source}: its RMSNorm has eps={eps:g} and ours {OUR_EPS:g}: embedding and residual branches are scaled '
            f'by {math.sqrt(OUR_EPS / eps):.4g}, which gives the same outputs')
    if 0 < block_size < config.block_size and 'wpe.weight' in weights:
        say(f'{source}: of its {config.block_size:,} learned positions the first {block_size:,} are used')
        weights['wpe.weight'] = weights['wpe.weight'][:block_size]
    tokenizer = folder / 'tokenizer.json'
    return {'model': weights, 'optimizer': {}, 'step': 0, 'config': vars(config), 'data': {},
            'tokenizer': read_tokenizer(tokenizer) if tokenizer.is_file() else None}


def read_tokenizer(path):
    try:
        return from_file(path)
    except UserError as error:
        raise UserError(f'{error} (without this file, the model can be trained on shards of token ids)')


# ----------------------------------------------------------------------------------------------------------------------
# Where the files are

def folder_of(source, patterns):
    """The directory of a pretrained model. Downloads the files of `patterns` if `source` is a name on the Hub."""
    name = NAMES.get(source, source.removeprefix('hf:'))
    path = Path(name).expanduser()
    if source not in NAMES and path.is_dir():
        return path
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', name):
        raise UserError(f'{source}: no such directory')
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f'{source}: {name} is no directory here, and a download needs the package huggingface_hub: '
                        'pip install huggingface_hub')
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # its libraries raise many types: network, name, access rights, disk
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise UserError(f'{source}: {name} is no directory here, and the download from the Hugging Face Hub failed '
                        f'({reason:.200}): without a network, download it elsewhere and give its directory as hf:PATH')


# ----------------------------------------------------------------------------------------------------------------------
# config.json

@dataclass
class Description:
    """The content of a config.json, with checked values. `problems` collects what our model does not express."""
    path: Path
    values: dict
    problems: list

    def get(self, key, kind, default):
        """The value of a key, or the default if it is missing or null."""
        value = self.values.get(key)
        try:
            return default if value is None else typed(value, kind)
        except (ValueError, OverflowError):
            raise UserError(f'{self.path}: {key}={shown(value)}: expected {KINDS[kind]}')

    def size(self, key, default=0):
        """A number from 1 to LARGEST."""
        number = self.get(key, int, default)
        if key not in self.values and not default:
            raise UserError(f'{self.path}: {key} is missing')
        if not 1 <= number <= LARGEST:
            raise UserError(f'{self.path}: {key}={shown(number)}: expected 1 to {LARGEST:,}')
        return number

    def expect(self, key, *supported, default=None):
        """Note a problem unless the value is one of `supported`. The first is the default, if none is given."""
        value = self.values.get(key)
        value = value if value is not None else supported[0] if default is None else default
        if value not in supported or isinstance(value, bool) != isinstance(supported[0], bool):
            expected = '' if supported == (None,) else f', only {" or ".join(map(str, supported))}'
            self.problems.append(f'{self.path}: {key}={shown(value)} is not supported{expected}')


def shown(value):
    return f'{value!r:.80}'


def read_shape(folder):
    """config.json of a directory -> (kind of layout, GPTConfig, eps of its norms). UserError that names every value
    that our model does not express."""
    path = folder / 'config.json'
    file = Description(path, read_json(path, 'expected the config.json of a Hugging Face model'), [])
    names = file.values.get('architectures') or []
    if not isinstance(names, list) or len(names) != 1 or names[0] not in KINDS_OF:
        raise UserError(f'{path}: architectures={shown(names)}: expected one of {", ".join(KINDS_OF)}')
    kind = KINDS_OF[names[0]]
    file.expect('quantization_config', None)
    if kind == 'gpt2':
        config, eps = gpt2_shape(file), OUR_EPS
    else:
        config, eps = llama_shape(file, kind)
    problems = file.problems or [f'{path}: {problem}' for problem in config.problems()]
    if problems:
        raise UserError(*problems)
    return kind, config, eps


def gpt2_shape(file):
    file.expect('activation_function', 'gelu_new', 'gelu_pytorch_tanh')  # two names of one function
    file.expect('layer_norm_epsilon', 1e-5)
    file.expect('scale_attn_weights', True)
    file.expect('scale_attn_by_inverse_layer_idx', False)
    file.expect('add_cross_attention', False)
    width = file.size('n_embd')
    return GPTConfig(
        block_size=file.size('n_positions'), vocab_size=file.size('vocab_size'), n_layer=file.size('n_layer'),
        n_head=file.size('n_head'), n_embd=width, d_ff=file.size('n_inner', 4 * width), ffn='gelu', norm='layernorm',
        positions='learned', bias=True, tie_embeddings=file.get('tie_word_embeddings', bool, True))


def llama_shape(file, kind):
    """(GPTConfig, eps) of a Llama or a BitNet."""
    is_bitnet = kind == 'bitnet'
    file.expect('hidden_act', 'silu', default='relu2' if is_bitnet else 'silu')
    file.expect('sliding_window', None)
    bias = file.get('attention_bias', bool, False)
    file.expect('mlp_bias', bias, default=False)  # biases in all matrices or in none
    width, heads = file.size('hidden_size'), file.size('num_attention_heads')
    file.expect('head_dim', width // heads)
    eps = file.get('rms_norm_eps', float, 1e-5 if is_bitnet else OUR_EPS)
    if not 1e-12 <= eps <= 1e-2 or is_bitnet and eps != OUR_EPS:
        expected = f'{OUR_EPS:g}' if is_bitnet else '1e-12 to 1e-2'
        file.problems.append(f'{file.path}: rms_norm_eps={eps:g}: expected {expected}')
    theta = rotary_base(file, 500_000.0 if is_bitnet else 10_000.0)
    kv_heads = file.size('num_key_value_heads', heads)
    return GPTConfig(
        block_size=file.size('max_position_embeddings', 2048), vocab_size=file.size('vocab_size'),
        n_layer=file.size('num_hidden_layers'), n_head=heads, n_kv_head=0 if kv_heads == heads else kv_heads,
        n_embd=width, d_ff=file.size('intermediate_size'), ffn='swiglu', linear='bitnet' if is_bitnet else 'dense',
        bias=bias, rope_theta=theta, tie_embeddings=file.get('tie_word_embeddings', bool, False)), eps


def rotary_base(file, default):
    """The base of the rotary frequencies. Notes a problem for any other kind of rotary positions."""
    rope = Description(file.path, dict(file.values), file.problems)
    for key in ('rope_scaling', 'rope_parameters'):  # older and newer files
        part = file.values.get(key)
        if part is not None and not isinstance(part, dict):
            raise UserError(f'{file.path}: {key}={shown(part)}: expected an object')
        rope.values |= part or {}
    rope.expect('rope_type', 'default')
    if file.values.get('rope_scaling'):
        rope.expect('type', 'default')
    rope.expect('partial_rotary_factor', 1.0)
    return rope.get('rope_theta', float, default)


# ----------------------------------------------------------------------------------------------------------------------
# Weights

def tensor_names(kind, config):
    """{name in the files: names of our parameters, which the tensor holds one behind the other}"""
    if kind == 'gpt2':
        names = {'wte': ['wte'], 'wpe': ['wpe'], 'ln_f': ['norm']}
        layer = {'ln_1': ['mixer_norm'], 'attn.c_attn': ['mixer.q_proj', 'mixer.k_proj', 'mixer.v_proj'],
                 'attn.c_proj': ['mixer.o_proj'], 'ln_2': ['ffn_norm'], 'mlp.c_fc': ['ffn.up_proj'],
                 'mlp.c_proj': ['ffn.down_proj']}
        prefix = 'h.'
    else:
        names = {'model.embed_tokens': ['wte'], 'model.norm': ['norm']}
        layer = {'input_layernorm': ['mixer_norm'], 'post_attention_layernorm': ['ffn_norm']}
        layer |= {f'self_attn.{key}_proj': [f'mixer.{key}_proj'] for key in 'qkvo'}
        layer |= {f'mlp.{key}_proj': [f'ffn.{key}_proj'] for key in ('gate', 'up', 'down')}
        prefix = 'model.layers.'
    for i in range(config.n_layer):
        names |= {f'{prefix}{i}.{name}': [f'blocks.{i}.{own}' for own in ours] for name, ours in layer.items()}
    if not config.tie_embeddings:
        names['lm_head'] = ['lm_head']
    return names


def expected_tensors(kind, config):
    """
    {name in the files: (its shape, names of our parameters)}. GPT-2 stores matrices as (in, out), we as (out, in).
    """
    with torch.device('meta'):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters(remove_duplicate=False)}
    found = {}
    for name, ours in tensor_names(kind, config).items():
        for part in ('weight', 'bias'):
            own = [f'{each}.{part}' for each in ours]
            if own[0] in shapes:
                shape = sum(shapes[each][0] for each in own), *shapes[own[0]][1:]
                found[f'{name}.{part}'] = shape[::-1] if is_transposed(kind, own[0]) else shape, own
    if kind == 'bitnet':
        for i in range(config.n_layer):
            found[f'model.layers.{i}.self_attn.attn_sub_norm.weight'] = (config.n_embd,), []
            found[f'model.layers.{i}.mlp.ffn_sub_norm.weight'] = (config.d_ff,), []
    return found


def is_transposed(kind, own):
    return kind == 'gpt2' and own.endswith('_proj.weight')


def read_weights(folder, kind, config):
    """{name of our parameter: fp32 tensor}. UserError if a tensor is missing, unknown, or has another shape or type."""
    with ExitStack() as stack:
        files = {}  # {name of a tensor, without a prefix of GPT-2: (open file, name in it)}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, 'pt'))
            except (SafetensorError, OSError) as error:
                raise UserError(f'{path}: truncated, damaged, or not a safetensors file ({error})')
            for name in file.keys():
                plain = name.removeprefix('transformer.')
                if plain in files:
                    raise UserError(f'{path}: {name} is also in another file')
                if not CONSTANTS.fullmatch(plain):
                    files[plain] = file, name
        if config.n_layer > len(files):
            raise UserError(f'{folder}: config.json has {config.n_layer:,} layers, '
                            f'the files only {len(files):,} tensors')
        expected = expected_tensors(kind, config)
        head = {'lm_head.weight'} if config.tie_embeddings else set()  # older files hold a tied head, too
        check(folder, files, expected, head)
        weights = {}
        for name, (_, ours) in expected.items():
            weights |= our_weights(f'{folder}: {name}', kind, read(name, files), ours)
        if head & files.keys() and not torch.equal(read('lm_head.weight', files), weights['wte.weight']):
            raise UserError(f'{folder}: config.json has tie_word_embeddings=true, '
                            'but lm_head.weight is not the embedding')
    weights['lm_head.weight'] = weights['wte.weight' if config.tie_embeddings else 'lm_head.weight']
    return weights


def read(name, files):
    file, there = files[name]
    return file.get_tensor(there).float()


def weight_files(folder):
    """The safetensors files of a directory."""
    index, single = folder / 'model.safetensors.index.json', folder / 'model.safetensors'
    if not index.is_file():
        if not single.is_file():
            pickled = next(chain(folder.glob('*.bin'), folder.glob('*.pt*')), None)
            raise UserError(f'{folder}: no model.safetensors' + (f': {pickled.name} is a pickle file, which could run '
                            'code, and is not read: save the model with safe_serialization=True' if pickled else ''))
        return [single]
    content = read_json(index, 'expected the index of a Hugging Face model')
    names = content.get('weight_map')
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f'{index}: broken: no valid weight_map')
    names = sorted(set(names.values()))
    if wrong := [name for name in names if Path(name).name != name or not name.endswith('.safetensors')]:
        raise UserError(f'{index}: {shown(wrong[0])} is not the name of a safetensors file in this directory')
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f'{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} files)')
    return [folder / name for name in names]


def check(folder, files, expected, may_be_there):
    """UserError if the files don't hold exactly the expected tensors. Reads only their headers."""
    problems = []
    for what, names in (('missing', expected.keys() - files.keys()),
                        ('unknown', files.keys() - expected.keys() - may_be_there)):
        if names:
            more = f' and {len(names) - 3} more' if len(names) > 3 else ''
            problems.append(f'{folder}: {what}: {", ".join(sorted(names)[:3])}{more}')
    for name in expected.keys() & files.keys():
        file, there = files[name]
        header, shape = file.get_slice(there), tuple(expected[name][0])
        if tuple(header.get_shape()) != shape:
            problems.append(f'{folder}: {name} has shape {tuple(header.get_shape())}, but config.json makes it {shape}')
        elif header.get_dtype() not in FLOATS:
            problems.append(f'{folder}: {name} is {header.get_dtype()}: expected one of {", ".join(FLOATS)}, '
                            'not quantised')
    if problems:
        raise UserError(*problems[:5])


def our_weights(where, kind, tensor, ours):
    """A tensor of the files -> {name of our parameter: weight}"""
    if not tensor.isfinite().all():
        raise UserError(f'{where} has numbers that are not finite')
    if not ours:  # a sub-norm of BitNet: ours have no weights
        if not (tensor == 1).all():
            raise UserError(f'{where} is not all ones, and the sub-norms of this model have no weights')
        return {}
    tensor = tensor.T if is_transposed(kind, ours[0]) else tensor
    if kind == 'bitnet' and ours[0].endswith('_proj.weight'):
        size = tensor.abs()
        if not torch.isclose(size[size > 0], size.max(), rtol=1e-3, atol=0).all():
            raise UserError(f'{where} is not ternary: expected -s, 0 and s for one number s')
        tensor = nearest(tensor)  # latent weights that training rounds to exactly these
    return dict(zip(ours, (part.contiguous() for part in tensor.chunk(len(ours)))))


def rescale(weights, config, factor):
    """
    Scale the residual stream by `factor`, and with it the eps of every RMSNorm by factor^2. x / sqrt(mean(x^2) + eps)
    does not change if x is scaled by f and eps by f^2. The logits stay as they are.
    """
    streams = ('wte.weight', 'o_proj.weight', 'o_proj.bias', 'down_proj.weight', 'down_proj.bias')
    for name in list(weights):
        if name.endswith(streams):
            weights[name] = weights[name] * factor
    if config.tie_embeddings:  # the head got the factor, too
        weights['lm_head.weight'] = weights['wte.weight']
        weights['norm.weight'] = weights['norm.weight'] / factor
