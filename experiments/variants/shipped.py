"""config/remove_ln.py: one constant, each site fades over 20 iterations, the auxiliary loss."""
aux_loss_weight = 0.1
