"""fast.py; the whole loss is the divergence from the model that it begins from."""
from pathlib import Path as _Path

exec(_Path(__file__).with_name('distil.py').read_text())
distil = 1.0
