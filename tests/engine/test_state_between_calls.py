"""State between calls: what one call leaves is never seen in another's answer.

Greedy texts are compared with transformers' own (`greedy_text`), which no state of ours can
change; others with a call that begins with nothing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest
from knowing import tiny
from tiny_pairs import FLAVOURS, greedy_text

from pyengine import ops
from pyengine.chat import Chat
from pyengine.checkpoint.pair import load
from pyengine.engine import round as on_device
from pyengine.engine.prefix import Prefix
from pyengine.engine.score import prompt_logprobs, score
from pyengine.generation import generate, stream
from pyengine.model import cache as cache_module
from pyengine.model import plan
from pyengine.sampling.settings import Sampling
from pyengine.task import Result

GREEDY = Sampling(temperature=0.0)
CHUNK = 16  # instead of 512: the tiny pairs' window is 8
BEGIN = 21  # tokens of the prompt that `greedy_text` continues


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK", CHUNK)


def goes_on(pair: Any, text: list[int], known: int, prefix: Prefix | None, **kw: Any) -> Result:
    """Ask for what follows the first tokens of the greedy text: it must be the greedy text."""
    kw = {"max_tokens": 12, "sampling": GREEDY, "block_size": 4, **kw}
    result = generate(text[:known], pair=pair, prefix=prefix, **kw)
    assert result.tokens == text[known : known + kw["max_tokens"]]
    return result


def told(result: Result) -> tuple[Any, ...]:
    """All of an answer that must not depend on what was called before."""
    return result.tokens, result.text, result.finish_reason, result.logprobs


# What a prefix keeps after an early end


@pytest.mark.parametrize("flavour", ["dense31", "e2b"])
@pytest.mark.parametrize(("block_size", "right"), [(1, 0), (4, 3), (4, 1), (6, 5)])
def test_what_a_prefix_keeps_after_an_early_end(flavour: str, block_size: int, right: int) -> None:
    """A stop id, a stop string or a limit, inside a block or at its end: the next call is right,
    and reads again no more than the newest token."""
    text = greedy_text(flavour)
    pair = tiny(flavour, knows=(block_size, right) if block_size > 1 else None)
    for count in (1, 2, 4, 5, 7, 8):
        last = text[BEGIN + count - 1]
        first = text.index(last, BEGIN) == BEGIN + count - 1
        for kind in ("limit", "id", "string"):
            if kind != "limit" and not first:
                continue  # it would have ended before
            prefix = Prefix()
            pair.generation.stop_ids = (last,) if kind == "id" else ()
            stop = f"{last} " if kind == "string" else None
            stop = stop if stop is None or count == 1 else f" {stop}"  # 9 is no part of 29
            limit = count if kind == "limit" else 40
            ask: dict[str, Any] = {"sampling": GREEDY, "block_size": block_size, "stop": stop}
            got = generate(text[:BEGIN], pair=pair, max_tokens=limit, prefix=prefix, **ask)
            assert got.tokens == text[BEGIN : BEGIN + count]
            # Behind a stop string more may have been committed
            known = BEGIN + got.stats.generated_tokens - 1
            assert prefix.tokens == text[:known]
            pair.generation.stop_ids = ()
            result = goes_on(pair, text, BEGIN + count + 6, prefix, block_size=block_size)
            assert result.stats.reused_tokens == min(known, BEGIN + count + 5)


# What a prefix keeps of a call that was left, interrupted or failed


class Breaks:
    """At the n-th evaluation, before or after it, something comes in."""

    def __init__(self, patch: pytest.MonkeyPatch, n: int, after: bool, error: BaseException):
        self.real, self.left, self.after, self.error = mx.eval, n, after, error
        patch.setattr(mx, "eval", self)

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        self.real(*args)
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("block_size", "right"), [(1, 0), (4, 3), (4, 1)])
@pytest.mark.parametrize("flavour", ["dense31", "moe26"])
@pytest.mark.usefixtures("small_chunks")
def test_a_prefix_after_ctrl_c(
    flavour: str, block_size: int, right: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every evaluation: as room is made, in each chunk of the prompt, in every round."""
    text = greedy_text(flavour)
    pair = tiny(flavour, knows=(block_size, right) if block_size > 1 else None)
    ask: dict[str, Any] = {"block_size": block_size}
    room = len(pair.target.new_arena().arrays)  # an evaluation each
    for n in (1, *range(room, room + 11)):
        prefix, got = Prefix(), []
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Breaks(patch, n, after, KeyboardInterrupt())
            running = stream(text[:BEGIN], pair=pair, sampling=GREEDY, prefix=prefix, **ask)
            for step in running.steps():
                got += step.tokens
        assert got == running.result.tokens == text[BEGIN : BEGIN + len(got)]
        kept = len(prefix.tokens)
        assert prefix.tokens == text[:kept]
        # Of the prompt nothing that was evaluated is lost, nor of the answer but its newest token
        assert kept == BEGIN + len(got) - 1 if got else kept in (0, CHUNK, BEGIN)
        # A prompt that goes on beyond all that the cache could hold by now, then the same again
        result = goes_on(pair, text, BEGIN + len(got) + 8, prefix, **ask)
        assert result.stats.reused_tokens == kept
        goes_on(pair, text, BEGIN, prefix, **ask)


