"""What a run needs around the training itself: hardware, compilation, processes, signals, its log, memory and time.

Start with `device.py` (what to run on), `parallel.py` (several processes) and `runlog.py` (the files of a run). `plan.py` estimates a
run before it starts, `profiling.py` says where its time and memory go.
"""
