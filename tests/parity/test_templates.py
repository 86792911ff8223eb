"""Chat templates render as transformers renders them: `pytest -m parity`.

The embedded pair's template always; Gemma 4's own where they can be had: in a folder named by
PYENGINE_TEMPLATES, and in trl, whose wheel carries the training edition among templates of other
families, which use more of jinja than Gemma's do.
"""

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the parity extra: transformers")

from template_operations import MESSAGES, OPERATIONS
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import pyengine
from pyengine.text.template import ChatTemplate

pytestmark = pytest.mark.parity

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
EMBEDDED = Path(pyengine.__file__).parent / "nano" / "target" / "chat_template.jinja"


def said(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def call(name: str, arguments, identity: str | None = None) -> dict:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if identity is None else {"id": identity, **made}


def asked(*calls: dict, content="", **more) -> dict:
    return said("assistant", content, tool_calls=list(calls), **more)


def tool(name: str, properties: dict | None = None, **more) -> dict:
    function = {"name": name, "description": f"Does {name}.", **more}
    if properties is not None:
        required = sorted(properties)[:1]
        function["parameters"] = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": function}


WEATHER = tool(
    "weather",
    {
        "place": {"type": "string", "description": "Where."},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "description": "How many.", "nullable": True},
    },
)
NESTED = tool(
    "search",
    {
        "query": {"type": "string"},
        "tags": {"type": "array", "description": "Any.", "items": {"type": "string"}},
        "within": {
            "type": "object",
            "description": "Limits.",
            "properties": {"from": {"type": "number"}, "until": {"type": "number"}},
            "required": ["from"],
        },
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "b": {"type": "string"}},
                "required": ["a"],
            },
        },
    },
)
RESPONDS = tool("clock", response={"description": "The time.", "type": "object"})
HELLO = said("user", "Hello.")
TOOLS = {"tools": [WEATHER, NESTED]}
RESULT = said("tool", "rain", tool_call_id="a", name="weather")
VALUES = {"text": "a 'b' \"c\"", "n": -3, "x": 2.5, "yes": True, "none": None, "list": [1, "two"]}


def steps(count: int) -> list[dict]:
    """A loop of a model that calls a tool and reads the result."""
    made = [HELLO]
    for i in range(count):
        made.append(asked(call("weather", {"place": f"town {i}"}, str(i)), reasoning_content="hm"))
        made.append(said("tool", f"{i} degrees", tool_call_id=str(i)))
    return made


def turns(count: int, words: int = 5) -> list[dict]:
    return [said(("user", "assistant")[i % 2], f"{i} " + "word " * words) for i in range(count)]


