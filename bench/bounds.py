"""Memory of the published pairs, and bounds from bytes for Apple's chips: no timing, no device.

README's tables of memory and of bounds are this script's output, and so are the others named
below; tests/project/test_readme.py compares them.

    tokens per second  <=  bandwidth / bytes per round * tokens per round
    bytes per round     =  target + cache + k * (assistant + the part of the cache that it reads)
    tokens per round    =  1 + acceptance * k

A round has k drafts, so k + 1 rows. The target's weights and the cache are counted once per round,
whatever k is; what a round writes, and all arithmetic, is left out. So a bound says what no program
that reads these bytes can pass; it does not say what one reaches.

The tables of drafters and of long blocks, which docs/sweep.md has, and that of rounds by drafter in
docs/drafters.md count the weights once for each 16 rows of a verify call, as our kernels read them.

The tables of rounds and prefill, which docs/design.md has, and of all pairs, which docs/speed.md
has, add arithmetic, as if loads and it overlapped perfectly: of a model's matmuls and of its
attention, or of each call that `pyengine.model.plan` gives for a prompt, the longer counts. Our
matmuls are given the instructions of docs/isa.md, MLX's and attention the chip's peak, which they
do not reach.

Run: python bench/bounds.py
"""

from __future__ import annotations

from math import ceil, prod
from typing import NamedTuple

from pyengine.bench import traffic
from pyengine.bench.bandwidth import of_chip
from pyengine.checkpoint.memory import GB
from pyengine.checkpoint.published import DFLASH, published, published_dflash
from pyengine.checkpoint.weights import assistant_layout, target_layout
from pyengine.model.config import AssistantConfig, TargetConfig
from pyengine.model.memory import cache_bytes
from pyengine.model.plan import Call, plan, reusable, whole

PAIRS = ("31B", "26B-A4B", "12B", "E4B", "E2B")
CONTEXTS = {"8k": 8192, "32k": 32768, "128k": 131072}
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


class Chip(NamedTuple):
    """What a prefill's bound needs to know. Lanes do one fused multiply-add in a clock; clocks are
    those that others measured (M1, M2) or assumed from them. ``tensor`` is how much faster MLX's
    matmuls are where there are tensor units: four times, as Apple says of the M5, is an assumption.
    """

    bandwidth: int  # GB/s
    cores: int
    clock: float  # GHz
    tensor: int = 1

    @property
    def flops(self) -> float:
        return self.cores * 128 * 2 * self.clock * 1e9


PREFILL_CHIPS = {
    "M1 Max": Chip(400, 32, 1.296),
    "M2 Ultra": Chip(800, 76, 1.398),
    "M3 Max": Chip(400, 40, 1.38),
    "M4 Max": Chip(546, 40, 1.578),
    "M5 Max": Chip(614, 40, 1.62, tensor=4),
}
# Of the table of all pairs; the clock is taken from the larger sibling
PAIR_CHIPS = {"M4 Pro": Chip(273, 20, 1.578), **PREFILL_CHIPS}
PROMPTS = {"1k": 1024, "8k": 8192, "32k": 32768}
TURN = (8000, 500, 100)  # tokens of a prompt, of its answer, and of what is said next
SLICE = 16  # rows for which our kernels read the weights once
# Clocks of a core's lane for a weight byte, by bits and rows: `quantized_matmul` in docs/isa.md,
# which its relatives are near, and `quantized_expert_matmul`
CLOCKS_PER_BYTE = {8: {1: 5.43, 6: 11.94, 16: 25.20}, 4: {1: 10.86, 6: 23.85, 16: 50.03}}
EXPERT_CLOCKS_PER_BYTE = {8: {1: 5.56, 6: 13.83}, 4: {1: 10.99, 6: 26.67}}

DRAFTS = (5, 15, 31, 63, 99, 127)  # of the tables of drafters and of long blocks
ROUND_BLOCKS = (2, 4, 6, 8, 12, 16)  # of the table of rounds by drafter
CHANCES = (0.6, 0.8, 0.9, 0.95, 0.99)  # of a draft to be kept where all before it are


def pair_bytes(name: str, bits: int) -> float:
    """Memory of target and assistant."""
    target, assistant = published(name)
    layouts = target_layout(target), assistant_layout(assistant)
    return sum(traffic.layout_bytes(layout, bits) for layout in layouts)


def round_bytes(
    name: str, bits: int, context: int, block_size: int, experts: float | None = None
) -> float:
    """What a round must read; see :func:`pyengine.bench.traffic.round_bytes`."""
    return traffic.round_bytes(*published(name), bits, context, block_size, experts)


