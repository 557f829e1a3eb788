"""
The evidence: what all variants share. A variant is a file in experiments/variants behind this one:

    E=experiments
    python train.py config/demo_remove_ln.py $E/base.py $E/variants/fast.py --seed=1 --out_dir=X

config/control.py behind a variant makes its control.

The pace is the paper's, remove_ln.py's of 1,200 iterations and 12 layers brought to 400 iterations
and 4: its warm-up and cosine too, so that the learning rate is still at 0.4 of its peak at the end.
"""
init_from = 'out/evidence/pretrained'     # the demo's, trained for 1,000 iterations
max_iters = 400
eval_interval = 400         # before and after
eval_iters = 1000           # 128,000 bytes of val.bin, the same for all
log_interval = 1
compile = False
giant_loss_weight = 0.0     # a variant that has it says so
warmup_iters = 33
lr_decay_iters = 667        # the paper's cosine ends at 2,000 of 1,200
# a third of the paper's 200; then every 20: three layers of GPT-2 small for one
start_ln2, start_ln1qk, start_ln1v, start_lnf = 67, 147, 227, 347
gap_ln2, gap_ln1qk, gap_ln1v = 20, 20, 30
