"""Large tensors as pages of their file: nothing is copied, and a second process shares them.

On a processor under Linux; elsewhere, and where numbers do not lie at multiples of their size,
MLX reads. A file that is replaced or deleted stays what it was for whoever loaded it. One that is
cut, or whose disk fails, is noticed: zeros stand where it was read, and :func:`check` raises.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from pyengine import _ext

LEAST = 1 << 20  # bytes that are worth a map
PART = 32 << 20  # read between two words on how far it is
DTYPES = {"U32": mx.uint32, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def tensor(file: int, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> mx.array | None:
    """Bytes of an open file as an array; None where they are to be read instead.

    ``dtype`` is in the words of a safetensors header.

    Raises:
        ValueError: The file has not so many bytes.
    """
    if end - begin < LEAST or dtype not in DTYPES:
        return None
    return _ext.map_tensor(file, begin, list(shape), DTYPES[dtype])


def read(array: mx.array, on_read: Callable[[int], None]) -> int:
    """Have the pages of a mapped array read, by parts; how many bytes that was, 0 of any other.

    Raises:
        RuntimeError: They cannot be.
    """
    done = 0
    while done < array.nbytes:
        size = min(PART, array.nbytes - done)
        if not _ext.read_mapped(array, done, size):
            break
        done += size
        on_read(size)
    return done


def nbytes() -> int:
    """Of what is mapped: MLX does not count it, and the system counts it as free."""
    return _ext.mapped_bytes()


def check(op: str) -> None:
    """Refuse a result for which a file could not be read.

    Raises:
        RuntimeError: A file of weights was cut, or its disk failed, since it was loaded.
    """
    if _ext.lost_mapped():
        raise RuntimeError(
            f"[{op}] a file of weights must stay whole while they are loaded but could not be read "
            "any more; load it again in a new process, and replace such a file by renaming."
        )