def bound(bandwidth: float, moved: float, block_size: int, acceptance: float) -> float:
    """Tokens per second that nobody passes who reads ``moved`` bytes per round."""
    return bandwidth * GB / moved * (1 + acceptance * (block_size - 1))


def round_seconds(
    name: str,
    chip: Chip,
    context: int,
    block_size: int,
    bits: int = 8,
    experts: float | None = None,
) -> float:
    """A bound for a round with arithmetic: of the matmuls and of the attention of each model, the
    longer of bytes and instructions. Of a mixture ``experts`` as for :func:`round_bytes`."""
    target, assistant = published(name)
    packed = bits / (bits + 8 * 2 * 2 / traffic.GROUP)  # of a matrix's bytes: no scale, no bias

    def step(
        config: TargetConfig | AssistantConfig, moved: float, clocks: float, kept: float, rows: int
    ) -> float:
        time = max(moved / (chip.bandwidth * GB), clocks * packed / (chip.flops / 2))
        products = sum(
            4
            * config.num_heads
            * n.head_dim
            * rows
            * min(context, config.window if n.sliding else context)
            for n in config.layers
        )
        return time + max(kept / (chip.bandwidth * GB), products / chip.flops)

    own = CLOCKS_PER_BYTE[bits]
    kept = traffic.kept_bytes(traffic.seen_by(target, assistant), context, block_size)
    moved = traffic.draft_bytes(target, assistant, bits, context, block_size) - kept
    clocks = traffic.assistant_bytes(assistant, bits) * own[1]
    draft = step(assistant, moved, clocks, kept, 1)
    kept = traffic.kept_bytes(target, context, block_size)
    moved = traffic.step_bytes(target, bits, context, block_size, experts) - kept
    of_experts = traffic.expert_bytes(target, bits, experts)
    # By chance an expert has little more than a row; the same ones for all have all rows
    rows = block_size if experts is None else 1
    clocks = (traffic.target_bytes(target, bits, experts) - of_experts) * own[block_size]
    clocks += of_experts * EXPERT_CLOCKS_PER_BYTE[bits][rows]
    return step(target, moved, clocks, kept, block_size) + (block_size - 1) * draft


def call_seconds(name: str, chip: Chip, call: Call) -> float:
    """A bound for one call of a prefill at 8 bit: its weights, and attention to what it sees."""
    target, _ = published(name)
    if target.num_experts:
        raise ValueError(f"[bounds] name must be a dense pair but got {name}.")
    layout = target_layout(target)
    shapes = [shape for key, shape in layout.matrices.items() if not key.startswith("embed_tokens")]
    numbers = sum(map(prod, shapes))  # the head sees one row of a prompt
    moved = numbers * (1 + 4 / traffic.GROUP)
    attention = 0
    for layer in target.layers:
        seen = call.start + call.rows
        seen = min(seen, target.window - 1 + call.rows) if layer.sliding else seen
        attention += 4 * target.num_heads * layer.head_dim * call.rows * seen
    reads, peak = ceil(call.rows / SLICE), chip.flops
    arithmetic = (
        reads * numbers * CLOCKS_PER_BYTE[8][SLICE] / (peak / 2)
    )  # a clock of a lane is two of these
    if call.kernel == "mlx":
        reads, peak = 1, peak * chip.tensor
        arithmetic = 2 * numbers * call.rows / peak
    return max(moved * reads / (chip.bandwidth * GB), arithmetic) + attention / peak


def prefill_seconds(name: str, chip: Chip, start: int, stop: int, borrows: bool = True) -> float:
    """A bound for a prompt of ``stop`` tokens of which ``start`` are there: by the calls that a GPU
    makes, or without MLX's kernels."""
    calls = plan(start, stop, borrows)
    return sum(call_seconds(name, chip, call) for call in calls)


def turn_seconds(name: str, chip: Chip, prompt: int, answer: int, new: int) -> tuple[float, float]:
    """A bound for a chat's next turn, and the same if all of our kernels' work were reused, as it
    could be without MLX's."""
    stop = prompt + answer + new
    known = reusable(prompt + answer - 1, whole(prompt, True), stop, True)
    without = prefill_seconds(name, chip, prompt + answer - 1, stop, borrows=False)
    return prefill_seconds(name, chip, known, stop), without


