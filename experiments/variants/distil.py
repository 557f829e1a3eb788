"""fast.py and the giant loss; half of the loss is KL from the model that it begins from."""
from pathlib import Path as _Path

exec(_Path(__file__).with_name('fast.py').read_text())
giant_loss_weight = 0.1     # as the table's runs had it
teacher = 'init_from'      # base.py's, or larger.py's
