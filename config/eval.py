"""
Cross-entropy of any model on the whole of a val.bin.

    python train.py config/eval.py --init_from=MODEL --dataset=NAME [--control=ANOTHER]

MODEL is a hub id, a Hugging Face folder or a run's out_dir.
"""
eval_only = True
eval_iters = 0
batch_size = 8
dtype = 'float32'         # exact, on a GPU too