def prefill_table() -> list[str]:
    """A row per chip for the 31B at 8 bit: seconds to the first token with MLX's kernels for whole
    chunks, and with ours alone; then the next turn of a chat."""
    columns = [f"{n}, {how}" for n in PROMPTS for how in ("planned", "own")]
    columns += ["next turn, planned", "own"]
    rows = [_row("chip", *columns), _row("---", *["--:"] * len(columns))]
    for name, chip in PREFILL_CHIPS.items():
        bounds = [
            prefill_seconds("31B", chip, 0, stop, borrows)
            for stop in PROMPTS.values()
            for borrows in (True, False)
        ]
        bounds += turn_seconds("31B", chip, *TURN)
        rows.append(_row(name, *(f"{x:.1f}" for x in bounds)))
    return rows


def round_table() -> list[str]:
    """A row per chip for the 31B at 8 bit and 8k: a plain step, a round, and their ratio."""
    columns = ["plain step, ms", f"round of block {BLOCK}, ms", "round in plain steps"]
    rows = [_row("chip", *columns), _row("---", *["--:"] * len(columns))]
    for name, chip in PREFILL_CHIPS.items():
        plain, block = (1e3 * round_seconds("31B", chip, CONTEXTS["8k"], n) for n in (1, BLOCK))
        rows.append(_row(name, f"{plain:.0f}", f"{block:.0f}", f"{block / plain:.2f}"))
    return rows


def pairs_table(bits: int = 8) -> list[str]:
    """A row per pair and chip at 8k: a plain step and a round from bytes alone and with arithmetic,
    and the tokens per second of the latter. A mixture has two rows: all rows of a block choose the
    same experts, or each its own by chance."""
    columns = ["plain, bytes", "plain", f"block {BLOCK}, bytes", f"block {BLOCK}", "in plain steps"]
    columns += ["tok/s plain", *(f"at {a}" for a in ACCEPTANCES)]
    rows = [_row("pair", "chip", *columns), _row("---", "---", *["--:"] * len(columns))]
    context = CONTEXTS["8k"]
    for name in PAIRS:
        target, _ = published(name)
        cases: dict[str, float | None] = {name: None}
        if target.num_experts:
            chance = traffic.distinct_experts(target, BLOCK)
            cases = {f"{name}, same experts": None, f"{name}, {chance:.0f} experts": chance}
        for case, experts in cases.items():
            for chip_name, chip in PAIR_CHIPS.items():
                bandwidth = chip.bandwidth * GB
                figures = []
                for block, used in ((1, None), (BLOCK, experts)):
                    figures.append(round_bytes(name, bits, context, block, used) / bandwidth)
                    figures.append(round_seconds(name, chip, context, block, bits, used))
                _, plain, _, block_s = figures
                rates = [(1 + a * (BLOCK - 1)) / block_s for a in ACCEPTANCES]
                cells = [f"{1e3 * x:.1f}" for x in figures] + [f"{block_s / plain:.2f}"]
                cells += [f"{x:.0f}" for x in (1 / plain, *rates)]
                rows.append(_row(case, chip_name, *cells))
    return rows


def verify_bytes(k: int, name: str = "31B") -> float:
    """What a pair at 8 bit reads to verify k drafts: weights once for each 16 rows. Rows of a
    mixture choose their experts by chance."""
    target, _ = published(name)
    kept = traffic.step_bytes(target, 8, CONTEXTS["8k"], k + 1) - traffic.target_bytes(target, 8)
    slices = [min(SLICE, k + 1 - first) for first in range(0, k + 1, SLICE)]
    experts = [traffic.distinct_experts(target, rows) for rows in slices]
    return kept + sum(traffic.target_bytes(target, 8, used) for used in experts)


def drafts_bytes(drafter: str, k: int, name: str = "31B") -> float | None:
    """What a drafter of a pair reads for k drafts at 8 bit; None for more than it was trained to
    make in one pass."""
    target, assistant = published(name)
    dflash = published_dflash(name)
    if drafter == "dflash" and k >= dflash.block_size:
        return None
    models = assistant, dflash
    return traffic.drafting_bytes(drafter, target, models, 8, CONTEXTS["8k"], k + 1)


