"""Text in, text out: prompts, stop strings, defaults and errors, on a scripted pair."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from text_fakes import script_pair, write_tokenizers

from pyengine.generation import generate, stream
from pyengine.sampling.settings import Sampling
from pyengine.task import Result, default_block_size, embedded_pair, resolve_sampling
from pyengine.text.output import StopScanner
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

DEEP = json.loads("[" * 900 + "]" * 900)
STORY = "the quick brown fox jumps over a lazy dog; caf\u00e9 \U0001f642 done"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(directory)
    return directory


@pytest.fixture(scope="session")
def tok(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def pair(tok: Tokenizer) -> Any:
    return script_pair(tok, STORY)


@pytest.mark.parametrize("block_size", [1, 2, 4, 7, 30])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_of_the_target_comes_out(pair: Any, block_size: int, temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    result = generate("fox", pair=pair, sampling=sampling, block_size=block_size)
    assert (result.text, result.finish_reason) == (STORY, "stop")
    assert result.tokens == pair.target.script  # the stop id included
    assert pair.tokenizer.decode(result.tokens) == STORY
    assert result.stats.generated_tokens == len(result.tokens)
    assert result.stats.block_size == block_size
    assert (result.stats.drafted > 0) == (block_size > 1)


def test_stream_gives_the_same_and_the_result(pair: Any) -> None:
    running = stream("fox", pair=pair, block_size=4)
    assert running.result == Result("", [], None, running.result.stats)
    pieces = list(running)
    assert len(pieces) > 4 and all(pieces) and "".join(pieces) == STORY
    assert running.result.text == STORY and running.result.finish_reason == "stop"
    assert list(running) == []


def test_a_result_left_early_holds_what_was_handed_out(pair: Any) -> None:
    running = stream("fox", pair=pair, block_size=4)
    text = next(running) + next(running)
    assert running.result.text == text and STORY.startswith(text)
    assert running.result.finish_reason is None and running.result.stats.rounds >= 1


def test_result_becomes_json(pair: Any) -> None:
    result = generate("fox", pair=pair, max_tokens=9)
    back = json.loads(json.dumps(result.to_dict()))
    assert back["text"] == result.text and back["tokens"] == result.tokens
    assert back["finish_reason"] == "length" and back["stats"]["generated_tokens"] == 9


def test_a_string_is_a_user_message_unless_raw(pair: Any, tok: Tokenizer) -> None:
    def ids(prompt: Any, **kw: Any) -> list[int]:
        generate(prompt, pair=pair, max_tokens=1, **kw)
        return list(pair.target.prompt)

    turn = "<bos><|turn>user\nfox<turn|>\n<|turn>model\n"
    assert ids("fox") == tok.encode(turn) == ids([{"role": "user", "content": "fox"}])
    assert ids("fox", raw=True) == [tok.bos_id, *tok.encode("fox")]
    assert ids(turn, raw=True) == tok.encode(turn)
    assert ids([5, 6, 7]) == [5, 6, 7]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "fox"}]
    assert tok.decode(ids(system)).startswith("system\nBe brief.\nuser\nfox")
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    assert ids([{**system[0], "content": parts}, system[1]]) == ids(system)


def test_without_a_template_a_string_is_continued(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    plain = load_tokenizer(tmp_path)
    pair = script_pair(plain, "jumps")
    generate("the fox", pair=pair)
    assert pair.target.prompt == plain.encode("the fox", bos=True)
    with pytest.raises(ValueError, match="must have a chat template for messages but has none"):
        generate([{"role": "user", "content": "fox"}], pair=pair)


def test_half_a_character_at_the_end(pair: Any, tok: Tokenizer) -> None:
    cut = tok.encode(STORY[: STORY.index("\U0001f642") + 1])[:-2]
    result = generate("fox", pair=pair, max_tokens=len(cut), block_size=3)
    assert result.tokens == cut and result.finish_reason == "length"
    assert result.text == tok.decode(cut) and result.text.endswith("\ufffd")


def thinking_script(tok: Tokenizer, *parts: str) -> list[int]:
    """Token ids of text with marks in it."""
    return [token for part in parts for token in tok.encode(part)]


@pytest.mark.parametrize("block_size", [1, 4, 9])
def test_thoughts_are_returned_apart(tok: Tokenizer, folder: Path, block_size: int) -> None:
    script = thinking_script(
        tok, "<|channel>thought\nthe fox <table> caf\u00e9<channel|>", "jumps over a dog"
    )
    pair = script_pair(tok, script)
    running = stream("fox", pair=pair, block_size=block_size)
    pieces = list(running)
    assert "".join(pieces) == running.result.text == "jumps over a dog"
    assert running.result.thinking == "the fox <table> caf\u00e9"
    assert running.result.to_dict()["thinking"] == "the fox <table> caf\u00e9"
    # A stop string is met in the answer only, and a thought cut short is still a thought
    assert generate("fox", pair=pair, stop="fox", block_size=block_size).text == "jumps over a dog"
    cut = generate("fox", pair=pair, max_tokens=6, block_size=block_size)
    assert cut.text == "" and cut.thinking is not None and cut.finish_reason == "length"
    # A second thought follows the first; an empty one is empty
    script = thinking_script(tok, "<|channel>thought\na<channel|>b<|channel>thought\n<channel|>c")
    result = generate("fox", pair=script_pair(tok, script), block_size=block_size)
    assert (result.text, result.thinking) == ("bc", "a\n")


@pytest.mark.parametrize("opening", ["<|channel>", "<|channel>thought\n"])
def test_a_thought_may_begin_in_the_prompt(tok: Tokenizer, opening: str) -> None:
    rest = "thought\nthe fox" if opening.endswith(">") else "the fox"
    pair = script_pair(tok, thinking_script(tok, f"{rest}<channel|>", "jumps"))
    result = generate(tok.encode(f"<bos>fox{opening}"), pair=pair)
    assert (result.text, result.thinking) == ("jumps", "the fox")
    # One that ended there is past
    result = generate(tok.encode("<|channel>thought\n<channel|>fox"), pair=script_pair(tok, "dog"))
    assert (result.text, result.thinking) == ("dog", None)


def test_thoughts_only_where_the_template_has_them(tok: Tokenizer, folder: Path) -> None:
    assert generate("fox", pair=script_pair(tok, "jumps")).thinking is None
    (bare := folder.parent / "bare").mkdir(exist_ok=True)
    (bare / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    plain = load_tokenizer(bare)
    script = thinking_script(plain, "<|channel>thought\na<channel|>b")
    assert generate("fox", pair=script_pair(plain, script)).text == "thought\nab"


def test_variables_reach_the_template(pair: Any, tok: Tokenizer) -> None:
    tools = [{"name": "jump"}]
    generate("fox", pair=pair, max_tokens=1, variables={"tools": tools})
    assert '[{"name": "jump"}]' in tok.decode(pair.target.prompt)
    messages = [{"role": "user", "content": "fox"}]
    generate(messages, pair=pair, max_tokens=1, variables={"add_generation_prompt": False})
    assert tok.decode(pair.target.prompt) == "user\nfox\n"


def test_a_stream_can_be_closed(pair: Any) -> None:
    with stream("fox", pair=pair, block_size=2) as running:
        text = next(running)
    assert list(running) == [] and running.result.text == text
    assert running.result.finish_reason is None
    untouched = stream("fox", pair=pair)
    untouched.close()
    assert list(untouched) == [] and untouched.result.tokens == []


def test_other_stop_ids_are_not_text(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY)
    pair.generation.stop_ids = (tok.encode("dog;")[-1],)  # an ordinary piece
    result = generate("fox", pair=pair)
    assert result.finish_reason == "stop" and result.text == STORY.partition(";")[0]


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize(
    ("stop", "end"),
    [
        ("jumps", STORY.index("jumps")),
        (["never", "own fo"], STORY.index("own fo")),
        (["lazy dog", "lazy"], STORY.index("lazy")),
        ("the", 0),
        ("\U0001f642", STORY.index("\U0001f642")),
        ("done", STORY.index("done")),
        ("done!", len(STORY)),
    ],
)
def test_stop_strings_across_tokens(pair: Any, stop: Any, end: int, block_size: int) -> None:
    running = stream("fox", pair=pair, stop=stop, block_size=block_size)
    pieces = "".join(running)
    result = running.result
    assert pieces == result.text == STORY[:end] and result.finish_reason == "stop"
    text = pair.tokenizer.decode(result.tokens)
    if end < len(STORY):
        # The tokens end with the one that completed the stop string.
        stops = [stop] if isinstance(stop, str) else stop
        assert any(s in text for s in stops)
        assert not any(s in pair.tokenizer.decode(result.tokens[:-1]) for s in stops)


def first_complete(text: str, stops: tuple[str, ...]) -> str | None:
    """The rule said plainly: grow the text by a character until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return None


