"""config/distil.py at fast.py's pace: distil.py, and one sequence in 12 is random bytes."""
from pathlib import Path as _Path

exec(_Path(__file__).with_name('distil.py').read_text())
random_share = 1 / 12
