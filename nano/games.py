"""Single-file HTML5 canvas games as chat turns, generated from a seed.

    python nano/games.py SEED            # print one page
    python nano/games.py --check 200     # run node --check over 200 pages of every kind

A page is a family of game_families.py written in one of three styles; the style fixes every
spelling on the page, so that a name declared once keeps its spelling. Numbers, colours, sizes,
comments and the wording around the page vary freely.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from game_families import HELD_BACK, TRAINED

COLOURS = ["#222", "#111", "#70c5ce", "#87ceeb", "#0b132b", "black", "white", "red", "gold", "lime"]
COLOURS += ["tomato", "orange", "#2ecc71", "#e74c3c", "#f1c40f", "#3498db"]
SIZES = ((400, 600), (480, 320), (600, 400), (320, 480), (400, 400), (640, 480))

STYLES = (
    {
        "names": "canvas=canvas ctx=ctx W=W H=H score=score over=gameOver end=endGame reset=reset "
        "update=update draw=draw loop=loop keys=keys let=let rect=drawRect disc=drawCircle",
        "quote": "'",
        "indent": "  ",
        "arrow": False,
        "helpers": False,
    },
    {
        "names": "canvas=board ctx=g W=WIDTH H=HEIGHT score=points over=over end=finish "
        "reset=restart update=step draw=render loop=frame keys=pressed let=let rect=rect "
        "disc=circle",
        "quote": '"',
        "indent": "    ",
        "arrow": False,
        "helpers": True,
    },
    {
        "names": "canvas=cv ctx=c W=w H=h score=score over=dead end=die reset=init update=tick "
        "draw=paint loop=main keys=input let=var rect=box disc=ball",
        "quote": "'",
        "indent": "  ",
        "arrow": True,
        "helpers": False,
    },
)

# Names of things in mixtures; none occurs in a family.
NOUNS = "tank robot mouse cart orb gem lamp kite boat drone ring leaf crab moth stone wheel tile "
NOUNS = (NOUNS + "rocket fish spark crate bolt seed wolf cloud sword tower egg plane comet").split()
# Words that several families share, and what a mixture may write for them.
COMMON = "frames lives fall speed vx vy r w h hits touch fire jump serve passed age SPEED ROWS COLS"
COMMON = (COMMON + " SIZE GAP o p x").split()
SPARES = "count power rate dx dy size width height overlap meet shoot hop launch done timer pace "
SPARES = (SPARES + "lines slots edge space item part left kind mode level step total").split()

OPENINGS = (
    "Create a single-file HTML5 canvas {} game",
    "Create a single-file HTML5 Canvas {} game with plain JavaScript",
    "Write a {} game in a single HTML file using canvas",
    "Make a simple {} clone with HTML5 canvas and JavaScript",
    "Please build a {} game in one HTML file",
    "I want a {} game that runs in the browser",
)
WISHES = (
    "",
    " with a score counter",
    " with score and restart",
    " with keyboard controls",
    " with no external libraries",
    ", score display and game over screen",
)
ENDINGS = (".", ".", ". Keep the code short and readable.", ". Put all code in one file.", "")
LEADS = (
    "Here is a complete {} game in a single HTML file:\n\n",
    "Here's a single-file {} game using HTML5 canvas:\n\n",
    "Sure! This is a small {} game:\n\n",
    "",
)
CLOSINGS = (
    "\n\nSave it as an .html file and open it in your browser.",
    "\n\nOpen the file in any modern browser to play.",
    "",
)


@dataclass(frozen=True)
class Game:
    family: str
    prompt: str  # what the user asks
    answer: str  # what the model writes: the page in a fenced block and a little prose

    def chat(self) -> str:
        """The rendered turns after <bos>."""
        return f"<|turn>user\n{self.prompt}<turn|>\n<|turn>model\n{self.answer}<turn|>\n"


def parse_template(template: str) -> tuple[dict[str, str], dict[str, str]]:
    """The options of the header and the sections by name."""
    header, *sections = re.split(r"^== (\w+)\n", template.strip() + "\n", flags=re.M)
    options = dict(line.split(": ", 1) for line in header.strip().split("\n"))
    return options, dict(zip(sections[::2], sections[1::2], strict=True))


class Page:
    """Fills one template in one style."""

    def __init__(self, title: str, template: str, rng: random.Random):
        self.title, self.rng = title, rng
        number = rng.randrange(len(STYLES))
        self.style = STYLES[number]
        self.names = dict(pair.split("=") for pair in self.style["names"].split())
        options, self.sections = parse_template(template)
        for pair in options["names"].split():
            name, spellings = pair.split("=")
            self.names[name] = spellings.split("/")[number]
        self.hint, self.polled = options["hint"], "keys" in options
        self.comment_share = rng.choice((0.0, 0.5, 1.0))

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def colour(self) -> str:
        return self.rng.choice(COLOURS)

    def fill(self, text: str) -> list[str]:
        """Template lines to script lines, not yet indented."""
        out = []
        for line in text.strip().split("\n"):
            if line.startswith("//") and self.rng.random() >= self.comment_share:
                continue
            line = re.sub(r"<<(.*?)>>", lambda m: self.pick(*m[1].split("|")), line)
            while "COLOR" in line:
                line = line.replace("COLOR", f"'{self.colour()}'", 1)
            if line.startswith("fn "):
                line = self.function_head(line[3:])
            elif line == "end":
                line = "};" if self.style["arrow"] else "}"
            lines = self.shape(*line[6:].split("; "), kind=line[1:5]) if line[0] == "@" else [line]
            out += [re.sub(r"\$(\w+)", lambda m: self.names[m[1]], x) for x in lines]
        return [x.replace("'", self.style["quote"]) for x in out]

    def function_head(self, signature: str) -> str:
        name, arguments = signature.rstrip(")").split("(")
        if self.style["arrow"]:
            return f"const {name} = ({arguments}) => {{"
        return f"function {name}({arguments}) {{"

    def shape(self, *arguments: str, kind: str) -> list[str]:
        if self.style["helpers"]:
            return [f"${kind}({', '.join(arguments)});"]
        *where, colour = arguments
        lines = [f"$ctx.fillStyle = {colour};"]
        if kind == "rect":
            return [*lines, f"$ctx.fillRect({', '.join(where)});"]
        arc = f"$ctx.arc({', '.join(where)}, 0, Math.PI * 2);"
        return [*lines, "$ctx.beginPath();", arc, "$ctx.fill();"]

    def indent(self, lines: list[str]) -> list[str]:
        depth, out = 0, []
        for line in lines:
            depth -= line.startswith("}")
            out.append(self.style["indent"] * depth + line if line else "")
            depth += line.endswith("{")
        return out

    def script(self) -> list[str]:
        part = self.sections.get
        blocks = [
            "const $canvas = document.getElementById('game');\n"
            "const $ctx = $canvas.getContext('2d');\n"
            "const $W = $canvas.width;\nconst $H = $canvas.height;",
            "// <<Settings|Constants>>\n" + part("constants"),
            "// <<Game state|State>>\n$let $score = 0;\n$let $over = false;\n" + part("state"),
        ]
        if self.polled:
            blocks[-1] += "const $keys = {};"
        if self.style["helpers"]:
            uses = part("draw")
            if "@rect" in uses:
                blocks.append(
                    "fn $rect(x, y, w, h, color)\n$ctx.fillStyle = color;\n"
                    "$ctx.fillRect(x, y, w, h);\nend"
                )
            if "@disc" in uses:
                blocks.append(
                    "fn $disc(x, y, r, color)\n$ctx.fillStyle = color;\n$ctx.beginPath();\n"
                    "$ctx.arc(x, y, r, 0, Math.PI * 2);\n$ctx.fill();\nend"
                )
        blocks += re.findall(r"fn .*?\nend", part("helpers"), flags=re.S)
        blocks += [
            "fn $end()\n$over = true;\nend",
            "fn $reset()\n$score = 0;\n$over = false;\n" + part("reset") + "end",
            "fn $update()\nif ($over) return;\n" + part("update") + "end",
            self.draw(part("draw")),
            "fn $loop()\n$update();\n$draw();\nrequestAnimationFrame($loop);\nend",
            self.controls(part("controls"), part("press", "")),
            part("start", "") + "$loop();",
        ]
        lines: list[str] = []
        for block in blocks:
            lines += [""] * bool(lines) + self.fill(block)
        return self.indent(lines)

    def draw(self, body: str) -> str:
        clear = "$ctx.fillStyle = COLOR;\n$ctx.fillRect(0, 0, $W, $H);\n"
        text = (
            "// <<Score|Show the score>>\n$ctx.fillStyle = COLOR;\n"
            "$ctx.font = '<<16|18|20>>px <<Arial|sans-serif|monospace>>';\n"
            "$ctx.fillText('Score: ' + $score, 10, 24);\n"
            "if ($over) {\n$ctx.fillText('<<Game Over|You lose>>', $W / 2 - 50, $H / 2);\n}\n"
        )
        return f"fn $draw()\n{clear}{body}{text}end"

    def controls(self, own: str | None, press: str) -> str:
        if own:
            return own.strip()
        return (
            "document.addEventListener('keydown', e => {\n$keys[e.code] = true;\n"
            + press
            + "if ($over && e.code === 'Enter') $reset();\n});\n"
            "document.addEventListener('keyup', e => {\n$keys[e.code] = false;\n});"
        )

    def html(self) -> str:
        width, height = self.rng.choice(SIZES)
        body = f"body {{ margin: 0; background: {self.colour()}; text-align: center; }}"
        border = f"canvas {{ border: {self.pick('1', '2')}px solid {self.colour()}; }}"
        lines = ["<!DOCTYPE html>", self.pick("<html>", '<html lang="en">'), "<head>"]
        lines += ['<meta charset="UTF-8">', f"<title>{self.title}</title>"]
        lines += ["<style>", body, border, "</style>", "</head>", "<body>"]
        lines += [f'<canvas id="game" width="{width}" height="{height}"></canvas>']
        if self.rng.random() < 0.5:
            lines.append(f"<p>{self.hint}</p>")
        lines += ["<script>", *self.script(), "</script>", "</body>", "</html>"]
        return "\n".join(lines)


def make_game(seed: int, families: dict[str, str] = TRAINED) -> Game:
    rng = random.Random(seed)
    title = rng.choice(list(families))
    return dress(title, Page(title, families[title], rng), rng)


def dress(title: str, page: Page, rng: random.Random) -> Game:
    """The chat turns around a page."""
    prompt = rng.choice(OPENINGS).format(title) + rng.choice(WISHES) + rng.choice(ENDINGS)
    lead, closing = rng.choice(LEADS).format(title), rng.choice(CLOSINGS)
    return Game(title, prompt, f"{lead}```html\n{page.html()}\n```{closing}")


def statements(body: str) -> list[str]:
    """A section cut into statements: lines, and blocks with their braces."""
    out, depth = [""], 0
    for line in body.strip().split("\n"):
        depth += line.count("{") - line.count("}")
        out[-1] += line + "\n"
        if depth == 0 and not line.startswith("//"):
            out.append("")
    return [statement for statement in out if statement]


def mixture(rng: random.Random) -> tuple[str, str]:
    """Title and template of a page that belongs to no family: parts of two trained families, most
    things renamed, statements shuffled and dropped. It is no game and need not parse; the assistant
    learns on such pages what the target expects where it is not at home."""
    pair = [parse_template(t) for t in rng.sample(list(TRAINED.values()), 2)]
    names = [p.split("=")[0] for options, _ in pair for p in options["names"].split()]
    spelled = dict(zip(names, rng.sample(NOUNS, len(names)), strict=False))
    header = {"names": " ".join(f"{n}={s}/{s}/{s}" for n, s in spelled.items())}
    header |= {"hint": pair[0][0]["hint"], "keys": "yes"}
    text = "".join(f"{key}: {value}\n" for key, value in header.items())
    for name in ("constants", "state", "reset", "helpers", "update", "draw"):
        parts = [sections[name] for _, sections in pair]
        if name in ("reset", "update", "draw"):
            found = statements("".join(rng.sample(parts, rng.choice((1, 1, 2)))))
            rng.shuffle(found)
            parts = [x for x in found if rng.random() < 0.8] or found[:1]
        text += f"== {name}\n" + "".join(parts)
    spares = rng.sample(SPARES, len(COMMON))
    for word, spare in zip(COMMON, spares, strict=True):
        if rng.random() < 0.5:
            text = re.sub(rf"(?<![$\w=]){word}\b", spare.upper() if word.isupper() else spare, text)
    return " ".join(rng.sample(NOUNS, 2)).title(), text


def make_mixture(seed: int) -> Game:
    rng = random.Random(seed)
    title, template = mixture(rng)
    return dress(title, Page(title, template, rng), rng)


def script_of(text: str) -> str | None:
    """The script of a page, or None when the page has no closed script element."""
    found = re.search(r"<script>\n(.*?)</script>", text, flags=re.S)
    return found[1] if found else None


def parses(script: str) -> bool:
    """Does node accept the script?"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.js"
        path.write_text(script)
        return subprocess.run(["node", "--check", path], capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--check", type=int, metavar="PAGES")
    args = parser.parse_args()
    if args.check is None:
        print(make_game(args.seed).chat())
        return
    for families in (TRAINED, HELD_BACK):
        games = [make_game(seed, families) for seed in range(args.check)]
        bad = [g.family for g in games if not parses(script_of(g.answer) or "(")]
        print(f"{len(games)} pages, {len({g.family for g in games})} families, bad: {bad}")


if __name__ == "__main__":
    main()
