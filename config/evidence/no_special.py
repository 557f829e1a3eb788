"""No constants of their own for position 0 and end-of-text."""
start_eot = 0
start_bos = 0
