"""no_aux.py, faded over 5 iterations."""
taper_iters = 5
