"""Logits: made when asked for, and the engine's text is the same without them."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from models import decode
from one_text import filter_alone
from tiny_pairs import greedy_text, tiny_pair

from pyengine import ops
from pyengine.model.head import Logits, whole
from pyengine.model.linear import Linear
from pyengine.sampling.sampler import Sampler, logprobs
from pyengine.sampling.settings import Sampling

SETTINGS = {
    "greedy": Sampling(temperature=0.0),
    "sampled": Sampling(temperature=0.4, seed=3),
    "penalties": Sampling(
        temperature=0.4, repetition_penalty=1.2, presence_penalty=0.3, logit_bias={7: 2.0}, seed=0
    ),
    "coupled": Sampling(verify="coupled", seed=0, min_p=0.01, suppress_tokens=(3, 200)),
}


def table(V: int = 300, E: int = 64) -> Linear:
    w, scales, biases = mx.quantize(mx.random.normal((V, E), key=mx.random.key(0)), 64, 8)
    return Linear(w, scales, biases, 8, 64)


def operations(arrays: list[mx.array], tmp_path) -> str:
    """The graph behind arrays that are not evaluated yet."""
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), *arrays)
    return path.read_text()


def test_candidates_need_no_logits(tmp_path) -> None:
    logits = Logits(mx.random.normal((3, 64), key=mx.random.key(1)), table(), 30.0)
    assert logits.shape == (3, 300) == logits.array.shape and logits.array is logits.array
    for sampling in SETTINGS.values():
        sampler, drafts = Sampler(sampling, [5, 9], 300), mx.array([5, 7], dtype=mx.int32)
        out = filter_alone(sampler, logits, drafts)
        graph = operations(list(out), tmp_path)
        assert "quantized_filter_logits" in graph
        assert "quantized_matmul" not in graph and "softcap" not in graph
        want = filter_alone(sampler, logits.array, drafts)
        for a, b in zip(out, want, strict=True):
            assert np.array_equal(np.array(a.view(mx.uint32)), np.array(b.view(mx.uint32)))


def test_logits_are_made_where_all_are_wanted(tmp_path) -> None:
    """Without top-k, and where there is no such op for the matrix."""
    x = mx.random.normal((3, 64), key=mx.random.key(1))
    waiting, dense = Logits(x, table(), 30.0), Logits(x, Linear(table().values()))
    cases = [
        (waiting, Sampling(top_k=0), "quantized_matmul"),
        (dense, Sampling(), "dense_matmul"),
    ]
    for logits, sampling, product in cases:
        graph = operations(list(filter_alone(Sampler(sampling, [], 300), logits)), tmp_path)
        assert product in graph and "quantized_filter_logits" not in graph
    tokens = mx.array([1, 2, 3])
    want = logprobs(waiting.array, tokens, 2)
    assert mx.array_equal(logprobs(waiting, tokens, 2), want)
    assert whole(x) is x and whole(waiting) is waiting.array


def text(pair, flavour: str, sampling: Sampling, block_size: int) -> list[int]:
    prompt = greedy_text(flavour)[:21]
    assistant = pair.assistant if block_size > 1 else None
    rounds = decode(
        pair.target, assistant, prompt, sampling=sampling, block_size=block_size, max_tokens=24
    )
    return [token for r in rounds for token in r.tokens]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("flavour", "form"), [("dense31", "bfloat16-q8"), ("e2b", "float32-q8"), ("uni12", "float32")]
)
def test_engine_text_is_that_of_whole_logits(flavour, form, name, monkeypatch) -> None:
    pair, sampling = tiny_pair(flavour, form), SETTINGS[name]
    made = 0
    filter_whole = ops.filter_logits

    def count(logits: mx.array, **settings: object) -> object:
        nonlocal made
        made += 1
        return filter_whole(logits, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "filter_logits", count)
    fused = {block_size: text(pair, flavour, sampling, block_size) for block_size in (1, 4)}
    if form == "bfloat16-q8":  # e2b's assistant looks at some clusters only, uni12 is not packed
        assert made == 2  # the first token of each text, after the prefill
    made = 0
    monkeypatch.setattr(
        Logits, "filter", lambda self, **settings: ops.filter_logits(self.array, **settings)
    )
    for block_size, tokens in fused.items():
        assert text(pair, flavour, sampling, block_size) == tokens
    assert made >= 7  # first tokens, a plain round, three drafts and their target: each built once
    monkeypatch.undo()
    with_logprobs = replace(sampling, logprobs=1)
    assert text(pair, flavour, with_logprobs, 4) == fused[4]
