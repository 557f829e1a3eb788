"""
A teacher: after any removal's config, half of the loss is the divergence from the model it began from, and
some of the sequences are random tokens, on which the teacher alone says what follows.

    torchrun --nproc_per_node=8 train.py config/remove_ln_fast.py config/distil.py
"""
out_dir = out_dir + '_distil'
teacher = 'init_from'       # what the run begins from, also if the command line names it
distil = 0.5
random_share = 1 / 12
