"""Fuzz one reader, guided by coverage: needs `pip install atheris`; not part of the tests.

python tests/fuzz_atheris.py header /tmp/corpus-header -max_total_time=600

The first argument names a target of fuzz_targets.py, the second a folder that keeps the corpus;
the rest goes to libFuzzer. A finding ends the run with its trace and the input in a file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pyengine"]):
    from fuzz_targets import TARGETS, seeds


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds(name)):
        (corpus / f"seed-{i}").write_bytes(seed)
    read = TARGETS[name]
    atheris.Setup([sys.argv[0], str(corpus), "-max_len=200000", *sys.argv[3:]], lambda b: read(b))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
