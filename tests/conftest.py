"""What all tests need: the workbench, which is no part of the package, and Ctrl-C."""

import signal
import sys
from pathlib import Path

# Behind the installed packages, so that pyengine itself is still the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# A shell lets what it starts in the background ignore SIGINT, and so would the commands that
# tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
