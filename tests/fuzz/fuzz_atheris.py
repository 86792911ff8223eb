"""Fuzz one reader, guided by coverage: needs `pip install atheris`; not part of the tests.

python tests/fuzz/fuzz_atheris.py header /tmp/corpus-header -max_total_time=600

The first argument names a target of fuzz_targets.py, the second a folder that keeps the corpus;
the rest goes to libFuzzer. A finding ends the run with its trace and the input in a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import atheris
from fuzz_targets import TARGETS, seeds


def functions(module: ModuleType) -> Iterator[FunctionType]:
    """Those that a module defines, methods included."""
    own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    for value in own:
        for part in vars(value).values() if isinstance(value, type) else [value]:
            part = getattr(part, "__func__", getattr(part, "fget", part))
            if isinstance(part, FunctionType) and part.__module__ == module.__name__:
                yield part


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds(name)):
        (corpus / f"seed-{i}").write_bytes(seed)
    read = TARGETS[name]
    # After the imports: an editable install's own importer passes by atheris's
    for module in [m for n, m in sys.modules.items() if n.startswith(("pyengine.", "jinja2."))]:
        for function in set(functions(module)):
            atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], str(corpus), "-max_len=200000", *sys.argv[3:]], lambda b: read(b))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
