# The largest of three GPT-2 models of a WikiText trainer for 16 GB cards. Its architecture is GPT-2 small:
# 124,439,808 parameters. The original trains in fp16. Here the precision is chosen for the card.
# Weights, gradients and AdamW take 1.99 GB at 16 bytes a parameter. Activations come on top.
# `--ffn=trix` trains the TriX twin. A quick run: `--epochs=5` with `--max_windows=10000`.
ffn, norm, positions, bias = 'gelu', 'layernorm', 'learned', True
n_layer, n_head, n_embd = 12, 12, 768
d_ff = 3072
block_size, vocab_size = 1024, 50_257  # GPT-2's vocabulary
dropout = 0.1

dataset, tokenizer = 'wikitext103', 'gpt2'
batch_size = 16
epochs = 20
learning_rate, min_lr_ratio, schedule = 3e-4, 0.1, 'cosine'
warmup_steps = 1000
weight_decay, grad_clip = 0.1, 1.0

eval_interval = save_interval = sample_interval = 1000  # our choice
eval_tokens = 0  # the whole validation split, as papers report WikiText
sample_prompts = '|The|In 1945|He was born in|The film'
