"""The safetensors files of a checkpoint folder: which they are, and what their headers promise.

Headers are checked against the files before anything is read by them: a file that is cut off or
lies about itself is one clear sentence, not a crash inside a reader.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyengine.files import read_object, shown, within

Shape = tuple[int, ...]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 1 << 27
MAX_DIMENSION = (1 << 31) - 1  # MLX counts in int32

BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "F64": 8},
}


class Entry(NamedTuple):
    """What a header says of a tensor; begin and end are offsets in the file."""

    dtype: str
    shape: Shape
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_headers(folder: Path) -> Iterator[tuple[Path, dict[str, Entry]]]:
    """Each safetensors file of a checkpoint folder with its checked header."""
    index_path = within(folder, INDEX, "load")
    if not index_path.is_file():
        path = within(folder, SINGLE, "load")
        if not path.is_file():
            raise ValueError(f"[load] {folder} has no {SINGLE} and no index of shards.")
        yield path, read_header(path)
        return
    weight_map = read_object(index_path, "load").get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"[load] {index_path} must map tensor names to files.")
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise ValueError(f"[load] a shard must be a file in {folder} but got {shown(shard)}.")
        by_shard.setdefault(shard, []).append(name)
    for shard in sorted(by_shard):
        path = within(folder, shard, "load")
        if not path.is_file():
            raise ValueError(f"[load] {folder} misses the shard {shard}; is it all downloaded?")
        header = read_header(path)
        absent = [name for name in by_shard[shard] if name not in header]
        if absent:
            raise ValueError(f"[load] {path} misses `{absent[0]}`, which the index puts there.")
        yield path, header


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", "..") and not set(name) & {"\\", "\0"}


def read_header(path: Path) -> dict[str, Entry]:
    """A safetensors header by tensor name, after checking that the file can hold it all.

    Raises:
        ValueError: The header is cut off, is not JSON, or promises bytes that are not there.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(f"[load] {path} is cut off or not a safetensors file.")
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"[load] {path} cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
        promised = {name: entry for name, entry in header.items() if name != "__metadata__"}
        entries = {}
        for name, entry in promised.items():
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, begin, end]
            sound = all(type(n) is int and n >= 0 for n in numbers) and begin <= end
            if not sound or any(n > MAX_DIMENSION for n in shape):
                raise ValueError(f"`{name}` has no sound shape and offsets")
            if not isinstance(entry["dtype"], str) or entry["dtype"] not in BYTES:
                raise ValueError(f"`{name}` has the unknown dtype {shown(entry['dtype'])}")
            if math.prod(shape) * BYTES[entry["dtype"]] != end - begin:
                raise ValueError(f"`{name}` has {end - begin} bytes, which do not fit its shape")
            if end > size - 8 - length:
                raise ValueError(f"`{name}` ends past the end of the file")
            start = 8 + length
            entries[name] = Entry(entry["dtype"], shape, start + begin, start + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = error if isinstance(error, ValueError) else "an entry has a wrong form"
        raise ValueError(f"[load] the header of {path} is damaged: {why}.") from None
    spans = sorted((entry.begin, entry.end, name) for name, entry in entries.items())
    for (_, end, _), (begin, _, name) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"[load] the header of {path} is damaged: `{name}` overlaps another.")
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ: of two equal ones another reader might take the other."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name comes twice")
    return values
