"""The committed tiny pairs and their transformers references, loaded once per test run.

Made by tests/parity/make_tiny.py; window 8, vocabulary 256, one target of each architecture.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from models import verify

from pyengine.checkpoint.config_json import read_target_config
from pyengine.checkpoint.pair import Pair, load
from pyengine.checkpoint.quantize import quantize_checkpoint
from pyengine.checkpoint.weights import load_target_weights
from pyengine.model.cache import Cache
from pyengine.model.linear import Linear, Weights
from pyengine.model.target import Target

FLAVOURS = ("dense31", "e2b", "moe26", "uni12")
FIXTURES = Path(__file__).parents[1] / "fixtures"
WINDOW = 8
# What a checkpoint can be loaded as: (dtype, quantised to 8 bits)
FORMS = {
    "float32": (mx.float32, False),
    "bfloat16": (mx.bfloat16, False),
    "float32-q8": (mx.float32, True),
    "bfloat16-q8": (mx.bfloat16, True),
}


@functools.cache
def tiny_pair(flavour: str, form: str = "float32", position: str = "n-1") -> Pair:
    dtype, quantized = FORMS[form]
    root = quantized_fixtures() if quantized else FIXTURES
    folder = root / flavour
    return load(folder / "target", folder / "assistant", dtype=dtype, position=position)


@functools.cache
def quantized_fixtures() -> Path:
    """A temporary copy of all fixtures at 8 bits, group 64."""
    root = Path(tempfile.mkdtemp(prefix="pyengine-q8-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for flavour in FLAVOURS:
        (root / flavour).mkdir()
        for part in ("target", "assistant"):
            quantize_checkpoint(FIXTURES / flavour / part, root / flavour / part)
    return root


@functools.cache
def reference(flavour: str) -> dict[str, mx.array]:
    loaded = mx.load(str(FIXTURES / flavour / "ref.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def greedy_text(flavour: str) -> list[int]:
    """A prompt of 21 tokens and the 100 that follow it greedily: past fifteen windows."""
    return reference(flavour)["greedy"].tolist()


def steps(target: Target, cache: Cache, ids: list[int]) -> tuple[mx.array, mx.array]:
    """Plain decoding of given ids: logits [T, V] and hidden vectors [T, E], one call each."""
    logits, hidden = [], []
    for token in ids:
        row = verify(target, mx.array([token], dtype=mx.int32), cache)
        cache.commit(mx.array(1, dtype=mx.int32), cache.length_limit + 1)
        mx.eval(row, cache.arrays)
        logits.append(row[0])
        hidden.append(row[1])
    return mx.concatenate(logits), mx.concatenate(hidden)


def bits(x: mx.array) -> np.ndarray:
    """The bit patterns of x; equality of these is equality of bits."""
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def gap(a: mx.array, b: mx.array) -> float:
    """Largest absolute difference; NaN and a difference in shape do not pass as small."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item())


def norm(a: mx.array) -> float:
    return float(mx.linalg.norm(a).item())


def mirrored(src: Path, converted: Path) -> Target:
    """The target whose every weight is off by the quantisation error with its sign changed."""
    config = read_target_config(src / "target")
    exact = load_target_weights(src / "target", config, mx.float32)
    small = load_target_weights(
        converted / "target", read_target_config(converted / "target"), mx.float32
    )
    matrices = {
        path: Linear(2 * matrix.values() - small.matrices[path].values())
        for path, matrix in exact.matrices.items()
    }
    return Target(config, Weights(matrices, exact.vectors, mx.float32))
