"""The control of remove_ln.py: the same model, data, batches and learning rate, and LayerNorm stays."""
out_dir = 'out/vanilla'
init_from = 'gpt2'
dataset = 'openwebtext'
batch_size = 16
batch_tokens = 512 * 1024
max_iters = 1200
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 100
lr_decay_iters = 2000
eval_interval = 100
