# The dense twin of trix_tiny: 1,639,808 parameters. Only the FFN differs: GELU of width 4 n_embd. It sees the same
# tokens in the same order.
ffn = 'gelu'
n_layer, n_head, n_embd = 3, 4, 128
block_size, vocab_size = 256, 8192
qk_norm, zero_init, embed_taps = True, True, 4

dataset = 'pylib'
document_starts = 0.05  # share of windows that begin with a document, as samples do
batch_size = 16
batch_tokens = 16 * 256
max_steps = 5_000_000 // batch_tokens
optimizer, learning_rate, matrix_lr = 'muon', 24e-3, 6e-3  # rates of the embedding and of the matrices
schedule, min_lr_ratio = 'linear', 0.0

eval_interval = save_interval = sample_interval = 122
sample_prompts = '|def|import|class|#'
