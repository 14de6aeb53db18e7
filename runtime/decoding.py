"""Decoding on a GPU: a step has the same kernels and addresses at every position, so it runs as one CUDA graph.

A plain step launches hundreds of kernels from Python, which takes longer than the kernels themselves. Here the position
is a tensor (kernels.Cache.at), the step is compiled if asked, and then recorded as a CUDA graph.

The first step compares the graph with plain steps. If it cannot be recorded, or differs, one line says so, and plain
steps go on. generation.decoder_for(model) uses this file where it helps.
"""
import contextlib
import copy
import functools
import sys

import torch
import torch.nn as nn

from kernels import one_line
from runtime import compiler

# Allowed relative difference between a graph and plain steps. Rounding alone causes far less, but it can send a token
# to another TriX tile.
TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.2}


class GraphDecoder:
    """Decodes with CUDA graphs. The interface is that of generation.Decoder.

    compile: also compile steps and prompts, which takes a minute.
    Keeps one cache and one graph per batch size and autocast dtype. The weights must not change in its lifetime."""

    def __init__(self, model, compile=False):
        self.model, self.compile = model, compile
        self.device = next(model.parameters()).device
        self.lowered = functools.cache(functools.partial(lowered, model))
        self.sequences = {}  # {(B, dtype): Sequences}

    def start(self, B):
        dtype = torch.float32
        if torch.is_autocast_enabled(self.device.type) and not getattr(self.model, 'decodes_in_fp32', False):
            dtype = torch.get_autocast_dtype(self.device.type)
        if (B, dtype) not in self.sequences:
            self.sequences[B, dtype] = Sequences(self.lowered(dtype), B, dtype, self.device, self.compile)
        self.current = self.sequences[B, dtype]
        self.current.cache.reset()

    @property
    def pos(self):
        return self.current.cache.pos

    def __call__(self, idx):
        return self.current(idx)


def lowered(model, dtype):
    """The model with its dense matrices in `dtype`, as autocast converts them in every step. Shares all other tensors.

    Returns the model itself if there is nothing to convert, or no memory for it."""
    def copied(module):
        new = copy.copy(module)
        new._modules = {name: copied(child) if child else child for name, child in module._modules.items()}
        if type(module) is nn.Linear:
            new._parameters = {name: p if p is None else nn.Parameter(p.detach().to(dtype), requires_grad=False)
                               for name, p in module._parameters.items()}
        return new
    if dtype == torch.float32:
        return model
    try:
        return copied(model).eval()
    except torch.OutOfMemoryError:
        return model


