"""Chat templates written like Gemma's render whole, however long: the budget grows."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest

from pyengine.text.meter import BASE_BUILT, BASE_WORK, MOST_WORK
from pyengine.text.template import MAX_TEMPLATE_BYTES, ChatTemplate, template_of

USER = {"role": "user", "content": "hello"}

# Everything the published Gemma templates use, in one: macros, namespaces, sorted tool
# declarations, thoughts cut from history, trim marks. Written for this test.
WHOLE = """
{%- macro value_of(value) -%}
{%- if value is string -%}{{ '<|"|>' ~ value ~ '<|"|>' }}
{%- elif value is boolean -%}{{ 'true' if value else 'false' }}
{%- elif value is mapping -%}{
{%- for key, inner in value | dictsort -%}
{{ key }}:{{ value_of(inner) }}{{ ',' if not loop.last }}
{%- endfor -%}
}
{%- elif value is sequence -%}[
{%- for inner in value -%}{{ value_of(inner) }}{{ ',' if not loop.last }}{%- endfor -%}
]
{%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last='', found=false) -%}
{{ bos_token }}
{%- if messages[0]['role'] in ['system', 'developer'] -%}
{{ '<|turn>system\n' + messages[0]['content'] | trim + '<turn|>\n' }}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}{%- for tool in tools -%}
{{ '<|tool>declaration:' ~ tool['function']['name'] ~ value_of(tool['function']['parameters']) }}
{%- endfor -%}{%- endif -%}
{%- for message in messages if message.content is defined -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{%- if '<channel|>' in message.content -%}
{%- set text = message.content.split('<channel|>')[-1].lstrip() -%}
{%- else -%}{%- set text = message.content -%}{%- endif -%}
{{ '<|turn>' + role + '\n' + text | trim + '<turn|>\n' }}
{%- for call in message.get('tool_calls', []) -%}
{{ call.function.name | upper }}{{ value_of(call.function.arguments) }}
{%- endfor -%}
{%- set ns.last = role -%}{%- set ns.found = ns.found or loop.index0 > 0 -%}
{%- endfor -%}
{{ messages | length }} {{ messages | map(attribute='role') | join(',') }} {{ ns.found }}
{{ (messages | selectattr('role', 'equalto', 'user') | list)[-1].content[:3] }}
{%- if add_generation_prompt and not enable_thinking | default(false) -%}
{{ '<|turn>model\n' }}
{%- endif -%}
"""


def test_what_gemma_templates_need_works() -> None:
    call = {"function": {"name": "f", "arguments": {"b": [1, 2.5, None], "a": "x", "c": True}}}
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "<|channel>thought\nhm<channel|> hi",
            "tool_calls": [call],
        },
        {"role": "user", "content": "again"},
    ]
    tool = {"function": {"name": "g", "parameters": {"type": "object"}}}
    text = ChatTemplate(WHOLE, {"bos_token": "<bos>"}).render(messages, tools=[tool])
    assert text == (
        "<bos><|turn>system\nBe brief.<turn|>\n"
        '<|tool>declaration:g{type:<|"|>object<|"|>}'
        "<|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n"
        'F{a:<|"|>x<|"|>,b:[1,2.5,None],c:true}'
        "<|turn>user\nagain<turn|>\n"
        "3 user,assistant,user True\naga<|turn>model\n"
    )


# As Google's: for each message a look back over all, and after a call a look ahead for its results.
SCANS = """
{%- for message in messages -%}
{%- if message['role'] != 'tool' -%}
{%- set last = namespace(role=None, found=false) -%}
{%- for j in range(loop.index0 - 1, -1, -1) -%}
{%- if not last.found and messages[j]['role'] != 'tool' -%}
{%- set last.role = messages[j]['role'] -%}{%- set last.found = true -%}
{%- endif -%}
{%- endfor -%}
{%- if last.role != message['role'] -%}{{ '<|turn>' + message['role'] + '\n' }}{%- endif -%}
{%- set scan = namespace(stopped=false) -%}
{%- if message['tool_calls'] -%}
{%- for k in range(loop.index0 + 1, messages | length) -%}
{%- if scan.stopped -%}
{%- elif messages[k]['role'] != 'tool' -%}{%- set scan.stopped = true -%}
{%- else -%}
{%- for call in message['tool_calls'] if call.id == messages[k]['tool_call_id'] -%}
{{ call.function.name }}:{{ messages[k]['content'] }};
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ message['content'] | trim }}
{%- endif -%}
{%- endfor -%}
"""


def turns(count: int) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": f" {i}"} for i in range(count)]


def steps(count: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [USER]
    for i in range(count):
        call = {"id": str(i), "function": {"name": "f", "arguments": {}}}
        made.append({"role": "assistant", "content": "", "tool_calls": [call]})
        made.append({"role": "tool", "content": f"of {i}", "tool_call_id": str(i)})
    return made


@pytest.mark.parametrize("count", [1, 1101, pytest.param(5000, marks=pytest.mark.slow)])
def test_budget_grows_with_the_messages(count: int) -> None:
    text = ChatTemplate(SCANS, {}).render(turns(count))
    assert text.startswith("<|turn>user\n0") and text.endswith(f"{count - 1}")
    assert text.count("<|turn>") == count


def test_budget_grows_with_the_tool_steps() -> None:
    text = ChatTemplate(SCANS, {}).render(steps(500))
    assert text.startswith("<|turn>user\nhello<|turn>assistant\nf:of 0;f:of 1;")
    assert text.count("f:of") == 500 and text.count("<|turn>") == 2


def test_budget_grows_with_the_text() -> None:
    messages = [
        {"role": role, "content": f"{i} " + "word " * 400}
        for i in range(500)
        for role in ("user", "assistant")
    ]
    text = ChatTemplate(WHOLE, {"bos_token": "<bos>"}).render(messages)
    assert len(text) > 1_900_000 and "499 word" in text
    long = "x" * 4_000_000
    assert len(ChatTemplate(WHOLE, {}).render([{"role": "user", "content": long}])) > 4_000_000


def test_budget_grows_with_the_tools() -> None:
    properties = {f"p{i}": {"type": "string", "description": "d" * 100} for i in range(3000)}
    tool = {"function": {"name": "g", "parameters": {"type": "object", "properties": properties}}}
    assert 'p2999:{description:<|"|>' in ChatTemplate(WHOLE, {}).render([USER], tools=[tool])


@pytest.mark.parametrize("count", [1, 100, 1000])
def test_budget_still_stops_a_hostile_template(count: int) -> None:
    """A loop of three depths is cubic, which no conversation deserves."""
    loops = "{% for a in messages %}" * 3 + "{% for b in range(999) %}" + "{% endfor %}" * 4
    template = ChatTemplate("{% for a in range(999) %}" + loops + "{% endfor %}", {})
    with pytest.raises(ValueError, match="stopped: it does too much work"):
        template.render(turns(count))
    done = template._sandbox.meter.done
    assert BASE_WORK < done < min(2 * BASE_WORK + 1000 * count + 4 * count**2, MOST_WORK + 100_000)


def test_budget_has_a_ceiling() -> None:
    """Were it not for it, a client's 100,000 messages would pay for hours."""
    template = ChatTemplate("", {})
    template.render(turns(20_000))
    assert template._sandbox.meter.most_work == MOST_WORK