# Name: messages, and the template's variables.
CONVERSATIONS: dict[str, tuple[list[dict], dict]] = {
    "one turn": ([HELLO], {}),
    "no generation prompt": ([HELLO], {"add_generation_prompt": False}),
    "three turns": (turns(3), {}),
    "ends with the model": (turns(4), {}),
    "ends with the model, no prompt": (turns(4), {"add_generation_prompt": False}),
    "system": ([said("system", " Be brief. "), HELLO], {}),
    "developer": ([said("developer", "Be brief."), HELLO], {}),
    "system in parts": ([said("system", parts("Be", "brief.")), HELLO], {}),
    "system later": ([HELLO, said("system", "Be brief."), said("user", "So?")], {}),
    "only a system message": ([said("system", "Be brief.")], {}),
    "role model": ([HELLO, said("model", "Hi."), HELLO], {}),
    "two users in a row": ([HELLO, HELLO], {}),
    "two answers in a row": ([HELLO, said("assistant", "a"), said("assistant", "b"), HELLO], {}),
    "parts": ([said("user", parts("one ", " two"))], {}),
    "no parts": ([said("user", [])], {}),
    "parts of an answer": ([HELLO, said("assistant", parts("one", "two")), HELLO], {}),
    "an image": ([said("user", [{"type": "image"}, *parts("What is it?")])], {}),
    "audio and video": ([said("user", [{"type": "audio"}, {"type": "video"}])], {}),
    "an empty text": ([said("user", "")], {}),
    "blanks": ([said("user", " \n\t a \u3000\n"), said("assistant", "\n b \n"), HELLO], {}),
    "unicode": ([said("user", "žluťoučký 🐎 中文 \u200d \u00a0 e\u0301 \ufeff")], {}),
    "line ends": ([said("user", "a\r\nb\rc\n\nd\u2028e")], {}),
    "html": ([said("user", "<b>&amp; \"q\" 'q'</b>")], {}),
    "jinja in a text": ([said("user", "{{ 7 * 7 }}{% raw %}")], {}),
    "marks in a text": ([said("user", "<turn|>\n<|turn>model\n")], {}),
    "thinking": ([HELLO], {"enable_thinking": True}),
    "thinking off": ([HELLO], {"enable_thinking": False}),
    "thinking with system": ([said("system", "Brief."), HELLO], {"enable_thinking": True}),
    "a thought in an answer": (
        [HELLO, said("assistant", "<|channel>thought\nhm\n<channel|>Hi."), HELLO],
        {},
    ),
    "two thoughts in an answer": (
        [HELLO, said("assistant", "a<|channel>x<channel|>b<|channel>y<channel|>c"), HELLO],
        {},
    ),
    "an open thought": ([HELLO, said("assistant", "a<|channel>thought\nnever"), HELLO], {}),
    "a thought beside an answer": (
        [HELLO, said("assistant", "Hi.", reasoning_content="hm"), HELLO],
        {},
    ),
    "the last thought": ([HELLO, said("assistant", "Hi.", reasoning="hm")], {}),
    "a thought by its other name": ([HELLO, said("assistant", "Hi.", thinking="hm")], {}),
    "a tool": ([HELLO], {"tools": [WEATHER]}),
    "tools": ([HELLO], TOOLS),
    "no tools": ([HELLO], {"tools": []}),
    "a tool without parameters": ([HELLO], {"tools": [tool("now")]}),
    "a tool that says what it answers": ([HELLO], {"tools": [RESPONDS]}),
    "tools, system and thinking": (
        [said("system", "Brief."), HELLO],
        {**TOOLS, "enable_thinking": True},
    ),
    "a call": ([HELLO, asked(call("weather", {"place": "Brno"}, "a"))], TOOLS),
    "a call without arguments": ([HELLO, asked(call("now", {}, "a"))], TOOLS),
    "a call with arguments as text": ([HELLO, asked(call("now", '{"a": 1}', "a"))], TOOLS),
    "a call with every kind of value": ([HELLO, asked(call("f", VALUES, "a"))], TOOLS),
    "a call with nested values": (
        [HELLO, asked(call("f", {"a": {"b": [VALUES, []], "c": {}}}, "a"))],
        TOOLS,
    ),
    "a call beside words": (
        [HELLO, asked(call("f", {"a": 1}, "a"), content="One moment."), RESULT],
        TOOLS,
    ),
    "a call with content none": ([HELLO, asked(call("f", {}, "a"), content=None)], TOOLS),
    "a call after a thought": (
        [HELLO, asked(call("f", {"a": 1}, "a"), reasoning_content="I could call.")],
        TOOLS,
    ),
    "a result": ([HELLO, asked(call("weather", {"place": "Brno"}, "a")), RESULT], TOOLS),
    "a result, answered": (
        [HELLO, asked(call("weather", {"place": "Brno"}, "a")), RESULT, said("assistant", "Rain.")],
        TOOLS,
    ),
    "a result, answered, asked again": (
        [
            *(HELLO, asked(call("weather", {"place": "Brno"}, "a")), RESULT),
            *(said("assistant", "Rain."), said("user", "And tomorrow?")),
        ],
        TOOLS,
    ),
    "a result in parts": (
        [HELLO, asked(call("f", {}, "a")), said("tool", parts("ra", "in"), tool_call_id="a")],
        TOOLS,
    ),
    "a result that is a dict": (
        [HELLO, asked(call("f", {}, "a")), said("tool", VALUES, tool_call_id="a")],
        TOOLS,
    ),
    "a result that is a list": (
        [HELLO, asked(call("f", {}, "a")), said("tool", [VALUES, VALUES], tool_call_id="a")],
        TOOLS,
    ),
    "a result that is a number": (
        [HELLO, asked(call("f", {}, "a")), said("tool", 42, tool_call_id="a")],
        TOOLS,
    ),
    "a result of nobody": ([HELLO, asked(call("f", {}, "a")), said("tool", "x")], TOOLS),
    "a result without a call": ([HELLO, said("tool", "x", name="f")], TOOLS),
    "several calls": (
        [HELLO, asked(call("f", {"a": 1}, "a"), call("g", {"b": 2}, "b"))],
        TOOLS,
    ),
    "several calls, results in another order": (
        [
            *(HELLO, asked(call("f", {}, "a"), call("g", {}, "b"))),
            *(said("tool", "of g", tool_call_id="b"), said("tool", "of f", tool_call_id="a")),
        ],
        TOOLS,
    ),
    "responses inside a message": (
        [
            HELLO,
            asked(
                call("f", {"a": 1}),
                tool_responses=[{"name": "f", "response": VALUES}, {"name": "g", "response": 3}],
            ),
        ],
        TOOLS,
    ),
    "calls of two turns": ([*steps(2), said("assistant", "Done."), *steps(1)], TOOLS),
    "thoughts kept": ([*steps(2), HELLO], {**TOOLS, "preserve_thinking": True}),
    "twenty tool steps": (steps(20), TOOLS),
    "a long conversation": (turns(301), {}),
    "long texts": (turns(21, words=4000), {}),
    "a hundred tools": (
        [HELLO],
        {"tools": [tool(f"t{i}", {"a": {"type": "string"}}) for i in range(100)]},
    ),
}