class Sequences:
    """B sequences: their cache, and the functions that read a prompt and take a step."""

    def __init__(self, model, B, dtype, device, compile):
        self.model, self.dtype, self.device, self.compile = model, dtype, device, compile
        self.cache, self.fixed = model.new_cache(B), model.fixed_weights()
        # The addresses that a graph reads.
        self.idx = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.read = self.step = None  # functions of idx -> logits (B, V), chosen at the first prompt and the first step

    def __call__(self, idx):  # (B, T) -> (B, V): logits of the last position
        self.cache.check(idx)
        if idx.size(1) > 1 or not self.cache.pos:
            self.read = self.read or self.choose_read(idx)
            return self.read(idx)
        self.step = self.step or self.choose_step(idx)
        return self.step(idx)

    @contextlib.contextmanager
    def context(self):
        # cache_enabled: a graph must not use converted weights that autocast frees at the end of the caller's context.
        lower = self.dtype != torch.float32
        autocast = torch.autocast(self.device.type, self.dtype, enabled=lower, cache_enabled=False)
        with torch.no_grad(), self.fixed, autocast:
            yield

    def logits(self, idx):
        return self.model(idx, cache=self.cache, last=True)[:, -1]

    def plain(self, idx):
        with self.context():
            return self.logits(idx)

    # ---- steps

    def compute(self):  # a step whose position is a tensor
        return self.logits(self.idx)

    def at_fixed_addresses(self, function, idx):
        """Run function(), which is `compute` in some form, for the tokens idx (B, 1)."""
        self.idx.copy_(idx)
        self.position.fill_(self.cache.pos)
        with self.context(), self.cache.at(self.position):
            return function()

    def choose_step(self, idx):
        """The fastest function for a step that gives the logits of plain steps. Prints a line about what failed."""
        if not self.cache.has_fixed_addresses():
            print('decoding without a CUDA graph, which is slower: a block has a cache of its own kind',
                  file=sys.stderr)
            return self.plain
        saved, start = [tensor.clone() for tensor in self.cache.tensors()], self.cache.pos

        def rewind():
            for tensor, value in zip(self.cache.tensors(), saved):
                tensor.copy_(value)
            self.cache.move(start)
        tokens, expected = [idx], []
        for _ in range(min(2, self.cache.block_size - start)):  # two steps, so that the position moves
            expected.append(self.plain(tokens[-1]).float())
            tokens.append(expected[-1].argmax(-1, keepdim=True))
        for compile in (True, False) if self.compile else (False,):
            rewind()
            try:
                step = self.recorded(idx, compile, rewind)
                found = [step(token).float() for token in tokens[:len(expected)]]
                problem = self.difference(expected, found)
            except Exception as error:
                problem = one_line(error)
            rewind()
            if not problem:
                return step
            what = 'a compiled step' if compile else 'a CUDA graph'
            print(f'decoding without {what}, which is slower: {problem}', file=sys.stderr)
        return self.plain

    def recorded(self, idx, compile, rewind):
        """A step as a CUDA graph -> a function of idx."""
        function = compiled(self.compute) if compile else self.compute
        for _ in range(2):  # allocate, compile and choose kernels, which recording must not
            self.at_fixed_addresses(function, idx)
            rewind()
        with torch.cuda.device_of(idx):  # a graph is recorded on the current GPU, which --device=cuda:1 does not change
            replay, output = self.at_fixed_addresses(lambda: record(function), idx)

        def step(idx):
            self.cache.check(idx)
            self.idx.copy_(idx)
            self.position.fill_(self.cache.pos)
            replay()
            self.cache.move(self.cache.pos + 1)
            return output.clone()
        return step

    def difference(self, expected, found):
        """The first difference beyond rounding between two lists of tensors, as text. Empty if there is none."""
        for a, b in zip(expected, found):
            distance = ((a - b).norm() / a.norm().clamp(min=1e-12)).item()
            if a.isfinite().all() and not distance <= TOLERANCE[self.dtype]:
                return f'its results are {distance:.2g} apart from plain steps'
        return ''

    # ---- prompts

    def choose_read(self, idx):
        """The fastest function for a prompt that gives the logits of plain execution.

        Prompts are compiled once for all lengths. Not those of resonance, whose convolutions depend on the length."""
        only_attention = all(name == 'attention' for name in self.model.config.mixers())
        if not self.compile or not only_attention or self.model.config.ffn == 'resonance' or idx.size(1) == 1:
            return self.plain
        expected = [self.plain(idx).float(), *self.last_keys()]
        self.cache.reset()

        def read(idx):
            if self.cache.pos or idx.size(1) == 1:
                return self.plain(idx)
            idx = idx.clone()
            torch._dynamo.mark_dynamic(idx, 1)
            with self.context():
                return function(idx)
        try:
            function = compiled(self.logits)
            problem = self.difference(expected, [read(idx).float(), *self.last_keys()])
        except Exception as error:
            problem = one_line(error)
        self.cache.reset()
        if problem:
            print(f'prompts are not compiled, which is slower: {problem}', file=sys.stderr)
        return self.plain if problem else read

    def last_keys(self):
        """Keys and values of the last layer, which depend on all layers before it."""
        kv, _ = self.cache.layers[-1]
        return [part[:, :, :kv.pos].clone().float() for part in (kv.k, kv.v)]


def compiled(function):
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one for each batch size
    # Reductions are not chosen by timing, so that the same seed gives the same text.
    options = {'deterministic': True} if compiler.BACKEND == 'inductor' else None
    return torch.compile(function, fullgraph=True, backend=compiler.BACKEND, options=options)


def record(function):
    """Record function() as a CUDA graph -> (a function that runs it, its output). Recording computes nothing.

    Where recording fails, torch keeps its own stream as the current one, and the state of the random numbers stays
    locked. A run that generates samples must go on, so both are put back."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[stream.device.index]
    state, failure = generator.graphsafe_get_state(), None
    generator.graphsafe_set_state(generator.clone_state())  # a step draws no random numbers: a copy serves the graph
    try:
        # thread_local: other threads may use the GPU meanwhile, such as the one that loads training data.
        with torch.cuda.graph(graph, capture_error_mode='thread_local'):
            try:
                output = function()
            except Exception as error:
                failure = error
                raise
    except Exception as error:
        raise failure or error  # the end of a failed recording raises, too, and knows no reason
    finally:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
    return graph.replay, output
