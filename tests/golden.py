"""
A golden record: the numbers that a refactor must not change. Not a test, because they depend on the machine.

    python tests/golden.py record before/        # on the commit before: writes runs, exports and figures into before/
    python tests/golden.py compare before/       # on the commit after: does the same again and prints every difference

It prepares data, trains short runs of every kind of block (one and two processes, AdamW and Muon, a resume), evaluates, packs
and samples. `compare` also resumes a checkpoint and samples from a packed file that the commit before has written.
"""
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
SMALL = ('--vocab_size=320 --block_size=64 --n_layer=2 --n_head=4 --n_embd=64 --batch_size=4 --batch_tokens=512 --max_steps=24 '
         '--learning_rate=3e-3 --eval_interval=8 --eval_tokens=2048 --sample_interval=12 --sample_tokens=16 --save_interval=12 '
         '--keep=0 --log_interval=1 --device=cpu --compile=false').split()
RUNS = {
    'dense': ['--ffn=gelu', '--dropout=0.1'],
    'gpt2': ['--ffn=gelu', '--positions=learned', '--norm=layernorm', '--bias=true', '--spike_z=3', '--spike_window=8'],
    'llama': ['--ffn=swiglu', '--n_kv_head=2', '--tie_embeddings=false', '--qk_norm=true', '--schedule=wsd'],
    'trix': ['--ffn=trix', '--trix_tiles=8', '--trix_top_k=2', '--trix_shared=true'],
    'trix_anneal': ['--ffn=trix', '--trix_tiles=4', '--trix_top_k=1', '--anneal_steps=12', '--activation_checkpointing=true'],
    'bitnet': ['--linear=bitnet', '--ffn=relu2', '--sub_norm=true', '--act_bits=8', '--schedule=two_stage'],
    'resonance': ['--mixer=resonance', '--ffn=resonance', '--num_frequencies=16', '--chunk_size=16'],
    'hybrid': ['--mixer=resonance', '--ffn=trix', '--attention_every=2', '--num_frequencies=16'],
    'muon': ['--ffn=swiglu', '--optimizer=muon', '--matrix_lr=0.01'],
}
TWO_PROCESSES = {'trix_2': RUNS['trix'], 'muon_2': RUNS['muon'], 'fsdp_2': [*RUNS['llama'], '--parallel=fsdp']}
ENVIRONMENT = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONUTF8': '1'}


def command(*words):
    """Standard output of a script of the repository. Ends the program if it fails."""
    words = [sys.executable, *map(str, words)]
    result = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    if result.returncode:
        sys.exit(f'{" ".join(words)}: exit {result.returncode}\n{result.stdout[-1000:]}{result.stderr[-3000:]}')
    return result.stdout


def script(name, *words):
    return command(ROOT / name, *words)


