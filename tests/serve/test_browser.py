"""The page in a headless Chromium: what a reader sees and does, on the embedded pair and others."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")

from exits import passed  # noqa: E402
from serving import Server  # noqa: E402
from teller import telling, thinking_tokenizer  # noqa: E402

from pyengine import Engine  # noqa: E402
from pyengine.checkpoint.pair import load  # noqa: E402
from pyengine.serve.protocols.ask import Limits  # noqa: E402

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
NARROW = {"width": 360, "height": 740}
PICTURES = os.environ.get("PYENGINE_PICTURES")  # a folder for pictures of the page
SECONDS = 60_000  # ms within which the page shows what it must, on any machine


class Reader:
    """A page in a browser, and all that it asked and complained of."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(SECONDS)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(url)

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_label("Message").press("Enter")

    def ended(self, number: int = 1) -> None:
        """Wait until so many answers have ended."""
        done = self.page.locator(".answer[aria-busy=false]")
        playwright.expect(done).to_have_count(number, timeout=SECONDS)

    def set(self, **fields: Any) -> None:
        if self.page.locator("#settings").get_attribute("open") is None:
            self.page.get_by_text("Settings", exact=True).click()
        for label, value in fields.items():
            self.page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))

    def text(self, place: str = ".answer > .content") -> str:
        return str(self.page.locator(place).last.evaluate("node => node.textContent"))

    def overflow(self) -> int:
        """Pixels that the document is wider than its window."""
        root = "document.documentElement"
        return int(self.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth"))

    def picture(self, name: str) -> None:
        if PICTURES:
            self.page.screenshot(path=Path(PICTURES) / f"{name}.png")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        # As root, as in a container, Chromium has no sandbox
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(load()) as made:
        yield made


@contextmanager
def reading(browser: Any, server: Server, complaints: int = 0, **context: Any) -> Iterator[Reader]:
    """A page that asks nobody else, and complains of no more than so many answers."""
    own = browser.new_context(**context)
    try:
        reader = Reader(own.new_page(), server.url)
        yield reader
        assert len(reader.complaints) == complaints, reader.complaints
        assert [url for url in reader.asked if not url.startswith(server.url + "/")] == []
    finally:
        own.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chat_and_its_rounds(browser: Any, server: Server, scheme: Any) -> None:
    size = {"width": 1200, "height": 800}
    with reading(browser, server, color_scheme=scheme, viewport=size) as reader:
        page = reader.page
        playwright.expect(page.locator("#load")).to_contain_text("of 8 streams")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) > 600) == (scheme == "light")
        reader.picture(f"empty-{scheme}")
        reader.set(Max_tokens=160, Temperature=0.8, Seed=7, Block_size=5)
        reader.ask("Create a single-file HTML5 canvas Snake game.")
        reader.ended()
        body = {"max_tokens": 160, "temperature": 0.8, "seed": 7, "block_size": 5}
        asked = [{"role": "user", "content": "Create a single-file HTML5 canvas Snake game."}]
        said = server.post(json={"messages": asked, **body}).json()
        assert reader.text() == said["choices"][0]["message"]["content"]
        tokens = page.locator(".answer .token")
        assert tokens.count() > 100
        # By the counts of the panel, which are those of the server
        count = {
            source: int(page.locator(f"[data-count={source}]").inner_text())
            for source in ("draft", "correction", "bonus", "first", "forced", "plain")
        }
        usage = said["usage"]
        share = page.locator("#acceptance").inner_text()
        assert share == f"{100 * usage['acceptance']:.0f} %" != "0 %"
        # The last round may keep more drafts than there is room for
        assert usage["accepted_tokens"] - 4 < count["draft"] <= usage["accepted_tokens"]
        assert count["first"] == 1 and sum(count.values()) == 160
        for source in ("draft", "correction", "bonus"):
            shown = page.locator(f".answer .token[data-source={source}]")
            assert 0 < shown.count() <= count[source]
        colours = {
            source: page.locator(f".answer .token[data-source={source}]").first.evaluate(
                "node => getComputedStyle(node).backgroundColor"
            )
            for source in ("draft", "correction", "bonus")
        }
        assert len(set(colours.values())) == 3
        playwright.expect(page.locator("#depths tr")).to_have_count(4)
        assert page.locator("#strip .column").count() > 20
        assert "seed 7" in page.locator(".answer footer").inner_text()
        reader.picture(f"chat-{scheme}")
        page.get_by_label("Colour tokens").uncheck()
        plain = tokens.first.evaluate("node => getComputedStyle(node).backgroundColor")
        assert plain == "rgba(0, 0, 0, 0)"
        # What was said goes with the next question, and a new chat forgets it
        reader.set(System_prompt="Be brief.")
        with page.expect_request("**/v1/chat/completions") as second:
            reader.ask("Go on.")
        roles = [message["role"] for message in second.value.post_data_json["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
        reader.ended(2)
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".turn").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Any, server: Server, scheme: Any) -> None:
    with reading(browser, server, viewport=NARROW, color_scheme=scheme, has_touch=True) as reader:
        assert reader.overflow() == 0
        reader.set(Max_tokens=60, Temperature=0, System_prompt="w" * 200)
        assert reader.overflow() == 0
        reader.page.get_by_text("Settings", exact=True).click()
        reader.ask("Create a game. " + "W" * 300)
        reader.ended()
        assert reader.overflow() == 0
        reader.picture(f"phone-{scheme}")
        reader.page.get_by_text("Rounds", exact=True).click()
        assert reader.overflow() == 0
        reader.picture(f"phone-rounds-{scheme}")


