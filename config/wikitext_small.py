# The middle one of three GPT-2 models of a WikiText trainer for 16 GB cards: 44,909,056 parameters.
# Weights, gradients and AdamW take 0.719 GB at 16 bytes a parameter. Activations come on top.
# `--ffn=trix` trains the TriX twin on the same tokens in the same order.
ffn, norm, positions, bias = 'gelu', 'layernorm', 'learned', True
n_layer, n_head, n_embd = 6, 8, 512
d_ff = 2048
block_size, vocab_size = 512, 50_257  # GPT-2's vocabulary
dropout = 0.1

dataset, tokenizer = 'wikitext103', 'gpt2'
batch_size = 16
batch_tokens = 64 * block_size
max_steps = 300_000_000 // batch_tokens  # our choice; train.py prints the epochs
learning_rate = 6e-4
warmup_steps = 300
weight_decay = 0.1

eval_interval = save_interval = sample_interval = 500
eval_tokens = 0  # the whole validation split, as papers report WikiText
