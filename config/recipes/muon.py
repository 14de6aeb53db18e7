# Replaces a preset's recipe with our own, which reaches a lower loss from the same tokens (docs/sources.md):
# python train.py config/trix_small.py config/recipes/muon.py
# The learning rates were tuned at width 128. They are scaled by width and not tuned elsewhere.
scale = 128 / n_embd
optimizer, learning_rate = 'muon', 24e-3 * scale  # of the embedding
matrix_lr = (16e-3 if ffn == 'trix' else 6e-3) * scale
schedule, min_lr_ratio, warmup_steps = 'linear', 0.0, -1
qk_norm, embed_taps = True, 4
zero_init, embed_norm = ffn != 'trix', ffn == 'trix'

more = max(1, batch_tokens // (64 * block_size))  # at most 64 sequences a step: more updates from the same tokens
batch_tokens, sample_interval = batch_tokens // more, sample_interval * more
if not epochs:
    max_steps = max_steps * more
