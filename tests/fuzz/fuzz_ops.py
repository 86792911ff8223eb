"""Random calls of every public op: refused in one sentence, or what its reference gives.

Shapes at the edges and of size 0, all dtypes, strided and lazy inputs, scalars of any size and
sign, and offsets, ids and starts outside of their range: `random_call` of tests/ops/test_X.py makes
those of op X. A part of the test suite, a few calls an op; many more, on a build with sanitizers,
by `.ci/sanitize.sh`:

    python tests/fuzz/fuzz_ops.py --seconds 60 --seed 1
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from draw import HOUSE, Call, Draw

from pyengine import _ext, ops
from pyengine.ops.dispatch import OPS

TESTS = Path(__file__).parents[1]


def random_call(op: str, seed: Any) -> Call:
    """As the tests of the op make it."""
    call: Call = importlib.import_module(f"test_{op}").random_call(Draw(seed))
    return call


def flat(result: Any) -> list[mx.array]:
    if isinstance(result, mx.array):
        return [result]
    return [a for a in result if a is not None]


def refused(text: str) -> bool:
    return HOUSE.match(text) is not None


# What is known only when the cache is there
LATE = re.compile(r"must be contiguous but got a strided view")


def run(op: str, seed: Any) -> str:
    """One call: "refused", "late" (as it was evaluated), "equal", or "ran" where no result is
    defined.

    Raises:
        AssertionError: Another error, no sentence, or another result.
    """
    call = random_call(op, seed)
    reference = call.reference or getattr(ops, f"{op}_reference")
    kept = list(call.args)  # no other argument is touched: a lazy one must stay lazy
    for i in call.written:
        kept[i] = mx.array(np.array(kept[i].astype(mx.float32))).astype(kept[i].dtype)
        mx.eval(kept[i])
    try:
        result = getattr(ops, op)(*call.args, **call.options)
    except ValueError as error:
        assert refused(str(error)), f"no sentence: {error}"
        return "refused"
    try:
        got = flat(result)
        mx.eval(got)
    except RuntimeError as error:
        assert LATE.search(str(error)), f"refused late: {error}"
        return "late"
    if call.alike is None or not any(a.size for a in got):
        return "ran"
    want = flat(reference(*kept, **call.options))
    mx.eval(want)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.shape} {a.dtype} is not {b.shape}"
    assert call.alike(got, want), "another result than the reference"
    return "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="*", default=OPS, choices=OPS)
    parser.add_argument("--call", type=int, help="this call alone, as a failure names it")
    options = parser.parse_args()
    sys.path += [str(TESTS / "ops"), str(TESTS / "helpers")]
    mx.set_cache_limit(0)  # freed memory is not used again, where a sanitizer would not see it
    met: Counter[tuple[str, str, str]] = Counter()
    end = time.monotonic() + options.seconds
    number, failures = options.call or 0, 0
    while time.monotonic() < end:
        if number % 10 == 0:  # where a sanitizer ends the process: its trace names the op
            print(f"--seed {options.seed} --call {number}", file=sys.stderr, flush=True)
        for instructions in _ext.instruction_sets():
            _ext.use_instruction_set(instructions)
            for op in options.ops:
                try:
                    met[op, instructions, run(op, (options.seed, number))] += 1
                except Exception as error:
                    failures += 1
                    print(f"{op} --seed {options.seed} --call {number} ({instructions}): {error!r}")
        number += 1
        if options.call is not None:
            break
    for op in options.ops:
        kinds = Counter()
        for (name, _, kind), count in met.items():
            kinds[kind] += count * (name == op)
        print(f"{op:18}", ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())))
    print(f"{sum(met.values())} calls, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