def test_no_part_of_a_stop_string_ever_leaks() -> None:
    rng = random.Random(0)
    met = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = tuple(
            "".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))
        )
        want = first_complete(text, stops)
        scanner, shown, at, found = StopScanner(stops), "", 0, False
        while at < len(text) and not found:
            step = rng.randint(0, 4)
            piece, found = scanner.add(text[at : at + step])
            at, shown = at + step, shown + piece
            # What has been shown is always a beginning of the final text.
            assert (text if want is None else want).startswith(shown)
            # No more is held back than may begin a stop string
            held = text[len(shown) : at]
            assert found or not held or any(stop.startswith(held) for stop in stops)
        shown += "" if found else scanner.finish()
        assert found == (want is not None)
        assert shown == (text if want is None else want), (text, stops)
        met += found
    assert 800 < met < 2800


def test_max_tokens_and_context_end_with_length(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY)
    assert generate("fox", pair=pair, max_tokens=3).finish_reason == "length"
    room = 5
    pair = script_pair(tok, STORY, context=len(pair.target.prompt) + room)
    result = generate("fox", pair=pair, max_tokens=100)
    assert (len(result.tokens), result.finish_reason) == (room, "length")


def test_defaults_come_from_the_pair(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY)
    pair.generation.temperature, pair.generation.top_k = 0.5, 7
    pair.generation.suppress_tokens = (9, 8)
    assert resolve_sampling(pair, None) == Sampling(0.5, 0.95, 7, suppress_tokens=(8, 9))
    given = Sampling(temperature=0.0, seed=3, suppress_tokens=(4, 9))
    assert resolve_sampling(pair, given) == Sampling(0.0, seed=3, suppress_tokens=(4, 8, 9))
    assert default_block_size(pair) == 4
    pair.generation.num_draft = 6
    assert default_block_size(pair) == 7
    pair.manifest = {"benchmark": {"best_block_size": 5}}
    assert default_block_size(pair) == 5 == generate("fox", pair=pair).stats.block_size
    pair.manifest = {"benchmark": {"best_block_size": "6"}}
    with pytest.raises(ValueError, match="best_block_size must be a whole number but got '6'"):
        generate("fox", pair=pair)
    pair.assistant = None
    assert generate("fox", pair=pair).stats.block_size == 1


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "prompt must not be empty."),
        ([], {}, "prompt must not be empty."),
        ("fox " * 50, {}, "prompt must be shorter than the context of 64 tokens but got"),
        ([1, 2, 400], {}, "token ids must be 0 to 399 but got 400."),
        ([-1], {}, "token ids must be 0 to 399 but got -1."),
        (None, {}, "prompt must be a string, messages or token ids but got NoneType."),
        (b"fox", {}, "prompt must be a string, messages or token ids but got bytes."),
        ([1, "a"], {}, "prompt must be a string, messages or token ids but is mixed."),
        ([1, {}], {}, "prompt must be a string, messages or token ids but is mixed."),
        ([{"role": "user", "content": "a"}], {"raw": True}, "raw must go with a string prompt"),
        ([{"role": "boss", "content": "a"}], {}, "message 1 must have a role of system, dev"),
        ([{"role": "user"}], {}, "message 1 must have text as its content but got None."),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            {},
            "message 1 must hold text only but got a part of type 'image'.",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            {},
            "message 1 must hold text only but got a part of type 'text'.",
        ),
        ("a", {"max_tokens": 0}, "max_tokens must be at least 1 but got 0."),
        ("a", {"max_tokens": 2.5}, "max_tokens must be a whole number but got 2.5."),
        ("a", {"block_size": 2.0}, "block_size must be a whole number but got 2.0."),
        ("a", {"stop": 5}, "stop must be a string or several but got 5."),
        ("a", {"variables": {"messages": []}}, "variables must not be named messages but one is."),
        (
            [{"role": "assistant", "content": "a", "tool_calls": DEEP}],
            {},
            "message 1 must be nested at most 64 deep but is deeper.",
        ),
        ("a", {"block_size": 0}, "block_size must be 1 to 128 but got 0."),
        ("a", {"block_size": 129}, "block_size must be 1 to 128 but got 129."),
        ("a", {"stop": ""}, "stop must hold strings of text but got ''."),
        ("a", {"stop": ["a", 5]}, "stop must hold strings of text but got 5."),
    ],
)
def test_impossible_arguments(tok: Tokenizer, prompt: Any, settings: dict, message: str) -> None:
    pair = script_pair(tok, STORY, context=64)
    with pytest.raises(ValueError) as error:
        stream(prompt, pair=pair, **settings)
    assert str(error.value).startswith(f"[generate] {message}")