def drafters_table() -> list[str]:
    """A row per drafter of the 31B at 8 bit and 8k: GB for five drafts, and rounds in plain steps,
    which are the tokens that a round must commit to be no slower than plain decoding."""
    plain = verify_bytes(0)
    rows = [_row("drafter", "GB for 5 drafts", *(f"{k} drafts" for k in DRAFTS))]
    rows.append(_row("---", *["--:"] * (1 + len(DRAFTS))))
    for drafter in _drafters("31B"):
        cells = []
        for k in DRAFTS:
            moved = drafts_bytes(drafter, k)
            cells.append("-" if moved is None else f"{(verify_bytes(k) + moved) / plain:.2f}")
        five = drafts_bytes(drafter, 5)
        assert five is not None
        rows.append(_row(drafter, f"{five / GB:.1f}", *cells))
    return rows


def rounds_table() -> list[str]:
    """A row per pair with a DFlash and drafter, at 8 bit and 8k: GB of a plain step, and of a round
    by block size, with the same in plain steps."""
    rows = [_row("pair", "drafter", "plain step", *(f"block {n}" for n in ROUND_BLOCKS))]
    rows.append(_row("---", "---", *["--:"] * (1 + len(ROUND_BLOCKS))))
    for name in DFLASH:
        plain = verify_bytes(0, name)
        for drafter in _drafters(name):
            cells = []
            for k in (n - 1 for n in ROUND_BLOCKS):
                drafts = drafts_bytes(drafter, k, name)
                assert drafts is not None
                moved = verify_bytes(k, name) + drafts
                cells.append(f"{moved / GB:.1f} ({moved / plain:.2f})")
            rows.append(_row(name, drafter, f"{plain / GB:.1f}", *cells))
    return rows


def _drafters(name: str) -> tuple[str, ...]:
    """Those of a pair; an exit behind a fifth of its layers stands for early exit."""
    target, _ = published(name)
    return "lookup", "assistant", "dflash", f"early:{len(target.layers) // 5}"


def long_blocks_table() -> list[str]:
    """A row per chance of a draft: times plain decoding that the assistant's drafts allow on the
    31B at 8 bit and 8k, if every draft behind kept ones had that chance."""
    plain = verify_bytes(0)
    rows = [_row("chance of a draft", *(f"{k} drafts" for k in DRAFTS))]
    rows.append(_row("--:", *["--:"] * len(DRAFTS)))
    for chance in CHANCES:
        cells = []
        for k in DRAFTS:
            tokens = sum(chance**i for i in range(k + 1))
            moved = drafts_bytes("assistant", k)
            assert moved is not None
            cells.append(f"{tokens * plain / (verify_bytes(k) + moved):.2f}")
        rows.append(_row(f"{chance:g}", *cells))
    return rows


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


def dflash_table() -> list[str]:
    """Bytes of drafting: by the assistant, a draft each; by DFlash, a block each."""
    rows = [_row("pair", "plain step", "assistant, a draft", "DFlash, a block", "drafts alike")]
    rows.append(_row("---", *["--:"] * 4))
    for name in DFLASH:
        target, assistant = published(name)
        step = traffic.step_bytes(target, 8, CONTEXTS["8k"], 1)
        draft = traffic.draft_bytes(target, assistant, 8, CONTEXTS["8k"], BLOCK)
        block = traffic.dflash_bytes(target, published_dflash(name), 8, CONTEXTS["8k"], 8)
        own = [f"{moved / GB:.2f}" for moved in (step, draft, block)]
        rows.append(_row(name, *own, f"{block / draft:.1f}"))
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
    print("\nRound, bound in milliseconds with arithmetic, never measured: 31B at 8 bit, 8k:\n")
    print("\n".join(round_table()))
    for bits in CLOCKS_PER_BYTE:
        print(f"\nAll pairs, bound in milliseconds, never measured: {bits} bit, 8k:\n")
        print("\n".join(pairs_table(bits)))
    print("\nDrafters of the 31B at 8 bit and 8k, bound from bytes: rounds in plain steps:\n")
    print("\n".join(drafters_table()))
    print("\nRounds of all pairs with a DFlash, GB and plain steps, bound from bytes: 8 bit, 8k:\n")
    print("\n".join(rounds_table()))
    print("\nThe assistant's of the 31B again, times plain decoding by the chance of a draft:\n")
    print("\n".join(long_blocks_table()))
    print(
        "\nPrefill, bound in seconds, never measured: 31B at 8 bit; by the calls of a GPU, and with"
    )
    print(f"our kernels alone; then a turn of {TURN[2]} tokens after {TURN[0]} and an answer of")
    print(f"{TURN[1]}:\n")
    print("\n".join(prefill_table()))
    print("\nDrafting, GB per step, draft or block of 8: 8 bit, 8k:\n")
    print("\n".join(dflash_table()))
