"""Judge one case on a device: compile, compare, rows, hazards, time. Runs in the worker."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from pyengine import _ext, ops
from pyengine.doctor.device import Device, Refused, using
from pyengine.doctor.shapes import PROBE, Case
from pyengine.ops.example import MOST, Call, Results, copied, frequencies, normal, rounded
from pyengine.ops.prepare_qkv import PAGE

POISON = 0xAAAA  # twice a byte of what results begin as
LOG = 4000  # characters of a compiler's log that are kept
TIMED_ROWS = (1, 6)
TIMED_S = 0.2  # for one comparison; two turns at least, of which the first warms up
Tell = Callable[[str], None]  # the step that begins


class Wrong(Exception):
    """A check failed: the verdict, and what goes with it."""

    def __init__(self, verdict: str, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.verdict, self.more = verdict, more


def examine(case: Case, device: Device, tell: Tell, *, timed: bool) -> dict[str, Any]:
    """One case.

    Returns:
        ``verdict``: "ok"; "refused" (a kernel does not compile or would not be started), "error",
        "dropped" (results were never written), "wrong", "unstable" (a row depends on how many
        there are). ``max_error``: the largest difference from what is expected, and ``of_bound``,
        that as a part of what is allowed. ``detail`` where something failed, ``first`` with the
        index of the first number that differs, and ``log``. Seconds, and what compiling said.
    """
    began = time.perf_counter()
    row: dict[str, Any] = {"op": case.op, "case": case.name, "where": case.where}
    row |= {"scaled": case.scaled, "verdict": "ok", "max_error": 0.0, "of_bound": 0.0}
    try:
        tell("inputs")
        call = case.call
        tell("compile")
        row["compile"] = _compile(call, device)
        tell("run")
        results = {T: device.run(partial(call.run, 0, T)) for T in call.rows}
        tell("compare")
        _compare(call, device, results[MOST], row)
        tell("rows")
        _rows(call, device, results)
        if timed and device.clock is not None:
            tell("time")
            row["times"] = [_time(call, device, T) for T in TIMED_ROWS if T in call.rows]
    except Wrong as fault:
        row |= {"verdict": fault.verdict, "detail": str(fault), **fault.more}
    except Refused as fault:
        row |= {"verdict": "refused", **refusal(fault)}
    except Exception as error:  # whatever it is, it is this op's
        text = str(error) or type(error).__name__
        row |= {"verdict": "error", "detail": text.splitlines()[0], "log": text[:LOG]}
    row["seconds"] = round(time.perf_counter() - began, 3)
    return row


def _compile(call: Call, device: Device) -> dict[str, Any] | None:
    """All numbers of rows: each is a pipeline of its own."""
    made = [device.compile(partial(call.run, 0, T)) for T in call.rows]
    found = [one for one in made if one is not None]
    if not found:
        return None
    threads = [one.threads for one in found if one.threads is not None]
    return {
        "seconds": round(sum(one.seconds for one in found), 3),
        "threads": min(threads, default=None),
        "threadgroup_bytes": max(one.threadgroup_bytes for one in found),
        "plain_mlx_rows": [T for T, one in zip(call.rows, made, strict=True) if one is None],
    }


def refusal(fault: Refused) -> dict[str, Any]:
    """The compiler's log with the lines of the flattened source that it names."""
    log = str(fault)
    try:
        source = _ext.metal_source(fault.library, fault.kernel).splitlines()
    except ValueError:
        source = []
    errors = [line for line in log.splitlines() if "error" in line] or log.splitlines()
    lines = {}
    for line in log.splitlines():
        if not line.startswith(("program_source:", "<program source>:")):
            continue
        number = line.split(":")[1]
        if number.isdigit() and 0 < int(number) <= len(source):
            lines[number] = source[int(number) - 1]
    head = errors[0] if errors else "no log"
    return {"detail": f"{fault.kernel}: {head}", "log": log[:LOG], "source_lines": lines}


