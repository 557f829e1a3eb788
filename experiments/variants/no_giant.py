"""config/remove_ln.py without the giant loss."""
aux_loss_weight = 0.1
