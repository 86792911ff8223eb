"""Recorded functions: the same graph, built once."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections import Counter
from typing import NamedTuple

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import FLAVOURS, bits, greedy_text, tiny_pair

from pyengine import ops
from pyengine.engine import round as on_device
from pyengine.ops.recorded import recorded
from pyengine.sampling.settings import Sampling


def counting(function):
    """A recorded function, and a list that grows when the function itself runs."""
    runs: list[int] = []
    return recorded(lambda arrays: runs.append(1) or function(arrays)), runs


def test_it_runs_once_for_each_set_of_shapes_and_dtypes():
    play, runs = counting(lambda arrays: [arrays[0] * 2 + arrays[1]])
    for length in (3, 3, 5, 3, 5):
        x = mx.arange(length, dtype=mx.float32)
        assert play([x, mx.array(1.0)])[0].tolist() == [2 * i + 1 for i in range(length)]
    assert len(runs) == 2
    assert play([mx.arange(3), mx.array(1)])[0].tolist() == [1, 3, 5]
    assert len(runs) == 3


class Inner(NamedTuple):
    a: mx.array
    rest: list[mx.array]


class Outer(NamedTuple):
    inner: Inner | None
    b: mx.array


def test_arguments_and_results_are_trees():
    """Named ones keep their names, of any depth; None holds nothing."""
    runs = []

    def function(tree: Outer, c: mx.array) -> tuple[Outer, list[mx.array], None]:
        runs.append(1)
        assert type(tree) is Outer and tree.inner is not None and type(tree.inner) is Inner
        a, (x, y) = tree.inner
        return Outer(Inner(a + x, [y, tree.b, c]), a * c), [], None

    play = recorded(function)
    for n in (1, 5):
        leaves = [mx.array(n + i) for i in range(5)]
        a, x, y, b, c = leaves
        tree, empty, nothing = play(Outer(Inner(a, [x, y]), b), c)
        assert type(tree) is Outer and type(tree.inner) is Inner
        assert (tree.inner.a.item(), tree.b.item()) == (2 * n + 1, n * (n + 4))
        assert [rest.item() for rest in tree.inner.rest] == [n + 2, n + 3, n + 4]
        assert empty == [] and nothing is None
    assert len(runs) == 1


def test_each_form_of_the_arguments_has_its_own_graph():
    """Also where as many arrays of like shapes stand at other places."""

    def function(tree: Outer) -> Outer:
        if tree.inner is None:
            return tree._replace(b=tree.b * 10)
        return Outer(None, tree.inner.a - sum(tree.inner.rest, tree.b))

    play = recorded(function)
    one, two, four = mx.array(1), mx.array(2), mx.array(4)
    for _ in range(2):
        assert play(Outer(None, two)).b.item() == 20
        assert play(Outer(Inner(four, [one]), two)).b.item() == 1
        assert play(Outer(Inner(four, []), two)).b.item() == 2
    assert play.tapes == 3
    assert play(Outer(None, two)).inner is None and play.nodes == ["Multiply"]


def test_nodes_are_those_that_depend_on_an_argument():
    play = recorded(lambda arrays: [mx.abs(arrays[0] * (mx.array(2.0) + 3)), arrays[1]])
    assert play.nodes == []
    play([mx.array(1.0), mx.array(1.0)])
    assert play.nodes == ["Multiply", "Abs"]


def test_a_graph_is_one_node_on_a_processor(tmp_path):
    """Results that are arguments or constants are handed on."""
    x, constant = mx.arange(3), mx.arange(3) + 1
    mx.eval(x, constant)

    def function(arrays):
        x = arrays[0]
        return [x, x * x + x, constant, x * x]

    play = recorded(function)
    for _ in range(2):
        same, both, still, square = play([x])
        mx.export_to_dot(str(tmp_path / "graph"), both, square)
        assert re.findall(r'label ="(\w+)', (tmp_path / "graph").read_text()) == ["Played"]
        out = [a.tolist() for a in (same, both, still, square)]
        assert out == [[0, 1, 2], [0, 2, 6], [1, 2, 3], [0, 1, 4]]
    assert play.nodes == ["Multiply", "Add", "Multiply"]


def test_a_graph_keeps_what_is_its_own_to_itself(tmp_path):
    """Some hundred weights of a round: MLX would note each of them for every result."""
    weights = [mx.arange(3) * n for n in range(20)]  # not evaluated
    play = recorded(lambda arrays: [arrays[0] + weight for weight in weights])
    for start in (1, 2):
        x = mx.array([start, start + 1, start + 2])
        made = play([x])
        mx.export_to_dot(str(tmp_path / "graph"), *made)
        assert (tmp_path / "graph").read_text().count("->") == 1 + len(made)
        assert [a.tolist() for a in made] == [
            [start + i + i * n for i in range(3)] for n in range(20)
        ]
        weights = []  # nobody else has them


def test_operations_of_mlx_run_within_it():
    """Copies, reductions, sorts, scatters, gathers, products: what the definitions are made of."""

    def function(arrays):
        x, ids = arrays
        turned = mx.swapaxes(x, 0, 1).reshape(-1)
        best = mx.argpartition(-turned, 5)[:5]
        put = mx.put_along_axis(mx.zeros(48), ids, turned[:4], axis=0)
        whole, rest = mx.divmod(x, mx.array(0.25))
        return [
            mx.sort(turned)[::2] + 1,
            mx.softmax(x @ x.T, axis=-1).astype(mx.bfloat16),
            mx.concatenate([turned, put, mx.take(turned, mx.sort(best))]),
            mx.logsumexp(x, axis=0) * mx.cumsum(x, axis=1)[:6],
            mx.where(x > 0, whole, rest).view(mx.uint32),
            mx.dequantize(*mx.quantize(mx.concatenate([turned, put[:16]])[None], 64, 8), 64, 8),
        ]

    play = recorded(function)
    for seed in range(3):
        x = mx.random.normal((6, 8), key=mx.random.key(seed))
        given = [x, mx.array([3, 1, 40, 7])]
        for got, want in zip(play(given), function(given), strict=True):
            assert got.dtype == want.dtype and mx.array_equal(got, want)


def test_what_is_not_read_any_more_is_freed_on_the_way():
    def function(arrays):
        x = arrays[0]
        for _ in range(1000):
            x = ops.rms_norm(x, None)
        return [x]

    play, x = recorded(function), mx.ones((256, 1024))
    mx.eval(play([x]))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(play([x]))
    # A hundred tasks of ten ahead of the thread, 32 arrays that wait to be freed: not a thousand
    assert mx.get_peak_memory() - before < 300 * x.nbytes


def test_the_error_of_a_node_comes_through_and_leaves_the_function_usable():
    def function(arrays):
        x, arena, pages = arrays
        for _ in range(50):
            x = ops.rms_norm(x, None)
        return [x, ops.copy_pages(arena, pages[:1], pages[1:])]

    play, pages = recorded(function), mx.array([1, 0])
    x, arena = mx.ones((512, 512)), mx.zeros((2, 1, 64, 4))
    arena[1] = 1
    for strided in (True, False, True):
        given = arena[..., ::2] if strided else mx.contiguous(arena[..., ::2])
        mx.eval(given)
        if strided:
            with pytest.raises(RuntimeError, match="contiguous"):
                mx.eval(play([x, given, pages]))
        else:
            assert play([x, given, pages])[1].sum().item() == 2 * 64 * 2


def test_graphs_of_shapes_that_do_not_come_back_are_dropped():
    play, runs = counting(lambda arrays: [arrays[0] + 1])
    for length in range(1, 50):
        for _ in range(2):
            assert play([mx.zeros(length)])[0].shape == (length,)
    assert len(runs) == 49 and play.tapes == 4
    play([mx.zeros(46)])
    assert len(runs) == 49
    play([mx.zeros(1)])
    assert len(runs) == 50


def test_several_results_siblings_and_arguments_handed_through():
    def function(arrays):
        h, x = ops.residual_norm(*arrays, arrays[0][0], next_weight=arrays[1][0], eps=1e-6)
        whole, rest = mx.divmod(x, mx.array(0.25))
        return [rest, arrays[1], x, h, whole, x]

    play, runs = counting(function)
    for seed in range(3):
        given = [mx.random.normal((4, 64), key=mx.random.key(2 * seed + i)) for i in range(2)]
        for got, want in zip(play(given), function(given), strict=True):
            assert (bits(got) == bits(want)).all()
    assert len(runs) == 1


def test_what_depends_on_no_argument_is_computed_once():
    play = recorded(lambda arrays: [arrays[0] + mx.random.uniform(shape=(4,))])
    first, second = (play([mx.zeros(4)])[0].tolist() for _ in range(2))
    assert first == second and len(set(first)) == 4


def test_an_argument_must_not_be_read_from_elsewhere():
    x = mx.arange(3)
    play = recorded(lambda arrays: [arrays[0] + (x + 1)])
    with pytest.raises(ValueError, match=r"\[recorded\] function must read its arguments but got"):
        play([x])


def test_a_function_that_evaluates_is_refused():
    play = recorded(lambda arrays: [arrays[0] * arrays[0].sum().item()])
    with pytest.raises(RuntimeError, match="without a primitive"):
        play([mx.arange(3)])


def test_errors_of_the_function_come_through_and_leave_it_usable():
    fails = [True]

    def function(arrays):
        if fails.pop():
            raise KeyError("once")
        return [arrays[0] + 1]

    play = recorded(function)
    with pytest.raises(KeyError, match="once"):
        play([mx.array(1)])
    fails.append(False)
    assert play([mx.array(1)])[0].item() == 2


def test_each_thread_records_for_itself():
    play, runs = counting(lambda arrays: [arrays[0] * 3])
    out = []
    for value in (2, 3):
        thread = threading.Thread(
            target=lambda v: out.append(play([mx.array(v)])[0].item()), args=[value]
        )
        thread.start()
        thread.join()
    assert out == [6, 9] and play([mx.array(1)])[0].item() == 3
    assert len(runs) == 3


def texts(pair, flavour: str, monkeypatch: pytest.MonkeyPatch, **changes) -> list[list[int]]:
    """The tokens of a generation, recorded and not."""
    out = []
    for replacement in (recorded, lambda function: function):
        with monkeypatch.context() as patch:
            patch.setattr(on_device, "recorded", replacement)
            rounds = decode(
                pair.target, pair.assistant, greedy_text(flavour)[:9], max_tokens=24, **changes
            )
            out.append([token for r in rounds for token in r.tokens])
    return out


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(seed=3, verify="block", repetition_penalty=1.3, presence_penalty=0.5),
        Sampling(seed=4, verify="coupled", top_k=0, logprobs=2, suppress_tokens=(3,)),
    ],
    ids=["greedy", "penalties", "dense"],
)
def test_rounds_are_the_same_recorded_or_not(flavour, block_size, sampling, monkeypatch):
    pair = tiny_pair(flavour, "bfloat16-q8")
    a, b = texts(pair, flavour, monkeypatch, sampling=sampling, block_size=block_size)
    assert a == b and len(a) == 24


@pytest.mark.native("counts nodes of the native ops")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_plain_step_is_made_of_our_ops(flavour, monkeypatch):
    """What else it has costs as much a node: at most this, whatever the number of experts."""
    pair, played = tiny_pair(flavour, "bfloat16-q8"), []
    monkeypatch.setattr(
        on_device, "recorded", lambda function: played.append(recorded(function)) or played[-1]
    )
    list(decode(pair.target, None, [5, 6], sampling=Sampling(), block_size=1, max_tokens=2))
    ours = {row["op"] for row in ops.status()}
    others = Counter(name for name in played[0].nodes if name not in ours)
    layers = pair.target.config.layers
    # Heads joined; the length, and as one of many; what the host reads
    allowed = Counter(Reshape=len(layers), Add=1, ExpandDims=1, Concatenate=1)
    allowed["Reshape"] += sum(layer.kv_source != i for i, layer in enumerate(layers))
    if pair.target.config.num_experts:
        allowed += Counter(AsType=len(layers), Add=len(layers))
    if pair.target.config.per_layer_width:
        allowed += Counter(Multiply=2, Add=1, AsType=1, Reshape=2, Split=1)
    assert others <= allowed, others - allowed


@pytest.mark.parametrize("block_size", [1, 5])
def test_a_generation_builds_one_round_until_its_cache_grows(block_size, monkeypatch):
    pair, calls = tiny_pair("dense31"), []
    forward = pair.target.forward
    monkeypatch.setattr(pair.target, "context", 4096)
    monkeypatch.setattr(pair.target, "forward", lambda *args: calls.append(1) or forward(*args))
    for length, built in ((40, 1), (600, 2)):
        calls.clear()
        rounds = decode(
            pair.target,
            pair.assistant,
            greedy_text("dense31")[:9],
            sampling=Sampling(temperature=0.0),
            block_size=block_size,
            max_tokens=length,
        )
        assert sum(len(r.tokens) for r in rounds) == length
        assert len(calls) == built


def test_nothing_is_kept_after_a_generation(monkeypatch):
    pair = tiny_pair("uni12")
    caches = []
    new_cache = pair.target.new_cache
    monkeypatch.setattr(pair.target, "new_cache", lambda: caches.append(new_cache()) or caches[-1])
    for _ in decode(
        pair.target, pair.assistant, [5], sampling=Sampling(), block_size=3, max_tokens=9
    ):
        pass
    assert len(caches) == 1
    kept = weakref.ref(caches.pop())
    gc.collect()
    assert kept() is None
