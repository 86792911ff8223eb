"""The command of lm-eval where the extra eval is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_without_lm_eval_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(name='lm_eval')")
    done = subprocess.run(
        [sys.executable, "-m", "pyengine.evaluate", "run"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    line = f'{sys.executable} -m pip install "pyengine-mlx[eval]"'
    said = f"pyengine: [evaluate] lm_eval must be installed but is not; run: {line}.\n"
    assert (done.returncode, done.stderr) == (2, said)
