"""
The evidence: what all variants share. A variant is a file in experiments/variants behind this one:

    E=experiments
    python train.py config/demo_remove_ln.py $E/base.py $E/variants/fade_5.py --seed=1 --out_dir=X

The pace is the paper's, remove_ln.py's of 1,200 iterations and 12 layers brought to 400 iterations
and 4: its warm-up and cosine too, so that the learning rate is still at 0.4 of its peak at the end.
"""
control = ''
init_from = 'out/evidence/pretrained'     # the demo's, trained for 1,000 iterations
max_iters = 400
eval_interval = 400         # before and after
eval_iters = 1000           # 128,000 bytes of val.bin, the same for all
log_interval = 1
compile = False
warmup_iters = 33
lr_decay_iters = 667        # the paper's cosine ends at 2,000 of 1,200
start_ln2 = 67              # a third of 200; then every 20: three layers of GPT-2 small for one
gap_ln2 = 20
start_ln1qk = 147
gap_ln1qk = 20
start_ln1v = 227
gap_ln1v = 30
start_lnf = 347
