"""Our quantised matmul and llama.cpp's on the same matrix, by turns.

Run: python bench/peers/compare_matmul.py [--shape 14336x4096] [--turns 3] [--json]

The matrix has 8 bits and means the same in both forms: Q8_0 there, here groups of 64 whose bias is
-128 scales. Rows are bfloat16's numbers, as float32 there. Either side has as many copies of the
matrix as make --gigabytes, so that no cache holds them, and goes through all of them (calls of more
than 16 rows: one), then it is the other's turn. A figure is the median of all these calls, MLX's
evaluation of one op included; the other side's is its own clock's. Both results are compared.

llama.cpp is the one that `python bench/peers/run.py --setup llama.cpp` builds; this links a program
of some lines, compare_matmul.cpp, with its libraries (c++).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import install
import mlx.core as mx
import numpy as np
import report
from run import FOLDER, add_threads, check_threads, not_installed, numbers

from pyengine import _ext, ops
from pyengine.bench.arrays import normal
from pyengine.bench.bandwidth import measure
from pyengine.bench.report import environment

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARIES = ("ggml-cpu", "ggml-base")
GROUP, THEIR_GROUP = 64, 32
# It rounds rows to 8 bits as well; these are some of a result's root mean square.
MOST_APART = 0.02


def matrix(N: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned bytes [N, K] and scales [N, K / 64], which bfloat16 and float16 hold exactly."""
    random = np.random.default_rng(1)
    q = random.integers(1, 256, (N, K), dtype=np.uint8)
    scales = (1 + random.integers(0, 128, (N, K // GROUP)) / 128) / 2**14
    return q, scales.astype(np.float32)


def as_ours(q: np.ndarray, scales: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
    made = mx.array(scales).astype(mx.bfloat16)
    return mx.array(q.view(np.uint32)), made, made * -128


def as_theirs(q: np.ndarray, scales: np.ndarray) -> bytes:
    """Blocks of 32 weights: the scale as float16, then signed bytes."""
    N, K = q.shape
    blocks = np.empty((N, K // THEIR_GROUP), [("scale", "<f2"), ("q", "i1", THEIR_GROUP)])
    blocks["scale"] = np.repeat(scales, GROUP // THEIR_GROUP, axis=1)
    blocks["q"] = (q.astype(np.int16) - 128).reshape(N, -1, THEIR_GROUP)
    return blocks.tobytes()


def build(home: Path, folder: Path) -> Path:
    """The program, linked with the libraries of what is installed in `home`."""
    found = [next(home.glob(f"build/**/lib{name}.a"), None) for name in LIBRARIES]
    missing = [name for name, path in zip(LIBRARIES, found, strict=True) if path is None]
    if missing:
        raise SystemExit(f"[compare_matmul] {home} must hold lib{missing[0]}.a but got none.")
    program = folder / "compare_matmul"
    command = ["c++", "-std=c++20", "-O2", "-fopenmp", SOURCE]
    command += [f"-I{home / 'llama.cpp/ggml/include'}", *found, "-pthread", "-ldl", "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    return program


class Theirs:
    """The program while it waits for rows."""

    def __init__(self, command: Sequence[str | Path], blocks: bytes, N: int) -> None:
        words = list(map(str, command))
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.N = N
        self._tell(blocks)

    def _tell(self, sent: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(sent)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> SystemExit:
        return SystemExit(
            f"[compare_matmul] llama.cpp's side ended with code {self.process.wait()}."
        )

    def multiply(self, x: np.ndarray, copies: int) -> tuple[list[float], np.ndarray]:
        """Seconds of each copy's call and the result [M, N] of the last."""
        self._tell(f"{len(x)} {copies}\n".encode() + x.astype(np.float32).tobytes())
        assert self.process.stdout is not None
        seconds = list(map(float, self.process.stdout.readline().split()))
        size = 4 * len(x) * self.N
        told = self.process.stdout.read(size)
        if len(told) < size:
            raise self._ended()
        return seconds, np.frombuffer(told, np.float32).reshape(-1, self.N)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The root mean square of their difference over that of our result."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(ours**2)))


def row(M: int, first: float, ours: Sequence[float], theirs: Sequence[float], work: int) -> Any:
    """Medians; `first` is ours at the first row count, `work` weights of the matrix."""
    own, other = statistics.median(ours), statistics.median(theirs)
    return {
        "rows": M,
        "ours_ms": 1e3 * own,
        "theirs_ms": 1e3 * other,
        "theirs_over_ours": other / own,
        "ours_over_first": own / (first or own),
        "ours_gflops": 2e-9 * M * work / own,
    }


def markdown(made: dict[str, Any]) -> str:
    first = made["rows"][0]["rows"]
    heads = ("M", "pyengine, ms", "llama.cpp, ms", "llama.cpp / pyengine")
    heads += (f"of M = {first}", "GFLOPS")
    lines = [
        f"{made['N']} x {made['K']}, {made['copies']} copies; {made['threads']} threads, "
        f"which read {made['read_gb_s']:.1f} GB/s. {made['machine']['chip']}, "
        f"commit {made['commit']}; llama.cpp from {made['llama_cpp']}.",
        "",
        report.table(
            heads,
            [
                (
                    str(row["rows"]),
                    f"{row['ours_ms']:.2f}",
                    f"{row['theirs_ms']:.2f}",
                    f"{row['theirs_over_ours']:.2f}",
                    f"{row['ours_over_first']:.2f}",
                    f"{row['ours_gflops']:.0f}",
                )
                for row in made["rows"]
            ],
            names=0,
        ),
    ]
    return "\n".join(lines)


def compare(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    N, K = options.shape
    mx.set_default_device(mx.cpu)
    _ext.set_threads(options.threads)
    q, scales = matrix(N, K)
    blocks = as_theirs(q, scales)
    w, ours_scales, biases = as_ours(q, scales)
    copies = max(1, round(options.gigabytes * 1e9 / len(blocks)))
    matrices = [w + 0 for _ in range(copies)]
    inputs = {M: normal(M, M, K) for M in options.rows}
    mx.eval(matrices, ours_scales, biases, list(inputs.values()))
    taken: dict[int, tuple[list[float], list[float]]] = {M: ([], []) for M in options.rows}
    with tempfile.TemporaryDirectory() as folder:
        program = build(home, Path(folder))
        theirs = Theirs([program, *map(str, (N, K, options.threads, copies))], blocks, N)
        for _ in range(options.turns):
            for M, x in inputs.items():
                some = copies if M <= 16 else 1
                for copy in matrices[:some]:
                    start = time.perf_counter()
                    out = ops.quantized_matmul(x, copy, ours_scales, biases, GROUP, 8)
                    mx.eval(out)
                    taken[M][0].append(time.perf_counter() - start)
                seconds, other = theirs.multiply(np.array(x.astype(mx.float32)), some)
                taken[M][1].extend(seconds)
                far = apart(np.array(out.astype(mx.float32)), other)
                if not far < MOST_APART:
                    raise SystemExit(
                        f"[compare_matmul] results must agree but got {far:.3f} of {M} rows."
                    )
        theirs.close()
    first = statistics.median(taken[options.rows[0]][0])
    return {
        "bench": "peers compare_matmul",
        **environment(),
        "N": N,
        "K": K,
        "copies": copies,
        "threads": options.threads,
        "turns": options.turns,
        "instruction_set": _ext.instruction_set(),
        "read_gb_s": measure().gb_s,
        "llama_cpp": (home / "source.txt").read_text().strip(),
        "rows": [row(M, first, *each, N * K) for M, each in taken.items()],
    }


def shape(text: str) -> tuple[int, int]:
    N, K = map(int, text.split("x"))
    if N < 1 or K < GROUP or K % GROUP:
        raise ValueError
    return N, K


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="14336x4096", help="N x K")
    parser.add_argument("--rows", default="1,2,4,6,8,16,512")
    parser.add_argument("--gigabytes", type=float, default=1, help="of each side's copies")
    parser.add_argument("--turns", type=int, default=5)
    add_threads(parser)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where llama.cpp is installed")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args()
    given = options.shape
    try:
        options.shape = shape(given)
    except ValueError:
        rule = f"be N x K with K a multiple of {GROUP}, as 14336x4096,"
        parser.error(f"[compare_matmul] --shape must {rule} but got {given!r}.")
    given = options.rows
    try:
        options.rows = numbers(given)
        if min(options.rows) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"[compare_matmul] --rows must be numbers from 1 on but got {given!r}.")
    if options.turns < 1:
        parser.error(f"[compare_matmul] --turns must be 1 or more but got {options.turns}.")
    check_threads(parser, "compare_matmul", options.threads)
    peer = next(peer for peer in install.PEERS if peer.name == "llama.cpp")
    if not peer.is_installed(options.folder):
        sys.exit(not_installed(peer))
    made = compare(options, peer.home(options.folder.resolve()))
    print(json.dumps(made) if options.json else markdown(made))


if __name__ == "__main__":
    main()
