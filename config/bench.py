"""
How fast is a step, and what does it need? On synthetic tokens; no data, nothing written.

    python train.py config/bench.py --versus=ln_mode=real                      # removal against plain LN, step by step in turns
    python train.py config/bench.py --versus="ln_mode=real compile=False"      # a second setting of several keys
    python train.py config/bench.py --device=fake --batch_size=4 --n_layer=48 --n_head=25 --n_embd=1600 --versus=gradient_checkpointing=True
                                    # the memory of GPT-2 XL, computed, on any machine
    python train.py config/bench.py --ln_mode=none --eval_only=True --versus=ln_mode=real                     # forward passes
"""
bench = True
ln_mode = 'fake'
compile = True
batch_size = 1
batch_tokens = 1024
max_iters = 20
