"""Special constants, merged in the middle of the removal, faded over 20 iterations."""
start_eot = 200
start_bos = 200