class AtLine:
    """Ctrl-C as the n-th line of the engine begins; ``lines`` counts them. Not where a prefix takes
    note that it is in use: between two lines of cleaning up there is always a place for one."""

    FILES = (
        *("prefix.py", "cache.py", "loop.py", "prefill.py", "sequence.py", "rounds.py"),
        *("round.py", "report.py", "score.py"),
    )

    def __init__(self, n: int) -> None:
        self.n, self.lines = n, 0

    def __enter__(self) -> AtLine:
        self.before = sys.gettrace()
        sys.settrace(self.enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        path = Path(code.co_filename)
        ours = path.parent.name in ("engine", "model") and path.name in self.FILES
        return self.line if ours and code.co_name != "in_use" else None

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        self.lines += event == "line"
        if event == "line" and self.lines == self.n:
            raise KeyboardInterrupt
        return self.line


@pytest.mark.parametrize("again", ["same", "longer", "score"])
@pytest.mark.usefixtures("small_chunks")
def test_a_prefix_after_ctrl_c_at_any_line(again: str) -> None:
    """As a prefix is opened, its cache is forked, marks are made, a chunk is processed, a round is
    built, played, counted, kept."""
    text, pair = greedy_text("dense31"), tiny("dense31", knows=(4, 3))
    ask: dict[str, Any] = {"pair": pair, "sampling": GREEDY, "block_size": 4, "max_tokens": 9}

    def interrupted(n: int) -> tuple[int, Prefix]:
        """How many lines there are, if ``n`` is not one of them."""
        prefix = Prefix()
        if again == "score":
            score(pair, text[:9], text[9:12], prefix=prefix)
        goes_on(pair, text, 60, prefix, max_tokens=20)
        with AtLine(n) as lines, contextlib.suppress(KeyboardInterrupt):
            if again == "score":
                score(pair, text[:30], text[30:85], prefix=prefix)
            else:
                generate(text[: 60 if again == "same" else 105], prefix=prefix, **ask)
        return lines.lines, prefix

    count, _ = interrupted(0)
    assert count > 200
    rng = random.Random(0)
    for n in sorted(rng.sample(range(1, count + 1), 120)):
        _, prefix = interrupted(n)
        assert prefix.tokens == text[: len(prefix.tokens)], n
        goes_on(pair, text, 90, prefix, max_tokens=5)
        goes_on(pair, text, 60, prefix, max_tokens=5)


def test_a_prefix_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes, nothing of the cache is believed any more; its memory is given back."""
    text, pair = greedy_text("dense31"), tiny("dense31", knows=(4, 3))
    for n in range(1, 8):
        prefix = Prefix()
        goes_on(pair, text, BEGIN, prefix, max_tokens=3)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the machine"):
            Breaks(patch, n, False, RuntimeError("the machine"))
            generate(text[:50], pair=pair, sampling=GREEDY, block_size=4, prefix=prefix)
        assert (prefix.tokens, prefix.nbytes) == ([], 0)
        assert goes_on(pair, text, 60, prefix).stats.reused_tokens == 0
        assert goes_on(pair, text, 66, prefix).stats.reused_tokens == 65


@pytest.mark.parametrize(("block_size", "right"), [(1, 0), (4, 3), (4, 0)])
@pytest.mark.usefixtures("small_chunks")
def test_a_prefix_after_close(block_size: int, right: int) -> None:
    """In the prompt, at the first token, behind every round."""
    text = greedy_text("dense31")
    pair = tiny("dense31", knows=(block_size, right) if block_size > 1 else None)
    for count in range(9):
        prefix = Prefix()
        ask: dict[str, Any] = {"sampling": GREEDY, "block_size": block_size, "prefix": prefix}
        with stream(text[:40], pair=pair, max_tokens=30, **ask) as running:
            steps = [step for _, step in zip(range(count), running.steps(), strict=False)]
        got = [token for step in steps for token in step.tokens]
        done = [step.prompt_done for step in steps if step.prompt_done is not None]
        assert done == [16, 32][:count] and running.result.finish_reason is None
        kept = 40 + len(got) - 1 if got else (done or [0])[-1]
        assert prefix.tokens == text[:kept]
        assert goes_on(pair, text, 85, prefix, block_size=block_size).stats.reused_tokens == kept


# The cache's own counts


def test_the_cache_of_a_prefix_holds_what_it_says() -> None:
    """Its length on the device, the host's limit and the tokens agree after every round."""
    text = greedy_text("uni12")
    for block_size, right in ((1, 0), (4, 3), (4, 1), (9, 5)):
        pair = tiny("uni12", knows=(block_size, right) if block_size > 1 else None)
        prefix = Prefix()
        for known in (BEGIN, 60, 40, 75):
            ask: dict[str, Any] = {"sampling": GREEDY, "block_size": block_size}
            running = stream(text[:known], pair=pair, max_tokens=20, prefix=prefix, **ask)
            count = known
            for step in running.steps():
                count += len(step.tokens)
                cache = prefix._cache
                if cache is None:  # it has left its text to those to come
                    continue
                assert cache.length.item() == cache.length_limit
                if count < known + 20:  # a last round goes past the end
                    assert cache.length_limit == count - 1
                assert prefix.tokens == text[: count - 1]
            assert running.result.tokens == text[known : known + 20]


@pytest.mark.parametrize(
    ("length", "cases"),
    [
        (40, [(116, 116), (71, 71), (41, 41), (1, 1)]),
        (90, [(116, 116), (90, 90), (71, 71), (70, 70), (9, 9)]),
    ],
)
def test_how_far_back_a_window_goes(length: int, cases: list[tuple[int, int]]) -> None:
    """The window is 8 and a block 1: of 117 positions the sliding layers still have all, since a
    text may be taken up at the 64th. See test_beginnings.py for texts past that."""
    text = greedy_text("dense31")
    pair = tiny("dense31", knows=None)
    for shared, reused in cases:
        prefix = Prefix()
        goes_on(pair, text, length, prefix, max_tokens=118 - length, block_size=1)
        prompt = [*text[:shared], 255 - text[shared], 9, 9]
        ask: dict[str, Any] = {"pair": pair, "max_tokens": 12, "sampling": GREEDY, "block_size": 1}
        warm = generate(prompt, prefix=prefix, **ask)
        assert warm.stats.reused_tokens == reused, shared
        assert warm.tokens == generate(prompt, **ask).tokens


def test_a_prefix_holds_the_pages_of_its_tree_and_gives_them_back() -> None:
    text, pair = greedy_text("dense31"), tiny("dense31")
    prefix = Prefix()
    for known in (40, 60, 75, 90, 100):
        goes_on(pair, text, known, prefix)
        assert prefix._known is not None
        arena, tree = prefix._known.arena, prefix._known.tree
        assert arena.full.count - arena.full.free == len(tree)
        assert prefix.nbytes == arena.held_bytes == tree.nbytes
    prefix.forget()
    assert prefix.nbytes == arena.held_bytes == 0
    gc.collect()
    before, size = mx.get_active_memory(), arena.nbytes
    del arena, tree, prefix
    gc.collect()
    assert mx.get_active_memory() <= before - size


@pytest.mark.parametrize("other", ["bfloat16", "float32-q8"])
def test_two_pairs_take_nothing_from_each_other_through_one_prefix(other: str) -> None:
    """They have the same layers and other weights: only the pair itself tells them apart."""
    text, prefix = greedy_text("dense31"), Prefix()
    a, b = tiny("dense31"), tiny("dense31", other)
    context = list(range(30, 70))
    for pair in (a, b, a, b):
        ask: dict[str, Any] = {"pair": pair, "sampling": GREEDY, "max_tokens": 12, "block_size": 4}
        for prompt, reused in ((text[:40], 0), ([*text[:40], 7], 40)):
            warm = generate(prompt, prefix=prefix, **ask)
            assert warm.stats.reused_tokens == reused
            assert told(warm) == told(generate(prompt, **ask))
    for pair in (a, b, a):
        warm_score = score(pair, context, text[:20], prefix=prefix)
        assert prefix.reused == 0 and warm_score == score(pair, context, text[:20])
    # Another assistant, or another folder's name, is no other target
    other_pair = tiny("dense31", knows=(4, 2))
    assert other_pair.target is a.target
    goes_on(a, text, 40, prefix)
    assert goes_on(other_pair, text, 60, prefix).stats.reused_tokens > 40


# Recorded graphs


SETTINGS = [
    Sampling(temperature=0.0),
    Sampling(seed=3, top_k=8),
    Sampling(seed=3, top_k=8, temperature=0.3, verify="block"),
    Sampling(seed=4, repetition_penalty=1.5, presence_penalty=2.0, logprobs=2),
    Sampling(seed=3, top_k=0, top_p=1.0, verify="coupled", suppress_tokens=(3, 9)),
    Sampling(seed=3, logit_bias={7: 5.0}, min_p=0.1, logprobs=0),
]


@contextlib.contextmanager
def unrecorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every round is built anew."""
    with monkeypatch.context() as patch:
        patch.setattr(on_device, "recorded", lambda function: function)
        yield


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_graph_is_not_played_under_other_settings(
    block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, prompt = tiny("dense31"), greedy_text("dense31")[:BEGIN]
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 12, "block_size": block_size}
    with unrecorded(monkeypatch):
        want = [told(generate(prompt, sampling=s, **ask)) for s in SETTINGS]
    assert len({tuple(tokens) for tokens, *_ in want}) == len(SETTINGS)
    order = [*range(len(SETTINGS)), *reversed(range(len(SETTINGS)))]
    prefix = Prefix()
    for i in order:
        for used in (None, prefix):
            got = generate(prompt, sampling=SETTINGS[i], prefix=used, **ask)
            assert told(got) == want[i], i


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_graph_from_before_the_cache_grew_is_not_played_after(
    block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a page is lacking: in a cold answer, in one that goes on, in one after a growth."""
    monkeypatch.setattr(cache_module, "MOST_PAGES", 1)
    pair, text = tiny("dense31"), greedy_text("dense31")
    monkeypatch.setattr(pair.target, "context", 4096)
    prompt = [5 + i * i * 7 % 250 for i in range(400)] + text[:100]
    ask: dict[str, Any] = {"pair": pair, "sampling": Sampling(seed=2, top_k=8, logprobs=0)}
    ask["block_size"] = block_size
    with unrecorded(monkeypatch):
        want = generate(prompt, max_tokens=40, **ask)
    assert len(set(want.tokens)) > 20
    for _ in range(2):
        assert told(generate(prompt, max_tokens=40, **ask)) == told(want)
    prefix = Prefix()
    first = generate(prompt, max_tokens=5, prefix=prefix, **ask)
    assert first.tokens == want.tokens[:5]
    assert prefix._known is not None
    pages = prefix._known.arena.full
    count = pages.count
    for _ in range(2):  # the second begins with an arena that has grown
        assert told(generate(prompt, max_tokens=40, prefix=prefix, **ask)) == told(want)
    assert prefix._known.arena.full is pages and pages.count > count


@pytest.mark.parametrize("block_size", [1, 4])
def test_generations_on_one_pair_take_turns(block_size: int) -> None:
    """A step of one, a step of another with other settings, and so on; each as if alone."""
    pair, text = tiny("e2b"), greedy_text("e2b")
    asked = [(text[: BEGIN + 7 * i], s) for i, s in enumerate(SETTINGS[:4])]
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 14, "block_size": block_size}
    alone = [told(generate(prompt, sampling=s, **ask)) for prompt, s in asked]
    running = [stream(prompt, sampling=s, **ask) for prompt, s in asked]
    left = {i: r.steps() for i, r in enumerate(running)}
    while left:
        for i in list(left):
            if next(left[i], None) is None:
                del left[i]
    assert [told(r.result) for r in running] == alone


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_generation_may_go_on_in_another_thread(block_size: int) -> None:
    """Step by step in new threads, with a generation of the same pair in each between."""
    pair, text = tiny("dense31"), greedy_text("dense31")
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 14, "block_size": block_size}
    alone = told(generate(text[:BEGIN], sampling=SETTINGS[3], **ask))
    prefix = Prefix()
    running = stream(text[:BEGIN], sampling=SETTINGS[3], prefix=prefix, **ask)
    found: list[Any] = [0]

    def go_on() -> None:
        goes_on(pair, text, 50, None, max_tokens=3)
        found.append(next(running.steps(), None))

    while found[-1] is not None:
        thread = threading.Thread(target=go_on)
        thread.start()
        thread.join(60)
        assert len(found) < 20
    assert told(running.result) == alone
    goes_on(pair, text, 60, prefix)


