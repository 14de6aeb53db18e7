# The largest of four sizes of an FFT resonance trainer for a context of 32k. The trainer calls it 1B:
# 5,146,148,864 parameters.
# Weights, gradients and AdamW take 82.3 GB at 16 bytes a parameter. Activation checkpointing keeps 12.9 GB of block
# inputs (fp32) on top, and the activations of one block at a time. `--positions=learned` adds a table of positions.
# `--mixer=attention` trains the attention twin (with rotary positions, which only attention layers use).
mixer, ffn = 'resonance', 'swiglu'
n_layer, n_head, n_embd = 24, 64, 4096  # n_head is for the attention twin: heads of size 64
num_frequencies = 512
block_size, vocab_size = 32_768, 50_257  # GPT-2's vocabulary

dataset = 'shards:data/shards'
batch_size = 1
batch_tokens = 32 * batch_size * block_size  # 32 micro-steps
max_steps = 100_000_000_000 // batch_tokens  # our choice: about 20 tokens a parameter (arXiv:2203.15556)
learning_rate = 1.2e-4  # our choice: GPT-3's rate at this width (arXiv:2005.14165)
schedule, restart_steps = 'restarts', max_steps // 7  # our choice: cosine cycles of 1, 2 and 4 sevenths of the run
warmup_steps = 2_000
beta1, beta2 = 0.9, 0.95
grad_clip = 1.0
activation_checkpointing = True

eval_interval = save_interval = sample_interval = 1000
eval_tokens = 16 * block_size
sample_prompts = 'The'  # one prompt in three modes: each row of a batch of samples holds 0.8 GB of oscillators (fp64)
