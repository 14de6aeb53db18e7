"""
What bench.py runs. A benchmark is a function of a BenchConfig that prints a table and writes
<config.out>/<machine>/<name>.json.

`blocks.py` (random tokens), `presets.py` (one config file), `sweep.py` (a grid of runs), `loop.py` (whole runs of
train.py), `preparing.py` (data), `quality.py` (losses) and `deployed.py` (exported models) hold the benchmarks.
`measure.py` has what they share: candidates in turn, ratios within a repeat, a process for each model. `tables.py`
writes results/README.md. `hellaswag.py` scores a benchmark for evaluate.py.
"""
