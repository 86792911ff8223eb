"""convert's own names: made once, never followed; what others left there stays as it was."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny_pairs import FIXTURES

from pyengine.checkpoint import new_folder as module
from pyengine.checkpoint.convert import convert
from pyengine.checkpoint.new_folder import MARK, TEXT, new_folder
from pyengine.checkpoint.pair import load

SRC = FIXTURES / "dense31" / "target"


def state(folder: Path) -> dict[str, object]:
    """Every name below a folder, and what it is: text, where a link leads, or its kind."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        what: object = "folder" if path.is_dir() else "other"
        if path.is_symlink():
            what = os.readlink(path)
        elif path.is_file():
            what = path.read_bytes()
        found[str(path.relative_to(folder))] = what
    return found


def folder_with_work(place: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")


def empty_folder(place: Path) -> None:
    place.mkdir()


def file(place: Path) -> None:
    place.write_text("notes")


def link_to_work(place: Path) -> None:
    folder_with_work(place.parent / "work")
    place.symlink_to("work")


def link_to_nothing(place: Path) -> None:
    place.symlink_to("nowhere")


def link_to_a_leftover(place: Path) -> None:
    leftover(place.parent / "work")
    place.symlink_to("work")


def pipe(place: Path) -> None:
    os.mkfifo(place)


def folder_with_another_mark(place: Path) -> None:
    folder_with_work(place)
    (place / MARK).write_text("another program's")


def folder_with_a_long_mark(place: Path) -> None:
    folder_with_work(place)
    (place / MARK).write_bytes(TEXT + b"and more")


def folder_with_a_mark_half_written(place: Path) -> None:
    folder_with_work(place)
    (place / MARK).write_bytes(TEXT[:5])


def folder_with_a_linked_mark(place: Path) -> None:
    folder_with_work(place)
    (place.parent / "mark").write_bytes(TEXT)
    (place / MARK).symlink_to("../mark")


def folder_with_a_pipe_as_mark(place: Path) -> None:
    folder_with_work(place)
    os.mkfifo(place / MARK)


def folder_with_a_folder_as_mark(place: Path) -> None:
    folder_with_work(place)
    (place / MARK).mkdir()


FOREIGN = [
    folder_with_work,
    empty_folder,
    file,
    link_to_work,
    link_to_nothing,
    link_to_a_leftover,
    pipe,
    folder_with_another_mark,
    folder_with_a_long_mark,
    folder_with_a_mark_half_written,
    folder_with_a_linked_mark,
    folder_with_a_pipe_as_mark,
    folder_with_a_folder_as_mark,
]


@pytest.mark.parametrize("lay", FOREIGN, ids=lambda lay: lay.__name__)
def test_what_is_foreign_under_the_temporary_name_is_left_alone(
    lay: Callable[[Path], None], tmp_path: Path
) -> None:
    place = tmp_path / ".x.partial"
    lay(place)
    before = state(tmp_path)
    with pytest.raises(
        ValueError, match=r"^\[convert\] dst must leave its temporary name free"
    ) as e:
        convert(SRC, tmp_path / "x")
    assert str(place) in str(e.value) and "remove it or name another dst" in str(e.value)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", [".x.lock", ".x", "x.partial", ".x.partial.tmp"])
@pytest.mark.parametrize("lay", [file, link_to_work, link_to_nothing, folder_with_work])
def test_no_other_name_is_touched(lay: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    lay(tmp_path / name)
    before = state(tmp_path)
    convert(SRC, tmp_path / "x")
    after = state(tmp_path)
    assert {key: after[key] for key in before} == before
    assert {key.split("/")[0] for key in after.keys() - before.keys()} == {"x"}


def leftover(place: Path) -> None:
    """As a run that is killed leaves it, with links in it for good measure."""
    outside = place.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (place / "target" / "deep").mkdir(parents=True)
    (place / "target" / "model.safetensors").write_bytes(bytes(100))
    (place / "target" / "deep" / "link").symlink_to(outside)
    (place / "link").symlink_to(outside)
    (place / "file").symlink_to(outside / "kept")
    (place / MARK).write_bytes(TEXT)


def test_what_a_killed_run_left_is_used_again(tmp_path: Path) -> None:
    leftover(tmp_path / ".x.partial")
    convert(SRC, tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == ["outside", "x"]
    assert (tmp_path / "outside" / "kept").read_text() == "kept"
    assert not (tmp_path / "x" / MARK).exists() and not (tmp_path / "x" / "link").exists()
    load(tmp_path / "x")


def test_a_leftover_of_another_user_is_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover(tmp_path / ".x.partial")
    before = state(tmp_path)
    other = os.geteuid() + 1
    monkeypatch.setattr(module.os, "geteuid", lambda: other)
    with pytest.raises(ValueError, match="must leave its temporary name free"):
        convert(SRC, tmp_path / "x")
    assert state(tmp_path) == before


def test_a_run_that_goes_on_is_not_disturbed(tmp_path: Path) -> None:
    dst = tmp_path / "x"
    with new_folder(dst, 1) as first:
        (first / "work").write_text("half")
        before = state(tmp_path)
        with pytest.raises(ValueError, match=r"^\[convert\] dst must not be in the making but"):
            convert(SRC, dst)
        assert state(tmp_path) == before
    assert state(tmp_path) == {"x": "folder", "x/work": b"half"}


def test_a_run_that_ends_while_another_looks_in_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has the mark open when the first is done with it: the lock it gets is stale."""
    dst = tmp_path / "x"
    first = new_folder(dst, 1)
    folder = first.__enter__()
    (folder / "work").write_text("whole")
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        if how & fcntl.LOCK_NB:
            first.__exit__(None, None, None)
        real(handle, how)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with pytest.raises(ValueError, match="must not be in the making"), new_folder(dst, 1):
        raise AssertionError("not reached")
    assert state(tmp_path) == {"x": "folder", "x/work": b"whole"}


def test_a_run_is_seen_to_go_on_at_each_of_its_steps(tmp_path: Path) -> None:
    """Another that looks in between any two lines never takes its folder for a stranger's."""
    dst, partial, seen = tmp_path / "x", tmp_path / ".x.partial", []

    def look(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line" and os.path.lexists(partial):
            sys.settrace(None)
            with pytest.raises(ValueError, match="must not be in the making but"):
                module._take_over(partial, dst)
            seen.append(frame.f_lineno)
            sys.settrace(look)
        return look

    sys.settrace(look)
    try:
        with new_folder(dst, 1) as folder:
            (folder / "work").write_text("whole")
    finally:
        sys.settrace(None)
    assert len(set(seen)) >= 5
    assert state(tmp_path) == {"x": "folder", "x/work": b"whole"}


def test_a_name_that_is_taken_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something lies there when the folder is to get its name."""
    for number, lay in enumerate((file, link_to_work, folder_with_work, pipe)):
        home = tmp_path / str(number)
        home.mkdir()
        lay(home / ".x.partial")
        before = state(home)
        with monkeypatch.context() as patch:
            patch.setattr(module.os.path, "lexists", lambda path: False)
            assert module._make(home / ".x.partial") is None
        assert state(home) == before


def test_of_many_runs_at_once_one_is_left(tmp_path: Path) -> None:
    for again in range(20):
        dst = tmp_path / str(again)
        barrier, done, refused = threading.Barrier(6), [], []

        def run(number: int) -> None:
            barrier.wait()  # noqa: B023 (joined below)
            try:
                with new_folder(dst, 1) as folder:  # noqa: B023
                    (folder / "mine").write_text(str(number))
                    assert (folder / "mine").read_text() == str(number)
                done.append(str(number))  # noqa: B023
            except ValueError as error:
                refused.append(str(error))  # noqa: B023

        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == 1 and len(refused) == 5, (done, refused)
        assert all("[convert] dst must " in reason for reason in refused), refused
        assert (dst / "mine").read_text() == done[0]
        assert os.listdir(dst) == ["mine"]
    assert sorted(os.listdir(tmp_path), key=int) == [str(i) for i in range(20)]


def test_what_takes_the_name_meanwhile_is_left_alone(tmp_path: Path) -> None:
    dst = tmp_path / "x"
    for lay in (file, link_to_nothing, empty_folder, folder_with_work):
        with pytest.raises(ValueError, match="dst must not exist yet"), new_folder(dst, 1):
            lay(dst)
            before = state(dst) if dst.is_dir() else os.lstat(dst)
        after = state(dst) if dst.is_dir() else os.lstat(dst)
        assert before == after and os.listdir(tmp_path) == ["x"]
        subprocess.run(["rm", "-r", str(dst)], check=True)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    for error in (ValueError("x"), OSError(28, "No space left"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as ended, new_folder(tmp_path / "x", 1) as folder:
            (folder / "target").mkdir()
            (folder / "target" / "half").write_text("half")
            raise error
        assert str(error) in str(ended.value)
        assert os.listdir(tmp_path) == []


KILLED = """
import os, sys
from pathlib import Path
from pyengine.checkpoint.new_folder import new_folder
with new_folder(Path(sys.argv[1]), 1) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_a_real_kill_leaves_what_is_recognised(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "x")], cwd=FIXTURES)
    assert done.returncode == -9 and os.listdir(tmp_path) == [".x.partial"]
    with new_folder(tmp_path / "x", 1) as folder:
        assert os.listdir(folder) == [MARK]
    assert os.listdir(tmp_path) == ["x"]


def test_a_socket_under_the_temporary_name_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have no more than about 100 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(".x.partial")
        with pytest.raises(ValueError, match="must leave its temporary name free"):
            convert(SRC, Path("x"))
    assert os.listdir(tmp_path) == [".x.partial"]
