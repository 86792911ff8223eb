"""What a run has to say: findings, and in count mode the traffic."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

SECTOR_BYTES = 32
LINE_BYTES = 64

# In the order of workbench::Kind.
KINDS = (
    "out-of-bounds",
    "race",
    "same-value-race",
    "uninitialised-read",
    "unwritten-output",
    "barrier-divergence",
    "simd-divergence",
    "inactive-lane",
    "misaligned",
    "read-only-write",
    "threadgroup-memory",
    "unbound-buffer",
    "endless-loop",
)


@dataclass(frozen=True)
class Finding:
    """One fault of a kernel, at one place in its code.

    Attributes:
        kind: One of `KINDS`.
        message: What happened, in words.
        where: file:line, or "" where no single line is at fault.
        threadgroup: Its position in the grid.
        thread: Its index in the threadgroup.
        buffer: Name of the buffer or threadgroup variable, or "".
        offset: Into that buffer, in bytes.
        other: file:line, threadgroup and thread of the other side of a race or a divergence.
        times: How often it happened at this place.
    """

    kind: str
    message: str
    where: str
    threadgroup: tuple[int, int, int]
    thread: int
    buffer: str = ""
    offset: int = 0
    other: str = ""
    times: int = 1

    def __str__(self) -> str:
        place = f" at `{self.buffer}` + {self.offset}" if self.buffer else ""
        text = f"{self.where or 'kernel'}: {self.kind}: {self.message}{place}"
        text += f"\n    threadgroup {self.threadgroup}, thread {self.thread}"
        text += f", {self.times} times" if self.times > 1 else ""
        return text + (f"\n    other side: {self.other}" if self.other else "")


@dataclass
class Traffic:
    """What the launches of a run did to one buffer.

    A simd access is one load or store by all lanes of a simdgroup. A sector has 32 bytes, a line
    64: lanes of one simd access that touch the same sector cost it once.

    Attributes:
        reads, writes, atomics: Accesses by single lanes.
        read_bytes, written_bytes: Asked for by single lanes.
        simd_reads, simd_writes: Simd accesses.
        read_sectors, written_sectors: Distinct within each simd access, summed.
        read_lines, written_lines: The same in lines.
        group_read_sectors, group_written_sectors: Distinct within each threadgroup, summed.
        distinct_read_sectors, distinct_written_sectors: Distinct in each launch, summed.
        size: Bytes of the buffer.
    """

    reads: int = 0
    writes: int = 0
    atomics: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    simd_reads: int = 0
    simd_writes: int = 0
    read_sectors: int = 0
    written_sectors: int = 0
    read_lines: int = 0
    written_lines: int = 0
    group_read_sectors: int = 0
    group_written_sectors: int = 0
    distinct_read_sectors: int = 0
    distinct_written_sectors: int = 0
    size: int = 0

    @property
    def device_read_bytes(self) -> int:
        """Bytes that loads bring in, when lanes of one simd access share and nothing else does."""
        return self.read_sectors * SECTOR_BYTES

    @property
    def device_written_bytes(self) -> int:
        """The same of stores."""
        return self.written_sectors * SECTOR_BYTES

    def add(self, other: Traffic) -> None:
        """Add the counts of another launch; the size is the larger one."""
        size = max(self.size, other.size)
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        self.size = size


@dataclass(frozen=True)
class Site:
    """What one place in the code did to one buffer, in one launch.

    Attributes:
        where: file:line.
        buffer: Its name.
        write: Whether it stores.
        accesses: Simd accesses.
        sectors, lines: Distinct within each, summed.
        bytes: Asked for by single lanes.
        lanes: Accesses by single lanes.
    """

    where: str
    buffer: str
    write: bool
    accesses: int
    sectors: int
    lines: int
    bytes: int
    lanes: int

    @property
    def lines_per_access(self) -> float:
        """Cache lines that one simd access touches; its minimum is bytes / accesses / 64."""
        return self.lines / self.accesses


@dataclass
class Report:
    """What a run has to say.

    Attributes:
        launches: How many ran.
        findings: Faults; empty in a run without checks, and for a correct kernel.
        threadgroup_bytes: Threadgroup memory of the launch that used most.
        traffic: By buffer name, in count mode.
        sites: Every place that touched a buffer, in count mode.
    """

    launches: int = 0
    findings: list[Finding] = field(default_factory=list)
    threadgroup_bytes: int = 0
    traffic: dict[str, Traffic] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    def kinds(self) -> set[str]:
        """The kinds of the findings."""
        return {finding.kind for finding in self.findings}


class Fault(RuntimeError):
    """A kernel did what a GPU does not forgive; `report` has the findings."""

    def __init__(self, kernel: str, report: Report) -> None:
        self.report = report
        listed = "\n".join(map(str, report.findings))
        super().__init__(f"[workbench] kernel {kernel} has faults:\n{listed}")
