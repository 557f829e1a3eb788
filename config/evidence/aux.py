"""The follow-up's auxiliary loss (arXiv 2507.02559)."""
aux_loss_weight = 0.1
