"""
Cross-entropy of any model on the whole of a val.bin, and its standard error.

    python train.py config/eval.py --init_from=MODEL --dataset=NAME

MODEL is a hub id, a Hugging Face folder or a run's out_dir. Two models, token by token:
experiments/losses.py.
"""
eval_only = True
eval_iters = 0
batch_size = 8
dtype = 'float32'         # and no TF32 on a GPU
