"""The demo, 1 of 3: a GPT-2 of 0.8M parameters, with LayerNorm, on the standard library's source as bytes."""
out_dir = 'out/demo/pretrained'
dataset = 'stdlib'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 12
batch_tokens = 12 * 128
max_iters = 1000
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 50
eval_interval = 250
log_interval = 25
