"""``python -m pyengine``: the ``pyengine`` command."""

from pyengine.cli import main

main()
