"""Speculation on real targets, in every form of every architecture, where drafts are often right.

The fixtures' assistants are right about one text in one form; these are right by script, or equal
to the target, or near it. So in every cell rounds keep none, some and all of their drafts, which is
asserted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
import rules_by_hand as hand
from assistants import ColdLogits, Equal, Near, Scripted, script_accepts, wrong_places
from models import decode
from rules_by_hand import Close
from test_rounds_by_hand import by_hand
from tiny_pairs import FLAVOURS, FORMS, greedy_text, reference, tiny_pair

from pyengine.checkpoint.pair import Pair
from pyengine.engine.sequence import Round
from pyengine.ops import dispatch
from pyengine.ops.accept_block import RULES
from pyengine.sampling.sampler import Logprob
from pyengine.sampling.settings import Sampling

pytestmark = pytest.mark.engine

EDITS = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "logit_bias": {8: 2.0, 77: -4.0},
}
GREEDY = Sampling(0.0, seed=0)
COUPLED = Sampling(0.8, seed=2**31 + 7, verify="coupled")
PLAIN_TEXT = {  # settings under which speculative text is plain text
    "greedy": GREEDY,
    "greedy, edited": replace(GREEDY, **EDITS),
    "coupled": COUPLED,
    "coupled, edited": replace(COUPLED, top_k=0, top_p=1.0, **EDITS),
}
BLOCKS = (2, 4, 7, 8, 9, 16, 17, 40)  # around the window and the rows of a launch


def prompt_of(flavour: str, length: int) -> list[int]:
    return reference(flavour)[f"{length}.ids"].tolist()


def play(
    pair: Pair, assistant: object, prompt: list[int], s: Sampling, block_size: int, count: int
) -> list[Round]:
    return list(
        decode(
            pair.target,
            assistant,  # type: ignore[arg-type]
            prompt,
            sampling=s,
            block_size=block_size,
            max_tokens=count,
        )
    )


def tokens(rounds: Iterable[Round]) -> list[int]:
    return [token for r in rounds for token in r.tokens]


def logprobs(rounds: Iterable[Round]) -> list[Logprob]:
    return [x for r in rounds for x in r.logprobs or ()]


class Kept:
    """How many rounds kept none, some and all of their drafts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, rounds: Iterable[Round]) -> None:
        for r in rounds:
            if r.num_drafted:
                full = r.num_accepted == r.num_drafted
                self.counts["all" if full else "some" if r.num_accepted else "none"] += 1

    def at_least(self, floor: int) -> None:
        assert min(self.counts[name] for name in ("none", "some", "all")) >= floor, self.counts


def assert_script_is_plain_text(
    pair: Pair, prompt: list[int], s: Sampling, blocks: Iterable[int], count: int
) -> Kept:
    """At each block size: the tokens of plain decoding, the very bits of its logprobs, and as many
    drafts kept a round as the script has right. Plain MLX's bits depend on the block size."""
    vocab, row_stable = pair.target.config.vocab_size, dispatch.chosen() != "reference"
    plain = play(pair, None, prompt, replace(s, logprobs=2), 1, count)
    text = [*prompt, *tokens(plain)]
    wrong = wrong_places(len(prompt) + 1, len(text))
    kept = Kept()
    for i, block_size in enumerate(blocks):
        k = block_size - 1
        with_logprobs = i % 2 == 0  # others take the path that makes no logits
        mine = replace(s, logprobs=2 if with_logprobs else None)
        got = play(pair, Scripted(text, wrong, vocab, k), prompt, mine, block_size, count)
        assert tokens(got) == tokens(plain), f"block size {block_size}"
        if with_logprobs and row_stable:
            assert logprobs(got) == logprobs(plain), f"block size {block_size}"
        want = list(script_accepts(len(prompt), len(text), wrong, k))
        assert [r.num_accepted for r in got[1:]][: len(want)] == want, f"block size {block_size}"
        kept.add(got)
    return kept


@pytest.mark.parametrize("setting", PLAIN_TEXT)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_scripted_text_is_plain_text(
    flavour: str, form: str, setting: str, implementation: str
) -> None:
    """Past ten windows of 8 positions; a little in plain MLX, where it takes long."""
    native = implementation == "native"
    pair, s = tiny_pair(flavour, form), PLAIN_TEXT[setting]
    blocks, count = (BLOCKS, 80) if native else ((4,), 22)
    kept = assert_script_is_plain_text(pair, prompt_of(flavour, 21), s, blocks, count)
    kept.at_least(20 if native else 1)


