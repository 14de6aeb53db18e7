# The dense twin of trix_tiny: 1,639,296 parameters, the same but for a GELU FFN of width 4 n_embd. The same tokens in the
# same order.
ffn = 'gelu'
n_layer, n_head, n_embd = 3, 4, 128
block_size, vocab_size = 256, 8192

dataset = 'pylib'
batch_size = 16
batch_tokens = 16 * 256
max_steps = 5_000_000 // batch_tokens
learning_rate = 1e-3

eval_interval = save_interval = sample_interval = 122
sample_prompts = '|def |import |class |# '
