"""Safetensors headers are data: a damaged one is one sentence that says what is wrong."""

import json

import pytest

from pyengine.checkpoint.safetensors import read_header, read_headers

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path, header, data=b"\0" * 24, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_reads_names_and_shapes(tmp_path):
    path = write(tmp_path / "a", {"w": F32, "__metadata__": {"format": "pt"}})
    start = path.stat().st_size - 24
    assert read_header(path) == {"w": ("F32", (2, 3), start, start + 24)}
    assert read_header(path)["w"].elements == 6
    scalar = {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}
    assert read_header(write(tmp_path / "b", {"s": scalar}, b"\0\0"))["s"].shape == ()


@pytest.mark.parametrize(
    "header, message",
    [
        ({"w": {**F32, "data_offsets": [0, 28]}}, "`w` has 28 bytes, which do not fit its shape"),
        ({"w": {**F32, "data_offsets": [8, 32]}}, "`w` ends past the end of the file"),
        ({"w": {**F32, "data_offsets": [24, 0]}}, "`w` has no sound shape and offsets"),
        ({"w": {**F32, "shape": [-2, -3]}}, "`w` has no sound shape and offsets"),
        ({"w": {**F32, "shape": [2.0, 3]}}, "`w` has no sound shape and offsets"),
        ({"w": {**F32, "shape": 6}}, "an entry has a wrong form"),
        ({"w": {**F32, "dtype": "F12"}}, "`w` has the unknown dtype 'F12'"),
        ({"w": {"dtype": "F32"}}, "an entry has a wrong form"),
        ({"w": 3}, "an entry has a wrong form"),
        ({"w": {**F32, "data_offsets": [0, 24, 30]}}, "too many values"),
        ({"v": F32, "w": {**F32, "shape": [1], "data_offsets": [20, 24]}}, "overlaps another"),
        ([], "an entry has a wrong form"),
        (b"{" * 40, ""),
        (b"[" * 100_000, ""),
        (b"\xff\xfe\x00\x01", ""),
    ],
)
def test_a_lying_header_is_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=rf"\[load\] the header of .* is damaged.*{message}"):
        read_header(write(tmp_path / "model.safetensors", header))


@pytest.mark.parametrize("size", [0, 3, 8, 30, 80])
def test_a_cut_file_is_refused(tmp_path, size):
    path = write(tmp_path / "model.safetensors", {"w": F32})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"\[load\] .*(cut off|ends past the end)"):
        read_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": F32}, length=1 << 62)
    with pytest.raises(ValueError, match="cut off or not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize("notes", [None, {}, {"format": "mlx"}, {"a": "b" * 100_000}])
def test_notes_are_not_read(tmp_path, notes):
    assert list(read_header(write(tmp_path / "a", {"__metadata__": notes, "w": F32}))) == ["w"]


def test_ranks_and_notes_have_bounds(tmp_path):
    shape = [1] * 6 + [2, 3]
    assert read_header(write(tmp_path / "a", {"w": {**F32, "shape": shape}}))["w"].elements == 6
    with pytest.raises(ValueError, match="`w` must have at most 8 dimensions"):
        read_header(write(tmp_path / "a", {"w": {**F32, "shape": [1, *shape]}}))
    notes = {str(i): "" for i in range(1001)}
    with pytest.raises(ValueError, match="`__metadata__` must be at most 1000 notes"):
        read_header(write(tmp_path / "a", {"__metadata__": notes, "w": F32}))


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_by_the_index(tmp_path):
    write(tmp_path / "one.safetensors", {"a": F32})
    write(tmp_path / "two.safetensors", {"b": F32})
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert [(path.name, list(header)) for path, header in read_headers(tmp_path)] == [
        ("one.safetensors", ["a"]),
        ("two.safetensors", ["b"]),
    ]


@pytest.mark.parametrize(
    "shard", ["../one.safetensors", "/etc/passwd", "sub/one", "", "..", "..\\x", 7]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "one.safetensors", {"a": F32})
    index(folder, {"a": shard})
    with pytest.raises(ValueError, match=r"\[load\] a shard must be a file in .* but got"):
        list(read_headers(folder))


def test_an_incomplete_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no index"):
        list(read_headers(tmp_path))
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(ValueError, match=r"misses the shard one\.safetensors; is it all"):
        list(read_headers(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match="must map tensor names to files"):
        list(read_headers(tmp_path))
