# The largest of three sizes in the plan for TriX (a sparse, ternary FFN): 58,335,744 parameters.
# config/recipes/muon.py is our recipe. It learns faster.
# Weights, gradients and AdamW take 0.933 GB at 16 bytes a parameter. Activations come on top.
# `--ffn=gelu` (or `--ffn=swiglu`) trains the dense twin on the same tokens in the same order.
ffn = 'trix'
n_layer, n_head, n_embd = 8, 8, 512
block_size, vocab_size = 512, 32_000
trix_tiles, trix_top_k, trix_hidden = 8, 2, n_embd

dataset = 'fineweb_edu'  # with an educational score of 3 or more
batch_size = 16
batch_tokens = 128 * block_size  # 8 micro-steps
max_steps = round(500_000_000 / batch_tokens)
learning_rate = 3e-4
warmup_steps = 2000

eval_interval_tokens = 25_000_000
save_interval_tokens = keep_every_tokens = 50_000_000  # every checkpoint is kept
sample_interval = 381  # 25M tokens
eval_tokens = 524_288  # our choice, of the 5 % that are held out
sample_prompts = '|The|In this|Once upon a time|It is important to'
