# Replaces a preset's recipe, which is our own and faster, with the original recipe:
# python train.py config/trix_tiny.py config/recipes/source.py
# The original is the plan for TriX: AdamW and a cosine schedule at the plan's peak rates. The plan names no QK-norm,
# embedding norm, taps or zero initialisation, so they are off.
optimizer, matrix_lr = 'adamw', 0.0
learning_rate = {128: 1e-3, 256: 6e-4, 512: 3e-4}.get(n_embd, 1e-3)
schedule, min_lr_ratio = 'cosine', 0.1
qk_norm = zero_init = embed_norm = False
embed_taps = 0
document_starts = 0.0
