"""Makes the helpers beside the tests importable under their full names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
