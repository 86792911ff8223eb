"""Acceptance of the trained pair and of two baselines, in plain PyTorch.

    python nano/measure.py RUN                # -> RUN/acceptance.json

Temperature 1, top_p 0.95, top_k 64 on target and assistant, residual rule, block 4.
Prompts are cut inside held-back text: pages at two fifths, Python after 384 tokens of a random
place. Acceptance is accepted drafts over 3 x rounds. Both baselines draft through the same rounds:
prompt lookup, and a bigram table holding the target's mean distribution after each token.
Beside it the target's entropy per token, raw and filtered, over the rows that gave tokens. Weights
go through 8-bit quantisation first, as in the bundle.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import sentencepiece as spm
import torch
from data import BOS, EOS
from decode import AssistantDrafts, BigramDrafts, LookupDrafts, Tally, speculate
from export import QUANTIZATION, load_assistant, load_target
from model import Target

DRAFTS = 3
PAGE_CUT, PYTHON_PROMPT = 0.4, 384


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


def cut_prompts(texts: list[list[int]], kind: str, count: int) -> list[list[int]]:
    """Prompts that end inside held-back documents, `<bos>` first."""
    if kind != "python":
        return [page[: int(len(page) * PAGE_CUT)] for page in texts[:count]]
    rng, prompts = random.Random(5), []
    for i in range(count):
        file = texts[i % len(texts)][1:]
        start = rng.randrange(max(1, len(file) - PYTHON_PROMPT))
        prompts.append([BOS, *file[start : start + PYTHON_PROMPT]])
    return prompts


@torch.no_grad()
def bigram_table(target: Target, run: Path, rows: int = 96) -> torch.Tensor:
    """log of the target's mean distribution after each token, over text it sampled itself."""
    own = torch.from_numpy(np.load(run / "own.python.npy")[:rows].astype(np.int64))
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
    makers = {
        "assistant": lambda: AssistantDrafts(target, assistant),
        "bigram": lambda: BigramDrafts(bigram_table(target, run)),
        "lookup": lambda: LookupDrafts(target.config["vocab_size"]),
    }
    chosen = {name: makers[name]() for name in args.drafts.split(",")}
    report = {"drafts": DRAFTS, "prompts": args.prompts, "tokens": args.tokens}
    for kind in args.kinds.split(","):
        for name, drafts in chosen.items():
            torch.manual_seed(2)
            tally, started = Tally(), time.time()
            held = documents(run / f"{kind}.held.npy")
            for prompt in cut_prompts(held, kind, args.prompts):
                speculate(target, drafts, prompt, args.tokens, DRAFTS, stop, tally)
            report[f"{kind} {name}"] = tally.report()
            print(kind, name, tally.report(), f"{time.time() - started:.0f} s", flush=True)
    (run / "acceptance.json").write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per prompt")
    parser.add_argument("--kinds", default="games,families,python")
    parser.add_argument("--drafts", default="assistant,bigram,lookup")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    acceptance(args.run, args)


if __name__ == "__main__":
    main()
