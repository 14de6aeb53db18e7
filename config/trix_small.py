# The middle of three sizes in the plan for TriX (a sparse, ternary FFN): 12,061,952 parameters.
# config/recipes/muon.py is our recipe. It learns faster.
# Weights, gradients and AdamW take 0.193 GB at 16 bytes a parameter. Activations come on top.
# `--ffn=gelu` (or `--ffn=swiglu`) trains the dense twin on the same tokens in the same order.
ffn = 'trix'
n_layer, n_head, n_embd = 6, 4, 256
block_size, vocab_size = 256, 16_384
trix_tiles, trix_top_k, trix_hidden = 8, 2, n_embd

dataset = 'fineweb_edu'  # with an educational score of 3 or more
batch_size = 64
batch_tokens = 256 * block_size  # 4 micro-steps
max_steps = round(50_000_000 / batch_tokens)
learning_rate = 6e-4
warmup_steps = 500

eval_interval_tokens = 5_000_000
save_interval_tokens = keep_every_tokens = 10_000_000  # every checkpoint is kept
sample_interval = 76  # 5M tokens
eval_tokens = 262_144  # our choice, of the 5 % that are held out
sample_prompts = '|The|In this|Once upon a time|It is important to'
