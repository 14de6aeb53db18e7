# The run that the plan for TriX describes for its smallest size, in place of the quick start's:
# python train.py config/trix_tiny.py config/recipes/trix_tiny_source.py
# The plan's 100 steps of warm-up are more than the 76 steps of the run. A tenth of the run replaces them.
optimizer, matrix_lr, learning_rate = 'adamw', 0.0, 1e-3
schedule, min_lr_ratio = 'cosine', 0.1
qk_norm = zero_init = embed_norm = False  # the plan names none of these
embed_taps = 0
document_starts = 0.0

dataset = 'fineweb_edu'  # with an educational score of 3 or more
batch_size = 64
batch_tokens = 256 * block_size  # 4 micro-steps
max_steps = round(5_000_000 / batch_tokens)
warmup_steps = 7

eval_interval_tokens, sample_interval = 500_000, 8
eval_tokens = 250_000 // block_size * block_size
save_interval_tokens = keep_every_tokens = 1_000_000  # every checkpoint is kept
sample_prompts = '|The|In this|Once upon a time|It is important to'
