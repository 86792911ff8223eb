"""Settings; the filter with its edits against a plain NumPy form; penalties; log-probabilities."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from one_text import filter_alone

from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Chooser, Sampler, logprobs
from pyengine.sampling.settings import Sampling


def filter_numpy(
    row: np.ndarray, s: Sampling, prompt: list[int] | None = None, text: list[int] | None = None
) -> np.ndarray:
    """The definition, one row, float64: probabilities by token id."""
    logits = row.astype(np.float64).copy()
    for token in {*(prompt or []), *(text or [])}:
        up = logits[token] > 0
        logits[token] *= 1 / s.repetition_penalty if up else s.repetition_penalty
    for token in set(text or []):
        logits[token] -= s.presence_penalty + s.frequency_penalty * text.count(token)
    for token, bias in s.logit_bias.items():
        logits[token] += bias
    logits[list(s.suppress_tokens)] = -np.inf
    if s.greedy:
        return np.eye(len(row))[int(np.argmax(logits))]
    logits = logits / np.float32(s.temperature)
    order = sorted(range(len(row)), key=lambda i: (-logits[i], i))[: s.top_k or len(row)]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    if s.top_p < 1:
        p = np.where(np.concatenate([[0], np.cumsum(p)[:-1]]) < s.top_p, p, 0)
    p = np.where(p >= s.min_p * p[0], p, 0)
    out = np.zeros(len(row))
    out[order] = p / p.sum()
    return out


def filtered(logits: np.ndarray | mx.array, s: Sampling) -> Filtered:
    """Rows without a text before them."""
    T, V = logits.shape
    # Nothing is penalised: drafts stand for a number of rows alone
    return filter_alone(Sampler(s, [0], V), mx.array(logits), mx.zeros(T - 1, mx.int32))


def by_id(dist: Filtered, vocab: int) -> np.ndarray:
    out = np.zeros((dist.ids.shape[0], vocab))
    np.put_along_axis(out, np.array(dist.ids), np.array(dist.probs), axis=-1)
    return out


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.3, top_k=0),
    Sampling(top_p=1.0, top_k=0),
    Sampling(top_p=1.0, top_k=7),
    Sampling(top_p=0.3, top_k=1),
    Sampling(min_p=0.2),
    Sampling(temperature=0.0),
    Sampling(suppress_tokens=(3, 90)),
    Sampling(temperature=0.0, suppress_tokens=(3,)),
    Sampling(logit_bias={5: 4.0, 96: -2.0}, suppress_tokens=(96, 0), top_k=0),
]


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_filter_equals_definition(s: Sampling) -> None:
    logits = np.random.default_rng(3).normal(0, 3, (5, 97)).astype(np.float32)
    got = by_id(filtered(logits, s), 97)
    want = np.stack([filter_numpy(row, s) for row in logits])
    assert np.allclose(got, want, atol=2e-6)
    assert np.array_equal(got > 0, want > 0)


def test_filter_breaks_ties_by_lower_id() -> None:
    logits = mx.array([[0.0, 2.0, -0.0, 2.0, 0.0, -5.0]])
    dist = filtered(logits, Sampling(top_k=4, top_p=1.0))
    assert dist.ids.tolist() == [[1, 3, 0, 2]]
    assert filtered(logits, Sampling(temperature=0.0)).ids.tolist() == [[1]]


def test_filter_orders_negative_and_infinite_logits() -> None:
    logits = mx.array([[-3.0, -mx.inf, -1.0, 1e30, -1e-30, 1e-30]])
    dist = filtered(logits, Sampling(top_k=0, top_p=1.0))
    assert dist.ids.tolist() == [[3, 5, 4, 2, 0, 1]]


def test_filter_keeps_first_when_top_p_is_tiny() -> None:
    dist = filtered(mx.array([[1.0, 1.0, 1.0]]), Sampling(top_p=1e-6))
    assert by_id(dist, 3).tolist() == [[1.0, 0.0, 0.0]]


def test_filter_with_one_allowed_token() -> None:
    s = Sampling(suppress_tokens=(0, 1, 3))
    assert by_id(filtered(np.zeros((1, 4), np.float32), s), 4).tolist() == [[0, 0, 1, 0]]


def test_filter_rows_do_not_see_each_other() -> None:
    logits = mx.array(np.random.default_rng(5).normal(0, 2, (6, 300)).astype(np.float32))
    together = filtered(logits, Sampling())
    for i in range(6):
        alone = filtered(logits[i : i + 1], Sampling())
        assert together.ids[i].tolist() == alone.ids[0].tolist()
        assert together.probs[i].tolist() == alone.probs[0].tolist()


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({"temperature": -1.0}, "[sampling] temperature must be 0 or more but got -1.0."),
        ({"temperature": math.nan}, "[sampling] temperature must be 0 or more but got nan."),
        (
            {"temperature": 1e-38},  # logits of 30 divided by it are infinite
            "[sampling] temperature must be 0, which is greedy, or at least 1e-20 but got 1e-38.",
        ),
        ({"top_k": 2.5}, "[sampling] top_k must be a whole number but got 2.5."),
        ({"seed": 1.5}, "[sampling] seed must be a whole number but got 1.5."),
        (
            {"logit_bias": {1: -1e39}},
            "[sampling] logit_bias must be within 1e+09 of 0 but got -1e+39.",
        ),
        (
            {"repetition_penalty": 1e-300},
            "[sampling] repetition_penalty must be 1e-09 to 1e+09 but got 1e-300.",
        ),
        ({"top_p": 0.0}, "[sampling] top_p must be above 0 and at most 1 but got 0.0."),
        ({"top_k": 257}, "[sampling] top_k must be 0 (off) to 256 but got 257."),
        ({"min_p": 1.0}, "[sampling] min_p must be 0 or more and below 1 but got 1.0."),
        ({"seed": 2**32}, "[sampling] seed must be 0 to 4294967295 but got 4294967296."),
        ({"suppress_tokens": (-1,)}, "[sampling] suppress_tokens must be token ids but got -1."),
        (
            {"repetition_penalty": 0.0},
            "[sampling] repetition_penalty must be positive but got 0.0.",
        ),
        (
            {"presence_penalty": math.inf},
            "[sampling] presence_penalty must be finite but got inf.",
        ),
        (
            {"frequency_penalty": math.nan},
            "[sampling] frequency_penalty must be finite but got nan.",
        ),
        ({"logit_bias": {-1: 1.0}}, "[sampling] logit_bias must name token ids but got -1."),
        ({"logit_bias": {1: math.inf}}, "[sampling] logit_bias must be finite but got inf."),
        (
            {"verify": "match"},
            "[sampling] verify must be one of residual, block, coupled but got match.",
        ),
        ({"logprobs": 257}, "[sampling] logprobs must be 0 to 256, or None but got 257."),
    ],
)
def test_settings_are_checked(kw: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        Sampling(**kw)
    assert str(error.value) == text


def test_settings_that_do_not_fit_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError) as error:
        Sampler(Sampling(logit_bias={9: 1.0}), [1], 9)
    assert str(error.value) == (
        "[sampling] suppress_tokens and logit_bias must name ids below 9 but got 9."
    )
    with pytest.raises(ValueError, match="suppress_tokens must leave a token but got all"):
        Sampler(Sampling(suppress_tokens=(0, 1, 2)), [1], 3)


def test_settings_are_ready_for_json() -> None:
    s = Sampling(suppress_tokens=(3,), logit_bias={4: 0.5}, verify="block")
    again = json.loads(json.dumps(s.to_dict()))
    assert again["suppress_tokens"] == [3] and again["logit_bias"] == {"4": 0.5}
    assert again["verify"] == "block"


VOCAB = 40
PENALISED = [
    Sampling(repetition_penalty=1.7),
    Sampling(presence_penalty=0.8),
    Sampling(frequency_penalty=0.6),
    Sampling(frequency_penalty=-0.4, presence_penalty=-0.2),
    Sampling(
        repetition_penalty=0.8,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={3: 1.5, 12: -1.0, 39: 2.0},
        suppress_tokens=(7, 12),
        temperature=0.7,
        top_k=30,
        min_p=0.01,
    ),
]


@pytest.mark.parametrize("s", PENALISED, ids=range(len(PENALISED)))
@pytest.mark.parametrize("seed", range(5))
def test_penalties_count_the_drafts_before_a_row(s: Sampling, seed: int) -> None:
    """Rows of a verify call, and each row alone as a draft step has it, against the definition."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (6, VOCAB)).astype(np.float32)
    prompt, text = rng.integers(0, VOCAB, 8).tolist(), rng.integers(0, VOCAB, 12).tolist()
    drafts = rng.integers(0, VOCAB, 5).tolist()
    drafts[3], drafts[4] = text[0], drafts[0]  # one in the text already, one twice in the block
    sampler = Sampler(s, prompt, VOCAB)
    sampler.add(text[:5])
    sampler.add(text[5:])
    own = mx.array(drafts, dtype=mx.int32)
    block = filter_alone(sampler, mx.array(logits), own)
    for i in range(6):
        want = filter_numpy(logits[i], s, prompt, text + drafts[:i])
        step = filter_alone(sampler, mx.array(logits[i : i + 1]), own[:i], i)
        assert np.allclose(by_id(block, VOCAB)[i], want, atol=2e-6)
        assert block.ids[i].tolist() == step.ids[0].tolist()
        assert block.probs[i].tolist() == step.probs[0].tolist()


