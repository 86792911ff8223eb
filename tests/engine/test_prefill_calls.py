"""What made a position's keys and values is the same whether or not a prefix was reused.

A GPU's rules are forced on the processor: whole chunks run MLX's kernels there too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import bits, tiny_pair

from pyengine.engine.prefill import prefill
from pyengine.engine.prefix import Prefix
from pyengine.engine.score import score
from pyengine.model import plan, target
from pyengine.model.cache import Cache
from pyengine.model.config import LayerConfig, Rope, TargetConfig
from pyengine.model.linear import Linear
from pyengine.ops import dispatch
from pyengine.ops.prepare_qkv import PAGE

BLOCK, WINDOW, CHUNK, ROWS = 3, 12, 64, 16
OWN = 1  # what the maker of a position is called where our kernels made it
LAYERS = tuple(LayerConfig(sliding, 16, 1, 16, i, False) for i, sliding in enumerate((True, False)))


class Scribe(target.Target):
    """A target whose keys are a checksum of the tokens so far and of what made each of them, taken
    from what the cache holds of the position before."""

    def __init__(self) -> None:
        rope = Rope(1e4, 1.0, 1.0)
        shape: dict[str, Any] = {"hidden_size": 16, "num_heads": 1, "window": WINDOW, "eps": 1e-6}
        shape |= {"context_limit": 10**6, "rope_sliding": rope, "rope_full": rope, "eos_ids": ()}
        shape |= {"quantization": None, "softcap": None, "per_layer_width": 0, "num_experts": 0}
        shape |= {"model_type": "", "vocab_size": 8, "num_experts_used": 0, "expert_width": 0}
        self.config = TargetConfig(layers=LAYERS, **shape)
        self.dtype, self.context = mx.float32, 10**6
        self.table = Linear(mx.arange(8)[:, None] * mx.ones((8, 16)) / 64)

    def _hidden(self, each: Any, caches: Any, taps: Any = (), **none: Any) -> Any:
        [ids], [cache] = each, caches
        start, count = cache.length_limit, ids.size
        (call,) = plan.plan(start, start + count, True) if count > ROWS else [None]
        maker = OWN if call is None else 7 + 3 * call.start + call.rows
        cache.reserve(count)
        values = sums(ids.tolist(), [maker] * count, held(cache, 1, start - 1, start))  # type: ignore[arg-type]
        # A window behind the call must be there, as the full layer has it
        behind = max(0, start - WINDOW + 1)
        assert held(cache, 0, behind, start) == held(cache, 1, behind, start)
        for i in (0, 1):
            keys = np.array(cache.arena.slots(i)[0])
            for position, value in enumerate(values, start):
                keys[pages(cache, i)[position // PAGE], 0, position % PAGE] = value
            cache.arena.store(i, mx.array(keys), mx.array(keys))
        x = mx.array(values, dtype=mx.float32)[:, None] * mx.ones((1, 16)) / 2**20
        return x, x


def sums(tokens: list[int], makers: list[int], before: list[float]) -> list[float]:
    last, made = int(before[0]) if before else 5, []
    for token, maker in zip(tokens, makers, strict=True):
        last = (last * 31 + token * 7 + maker * 1009) % (1 << 20)
        made.append(float(last))
    return made


def pages(cache: Cache, i: int) -> dict[int, int]:
    return dict(enumerate(cache.full)) if i else cache.sliding


def held(cache: Cache, i: int, first: int, end: int) -> list[float]:
    keys, own = np.array(cache.arena.slots(i)[0]), pages(cache, i)
    return [float(keys[own[p // PAGE], 0, p % PAGE, 0]) for p in range(max(0, first), end)]


def expected(tokens: list[int], stop: int) -> list[float]:
    """The keys of a text whose first ``stop`` tokens were a prompt, by its plan alone."""
    makers = []
    for call in plan.plan(0, stop, True):
        mlx = call.kernel == "mlx"
        makers += [7 + 3 * call.start + call.rows if mlx else OWN] * call.rows
    return sums(tokens, makers + [OWN] * (len(tokens) - stop), [])


def small_gpu() -> Any:
    """A GPU's rules with small chunks."""
    return mock.patch.multiple(plan, CHUNK=CHUNK, ROWS=ROWS), mock.patch.object(
        dispatch, "_gpu_rules", True
    )


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    """What is asked one after the other: how the next text is made of the last one, where it is
    cut, how long it grows, and how many tokens are answered."""
    kind = st.sampled_from(["extend", "edit", "same", "left", "score", "other"])
    place, answer = st.integers(0, 400), st.integers(0, 80)
    step = st.tuples(kind, place, st.integers(1, 200), answer)
    return draw(st.lists(step, min_size=2, max_size=7))


