"""Keys and values of a prompt are counted before it is processed, and those of an answer as it
grows."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from pyengine.chat import Chat
from pyengine.checkpoint import memory
from pyengine.checkpoint.pair import Pair, load
from pyengine.checkpoint.weights import target_layout
from pyengine.engine.prefix import Prefix
from pyengine.engine.score import score
from pyengine.generation import generate, stream
from pyengine.model import cache as cache_module
from pyengine.model.cache import window_pages
from pyengine.model.config import LayerConfig, Rope, TargetConfig
from pyengine.model.linear import Linear, Weights
from pyengine.model.memory import cache_bytes, prompt_bytes
from pyengine.model.target import Target
from pyengine.ops import dispatch

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load()


@pytest.fixture(scope="module")
def long(pair: Pair) -> list[int]:
    code = "\n".join(f"value_{i} = {i * i % 97}" for i in range(800))
    return pair.tokenizer.encode(code, bos=True)[:4000]


def with_free(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: free)


def fitting(text: str) -> int:
    return int(re.search(r"; (\d+) fit\.$", text)[1])  # type: ignore[index]


@pytest.mark.parametrize("tokens", [600, 2000, 4000])
def test_the_estimate_is_near_what_is_measured(pair: Pair, long: list[int], tokens: int) -> None:
    cache = pair.target.new_cache()
    before = mx.get_active_memory() - cache.nbytes
    mx.reset_peak_memory()
    pair.target.prefill(long[:tokens], cache)
    measured = mx.get_peak_memory() - before
    assert 0.75 < pair.target.prompt_bytes(tokens, 8, 0) / measured < 1.5
    # Of that the cache alone is known to a page
    spare = sum(cache.arena.page_bytes(kind) for kind in (False, True))
    assert 0 <= cache_bytes(pair.target.config, tokens, 8, 2) - cache.nbytes <= spare


def test_scores_of_plain_mlx_are_counted(pair: Pair) -> None:
    from pyengine import ops

    with_ours = pair.target.prompt_bytes(8000, 8, 0)
    ops.use("reference")
    try:
        more = pair.target.prompt_bytes(8000, 8, 0) - with_ours
    finally:
        ops.use("native")
    assert more == 3 * 4 * pair.target.config.num_heads * 512 * 8192


def like_the_31b() -> Target:
    """Its proportions at a sixteenth of its widths, a sliding and a full layer."""
    layers = tuple(LayerConfig(i == 0, 256 << i, 1, 1280, i, i == 1) for i in (0, 1))
    rope = Rope(1e4, 1.0, 1.0)
    shape: dict[str, Any] = {"hidden_size": 320, "num_heads": 2, "window": 256, "eps": 1e-6}
    shape |= {"context_limit": 10**6, "rope_sliding": rope, "rope_full": rope, "eos_ids": ()}
    shape |= {"quantization": None, "softcap": None, "per_layer_width": 0, "num_experts": 0}
    shape |= {"model_type": "", "vocab_size": 64, "num_experts_used": 0, "expert_width": 0}
    config = TargetConfig(layers=layers, **shape)
    layout = target_layout(config)
    matrices = {n: Linear(mx.full(s, 0.01, mx.bfloat16)) for n, s in layout.matrices.items()}
    vectors = {n: mx.ones(s, mx.bfloat16) for n, s in layout.vectors.items()}
    return Target(config, Weights(matrices, vectors, mx.bfloat16))


def test_a_gpus_whole_chunks_take_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on the processor under a GPU's rules; MLX runs further ahead in deeper models."""
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    model = like_the_31b()
    cache = model.new_cache()
    before = mx.get_active_memory() - cache.nbytes
    mx.reset_peak_memory()
    model.prefill([5] * 1024, cache)
    measured = mx.get_peak_memory() - before
    assert measured < model.prompt_bytes(1024, 8, 0) < 3 * measured


def test_a_gpus_attention_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the length of the prompt, and only where there is a whole chunk. By hand: 8 heads of
    width 256, 512 rows, 512 keys: 4 MiB of rows and 8 of scores, 2 of keys of 4 heads."""
    model = like_the_31b()
    narrow = replace(model.config, num_heads=8, layers=(LayerConfig(True, 256, 4, 64, 0, False),))
    ours = [prompt_bytes(narrow, n, 8, 0, 2) for n in (511, 512, 4096)]
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    gpu = [prompt_bytes(narrow, n, 8, 0, 2) for n in (511, 512, 4096)]
    rows = 24 * 2048 * 2  # bytes for each row of a call
    window = [window_pages(narrow.window, n) for n in (511, 128)]
    pages = (min(9, window[0]) - min(9, window[1])) * 2 * 4 * 64 * 256 * 2
    assert gpu[0] == ours[0] - (511 - 128) * rows - pages  # calls of 128 rows
    tile = 6 * (4 + 8 + 2) * 2**20
    assert [a - b for a, b in zip(gpu[1:], ours[1:], strict=True)] == [tile - 512 * rows] * 2


def test_a_prompt_that_does_not_fit_is_refused_with_what_fits(
    pair: Pair, long: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is exact: so many tokens pass the check, and one more does not."""
    free = pair.target.prompt_bytes(2500, 4, 0)
    with_free(monkeypatch, free)
    calls: list[Any] = []
    monkeypatch.setattr(type(pair.target), "prefill", lambda *args, **_: calls.append(args))
    with pytest.raises(ValueError) as error:
        generate(long, pair=pair)
    assert not calls
    count, text = fitting(str(error.value)), str(error.value)
    needed = pair.target.prompt_bytes(4000, 4, 0)
    assert text == (
        f"[generate] prompt must fit the free memory of {free / 1e9:.2f} GB but got 4000 tokens, "
        f"which need {needed / 1e9:.2f} GB; {count} fit."
    )
    assert 2500 <= count < 4000
    memory.check_prompt(pair.target, count, None, 4)
    with pytest.raises(ValueError, match=f"got {count + 1} tokens"):
        memory.check_prompt(pair.target, count + 1, None, 4)
    for call in (
        lambda: score(pair, long, [5]),
        lambda: list(stream(long, pair=pair, prefix=Prefix())),
        lambda: list(Chat(pair).ask(pair.tokenizer.decode(long))),
    ):
        with pytest.raises(ValueError, match=r"\[generate\] prompt must fit the free memory"):
            call()
    with_free(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"free memory of 0\.00 GB .*; 0 fit\."):
        generate([5], pair=pair)


