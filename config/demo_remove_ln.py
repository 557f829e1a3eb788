"""The demo, 3 of 3: all 13 LayerNorm sites go, one after another; then there are 290 iterations to recover."""
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
eval_interval = 25

remove_ln = True
start_ln2 = 20      # layers 0 to 3 at 20, 26, 32, 38
gap_ln2 = 6
start_ln1qk = 44
gap_ln1qk = 6
start_ln1v = 68
gap_ln1v = 8
start_lnf = 100
start_eot = 104
start_bos = 110
