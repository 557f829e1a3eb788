"""The pace of the follow-up and its auxiliary loss, faded, at remove_ln.py's learning rates."""
start_ln2 = 20
gap_ln2 = 6
start_ln1qk = 44
gap_ln1qk = 6
start_ln1v = 68
gap_ln1v = 9
start_lnf = 104
aux_loss_weight = 0.1
