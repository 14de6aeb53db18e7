# The smallest of four sizes of an FFT resonance trainer for a context of 32k. The trainer calls it 50M:
# 106,891,008 parameters.
# Weights, gradients and AdamW take 1.71 GB at 16 bytes a parameter. Activation checkpointing keeps 2.42 GB of block
# inputs (fp32) on top, and the activations of one block at a time.
# `--mixer=attention` trains the attention twin. Elsewhere we use `--norm=rmsnorm` and `--positions=rotary`.
mixer, ffn = 'resonance', 'swiglu'
norm, positions = 'layernorm', 'learned'
n_layer, n_head, n_embd = 6, 12, 768  # n_head is for the attention twin: heads of size 64
num_frequencies = 64
block_size, vocab_size = 32_768, 50_257  # GPT-2's vocabulary

dataset, tokenizer = 'shards:data/shards', 'gpt2'  # --tokenizer=none: no samples, no bits per byte
epochs = 3
batch_size = 4
batch_tokens = 8 * batch_size * block_size  # 8 micro-steps
learning_rate = 6e-4  # our choice: GPT-3's rate at this width (arXiv:2005.14165)
schedule, restart_steps = 'restarts', 100  # our choice: cosine cycles of 100, 200, 400 ... steps
beta1, beta2, grad_clip = 0.9, 0.95, 1.0
activation_checkpointing = True

save_interval = keep_every = 1000  # every checkpoint is kept
eval_interval = sample_interval = 100  # our choice
eval_tokens = 16 * block_size
sample_prompts = '|The|In this|Once upon a time|It is important to'
