"""The ops that read a model's weights and cache, timed beside MLX's own at a model's shapes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.activations import gelu_approx
from mlx.utils import tree_flatten

from pyengine import ops
from pyengine.bench import arrays
from pyengine.checkpoint.pair import Pair
from pyengine.checkpoint.published import PUBLISHED, published_name
from pyengine.model.head import Logits
from pyengine.model.linear import Linear, gated, side_by_side
from pyengine.ops.prepare_qkv import PAGE

STAND_IN = "E2B"  # the smallest published pair: its largest matrix fits any machine
VOCABULARY, TOP_K, SOFTCAP = 262144, 64, 30.0
EXPERTS_USED, EXPERT_WIDTH = 8, 704  # of the mixture
SLIDING, FULL = 256, 512  # widths of heads
CACHED = 4096  # positions of a full layer
TURN_SECONDS, MOST_CALLS = 0.05, 200  # one side's part of a turn
MLX_SECONDS = 2.0
# Of the largest value. MLX sums in bfloat16 on a processor, up to 0.3 at these shapes; a wrong
# result, and none at all, is further away
TOLERANCE = 0.5

Row = dict[str, Any]


@dataclass(frozen=True)
class Shapes:
    """A published geometry, and how its weights are stored: 16 ``bits`` are bfloat16."""

    name: str
    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.name}, {'bfloat16' if self.bits == 16 else f'{self.bits} bit'}"

    def matrix(self, seed: int, *shape: int) -> list[mx.array]:
        """A random matrix, or a stack, as :meth:`linear` takes it."""
        if self.bits == 16:
            return [arrays.normal(seed, *shape)]
        return list(arrays.quantized(seed, *shape, group_size=self.group_size, bits=self.bits))

    def linear(self, parts: list[mx.array]) -> Linear:
        """That matrix as the model has it."""
        if self.bits == 16:
            return Linear(parts[0])
        weight, scales, biases = parts
        return Linear(weight, scales, biases, self.bits, self.group_size)


@dataclass(frozen=True)
class Call:
    """What the engine calls at one place of a model, and the same from MLX's ops."""

    place: str
    op: str
    shape: str
    nbytes: int  # that a call must move
    turns: list[tuple[Any, ...]]  # arguments, in as many copies as no cache holds
    kernel: Callable[..., Any]
    mlx: Callable[..., Any]


def shapes_of(pair: Pair) -> Shapes:
    """The pair's own if it is a published one, else those of the smallest published pair: at the
    embedded pair's, a call takes longer than its work."""
    assistant = pair.assistant
    name = published_name(pair.target.config, assistant.config) if assistant else None
    if name is None:
        return Shapes(STAND_IN, 8, 64)
    mode = pair.target.config.quantization
    return Shapes(name, mode.bits, mode.group_size) if mode else Shapes(name, 16, 0)


