"""The round and its loop, without weights: Markov tables stand for target and assistant."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from models import decode
from one_text import filter_alone
from scipy import stats as scipy_stats
from text_fakes import LengthCache

from pyengine.engine import rounds, sequence
from pyengine.engine.sequence import Round
from pyengine.engine.stats import Stats
from pyengine.model.target import Processed, Reader
from pyengine.ops.accept_block import RULES, Rule
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Chooser, Sampler
from pyengine.sampling.settings import Sampling

pytestmark = pytest.mark.engine

GREEDY = Sampling(temperature=0.0)
VOCAB = 16


class MarkovTarget:
    """Logits depend on the last token alone."""

    waiting = staticmethod(nullcontext)  # for nobody

    def __init__(self, table: np.ndarray, context: int = 10_000) -> None:
        self.table, self.context = mx.array(table.astype(np.float32)), context
        self.cache = LengthCache()

    def embed(self, ids: mx.array) -> mx.array:
        return ids.astype(mx.float32)[:, None]

    def new_cache(self) -> LengthCache:
        self.cache = LengthCache()
        return self.cache

    def prefill(
        self, ids: list[int], cache: LengthCache, *, reader: Reader | None = None
    ) -> tuple[mx.array, mx.array]:
        cache.commit(mx.array(len(ids), mx.int32), len(ids))
        hidden = mx.array([[float(ids[-1])]])
        if reader is not None:
            reader.read([reader], [Processed(hidden, mx.array(0, mx.int32), cache)])
        return self.table[ids[-1]], hidden

    def forward(
        self, ids: list[mx.array], caches: list[LengthCache], taps: tuple[int, ...] = ()
    ) -> tuple[mx.array, mx.array]:
        tokens = mx.concatenate(ids)
        return self.table[tokens], self.embed(tokens)


class MarkovAssistant:
    def __init__(self, table: np.ndarray) -> None:
        self.table = mx.array(table.astype(np.float32))

    def forward(self, embedding: mx.array, hidden: mx.array, caches: object) -> tuple:
        return self.table[embedding[:, 0].astype(mx.int32)], embedding


class ScriptedAssistant:
    """Knows the target's greedy table and errs at every draft of a round from ``right`` on."""

    def __init__(self, table: np.ndarray, k: int, right: int) -> None:
        self.table, self.k, self.right, self.calls = table, k, right, 0

    def forward(self, embedding: mx.array, hidden: mx.array, caches: object) -> tuple:
        depth, self.calls = self.calls % self.k, self.calls + 1
        table = self.table if depth < self.right else np.roll(self.table, 1, axis=-1)
        return mx.array(table.astype(np.float32))[embedding[:, 0].astype(mx.int32)], embedding


def random_table(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (vocab, vocab))


def run(target: MarkovTarget, assistant: object, prompt: list[int], **kw: object) -> tuple:
    stats = Stats()
    rounds = list(decode(target, assistant, prompt, stats=stats, **kw))  # type: ignore[arg-type]
    return [t for r in rounds for t in r.tokens], rounds, stats


@pytest.mark.short
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("right", [0, 1, 2, 3, 5])
def test_scripted_assistant_gives_that_count(k: int, right: int) -> None:
    right = min(right, k)
    table = random_table(1)
    tokens, rounds, stats = run(
        MarkovTarget(table),
        ScriptedAssistant(table, k, right),
        [2],
        sampling=GREEDY,
        block_size=k + 1,
        max_tokens=1 + 4 * (right + 1) + k + 1,
    )
    full = [r for r in rounds[1:] if r.num_drafted == k]
    assert len(full) >= 4 and all(r.num_accepted == right for r in full)
    assert all(len(r.tokens) == right + 1 for r in full[:-1])
    want, token = [], 2
    for _ in tokens:
        token = int(table[token].argmax())
        want.append(token)
    assert tokens == want
    assert stats.generated_tokens == len(tokens)


@pytest.mark.parametrize("block_size", [2, 3, 4, 8, 17, 40, 128])
def test_greedy_equals_plain_at_every_block_size(block_size: int) -> None:
    target, assistant = MarkovTarget(random_table(1)), MarkovAssistant(random_table(2))
    kw = {"sampling": GREEDY, "max_tokens": 60}
    plain, _, _ = run(target, None, [5, 3], block_size=1, **kw)
    assert run(target, assistant, [5, 3], block_size=block_size, **kw)[0] == plain
    assert len(plain) == 60


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    target, assistant = MarkovTarget(random_table(1)), MarkovAssistant(random_table(1))
    for block_size in (1, 4):
        a, b, c = (
            run(
                target,
                assistant,
                [1],
                sampling=Sampling(seed=seed),
                block_size=block_size,
                max_tokens=40,
            )[0]
            for seed in (3, 3, 4)
        )
        assert a == b != c


