from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, Results, first, normal, rounded
from .prepare_qkv import PAGE
from .sizes import Shape, Sizes

MAX_POSITIONS = 1 << 30  # positions are below it; metal/positions.h has the same
TILE = 512  # keys that a long piece's rows meet at a time
UNSEEN = -1e38  # a score that no weight is left of; finite, so that no row has a NaN of it


def block_attention(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    lengths: mx.array,
    tables: mx.array,
    counts: Sequence[int],
    *,
    scale: float = 1.0,
    window: int | None = None,
    depths: mx.array | None = None,
    ancestors: mx.array | None = None,
) -> mx.array:
    """Attend the rows of Q pieces, one of each sequence, to their own keys, in one pass.

    ``out = softmax(scale * q @ k.T + mask) @ v``. Row t of piece s, which is row
    ``counts[0] + ... + counts[s - 1] + t`` of q, sits at position ``p = lengths[s] + t`` and sees
    positions ``0 <= j <= p``, the last ``window`` of them when ``window`` is given, itself
    included; the piece's own keys are already in the arena. Position j lies in page
    ``tables[s, j // 64 % N]``, place ``j % 64``. Query head h reads key head ``h // (H / K)``.
    Scores, softmax and sums are float32, rounded once.

    With ``depths`` and ``ancestors`` the rows of a piece are nodes of a tree. Row t then sits at
    position ``lengths[s] + depths[t]``, and of position ``lengths[s] + j``, j to ``depths[t]``, it
    takes the key and the value that lie in the place of position ``lengths[s] + ancestors[t, j]``:
    those of row ``ancestors[t, j]``, its ancestor at that depth, itself the last. Only places
    change, so a row's bits are those of a step behind the rows of its path.

    Sums run over absolute position in a fixed tree, whose chunks are pages, so the bits of a row
    depend on that row and its visible keys alone: not on other rows and pieces, N, which pages they
    are, or threads. The Metal kernels give the bits of processors with fused multiply-adds, for up
    to 128 rows. A GPU runs longer calls, which are prefill, as plain MLX, 512 keys at a time:
    scores are never larger than ``[H, T, 512]``. With scores of up to 64 in size the result is then
    within ``2**-16`` of the largest value; on an M5 within ``2**-10``, as MLX's tensor units keep
    11 bits of a float32 factor.

    All rows of a piece are NaN where its positions are not from 0 to below 2**30, where the pages
    that its rows see are more than N, or where one of these is none of the P; and where a depth is
    not from 0 to below A and T, or an ancestor that counts is no row of the piece.

    Args:
        q: Queries ``[R, H, D]``, float32, float16 or bfloat16; D is a multiple of 16, at most 512.
        keys: The arena's, ``[P, K, 64, D]``, dtype of ``q``; H is a multiple of K.
        values: The same.
        lengths: int32 ``[Q]``, the position of each piece's row 0, on the device.
        tables: int32 ``[Q, N]``, pages of each sequence.
        counts: Rows of each piece, Q numbers, at least 1 each, R together.
        scale: Multiplies the scores. Gemma 4 uses 1.0: its queries are normalised.
        window: Sliding window length, or None for full attention; at least 1, below 2**31.
        depths: int32 ``[R]``, on the device; None where the rows of each piece are a chain.
        ancestors: int32 ``[R, A]``, on the device, beside ``depths``; pieces are then of at most 16
            rows, and a chain's line is 0, 1, 2, ...

    Returns:
        ``[R, H, D]``, dtype of ``q``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: On a GPU, keys or values turn out to be a strided view when evaluated.

    Source: online softmax, arXiv:1805.02867.
    """
    args = (q, keys, values, lengths, tables)
    out = _ext.block_attention(*args, list(counts), scale, window, depths, ancestors)
    options: dict[str, Any] = {"scale": scale, "window": window}
    otherwise: Callable[..., mx.array] | None = _otherwise
    if ancestors is not None:
        options |= {"depths": depths, "ancestors": ancestors}
        otherwise = None
    return run(out, block_attention_reference, *args, counts, otherwise=otherwise, **options)


def _otherwise(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    lengths: mx.array,
    tables: mx.array,
    counts: Sequence[int],
    *,
    scale: float,
    window: int | None,
) -> mx.array:
    """Piece by piece: MLX's own kernel, whose scores are all there at once at these widths; of a
    long piece by tiles."""
    parts = []
    for s, (begin, end) in enumerate(_spans(counts)):
        attend = _tiled if end - begin > _ext.max_launch_rows else _mlx
        own = (q[begin:end], keys, values, lengths[s], tables[s])
        parts.append(attend(*own, scale=scale, window=window))
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """First row of each piece, and the row behind its last."""
    ends = list(accumulate(counts))
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _gathered(arena: mx.array, pages: mx.array) -> mx.array:
    """Keys or values of these pages in a row, ``[K, pages * 64, D]``."""
    P, K, _, D = arena.shape
    own = mx.take(arena, mx.clip(pages, 0, P - 1), axis=0)
    return own.swapaxes(0, 1).reshape(K, -1, D)