def test_budget_is_one_renderings() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{% endfor %}", {})
    for _ in range(10):
        assert template.render([USER]) == ""
    hungry = ChatTemplate("{% set a = 'x' * n %}{{ a | length }}", {})
    with pytest.raises(ValueError, match="builds too much"):
        hungry.render([USER], n=BASE_BUILT + 100_000)
    assert hungry.render([USER], n=5) == "5"


def test_threads_share_a_template() -> None:
    template, texts = ChatTemplate(WHOLE, {"bos_token": "<bos>"}), []
    wanted = template.render(turns(50))
    threads = [
        threading.Thread(target=lambda: texts.append(template.render(turns(50)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [wanted] * 4


def test_values_without_end_are_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="stopped: it nests values too deep"):
        ChatTemplate("", {}).render([USER], tools=circle)


def test_generation_tags_are_their_body() -> None:
    source = (
        "{%- for m in messages -%}\n{%- if m.role == 'assistant' -%}{%- generation %}\n"
        "{{- m.content -}}{% set n = 1 %}{%- endgeneration -%}{{ n }}{%- else -%}"
        "[{{ m.content }}]{%- endif -%}{%- endfor -%}"
    )
    # What is set inside stays inside, as in transformers
    assert ChatTemplate(source, {}).render([USER, {"role": "assistant", "content": "hi"}]) == (
        "[hello]hi"
    )


def test_thoughts_have_the_name_that_templates_read() -> None:
    source = "{{ messages[0].reasoning_content }},{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert ChatTemplate(source, {}).render([{**USER, name: "hm"}]) == "hm,hm"
    both = {**USER, "thinking": "a", "reasoning_content": "b"}
    assert ChatTemplate(source, {}).render([both]) == "b,a"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_byte_order_mark_is_no_text(tmp_path: Path, place: str) -> None:
    config = {}
    if place == "chat_template.jinja":
        (tmp_path / place).write_bytes(b"\xef\xbb\xbf{{ bos_token }}a\xef\xbb\xbf")
    else:
        config["chat_template"] = "\ufeff{{ bos_token }}a\ufeff"
    source = template_of(tmp_path, config)
    assert source is not None
    assert ChatTemplate(source, {"bos_token": "<bos>"}).render([USER]) == "<bos>a\ufeff"


# Source, and what is said of it when a chat is asked for.
UNCOMPILED = {
    "no jinja": ("{% if %}", "be valid jinja but line 1 is not: Expected"),
    "an unknown tag": ("{% trans %}a{% endtrans %}", "unknown tag 'trans'"),
    "an unknown filter": ("{{ 'a' | nonsense }}", "No filter named 'nonsense'"),
    "an unknown test": ("{{ 'a' is nonsense }}", "No test named 'nonsense'"),
    "too long": ("x" * (MAX_TEMPLATE_BYTES + 1), "be at most 65536 bytes but got 65537"),
    "too deep": ("{{ " + "(" * 20000 + " }}", "be valid jinja but is not: maximum recursion"),
    "too many loops": (
        "{% for a in 'x' %}" * 40 + "{% endfor %}" * 40,
        "be valid jinja but is not: too many statically nested blocks",
    ),
}


@pytest.mark.parametrize("name", UNCOMPILED)
def test_templates_that_cannot_compile_stop_chats_only(name: str) -> None:
    source, reason = UNCOMPILED[name]
    template = ChatTemplate(source, {})
    assert template.error is not None
    assert re.match(r"\[tokenizer\] chat template must .*" + re.escape(reason), template.error)
    with pytest.raises(ValueError, match=re.escape(template.error)):
        template.render([USER])


def test_templates_that_compile_have_no_error() -> None:
    assert ChatTemplate(WHOLE, {}).error is None