def test_stop_ends_the_generation_on_the_server(
    browser: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def slow(engine: Engine) -> bool:  # so that no text ends before the page is told to stop
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow)
    with reading(browser, server) as reader:
        reader.set(Temperature=1, Max_tokens=2000, Block_size=1)
        for way in ("button", "Escape"):
            reader.ask("Create a single-file HTML5 canvas Snake game.")
            playwright.expect(reader.page.locator(".answer .token").first).to_be_visible()
            assert server.health()["running"] == 1
            if way == "button":
                reader.page.get_by_role("button", name="Stop").click()
            else:
                reader.page.keyboard.press("Escape")
            foot = reader.page.locator(".answer footer").last
            playwright.expect(foot).to_contain_text("Stopped")
            server.counts(waiting=0, running=0)
            reader.page.get_by_role("button", name="New chat").click()


def test_hostile_text_stays_text(browser: Any, tmp_path: Path) -> None:
    """Of the reader, of the model, and of an error's sentence."""
    pair = telling(thinking_tokenizer(tmp_path), HOSTILE)
    pair.name = HOSTILE
    with Server(pair) as server, reading(browser, server, complaints=1) as reader:
        playwright.expect(reader.page.locator("#model")).to_have_text(HOSTILE)
        reader.ask(HOSTILE)
        reader.ended()
        assert reader.text() == reader.text(".question") == HOSTILE
        reader.set(Block_size=500)
        reader.ask("again")
        error = reader.page.get_by_role("alert").filter(has_text="block_size must be 1 to")
        playwright.expect(error).to_be_visible()
        assert reader.page.get_by_label("Message").input_value() == "again"
        assert reader.page.locator("#log img, #log script, header script").count() == 0
        assert reader.page.title() == "pyengine"


def test_thoughts_are_folded_and_apart(browser: Any, tmp_path: Path) -> None:
    pair = telling(thinking_tokenizer(tmp_path), {"ponder": "a <b>dog<channel|> It sleeps."})
    with Server(pair) as server, reading(browser, server) as reader:
        reader.set(Temperature=0)
        reader.page.get_by_label("Thinking").select_option("on")
        with reader.page.expect_request("**/v1/chat/completions") as sent:
            reader.ask("ponder")
        assert sent.value.post_data_json["reasoning_effort"] == "high"
        reader.ended()
        assert reader.text().strip() == "It sleeps."
        thoughts = reader.page.locator(".thoughts > .content")
        playwright.expect(thoughts).to_be_hidden()
        reader.page.get_by_text("Thoughts").click()
        playwright.expect(thoughts).to_be_visible()
        assert reader.text(".thoughts > .content").strip() == "a <b>dog"


def test_an_approximate_answer_says_so(browser: Any) -> None:
    limits = Limits(early_exit=passed())
    with Server(load(), limits) as server, reading(browser, server) as reader:
        reader.ask("Write a Snake game.")
        reader.ended()
        label = reader.text(".answer > .warning")
        assert label.startswith("approximate: on prompts like the 40 calibrated ones, answers")


def test_the_key_is_asked_for_and_kept_in_memory_alone(browser: Any, tmp_path: Path) -> None:
    pair = telling(thinking_tokenizer(tmp_path), "jumps over")
    with Server(pair, key="sesame") as server, reading(browser, server, complaints=2) as reader:
        page = reader.page
        page.get_by_label("This server asks for its key").fill("other")
        page.get_by_role("button", name="Use key").click()
        playwright.expect(page.get_by_role("alert")).to_contain_text("must carry the server's key")
        page.get_by_label("This server asks for its key").fill("sesame")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#key-form")).to_be_hidden()
        reader.ask("fox")
        reader.ended()
        assert reader.text() == "jumps over"
        kept = "[localStorage.length, sessionStorage.length, document.cookie.length]"
        assert page.evaluate(kept) == [0, 0, 0]
        assert not any("sesame" in url for url in reader.asked)


def test_a_server_that_is_gone_is_told(browser: Any) -> None:
    with Server(load()) as server:
        own = browser.new_context()
        reader = Reader(own.new_page(), server.url)
        playwright.expect(reader.page.locator("#load")).to_contain_text("streams")
    reader.ask("Hello")
    error = reader.page.get_by_role("alert").filter(has_text="The server cannot be reached.")
    playwright.expect(error).to_be_visible()
    own.close()


def test_it_all_goes_by_keyboard(browser: Any, server: Server) -> None:
    with reading(browser, server) as reader:
        page = reader.page
        assert page.evaluate("document.activeElement.id") == "text"
        names = set()
        for _ in range(24):
            page.keyboard.press("Tab")
            names.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        wanted = {"new", "SUMMARY", "log", "text", "send", "colours", "system", "seed", "thinking"}
        assert wanted <= names
        unlabelled = """[...document.querySelectorAll("input, textarea, select")]
            .filter((field) => !field.labels.length).length"""
        assert page.evaluate(unlabelled) == 0
