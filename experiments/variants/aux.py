"""The shipped recipe with the follow-up's auxiliary loss."""
aux_loss_weight = 0.1
