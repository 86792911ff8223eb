"""What a grammar costs and brings: rounds, tok/s, forced tokens, and the price of a mask.

python bench/grammar.py                      # the embedded pair, five schemas
python bench/grammar.py --vocab 262144       # masks alone, on a vocabulary of that size
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import mlx.core as mx
import numpy as np

import pyengine
from pyengine.grammar.asked import schema_source
from pyengine.grammar.compiled import Vocabulary, vocabulary_of
from pyengine.grammar.matcher import GrammarMatcher
from pyengine.sampling.mask import filter_masked
from pyengine.task import embedded_pair
from pyengine.text.tokenizer import Tokenizer

PROMPT = "Create a single-file HTML5 canvas Flappy Bird game."
WORD = {"type": "string", "maxLength": 16}
COUNT = {"type": "integer", "minimum": 0, "maximum": 9999}
PERSON = {"name": WORD, "age": COUNT, "email": WORD, "is_admin": {"type": "boolean"}}


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = {
    "a choice": {"enum": ["a bird", "a game", "nothing of both"]},
    "a record": record(**PERSON),
    "nested records": record(
        player=record(**PERSON), high_scores=record(first=COUNT, second=COUNT)
    ),
    "a list of words": {"type": "array", "items": WORD, "minItems": 12, "maxItems": 12},
    "one long text": record(source={"type": "string", "minLength": 300, "maxLength": 300}),
}


def answers(schema: Any, block: int, seeds: range) -> tuple[list[list[int]], dict[str, float]]:
    """Texts, and figures over all of them; the first one warms up and is made twice."""
    form = {"type": "json_schema", "json_schema": {"schema": schema}} if schema else None
    made = []
    for seed in [seeds[0], *seeds]:
        sampling = {"seed": seed, "verify": "coupled"}
        asked = {"response_format": form, "block_size": block, "max_tokens": 200}
        made.append(pyengine.generate(PROMPT, sampling=sampling, **asked))
    stats = [result.stats for result in made[1:]]
    tokens = sum(s.generated_tokens - 1 for s in stats)
    drafted = sum(s.drafted for s in stats)
    return [result.tokens for result in made[1:]], {
        "tokens": tokens,
        "per round": tokens / sum(s.rounds for s in stats),
        "tok/s": tokens / sum(s.decode_s for s in stats),
        "forced": sum(s.forced for s in stats) / tokens,
        "acceptance": sum(s.accepted for s in stats) / drafted if drafted else 0.0,
    }


def table(block: int, seeds: range) -> None:
    print(f"| answer | tokens | per round, block {block} | forced | acceptance | tok/s, block 1 "
          f"| tok/s, block {block} | texts equal |")  # fmt: skip
    print("| --- | --: | --: | --: | --: | --: | --: | --- |")
    for name, schema in {**SCHEMAS, "no grammar": None}.items():
        texts, plain = answers(schema, 1, seeds)
        others, spec = answers(schema, block, seeds)
        same = "yes" if texts == others else "no"
        print(
            f"| {name} | {spec['tokens']:.0f} | {spec['per round']:.2f} | {spec['forced']:.0%} | "
            f"{spec['acceptance']:.2f} | {plain['tok/s']:.0f} | {spec['tok/s']:.0f} | {same} |"
        )


class Larger:
    """A tokenizer with made-up words behind its own, as many as a vocabulary is to have."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        rng, own = random.Random(1), tokenizer.vocab_size
        words = [w for w in map(tokenizer.token_bytes, range(own)) if w]
        self._more = [b"".join(rng.sample(words, 2 + i % 2))[:16] for i in range(vocab - own)]
        self._tokenizer, self._own = tokenizer, own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def token_bytes(self, token: int) -> bytes:
        less = token < self._own
        return self._tokenizer.token_bytes(token) if less else self._more[token - self._own]


def masks(vocab: int, texts: int) -> None:
    pair, rng = embedded_pair(), random.Random(2)
    tokenizer: Any = Larger(pair.tokenizer, vocab)
    start = time.process_time()
    made = Vocabulary(tokenizer, vocab, (16,))
    print(f"{vocab} tokens, once per pair: {time.process_time() - start:.2f} s of processor time")
    print("| grammar | compiled, ms | masks | us each, median | mean | p99 |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name, schema in {**SCHEMAS, "any object": {"type": "object"}}.items():
        start = time.process_time()
        grammar = made.compile(schema_source(schema))
        compiled, took = time.process_time() - start, []
        row = np.zeros(grammar.words, np.uint32)
        for _ in range(texts):
            matcher = GrammarMatcher(grammar, pair.tokenizer, [2])
            for _ in range(60):
                row[:] = 0
                start = time.process_time()
                matcher.fill(row)
                took.append(1e6 * (time.process_time() - start))
                ids = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
                token = int(rng.choice(ids))
                if token == 16 or not matcher.add(token):
                    break
        print(f"| {name} | {1e3 * compiled:.1f} | {len(took)} | {statistics.median(took):.0f} | "
              f"{statistics.mean(took):.0f} | {np.percentile(took, 99):.0f} |")  # fmt: skip
    settings = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    for rows in (1, 4, 16):
        logits = mx.random.normal((rows, vocab))
        mask = mx.where(mx.random.uniform(shape=(rows, vocab)) < 0.5, 0.0, -mx.inf)
        mx.eval(logits, mask)
        each = []
        for _ in range(15):
            start = time.perf_counter()
            mx.eval(filter_masked(logits, mask, **settings))
            each.append(1e3 * (time.perf_counter() - start))
        print(f"filter of {rows} rows with masks: {min(each):.2f} ms least of 15")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--vocab", type=int)
    asked = parser.parse_args()
    vocabulary_of(embedded_pair())
    if asked.vocab is None:
        table(asked.block_size, range(asked.seeds))
    else:
        masks(asked.vocab, 10)


if __name__ == "__main__":
    main()