def test_drafts_and_committed_tokens_are_penalised_alike() -> None:
    """The same tokens, once in the block and once in the text: equal bits."""
    s = PENALISED[-1]
    logits = mx.array(np.random.default_rng(1).normal(0, 3, (4, VOCAB)).astype(np.float32))
    tokens = [5, 3, 5]
    empty, full = Sampler(s, [2, 9], VOCAB), Sampler(s, [2, 9], VOCAB)
    full.add(tokens)
    block = filter_alone(empty, logits, mx.array(tokens))
    alone = filter_alone(full, logits[3:])
    assert block.ids[3].tolist() == alone.ids[0].tolist()
    assert block.probs[3].tolist() == alone.probs[0].tolist()


def test_lists_grow_in_steps() -> None:
    """Few shapes over a long text."""
    sampler = Sampler(Sampling(presence_penalty=1.0), [1], 1000)
    shapes = set()
    for token in range(200):
        sampler.add([token])
        shapes.add(Chooser.of([sampler]).choices.listed[0].ids.shape)
    assert len(shapes) == 4


def test_nothing_is_listed_where_nothing_is_edited() -> None:
    sampler = Sampler(Sampling(), [1, 2], 10)
    sampler.add([3])
    assert sampler.most_listed == 0 and Chooser.of([sampler]).choices.listed == ()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_of_the_raw_logits(count: int) -> None:
    logits = np.random.default_rng(2).normal(0, 3, (3, 50)).astype(np.float32)
    tokens = [4, 49, 0]
    found = np.array(logprobs(mx.array(logits), mx.array(tokens), count))
    assert found.shape == (3, 1 + 2 * count) and found.dtype == np.int32
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for row, token, want in zip(found, tokens, exact, strict=True):
        assert math.isclose(row[:1].view(np.float32)[0], want[token], abs_tol=1e-5)
        best = np.argsort(-want, kind="stable")[:count]
        assert row[1 : 1 + count].tolist() == best.tolist()
        assert np.allclose(row[1 + count :].view(np.float32), want[best], atol=1e-5)


