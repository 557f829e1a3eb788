"""The demo, 3 of 3: all 13 LayerNorm sites go, one after another; then there are 210 iterations to recover."""
out_dir = 'out/demo'
control = 'out/demo/control'
init_from = 'out/demo/pretrained'
dataset = 'stdlib'
batch_size = 12
batch_tokens = 12 * 128
max_iters = 400
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 20
eval_interval = 50

remove_ln = True
start_ln2 = 20      # layers 0 to 3 at 20, 30, 40, 50
gap_ln2 = 10
start_ln1qk = 60
gap_ln1qk = 10
start_ln1v = 100
gap_ln1v = 15
start_lnf = 160
start_eot = 170
start_bos = 190