def test_stats_count_what_happened() -> None:
    target, assistant = MarkovTarget(random_table(1)), MarkovAssistant(random_table(1) * 0.7)
    tokens, rounds, stats = run(
        target, assistant, [1, 2, 3], sampling=Sampling(seed=5), block_size=5, max_tokens=101
    )
    real = rounds[1:]
    assert rounds[0] == Round(tokens[:1], None, 0, 0, sources=("first",))
    assert stats.prompt_tokens == 3 and stats.generated_tokens == len(tokens) == 101
    assert stats.rounds == len(real)
    assert stats.drafted == sum(r.num_drafted for r in real) == sum(stats.drafted_by_depth)
    assert stats.accepted == sum(r.num_accepted for r in real) == sum(stats.accepted_by_depth)
    assert 0 < stats.acceptance < 1 and stats.acceptance == stats.accepted / stats.drafted
    by_depth = [sum(r.num_accepted > d for r in real) for d in range(4)]
    assert stats.accepted_by_depth == by_depth
    with_drafts = [r for r in real if r.num_drafted]
    assert stats.bonus_tokens + stats.correction_tokens == len(with_drafts)
    assert stats.bonus_tokens == sum(r.num_accepted == r.num_drafted for r in with_drafts)
    assert stats.tokens_per_round == 100 / stats.rounds
    assert stats.to_dict()["acceptance_by_depth"] == stats.acceptance_by_depth
    assert stats.prefill_s > 0 and stats.decode_s > 0 and stats.tok_s > 0


def test_decode_clock_stops_while_the_caller_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a second later each time it is read; the caller takes a thousand."""
    now, stats, count = iter(range(10**9)), Stats(), 0
    clock = SimpleNamespace(perf_counter=lambda: next(now))
    for module in (rounds, sequence):
        monkeypatch.setattr(module, "time", clock)
    target, assistant = MarkovTarget(random_table(1)), MarkovAssistant(random_table(1))
    for _ in decode(
        target, assistant, [1], sampling=GREEDY, block_size=2, max_tokens=7, stats=stats
    ):
        count += 1
        for _ in range(1000):
            next(now)
    # The first token is the prefill's
    assert stats.prefill_s == 1 and stats.decode_s == stats.rounds == count - 1 > 1


@pytest.mark.parametrize("block_size", [1, 2, 4, 9])
def test_stop_id_ends_the_text_inside_a_block(block_size: int) -> None:
    table = np.eye(VOCAB)[(np.arange(VOCAB) + 1) % VOCAB] * 9  # counts up
    target, assistant = MarkovTarget(table), MarkovAssistant(table)
    tokens, rounds, _ = run(
        target,
        assistant,
        [0],
        sampling=GREEDY,
        block_size=block_size,
        max_tokens=50,
        stop_ids=frozenset({7, 12}),
    )
    assert tokens == [1, 2, 3, 4, 5, 6, 7] and rounds[-1].finish_reason == "stop"


@pytest.mark.parametrize("block_size", [1, 2, 4, 9])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 11])
def test_max_tokens_is_kept_to(block_size: int, max_tokens: int) -> None:
    table = random_table(1)
    tokens, rounds, _ = run(
        MarkovTarget(table),
        MarkovAssistant(table),
        [0],
        sampling=GREEDY,
        block_size=block_size,
        max_tokens=max_tokens,
    )
    assert len(tokens) == max_tokens and rounds[-1].finish_reason == "length"


@pytest.mark.parametrize("block_size", [1, 4, 9])
def test_context_is_kept_to(block_size: int) -> None:
    table = random_table(1)
    target = MarkovTarget(table, context=20)
    tokens, rounds, _ = run(
        target,
        MarkovAssistant(table),
        [0] * 8,
        sampling=GREEDY,
        block_size=block_size,
        max_tokens=99,
    )
    assert len(tokens) == 12 and rounds[-1].finish_reason == "length"
    assert target.cache.length_limit < 20 + block_size  # a last round may look past the end


def test_cache_bound_follows_the_device_length() -> None:
    target, assistant = MarkovTarget(random_table(1)), MarkovAssistant(random_table(2))
    lengths = []
    for r in decode(
        target, assistant, [1, 2], sampling=Sampling(seed=1), block_size=4, max_tokens=30
    ):
        assert target.cache.length_limit == target.cache.length.item() >= 2, r
        lengths.append(target.cache.length_limit)
    assert len(lengths) > 5 and lengths == sorted(set(lengths))


class Reads:
    """Counts whatever evaluates an array or hands one to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.evaluations, self.reads = 0, 0
        for name in ("eval", "async_eval"):
            monkeypatch.setattr(mx, name, self.counted(getattr(mx, name), "evaluations"))
        names = "item tolist __array__ __bool__ __int__ __float__ __index__ __repr__ __iter__"
        for name in names.split():
            if hasattr(mx.array, name):
                monkeypatch.setattr(mx.array, name, self.counted(getattr(mx.array, name), "reads"))

    def counted(self, real: Callable, what: str) -> Callable:
        def call(*args: object, **kw: object) -> object:
            setattr(self, what, getattr(self, what) + 1)
            return real(*args, **kw)

        return call


