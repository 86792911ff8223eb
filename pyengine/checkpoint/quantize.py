"""A float checkpoint to an MLX affine one, target or drafter, a slice of rows at a time.

The result has the names and config.json that mlx-lm writes: every matrix whose inputs are a
multiple of the group size is quantised, embedding tables and routers included; norms and scalars
are not. Groups lie within rows, so slices give the bits of the whole. Everything has one dtype, as
loading wants it: that of the token embedding, whatever the rest of the source has.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from pyengine.checkpoint.config_json import (
    ASSISTANT_TYPES,
    TARGET_TYPES,
    names_dflash,
    read_assistant_config,
    read_dflash_config,
    read_json,
    read_target_config,
)
from pyengine.checkpoint.new_folder import new_folder
from pyengine.checkpoint.safetensors import BYTES, SINGLE, Entry, Shape, read_headers
from pyengine.checkpoint.weights import (
    Layout,
    Tensors,
    assistant_layout,
    canonical,
    check_finite,
    check_ordering,
    dflash_layout,
    is_text,
    target_layout,
)
from pyengine.untrusted import optional

# Carried along as they are: tokenizer, chat template, generation settings, licence and card.
COPIED = {".json", ".jinja", ".model", ".txt", ".md"}
NOT_COPIED = {"config.json", "model.safetensors.index.json"}
SLICE_BYTES = 32 << 20  # of source rows in memory at once
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
RAW = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Part:
    """One tensor to write: where its bytes begin in the file, and its header entry."""

    name: str
    dtype: str
    shape: Shape
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Run:
    """Rows of a matrix that lie together in one source file."""

    path: Path
    dtype: str
    begin: int
    rows: int


@dataclass(frozen=True)
class Job:
    """A matrix to quantise (three parts) or a tensor to keep (one part).

    ``dtype`` is what its numbers are converted to; None keeps them, which are integers.
    """

    name: str
    runs: list[Run]
    dtype: str | None
    columns: int
    parts: list[Part]
    group_size: int = 0
    bits: int = 0


@dataclass(frozen=True)
class Plan:
    """All of a conversion, before a byte is read."""

    copied: list[Path]
    config: dict[str, Any]
    jobs: list[Job]
    dtype: str

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for job in self.jobs for part in job.parts)


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    bits: int = 8,
    group_size: int = 64,
    on_progress: OnProgress = lambda done, total, name: None,
) -> None:
    """Write a quantised copy of a Gemma 4 target or drafter. Evaluates.

    Memory stays within some slices of rows, whatever the size of a tensor. The folder appears
    under its name when it is whole.

    Args:
        src: Checkpoint folder with float32, float16 or bfloat16 tensors, any published form.
        dst: Folder to make; must not exist.
        bits: 4, 6 or 8.
        group_size: 32, 64 or 128 inputs share a scale and a bias.
        on_progress: Called with bytes written, bytes in all, and what comes next.

    Raises:
        ValueError: An argument breaks a rule above, or the checkpoint is damaged.
    """
    plan = plan_checkpoint(Path(src), bits, group_size)
    with new_folder(Path(dst), plan.nbytes) as partial:
        write_checkpoint(plan, partial, on_progress)


def plan_checkpoint(src: Path, bits: int, group_size: int, dtype: str | None = None) -> Plan:
    """Check a checkpoint and the arguments of :func:`quantize_checkpoint`; reads headers only.

    ``dtype`` is what all floats become, in the words of a header; None is the token embedding's.
    """
    if bits not in (4, 6, 8):
        raise ValueError(f"[convert] bits must be 4, 6 or 8 but got {bits}.")
    if group_size not in (32, 64, 128):
        raise ValueError(f"[convert] group_size must be 32, 64 or 128 but got {group_size}.")
    if not src.is_dir():
        raise ValueError(f"[convert] src must be a folder but got {src}.")
    layout, prefix = _layout(src)
    files = _files(src, layout)
    dtype = dtype or files[f"{layout.first}.weight"][1].dtype
    jobs, overrides = _jobs(files, layout, prefix, bits, group_size, dtype)
    block = {"group_size": group_size, "bits": bits, "mode": "affine", **overrides}
    config = read_json(src) | {"quantization": block, "quantization_config": block}
    return Plan(_copied(src), config, jobs, dtype)


def _copied(src: Path) -> list[Path]:
    """The files to carry along; a link to nothing is an error, not an absent file."""
    found = [
        optional(src, name, "convert")
        for name in sorted(os.listdir(src))
        if Path(name).suffix in COPIED and name not in NOT_COPIED
    ]
    return [path for path in found if path is not None]


def write_checkpoint(plan: Plan, folder: Path, on_progress: OnProgress) -> None:
    """Carry a plan out in a folder that exists. Evaluates."""
    for file in plan.copied:
        shutil.copyfile(file, folder / file.name)
    text = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    _write_safetensors(plan, folder / SINGLE, on_progress)


def _layout(src: Path) -> tuple[Layout, str]:
    """Layout of a checkpoint, and the prefix of its text model's names in MLX form."""
    config = read_json(src)
    if names_dflash(config):
        dflash = read_dflash_config(src)
        layout, prefix, quantization = dflash_layout(dflash), "", dflash.quantization
    elif config.get("model_type") in list(ASSISTANT_TYPES):
        assistant = read_assistant_config(src)
        layout, prefix = assistant_layout(assistant), "model."
        quantization = assistant.quantization
    else:
        target = read_target_config(src)
        wrapped = target.model_type in TARGET_TYPES
        layout, prefix = target_layout(target), "language_model.model." if wrapped else "model."
        quantization = target.quantization
    if quantization is not None:
        raise ValueError(f"[convert] src must not be quantised already but {src} is.")
    return layout, prefix


