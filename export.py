"""A trained model as a file that runs elsewhere, small and fast.

    python export.py pack runs/x                     # runs/x/packed.safetensors: ternary weights in 2 bits
    python export.py pack runs/x small.safetensors --embeddings=int8
    python export.py pack runs/x --checkpoint=best   # or last, or a step
    python sample.py small.safetensors               # sample.py and evaluate.py take it in place of a run
    python export.py gguf runs/x                     # runs/x/model.gguf, for llama.cpp: BitNet and Llama-like models
    python export.py gguf runs/x x.gguf --matrices=TQ1_0 --embeddings=Q8_0
    python export.py hf runs/x                       # runs/x/hf, for transformers: Llama, BitNet and GPT-2, in fp32
    python export.py convert runs/dense --to=trix --tiles=8 --top_k=6  # runs/dense/trix: FFNs cut into ternary tiles
    python export.py convert runs/dense --to=bitnet  # runs/dense/bitnet: ternary blocks; bitnet_ffn: ternary FFNs
    python train.py runs/dense/bitnet/recover.py     # written by convert: recovers most of the lost quality

Every export ends with a comparison: the outputs of the export and of the trained model, on text.
"""
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, answer_help, load, run, utf8_path  # before torch, so that Ctrl-C ends its import
answer_help(__name__, __doc__, 'export.ExportConfig')

from checkpoint import trained_share
from deploy import convert, gguf, huggingface, packed, parity, pretrained
from files import named_at_last
from runtime import device as hardware
from runtime.choice import choose_checkpoint


@dataclass
class ExportConfig:
    command: str = ''  # pack, gguf, hf or convert; may stand without --command=
    run: str = ''  # run directory or checkpoint file; may stand without --run=
    checkpoint: str = 'last'  # of a run directory: last (the newest good one), best (lowest validation loss) or a step
    out: str = ''  # path of the export (empty: in the run directory); may stand without --out=
    embeddings: str = ''  # embedding and head; pack: float32 (default for ternary models), bfloat16 (default for
    # others) or int8 (TriX: 16 bits for the embedding); gguf: F16 (default), Q8_0 or F32
    matrices: str = ''  # pack: of dense matrices, float32 (default for ternary models) or bfloat16 (default for
    # others); gguf: TQ2_0 (default for ternary models), TQ1_0, Q8_0, F16 (default for others) or F32
    to: str = ''  # convert: trix, bitnet (all matrices of the blocks) or bitnet_ffn
    tiles: int = 8  # convert --to=trix: tiles of a layer
    top_k: int = 6  # convert --to=trix: tiles per token, at the end of the recovery
    device: str = 'auto'  # of the comparison: auto, cpu, cuda, cuda:N or mps

    def problems(self):
        found = []
        if self.command not in COMMANDS:
            found.append(f'{self.command or "no command"}: name one of {", ".join(COMMANDS)}')
        if not self.run:
            found.append('name a run directory or a checkpoint: python export.py pack runs/x')
        if self.command == 'convert' and self.to not in ('trix', 'bitnet', 'bitnet_ffn'):
            found.append(f'to={self.to!r}: convert needs --to=trix, bitnet or bitnet_ffn')
        if self.command != 'convert' and self.to:
            found.append(f'to={self.to!r}: only convert has this option')
        if not 1 <= self.top_k <= self.tiles:
            found.append(f'top_k={self.top_k}, tiles={self.tiles}: a token needs at least one tile and at most all')
        choices = {'pack': {'embeddings': packed.EMBEDDINGS, 'matrices': packed.MATRICES},
                   'gguf': {'embeddings': gguf.EMBEDDINGS, 'matrices': gguf.MATRICES}}
        for key in ('embeddings', 'matrices'):
            value, allowed = getattr(self, key), choices.get(self.command, {}).get(key)
            if value and not allowed:
                found.append(f'{key}={value!r}: {self.command} has no such option')
            elif value and value not in allowed:
                found.append(f'{key}={value!r} is not one of {", ".join(allowed)}')
        return found