EVERYTHING = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.1,
    "logit_bias": {3: 1.0},
    "suppress_tokens": (5,),
    "min_p": 0.01,
    "logprobs": 2,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("kw", [{}, {"temperature": 0.0}, EVERYTHING], ids=["", "greedy", "all"])
def test_one_evaluation_and_one_read_per_round(
    kw: dict, block_size: int, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, assistant = MarkovTarget(random_table(1)), MarkovAssistant(random_table(1))
    reads = Reads(monkeypatch)
    for number, _ in enumerate(
        decode(
            target,
            assistant,
            [1],
            sampling=Sampling(verify=rule, **kw),
            block_size=block_size,
            max_tokens=30,
        ),
        1,
    ):
        assert (reads.evaluations, reads.reads) == (number, number)
    assert number > 5


def test_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter counts: each of these is a read, and would be one too many in a round."""
    reads, a = Reads(monkeypatch), mx.array([1])
    for number, read in enumerate((a.item, a.tolist, lambda: bool(a), lambda: mx.eval(a)), 1):
        read()
        assert reads.reads + reads.evaluations == number


@pytest.mark.parametrize("block_size", [1, 3])
def test_logits_that_are_not_finite_are_refused(block_size: int) -> None:
    table = random_table(1)
    table[int(table[0].argmax())] = np.nan
    with pytest.raises(RuntimeError, match=r"\[decode\] logits must be finite but got NaN"):
        run(
            MarkovTarget(table),
            MarkovAssistant(random_table(1)),
            [0],
            sampling=GREEDY,
            block_size=block_size,
            max_tokens=9,
        )


def test_an_assistant_may_leave_tokens_out_but_not_be_broken() -> None:
    table = random_table(1)
    holes = np.where(random_table(2) > 2, -np.inf, table)
    kw = {"sampling": GREEDY, "max_tokens": 30, "block_size": 4}
    plain, _, _ = run(MarkovTarget(table), None, [0], **{**kw, "block_size": 1})
    assert run(MarkovTarget(table), MarkovAssistant(holes), [0], **kw)[0] == plain
    for value in (np.nan, np.inf):
        with pytest.raises(RuntimeError, match=r"\[decode\] logits must be finite"):
            run(MarkovTarget(table), MarkovAssistant(np.where(holes < -3, value, table)), [0], **kw)


@pytest.mark.parametrize("kw", [{}, {"temperature": 0.6, "top_p": 1.0}, {"top_k": 0}, EVERYTHING])
@pytest.mark.parametrize("block_size", [2, 5, 17])
def test_coupled_text_is_plain_text(block_size: int, kw: dict) -> None:
    kept = set()
    for seed in range(2):
        sampling = Sampling(seed=seed, verify="coupled", **kw)
        target = MarkovTarget(random_table(1))
        plain, rounds, _ = run(target, None, [5, 3], sampling=sampling, block_size=1, max_tokens=60)
        for assistant in (random_table(1) * 0.8, random_table(2)):
            got, blocks, _ = run(
                target,
                MarkovAssistant(assistant),
                [5, 3],
                sampling=sampling,
                block_size=block_size,
                max_tokens=60,
            )
            assert got == plain
            if sampling.logprobs:
                both = ([x for r in some for x in r.logprobs] for some in (rounds, blocks))
                assert next(both) == next(both)
            kept |= {r.num_accepted for r in blocks[1:]}
    assert {0, 1, min(block_size - 1, 3)} <= kept


@pytest.mark.parametrize("rule", RULES)
def test_greedy_is_one_rule(rule: Rule) -> None:
    target, assistant = MarkovTarget(random_table(1)), MarkovAssistant(random_table(1) * 0.9)
    sampling = Sampling(temperature=0.0, verify=rule, frequency_penalty=0.3)
    kw = {"sampling": sampling, "max_tokens": 60}
    plain, _, _ = run(target, None, [5, 3], block_size=1, **kw)
    got, _, stats = run(target, assistant, [5, 3], block_size=4, **kw)
    assert got == plain and stats.accepted > 0
    assert len(set(plain)) > len(set(run(target, None, [5, 3], block_size=1, sampling=GREEDY,
                                         max_tokens=60)[0]))  # fmt: skip


@pytest.mark.parametrize("block_size", [1, 4])
def test_logprobs_of_returned_tokens(block_size: int) -> None:
    table = random_table(1)
    target, assistant = MarkovTarget(table), MarkovAssistant(table * 0.8)
    sampling = Sampling(seed=2, logprobs=3, temperature=0.5, presence_penalty=0.4)
    _, rounds, _ = run(
        target, assistant, [4], sampling=sampling, block_size=block_size, max_tokens=40
    )
    last = 4
    assert sum(len(r.tokens) for r in rounds) == 40
    for r in rounds:
        assert r.logprobs is not None and [x.token for x in r.logprobs] == r.tokens
        for token, found in zip(r.tokens, r.logprobs, strict=True):
            row = table[last] - np.log(np.exp(table[last]).sum())
            assert abs(found.logprob - row[token]) < 1e-5
            assert [i for i, _ in found.top] == np.argsort(-row)[:3].tolist()
            assert np.allclose([v for _, v in found.top], np.sort(-row)[:3] * -1, atol=1e-5)
            last = token


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({"block_size": 0}, "[decode] block_size must be 1 to 128 but got 0."),
        ({"block_size": 129}, "[decode] block_size must be 1 to 128 but got 129."),
        ({"max_tokens": 0}, "[decode] max_tokens must be at least 1 but got 0."),
        ({"prompt": []}, "[decode] prompt must hold at least one token but got none."),
        (
            {"prompt": [1] * 20},
            "[decode] prompt must be shorter than the context of 20 tokens but got 20.",
        ),
        (
            {"assistant": None},
            "[decode] block_size must be 1 without an assistant but got 4.",
        ),
    ],
)
def test_settings_are_checked(kw: dict, text: str) -> None:
    table = random_table(1)
    full = {
        "target": MarkovTarget(table, context=20),
        "assistant": MarkovAssistant(table),
        "prompt": [1],
        "block_size": 4,
        "max_tokens": 5,
        **kw,
    }
    with pytest.raises(ValueError) as error:
        list(decode(sampling=GREEDY, **full))
    assert str(error.value) == text


# Several rounds against the exact law of the text.

SMALL = 4
LENGTH = 6
NUCLEUS = Sampling(temperature=1.0, top_p=0.8, top_k=4)


def cells(table: np.ndarray, first: int) -> dict[tuple, float]:
    """Exact probability of every text of LENGTH tokens under the filtered Markov target."""
    rows = filter_alone(Sampler(NUCLEUS, [], SMALL), mx.array(table.astype(np.float32)))
    probs = np.zeros((SMALL, SMALL))
    np.put_along_axis(probs, np.array(rows.ids), np.array(rows.probs), axis=-1)
    out = {}
    for text in itertools.product(range(SMALL), repeat=LENGTH):
        steps = zip((first, *text), text, strict=False)
        out[text] = float(np.prod([probs[a, b] for a, b in steps]))
    return out


def p_value(want: dict[tuple, float], seen: dict[tuple, int]) -> float:
    """Chi-square with cells of small expectation pooled into one; impossible texts give 0."""
    runs = sum(seen.values())
    if any(want[text] == 0 for text in seen):
        return 0.0
    big = [text for text, p in want.items() if runs * p >= 5]
    expected = [runs * want[text] for text in big]
    observed = [float(seen.get(text, 0)) for text in big]
    expected.append(runs - sum(expected))
    observed.append(runs - sum(observed))
    scale = runs / sum(expected)
    return float(scipy_stats.chisquare(observed, [e * scale for e in expected]).pvalue)


def sample_texts(runs: int, rule: Rule) -> tuple[dict[tuple, float], dict[tuple, int]]:
    table = np.random.default_rng(7).normal(0, 2, (SMALL, SMALL))
    target = MarkovTarget(table)
    assistant = MarkovAssistant(table + np.random.default_rng(8).normal(0, 2, (SMALL, SMALL)))
    seen: dict[tuple, int] = {}
    for seed in range(runs):
        s = replace(NUCLEUS, seed=seed, verify=rule)
        text, _, _ = run(target, assistant, [0], sampling=s, block_size=4, max_tokens=LENGTH)
        seen[tuple(text)] = seen.get(tuple(text), 0) + 1
    return cells(table, 0), seen


@pytest.mark.native("hundreds of texts, which take plain MLX minutes")
@pytest.mark.parametrize("rule", RULES)
def test_text_over_rounds_has_the_targets_law(rule: Rule) -> None:
    assert p_value(*sample_texts(300, rule)) > 0.001


@pytest.mark.native("hundreds of texts, which take plain MLX minutes")
def test_accepting_every_draft_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Chooser.accept

    def accept(self: Chooser, p: Filtered, q: Filtered, *rest: mx.array) -> tuple:
        return real(self, p, q._replace(probs=q.probs * 1e-6), *rest)

    monkeypatch.setattr(Chooser, "accept", accept)
    assert p_value(*sample_texts(500, "residual")) < 1e-4
