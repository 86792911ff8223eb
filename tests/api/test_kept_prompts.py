"""An engine's prompts in a folder: another engine goes on from them, with the same texts."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from pyengine import Engine
from pyengine.checkpoint.pair import load
from pyengine.generation import generate

PROMPT = [5 + i * i % 900 for i in range(700)]


def ask(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
    request = engine.submit(prompt, max_tokens=8, sampling={"seed": 3})
    "".join(request)
    return request.result.tokens, request.result.stats.reused_tokens


def test_a_prompt_is_read_once_for_all_processes(tmp_path: Path) -> None:
    longer = [*PROMPT, 9, 8, 7]
    with Engine(cache_dir=tmp_path / "kept") as engine:
        said, count = ask(engine, PROMPT)
        assert count == 0
    alone = generate(longer, max_tokens=8, sampling={"seed": 3}).tokens
    with Engine(cache_dir=tmp_path / "kept") as engine:
        assert ask(engine, PROMPT) == (said, len(PROMPT) // 64 * 64)
        assert ask(engine, longer) == (alone, len(PROMPT))
    with Engine() as engine:
        assert ask(engine, PROMPT) == (said, 0)


def test_an_engine_that_runs_writes_when_it_is_idle(tmp_path: Path) -> None:
    engine = Engine(cache_dir=tmp_path)
    engine.start()
    ask(engine, PROMPT)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("*/*.full.page"))) < len(PROMPT) // 64:
        assert time.monotonic() < end
        time.sleep(0.01)
    # As after a crash: nobody closes it before another one begins
    with Engine(cache_dir=tmp_path) as other:
        assert ask(other, PROMPT)[1] > 0
    engine.close()


def test_damaged_files_are_told_and_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(cache_dir=tmp_path) as engine:
        said, _ = ask(engine, PROMPT)
    for path in tmp_path.glob("*/*.page"):
        path.write_bytes(b"no page")
    with caplog.at_level(logging.WARNING, "pyengine"), Engine(cache_dir=tmp_path) as engine:
        assert ask(engine, PROMPT) == (said, 0)
    assert "is ignored: it has another size." in caplog.text


def test_another_dtype_has_pages_of_its_own(tmp_path: Path) -> None:
    with Engine(cache_dir=tmp_path) as engine:
        ask(engine, PROMPT)
    with Engine(load(dtype="float32"), cache_dir=tmp_path) as engine:
        assert ask(engine, PROMPT)[1] == 0


def test_the_folder_has_a_limit(tmp_path: Path) -> None:
    with Engine(cache_dir=tmp_path, cache_dir_bytes=2_000_000) as engine:
        ask(engine, PROMPT)
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*.page")]
    assert sizes and sum(sizes) <= 2_000_000


def test_what_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^\[cache\] .*file"):
        Engine(cache_dir=tmp_path / "file")
    with pytest.raises(ValueError, match=r"^\[cache\] the folder must be a path but got 3\."):
        Engine(cache_dir=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^\[cache\] bytes must be at least 1 but got 0\."):
        Engine(cache_dir=tmp_path, cache_dir_bytes=0)
