# About 1B parameters and a context of 32k on one card with 44 GB, as an FFT resonance trainer promised for such a card:
# python train.py config/recipes/resonance_1b_44gb.py --plan --card=L40S --card_gb=44
# 1,029,514,240 parameters: 18 layers as wide as those of config/resonance_large.py, with RMSNorm and no learned
# positions. The matrices of the blocks are bfloat16, and AdamW keeps 8-bit state for them: 6.03 bytes a parameter. The
# other parameters (embedding, norms, filters, oscillators) are fp32 and take 16. Together these are 7.4 GB.
mixer, ffn = 'resonance', 'swiglu'
n_layer, n_head, n_embd = 18, 32, 2048  # n_head is for the attention twin: heads of size 64
num_frequencies = 256
block_size, vocab_size = 32_768, 50_257  # GPT-2's vocabulary

dataset, tokenizer = 'shards:data/shards', 'gpt2'  # --tokenizer=none: no samples, no bits per byte
epochs = 3
batch_size = 1
batch_tokens = 16 * batch_size * block_size  # 16 micro-steps
dtype = weights_dtype = 'bfloat16'
optimizer = 'adamw8bit'
activation_checkpointing = True
learning_rate = 2e-4  # GPT-3's rate at this width (arXiv:2005.14165)
beta1, beta2, grad_clip = 0.9, 0.95, 1.0

eval_interval = sample_interval = 100
save_interval = 250  # a checkpoint has 5.1 GB
eval_tokens = 16 * block_size
sample_prompts = '|The|In this|Once upon a time|It is important to'
