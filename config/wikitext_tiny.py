# The smallest of three GPT-2 models of a WikiText trainer for 16 GB cards: 16,090,880 parameters.
# Weights, gradients and AdamW take 0.257 GB at 16 bytes a parameter. Activations come on top.
# `--ffn=trix` trains the TriX twin on the same tokens in the same order.
ffn, norm, positions, bias = 'gelu', 'layernorm', 'learned', True
n_layer, n_head, n_embd = 4, 4, 256
d_ff = 1024
block_size, vocab_size = 256, 50_257  # GPT-2's vocabulary
dropout = 0.1

dataset, tokenizer = 'wikitext2', 'gpt2'
batch_size = 16
batch_tokens = 16 * block_size
max_steps = 10_000_000 // batch_tokens  # our choice; train.py prints the epochs
learning_rate = 1e-3
warmup_steps = 100
weight_decay = 0.1

eval_interval = save_interval = sample_interval = 244
eval_tokens = 0  # the whole validation split, as papers report WikiText
