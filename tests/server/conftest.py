"""A server over a fake engine process, and what its tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
