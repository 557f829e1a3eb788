"""
The evidence, 1: a GPT-2 of 4.9M parameters, with LayerNorm, on the installed packages' sources as bytes.

`make evidence` runs all of it. bfloat16 is fast on CPUs with AMX or AVX512-BF16; elsewhere type --dtype=float32.
"""
out_dir = 'out/evidence/pretrained'
dataset = 'packages'
n_layer = 6
n_head = 4
n_embd = 256
block_size = 256
batch_size = 12
batch_tokens = 12 * 256
max_iters = 8000
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 200
eval_interval = 500
dtype = 'bfloat16'
compile = True
