# The smallest of three sizes in the plan for TriX (a sparse, ternary FFN): 2,033,024 parameters. 0.8M are in ternary
# tiles. Each token uses a quarter of the tiles. The run trains on 5M tokens of Python's own standard library and takes
# about 15 minutes on two CPU cores. The dense twin is config/dense_tiny.py.
# `--dataset=fineweb_edu` sets the plan's corpus. config/recipes/trix_tiny_source.py sets the plan's whole run.
ffn = 'trix'
n_layer, n_head, n_embd = 3, 4, 128
block_size, vocab_size = 256, 8192
trix_tiles, trix_top_k, trix_hidden = 8, 2, 128
qk_norm, embed_norm, embed_taps = True, True, 4

dataset = 'pylib'
document_starts = 0.05  # share of windows that begin with a document, as samples do
batch_size = 16
batch_tokens = 16 * 256  # gives 1,220 updates from 5M tokens; batches of 65k tokens would give 76
max_steps = 5_000_000 // batch_tokens
optimizer, learning_rate, matrix_lr = 'muon', 24e-3, 16e-3  # rates of the embedding and of the matrices
schedule, min_lr_ratio = 'linear', 0.0

eval_interval = save_interval = sample_interval = 122
sample_prompts = '|def|import|class|#'