def test_texts_draw_alike_alone_and_among_others() -> None:
    """Flat distributions, where other noise is another token; neighbours share seeds or rules."""
    rules = ("residual", "coupled", "block", "coupled")
    settings = [Sampling(top_p=1.0, verify=rule, seed=n // 2) for n, rule in enumerate(rules)]
    samplers = [Sampler(s, [1], VOCAB) for s in settings]
    together = Chooser.of(samplers)
    logits = mx.zeros((4, VOCAB))
    rows = together.filter(logits, [0, 1, 2, 3])
    position = mx.array([7, 7, 9, 9], dtype=mx.int32)
    for own in ([0, 1, 2, 3], [1, 2], [0, 3]):
        some = Filtered(*(part[mx.array(own)] for part in rows))
        for i in range(6):
            drawn = together.draw_drafts(some, own, together.draft_position(position), i)
            for token, n in zip(drawn.tolist(), own, strict=True):
                one, row = Chooser.of(samplers[n : n + 1]), Filtered(*(p[n : n + 1] for p in rows))
                at = one.draft_position(position[n : n + 1])
                assert one.draw_drafts(row, [0], at, i).item() == token
                if rules[n] == "coupled":  # the token that plain decoding has there
                    assert one.draw(row, position[n : n + 1], i + 1).item() == token
