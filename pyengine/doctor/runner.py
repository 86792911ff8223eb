"""Start workers, watch them, and make one row per op of what they say or leave unsaid."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pyengine.doctor.shapes import PROBE, Case
from pyengine.ops.dispatch import WRITERS

# Of this very package, wherever the process stands
COMMAND = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    "from pyengine.doctor.worker import main; main()",
)
STEP_LIMIT_S = 120.0  # for one step of a case: compiling 16 rows on a GPU takes seconds
START_LIMIT_S = 120.0  # for imports, on a cold disk
LOG = 4000  # characters of what a worker wrote last that are kept
Progress = Callable[[int, int, str], None]  # ops done, ops in all, and the one that begins
Row = dict[str, Any]


def examine(
    cases: Sequence[Case],
    device: str,
    *,
    timed: Collection[str],
    probes: bool,
    shared: bool,
    on_op: Progress = lambda done, total, op: None,
) -> list[Row]:
    """Examine cases in processes of their own: one per op, or one for all until it ends early.
    Those named in `timed` are timed too, if they are right.

    Returns:
        A row per op, in order: ``op``; ``verdict``, "ok" or that of its first case that failed (see
        `checks.examine`), "crashed" or "hung"; ``max_error``, ``of_bound`` and ``seconds``;
        ``cases``, how many; ``shapes``, each case with the pairs that have it, and ``scaled``, what
        of them is smaller than there; ``failed``, what is known of each failure; ``compile`` and
        ``times`` where there are any.

    Raises:
        RuntimeError: No worker starts.
    """
    names = list(dict.fromkeys(case.op for case in cases))
    results: dict[str, list[Row]] = {op: [] for op in names}
    left = list(names)
    while left:
        group = list(left) if shared else left[:1]
        on_op(len(names) - len(left), len(names), left[0])
        jobs = [case for case in cases if case.op in group]
        if probes:
            jobs += [Case(op, {}, [PROBE]) for op in group if op in WRITERS]
            jobs.sort(key=lambda case: case.op)
        job: Row = {"device": device, "timed": list(timed)}
        job["cases"] = [asdict(case) for case in jobs]
        current = left[0]
        for row in _watch(job):
            if row["op"] != current:
                current = row["op"]
                on_op(names.index(current), len(names), current)
            results[current].append(row)
            if shared and row["verdict"] != "ok":
                break  # a fault may spoil what follows it in one process
        # What a worker that ended early did not reach is left for the next
        last = names.index(current if shared else group[-1])
        left = names[last + 1 :]
    return [_row(op, results[op], cases) for op in names]


def _row(op: str, found: list[Row], cases: Sequence[Case]) -> Row:
    """What an op's cases say of it."""
    bad = [row for row in found if row["verdict"] != "ok"]
    row: Row = {
        "op": op,
        "verdict": bad[0]["verdict"] if bad else "ok",
        "max_error": max(row["max_error"] for row in found),
        "of_bound": max(row["of_bound"] for row in found),
        "seconds": round(sum(row["seconds"] for row in found), 3),
        "cases": len(found),
        "shapes": {row["case"]: row["where"] for row in found},
        "scaled": {row["case"]: row["scaled"] for row in found if row["scaled"]},
    }
    compiled = [row["compile"] for row in found if row.get("compile")]
    if compiled:
        row["compile"] = {
            "seconds": round(sum(one["seconds"] for one in compiled), 3),
            "threads": min((one["threads"] for one in compiled if one["threads"]), default=None),
            "threadgroup_bytes": max(one["threadgroup_bytes"] for one in compiled),
        }
    times = [{"case": row["case"], **one} for row in found for one in row.get("times") or ()]
    if times:
        row["times"] = times
    if bad:
        keys = ("case", "verdict", "detail", "first", "log", "source_lines", "step")
        row["failed"] = [{key: one[key] for key in keys if key in one} for one in bad]
    return row


def _watch(job: Row) -> Iterator[Row]:
    """Results of a worker's cases; one that died or hung gives the last of its op's.

    Raises:
        RuntimeError: It died before it was ready.
    """
    with _worker() as (process, events, errors):
        assert process.stdin is not None
        _send(process.stdin, job)
        at: Row | None = None
        ready = False
        began = time.monotonic()
        while True:
            try:
                event = events.get(timeout=STEP_LIMIT_S if ready else START_LIMIT_S)
            except queue.Empty:
                event = {"event": "hung"}
            kind = event["event"]
            if kind == "end":
                return
            if kind == "ready":
                ready = True
            elif kind == "case":
                yield event["result"]
                at = None
            elif kind == "at":
                began = time.monotonic() if at is None else began
                at = event
            else:
                process.kill()
                code = process.wait()
                if not ready:
                    said = _tail(errors).strip().splitlines() or ["nothing"]
                    raise RuntimeError(
                        f"[doctor] a worker must start but {COMMAND[0]} ended with "
                        f"{_ending(code)}, saying {said[-1]}."
                    )
                at = at or {"op": job["cases"][0]["op"], "case": "", "step": "between cases"}
                yield _death(kind, code, at, time.monotonic() - began, _tail(errors))
                return


def _death(kind: str, code: int, at: Row, seconds: float, log: str) -> Row:
    """The result of a case in which a worker ended or was ended."""
    if kind == "hung":
        detail = f"no end of the step `{at['step']}` within {STEP_LIMIT_S:.0f} s"
    else:
        detail = f"the process ended in the step `{at['step']}`: {_ending(code)}"
    row = {"op": at["op"], "case": at["case"], "where": [], "scaled": {}, "step": at["step"]}
    row |= {"verdict": "hung" if kind == "hung" else "crashed", "detail": detail, "log": log}
    return row | {"max_error": 0.0, "of_bound": 0.0, "seconds": round(seconds, 3)}


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


@contextmanager
def _worker() -> Iterator[tuple[subprocess.Popen[str], queue.Queue[Row], IO[bytes]]]:
    """A worker, its events as they come, and what it writes otherwise. Ended at the end.

    Ctrl-C is for whoever watches: a worker is in no terminal's group.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        events: queue.Queue[Row] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    events.put(json.loads(line))
                except ValueError:  # cut off by its death
                    break
            events.put({"event": "died"})

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield process, events, errors
        finally:
            process.kill()
            process.wait()
            reader.join()
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):  # what it never read
                process.stdin.close()
            process.stdout.close()


def _send(to: IO[str], job: Row) -> None:
    with suppress(BrokenPipeError):  # it died at once, which its end tells
        to.write(json.dumps(job) + "\n")
        to.flush()


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read()[-LOG:].decode("utf-8", "replace")
