"""no_aux.py, each site in one iteration."""
taper_iters = 0
