ffn = 'trix'
max_steps = 60
