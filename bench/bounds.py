"""Memory of the published pairs, and bounds from bytes for Apple's chips: no timing, no device.

README's tables of memory and of bounds are this script's output; tests/project/test_readme.py
compares them.

    tokens per second  <=  bandwidth / bytes per round * tokens per round
    bytes per round     =  target + cache + k * (assistant + the part of the cache that it reads)
    tokens per round    =  1 + acceptance * k

A round has k drafts, so k + 1 rows. The target's weights and the cache are counted once per round,
whatever k is; what a round writes, and all arithmetic, is left out. So a bound says what no program
that reads these bytes can pass; it does not say what one reaches.

Run: python bench/bounds.py
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from pyengine.bench.bandwidth import of_chip
from pyengine.checkpoint.memory import GB
from pyengine.checkpoint.published import published
from pyengine.checkpoint.weights import Layout, assistant_layout, target_layout
from pyengine.model.memory import cache_bytes

PAIRS = ("31B", "26B-A4B", "12B", "E4B", "E2B")
CONTEXTS = {"8k": 8192, "32k": 32768, "128k": 131072}
GROUP = 64
BLOCK, ACCEPTANCES = 6, (0.4, 0.8)

# GB/s of the chips whose Macs may have 48 GB
CHIPS = {
    "M1 Max, M2 Max, M3 Max (40-core GPU)": of_chip("Apple M1 Max"),
    "M1 Ultra, M2 Ultra": of_chip("Apple M1 Ultra"),
    "M3 Ultra": of_chip("Apple M3 Ultra"),
    "M4 Pro": of_chip("Apple M4 Pro"),
    "M4 Max (40-core GPU)": of_chip("Apple M4 Max", 40),
    "M5 Pro": of_chip("Apple M5 Pro"),
    "M5 Max (40-core GPU)": of_chip("Apple M5 Max", 40),
}


def weight_bytes(layout: Layout, bits: int) -> float:
    """Memory of a model's tensors: bfloat16, or affine with a scale and a bias per group."""
    per_number = 2 if bits == 16 else bits / 8 + 2 * 2 / GROUP
    integers = sum(prod(layout.vectors[name]) for name in layout.integers)
    vectors = sum(map(prod, layout.vectors.values()))
    return sum(map(prod, layout.matrices.values())) * per_number + 2 * vectors + 2 * integers


def pair_bytes(name: str, bits: int) -> float:
    """Memory of target and assistant."""
    target, assistant = published(name)
    return weight_bytes(target_layout(target), bits) + weight_bytes(
        assistant_layout(assistant), bits
    )


def round_bytes(name: str, bits: int, context: int, block_size: int) -> float:
    """What a round must read; a dense pair only, since experts depend on the text."""
    target, assistant = published(name)
    if target.num_experts:
        raise ValueError(f"[bounds] name must be a dense pair but got {name}.")
    read = replace(
        target, layers=tuple(replace(n, kv_source=i) for i, n in enumerate(assistant.layers))
    )
    draft = weight_bytes(assistant_layout(assistant), bits) + cache_bytes(
        read, context, block_size, 2
    )
    once = weight_bytes(target_layout(target), bits) + cache_bytes(target, context, block_size, 2)
    return once + (block_size - 1) * draft


def bound(bandwidth: float, moved: float, block_size: int, acceptance: float) -> float:
    """Tokens per second that nobody passes who reads ``moved`` bytes per round."""
    return bandwidth * GB / moved * (1 + acceptance * (block_size - 1))


def memory_table() -> list[str]:
    """A row per pair: weights by bits, then the cache by context."""
    contexts = [f"cache at {name}" for name in CONTEXTS]
    rows = [_row("pair", "bfloat16", "8 bit", "4 bit", *contexts), _row(*["---"] + ["--:"] * 6)]
    for name in PAIRS:
        target, _ = published(name)
        weights = [f"{pair_bytes(name, bits) / GB:.1f}" for bits in (16, 8, 4)]
        caches = [f"{cache_bytes(target, n, BLOCK, 2) / GB:.1f}" for n in CONTEXTS.values()]
        rows.append(_row(name, *weights, *caches))
    return rows


def bounds_table() -> list[str]:
    """A row per chip for the 31B pair at 8 bit: plain decoding, then a block by acceptance."""
    plain = round_bytes("31B", 8, CONTEXTS["8k"], 1)
    block = round_bytes("31B", 8, CONTEXTS["8k"], BLOCK)
    columns = [f"acceptance {a}" for a in ACCEPTANCES]
    rows = [_row("chip", "GB/s", "plain", *columns), _row("---", *["--:"] * (2 + len(columns)))]
    for chip, bandwidth in CHIPS.items():
        bounds = [bound(bandwidth, plain, 1, 0.0)]
        bounds += [bound(bandwidth, block, BLOCK, a) for a in ACCEPTANCES]
        rows.append(_row(chip, str(bandwidth), *(f"{x:.0f}" for x in bounds)))
    return rows


def bytes_sentence() -> str:
    """The bytes that the bounds are computed from."""
    plain = round_bytes("31B", 8, CONTEXTS["8k"], 1) / GB
    block = round_bytes("31B", 8, CONTEXTS["8k"], BLOCK) / GB
    return f"{plain:.1f} GB per plain step, {block:.1f} GB per round"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("Memory in GB (10^9 bytes), target and assistant, bfloat16 cache:\n")
    print("\n".join(memory_table()))
    print(f"\nBound from bytes, tokens per second, 31B at 8 bit, 8k context, block {BLOCK};")
    print(f"{bytes_sentence()}:\n")
    print("\n".join(bounds_table()))
