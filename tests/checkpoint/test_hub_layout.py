"""The hub's cache as it lies on a disk, moved by links or not, and the names of revisions."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyengine import cli
from pyengine.checkpoint.hub import locate
from pyengine.checkpoint.pair import load

NANO = Path(cli.__file__).parents[1] / "nano"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The embedded pair as the hub's cache holds it: links to blobs, which are named by hash."""
    repo = tmp_path / "hub" / "models--someone--pair"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    for path in (p for p in sorted(NANO.rglob("*")) if p.is_file()):
        data = path.read_bytes()
        # As the hub does: SHA-256 of large files, git's SHA-1 of small ones
        kind = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / kind(data).hexdigest()
        blob.write_bytes(data)
        place = snapshot / path.relative_to(NANO)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return repo


def moved(path: Path, to: Path) -> None:
    """To another disk, with a link in its place."""
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
    path.symlink_to(to)


def as_made(repo: Path) -> None:
    pass


def blobs_moved(repo: Path) -> None:
    moved(repo / "blobs", repo.parents[1] / "disk" / "blobs-of-pair")


def repository_moved(repo: Path) -> None:
    moved(repo, repo.parents[1] / "disk" / "models--someone--pair")


def cache_moved(repo: Path) -> None:
    moved(repo.parent, repo.parents[1] / "disk" / "hub")


def all_moved(repo: Path) -> None:
    blobs_moved(repo)
    repository_moved(repo)
    cache_moved(repo)


def blobs_moved_twice(repo: Path) -> None:
    blobs_moved(repo)
    moved(repo.parents[1] / "disk" / "blobs-of-pair", repo.parents[1] / "disk2" / "b")


@pytest.mark.parametrize(
    "move",
    [as_made, blobs_moved, repository_moved, cache_moved, all_moved, blobs_moved_twice],
    ids=lambda move: move.__name__,
)
def test_a_cache_loads_wherever_it_was_moved(move: Any, repo: Path, tmp_path: Path) -> None:
    move(repo)
    snapshot = repo / "snapshots" / "0123abcd"
    assert load(bundle=snapshot, text=True).name == "pyengine-nano"
    (tmp_path / "short").symlink_to(snapshot)
    assert load(target=tmp_path / "short" / "target", text=True).assistant is None


def test_a_blob_that_is_gone_leads_nowhere(repo: Path) -> None:
    blobs_moved(repo)
    shutil.rmtree(repo.parents[1] / "disk")  # as when the disk is not mounted
    with pytest.raises(ValueError, match=r"^\[load\] 'mtplx_pair\.json' in .* leads nowhere"):
        load(bundle=repo / "snapshots" / "0123abcd")


@pytest.mark.parametrize(
    "name", ["passwd", "0" * 39, "0" * 41, "0" * 40 + ".json", "A" * 40, "g" * 64]
)
def test_a_link_of_blobs_opens_no_other_folder(name: str, repo: Path, tmp_path: Path) -> None:
    """A checkpoint from a stranger may be laid out as a cache whose ``blobs`` leads to secrets."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / name).write_text("{}")
    shutil.rmtree(repo / "blobs")
    (repo / "blobs").symlink_to(secrets)
    place = repo / "snapshots" / "0123abcd" / "mtplx_pair.json"
    place.unlink()
    place.symlink_to(f"../../blobs/{name}")
    with pytest.raises(ValueError, match="must lie inside its folder but leads to"):
        load(bundle=place.parent)


def test_a_link_past_blobs_is_a_way_out_still(repo: Path, tmp_path: Path) -> None:
    blobs_moved(repo)
    (tmp_path / ("0" * 40)).write_text("{}")
    place = repo / "snapshots" / "0123abcd" / "mtplx_pair.json"
    place.unlink()
    place.symlink_to(tmp_path / ("0" * 40))
    with pytest.raises(ValueError, match="must lie inside its folder but leads to"):
        load(bundle=place.parent)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("someone/pair", None),
        ("someone/pair@main", "main"),
        ("someone/pair@v1.2", "v1.2"),
        ("someone/pair@refs/pr/1", "refs/pr/1"),
        ("someone/pair@refs/convert/parquet", "refs/convert/parquet"),
        ("someone/pair@feature/8-bit", "feature/8-bit"),
    ],
)
def test_a_revision_is_a_branch_a_tag_or_a_pull_request(
    name: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        return str(tmp_path)

    fake: Any = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    assert locate(name) == tmp_path and asked == [("someone/pair", revision)]


@pytest.mark.parametrize("tail", ["@", "@/x", "@refs/", "@refs//1", "@../x", "@refs/../x", "@a@b"])
def test_what_is_no_revision_is_no_name(
    tail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    assert locate(f"someone/pair{tail}") == Path(f"someone/pair{tail}")
