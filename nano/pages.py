"""Do the pages the embedded target writes parse, and do they run?

    python nano/pages.py --out PAGES

Whole answers to chat prompts no training page has, at the pair's own sampler, by the engine.
Counts answers that end by themselves, hold a script that node accepts ("parses"), and against a
stub canvas draw 60 frames left alone ("draws") and 300 frames with keys and clicks ("runs") without
an exception. Writes the pages to the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter
from pathlib import Path

from data import HELD_FAMILY_SEED, HELD_SEED
from game_families import HELD_BACK, TRAINED
from games import make_game, parses, script_of

import pyengine
from pyengine import Sampling

FIRST = 5000  # past the pages that other measurements use
# Enough of a browser to run a page: events, a canvas that swallows drawing, frames by hand.
STUB = """
let next = null; const handlers = {};
const listen = (n, f) => { (handlers[n] = handlers[n] || []).push(f); };
const pen = new Proxy({}, {
  get: (t, k) => k in t ? t[k] : k === 'measureText' ? () => ({ width: 10 }) :
    k.startsWith('create') ? () => ({ addColorStop() {} }) : () => {}, set: () => true });
const canvas = { width: 480, height: 320, getContext: () => pen, addEventListener: listen,
  getBoundingClientRect: () => ({ left: 0, top: 0 }), style: {} };
globalThis.document = { getElementById: () => canvas, addEventListener: listen,
  querySelector: () => canvas, body: canvas };
globalThis.window = globalThis; globalThis.addEventListener = listen;
globalThis.requestAnimationFrame = f => { next = f; };
globalThis.alert = () => {};
require('vm').runInThisContext(require('fs').readFileSync(process.argv[2], 'utf8'));
const codes = ['Space', 'ArrowLeft', 'ArrowUp', 'ArrowRight', 'ArrowDown', 'Enter'];
if (!next) throw new Error('asks for no frame');
const [frames, every] = process.argv.slice(3).map(Number);
for (let i = 0; i < frames; i++) {
  if (every && i % every === 0) for (const n of ['keydown', 'keyup', 'click', 'mousedown'])
    for (const f of handlers[n] || []) f({ code: codes[i % 6], key: codes[i % 6],
      clientX: i, clientY: i, preventDefault() {} });
  const f = next; next = null; if (!f) throw new Error('stopped asking for frames'); f(i * 16);
}
"""


def runs(script: str, folder: Path, frames: int, input_every: int) -> bool:
    (folder / "stub.js").write_text(STUB)
    (folder / "page.js").write_text(script)
    command = ["node", folder / "stub.js", folder / "page.js", str(frames), str(input_every)]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, help="another bundle than the embedded one")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--held-families", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pair = pyengine.load(bundle=args.bundle)
    args.out.mkdir(parents=True, exist_ok=True)
    families = HELD_BACK if args.held_families else TRAINED
    first = FIRST + (HELD_FAMILY_SEED if args.held_families else HELD_SEED)
    total: Counter[str] = Counter()
    for seed in range(first, first + args.count):
        game = make_game(seed, families)
        result = pyengine.generate(
            game.prompt, pair=pair, max_tokens=2000, sampling=Sampling(seed=seed)
        )
        script = script_of(result.text)
        good = script is not None and parses(script)
        drew = good and runs(script, args.out, frames=60, input_every=0)
        ran = drew and runs(script, args.out, frames=300, input_every=7)
        row = {"ended": result.finish_reason == "stop", "parses": good, "draws": drew, "runs": ran}
        total.update(key for key, value in row.items() if value)
        total.update(f"{game.family}: {key}" for key, value in row.items() if value)
        total.update([f"{game.family}: pages"])
        print(seed, game.family, row, len(result.tokens), flush=True)
        page = result.text.partition("```html\n")[2].partition("\n```")[0]
        (args.out / f"{seed}{'-draws' * drew}{'-runs' * ran}.html").write_text(page)
    print(json.dumps({"pages": args.count, **dict(sorted(total.items()))}, indent=1))


if __name__ == "__main__":
    main()
