# The largest of three sizes in the plan for TriX (a sparse, ternary FFN): 58,337,792 parameters.
# config/recipes/source.py sets the plan's recipe.
# Weights, gradients and AdamW take 0.933 GB at 16 bytes a parameter. Activations come on top.
# `--ffn=gelu` (or `--ffn=swiglu`) trains the dense twin on the same tokens in the same order.
ffn = 'trix'
n_layer, n_head, n_embd = 8, 8, 512
block_size, vocab_size = 512, 32_000
trix_tiles, trix_top_k, trix_hidden = 8, 2, n_embd
qk_norm, embed_norm, embed_taps = True, True, 4

dataset = 'fineweb_edu'
batch_size = 16
batch_tokens = 64 * 512  # 15,258 updates from 500M tokens
max_steps = 500_000_000 // batch_tokens
optimizer, learning_rate, matrix_lr = 'muon', 6e-3, 4e-3  # trix_tiny's rates scaled by width, not tuned here
schedule, min_lr_ratio = 'linear', 0.0
warmup_steps = 450

eval_interval = save_interval = sample_interval = 763  # 25M tokens
eval_tokens = 524_288
