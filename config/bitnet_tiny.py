# The smallest BitNet that llama.cpp runs with 2-bit weights (rows of 256): 4,654,848 parameters. 2,555,904 are ternary.
# It has no QK-norm and no taps, unlike the other tiny presets: llama.cpp's bitnet models don't support them.
linear, ffn, norm, positions = 'bitnet', 'swiglu', 'rmsnorm', 'rotary'
n_layer, n_head, n_embd, d_ff = 3, 4, 256, 768
block_size, vocab_size = 256, 8192

dataset = 'pylib'
document_starts = 0.05  # share of windows that begin with a document, as samples do
batch_size = 8
batch_tokens = 8 * 256
max_steps = 1_500_000 // batch_tokens
optimizer, learning_rate, matrix_lr = 'muon', 12e-3, 12e-3  # rates of the embedding and of the matrices, not tuned
schedule, min_lr_ratio = 'linear', 0.0

eval_interval = save_interval = sample_interval = 122
sample_prompts = '|def|import|class|#'
