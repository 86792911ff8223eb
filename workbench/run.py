"""Run launches on the processor."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from . import native
from .entry import FIRST_THREADGROUP_SLOT
from .launch import DTYPES, BufferLike, LaunchLike
from .library import Kernel, load
from .report import KINDS, Fault, Finding, Report, Site, Traffic

Mode = Literal["fast", "check", "count"]
_ORDERS = {"forward": 0, "reverse": 1, "random": 2}
_MAX_THREADS = 1024
_ALIGNMENT = 16  # of the widest vectors that kernels load
_MAX_CHECKED_GROUPS = 1 << 21  # what the runtime's records of accesses can tell apart

# One launch at a time, so these are filled in anew for each.
_lock = threading.Lock()
_struct = native.LaunchStruct()
_slots = (ctypes.c_void_p * native.MAX_SLOTS)()
_struct.buffers = ctypes.addressof(_slots)


def run(
    launches: LaunchLike | Sequence[LaunchLike],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    *,
    mode: Mode = "fast",
    order: Literal["forward", "reverse", "random"] = "forward",
    seed: int = 1,
    contract: Literal["off", "fast"] = "off",
    include: Sequence[str | Path] = (),
    allow: Collection[str] = (),
    raising: bool = True,
    threadgroup_limit: int = 32768,
    step_limit: int = 50_000_000,
) -> tuple[dict[str, np.ndarray[Any, Any]], Report]:
    """Run one launch or several in order; what one writes, the next reads under the same name.

    Args:
        launches: What to run; see `Launch`.
        arrays: The contents of "in" and "inout" buffers by name: contiguous, of the buffer's shape
            and dtype, and unchanged afterwards. bfloat16 travels as uint16.
        mode: "fast" runs without checks; "check" also looks for faults; "count" looks for faults
            and counts traffic.
        order: In which order lanes, simdgroups and threadgroups go on. No order may change what a
            correct kernel computes.
        seed: Of the random order.
        contract: Whether the compiler may contract a * b + c: "off" or "fast". A kernel whose
            arithmetic is spelled out gives equal bits under both.
        include: Further folders for a kernel's includes.
        allow: Kinds of findings that are no faults in this run.
        raising: Whether findings raise.
        threadgroup_limit: Bytes of threadgroup memory; Apple's GPUs have 32 KiB.
        step_limit: Basic blocks that one threadgroup may go through before a loop counts as
            endless; not looked at in fast mode.

    Returns:
        The contents of all "out" and "inout" buffers by name, and the report.

    Raises:
        ValueError: The launch, the kernel and the arrays do not fit together.
        CompileError: The kernel is no valid Metal.
        Fault: There are findings.
        RuntimeError: No compiler is there.
    """
    if mode not in ("fast", "check", "count"):
        raise ValueError(f"[workbench] mode must be fast, check or count but got {mode}.")
    if order not in _ORDERS:
        raise ValueError(f"[workbench] order must be forward, reverse or random but got {order}.")
    if not isinstance(launches, Sequence):
        launches = [launches]
    with _lock:
        report = Report()
        outputs: dict[str, np.ndarray[Any, Any]] = {}
        _struct.step_limit = step_limit
        _struct.threadgroup_limit = threadgroup_limit
        _struct.order = _ORDERS[order]
        _struct.seed = seed
        _struct.checks = mode != "fast"
        _struct.counts = mode == "count"
        for launch in launches:
            kernel = load(
                launch.library,
                launch.kernel,
                launch.constants,
                checked=mode != "fast",
                contract=contract,
                include=include,
            )
            _prepare(kernel, launch)
            one = _Run(kernel, launch, arrays, outputs)
            findings = one.fast() if mode == "fast" else one.checked(count=mode == "count")
            report.launches += 1
            report.threadgroup_bytes = max(report.threadgroup_bytes, one.threadgroup_bytes)
            report.sites += one.sites
            for name, traffic in one.traffic.items():
                report.traffic.setdefault(name, Traffic()).add(traffic)
            report.findings += [f for f in findings if f.kind not in allow]
            if report.findings and raising:
                raise Fault(launch.kernel, report)
        return outputs, report


def _prepare(kernel: Kernel, launch: LaunchLike) -> None:
    """Fill in what only the launch knows, and refuse what no GPU would start."""
    grid, group = tuple(launch.grid), tuple(launch.threadgroup)
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"[workbench] grid must be three positive numbers but got {grid}.")
    if len(group) != 3 or min(group) < 1 or math.prod(group) > _MAX_THREADS:
        raise ValueError(f"[workbench] threadgroup must have 1..1024 threads but got {group}.")
    if 0 < kernel.threads < math.prod(group):
        raise ValueError(
            f"[workbench] threadgroup must have at most {kernel.threads} threads, by "
            f"{kernel.name}'s max_total_threads_per_threadgroup, but got {math.prod(group)}."
        )
    _struct.grid[:] = grid
    _struct.group[:] = group
    _struct.entry = kernel.entry


def _aligned_copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy that starts where a kernel may load any vector, as a GPU's buffers do."""
    room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -room.__array_interface__["data"][0] % _ALIGNMENT
    copy: np.ndarray[Any, Any] = (
        room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    )
    copy[...] = array
    return copy


