"""The quantised matmul with one instruction set of this machine against another, by turns.

Weights are bfloat16's, 8 bits by default, as many copies of the matrix as make --gigabytes, so that
no cache holds them; a copy is multiplied once per turn and row count with each set. A figure is the
median over all of these; a set's first column is milliseconds, the second what it is of its own at
the first row count.

Run: python bench/instruction_sets.py [--shape 14336x4096] [--rows 1,2,4,6,8,16,512]
    [--sets avx512,amx] [--bits 8] [--gigabytes 1] [--turns 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import mlx.core as mx

from pyengine import _ext
from pyengine.bench.arrays import normal, quantized
from pyengine.bench.bandwidth import measure
from pyengine.ops import quantized_matmul

GROUP = 64


def main() -> None:
    best = ",".join(_ext.instruction_sets()[-2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="14336x4096", help="N x K")
    parser.add_argument("--rows", default="1,2,4,6,8,16,512")
    parser.add_argument("--sets", default=best, help=f"of {', '.join(_ext.instruction_sets())}")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    N, K = map(int, options.shape.split("x"))
    rows, sets = [int(M) for M in options.rows.split(",")], options.sets.split(",")
    mx.set_default_device(mx.cpu)

    w, scales, biases = quantized(1, N, K, group_size=GROUP, bits=options.bits)
    size = w.nbytes + scales.nbytes + biases.nbytes
    copies = [w + n for n in range(max(1, round(options.gigabytes * 1e9 / size)))]
    inputs = {M: normal(M, M, K) for M in rows}
    mx.eval(copies, scales, biases, list(inputs.values()))
    taken: dict[tuple[int, str], list[float]] = defaultdict(list)
    for turn in range(options.turns):
        for M in rows:
            # A call of many rows takes long enough to need no cold weights
            for copy in copies if M <= 16 else copies[:1]:
                for name in sets[turn % len(sets) :] + sets[: turn % len(sets)]:
                    _ext.use_instruction_set(name)
                    start = time.perf_counter()
                    mx.eval(quantized_matmul(inputs[M], copy, scales, biases, GROUP, options.bits))
                    taken[M, name].append(time.perf_counter() - start)
    middle = {key: statistics.median(each) for key, each in taken.items()}

    print(
        f"{N} x {K}, {options.bits} bits, {len(copies)} copies of {size / 1e6:.0f} MB; "
        f"{_ext.threads()} threads read {measure().gb_s:.1f} GB/s"
    )
    print(
        "|".join(["", " M ", *(f" {name}, ms | of M = {rows[0]} " for name in sets), " GB/s ", ""])
    )
    print("|".join(["", *[" --: "] * (2 + 2 * len(sets)), ""]))
    for M in rows:
        cells = [str(M)]
        for name in sets:
            own = middle[M, name]
            cells += [f"{1e3 * own:.2f}", f"{own / middle[rows[0], name]:.2f}"]
        cells.append(f"{size / middle[M, sets[-1]] / 1e9:.1f}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
