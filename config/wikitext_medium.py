# The largest of three GPT-2 models of a WikiText trainer for 16 GB cards. Its architecture is GPT-2 small:
# 124,439,808 parameters.
# Weights, gradients and AdamW take 1.99 GB at 16 bytes a parameter. Activations come on top.
# `--ffn=trix` trains the TriX twin on the same tokens in the same order.
ffn, norm, positions, bias = 'gelu', 'layernorm', 'learned', True
n_layer, n_head, n_embd = 12, 12, 768
d_ff = 3072
block_size, vocab_size = 1024, 50_257  # GPT-2's vocabulary
dropout = 0.1

dataset, tokenizer = 'wikitext103', 'gpt2'
batch_size = 8
batch_tokens = 64 * block_size
max_steps = 400_000_000 // batch_tokens  # our choice; train.py prints the epochs
learning_rate = 3e-4
warmup_steps = 200
weight_decay = 0.1

eval_interval = save_interval = sample_interval = 500
eval_tokens = 0  # the whole validation split, as papers report WikiText
