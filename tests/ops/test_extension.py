"""The binding itself: versions, one array through it, what this machine runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pyengine import _ext


def test_built_for_the_mlx_that_runs() -> None:
    assert _ext.built_for_mlx == _ext.running_mlx() == mx.__version__.split("+")[0]


def test_an_array_passes_the_binding() -> None:
    """With a nanobind that is not MLX's, mx.array is an unknown type: a TypeError, here."""
    w, scales, biases = mx.quantize(mx.eye(64), 64, 8)
    out = _ext.quantized_matmul(mx.ones((1, 64)), w, scales, biases, 64, 8, None)
    assert isinstance(out, mx.array)
    np.testing.assert_allclose(np.array(out), np.ones((1, 64)), atol=1e-2)


def test_another_mlx_is_refused_with_the_way_out() -> None:
    code = (
        "from importlib import metadata; metadata.version = lambda _: '0.99.0'\n"
        "import pyengine; pyengine.load"
    )
    here = Path(__file__).parent  # not the checkout, whose package is not built in place
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert run.returncode == 1
    assert "mlx must be 0.32.4 but got 0.99.0. Run: pip install 'mlx==0.32.4'" in run.stderr


def test_instruction_sets_switch() -> None:
    best = _ext.instruction_set()
    assert best == _ext.instruction_sets()[-1]
    with pytest.raises(ValueError, match=r"\[use\] instruction set must be one of .* but got z80"):
        _ext.use_instruction_set("z80")
    try:
        for name in _ext.instruction_sets():
            _ext.use_instruction_set(name)
            assert _ext.instruction_set() == name
    finally:
        _ext.use_instruction_set(best)


def test_threads_are_checked() -> None:
    assert 1 <= _ext.threads() <= (os.cpu_count() or 1)
    for threads in (0, 257):
        with pytest.raises(ValueError, match=r"\[use\] threads must be between 1 and 256 but got"):
            _ext.set_threads(threads)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts wake-ups in /proc")
def test_surplus_threads_stay_asleep() -> None:
    """After more threads than now, a job must wake only those that may join it."""
    before = _ext.threads()
    x = mx.ones((16, 512))
    w = mx.ones((512, 512))

    def jobs(threads: int, count: int) -> None:
        _ext.set_threads(threads)
        for _ in range(count):
            mx.eval(_ext.dense_matmul(x, w, None))
            time.sleep(0.001)  # long enough for idle workers to fall asleep

    def wake_ups() -> dict[str, int]:
        found = {}
        for task in Path("/proc/self/task").iterdir():
            line = next(s for s in (task / "status").open() if s.startswith("voluntary"))
            found[task.name] = int(line.split()[1])
        return found

    try:
        jobs(12, 20)
        jobs(2, 20)
        start = wake_ups()
        jobs(2, 50)
        end = wake_ups()
    finally:
        _ext.set_threads(before)
    awake = [name for name in end if end[name] - start.get(name, 0) >= 25]
    assert len(awake) <= 4  # this thread, MLX's stream, one worker, and one to spare