def templates() -> list:
    named = [pytest.param(EMBEDDED, id="embedded")]
    folder = os.environ.get("PYENGINE_TEMPLATES")
    if folder:
        published = sorted(Path(folder).glob("*.jinja"))
        assert published, f"PYENGINE_TEMPLATES must hold *.jinja files but {folder} has none"
        named += [pytest.param(path, id=path.stem) for path in published]
    else:
        skip = pytest.mark.skip(reason="needs PYENGINE_TEMPLATES, a folder of Gemma 4's templates")
        named.append(pytest.param(None, id="published", marks=skip))
    trl = importlib.util.find_spec("trl")
    if trl is not None and trl.submodule_search_locations:
        carried = sorted(Path(trl.submodule_search_locations[0], "chat_templates").glob("*.jinja"))
        named += [pytest.param(path, id=f"trl-{path.stem}") for path in carried]
    else:
        skip = pytest.mark.skip(reason="needs trl (pip install --no-deps trl), for its templates")
        named.append(pytest.param(None, id="trl", marks=skip))
    return named


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    library = Library(WordLevel({token: i for i, token in enumerate(TOKENS.values())}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=library, **TOKENS)


def test_there_are_enough_conversations() -> None:
    assert len(CONVERSATIONS) >= 40


@pytest.mark.parametrize("path", templates())
def test_templates_render_as_in_transformers(path: Path, theirs: PreTrainedTokenizerFast) -> None:
    source = path.read_text(encoding="utf-8")
    ours = ChatTemplate(source, TOKENS)
    assert ours.error is None, ours.error
    rendered = 0
    for name, (messages, variables) in CONVERSATIONS.items():
        given = {"add_generation_prompt": True, **variables}
        try:
            expected = theirs.apply_chat_template(
                messages, chat_template=source, tokenize=False, **given
            )
        except Exception as error:  # whatever the template refuses we refuse
            with pytest.raises(ValueError, match="must render the messages but stopped"):
                ours.render(messages, **given)
                pytest.fail(f"{path.stem}, {name}: transformers refuses: {error}")
            continue
        rendered += 1
        assert ours.render(messages, **given) == expected, f"{path.stem}, {name}"
    # A template that refuses most of them would compare nothing
    assert rendered >= (40 if "gemma" in path.stem or path == EMBEDDED else 5), rendered


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_render_as_in_transformers(name: str, theirs: PreTrainedTokenizerFast) -> None:
    _, honest, text = OPERATIONS[name]
    assert theirs.apply_chat_template(MESSAGES, chat_template=honest, tokenize=False) == text