class _Run:
    """One launch with its arrays."""

    def __init__(
        self,
        kernel: Kernel,
        launch: LaunchLike,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        outputs: dict[str, np.ndarray[Any, Any]],
    ) -> None:
        self.kernel = kernel
        self.launch = launch
        self.arrays = arrays
        self.outputs = outputs
        self.library = native.load()
        self.threadgroup_bytes = 0
        self.traffic: dict[str, Traffic] = {}
        self.sites: list[Site] = []

    def fast(self) -> list[Finding]:
        """Run on the arrays themselves."""
        held = []  # keeps what the kernel points to alive
        buffers = self.launch.buffers
        self.match_buffers(len(buffers))
        for slot, buffer in enumerate(buffers):
            array = self.content(buffer)
            if array.__array_interface__["data"][0] % _ALIGNMENT:
                array = _aligned_copy(array)
            held.append(array)
            _slots[slot] = array.__array_interface__["data"][0]
            if buffer.role in ("out", "inout"):
                self.outputs[buffer.name] = array
        return self.start()

    def checked(self, *, count: bool) -> list[Finding]:
        """Run on copies that lie where every access can be looked at."""
        if math.prod(self.launch.grid) >= _MAX_CHECKED_GROUPS:
            raise ValueError(
                f"[workbench] grid must have fewer than {_MAX_CHECKED_GROUPS} threadgroups to be "
                f"checked but got {tuple(self.launch.grid)}."
            )
        _struct.code_begin, _struct.code_end = self.kernel.lines.base, self.kernel.lines.end
        buffers = self.launch.buffers
        self.match_buffers(len(buffers))
        arrays = [self.content(buffer) for buffer in buffers]
        try:
            for slot, (buffer, array) in enumerate(zip(buffers, arrays, strict=True)):
                read_only = buffer.role in ("in", "bytes")
                place = self.library.workbench_new_buffer(
                    slot,
                    array.nbytes,
                    buffer.name.encode(),
                    read_only,
                    buffer.role != "out",
                    not read_only,
                    count,
                )
                if place is None:
                    raise MemoryError(f"[workbench] {buffer.name} has {array.nbytes} bytes.")
                _slots[slot] = place
                if buffer.role != "out" and array.nbytes:
                    ctypes.memmove(place, array.ctypes.data, array.nbytes)
            findings = self.start()
            for slot, (buffer, array) in enumerate(zip(buffers, arrays, strict=True)):
                if buffer.role in ("out", "inout"):
                    ctypes.memmove(array.ctypes.data, _slots[slot] or 0, array.nbytes)
                    self.outputs[buffer.name] = array
                if count:
                    self.count(slot, buffer, array.nbytes)
            if count:
                self.count_sites()
            return findings
        finally:
            for slot in range(len(buffers)):
                self.library.workbench_free_buffer(slot)

    def match_buffers(self, given: int) -> None:
        """Every buffer of the kernel is there, and no other; what may be missing is null."""
        kernel = self.kernel
        needed = [slot for slot in kernel.buffers if slot not in kernel.optional]
        if any(slot >= given for slot in needed) or given > max(kernel.buffers, default=-1) + 1:
            raise ValueError(
                f"[workbench] {kernel.name} must be given buffers {sorted(kernel.buffers)} but "
                f"the launch has {given}."
            )
        for slot in kernel.optional:
            _slots[slot] = None

    def content(self, buffer: BufferLike) -> np.ndarray[Any, Any]:
        """The array behind a buffer: given, computed by an earlier launch, or fresh."""
        if buffer.role == "bytes":
            return np.frombuffer(buffer.data, np.uint8)
        dtype, shape = DTYPES[buffer.dtype], tuple(buffer.shape)
        if buffer.role == "out":
            return np.empty(shape, dtype)
        name = buffer.name
        array = self.outputs[name] if name in self.outputs else self.arrays.get(name)
        if array is None:
            raise ValueError(f"[workbench] arrays must have `{name}`.")
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"[workbench] `{name}` must be {buffer.dtype} {shape} (in numpy {dtype}) "
                f"but got {array.dtype} {array.shape}."
            )
        if not array.flags.c_contiguous:
            raise ValueError(f"[workbench] `{name}` must be contiguous.")
        return array.copy() if buffer.role == "inout" else array

    def start(self) -> list[Finding]:
        library = self.library
        library.workbench_begin(_struct)
        missing = set(self.kernel.threadgroup) - {i for i, _ in self.launch.threadgroup_memory}
        if missing:
            raise ValueError(
                f"[workbench] threadgroup_memory must have sizes for {sorted(missing)}."
            )
        for index, size in self.launch.threadgroup_memory:
            if index not in self.kernel.threadgroup:
                raise ValueError(
                    f"[workbench] threadgroup_memory must be for one of "
                    f"{sorted(self.kernel.threadgroup)} but got {index}."
                )
            name = self.kernel.threadgroup[index]
            place = library.workbench_threadgroup_buffer(size, name.encode())
            _slots[FIRST_THREADGROUP_SLOT + index] = place
        found = library.workbench_run()
        self.threadgroup_bytes = library.workbench_threadgroup_bytes()
        if not found:
            return []
        raw = library.workbench_findings()
        return [self.finding(raw[i]) for i in range(found)]

    def finding(self, raw: native.FindingStruct) -> Finding:
        where = self.kernel.lines.where
        other = ""
        if raw.other_site:
            place = f"threadgroup {self.position(raw.other_group)}, thread {raw.other_thread}"
            other = f"{where(raw.other_site)}, {place}"
        return Finding(
            kind=KINDS[raw.kind - 1],
            message=raw.text.decode(),
            where=where(raw.site),
            threadgroup=self.position(raw.group),
            thread=raw.thread,
            buffer=self.region_name(raw.region),
            offset=raw.offset,
            other=other,
            times=raw.times,
        )

    def position(self, group: int) -> tuple[int, int, int]:
        width, height, _ = self.launch.grid
        return group % width, group // width % height, group // width // height

    def region_name(self, region: int) -> str:
        name: bytes = self.library.workbench_region_name(region)
        return name.decode()

    def count(self, slot: int, buffer: BufferLike, size: int) -> None:
        totals = self.library.workbench_totals(slot).contents
        traffic = Traffic(**{name: getattr(totals, name) for name in native.TOTALS}, size=size)
        self.traffic.setdefault(buffer.name, Traffic()).add(traffic)

    def count_sites(self) -> None:
        number = ctypes.c_uint32()
        raw = self.library.workbench_sites(ctypes.byref(number))
        for i in range(number.value):
            site = raw[i]
            self.sites.append(
                Site(
                    where=self.kernel.lines.where(site.site),
                    buffer=self.region_name(site.region),
                    write=bool(site.write),
                    accesses=site.accesses,
                    sectors=site.sectors,
                    lines=site.lines,
                    bytes=site.bytes,
                    lanes=site.lanes,
                )
            )
