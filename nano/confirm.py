"""Acceptance and step costs of the embedded pair, measured with the engine.

    python nano/confirm.py --drafters assistant,dflash --verify residual,block --drafts 3,7

The same held-back prompts and sampler as measure.py, made again from the generator and the running
interpreter's standard library (which must be the recorded one). Then the cost of a draft
step and of verify calls against a plain step, at 400 tokens of context.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from data import HELD_SEED, held_texts
from games import make_game
from measure import cut_prompts

import pyengine
from pyengine import Sampling
from pyengine.model.head import whole

CONTEXT, REPEATS = 400, 40


def acceptance(
    pair: pyengine.Pair, kind: str, args: argparse.Namespace, drafter: str, verify: str, k: int
) -> dict:
    """Kept over drafted, of k drafts a round; the prompts are decoded eight at a time."""
    encode, bos = pair.tokenizer.encode, pair.tokenizer.bos_id
    texts = [[bos, *encode(text)] for text in held_texts(kind, args.prompts)]
    prompts = cut_prompts(texts, kind, args.prompts)
    results = pyengine.generate(
        prompts,
        pair=pair,
        max_tokens=args.tokens,
        sampling=[Sampling(seed=i, verify=verify) for i in range(len(prompts))],
        block_size=k + 1,
        drafter=drafter,
    )
    stats = [result.stats for result in results]
    drafted, accepted, rounds = (
        sum(getattr(own, name) for own in stats) for name in ("drafted", "accepted", "rounds")
    )
    judged, kept = (
        np.sum([getattr(own, f"{name}_by_depth") for own in stats], 0)
        for name in ("drafted", "accepted")
    )
    return {
        "acceptance": round(accepted / drafted, 3),
        "tokens_per_round": round(accepted / rounds + 1, 2),
        "rounds": rounds,
        "accepted_by_depth": (kept / judged).round(3).tolist(),
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
    cache = target.new_cache()
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
    parser.add_argument("--drafters", default="assistant", help="assistant,dflash")
    parser.add_argument("--verify", default="residual", help="rules: residual,block")
    parser.add_argument("--drafts", default="3", help="a round: 3,7")
    args = parser.parse_args()
    pair = pyengine.load(bundle=args.bundle)
    report: dict = {"mlx": mx.__version__, "dtype": str(pair.target.dtype)}
    settings = itertools.product(
        *(part.split(",") for part in (args.drafters, args.verify, args.drafts)),
        filter(None, args.kinds.split(",")),
    )
    for drafter, verify, k, kind in settings:
        name = f"{kind} {drafter} {verify} {k}"
        report[name] = acceptance(pair, kind, args, drafter, verify, int(k))
        print(name, report[name], flush=True)
    report["steps"] = step_costs(pair)
    print(report["steps"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
