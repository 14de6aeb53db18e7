"""What bench.py runs. `measure.py` says how: candidates in turn, ratios within a repeat, each model in a process of its own.

`quality.py` compares what is learnt, `deployed.py` what exported models do, `hellaswag.py` scores a benchmark, `tables.py` writes
results/README.md.
"""
