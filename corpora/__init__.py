"""From text, or from tokens of other programs, to a prepared directory. Used by prepare.py; training needs only data.py.

`corpus.py` reads documents, `splitting.py` splits a small corpus, `workspace.py` writes a directory whole or not at all,
`shards.py` and `linked.py` take tokens that other programs have made. `show.py` and `recommend.py` say what a directory holds and what to train on it.
"""