def _files(src: Path, layout: Layout) -> dict[str, tuple[Path, Entry]]:
    """Where each text tensor of a checkpoint lies, by canonical name, after all are checked."""
    _check_tensors(src, layout)
    return {
        canonical(raw): (path, entry)
        for path, header in read_headers(src)
        for raw, entry in header.items()
        if is_text(raw, layout)
    }


def _jobs(
    files: dict[str, tuple[Path, Entry]],
    layout: Layout,
    prefix: str,
    bits: int,
    group_size: int,
    dtype: str,
) -> tuple[list[Job], dict[str, dict[str, int]]]:
    """What to write, in the file's order, and the routers' entries in the quantisation block.

    mlx-lm names routers there and keeps them at 8 bits in groups of 64, whatever the rest has.
    """
    jobs: list[Job] = []
    overrides: dict[str, dict[str, int]] = {}
    end = 0

    def add(name: str, runs: list[Run], shape: Shape, parts: list[tuple[str, str, Shape]]) -> None:
        nonlocal end
        made = []
        for suffix, stored, part_shape in parts:
            made.append(Part(f"{name}{suffix}", stored, part_shape, end))
            end += made[-1].nbytes
        mode = (group, width) if len(parts) > 1 else (0, 0)
        to = dtype if runs[0].dtype in DTYPES else None
        jobs.append(Job(name, runs, to, shape[-1] if shape else 1, made, *mode))

    for path, shape in layout.matrices.items():
        name = _mlx_name(path, prefix)
        runs = _runs(files, f"{path}.weight", shape)
        group, width = group_size, bits
        if path.endswith("router.proj"):
            group, width = 64, 8
        *rows, columns = shape
        if columns % group:
            add(name, runs, shape, [(".weight", dtype, shape)])
            continue
        if path.endswith("router.proj"):
            overrides[name] = {"group_size": group, "bits": width}
        groups = (*rows, columns // group)
        packed = (*rows, columns * width // 32)
        add(
            name,
            runs,
            shape,
            [(".weight", "U32", packed), (".scales", dtype, groups), (".biases", dtype, groups)],
        )
    for name, shape in layout.vectors.items():
        source, entry = files[name]
        run = Run(source, entry.dtype, entry.begin, 1)
        stored = dtype if entry.dtype in DTYPES else entry.dtype
        add(_mlx_name(name, prefix), [run], shape, [("", stored, shape)])
    return jobs, overrides


def _check_tensors(src: Path, layout: Layout) -> None:
    """Every tensor there, of the right shape and dtype, and no other."""
    tensors = Tensors(src, layout)
    for path, shape in layout.matrices.items():
        tensors.take(f"{path}.weight", shape)
    vectors = {
        name: tensors.take(name, shape, integer=name in layout.integers)
        for name, shape in layout.vectors.items()
    }
    tensors.check_all_used()
    for name in layout.integers:
        check_ordering(name, vectors[name])


def _runs(files: dict[str, tuple[Path, Entry]], name: str, shape: Shape) -> list[Run]:
    """Where the rows of a matrix lie; experts may be halves of one tensor, or a tensor each."""
    if name in files:
        path, entry = files[name]
        return [Run(path, entry.dtype, entry.begin, math.prod(shape[:-1]))]
    joint = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
    runs = []
    for x in range(shape[0]):
        if joint in files:
            path, entry = files[joint]
            matrix = shape[1] * shape[2] * BYTES[entry.dtype]
            half = 1 if ".up_proj." in name else 0
            begin = entry.begin + (2 * x + half) * matrix
        else:
            path, entry = files[name.replace(".experts.", f".experts.{x}.")]
            begin = entry.begin
        runs.append(Run(path, entry.dtype, begin, shape[1]))
    return runs


def _write_safetensors(plan: Plan, path: Path, on_progress: OnProgress) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    for part in (part for job in plan.jobs for part in job.parts):
        span = [part.begin, part.begin + part.nbytes]
        header[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": span,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    done, total = 0, plan.nbytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        # The disk is asked for all of it now: better now than after an hour
        if hasattr(os, "posix_fallocate") and total:
            os.posix_fallocate(file.fileno(), start, total)
        for job in plan.jobs:
            on_progress(done, total, job.name)
            offsets = [start + part.begin for part in job.parts]
            for block in _blocks(job):
                for i, data in enumerate(_converted(job, block)):
                    file.seek(offsets[i])
                    offsets[i] += file.write(data)
            done += sum(part.nbytes for part in job.parts)
    on_progress(total, total, "done")


def _blocks(job: Job) -> Iterator[tuple[np.ndarray[Any, Any], str]]:
    """The rows of a job as they lie in the files, some at a time: raw bytes and their dtype."""
    for run in job.runs:
        row = job.columns * BYTES[run.dtype]
        step = max(1, SLICE_BYTES // row)
        with run.path.open("rb") as file:
            for at in range(0, run.rows, step):
                rows = min(step, run.rows - at)
                file.seek(run.begin + at * row)
                data = np.fromfile(file, np.uint8, rows * row)
                if data.size < rows * row:
                    raise ValueError(f"[convert] {run.path} is cut off.")
                yield data, run.dtype


def _converted(job: Job, block: tuple[np.ndarray[Any, Any], str]) -> list[memoryview]:
    """A block's bytes for each part of its job."""
    data, dtype = block
    if job.dtype is None:
        return [data.data]
    rows = mx.array(data.view(RAW[dtype]).reshape(-1, job.columns)).view(DTYPES[dtype])
    check_finite(job.name, rows)
    if not job.bits and dtype == job.dtype:
        return [data.data]
    rows = rows.astype(DTYPES[job.dtype])
    parts = list(mx.quantize(rows, job.group_size, job.bits)) if job.bits else [rows]
    mx.eval(*parts)
    # A value may be too large for the dtype, and so may be the range of a group
    if not all(mx.isfinite(part).all() for part in (rows, *parts[1:])):
        raise ValueError(
            f"[convert] `{job.name}` must fit {NAMES[job.dtype]}, the dtype of the token "
            "embedding, but overflows it."
        )
    return [np.asarray(mx.contiguous(p).reshape(-1).view(mx.uint8)).data for p in parts]


def _mlx_name(name: str, prefix: str) -> str:
    """The name mlx-lm and mlx-vlm give a tensor or module."""
    if name.startswith(("pre_projection", "post_projection", "masked_embedding.")):
        return name
    return prefix + name.replace(".experts.", ".experts.switch_glu.")
