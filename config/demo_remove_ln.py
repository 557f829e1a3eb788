"""
The demo, 3 of 3: removes all 13 LayerNorm sites, one after another, in 120 iterations; the rest is
to recover. (2 of 3 is its control: python train.py config/demo_remove_ln.py config/control.py)
"""
out_dir = 'out/demo'
init_from = 'out/demo/pretrained'
dataset = 'stdlib'
batch_size = 12
batch_tokens = 12 * 128
max_iters = 300
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 20
eval_interval = 150
eval_iters = 200

remove_ln = True
start_ln2 = 20      # layers 0 to 3 at 20, 26, 32, 38
gap_ln2 = 6
start_ln1qk = 44
gap_ln1qk = 6
start_ln1v = 68
gap_ln1v = 8
start_lnf = 100
taper_iters = 20
giant_loss_weight = 0.1
