"""Each division fades out over 20 iterations (TaperNorm, arXiv 2602.10408), and each merge of constants takes as long."""
taper_iters = 20
