# The middle of three sizes in the plan for TriX (a sparse, ternary FFN): 12,062,976 parameters.
# config/recipes/source.py sets the plan's recipe.
# Weights, gradients and AdamW take 0.193 GB at 16 bytes a parameter. Activations come on top.
# `--ffn=gelu` (or `--ffn=swiglu`) trains the dense twin on the same tokens in the same order.
ffn = 'trix'
n_layer, n_head, n_embd = 6, 4, 256
block_size, vocab_size = 256, 16_384
trix_tiles, trix_top_k, trix_hidden = 8, 2, n_embd
qk_norm, embed_norm, embed_taps = True, True, 4

dataset = 'fineweb_edu'
batch_size = 32
batch_tokens = 64 * 256  # 3,051 updates from 50M tokens
max_steps = 50_000_000 // batch_tokens
optimizer, learning_rate, matrix_lr = 'muon', 12e-3, 8e-3  # trix_tiny's rates scaled by width, not tuned here
schedule, min_lr_ratio = 'linear', 0.0
warmup_steps = 100

eval_interval = save_interval = sample_interval = 305  # 5M tokens
eval_tokens = 262_144
