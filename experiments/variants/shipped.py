"""config/remove_ln.py: one constant, a fade over 20 iterations, the auxiliary and giant losses."""
aux_loss_weight = giant_loss_weight = 0.1
