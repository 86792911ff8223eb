from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, Results, copied, frequencies, normal, of_rows, rounded
from .norm_rope import norm_rope_reference
from .rms_norm import rms_norm_reference
from .sizes import Settings, Shape, Sizes

PAGE = 64  # positions of a page: a chunk of block_attention's sums


def prepare_qkv(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    inv_freq: mx.array,
    keys: mx.array,
    values: mx.array,
    positions: mx.array,
    owners: mx.array,
    tables: mx.array,
    eps: float = 1e-6,
    norm_values: bool = True,
    slots: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """All that stands between the projections of R rows and their attention.

    Queries and keys as :func:`norm_rope`, values by RMSNorm without weights or as they are, then
    keys and values into the pages of each row's sequence. Row r, position ``p = positions[r]`` of
    sequence ``s = owners[r]``, goes to page ``tables[s, p // 64 % N]``, place ``p % 64``. A row
    whose position is negative, whose owner is none of the Q, or whose page is none of the P, is
    written nowhere; its query is made all the same. With ``slots`` it goes to the place of position
    ``slots[r]``, turned for ``positions[r]`` all the same: a row of a tree.

    The write is in place: the results *are* the arenas' memory, whoever else holds it. So the
    returned handles are the only ones that may be used afterwards; older ones see the new rows
    too. MLX runs a write after an earlier read of the arena only if an input depends on what was
    read: in a decoder it does, through the token; where it does not, evaluate in between. No two
    rows of a call may go to the same place.

    Args:
        q: ``[R, H * D]``, float32, float16 or bfloat16; D is even, at most 1024.
        k: ``[R, K * D]``, dtype of ``q``.
        v: The same; ``k`` again where keys double as values.
        q_norm: ``[D]``, dtype of ``q``.
        k_norm: ``[D]``, dtype of ``q``.
        inv_freq: float32 ``[D / 2]``, radians per position.
        keys: The arena's, ``[P, K, 64, D]``, dtype of ``q``, evaluated to a contiguous array.
        values: The same.
        positions: int32 ``[R]``, on the device.
        owners: int32 ``[R]``, from 0 to Q - 1.
        tables: int32 ``[Q, N]``, pages of each sequence.
        eps: Added to the means of squares; positive.
        norm_values: Whether values are normalised; else they are written as they are.
        slots: int32 ``[R]``, on the device; None where they are the positions.

    Returns:
        Queries ``[R, H, D]``; keys and values ``[P, K, 64, D]`` with R places replaced.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: keys or values turn out not to be contiguous when evaluated.
    """
    rows, to = (q, k, v, q_norm, k_norm, inv_freq), (keys, values, positions, owners, tables)
    args = (*rows, *to, eps, norm_values, slots)
    turned, keys, values = run(_ext.prepare_qkv(*args), prepare_qkv_reference, *args)
    return turned, keys, values


def prepare_qkv_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    inv_freq: mx.array,
    keys: mx.array,
    values: mx.array,
    positions: mx.array,
    owners: mx.array,
    tables: mx.array,
    eps: float = 1e-6,
    norm_values: bool = True,
    slots: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """The same in plain MLX; the arenas are copied."""
    (P, K, _, D), R = keys.shape, q.shape[0]
    q = norm_rope_reference(q.reshape(R, q.shape[1] // D, D), q_norm, positions, inv_freq, eps)
    k = norm_rope_reference(k.reshape(R, K, D), k_norm, positions, inv_freq, eps)
    v = v.reshape(R, K, D)
    v = rms_norm_reference(v, None, eps) if norm_values else v
    if not (k.size and keys.size and tables.size):
        return q, keys * 1, values * 1
    Q, N = tables.shape
    slots = positions if slots is None else slots
    known = (slots >= 0) & (owners >= 0) & (owners < Q)
    pages = tables[mx.where(known, owners, 0), slots // PAGE % N]
    known = known & (pages >= 0) & (pages < P)
    # What goes nowhere goes to a page of its own, which is cut off
    at = mx.where(known, pages, P), slots % PAGE
    return q, _written(keys, k, *at), _written(values, v, *at)


def _written(arena: mx.array, new: mx.array, pages: mx.array, places: mx.array) -> mx.array:
    room = mx.concatenate([arena, mx.zeros_like(arena[:1])]).swapaxes(1, 2)  # [P + 1, 64, K, D]
    room[pages, places] = new
    return mx.contiguous(room[:-1].swapaxes(1, 2))


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for H, K, D, same, norm_values, has_trees in sizes.heads:
        settings: Settings = {"H": H, "K": K, "D": D, "same": same, "dtype": sizes.dtype}
        if not norm_values:
            settings["norm_values"] = False
        yield settings, {}
        if has_trees:
            yield {**settings, "has_slots": True}, {}


def example(
    H: int,
    K: int,
    D: int,
    same: bool,
    dtype: str,
    has_slots: bool = False,
    norm_values: bool = True,
) -> Call:
    q, k, v = (normal(i, MOST, n * D, dtype=dtype) for i, n in ((1, H), (2, K), (3, K)))
    norms = normal(4, D, dtype=dtype), normal(5, D, dtype=dtype), frequencies(D)
    keys, values = (normal(i, 5, K, PAGE, D, dtype=dtype) for i in (6, 7))
    positions, owners = of_rows()
    tables = mx.array([[3, 0], [1, 4]])  # page 2 is nobody's
    slots = positions + 3 if has_slots else positions

    def prepare(arenas: Results, b: int, e: int) -> Results:
        rows = q[b:e], k[b:e], (k if same else v)[b:e]
        where = positions[b:e], owners[b:e], tables
        places = slots[b:e] if has_slots else None
        keys, values = arenas
        to = keys, values, *where
        return list(prepare_qkv(*rows, *norms, *to, slots=places, norm_values=norm_values))

    own = [copied(keys), copied(values)]

    def row(results: Results, i: int, t: int) -> Results:
        page = tables[owners[t], slots[t] // PAGE % 2]
        return [results[0][i], *(a[page, :, slots[t] % PAGE] for a in results[1:])]

    return Call(
        lambda b, e: prepare([copied(keys), copied(values)], b, e),
        row,
        rounded(1),
        timed=lambda b, e: prepare(own, b, e),
    )