def _compare(call: Call, device: Device, got: Results, row: dict[str, Any]) -> None:
    want = device.right(partial(call.run, 0, MOST))
    fused = _ext.instruction_set() != "portable"  # which has no fused multiply-add
    exact = call.exact_definition or (device.bits and call.same_bits and fused)
    slack = None if exact or call.slack is None else call.slack(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            kinds = f"{a.shape} {a.dtype} in place of {b.shape} {b.dtype}"
            raise Wrong("wrong", f"result {i} is {kinds}")
        allowed = None if slack is None else as_numpy(slack[i])
        fresh = as_bits(a) == (POISON if a.dtype.size == 2 else POISON << 16 | POISON)
        judge(as_numpy(a), as_numpy(b), allowed, row, f"result {i}", fresh)


def judge(
    got: np.ndarray,
    want: np.ndarray,
    allowed: np.ndarray | None,
    row: dict[str, Any],
    what: str,
    poisoned: np.ndarray | None,
) -> None:
    """Note the largest error.

    Raises:
        Wrong: It is more than is allowed, which is nothing if `allowed` is None.
    """
    same = (
        (got == want) | (np.isnan(got) & np.isnan(want)) if got.dtype.kind == "f" else got == want
    )
    if got.size == 0 or (allowed is None and same.all()):
        return
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(np.float64) - want.astype(np.float64))
    error[same] = 0
    error[np.isnan(error)] = np.inf
    limit = np.zeros(got.shape) if allowed is None else np.broadcast_to(allowed, got.shape)
    bad = error > limit
    worst = float(error.max())
    row["max_error"] = max(row["max_error"], worst if np.isfinite(worst) else 1e300)
    if limit.any():
        part = np.divide(error, limit, out=np.zeros_like(error), where=limit > 0)
        row["of_bound"] = max(row["of_bound"], float(min(part.max(), 1e300)))
    if not bad.any():
        return
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    first = {"index": list(at), "got": repr(got[at].item()), "expected": repr(want[at].item())}
    count = f"{int(bad.sum())} of {bad.size} numbers of {what}"
    if poisoned is not None and poisoned[at]:
        left = int((bad & poisoned).sum())
        text = f"{left} of {bad.size} numbers of {what} were never written"
        raise Wrong("dropped", text, first=first)
    text = f"{count} differ, first {list(at)}: {first['got']} in place of {first['expected']}"
    raise Wrong("wrong", text, first=first)


def _rows(call: Call, device: Device, results: dict[int, Results]) -> None:
    """Rows of 16 against the same rows among fewer, and against themselves alone."""
    if call.row is None:
        return
    whole = results[MOST]
    for T, own in results.items():
        for t in range(T if T < MOST else 0):
            _same_row(call.row(own, t, t), call.row(whole, t, t), t, T)
    if call.alone:
        for t in range(device.stride, MOST, device.stride):
            own = device.run(partial(call.run, t, t + 1))
            _same_row(call.row(own, 0, t), call.row(whole, t, t), t, 1)


def _same_row(one: Results, other: Results, t: int, T: int) -> None:
    for a, b in zip(one, other, strict=True):
        x, y = as_bits(a), as_bits(b)
        if not np.array_equal(x, y):
            at = [int(i) for i in np.argwhere(x != y)[0]]
            text = f"row {t} of {T} differs from row {t} of {MOST}, from {at} on"
            raise Wrong("unstable", text, first={"index": [t, *at], "rows": [T, MOST]})


