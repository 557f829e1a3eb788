"""Each division fades out over 20 iterations (TaperNorm, arXiv 2602.10408)."""
taper_iters = 20
