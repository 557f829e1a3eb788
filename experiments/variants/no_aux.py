"""config/remove_ln.py with neither the auxiliary nor the giant loss, which is base.py as it is."""
