"""
The control of any removal: the same model, data, batches and learning rate, and LayerNorm stays.

    python train.py config/remove_ln.py config/control.py       # writes out/remove_ln/control
"""
out_dir = out_dir + '/control'
remove_ln = False
