"""The surroundings of training: hardware, compilation, processes, signals, logs, memory and time.

Start with `device.py` (device and precision), `parallel.py` (the processes) and `runlog.py` (the files of a run).
Several processes need `group.py`, and models that FSDP shards need `sharding.py`.
`plan.py` estimates a run before it starts, and `disk.py` its checkpoints. `profiling.py` shows where the
time and memory of a run go.
"""
