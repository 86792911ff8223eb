"""The safetensors files of a checkpoint folder: which they are, and what their headers promise.

Headers are checked against the files before anything is read by them: a file that is cut off or
lies about itself is one clear sentence, not a crash inside a reader.
"""

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyengine.untrusted import optional, parse, read_object, shown, within

Shape = tuple[int, ...]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# A header of 35,000 tensors, a mixture's experts one by one and quantised, has about 5 MB
MAX_HEADER = 8 << 20
MAX_RANK = 8
SAMPLE = 1 << 12  # bytes of a tensor
MAX_METADATA = 1000
MAX_DIMENSION = (1 << 31) - 1  # MLX counts in int32
_NUMBERED = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")

BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "F64": 8, "C64": 8},
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
    """Each safetensors file of a checkpoint folder with its checked header.

    The files are those that the index names. It may have outlived them, as where a model was saved
    again beside it: then, as where there is none, the single file counts, or else the one set of
    numbered shards of which all are there. Tensors are looked up in the headers, not in the index.

    Raises:
        ValueError: No such files are there, or one is damaged.
    """
    index = optional(folder, INDEX, "load")
    listed = {} if index is None else _listed(index)
    shards = sorted(set(listed.values()))
    absent = next((shard for shard in shards if optional(folder, shard, "load") is None), None)
    if absent or not listed:
        shards = _unlisted(folder)
    if not shards and absent:
        raise ValueError(
            f"[load] {folder} misses the shard {absent}; is it all downloaded, or is {INDEX} stale?"
        )
    if not shards:
        raise ValueError(
            f"[load] {folder} has no {SINGLE} and no index of shards, nor all shards of one set; "
            "is it all downloaded?"
        )
    for shard in shards:
        path = within(folder, shard, "load")
        yield path, read_header(path)


def sampled(folder: Path) -> str:
    """A hash of a checkpoint's configuration, headers, and first 4 kB of each tensor.

    Raises:
        ValueError: A file is damaged.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path, headers in read_headers(folder):
        with path.open("rb") as file:
            for name, entry in sorted(headers.items()):
                digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
                file.seek(entry.begin)
                digest.update(file.read(min(SAMPLE, entry.end - entry.begin)))
    return digest.hexdigest()


def stale_index(folder: Path) -> str:
    """For a message on a tensor that is missing: where the index is wrong; empty if nowhere."""
    index = optional(folder, INDEX, "load")
    if index is None:
        return ""
    headers = {path.name: header for path, header in read_headers(folder)}
    for name, shard in _listed(index).items():
        if name not in headers.get(shard, {}):
            return f"{INDEX} is stale: it puts `{name}` into {shard}, where it is not."
    return ""


def _listed(index: Path) -> dict[str, str]:
    """What an index says: the shard of every tensor."""
    weight_map = read_object(index, "load").get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"[load] {index} must map tensor names to files.")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise ValueError(
                f"[load] a shard must be a file in {index.parent} but got {shown(shard)}."
            )
    return weight_map


def _unlisted(folder: Path) -> list[str]:
    """The single file, else the only complete set of numbered shards, else none."""
    if optional(folder, SINGLE, "load") is not None:
        return [SINGLE]
    sets: dict[tuple[str, int], set[int]] = {}
    for name in os.listdir(folder):
        if found := _NUMBERED.fullmatch(name):
            sets.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    whole = [key for key, numbers in sets.items() if numbers == set(range(1, key[1] + 1))]
    if len(whole) > 1:
        names = " and ".join(f"{stem}-*-of-{count:05}" for stem, count in sorted(whole)[:2])
        raise ValueError(f"[load] {folder} must hold one set of shards but holds {names}.")
    return [
        f"{stem}-{i:05}-of-{count:05}.safetensors"
        for stem, count in whole
        for i in range(1, count + 1)
    ]


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def read_header(path: Path) -> dict[str, Entry]:
    """A safetensors header by tensor name, after checking that the file can hold it all.

    Raises:
        ValueError: The header is cut off, is not JSON, or promises bytes that are not there.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= size - 8:
                raise ValueError(f"[load] {path} is cut off or not a safetensors file.")
            if length > MAX_HEADER:
                raise ValueError(
                    f"[load] the header of {path} must be at most {MAX_HEADER >> 20} MB but is "
                    f"{length >> 20} MB."
                )
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"[load] {path} cannot be read: {error.strerror}.") from error
    try:
        header = parse(raw.decode("utf-8"), "it")
        metadata = header.get("__metadata__")  # not read here; MLX writes null where it has none
        if isinstance(metadata, (dict, list)) and len(metadata) > MAX_METADATA:
            raise ValueError(f"`__metadata__` must be at most {MAX_METADATA} notes")
        promised = {name: entry for name, entry in header.items() if name != "__metadata__"}
        entries = {}
        for name, entry in promised.items():
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            if len(shape) > MAX_RANK:
                raise ValueError(f"`{name}` must have at most {MAX_RANK} dimensions")
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
        known = isinstance(error, ValueError)
        why = str(error).rstrip(".") if known else "an entry has a wrong form"
        raise ValueError(f"[load] the header of {path} is damaged: {why}.") from None
    spans = sorted((entry.begin, entry.end, name) for name, entry in entries.items())
    for (_, end, _), (begin, _, name) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"[load] the header of {path} is damaged: `{name}` overlaps another.")
    return entries
