"""no_aux.py with gates that grow linearly instead of as the square: a fork in a config file."""
import __main__ as _train

_train.fade = lambda x: min(max(x, 0.0), 1.0)
