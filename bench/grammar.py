"""What a grammar costs and brings: rounds, tok/s, forced tokens, and the price of a mask.

python bench/grammar.py                      # the embedded pair, ten schemas
python bench/grammar.py --vocab 262144       # masks alone, on a vocabulary of that size
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np

import pyengine
from pyengine import ops
from pyengine.grammar.asked import schema_source
from pyengine.grammar.compiled import Vocabulary, vocabulary_of
from pyengine.grammar.matcher import GrammarMatcher
from pyengine.task import embedded_pair
from pyengine.text.tokenizer import Tokenizer

MOST = 1500  # tokens of an answer, which none of the schemas needs
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


def several(items: Any, count: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": count, "maxItems": count}


# By the tokens of an answer
SCHEMAS = {
    "a number": COUNT,
    "a choice": {"enum": ["a bird", "a game", "nothing of both"]},
    "two fields": record(name=WORD, age=COUNT),
    "one of three": {"anyOf": [record(bird=WORD), record(cat=WORD, lives=COUNT), COUNT]},
    "a record": record(**PERSON),
    "nested records": record(
        player=record(**PERSON), high_scores=record(first=COUNT, second=COUNT)
    ),
    "a list of words": several(WORD, 12),
    "one long text": record(source={"type": "string", "minLength": 300, "maxLength": 300}),
    "a table": several(record(column=COUNT, row=COUNT, is_open=COUNT), 24),
    "a list of records": record(title=WORD, players=several(record(**PERSON), 12)),
}


def block_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def answers(
    schema: Any, block: int | str, seeds: range
) -> tuple[list[list[int]], dict[str, float]]:
    """Texts, and figures over all of them; the first one warms up and is made twice."""
    form = {"type": "json_schema", "json_schema": {"schema": schema}} if schema else None
    made = []
    for seed in [seeds[0], *seeds]:
        sampling = {"seed": seed, "verify": "coupled"}
        asked = {"response_format": form, "block_size": block, "max_tokens": MOST if form else 200}
        made.append(pyengine.generate(PROMPT, sampling=sampling, **asked))
    stats = [result.stats for result in made[1:]]
    tokens = sum(s.generated_tokens - 1 for s in stats)
    drafted = sum(s.drafted for s in stats)
    valid = [schema is None or is_valid(result, schema) for result in made[1:]]
    return [result.tokens for result in made[1:]], {
        "valid": sum(valid) / len(valid),
        "tokens": tokens,
        "per round": tokens / sum(s.rounds for s in stats),
        "tok/s": tokens / sum(s.decode_s for s in stats),
        "forced": sum(s.forced for s in stats) / tokens,
        "acceptance": sum(s.accepted for s in stats) / drafted if drafted else 0.0,
    }


def is_valid(result: pyengine.Result, schema: Any) -> bool:
    try:
        jsonschema.validate(json.loads(result.text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return result.finish_reason == "stop"


def table(block: int | str, seeds: range) -> None:
    heads = ["answer", "valid", "tokens", f"per round, block {block}", "forced", "acceptance"]
    heads += ["tok/s, block 1", f"tok/s, block {block}", "texts equal"]
    print(f"| {' | '.join(heads)} |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: | --- |")
    for name, schema in {**SCHEMAS, "no grammar": None}.items():
        texts, plain = answers(schema, 1, seeds)
        others, spec = answers(schema, block, seeds)
        same = "yes" if texts == others else "no"
        per_round, speeds = spec["per round"], (plain["tok/s"], spec["tok/s"])
        cells = [name, f"{spec['valid']:.0%}", f"{spec['tokens']:.0f}", f"{per_round:.2f}"]
        cells += [f"{spec['forced']:.0%}", f"{spec['acceptance']:.2f}"]
        cells += [*(f"{speed:.0f}" for speed in speeds), same]
        print(f"| {' | '.join(cells)} |")


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
        mask = mx.random.randint(0, 1 << 32, (rows, vocab // 32)).astype(mx.uint32)
        mx.eval(logits, mask)
        took = {"without": [], "with": []}
        for _ in range(15):
            for name, own in zip(took, (None, mask), strict=True):
                start = time.perf_counter()
                mx.eval(ops.filter_logits(logits, mask=own, **settings))
                took[name].append(1e3 * (time.perf_counter() - start))
        least = ", ".join(f"{name} {min(each):.2f}" for name, each in took.items())
        print(f"filter of {rows} rows, ms, least of 15, masks: {least}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-size", type=block_size, default=4, help="a number or auto")
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
