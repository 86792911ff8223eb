"""Acceptance and page quality of the trained pair, in plain PyTorch.

    python bench/nano/measure.py RUN acceptance     # -> RUN/acceptance.json
    python bench/nano/measure.py RUN pages          # -> RUN/pages.json and RUN/pages/*.html

Acceptance: temperature 1, top_p 0.95, top_k 64 on target and assistant, residual rule, block 4.
Prompts are cut inside held-back text: pages at two fifths, Python after 384 tokens of a random
place. Acceptance is accepted drafts over 3 x rounds. Both baselines draft through the same rounds:
prompt lookup, and a bigram table holding the target's mean distribution after each token.
Pages: whole answers sampled from chat prompts; how many hold a script that node parses, and how
many of those run for 300 frames against a stub canvas without an exception.
Weights go through 8-bit quantisation first, as in the bundle.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import sentencepiece as spm
import torch
from data import BOS, EOS, HELD_FAMILY_SEED, HELD_SEED
from decode import AssistantDrafts, BigramDrafts, LookupDrafts, Tally, sample_batch, speculate
from export import QUANTIZATION, load_assistant, load_target
from game_families import HELD_BACK, TRAINED
from games import make_game, parses, script_of
from model import Target

DRAFTS = 3
PAGE_CUT, PYTHON_PROMPT = 0.4, 384
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
for (let i = 0; i < 300; i++) {
  if (i % 7 === 0) for (const n of ['keydown', 'keyup', 'click', 'mousedown'])
    for (const f of handlers[n] || []) f({ code: codes[i % 6], key: codes[i % 6],
      clientX: i, clientY: i, preventDefault() {} });
  const f = next; next = null; if (!f) throw new Error('stopped asking for frames'); f(i * 16);
}
"""


def quantize_like_bundle(model: torch.nn.Module) -> None:
    """Round every parameter to what the 8-bit bfloat16 bundle holds."""
    group, bits = QUANTIZATION["group_size"], QUANTIZATION["bits"]
    for p in model.parameters():
        value = mx.array(p.detach().numpy()).astype(mx.bfloat16)
        if value.ndim == 2:
            packed = mx.quantize(value, group_size=group, bits=bits)
            value = mx.dequantize(*packed, group_size=group, bits=bits)
        p.data.copy_(torch.from_numpy(np.array(value.astype(mx.float32))))


def documents(path: Path) -> list[list[int]]:
    ids = np.load(path).astype(int)
    starts = np.nonzero(ids == BOS)[0]
    return [part.tolist() for part in np.split(ids, starts)[1:]]


def prompts_of(run: Path, kind: str, count: int) -> list[list[int]]:
    rng = random.Random(5)
    if kind == "python":
        files = documents(run / "python.held.npy")
        prompts = []
        for i in range(count):
            file = files[i % len(files)][1:]
            start = rng.randrange(max(1, len(file) - PYTHON_PROMPT))
            prompts.append([BOS, *file[start : start + PYTHON_PROMPT]])
        return prompts
    pages = documents(run / f"{kind}.held.npy")[:count]
    return [page[: int(len(page) * PAGE_CUT)] for page in pages]


@torch.no_grad()
def bigram_table(target: Target, run: Path, rows: int = 96) -> torch.Tensor:
    """log of the target's mean distribution after each token, over text it sampled itself."""
    own = torch.from_numpy(np.load(run / "own.npy")[:rows].astype(np.int64))
    vocab = target.config["vocab_size"]
    total, seen = torch.zeros(vocab, vocab), torch.zeros(vocab)
    overall = torch.zeros(vocab)
    for ids in own.split(8):
        p = target.head(target.hidden(ids)[0]).softmax(-1).flatten(0, 1)
        total.index_add_(0, ids.flatten(), p)
        seen.index_add_(0, ids.flatten(), torch.ones(ids.numel()))
        overall += p.sum(0)
    table = torch.where(seen[:, None] > 0, total / seen.clamp_min(1)[:, None], overall / seen.sum())
    return table.clamp_min(1e-9).log()


def acceptance(run: Path, args: argparse.Namespace) -> None:
    target, assistant = load_target(run), load_assistant(run)
    quantize_like_bundle(target)
    quantize_like_bundle(assistant)
    sp = spm.SentencePieceProcessor(model_file=str(run / "tokenizer.model"))
    stop = {EOS, sp.piece_to_id("<turn|>")}
    makers = {"assistant": AssistantDrafts(target, assistant)}
    if args.baselines:
        makers["bigram"] = BigramDrafts(bigram_table(target, run))
        makers["lookup"] = LookupDrafts(target.config["vocab_size"])
    report = {"drafts": DRAFTS, "prompts": args.prompts, "tokens": args.tokens}
    for kind in args.kinds.split(","):
        for name, drafts in makers.items():
            torch.manual_seed(2)
            tally, started = Tally(), time.time()
            for prompt in prompts_of(run, kind, args.prompts):
                speculate(target, drafts, prompt, args.tokens, DRAFTS, stop, tally)
            report[f"{kind} {name}"] = tally.report()
            print(kind, name, tally.report(), f"{time.time() - started:.0f} s", flush=True)
    (run / "acceptance.json").write_text(json.dumps(report, indent=1))


def runs(script: str, folder: Path) -> bool:
    (folder / "stub.js").write_text(STUB)
    (folder / "page.js").write_text(script)
    command = ["node", folder / "stub.js", folder / "page.js"]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def pages(run: Path, args: argparse.Namespace) -> None:
    target = load_target(run)
    quantize_like_bundle(target)
    sp = spm.SentencePieceProcessor(model_file=str(run / "tokenizer.model"))
    end, folder = sp.piece_to_id("<turn|>"), run / "pages"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(4)
    # Rows of one batch start from prompts of one length.
    by_length: dict[int, list[tuple[str, list[int]]]] = {}
    families = HELD_BACK if args.held_families else TRAINED
    first = HELD_FAMILY_SEED if args.held_families else HELD_SEED
    for seed in range(first + 5000, first + 5000 + args.prompts):
        game = make_game(seed, families)
        ids = [BOS, *sp.encode(f"<|turn>user\n{game.prompt}<turn|>\n<|turn>model\n")]
        by_length.setdefault(len(ids), []).append((game.family, ids))
    results = []
    for length, group in by_length.items():
        out = sample_batch(target, torch.tensor([ids for _, ids in group]), args.length)
        for (family, _), row in zip(group, out.tolist(), strict=True):
            answer = row[length:]
            ended = end in answer
            text = sp.decode(answer[: answer.index(end)] if ended else answer)
            script = script_of(text)
            good = script is not None and parses(script)
            ran = good and runs(script, folder)
            results.append({"family": family, "ended": ended, "parses": good, "runs": ran})
            found = text[text.find("<!DOCTYPE") :].split("\n```")[0]
            (folder / f"{len(results):03d}{'-runs' * ran}.html").write_text(found)
            print(results[-1], flush=True)
    total = {key: sum(r[key] for r in results) for key in ("ended", "parses", "runs")}
    print(len(results), total)
    report = {"pages": len(results), **total, "each": results}
    name = "pages.held.json" if args.held_families else "pages.json"
    (run / name).write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("what", choices=("acceptance", "pages"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per prompt")
    parser.add_argument("--length", type=int, default=1500, help="longest page with its prompt")
    parser.add_argument("--kinds", default="games,families,python")
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--held-families", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"acceptance": acceptance, "pages": pages}[args.what](args.run, args)


if __name__ == "__main__":
    main()
