"""The quantised matmul's processor kernel in this tree against another tree's.

Both are compiled for one instruction set, or each for its own, into one program (g++), and take
turns on the same weights of bfloat16, together with a loop that only reads these. A piece is a
group of columns, as threads are handed them; its time is the lower quartile of its processor times,
and a figure is the sum over all pieces by the number of threads: so a busy machine adds little, and
the figures of one line stand beside the same neighbours. Copies of the matrix that no cache holds
together (a gigabyte) stand for a model. Equal bits are checked; of two sets it says by how much the
results differ at most, over their root mean square.

Run: python bench/matmul_kernels.py OLD_TREE [--shape 14336x4096] [--rows 1,2,4,6,8,16,512]
         [--bits 8] [--group-size 64] [--isa avx2] [--old-isa avx2] [--turns 10] [--threads 1]
         [--matrices 1]
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
KERNELS = ("ops/quantized_matmul_cpu", "cpu/rows_cpu")
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-w"]


def flags_of(isa: str) -> list[str]:
    """As cmake compiles for this instruction set."""
    text = (TREE / "cmake/InstructionSets.cmake").read_text()
    found = re.search(rf"set\(PYENGINE_FLAGS_{isa}\s+([^)]*)\)", text)
    flags = []
    for word in found[1].split() if found else []:
        of_another = re.fullmatch(r"\$\{PYENGINE_FLAGS_(\w+)\}", word)
        flags += flags_of(of_another[1]) if of_another else [word]
    return flags


def build(old: Path, old_isa: str, isa: str, folder: Path) -> Path:
    objects = []
    for name, tree, its in (("before", old, old_isa), ("after", TREE, isa)):
        for kernel in KERNELS:
            objects.append(str(folder / f"{name}_{Path(kernel).name}.o"))
            source = [f"-I{tree / 'csrc'}", "-c", str(tree / "csrc" / f"{kernel}.cpp")]
            options = [*FLAGS, *flags_of(its), f"-DPYENGINE_ISA={name}"]
            subprocess.run(["g++", *options, *source, "-o", objects[-1]], check=True)
    program = folder / "matmul_kernels"
    main = [f"-I{TREE / 'csrc'}", str(TREE / "bench/matmul_kernels.cpp")]
    subprocess.run(["g++", *FLAGS, "-pthread", *main, *objects, "-o", str(program)], check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the tree to compare with")
    parser.add_argument("--shape", default="14336x4096", help="N x K")
    parser.add_argument("--rows", default="1,2,4,6,8,16,512")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--isa", default="avx2")
    parser.add_argument("--old-isa", help="the old tree's, if it is another")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--matrices", type=int, default=1, help="copies that turns go through")
    options = parser.parse_args()
    N, K = map(int, options.shape.split("x"))
    nbytes = N * K * options.bits // 8 + 2 * N * K // options.group_size * 2
    old_isa = options.old_isa or options.isa
    print("rows  old ms  new ms read ms  GFLOPS    GB/s  new/old  new / new at the first rows")
    with tempfile.TemporaryDirectory() as folder:
        program = build(options.old.resolve(), old_isa, options.isa, Path(folder))
        first = 0.0
        for rows in map(int, options.rows.split(",")):
            turns = max(2, options.turns * 16 // max(16, rows))
            shared = (options.threads, options.matrices)
            numbers = map(str, (N, K, options.bits, options.group_size, rows, turns, *shared))
            done = subprocess.run([program, *numbers], text=True, capture_output=True, check=True)
            old, new, read, differ = map(float, done.stdout.split())
            if old_isa == options.isa:
                assert differ == 0, f"the bits of {rows} rows differ"
            first = first or new
            times = (old * 1e3, new * 1e3, read * 1e3)
            rates = (2e-9 * rows * N * K / new, nbytes / new / 1e9)
            ratios = (new / old, new / first)
            line = [f"{rows:4}", *(f"{x:7.2f}" for x in (*times, *rates, *ratios))]
            print(*line, *([f"differ by {differ:.1e}"] if differ else []))


if __name__ == "__main__":
    main()
