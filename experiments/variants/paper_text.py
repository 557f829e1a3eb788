"""The paper's text: special constants, made the ordinary ones late, in one iteration each."""
taper_iters = 0
start_eot = 353
start_bos = 387
guard_nats = 0.0            # let it run to its end, to see it
