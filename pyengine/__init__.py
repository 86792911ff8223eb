"""Exact speculative decoding for Gemma 4 and its assistant, on MLX."""

import mlx.core as mx

_BUILT_FOR = "0.32.4"

# libmlx has no stable ABI: another version would fail later, on an undefined symbol or worse.
if mx.__version__.split("+")[0] != _BUILT_FOR:
    raise ImportError(
        f"[pyengine] mlx must be {_BUILT_FOR} but got {mx.__version__}. "
        f"Run: pip install 'mlx=={_BUILT_FOR}'"
    )

__version__ = "0.1.0"
