"""Trained models elsewhere. Used by export.py, sample.py, evaluate.py and the benchmarks.

`packed.py` is the 2-bit format and decoding from it, with `ternary.cpp` on a CPU and `ternary_triton.py` on a GPU.
`gguf.py` and `huggingface.py` write files for other programs, `convert.py` makes a dense model ternary, `parity.py`
compares exports with the model.
"""
