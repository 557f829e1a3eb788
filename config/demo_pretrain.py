"""
The demo, 1 of 3: trains experiments/standin.py's GPT-2 of 0.8M parameters, which has a giant vector
at position 0 and at end-of-text as GPT-2 has, on the source of the standard library, as bytes.
"""
out_dir = 'out/demo/pretrained'
init_from = 'out/demo/standin'
dataset = 'stdlib'
batch_size = 12
batch_tokens = 12 * 128
max_iters = 700
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 50
eval_interval = 350
eval_iters = 200
log_interval = 25
