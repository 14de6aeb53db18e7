"""Trained models elsewhere: packed ternary weights and their kernels, conversion of dense models. Used by export.py and sample.py.

`packed.py` is the 2-bit format and decoding from it, with `ternary.cpp` on a CPU and `ternary_triton.py` on a GPU. `convert.py` makes a
dense model ternary.
"""
