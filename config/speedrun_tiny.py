# The fastest recipe to a given loss that we know at the size of dense_tiny: 1,639,808 parameters.
# What each ingredient is worth: `python bench.py quality --preset=speedrun`.
# Comparison with nanoGPT: `python bench.py peers --nanogpt=PATH`.
n_layer, n_head, n_embd = 3, 4, 128
block_size, vocab_size = 256, 8192
ffn, qk_norm = 'gelu', True
zero_init, embed_taps = True, 4

dataset = 'pylib'
batch_size = 8
batch_tokens = 8 * 256
max_steps = 1_250_000 // batch_tokens
optimizer, learning_rate, matrix_lr = 'muon', 24e-3, 6e-3  # rates of the embedding and of the matrices
schedule, min_lr_ratio, warmup_steps = 'linear', 0.0, 20

eval_interval = save_interval = 50
sample_interval = 0
