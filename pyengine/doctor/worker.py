"""The process that runs kernels for the doctor: it may crash or hang, and the doctor does not.

Reads one line of JSON on standard input, a job: the device, the cases, and what to do with them.
Writes one line of JSON per event on standard output: "ready"; "at", before each step, so that
whoever watches knows what it died in; "case", with its result; "end".

Run: python -m pyengine.doctor.worker
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any, TextIO


def main() -> None:
    job = json.loads(sys.stdin.readline())
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody else writes there
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(job, events)


def _end_with_parent() -> None:
    """Standard input ends when whoever started this process has gone."""
    sys.stdin.read()
    os._exit(1)


def work(job: dict[str, Any], events: TextIO) -> None:
    """Examine the cases of a job, in order, and report on each."""
    import mlx.core as mx

    from pyengine import ops
    from pyengine.doctor import checks
    from pyengine.doctor.device import DEVICES, Metal
    from pyengine.doctor.shapes import PROBE, Case

    def say(event: str, **more: Any) -> None:
        events.write(json.dumps({"event": event, **more}) + "\n")
        events.flush()

    ops.use("native")  # whatever the environment says
    device = DEVICES[job["device"]]()
    mx.set_default_device(mx.gpu if device.name == Metal.name else mx.cpu)
    say("ready")
    for entry in job["cases"]:
        case = Case(**entry)

        def tell(step: str, case: Case = case) -> None:
            say("at", op=case.op, case=case.name, step=step)

        tell("inputs")
        if case.where == [PROBE]:
            row = checks.probe(case.op, device, tell)
        else:
            row = checks.examine(case, device, tell, timed=case.name in job["timed"])
        say("case", result=row)
        mx.clear_cache()
    say("end")


if __name__ == "__main__":
    main()
