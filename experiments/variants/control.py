"""The control: the same model, data, batches and learning rate, and LayerNorm stays."""
remove_ln = False
