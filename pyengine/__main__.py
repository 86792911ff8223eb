"""The ``pyengine`` command, and ``python -m pyengine``."""

import signal
import sys


def main() -> None:
    """Run the command; its imports, which take a while, are inside.

    Ctrl-C during them, and an installation that does not fit, end it without a trace.
    """
    try:
        from pyengine import _ext  # noqa: F401
        from pyengine.cli import run

        run()
    except ImportError as error:
        if not str(error).startswith("[pyengine]"):
            raise
        print(f"pyengine: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before a command had begun
        sys.exit(130)
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # one more Ctrl-C ends it without a word


if __name__ == "__main__":
    main()
