"""The demo, 2 of 3: the control. Trained on as in demo_remove_ln.py, on the same batches, but LayerNorm stays."""
out_dir = 'out/demo/control'
init_from = 'out/demo/pretrained'
dataset = 'stdlib'
batch_size = 12
batch_tokens = 12 * 128
max_iters = 400
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 20
eval_interval = 25
