# The throughput-optimised sibling of the 32k-context trainer (source C): 154,873,856 parameters.
# Weights, gradients and AdamW: 2.48 GB at 16 bytes a parameter; on top, activation checkpointing keeps 4.29 GB of block
# inputs (fp32) and the activations of one block at a time.
# Its attention twin: `--mixer=attention` (rotary positions, which an attention layer alone looks at).
mixer, ffn = 'resonance', 'swiglu'
n_layer, n_head, n_embd = 8, 16, 1024  # heads: those of the twin, of size 64
num_frequencies, chunk_size = 128, 256
block_size, vocab_size = 32_768, 50_257  # GPT-2's vocabulary

dataset = 'shards:data/shards'
batch_size = 4
batch_tokens = 4 * batch_size * block_size  # 4 micro-steps
max_steps = 3_100_000_000 // batch_tokens  # about 20 tokens a parameter (arXiv:2203.15556): our choice
learning_rate = 3e-4  # that of GPT-3 at this width (arXiv:2005.14165): our choice
schedule = 'onecycle'  # with a warm-up of a tenth of the run, as in the source
activation_checkpointing = True

eval_interval = save_interval = sample_interval = 250
eval_tokens = 16 * block_size