@settings(deadline=None, max_examples=60)
@given(history=histories())
def test_keys_are_those_of_a_cold_start(history: list[tuple[str, int, int, int]]) -> None:
    model, prefix, text = Scribe(), Prefix(), [3]
    pair: Any = SimpleNamespace(target=model)
    chunks, rules = small_gpu()
    with chunks, rules, mock.patch.object(target, "ROWS", ROWS):
        for number, (kind, place, more, answer) in enumerate(history):
            if kind in ("edit", "score"):
                text = text[: 1 + place % len(text)]
            if kind == "other":
                text = [7 - number]
            if kind != "same":
                text = [*text, *((number + i * i) % 8 for i in range(more))]
            if kind == "score":
                first = 1 + place % len(text)
                warm = score(pair, text[:first], text[first:], prefix=prefix)
                assert warm == score(pair, text[:first], text[first:])
                count = stop = len(text) - 1
            else:
                with prefix.in_use():
                    cache, known = prefix.open(model, text)
                    running = prefill(model, text, cache, known, prefix)
                    steps = 1 if kind == "left" else 10**6
                    done = [at.done for _, at in zip(range(steps), running, strict=False)]
                    running.close()  # type: ignore[attr-defined]
                    count, stop = done[-1], len(text)
                    while count >= stop and answer > 0:
                        block = [(count + i) % 8 for i in range(BLOCK)]
                        model.forward([mx.array(block)], [cache])
                        kept = 1 + answer % BLOCK
                        cache.settle(count + kept)
                        text, count, answer = [*text, *block[:kept]], count + kept, answer - kept
                    if count >= stop:
                        prefix.keep(text)
            assert prefix._known is not None
            cache, known = prefix._known.begin([*text[:count], 0], stop)
            assert known == count
            assert held(cache, 1, 0, count) == expected(text[:count], min(stop, count))
            behind = max(0, count - WINDOW + 1)
            assert held(cache, 0, behind, count) == held(cache, 1, behind, count)
            cache.release()


def test_what_is_reused_by_hand() -> None:
    """A chunk is 64. What MLX's kernels made is reused by chunks, what ours made while the whole
    chunks of both prompts are the same."""
    model, prefix = Scribe(), Prefix()
    text = [i * i % 8 for i in range(800)]
    chunks, rules = small_gpu()
    with chunks, rules:
        for length, reused in (
            (160, 0),
            (160, 159),  # its end was made by our kernels
            (180, 160),  # no other whole chunk
            (200, 128),  # from 128 to 192 it is MLX's turn now
            (280, 192),
            (256, 192),  # its last token is needed, and comes with its chunk
            (300, 280),
            (284, 284 - 1),
        ):
            cache, known = prefix.open(model, text[:length])
            for _ in prefill(model, text[:length], cache, known, prefix):
                pass
            assert known == reused, length
            prefix.keep(text[:length])
        # Of a scored text the calls go by its end: of all but the first 64, MLX's made up to 192
        pair: Any = SimpleNamespace(target=model)
        score(pair, text[400:480], text[480:640], prefix=prefix)
        assert prefix.open(model, text[400:520])[1] == 64


@pytest.mark.parametrize("flavour", ["e2b", "moe26"])
def test_bits_with_a_gpus_rules(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing: logits and keys after a chat, an edit and a repeat are a cold start's, and
    MLX's kernels see whole chunks alone."""
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    real, counts = mx.quantized_matmul, set()

    def spy(x: mx.array, *args: Any) -> mx.array:
        counts.add(x.size // x.shape[-1])
        return real(x, *args)

    monkeypatch.setattr(mx, "quantized_matmul", spy)
    model, prefix = tiny_pair(flavour, "float32-q8").target, Prefix()
    text = [5 + i * i * 7 % 250 for i in range(1100)]
    for length, reused in ((530, 0), (535, 530), (1026, 512), (1025, 1024), (520, 519)):
        cache, known = prefix.open(model, text[:length])
        assert known == reused
        *_, last = prefill(model, text[:length], cache, known, prefix)
        cold = model.new_cache()
        logits, _ = model.prefill(text[:length], cold)
        assert (bits(last.logits) == bits(logits)).all(), length
        full = model.config.last_source(False)
        ours, theirs = (bits(c.arena.slots(full)[0])[c.full] for c in (cache, cold))
        for a, b in zip(in_a_row(ours, length), in_a_row(theirs, length), strict=True):
            assert (a == b).all(), length
        prefix.keep(text[:length])
        counts -= {0}
    assert counts == {512}


def in_a_row(pages: np.ndarray, length: int) -> np.ndarray:
    """What is in pages, by position."""
    return pages.swapaxes(1, 2).reshape(-1, *pages.shape[1:2], pages.shape[3])[:length]


def test_scores_with_a_gpus_rules_do_not_go_by_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scored text is processed as a whole, wherever its context ends."""
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    pair: Any = tiny_pair("dense31", "float32-q8")
    monkeypatch.setattr(pair.target, "context", 4096)
    text, prefix = [5 + i * i * 7 % 250 for i in range(530)], Prefix()
    want, _ = score(pair, text[:300], text[300:])
    for first in (500, 520):
        assert score(pair, text[:first], text[first:], prefix=prefix)[0] == want[first - 300 :]
