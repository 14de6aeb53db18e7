# The recipe of the source systems on top of a preset of ours, which has a faster one:
# python train.py config/trix_tiny.py config/recipes/source.py
# AdamW and cosine at the peak rates of the TriX plan (source A), nothing in front of or inside the blocks but what it names.
optimizer, matrix_lr = 'adamw', 0.0
learning_rate = {128: 1e-3, 256: 6e-4, 512: 3e-4}.get(n_embd, 1e-3)
schedule, min_lr_ratio = 'cosine', 0.1
qk_norm = zero_init = embed_norm = False
embed_taps = 0