@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_first_scripted_tokens_are_plain_tokens(flavour: str) -> None:
    """The test above, short enough for the workbench."""
    pair, prompt = tiny_pair(flavour, "bfloat16-q8"), prompt_of(flavour, 5)
    s = PLAIN_TEXT["coupled, edited"]
    assert_script_is_plain_text(pair, prompt, s, (4, 2), 16).at_least(2)


@pytest.mark.native("plain MLX takes minutes; every block size is one path to it")
def test_scripted_text_at_every_block_size() -> None:
    pair, prompt = tiny_pair("dense31", "bfloat16-q8"), prompt_of("dense31", 21)
    assert_script_is_plain_text(pair, prompt, GREEDY, range(2, 41), 60).at_least(100)


@pytest.mark.native("plain MLX takes minutes; the cache is one for all")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_scripted_text_where_full_layers_grow(flavour: str) -> None:
    """Inside a round, at any offset of its block: their slots run out at 512 positions."""
    pair, ids = tiny_pair(flavour, "bfloat16-q8"), greedy_text(flavour)
    for length in (470, 495):
        prompt = [*itertools.islice(itertools.cycle(ids), length)]
        assert_script_is_plain_text(pair, prompt, GREEDY, (2, 8, 17, 40), 60).at_least(3)


@pytest.mark.native("plain MLX takes minutes; its rules are held to the same in other files")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_assistant_equal_to_the_target_is_always_right(
    flavour: str, form: str, rule: str
) -> None:
    """Every draft of every round is kept: with and without edits, cold and hot."""
    pair, prompt = tiny_pair(flavour, form), prompt_of(flavour, 21)
    edits = {**EDITS, "suppress_tokens": (4, 9)}
    for k, s in (
        (1, Sampling(1.0, seed=1)),
        (4, Sampling(0.4, top_k=0, top_p=1.0, seed=2, **edits)),
        (9, Sampling(1.6, min_p=0.01, seed=3, **edits)),
        (17, Sampling(0.0, seed=4, **edits)),
    ):
        s = replace(s, verify=rule)
        rounds = play(pair, Equal(pair.target, k), prompt, s, k + 1, 1 + 5 * (k + 1))
        assert [r.num_accepted for r in rounds] == [0, *[k] * 5]


@pytest.mark.short
@pytest.mark.parametrize("rule", RULES)
def test_an_assistant_equal_to_the_target_is_right_everywhere(rule: str) -> None:
    """The test above, short enough for the workbench."""
    pair, prompt = tiny_pair("dense31", "bfloat16-q8"), prompt_of("dense31", 5)
    s = Sampling(0.9, seed=3, verify=rule, suppress_tokens=(4,), **EDITS)
    rounds = play(pair, Equal(pair.target, 3), prompt, s, 4, 1 + 2 * 4)
    assert [r.num_accepted for r in rounds] == [0, 3, 3]


NEAR = 0.36  # the assistant's share: rounds keep half of their drafts


@pytest.mark.native("plain MLX takes minutes; its rounds are held to the same in other files")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rounds_of_a_near_assistant_are_those_by_hand(flavour: str, form: str) -> None:
    """The pair's own assistant takes part in every draft, from the hidden row and the keys that the
    round left it; by hand it starts from plain steps on a fresh cache."""
    pair, prompt, k = tiny_pair(flavour, form), prompt_of(flavour, 5), 4
    cold, kept = ColdLogits(pair, prompt, NEAR), Kept()
    for rule, seed in itertools.product(RULES, (11, 12)):
        s = Sampling(0.7, top_p=1.0, top_k=50, seed=seed, verify=rule, **EDITS)
        rounds = play(pair, Near(pair, k, NEAR), prompt, s, k + 1, 30)
        want = hand.rounds(
            cold.of_target, cold.of_assistant, prompt, by_hand(s), rule=rule, k=k, seed=seed
        )
        for number, r in enumerate(rounds[:-1]):  # the last is cut at the limit
            try:
                expected = next(want)
            except Close:
                break
            got = r.tokens, r.num_accepted
            assert got == (expected.tokens, expected.accepted), (rule, seed, number)
            kept.add([r])
    kept.at_least(4)
