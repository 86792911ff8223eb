"""Acceptance and step costs of the embedded pair, measured with the engine.

    python nano/confirm.py

The same held-back prompts and sampler as measure.py, made again from the generator and the running
interpreter's standard library (which must be the recorded one), block 4. Then the cost of a draft
step and of verify calls against a plain step, at 400 tokens of context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from data import HELD_SEED, held_texts
from games import make_game
from measure import cut_prompts

import pyengine
from pyengine import Sampling
from pyengine.model.head import whole

BLOCK = 4
CONTEXT, REPEATS = 400, 40


def acceptance(pair: pyengine.Pair, kind: str, count: int, tokens: int) -> dict:
    encode, bos = pair.tokenizer.encode, pair.tokenizer.bos_id
    texts = [[bos, *encode(text)] for text in held_texts(kind, count)]
    drafted = accepted = rounds = 0
    by_depth = [[0, 0] for _ in range(BLOCK - 1)]
    for i, prompt in enumerate(cut_prompts(texts, kind, count)):
        stats = pyengine.generate(
            prompt, pair=pair, max_tokens=tokens, sampling=Sampling(seed=i), block_size=BLOCK
        ).stats
        drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
        rounds += stats.rounds
        counts = zip(stats.drafted_by_depth, stats.accepted_by_depth, strict=True)
        for depth, (tried, kept) in enumerate(counts):
            by_depth[depth][0] += tried
            by_depth[depth][1] += kept
    return {
        "acceptance": round(accepted / drafted, 3),
        "tokens_per_round": round(accepted / rounds + 1, 2),
        "rounds": rounds,
        "accepted_by_depth": [round(kept / tried, 3) for tried, kept in by_depth],
    }


def milliseconds(run: Callable[[], list[mx.array]]) -> float:
    """Median of evaluated calls."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:]) * 1e3


def step_costs(pair: pyengine.Pair) -> dict:
    ids = [pair.tokenizer.bos_id, *pair.tokenizer.encode(make_game(HELD_SEED).chat())][:CONTEXT]
    target, assistant = pair.target, pair.assistant
    cache = target.new_cache(16)
    _, hidden = target.prefill(ids, cache)
    token = mx.array(ids[-1:], dtype=mx.int32)

    # As a round does it: the next call depends on the array of the last one.
    def verify(count: int) -> Callable[[], list[mx.array]]:
        block = mx.array(ids[-count:], dtype=mx.int32)

        def run() -> list[mx.array]:
            logits, vectors = target.forward([block], [cache])
            return [logits.array, vectors]

        return run

    def draft() -> list[mx.array]:
        logits, vector = assistant.forward(target.embed(token), hidden, [cache])
        return [whole(logits), vector]

    plain, four, step = milliseconds(verify(1)), milliseconds(verify(4)), milliseconds(draft)
    return {
        "plain_step_ms": round(plain, 2),
        "verify_4_over_plain": round(four / plain, 2),
        "draft_over_plain": round(step / plain, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, help="another bundle than the embedded one")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--kinds", default="games,families,python")
    args = parser.parse_args()
    pair = pyengine.load(bundle=args.bundle)
    report: dict = {"mlx": mx.__version__, "dtype": str(pair.target.dtype)}
    for kind in filter(None, args.kinds.split(",")):
        report[kind] = acceptance(pair, kind, args.prompts, args.tokens)
        print(kind, report[kind], flush=True)
    report["steps"] = step_costs(pair)
    print(report["steps"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
