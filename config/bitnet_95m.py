# The model of a BitNet b1.58 trainer of size 95M: 95,367,936 parameters (70,778,880 are ternary).
# Weights, gradients and AdamW take 1.53 GB at 16 bytes a parameter. Activations come on top.
# `--linear=dense` trains the dense twin on the same tokens in the same order. Its usual learning rates are 3 to 6
# times lower.
linear, ffn, norm, positions = 'bitnet', 'swiglu', 'rmsnorm', 'rotary'
n_layer, n_head, n_kv_head, n_embd = 8, 12, 6, 768
d_ff = 3072
block_size, vocab_size = 1024, 32_000  # our choice of block_size

dataset = 'fineweb_edu'
batch_size = 8
batch_tokens = 4 * batch_size * block_size  # gives 61,035 updates; batches of 1M tokens would give 1,907
max_steps = 2_000_000_000 // batch_tokens  # our choice: about 20 tokens a parameter (arXiv:2203.15556)
schedule = 'two_stage'  # 0 -> 1.5e-3 -> 1e-3 with weight decay, then -> 1.5e-5 without
learning_rate, mid_lr_ratio, min_lr_ratio = 1.5e-3, 2 / 3, 0.01
warmup_steps = 2000  # the original trainer has 375, for batches of 1M tokens
boundary_step = max_steps // 2  # the checkpoints just before and after it are kept
weight_decay = 0.1
beta1, beta2 = 0.9, 0.95

log_interval = 100
eval_interval = save_interval = sample_interval = 1000
eval_tokens = 524_288
