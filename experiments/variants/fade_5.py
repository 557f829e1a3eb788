"""The shipped recipe, faded over 5 iterations."""
taper_iters = 5
