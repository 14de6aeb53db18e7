# Shakespeare in two minutes on two CPU cores: 722,304 parameters.
# A BPE vocabulary of 1,024 tokens replaces nanoGPT's characters. The split is nanoGPT's: 90 % and 10 % by position.
# Loss per character: bits per byte x ln 2, because every character here is one byte.
n_layer, n_head, n_embd = 3, 4, 128
block_size, vocab_size = 256, 1024
ffn, qk_norm = 'gelu', True
zero_init, embed_taps = True, 4

dataset = 'shakespeare'
batch_size = 8
max_steps = 600  # three passes; longer runs overfit
optimizer, learning_rate, matrix_lr = 'muon', 24e-3, 6e-3  # rates of the embedding and of the matrices
schedule, min_lr_ratio, warmup_steps = 'linear', 0.0, 20

eval_interval = save_interval = sample_interval = 100
eval_tokens = 0  # the whole validation split
sample_prompts, sample_tokens = 'ROMEO:', 150