def _mlx(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    length: mx.array,
    table: mx.array,
    *,
    scale: float,
    window: int | None,
) -> mx.array:
    T = q.shape[0]
    held, whole = _held(T, keys.shape[0], length, table, window)
    seen = _visible(held, length, T, window)
    k, v = _gathered(keys, table), _gathered(values, table)
    # What nobody sees may be NaN, which a weight of 0 would spread
    any_sees = seen.any(axis=0)[None, :, None]
    k, v = mx.where(any_sees, k, 0), mx.where(any_sees, v, 0)
    out = mx.fast.scaled_dot_product_attention(
        q.swapaxes(0, 1)[None], k[None], v[None], scale=scale, mask=seen
    )
    return mx.where(whole, out[0], mx.nan).astype(q.dtype).swapaxes(0, 1)


def _tiled(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    length: mx.array,
    table: mx.array,
    *,
    scale: float,
    window: int | None,
) -> mx.array:
    """The reference a tile of keys at a time, with a running maximum and sum for each row."""
    T, H, D = q.shape
    P, K = keys.shape[:2]
    held, whole = _held(T, P, length, table, window)
    # The rows of a key head's queries are one matrix: each tile of keys is read once for them
    rows = (scale * q.astype(mx.float32)).reshape(T, K, H // K, D).transpose(1, 2, 0, 3)
    rows = rows.reshape(K, H // K * T, D)
    best = mx.full((K, H // K * T, 1), UNSEEN)
    total, out = mx.zeros(best.shape), mx.zeros(rows.shape)
    for page in range(0, table.shape[0], TILE // PAGE):
        seen = _visible(held[page * PAGE : page * PAGE + TILE], length, T, window)
        # After the tile before: MLX may otherwise make the scores of all tiles first
        pages = mx.depends([table[page : page + TILE // PAGE]], [out, total])[0]
        any_sees = seen.any(axis=0)[None, :, None]
        k, v = (
            mx.where(any_sees, _gathered(a, pages).astype(mx.float32), 0) for a in (keys, values)
        )
        scores = (rows @ k.swapaxes(-1, -2)).reshape(K, H // K, T, -1)
        scores = mx.where(seen, scores, UNSEEN).reshape(K, H // K * T, -1)
        higher = mx.maximum(best, scores.max(axis=-1, keepdims=True))
        # All that a row without a visible key yet has summed up is forgotten when it meets one
        kept = mx.exp(best - higher)
        weights = mx.exp(scores - higher)
        total = total * kept + weights.sum(axis=-1, keepdims=True)
        out = out * kept + weights @ v
        best = higher
    out = mx.where(whole, out / total, mx.nan).reshape(K, H // K, T, D)
    return out.transpose(2, 0, 1, 3).reshape(T, H, D).astype(q.dtype)


def _held(
    T: int, P: int, length: mx.array, table: mx.array, window: int | None
) -> tuple[mx.array, mx.array]:
    """The newest position that each place of a sequence's pages can hold, int32 ``[N * 64]``; and
    whether all that the rows of its piece see are held."""
    N = table.shape[0]
    oldest = mx.array(0) if window is None else mx.maximum(length - (window - 1), 0)
    first, last = oldest // PAGE, (length + (T - 1)) // PAGE
    newest = last - (last - mx.arange(N)) % N  # page of the sequence, by entry of the table
    there = (table >= 0) & (table < P)
    whole = (length >= 0) & (length <= MAX_POSITIONS - T) & (last - first < N)
    whole = whole & mx.where(newest >= first, there, True).all()
    return (newest[:, None] * PAGE + mx.arange(PAGE)).reshape(-1), whole


def _visible(held: mx.array, length: mx.array, T: int, window: int | None) -> mx.array:
    """Which of these positions a row sees, bool ``[T, N * 64]``."""
    rows = (length + mx.arange(T))[:, None]  # [T, 1]
    visible = (held >= 0) & (held <= rows)
    return visible if window is None else visible & (held > rows - window)


def block_attention_reference(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    lengths: mx.array,
    tables: mx.array,
    counts: Sequence[int],
    *,
    scale: float = 1.0,
    window: int | None = None,
    depths: mx.array | None = None,
    ancestors: mx.array | None = None,
) -> mx.array:
    """The same in plain MLX, piece by piece; of a tree row by row."""
    if not (q.size and keys.size and tables.size):
        return mx.full(q.shape, mx.nan, q.dtype)
    parts = []
    for s, (begin, end) in enumerate(_spans(counts)):
        table, length, T = tables[s], lengths[s], end - begin
        held, whole = _held(T, keys.shape[0], length, table, window)
        k, v = _gathered(keys, table), _gathered(values, table)
        if depths is None or ancestors is None:
            visible = _visible(held, length, T, window)
            parts.append(_attended(q[begin:end], k, v, visible, whole, scale))
            continue
        lines, own_depths = ancestors[begin:end], depths[begin:end]
        A = min(lines.shape[1], T)
        counted = mx.arange(lines.shape[1]) <= own_depths[:, None]
        known = ((lines >= 0) & (lines < T)) | ~counted
        whole = whole & known.all() & ((own_depths >= 0) & (own_depths < A)).all()
        for t in range(T):
            depth = mx.clip(own_depths[t], 0, A - 1)
            visible = _visible(held, length + depth, 1, window)
            # Where each place's position lies, for this row
            step = mx.clip(held - length, 0, A - 1)
            slot = length + mx.clip(lines[t], 0, T - 1)[step]
            place = slot // PAGE % table.shape[0] * PAGE + slot % PAGE
            place = mx.where(held < length, mx.arange(held.size), place)
            row = slice(begin + t, begin + t + 1)
            parts.append(_attended(q[row], k[:, place], v[:, place], visible, whole, scale))
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]


def _attended(
    q: mx.array, k: mx.array, v: mx.array, visible: mx.array, whole: mx.array, scale: float
) -> mx.array:
    """T rows ``[T, H, D]`` of a piece to the keys that are visible to each, bool ``[T, S]``."""
    (T, H, D), K = q.shape, k.shape[0]
    seen = visible.any(axis=0)[None, :, None]  # what nobody sees may be NaN
    k, v = (mx.where(seen, a, 0).astype(mx.float32) for a in (k, v))
    own = q.astype(mx.float32).reshape(T, K, H // K, D).transpose(1, 2, 0, 3)
    scores = scale * (own @ k[:, None].swapaxes(-1, -2))
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1)  # [K, H / K, T, S]
    out = mx.where(whole, weights @ v[:, None], mx.nan)
    return out.transpose(2, 0, 1, 3).reshape(T, H, D).astype(q.dtype)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for H, K, D, length, window, is_tree in sizes.attended:
        keys = {"K": K, "D": D, "length": length, "dtype": sizes.dtype}
        tree = {"is_tree": True} if is_tree else {}
        yield {"H": H, "window": window, **keys, **tree}, {}


def example(
    H: int, K: int, D: int, length: int, window: int | None, dtype: str, is_tree: bool = False
) -> Call:
    """Rows of one sequence behind those of another, as one piece each; or nodes of its tree."""
    q = normal(1, MOST, H, D, dtype=dtype, scale=0.25)
    pages = (length + MOST) // PAGE + 1
    keys, values = (normal(i, pages + 1, K, PAGE, D, dtype=dtype, scale=0.5) for i in (2, 3))
    # From the last page down; the other sequence has one, and none that anybody sees beside it
    own = pages - mx.arange(pages)
    tables = mx.stack([mx.where(mx.arange(pages) == 0, 0, -1), own])

    depths, ancestors = (mx.array([a[0], *a]) for a in _tree())

    def run_tree(b: int, e: int) -> Results:  # a node's ancestors stand before it
        rows, lengths = mx.concatenate([q[:1], q[:e]]), mx.array([5, length])
        out = block_attention(
            rows,
            keys,
            values,
            lengths,
            tables,
            [1, e],
            window=window,
            depths=depths[: e + 1],
            ancestors=ancestors[: e + 1],
        )
        return [out[1 + b :]]

    def run(b: int, e: int) -> Results:
        rows = mx.concatenate([q[:1], q[b:e]])
        lengths = mx.array([5, length + b])
        out = block_attention(rows, keys, values, lengths, tables, [1, e - b], window=window)
        return [out[1:]]

    return Call(run_tree if is_tree else run, first, rounded(1))


def _tree() -> tuple[list[int], list[list[int]]]:
    """Depths and ancestors of 16 rows: two children of each, by turns of an earlier row."""
    paths = [[0]]
    for row in range(1, MOST):
        paths.append([*paths[(row - 1) // 2], row])
    return [len(path) - 1 for path in paths], [path + [0] * (MOST - len(path)) for path in paths]
