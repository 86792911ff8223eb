"""The example of every op (pyengine/ops/example.py) on Metal: right, and each row by itself."""

import pytest

from pyengine.doctor import checks, shapes
from pyengine.doctor.device import DEVICES
from pyengine.ops import dispatch
from pyengine.ops.example import Limits

CASES = {case.op: case for case in shapes.embedded(Limits(1e5, 512))}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_its_example_is_right_on_metal(op):
    found = checks.examine(CASES[op], DEVICES["workbench"](), lambda step: None, timed=False)
    assert found["verdict"] == "ok", found
    assert set(found["compile"]["plain_mlx_rows"]) <= {16}  # which may be past a limit
