"""Turns text or tokens of other programs into a prepared directory. Used by prepare.py. Training needs only data.py.

`opening.py` finds the data of a training run, and `prepared.py` opens a prepared directory. `preparation.py` makes one,
`building.py` builds its content, and `vocabulary.py` its tokenizer. `corpus.py` has the corpora by name.
`reading.py` and `encodings.py` read documents from files, and `hub.py` from the Hugging Face Hub. `splitting.py` splits
a small corpus. `workspace.py` writes a directory atomically. `shards.py` and `linked.py` import tokens from other
programs. `show.py` shows what a directory contains, and `recommend.py` suggests what to train on it.
"""
