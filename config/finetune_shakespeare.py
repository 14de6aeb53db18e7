# Finetunes GPT-2 (124M parameters) on Shakespeare: 80 steps, about two passes over 1 MB of text. The shape and the
# tokenizer come from the pretrained model. The text is downloaded once. Without a network, bring the model and the
# text: `--init_from=hf:DIRECTORY`, and data/tinyshakespeare.txt.
init_from = 'gpt2'
dataset = 'shakespeare'

block_size = 256  # of GPT-2's 1,024 positions
batch_size = 8
batch_tokens = 4 * batch_size * block_size
max_steps = 80
learning_rate, schedule = 3e-5, 'constant'
warmup_steps = 0
weight_decay = 0.1
dropout = 0.1

eval_interval = save_interval = sample_interval = 20
sample_prompts = '|ROMEO:|To be'
