"""fast.py; half of the loss is the divergence from the model that it begins from."""
from pathlib import Path as _Path

exec(_Path(__file__).with_name('fast.py').read_text())
teacher = 'init_from'       # base.py's, or larger.py's
