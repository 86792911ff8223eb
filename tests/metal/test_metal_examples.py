"""The example of every op (pyengine/ops/example.py) on Metal: right, and each row by itself."""

import pytest

from pyengine.doctor import checks, shapes
from pyengine.doctor.device import DEVICES
from pyengine.ops import dispatch, workbench
from pyengine.ops.sizes import Limits

CASES = {case.op: case for case in shapes.embedded(Limits(1e5, 512))}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_its_example_is_right_on_metal(op, monkeypatch):
    run, launched = workbench.run, set()

    def noted(launches, *inputs):
        launched.update(launch.library for launch in launches)
        return run(launches, *inputs)

    monkeypatch.setattr(workbench, "run", noted)
    found = checks.examine(CASES[op], DEVICES["workbench"](), lambda step: None, timed=False)
    assert found["verdict"] == "ok", found
    assert op in launched


def test_a_wrong_kernel_is_seen(monkeypatch):
    run = workbench.run
    monkeypatch.setattr(workbench, "run", lambda *given: [a + 1 for a in run(*given)])
    found = checks.examine(CASES["glu"], DEVICES["workbench"](), lambda step: None, timed=False)
    assert found["verdict"] == "wrong"
