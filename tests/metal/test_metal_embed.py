"""metal/embed.metal in the workbench: the processor's bits, no fault, only the rows asked for."""

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from matmuls import bits_of, normal

from pyengine import ops

SCALE = 39.25
FORMS = {  # dtype, E, packing (none: floats), out_dtype
    "q8": (mx.bfloat16, 192, (64, 8), mx.bfloat16),
    "q6": (mx.float16, 96, (32, 6), mx.float32),
    "q4": (mx.float32, 1280, (128, 4), mx.float32),
    "dense": (mx.bfloat16, 1030, (), mx.bfloat16),
}


def run(form: str, ids: mx.array, V: int = 40, **options):
    """The kernel's rows, the processor's, and the report."""
    dtype, E, packing, out_dtype = FORMS[form]
    values = normal(1, V, E, dtype=dtype)
    table = mx.quantize(values, *packing) if packing else (values,)
    native = ops.embed(ids, table, *packing, scale=SCALE, out_dtype=out_dtype)
    (out,), report = launched(native, **options)
    return out, native, report


@pytest.mark.parametrize("form", FORMS)
def test_is_the_processors(form):
    """With ids outside of the table, which must not be read; the last row ends where it ends."""
    ids = mx.array([39, 0, 40, 7, -1, 7, 2**31 - 1, -(2**31)], dtype=mx.int32)
    for order in ("forward", "random"):
        out, native, _ = run(form, ids, mode="check", order=order)
        assert out.dtype == native.dtype and np.array_equal(bits_of(out), bits_of(native))
    wrong = mx.isnan(out).all(axis=-1).tolist()
    assert [row for row, nan in enumerate(wrong) if nan] == [2, 4, 6, 7]


@pytest.mark.parametrize("form", ["q8", "dense"])
def test_contraction_changes_nothing(form):
    ids = mx.arange(40, dtype=mx.int32)
    out, native, _ = run(form, ids, mode="fast", contract="fast")
    assert np.array_equal(bits_of(out), bits_of(native))


def test_reads_its_rows_and_no_others():
    ids = mx.array([3, 20], dtype=mx.int32)
    _, _, report = run("q4", ids, mode="count")
    traffic = report.traffic
    assert report.launches == 1
    assert 32 * traffic["w"].distinct_read_sectors == 2 * 1280 // 2
    assert 32 * traffic["w"].group_read_sectors <= 1.1 * 2 * 1280 // 2
    for name in ("scales", "biases"):  # ten numbers of 4 bytes, anywhere in sectors of 32
        assert traffic[name].distinct_read_sectors <= 4
    assert 32 * traffic["out"].group_written_sectors == 2 * 1280 * 4