def load_run(config, name):
    """(model, dict of its checkpoint, path of the export). name: what the export is called in a run directory.
    UserError if the model can't be exported to that path."""
    if pretrained.is_pretrained(config.run) and config.command == 'convert':
        raise UserError(f'{config.run} is a pretrained model: first finetune it with train.py '
                        f'--init_from={config.run}, then convert that run. '
                        'The training that recovers the loss needs the data of a run')
    if pretrained.is_pretrained(config.run) and not config.out:
        raise UserError(f'{config.run}: give the export a name: python export.py {config.command} {config.run} OUT')
    source = choose_checkpoint(config.run, config.checkpoint)
    model, state = packed.load_model(source, hardware.resolve(config.device, 'float32')[0])
    folder = Path(config.run) if Path(config.run).is_dir() else Path(config.run).parent
    out, suffix = Path(config.out or folder / name), Path(name).suffix
    if suffix and out.suffix != suffix:
        raise UserError(f'{out}: the name of this export must end in {suffix}')
    if not suffix and out.exists():
        raise UserError(f'{out} already exists: choose another directory, or remove it')
    if config.command != 'convert' and utf8_path(out) is None:
        raise UserError(f'{out}: this path is not UTF-8, and programs that read this format cannot open it: '
                        'choose another path')
    if 'packed' in state:
        raise UserError(f'{config.run} is already packed: name the run or the checkpoint instead')
    if (share := trained_share(state)) < 1:
        raise UserError(f'{source}: step {state["step"]:,} is in the ternary warm-up, its weights are '
                        f'{100 * share:.0f} % ternary: export a checkpoint behind it')
    return model, state, out


def pack(config):
    model, state, out = load_run(config, 'packed.safetensors')
    default = 'float32' if packed.has_ternary(model) else 'bfloat16'
    embeddings, matrices = config.embeddings or default, config.matrices or default
    tensors = packed.pack(model, embeddings, matrices)
    source, ids = parity.real_text(state, model.config)
    with named_at_last(out) as work:
        packed.write(work, tensors, embeddings, state, matrices)
        print_sizes(model, tensors, out, work.stat().st_size)
        exported = packed.load_model(work, next(model.parameters()).device)[0]
        parity.compare(out, parity.logits_of(model, ids), parity.logits_of(exported, ids), source, ids)


def print_sizes(model, tensors, out, size):
    """Bytes in fp32 and in the packed file: of every ternary matrix, of every kind of tensor, and in all."""
    kinds = defaultdict(lambda: [0, 0])  # kind: [bytes in fp32, bytes in the file]
    dense = {name for name, (_, kind) in packed.parts(model).items() if kind == 'matrix'}
    for name, tensor in tensors.items():
        if name.endswith('.codes'):
            matrix = name.removesuffix('.codes')
            shape = model.get_parameter(matrix).shape
            kind, before = 'ternary codes', 4 * shape.numel()
            print(f'{matrix:36} {" x ".join(map(str, shape)):>16}  {before:>12,} -> {tensor.nbytes:>11,} bytes: '
                  f'{before / tensor.nbytes:.4g}x')
        elif name.endswith('.scale'):
            kind, before = 'scales', 0
        else:
            kind = 'embeddings' if name in ('wte.weight', 'lm_head.weight') else 'everything else'
            kind = 'dense matrices' if name in dense else kind
            before = 4 * tensor.numel()
        kinds[kind][0] += before
        kinds[kind][1] += tensor.nbytes
    total_before, total = (sum(sizes) for sizes in zip(*kinds.values()))
    kinds['tokenizer, config, names'] = [0, size - total]
    for kind, (before, after) in kinds.items():
        ratio = f': {before / after:.4g}x' if before else ''
        print(f'{kind:26} {before:>14,} -> {after:>12,} bytes{ratio}')
    print(f'{out}: {size:,} bytes, of which the weights take {total:,}: '
          f'{total_before / total:.2f} times smaller than {total_before:,} in fp32')


def to_gguf(config):
    model, state, out = load_run(config, 'model.gguf')
    with named_at_last(out) as work:
        description = gguf.write(work, model, state['tokenizer'], config.matrices, config.embeddings)
        print(f'{out}: {work.stat().st_size:,} bytes, {description}')
        parity.disable_document_mask(model)
        gguf.compare_with_llama_cpp(work, model, state, out)


def to_huggingface(config):
    model, state, out = load_run(config, 'hf')
    with named_at_last(out, parents=True) as work:
        name = huggingface.write(work, model, state)
        print(f'{out}: {name}, {sum(file.stat().st_size for file in work.iterdir()):,} bytes')
        parity.disable_document_mask(model)
        huggingface.compare_with_transformers(work, model, state, out)


def to_ternary(config):
    model, state, out = load_run(config, config.to)
    source = choose_checkpoint(config.run, config.checkpoint)
    convert.convert(source, model, state, out, config.to, config.tiles, config.top_k)
    command = f'{Path(sys.executable).name} train.py {out / "recover.py"}'
    print(f'{out} holds the model of the last line. To recover the loss: {command}')


COMMANDS = {'pack': pack, 'gguf': to_gguf, 'hf': to_huggingface, 'convert': to_ternary}


def main(argv):
    config = load(argv, ExportConfig, positional=('command', 'run', 'out'), usage=__doc__)
    COMMANDS[config.command](config)


if __name__ == '__main__':
    run(main)
