"""What the ``pyengine`` command needs before everything else is imported, which takes a while.

Its script imports the package before ``cli.main`` could catch anything.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType


def as_command() -> None:
    """End by Ctrl-C, and by an installation that does not fit, without a trace.

    Does nothing unless this process is the command.
    """
    if os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") in NAMES:
        sys.excepthook = _tell


# python -m pyengine sets "-m" while it looks for the package
NAMES = ("pyengine", "-m")


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, ImportError) and str(error).startswith("[pyengine]"):
        print(f"pyengine: {error}", file=sys.stderr)
    elif not issubclass(kind, KeyboardInterrupt):  # which Python makes an end by the signal
        sys.__excepthook__(kind, error, trace)