def _time(call: Call, device: Device, T: int) -> dict[str, Any]:
    """Median time of a call, ours and MLX's, by turns; on a GPU of several that are evaluated
    together, since one alone would be its way to the device and back."""
    place = mx.gpu if device.clock == "gpu" else mx.cpu
    moved = sum(a.nbytes for a in call.weights)
    times: dict[str, list[float]] = {"native": [], "mlx": []}
    began = time.perf_counter()
    for turn in range(7):
        if turn > 1 and time.perf_counter() - began > TIMED_S:
            break
        for name, own in times.items():
            with using(name, place):
                start = time.perf_counter()
                mx.eval([(call.timed or call.run)(0, T) for _ in range(device.chain)])
                own.append((time.perf_counter() - start) / device.chain)
    ours, theirs = (statistics.median(own[1:]) for own in times.values())
    row = {"rows": T, "clock": device.clock, "us": round(ours * 1e6, 1)}
    row |= {"mlx_us": round(theirs * 1e6, 1), "speedup": round(theirs / ours, 2)}
    return row | ({"gb_s": round(moved / ours / 1e9, 2)} if moved else {})


def probe(op: str, device: Device, tell: Tell) -> dict[str, Any]:
    """Write one place of an arena again and again, each write behind a read of the one before, with
    no evaluation between: a write that overtakes that read, or a read that overtakes its write,
    gives another row. The read is the attention of one position to itself: the row's own values.
    """
    began = time.perf_counter()
    D, n = 256, device.probes
    row: dict[str, Any] = {"op": op, "case": f"{op} {n} writes of one place", "where": [PROBE]}
    row |= {"scaled": {}, "verdict": "ok", "max_error": 0.0, "of_bound": 0.0}
    tell("hazards")
    rows, q = normal(1, n, 1, 1, D, dtype="bfloat16"), normal(2, 1, 1, D)
    q = q.astype(mx.bfloat16)
    at, norm, turn = mx.array([0]), mx.ones(D, mx.bfloat16), frequencies(D)
    # Page 0 is written: by copy_pages from the others in turn, each of one row; by move_rows from
    # its own places
    others = min(n, 16)
    pages = mx.broadcast_to(rows[:others], (others, 1, PAGE, D))
    behind = rows[:others].reshape(1, 1, others, D)
    own = mx.pad(behind, [(0, 0), (0, 0), (1, PAGE - 1 - others), (0, 0)])
    arena = mx.concatenate([own, pages])
    keys, values = copied(arena), copied(arena)
    moved_rows = rows[mx.arange(n) % others]
    expected = ops.rms_norm_reference(rows) if op == "prepare_qkv" else moved_rows
    mx.eval(rows, q, expected)

    def chain() -> Results:
        nonlocal keys, values
        reads: Results = []
        for i in range(n):
            place = at
            if reads:
                place = mx.depends([place], [reads[-1]])[0]
            if op == "copy_pages":
                values = ops.copy_pages(values, place + (1 + i % others), place)
                keys, asked = values, q
            elif op == "move_rows":
                moved, page = mx.array([[1 + i % others]]), mx.array([[0]])
                keys, values = ops.move_rows(keys, values, place, page, moved, mx.array([1]))
                asked = q
            else:
                flat, page = rows[i].reshape(1, D), place[None]
                asked, keys, values = ops.prepare_qkv(
                    flat, flat, flat, norm, norm, turn, keys, values, place, place, page
                )
            reads.append(ops.block_attention(asked, keys, values, at, at[None], [1]))
        return reads

    try:
        for i, read in enumerate(device.run(chain)):
            allowed = rounded(1)([expected[i]])[0]
            judge(as_numpy(read), as_numpy(expected[i]), as_numpy(allowed), row, f"read {i}", None)
    except Wrong as fault:
        row |= {"verdict": "hazard", "detail": str(fault), **fault.more}
    except Exception as error:
        text = str(error) or type(error).__name__
        row |= {"verdict": "error", "detail": text.splitlines()[0], "log": text[:LOG]}
    row["seconds"] = round(time.perf_counter() - began, 3)
    return row


def as_numpy(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32) if a.dtype in (mx.bfloat16, mx.float16) else a)


def as_bits(a: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(a).view(mx.uint16 if a.dtype.size == 2 else mx.uint32))