def time_kernels(
    shapes: Shapes,
    rows: list[int],
    rounds: int,
    on_run: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> list[Row]:
    """Time the op of each place and MLX's by turns, on random weights. Evaluates.

    Args:
        shapes: Of which model.
        rows: Rows per call, 1 to 16.
        rounds: Turns; figures are medians over them.
        on_run: Called before each op with ops done, ops in all, and what comes next.

    Returns:
        A row per place and number of rows.

    Raises:
        RuntimeError: An op's result is not MLX's, so that its time means nothing.
    """
    made: list[Row] = []
    makers = [(m, place, make) for m in rows for place, make in _places(shapes, m).items()]
    for m, place, make in makers:
        on_run(len(made), len(makers), f"{place}, {m} rows, {shapes}")
        made.append({"rows": m, **compare(make(place), rounds)})
    on_run(len(made), len(made), "done")
    return made


def compare(call: Call, rounds: int) -> Row:
    """Check a call, then time MLX's side and ours by turns. Evaluates.

    MLX's side has fewer turns where they would take longer than ``MLX_SECONDS``, and none but its
    first where that alone did: its processor kernels are slow, and none of its is compiled here.

    Raises:
        RuntimeError: The results differ.
    """
    turns = itertools.cycle(call.turns)

    def seconds(side: Callable[..., Any], calls: int) -> float:
        some = [next(turns) for _ in range(calls)]
        start = time.perf_counter()
        mx.eval([side(*turn) for turn in some])
        return (time.perf_counter() - start) / calls

    def fitting(once: float) -> int:
        return max(1, min(MOST_CALLS, round(TURN_SECONDS / max(once, 1e-9))))

    start = time.perf_counter()
    expected = call.mlx(*call.turns[0])
    mx.eval(expected)
    theirs = [time.perf_counter() - start]
    _check(call, expected)
    calls = fitting(seconds(call.kernel, 1))
    their_rounds, their_calls = 0, 1
    if theirs[0] < MLX_SECONDS:
        once = seconds(call.mlx, 1)
        their_calls = fitting(once)
        their_rounds = max(1, min(rounds, int(MLX_SECONDS / max(once, 1e-9))))
        theirs = []
    ours = []
    for turn in range(rounds):
        if turn < their_rounds:
            theirs.append(seconds(call.mlx, their_calls))
        ours.append(seconds(call.kernel, calls))
    own, other = statistics.median(ours), statistics.median(theirs)
    return {
        "place": call.place,
        "op": call.op,
        "shape": call.shape,
        "bytes": call.nbytes,
        "us": own * 1e6,
        "gb_s": call.nbytes / own / 1e9,
        "mlx_us": other * 1e6,
        "mlx_gb_s": call.nbytes / other / 1e9,
        "speedup": other / own,
    }


def _check(call: Call, expected: Any) -> None:
    ours = _leaves(call.kernel(*call.turns[0]))
    for a, b in zip(ours, _leaves(expected), strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32).reshape(a.shape)
        apart = float(mx.abs(a - b).max()) / float(mx.abs(b).max())
        if not apart <= TOLERANCE:  # NaN is not
            raise RuntimeError(
                f"[card] {call.op} must give what MLX gives but differs by {apart:.3g} of the "
                f"largest value ({call.place}, {call.shape}); pyengine doctor says more."
            )


# ---- What is called where, in the order of a forward pass


def _places(shapes: Shapes, m: int) -> dict[str, Callable[[str], Call]]:
    """What makes the call of each place, for m rows."""
    (_, E, H, sliding, full, window, F, _, _, experts), _ = PUBLISHED[shapes.name]
    dense = shapes.bits == 16
    wide, narrow = H * SLIDING, sliding * SLIDING
    matmul = partial(_matmul, shapes, m)
    one = "dense_matmul" if dense else "quantized_matmul"
    many = one if dense else "quantized_matmuls"
    gate = f"{one} + glu" if dense else "quantized_gated_matmul"
    places: dict[str, Callable[[str], Call]] = {
        "q, k, v": partial(matmul, many, [(wide, E), (narrow, E), (narrow, E)], side_by_side, list),
        "attention, sliding": partial(_attention, m, H, sliding, SLIDING, window - 1 + m, window),
        "attention, full": partial(_attention, m, H, full, FULL, CACHED, None),
        "attention out": partial(matmul, one, [(E, wide)], _single, _first),
        "gate, up": partial(matmul, gate, [(F, E), (F, E)], _gated, _geglu),
        "down": partial(matmul, one, [(E, F)], _single, _first),
        "LM head": partial(_head, shapes, m, E),
    }
    if experts and not dense:
        places["experts"] = partial(_experts, shapes, m, experts, E)
    return places


def _call(
    place: str,
    op: str,
    shape: str,
    fixed: list[mx.array],
    moved: tuple[Any, ...],
    kernel: Callable[..., Any],
    mlx: Callable[..., Any],
) -> Call:
    """A call that reads all of ``fixed`` and ``moved``, the second from memory."""
    mx.eval(fixed)
    turns = arrays.cold(*moved, nbytes=_nbytes(moved))
    nbytes = _nbytes(fixed) + _nbytes(moved) + _nbytes(kernel(*moved))
    return Call(place, op, shape, nbytes, turns, kernel, mlx)


def _nbytes(tree: Any) -> int:
    return sum(a.nbytes for a in _leaves(tree))


def _leaves(tree: Any) -> list[mx.array]:
    return [a for _, a in cast(list[tuple[str, mx.array]], tree_flatten(tree))]


def _matmul(
    shapes: Shapes,
    m: int,
    op: str,
    sizes: list[tuple[int, int]],
    ours: Callable[[list[Linear], mx.array], Any],
    theirs: Callable[[Iterable[mx.array]], Any],
    place: str,
) -> Call:
    """Rows times matrices of these sizes; MLX multiplies by each, and ``theirs`` joins."""
    x = arrays.normal(0, m, sizes[0][1])
    moved = tuple(shapes.matrix(1 + i, *size) for i, size in enumerate(sizes))

    def kernel(*parts: list[mx.array]) -> Any:
        return ours([shapes.linear(part) for part in parts], x)

    def mlx(*parts: list[mx.array]) -> Any:
        return theirs(_mlx_matmul(shapes.linear(part), x) for part in parts)

    shape = " + ".join(f"{n} x {k}" for n, k in sizes)
    return _call(place, op, shape, [x], moved, kernel, mlx)


def _mlx_matmul(matrix: Linear, x: mx.array) -> mx.array:
    if matrix.packed is None:
        return x @ matrix.weight.T
    return mx.quantized_matmul(x, *matrix.packed, True, matrix.group_size, matrix.bits)


def _single(matrices: list[Linear], x: mx.array) -> mx.array:
    return matrices[0](x)


def _gated(matrices: list[Linear], x: mx.array) -> mx.array:
    gate, up = matrices
    return gated(gate, up, x)


def _first(products: Iterable[mx.array]) -> mx.array:
    (product,) = products
    return product


def _geglu(products: Iterable[mx.array]) -> mx.array:
    gate, up = products
    return cast(mx.array, gelu_approx(gate)) * up


def _head(shapes: Shapes, m: int, E: int, place: str) -> Call:
    """Product over the vocabulary, softcap, and the probabilities of the best candidates."""
    # Logits of deviation 1: weights are evenly from -1 to 1
    x = (arrays.normal(0, m, E) * (3 / E) ** 0.5).astype(mx.bfloat16)
    table = shapes.matrix(1, VOCABULARY, E)

    def kernel(parts: list[mx.array]) -> mx.array:
        logits = Logits(x, shapes.linear(parts), SOFTCAP)
        return logits.filter(temperature=1.0, top_k=TOP_K, top_p=1.0).probs

    def mlx(parts: list[mx.array]) -> mx.array:
        logits = _mlx_matmul(shapes.linear(parts), x).astype(mx.float32)
        best = mx.topk(SOFTCAP * mx.tanh(logits / SOFTCAP), TOP_K)
        return mx.softmax(mx.sort(best)[:, ::-1], axis=-1)

    op = "dense_matmul + filter_logits" if shapes.bits == 16 else "quantized_filter_logits"
    return _call(place, op, f"{VOCABULARY} x {E}", [x], (table,), kernel, mlx)


def _attention(m: int, H: int, K: int, D: int, S: int, window: int | None, place: str) -> Call:
    """The rows of a block over S positions, their own among them; MLX's are not in pages."""
    N = -(-S // PAGE)
    q, lengths = arrays.normal(0, m, H, D), mx.array([S - m])
    tables = mx.arange(N, dtype=mx.int32)[None]
    turned = mx.contiguous(q[None].swapaxes(1, 2))
    keys, values = arrays.normal(1, N, K, PAGE, D), arrays.normal(2, N, K, PAGE, D)
    scale, mask = D**-0.5, None
    if m > 1:
        rows, columns = mx.arange(S - m, S)[:, None], mx.arange(S)
        mask = (columns <= rows) & (columns > rows - (window or S))

    def kernel(k: mx.array, v: mx.array) -> mx.array:
        where = lengths, tables, [m]
        return ops.block_attention(q, k, v, *where, scale=scale, window=window)

    def mlx(k: mx.array, v: mx.array) -> mx.array:
        k, v = (a.reshape(1, K, N * PAGE, D)[:, :, :S] for a in (k, v))
        out = mx.fast.scaled_dot_product_attention(turned, k, v, scale=scale, mask=mask)
        return out.swapaxes(1, 2)

    mx.eval(turned, mask, lengths, tables)
    shape = f"{H} heads on {K} x {S} x {D}"
    call = _call(place, "block_attention", shape, [q], (keys, values), kernel, mlx)
    unseen = (keys.nbytes + values.nbytes) // (N * PAGE) * (N * PAGE - S)
    return replace(call, nbytes=call.nbytes - unseen)


def _experts(shapes: Shapes, m: int, count: int, E: int, place: str) -> Call:
    """Gate and up of the experts that each row chose; every turn's rows choose others."""
    x = arrays.normal(0, m, E)
    gate, up = (shapes.matrix(i, count, EXPERT_WIDTH, E) for i in (1, 2))
    scores = mx.random.uniform(shape=(m, count), key=mx.random.key(3))
    first = mx.argpartition(scores, EXPERTS_USED, axis=-1)[:, :EXPERTS_USED].astype(mx.int32)
    chosen = [mx.sort((first + shift) % count) for shift in range(0, count, EXPERTS_USED)]
    mx.eval(x, gate, up, chosen)
    used = len(set(cast(list[int], first.flatten().tolist())))
    group_size, bits = shapes.group_size, shapes.bits

    def kernel(ids: mx.array) -> mx.array:
        packed, other = shapes.linear(gate).packed, shapes.linear(up).packed
        assert packed is not None
        return ops.quantized_expert_matmul(x, packed, ids, group_size, bits, up=other)

    def mlx(ids: mx.array) -> mx.array:
        def product(w: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
            rows = x[:, None, None]
            return mx.gather_qmm(
                rows, w, scales, biases, rhs_indices=ids, group_size=group_size, bits=bits
            )[:, :, 0]

        return _geglu(product(*stack) for stack in (gate, up))

    nbytes = _nbytes([gate, up]) * used // count + _nbytes([x, first, kernel(first)])
    shape = f"2 x {used} of {count} x {EXPERT_WIDTH} x {E}"
    turns = [(ids,) for ids in chosen]
    return Call(place, "quantized_expert_matmul", shape, nbytes, turns, kernel, mlx)
