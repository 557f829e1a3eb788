"""
The evidence, 2: all 19 LayerNorm sites of pretrain.py's model go, in the manner of remove_ln_fast.py. The other files here
change a thing or two and are given after this one:

    python train.py config/evidence/remove.py config/evidence/taper.py --seed=1 --out_dir=out/evidence/300/taper.1
"""
init_from = 'out/evidence/pretrained'
dataset = 'packages'
batch_size = 12
batch_tokens = 12 * 256
max_iters = 300             # 0.92M bytes, 3.75% of what pretrain.py saw
learning_rate = 4e-4        # the better of two tried: at 1e-3 this run ends 0.005 nats higher
min_lr = 4e-5
warmup_iters = 30
eval_interval = 300         # before and after
eval_iters = 1000           # 0.26M bytes of val.bin
log_interval = 1
dtype = 'bfloat16'
compile = True

remove_ln = True
start_ln2 = 20              # layers 0 to 5 at 20, 22, ..., 30
gap_ln2 = 2
start_ln1qk = 32
gap_ln1qk = 2
start_ln1v = 44
gap_ln1v = 3
start_lnf = 62
start_eot = 64
start_bos = 74
