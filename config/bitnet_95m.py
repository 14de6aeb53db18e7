# A BitNet b1.58 model for a card of 12 GB: 95,367,936 parameters (70,778,880 are ternary). 34 tokens a parameter.
# The original has LLaMA-2's tokenizer. `--tokenizer=llama2/tokenizer.json` uses your copy. Without it, a BPE of the
# same size is trained on the corpus. Weights, gradients and AdamW take 1.53 GB at 16 bytes a parameter.
# `--linear=dense` trains the dense twin. `--eval_interval=0` trains without evaluation.
linear, ffn, norm, positions = 'bitnet', 'swiglu', 'rmsnorm', 'rotary'
n_layer, n_head, n_kv_head, n_embd, d_ff = 8, 12, 6, 768, 3072
block_size, vocab_size = 256, 32_000

dataset = 'fineweb_edu'
batch_size = 16
batch_tokens = 2 * batch_size * block_size  # 2 micro-steps
max_steps = 400_000  # 3.28B tokens, a third of sample-10BT
schedule = 'two_stage'  # 1.5e-3 -> 1e-3 with weight decay, then -> 1.5e-5 without
learning_rate, mid_lr_ratio, min_lr_ratio = 1.5e-3, 2 / 3, 0.01
warmup_steps, boundary_step = 375, 200_000
weight_decay = 0.1

log_interval, eval_interval, sample_interval = 100, 5000, 5000
save_interval = 10_000
archive_every = 10_000  # the 40 checkpoints of 380 MB: weights alone, never deleted
mandatory_steps = (199_999, 200_000)
sample_prompts = '|The|In this|Once upon a time|It is important to'