def test_room_that_was_asked_for_counts_and_none_does_not(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without max_tokens the whole context need not fit: the cache grows with the answer."""
    with_free(monkeypatch, pair.target.prompt_bytes(600, 4, 0))
    ask: dict[str, Any] = {"pair": pair, "sampling": GREEDY, "block_size": 4}
    assert generate([5] * 9, max_tokens=500, **ask).tokens
    with pytest.raises(ValueError, match=r"\] prompt and max_tokens must fit .* got 3009 tokens"):
        generate([5] * 9, max_tokens=3000, **ask)
    # More than the context holds is not asked for
    with_free(monkeypatch, pair.target.prompt_bytes(pair.target.context, 4, 0))
    assert list(zip(range(3), stream([5] * 9, max_tokens=10**9, **ask), strict=False))
    with_free(monkeypatch, pair.target.prompt_bytes(600, 4, 0))
    assert list(zip(range(3), stream([5] * 9, **ask), strict=False))


def test_what_a_prefix_holds_is_free_for_its_next_prompt(
    pair: Pair, long: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = Prefix()
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 4, "sampling": GREEDY, "block_size": 4}
    cold = generate(long, **ask)
    generate(long, prefix=prefix, **ask)
    needed = pair.target.prompt_bytes(len(long) + 4, 4, Prefix().marks)
    with_free(monkeypatch, needed - prefix.nbytes)
    warm = generate(long, prefix=prefix, **ask)
    assert warm.tokens == cold.tokens and warm.stats.reused_tokens == len(long) - 1
    # What is refused leaves the prefix as it was
    with_free(monkeypatch, needed - prefix.nbytes - 1)
    with pytest.raises(ValueError, match="must fit the free memory"):
        generate(long, prefix=prefix, **ask)
    with_free(monkeypatch, None)
    assert generate(long, prefix=prefix, **ask).stats.reused_tokens == len(long) - 1


def test_an_answer_that_outgrows_the_memory_ends_with_the_way_out(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MOST_PAGES", 1)
    prefix = Prefix()
    ask: dict[str, Any] = {"pair": pair, "sampling": {"temperature": 0}, "prefix": prefix}
    suppressed = tuple(pair.generation.stop_ids)
    ask["sampling"] = {"temperature": 0, "suppress_tokens": suppressed}
    running = stream([5] * 500, **ask)
    step = next(running.steps())
    with_free(monkeypatch, 1000)
    with pytest.raises(RuntimeError) as error:
        for step in running.steps():
            assert step.tokens
    assert re.fullmatch(
        r"\[generate\] the answer must fit the free memory but 0\.00 GB more are needed and 0\.00 "
        r"GB there; end other programs, shorten the prompt or set max_tokens\.",
        str(error.value),
    )
    # It has pages of 512 places; the text so far is kept, the keys and values are given back
    assert 4 <= len(running.result.tokens) <= 12 and running.result.text
    assert prefix.nbytes == 0


def test_published_sizes_fit_what_is_written() -> None:
    """The docstring's figures: a mark is a window of the sliding layers, in bfloat16."""
    from pyengine.checkpoint.published import PUBLISHED
    from pyengine.model.config import LayerConfig

    written = {"31B": 0.94, "26B-A4B": 0.24, "12B": 0.38, "E4B": 0.026, "E2B": 0.008}
    assert PUBLISHED.keys() == written.keys()
    for name, ((layers, _, _, kv, _, window, _, _, shared, _), _) in PUBLISHED.items():
        every = 5 if name == "E2B" else 6  # each such layer is full
        sliding = sum(i % every != every - 1 for i in range(layers - shared))
        own = [LayerConfig(True, 256, kv, 1, i, False) for i in range(sliding)]
        config = object.__new__(TargetConfig)
        config.__dict__.update(window=window, layers=tuple(own))
        mark = cache_bytes(config, 10**6, 1, 2) / 1e9
        assert abs(mark / written[name] - 1) < 0.05, name
