"""compare_matmul.py: one matrix in two forms, what is said to the other side, and figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

PEERS = Path(__file__).parents[2] / "bench" / "peers"
sys.path.insert(0, str(PEERS))  # its files import each other as those of a script do
import compare_matmul  # noqa: E402

N, K = 6, 128


def test_both_forms_mean_the_same_matrix() -> None:
    q, scales = compare_matmul.matrix(N, K)
    w, ours, biases = (np.array(a.astype(mx.float32)) for a in compare_matmul.as_ours(q, scales))
    packed = np.array(compare_matmul.as_ours(q, scales)[0]).view(np.uint8)
    assert np.array_equal(packed, q) and w.shape == (N, K // 4)
    mine = packed * np.repeat(ours, 64, axis=1) + np.repeat(biases, 64, axis=1)
    blocks = np.frombuffer(compare_matmul.as_theirs(q, scales), [("scale", "<f2"), ("q", "i1", 32)])
    theirs = blocks["scale"][:, None].astype(np.float32) * blocks["q"]
    assert len(compare_matmul.as_theirs(q, scales)) == N * K // 32 * 34
    assert np.array_equal(mine, theirs.reshape(N, K))
    assert mine.std() > 0 and (mine > 0).any() and (mine < 0).any()


# A matrix of two columns; it answers with times and the sums of the rows
STAND_IN = """
import struct, sys
blocks = sys.stdin.buffer.read(8)
while line := sys.stdin.buffer.readline():
    M, copies = map(int, line.split())
    x = struct.unpack(f"{M * 3}f", sys.stdin.buffer.read(12 * M))
    if copies > 3:
        sys.exit(7)
    told = " ".join(f"{len(blocks) * 0.25 + i}" for i in range(copies))
    sys.stdout.buffer.write(told.encode() + b" \\n")
    sums = [sum(x[3 * m : 3 * m + 3]) + n for m in range(M) for n in range(2)]
    sys.stdout.buffer.write(struct.pack(f"{2 * M}f", *sums))
    sys.stdout.buffer.flush()
"""


def test_what_is_said_to_the_other_side(tmp_path: Path) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    theirs = compare_matmul.Theirs([sys.executable, script], b"8 bytes.", 2)
    for M in (1, 2):
        x = np.arange(3 * M, dtype=np.float32).reshape(M, 3)
        seconds, out = theirs.multiply(x, 3)
        assert seconds == [2.0, 3.0, 4.0]
        assert np.array_equal(out, x.sum(axis=1)[:, None] + [0, 1])
    with pytest.raises(
        SystemExit, match=r"\[compare_matmul\] llama.cpp's side ended with code 7\."
    ):
        theirs.multiply(x, 4)
    theirs.close()


def test_a_row_and_the_table_by_hand() -> None:
    rows = [
        compare_matmul.row(1, 0.002, [0.002, 0.9, 0.001], [0.004, 0.003, 0.9], 1_000_000),
        compare_matmul.row(4, 0.002, [0.004], [0.003], 1_000_000),
    ]
    assert rows[0] == {
        "rows": 1,
        "ours_ms": pytest.approx(2),
        "theirs_ms": pytest.approx(4),
        "theirs_over_ours": pytest.approx(2),
        "ours_over_first": pytest.approx(1),
        "ours_gflops": pytest.approx(1),  # 2 million in 2 ms
    }
    report = {
        "N": 1000,
        "K": 1000,
        "copies": 3,
        "threads": 2,
        "read_gb_s": 20,
        "machine": {"chip": "Chip"},
        "commit": "abc",
        "llama_cpp": "package==1",
        "rows": rows,
    }
    assert compare_matmul.markdown(report).splitlines() == [
        "1000 x 1000, 3 copies; 2 threads, which read 20.0 GB/s. Chip, commit abc; llama.cpp from "
        "package==1.",
        "",
        "| M | pyengine, ms | llama.cpp, ms | llama.cpp / pyengine | of M = 1 | GFLOPS |",
        "| --: | --: | --: | --: | --: | --: |",
        "| 1 | 2.00 | 4.00 | 2.00 | 1.00 | 1 |",
        "| 4 | 4.00 | 3.00 | 0.75 | 2.00 | 2 |",
    ]


def test_how_far_results_are_apart() -> None:
    ours = np.array([[3.0, 4.0]])
    assert compare_matmul.apart(ours, ours) == 0
    assert compare_matmul.apart(ours, np.array([[3.0, 4.5]])) == pytest.approx(0.1)  # 0.5 of 5


@pytest.mark.parametrize(
    "options, told",
    [
        (["--shape", "64"], "--shape must be N x K with K a multiple of 64, as 14336x4096, but"),
        (["--shape", "64x96"], "--shape must be N x K with K a multiple of 64"),
        (["--shape", "0x64"], "but got '0x64'."),
        (["--rows", "1,a"], "--rows must be numbers from 1 on but got '1,a'."),
        (["--rows", "0"], "--rows must be numbers from 1 on but got '0'."),
        (["--turns", "0"], "--turns must be 1 or more but got 0."),
        (["--threads", "0"], "--threads must be 1 to 256 but got 0."),
        (["--threads", "257"], "--threads must be 1 to 256 but got 257."),
    ],
)
def test_errors(
    options: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_matmul.py", *options])
    with pytest.raises(SystemExit) as refused:
        compare_matmul.main()
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "[compare_matmul] --" in said and told in said


def test_llama_cpp_that_is_not_there_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_matmul.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"llama\.cpp is not installed: python"):
        compare_matmul.main()
    (tmp_path / "llama.cpp").mkdir()
    with pytest.raises(SystemExit, match=r"must hold libggml-cpu\.a but got none"):
        compare_matmul.build(tmp_path / "llama.cpp", tmp_path)


def test_the_report_is_printed_as_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "llama.cpp"
    home.mkdir()
    (home / "installed.txt").touch()
    asked = []
    monkeypatch.setattr(
        compare_matmul, "compare", lambda *given: asked.append(given) or {"rows": []}
    )
    command = ["compare_matmul.py", "--folder", str(tmp_path), "--shape", "32x64", "--rows", "1,7"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    compare_matmul.main()
    [(options, where)] = asked
    assert (options.shape, options.rows, where) == ((32, 64), [1, 7], home.resolve())
    assert json.loads(capsys.readouterr().out) == {"rows": []}
