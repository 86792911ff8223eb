"""Where an answer ends: stop ids, stop strings and limits, in every place of every block."""

from __future__ import annotations

import random
from typing import Any

import pytest
from models import decode
from speaker import LETTERS, End, by_rule, letter, logprob, speaking
from text_fakes import write_tokenizers

from pyengine.engine.stats import Stats
from pyengine.generation import generate, stream
from pyengine.sampling.settings import Sampling
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

BLOCKS = (*range(1, 10), 17)
PROMPT = [5, 6, 7]
GREEDY = Sampling(temperature=0.0, logprobs=1)
# Where the stop is, and the limit
PLACES = [(place, limit) for place in range(13) for limit in range(1, 13)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


def check(pair: Any, want: End, block_size: int, **settings: Any) -> Stats:
    """Ask and compare everything with the plain answer."""
    running = stream(PROMPT, pair=pair, block_size=block_size, **settings)
    steps = list(running.steps())
    got = running.result
    assert got.tokens == want.tokens
    assert (got.text, got.thinking, got.finish_reason) == (want.text, want.thinking, want.reason)
    assert [t for s in steps for t in s.tokens] == want.tokens
    assert "".join(s.text for s in steps) == want.text
    assert "".join(s.thinking for s in steps) == (want.thinking or "")
    assert got.logprobs is not None and [x for s in steps for x in s.logprobs] == got.logprobs
    assert all(len(s.tokens) == len(s.logprobs) for s in steps)
    assert [row.token for row in got.logprobs] == want.tokens
    for place, row in enumerate(got.logprobs):
        assert abs(row.logprob - logprob(place)) < 1e-5
        assert row.top == [(row.token, row.logprob)]
    assert list(running) == [] and running.result.tokens == want.tokens
    assert got.stats.prompt_tokens == len(PROMPT)
    assert len(steps) == 1 + got.stats.rounds
    return got.stats


def rounds_for(count: int, block_size: int) -> int:
    """Rounds that make so many tokens: one comes from the prompt, a block from each round."""
    return -((1 - count) // block_size)


@pytest.mark.parametrize("block_size", BLOCKS)
def test_a_stop_id_before_at_and_behind_the_limit(tok: Tokenizer, block_size: int) -> None:
    """The limit is max_tokens, or what the context leaves, with and without max_tokens."""
    script = letter(tok, LETTERS)
    pieces = dict(zip(script, LETTERS, strict=True))
    pair = speaking(tok, script)
    for place, limit in PLACES:
        pair.generation.stop_ids = (script[place],)
        want = by_rule(script, pieces, limit, {script[place]})
        # Which of both is less
        given, room = [(limit, 4096), (None, limit), (limit + 3, limit)][(place + limit) % 3]
        pair.target.context = len(PROMPT) + room
        stats = check(pair, want, block_size, max_tokens=given, sampling=GREEDY)
        assert stats.generated_tokens == len(want.tokens)
        assert stats.rounds == rounds_for(len(want.tokens), block_size)


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("length", [1, 3])
def test_a_stop_string_before_at_and_behind_the_limit(
    tok: Tokenizer, block_size: int, length: int
) -> None:
    """Of one token, and of several, so that its beginning is held back."""
    script = letter(tok, LETTERS)
    pieces = dict(zip(script, LETTERS, strict=True))
    pair = speaking(tok, script)
    for place, limit in PLACES:
        if place + 1 < length:
            continue
        stop = LETTERS[place + 1 - length : place + 1]  # complete with the token at this place
        want = by_rule(script, pieces, limit, set(), (stop,))
        stats = check(pair, want, block_size, max_tokens=limit, stop=stop, sampling=GREEDY)
        assert stats.rounds == rounds_for(len(want.tokens), block_size)
        # What its last round committed, up to the limit, is counted behind the stop string too
        assert stats.generated_tokens == min(limit, 1 + stats.rounds * block_size)


@pytest.mark.parametrize("block_size", [1, 2, 4, 9])
def test_what_is_held_back_for_a_stop_string_comes_at_the_end(
    tok: Tokenizer, block_size: int
) -> None:
    """Text that begins a stop string which never comes: a stop id or the limit ends it."""
    script = letter(tok, LETTERS)
    pieces = dict(zip(script, LETTERS, strict=True))
    pair = speaking(tok, script)
    for place, limit in PLACES:
        pair.generation.stop_ids = (script[place],)
        stop = LETTERS[max(0, place - 2) : place] + "!"
        want = by_rule(script, pieces, limit, {script[place]}, (stop,))
        assert want.text == LETTERS[: min(place, limit)]
        check(pair, want, block_size, max_tokens=limit, stop=stop, sampling=GREEDY)


@pytest.mark.parametrize("block_size", [1, 2, 4, 9])
@pytest.mark.parametrize("kind", ["id", "string"])
def test_the_end_of_an_answer_with_thoughts(tok: Tokenizer, block_size: int, kind: str) -> None:
    """Before, in and behind the thought. A stop string does not count within it, an id does."""
    marks = tuple(tok.channel_ids())
    said = "t\nxy", "abcdxef"
    thought, answer = ([tok.id_of(c) for c in part] for part in said)
    script: Any = [marks[0], *thought, marks[1], *answer]
    pieces = {tok.id_of(c): c for c in "".join(said)}
    pair = speaking(tok, script)
    for place, limit in PLACES:
        token = script[place]
        stop = pieces.get(token) if kind == "string" else None
        pair.generation.stop_ids = () if kind == "string" else (token,)
        ids, stops = set(pair.generation.stop_ids), (stop,) if stop else ()
        want = by_rule(script, pieces, limit, ids, stops, marks)
        check(pair, want, block_size, max_tokens=limit, stop=stop, sampling=GREEDY)


def test_the_first_of_several_ends_in_any_block(tok: Tokenizer) -> None:
    """Ids and strings of several tokens and of parts of tokens, limits, drafts right and wrong."""
    rng = random.Random(0)
    words = [*"alzyevu", "al", "az", "azy", "ue", "alue", "value"]
    pieces: dict[int, str] = {}
    for word in words:
        token = tok.id_of(word)
        assert token is not None and tok.decode([token]) == word
        pieces[token] = word
    reasons, several = [], 0
    for _ in range(700):
        script = rng.choices(list(pieces), k=16)
        pair = speaking(tok, script, errs=rng.choice([0, 2, 3, 5]))
        ids = set(rng.sample(list(pieces), rng.choice([0, 0, 1, 2])))
        pair.generation.stop_ids = tuple(ids)
        whole = "".join(pieces[t] for t in script)
        starts = [rng.randrange(len(whole) - 6) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
        stops = tuple(whole[at : at + rng.randint(1, 5)] for at in starts)
        limit = rng.randint(1, 15)
        want = by_rule(script, pieces, limit, ids, stops)
        check(
            pair,
            want,
            rng.choice(BLOCKS),
            max_tokens=limit,
            stop=list(stops),
            sampling=rng.choice([GREEDY, Sampling(top_k=1, logprobs=1)]),
        )
        reasons.append(want.reason)
        several += len(ids) + len(stops) > 1
    assert 100 < reasons.count("length") < 600 and several > 200


@pytest.mark.parametrize("block_size", BLOCKS)
def test_rounds_end_where_the_answer_ends(tok: Tokenizer, block_size: int) -> None:
    """Without any text: only the last round has a reason, and nothing comes behind it."""
    script = letter(tok, LETTERS)
    pieces = dict(zip(script, LETTERS, strict=True))
    for place, limit in [x for x in PLACES if x[1] in (1, 4, 12)]:
        pair, stats = speaking(tok, script), Stats()
        rounds = list(
            decode(
                pair.target,
                pair.assistant,
                PROMPT,
                sampling=GREEDY,
                block_size=block_size,
                max_tokens=limit,
                stop_ids=frozenset({script[place]}),
                stats=stats,
            )
        )
        want = by_rule(script, pieces, limit, {script[place]})
        sizes = [1, *[block_size] * (len(rounds) - 1)]
        sizes[-1] -= sum(sizes) - len(want.tokens)
        assert sizes[-1] > 0 and [len(r.tokens) for r in rounds] == sizes
        assert [t for r in rounds for t in r.tokens] == want.tokens
        assert [r.finish_reason for r in rounds] == [None] * (len(rounds) - 1) + [want.reason]
        assert all(r.logprobs is not None and len(r.logprobs) == len(r.tokens) for r in rounds)
        assert stats.generated_tokens == len(want.tokens)
        assert stats.prompt_tokens == len(PROMPT)


def test_an_answer_of_one_token_decodes_nothing(tok: Tokenizer) -> None:
    """It comes with the prompt: no round, so no time, no speed and no draft."""
    for block_size in BLOCKS:
        pair = speaking(tok, letter(tok, "abc"))
        calls: list[int] = []
        pair.target.before_call = calls.append
        for ids in ((), (tok.id_of("a"),)):
            pair.generation.stop_ids = ids
            ask: dict[str, Any] = {"max_tokens": 1, "block_size": block_size}
            result = generate(PROMPT, pair=pair, sampling=GREEDY, **ask)
            text, reason = ("", "stop") if ids else ("a", "length")
            assert (result.text, result.finish_reason) == (text, reason)
            stats = result.stats
            assert (stats.generated_tokens, stats.rounds, stats.drafted) == (1, 0, 0)
            assert (stats.decode_s, stats.tok_s, stats.acceptance) == (0.0, 0.0, 0.0)
            assert stats.prefill_s > 0 and stats.tokens_per_round == 0.0
        assert calls == []


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_a_stop_string_that_only_the_end_completes(tok: Tokenizer, block_size: int) -> None:
    """Half a character is a replacement character once nothing follows it."""
    half = [tok.id_of("<0xF0>"), tok.id_of("<0x9F>")]
    pair = speaking(tok, [*letter(tok, "ab"), *half, *letter(tok, "c")])
    for stop, text, reason in (("b\ufffd", "a", "stop"), ("!", "ab\ufffd", "length")):
        ask: dict[str, Any] = {"max_tokens": 4, "stop": stop, "sampling": GREEDY}
        running = stream(PROMPT, pair=pair, block_size=block_size, **ask)
        assert "".join(running) == running.result.text == text
        assert running.result.finish_reason == reason and len(running.result.tokens) == 4


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_half_a_character_in_a_channels_name_is_no_thought(tok: Tokenizer, block_size: int) -> None:
    """Whether the thought ends there or the answer."""
    open_, close = tok.channel_ids()
    script: Any = [open_, tok.id_of("<0xF0>"), close, *letter(tok, "abc")]
    pair = speaking(tok, script)
    for limit, text in ((1, ""), (2, ""), (3, ""), (4, "a")):
        ask: dict[str, Any] = {"max_tokens": limit, "block_size": block_size, "sampling": GREEDY}
        result = generate(PROMPT, pair=pair, **ask)
        assert (result.text, result.thinking, len(result.tokens)) == (text, "", limit)