def torchrun(*words):
    return command('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'train.py', *words)


def digest(tensors):
    """One hash of named tensors: names, types, shapes and bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def file_digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def figures(run):
    """Losses, gradient norms, validation losses, samples, and the weights of the last checkpoint."""
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    last = max((run / 'checkpoints').glob('step_*.pt'))
    state = torch.load(last, weights_only=True)
    return {
        'steps': [[line['step'], line['tokens'], line['loss'], line['grad_norm'], line['lr']] for line in lines if line['kind'] == 'train'],
        'evals': [[line['step'], line['loss'], line['bits_per_byte']] for line in lines if line['kind'] == 'eval'],
        'statistics': [{key: value for key, value in line.items() if '/' in key or key.startswith(('trix', 'ternary', 'flip'))}
                       for line in lines if line['kind'] == 'train'][-1:],
        'samples': [json.loads(line)['text'] for line in (run / 'samples.jsonl').read_text().splitlines()][-4:],
        'weights': digest(state['model']), 'step': state['step'], 'best': state['best'],
        'optimizer': digest({f'{group}.{number}.{key}': value for group in ('optimizer', 'muon') if group in state
                             for number, values in state[group]['state'].items()
                             for key, value in values.items() if torch.is_tensor(value)})}


def corpus(folder):
    """A text with structure, made here."""
    draw = random.Random(1)
    words = ['the', 'tile', 'routes', 'a', 'token', 'by', 'its', 'own', 'ternary', 'weights', 'and', 'learns', 'def', 'return', 'naïve']
    documents = [' '.join(draw.choices(words, weights=range(len(words), 0, -1), k=draw.randrange(20, 200))) for _ in range(600)]
    path = folder / 'corpus.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    return path


def measure(folder):
    """{what: figures} of everything, its files in `folder`."""
    data, found = folder / 'data', {}
    script('prepare.py', f'--dataset=text:{corpus(folder)}', '--vocab_size=320', f'--out={data}', '--num_proc=1')
    found['data'] = {name: file_digest(data / name) for name in ('train.bin', 'val.bin', 'tokenizer.json')}
    common = [*SMALL, f'--dataset={data}']
    for name, words in RUNS.items():
        script('train.py', *common, *words, f'--out_dir={folder / name}')
        found[name] = figures(folder / name)
        print(name, found[name]['steps'][-1], flush=True)
    for name, words in TWO_PROCESSES.items():
        torchrun(*common, *words, f'--out_dir={folder / name}')
        found[name] = figures(folder / name)
        print(name, found[name]['steps'][-1], flush=True)
    for name in ('trix', 'muon'):
        found[f'{name} resumed'] = resumed(folder, folder, name)
    for name in ('trix', 'bitnet', 'hybrid'):
        out = script('evaluate.py', folder / name, '--eval_tokens=0', '--stride=16', '--device=cpu')
        found[f'{name} evaluated'] = {key: value for key, value in json.loads(out.splitlines()[-1]).items()
                                      if isinstance(value, (int, float)) and 'second' not in key and 'per_s' not in key}
        packed = folder / f'{name}.safetensors'
        script('export.py', 'pack', folder / name, packed)
        with safe_open(packed, 'pt') as file:
            found[f'{name} packed'] = digest({key: file.get_tensor(key) for key in file.keys()})
        found[f'{name} sampled'] = sampled(folder / name)
        found[f'{name} sampled packed'] = sampled(packed)
    return found


def resumed(before, folder, name):
    """The run of `before` from the middle on, again: its last half must come out the same."""
    out = folder / f'{name}_resumed'
    script('train.py', *SMALL, f'--dataset={before / "data"}', *RUNS[name], f'--out_dir={out}',
           f'--resume={before / name / "checkpoints" / "step_0000012.pt"}')
    result = figures(out)
    return {'steps': result['steps'][-12:], 'weights': result['weights'], 'optimizer': result['optimizer']}


def sampled(model):
    return script('sample.py', model, '--prompt=the tile', '--num=2', '--max_new_tokens=40', '--device=cpu')


def differences(before, after, where=''):
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), f'{where}/{key}')
    elif before != after:
        yield f'{where}: {str(before)[:100]} -> {str(after)[:100]}'


def main(argv):
    torch.set_num_threads(1)
    mode, folder = argv
    folder = Path(folder).absolute()
    if mode == 'record':
        folder.mkdir()
        (folder / 'record.json').write_text(json.dumps(measure(folder), indent=1))
        return
    before = json.loads((folder / 'record.json').read_text())
    with tempfile.TemporaryDirectory() as scratch:
        after = json.loads(json.dumps(measure(Path(scratch))))
        found = list(differences(before, after))
        for name in ('trix', 'muon'):
            old = json.loads(json.dumps(resumed(folder, Path(scratch, 'old'), name)))
            found += differences(before[f'{name} resumed'], old, f'{name} resumed from the old checkpoint')
        for name in ('trix', 'bitnet', 'hybrid'):
            found += differences(before[f'{name} sampled packed'], sampled(folder / f'{name}.safetensors'), f'{name} from the old packed file')
    print('\n'.join(found) or f'no difference in {len(before)} records')
    sys.exit(bool(found))


if __name__ == '__main__':
    main(sys.argv[1:])