@pytest.mark.parametrize("flavour", ["dense31", "moe26"])
def test_ops_switched_between_calls_and_within_one(
    flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy text is the same under both, whatever was recorded, written in place or kept before.
    Within a call too, where the cache grows after the switch."""
    pair, text = tiny(flavour), greedy_text(flavour)
    prefix = Prefix()
    ask: dict[str, Any] = {"max_tokens": 6}
    try:
        for known, name in ((30, "native"), (40, "reference"), (50, "native"), (45, "reference")):
            ops.use(name)  # type: ignore[arg-type]
            goes_on(pair, text, known, None, **ask)
            goes_on(pair, text, known, prefix, **ask)
        monkeypatch.setattr(pair.target, "context", 4096)
        prompt = [5 + i * i * 7 % 250 for i in range(487)] + text[:BEGIN]
        grows: list[list[int]] = []
        for names in (("native", "native"), ("native", "reference"), ("reference", "native")):
            ops.use(names[0])  # type: ignore[arg-type]
            running = stream(prompt, pair=pair, sampling=GREEDY, block_size=1, max_tokens=14)
            for _, _ in zip(range(3), running.steps(), strict=False):
                pass
            ops.use(names[1])  # type: ignore[arg-type]
            for _ in running.steps():
                pass
            grows.append(running.result.tokens)
        assert grows[0] == grows[1] == grows[2] and len(grows[0]) == 14
    finally:
        ops.use("native")


# The history of tokens


def test_penalties_count_the_tokens_of_their_own_call_alone() -> None:
    """So large a penalty lets no token come twice in a call, and any come again in the next."""
    text = greedy_text("dense31")
    for block_size in (1, 4):
        pair, prefix = tiny("dense31"), Prefix()
        ask: dict[str, Any] = {"pair": pair, "block_size": block_size, "max_tokens": 24}
        ask["sampling"] = Sampling(temperature=0.0, presence_penalty=1e6)
        first = generate(text[:BEGIN], **ask)
        assert len(set(first.tokens)) == 24
        for used in (None, prefix, prefix):
            assert told(generate(text[:BEGIN], prefix=used, **ask)) == told(first)
        # Two at once, of the same settings
        both = [stream(text[:BEGIN], **ask) for _ in range(2)]
        for _ in zip(*(r.steps() for r in both), strict=True):
            pass
        assert [told(r.result) for r in both] == [told(first)] * 2
        # Without a penalty nothing is left of it
        goes_on(pair, text, BEGIN, prefix, block_size=block_size)


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_penalty_counts_the_prompt_that_a_prefix_knows(block_size: int) -> None:
    """Also those of its tokens that are not processed again."""
    text, pair, prefix = greedy_text("dense31"), tiny("dense31"), Prefix()
    ask: dict[str, Any] = {"pair": pair, "block_size": block_size, "max_tokens": 20}
    for known in (40, 60, 60, 75):
        ask["sampling"] = Sampling(seed=known, repetition_penalty=1e6, frequency_penalty=1.0)
        warm = generate(text[:known], prefix=prefix, **ask)
        assert told(warm) == told(generate(text[:known], **ask))
        assert not {*warm.tokens} & {*text[:known]}
    assert warm.stats.reused_tokens >= 59


def test_a_result_taken_early_stays_as_it_was() -> None:
    """Also in its counts, which go on."""
    text, pair = greedy_text("dense31"), tiny("dense31", knows=(4, 2))
    running = stream(text[:BEGIN], pair=pair, sampling=SETTINGS[0], block_size=4, max_tokens=40)
    taken = []
    for _ in running.steps():
        result = running.result
        taken.append((result, json.dumps(result.to_dict())))
    assert len(taken) == 14
    for number, (result, said) in enumerate(taken):
        assert json.dumps(result.to_dict()) == said
        assert result.stats.drafted_by_depth == ([number] * 3 if number else [])
        assert result.stats.accepted_by_depth == ([number, number, 0] if number else [])


# Conversations


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_chat_after_an_answer_left_early(steps: int) -> None:
    """The part that was said is the answer; what follows is as if it always had been."""
    pair = load()
    settings: dict[str, Any] = {"max_tokens": 24, "sampling": Sampling(seed=4, presence_penalty=1)}
    settings["block_size"] = 4
    chat, other = (Chat(pair, system="You write games.", **settings) for _ in range(2))
    for question in ("Snake, please.", "Now Pong.", "And Tetris?"):
        answer = chat.steps(question)
        text = "".join(next(answer).text for _ in range(steps))
        answer.close()
        assert chat.result.text == text and chat.result.finish_reason is None
        assert chat.turns[-1] == {"role": "assistant", "content": text}
        # Another conversation on the pair between
        list(other.ask(question))
        said_next = "".join(chat.ask("Go on."))
        cold = generate(chat.messages[:-1], pair=pair, **settings)
        assert told(chat.result) == told(cold) and said_next == cold.text
        assert chat.result.stats.reused_tokens > 0.5 * chat.result.stats.prompt_tokens
        assert len(chat.prefix.tokens) == cold.stats.prompt_tokens + len(cold.tokens) - 1


def test_a_chat_after_ctrl_c_and_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load()
    ask: dict[str, Any] = {"max_tokens": 12, "sampling": GREEDY, "block_size": 4}
    for error in (KeyboardInterrupt(), RuntimeError("the machine")):
        for n in (1, 2, 4, 5):
            chat = Chat(pair, **ask)
            list(chat.ask("Snake, please."))
            before = list(chat.turns)
            got = []
            with (
                monkeypatch.context() as patch,
                pytest.raises(type(error), match=str(error) or None),
            ):
                Breaks(patch, n, False, error)
                for step in chat.steps("Now Pong."):
                    got += step.tokens
            # What was said before it counts; a question without an answer does not
            assert chat.result.tokens == got and (len(chat.turns) == 4) == bool(got)
            assert chat.turns[:2] == before
            list(chat.ask("And Tetris?"))
            cold = generate(chat.messages[:-1], pair=pair, **ask)
            assert told(chat.result) == told(cold)


def test_a_chat_begun_anew_or_taken_up_knows_nothing_of_the_one_before() -> None:
    pair = load()
    ask: dict[str, Any] = {"max_tokens": 16, "sampling": GREEDY, "block_size": 4}
    chat = Chat(pair, system="You write games.", **ask)
    list(chat.ask("Snake, please."))
    first = chat.messages
    list(chat.ask("Now Pong."))
    chat.clear()
    list(chat.ask("And Tetris?"))
    assert len(chat.turns) == 2
    assert told(chat.result) == told(generate(chat.messages[:-1], pair=pair, **ask))
    chat.resume(first)
    list(chat.ask("Now Pong."))
    assert told(chat.result) == told(generate(chat.messages[:-1], pair=pair, **ask))
    assert chat.messages[:3] == first and len(chat.messages) == 5


# All of it, in any order


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.usefixtures("small_chunks")
def test_random_calls_in_any_order(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, scores, ones that are left, interrupted and failed; the same, longer, edited and
    other prompts; two prefixes; blocks and settings that change."""
    rng = random.Random(FLAVOURS.index(flavour))
    pair, text = tiny(flavour), greedy_text(flavour)
    prefixes = [Prefix(), Prefix()]
    prompts = [text[:30], text[:70]]
    score(pair, text[:5], text[5:9], prefix=prefixes[0])
    reused = 0
    for step in range(40):
        old = rng.choice(prompts[-4:])
        cut = rng.randint(1, len(old))
        prompt = rng.choice(
            [
                old,
                [*old, *rng.choices(range(3, 255), k=rng.randint(1, 20))],
                [*old[:cut], rng.randint(3, 255)],
            ]
        )[:150]
        prefix = prefixes[rng.random() < 0.3]
        ask: dict[str, Any] = {"pair": pair, "block_size": rng.choice([1, 3, 4])}
        ask |= {"sampling": rng.choice(SETTINGS), "max_tokens": rng.randint(1, 14)}
        kind = rng.choice(["answer", "answer", "score", "leave", "interrupt", "fail", "clear"])
        if kind == "leave":
            with stream(prompt, prefix=prefix, **ask) as running:
                for _ in zip(range(rng.randint(0, 4)), running.steps(), strict=False):
                    pass
        elif kind in ("interrupt", "fail"):
            error = KeyboardInterrupt() if kind == "interrupt" else RuntimeError()
            with monkeypatch.context() as patch, contextlib.suppress(type(error)):
                Breaks(patch, rng.randint(1, 8), rng.random() < 0.5, error)
                generate(prompt, prefix=prefix, **ask)
        elif kind == "clear":
            prefix.forget()
        elif kind == "score":
            more = rng.choices(range(3, 255), k=rng.randint(1, 20))
            assert score(pair, prompt, more, prefix=prefix) == score(pair, prompt, more), step
            reused += prefix.reused
            prompt = [*prompt, *more][:150]
        if kind in ("answer", "leave", "interrupt", "fail"):
            warm = generate(prompt, prefix=prefix, **ask)
            assert told(warm) == told(generate(prompt, **ask)), (step, kind)
            assert warm.stats.reused_tokens == prefix.reused
            reused += prefix.reused
            prompt = [*prompt, *warm.tokens][:150]
        prompts.append(prompt)
        assert prefix.tokens == [] or kind != "clear"
    assert reused > 300
    rows = prompt_logprobs(pair, text[:60], 0)
    assert [row.logprob for row in rows] == score(pair, text[:1], text[1:60])[0]
    for prefix in prefixes:
        goes_on(pair, text, 50, prefix)
