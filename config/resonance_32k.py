# The throughput-optimised sibling of the FFT resonance trainer for a context of 32k: 154,873,856 parameters.
# Weights, gradients and AdamW take 2.48 GB at 16 bytes a parameter. Activation checkpointing keeps 4.29 GB of block
# inputs (fp32) on top, and the activations of one block at a time.
# `--mixer=attention` trains the attention twin (with rotary positions, which only attention layers use).
mixer, ffn = 'resonance', 'swiglu'
n_layer, n_head, n_embd = 8, 16, 1024  # n_head is for the attention twin: heads of size 64
num_frequencies, chunk_size = 128, 256
block_size, vocab_size = 32_768, 50_257  # GPT-2's vocabulary

dataset, tokenizer = 'shards:data/shards', 'gpt2'  # --tokenizer=none: no samples, no bits per byte
batch_size = 4
batch_tokens = 4 * batch_size * block_size  # 4 micro-steps
max_steps = 100_000_000 // batch_tokens  # under an hour at the original's 35,000 tokens a second
learning_rate = 3e-4  # our choice: GPT-3's rate at this width (arXiv:2005.14165)
schedule = 'onecycle'  # the warm-up is a tenth of the run, as in the original trainer
grad_clip = 1.0
activation_checkpointing = True

eval_interval = save_interval = sample_interval = 19  # our choice: ten times in the run
eval_tokens = 16 * block_size
sample_prompts = '|The|In this|Once upon a time|It is important to'