def test_ids_outside_the_vocabulary(tok: Tokenizer) -> None:
    """They would be written beside the logits."""
    pair = script_pair(tok, STORY)
    for settings in (Sampling(suppress_tokens=(400,)), Sampling(logit_bias={10**9: 1.0})):
        with pytest.raises(ValueError, match=r"must name ids up to 399 but got (400|1000000000)\."):
            stream("fox", pair=pair, sampling=settings)


def test_blocks_need_an_assistant(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY, assistant=None)
    with pytest.raises(ValueError, match="block_size must be 1 without an assistant but got 4"):
        generate("fox", pair=pair, block_size=4)


def test_the_embedded_pair_is_read_once(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setitem(
        sys.modules,
        "pyengine.checkpoint.pair",
        SimpleNamespace(load=lambda: loads.append(1) or pair),
    )
    embedded_pair.cache_clear()
    try:
        assert generate("fox", max_tokens=2).text and generate("fox", max_tokens=2).text
        assert loads == [1]
    finally:
        embedded_pair.cache_clear()


def test_logprobs_go_with_the_tokens(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY)
    for stop in (None, "jumps"):
        result = generate("fox", pair=pair, sampling=Sampling(logprobs=1), block_size=4, stop=stop)
        assert result.logprobs is not None
        assert [x.token for x in result.logprobs] == result.tokens
        assert result.to_dict()["logprobs"][0]["token"] == result.tokens[0]
    assert generate("fox", pair=pair).logprobs is None
