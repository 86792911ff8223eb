"""A file that may be absent is absent or a regular file: nothing else passes for absent."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pairs import FIXTURES

from pyengine import cli
from pyengine.checkpoint.convert import convert
from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.pair import load
from pyengine.checkpoint.safetensors import INDEX, SINGLE
from pyengine.untrusted import optional

NANO = Path(cli.__file__).parents[1] / "nano"

# What may have a file's name in place of a file, and what is said of it
Make = Callable[[Path], object]


def link_to_nothing(path: Path) -> None:
    path.symlink_to("gone")


def link_to_a_link_to_nothing(path: Path) -> None:
    path.with_name("between").symlink_to("gone")
    path.symlink_to("between")


def link_out_to_nothing(path: Path) -> None:
    path.symlink_to("/absent/disk/blob")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("queue"))
    path.symlink_to("queue")


def plug(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may have no more than about 100 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS: dict[Make, str] = {
    link_to_nothing: "leads nowhere",
    link_to_a_link_to_nothing: "leads nowhere",
    link_out_to_nothing: "leads nowhere",
    link_to_itself: "leads nowhere",
    folder: "must be a file but is a folder",
    pipe: "must be a file but is a pipe",
    link_to_a_pipe: "must be a file but is a pipe",
    plug: "must be a file but is a device or socket",
    link_to_a_device: "must lie inside its folder but leads to /dev/zero",
}

LOADED = [
    MANIFEST,
    "target/config.json",
    f"target/{SINGLE}",
    f"target/{INDEX}",
    "target/generation_config.json",
    "target/chat_template.jinja",
    "target/tokenizer.json",
    "target/tokenizer_config.json",
    "assistant/config.json",
    f"assistant/{SINGLE}",
    f"assistant/{INDEX}",
    "assistant/generation_config.json",
]


def replaced(path: Path, make: Make) -> str:
    path.unlink(missing_ok=True)
    make(path)
    return rf"^\[\w+\] .*{path.name}.* {KINDS[make]}"


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", LOADED)
def test_load_and_inspect_refuse_what_is_no_file(name: str, make: Make, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "b"))
    message = replaced(bundle / name, make)
    with pytest.raises(ValueError, match=message):
        load(bundle=bundle, text=True)
    with pytest.raises(ValueError, match=message):
        raise ValueError("\n".join(inspect(bundle)["refused"]).splitlines()[0])


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_tokenizer_model_that_would_be_read_must_be_a_file(make: Make, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "b"))
    message = replaced(bundle / "target" / "tokenizer.model", make)
    load(bundle=bundle, text=True)  # tokenizer.json comes first
    (bundle / "target" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=message):
        load(bundle=bundle, text=True)


COPIED = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "README.md",
    INDEX,
    SINGLE,
]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", COPIED)
def test_convert_refuses_what_is_no_file(name: str, make: Make, tmp_path: Path) -> None:
    src = Path(shutil.copytree(FIXTURES / "dense31" / "target", tmp_path / "src"))
    message = replaced(src / name, make)
    with pytest.raises(ValueError, match=message):
        convert(src, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_links_inside_the_folder_are_files(tmp_path: Path) -> None:
    src = Path(shutil.copytree(FIXTURES / "dense31" / "target", tmp_path / "src"))
    (src / "kept").mkdir()
    for name in ("config.json", "generation_config.json", SINGLE):
        (src / name).rename(src / "kept" / name)
        (src / name).symlink_to(Path("kept") / name)
    convert(src, tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").is_symlink()
    assert load(tmp_path / "out").generation == load(FIXTURES / "dense31" / "target").generation


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert optional(tmp_path / "absent", "x", "load") is None
    assert optional(tmp_path / "file", "x", "load") is None


@pytest.mark.parametrize("part", ["target", "assistant"])
def test_a_part_that_is_a_link_to_nothing_leads_nowhere(part: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "b"))
    shutil.rmtree(bundle / part)
    (bundle / part).symlink_to("/absent/disk")
    for give in (lambda: load(bundle=bundle), lambda: convert(bundle, tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"'?{part}'? in .*b leads nowhere"):
            give()
    with pytest.raises(ValueError, match="is a link that leads nowhere"):
        load(bundle / part)
