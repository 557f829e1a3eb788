"""config/remove_ln.py: one constant for all tokens, each site fades over 20 iterations."""
