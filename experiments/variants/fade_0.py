"""One constant for all tokens, each site in one iteration."""
taper_iters = 0
