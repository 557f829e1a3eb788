"""no_aux.py, faded over 50 iterations:
the last site is complete 3 iterations before the end."""
taper_iters = 50
