# nanoGPT's character-level Shakespeare on a CPU, with the same model, recipe and 90/10 split: 804,224 parameters.
# On the whole split, nanoGPT reaches 1.905 and this 1.912 (three seeds; sd 0.017 and 0.007): `best validation loss`.
# The vocabulary is nanoGPT's 65 characters and our end-of-text token. config/shakespeare.py reaches a lower loss.
ffn, norm, positions = 'gelu', 'layernorm', 'learned'
n_layer, n_head, n_embd = 4, 4, 128
block_size, vocab_size = 64, 66

dataset, tokenizer = 'shakespeare', 'char'
batch_size = 12
max_steps = 2000
learning_rate, schedule, min_lr_ratio, warmup_steps = 1e-3, 'cosine', 0.1, 100
weight_decay, beta1, beta2, grad_clip = 0.1, 0.9, 0.99, 1.0

eval_interval = save_interval = sample_interval = 500
eval_tokens, log_interval = 0, 100  # 0: the whole validation split
sample_prompts, sample_tokens = 'ROMEO:', 300
