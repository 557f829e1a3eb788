"""Special constants, merged as late as in the paper's text, faded over 20 iterations."""
start_eot = 353
start_bos = 370
