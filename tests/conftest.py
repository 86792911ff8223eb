"""The workbench is no part of the installed package: tests find it in the checkout."""

import sys
from pathlib import Path

# Behind the installed packages, so that pyengine itself is still the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent))
