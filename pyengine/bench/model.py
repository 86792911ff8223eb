"""``bench model``: what plain steps, rounds and a prompt cost at a published shape.

Generated weights keep next to no drafts, so what is timed is the round, which takes as long
whatever it keeps and whatever lookup found; tokens per second follow from an acceptance that is
assumed.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from pyengine.bench import traffic
from pyengine.bench.gemma_mtp import Row
from pyengine.bench.generated import Plan
from pyengine.checkpoint.pair import Pair
from pyengine.drafters import first_of, is_name, new_drafter
from pyengine.drafters.drafter import MAX_BLOCK, Drafter
from pyengine.drafters.lookup import SHORTEST, LookupDrafter
from pyengine.engine import round as on_device
from pyengine.engine.prefill import Shared
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import TokenSequence
from pyengine.model.head import Logits
from pyengine.ops import dispatch
from pyengine.ops.filter_logits import Filtered
from pyengine.ops.recorded import recorded
from pyengine.sampling.settings import Sampling

PARTS = ("draft", "layers", "head", "accept")
WARM_UP = 2  # rounds of each kind: one records its graph, one plays it for the first time
SAMPLING = Sampling(temperature=1.0, top_p=0.95, top_k=64, seed=0)  # the published card's

# Of a terminal of 80 columns
HEADS = ("block", "round", "draft", "verify", "head", "accept", "host", "in plain", "GB/s", "of it")


class WholeRounds(Rounds):
    """Rounds as a generation plays them; and how long the newest one was evaluated."""

    device_s = 0.0

    def _free(self, going: Sequence[TokenSequence], begin: on_device.Start) -> on_device.Played:
        played = super()._free(going, begin)
        start = time.perf_counter()
        mx.eval(played)
        self.device_s = time.perf_counter() - start
        return played


class RanTarget(NamedTuple):
    """What the layers of the target made of a block."""

    rows: mx.array  # hidden vectors of all rows
    hidden: tuple[mx.array, ...]  # of each sequence
    arena: list[mx.array]  # none where it was written in place


class PartedRounds(Rounds):
    """The same rounds in four parts, each recorded and evaluated by itself; and the time of each
    in the newest one."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._parts: dict[on_device.RecordedRound, list[Callable[..., Any]]] = {}

    def _free(self, going: Sequence[TokenSequence], begin: on_device.Start) -> on_device.Played:
        own = self._round(going, self._groups)
        if own not in self._parts:
            others = (partial(part, own.open_texts) for part in (_layers, _head, _accept))
            self._parts[own] = [own.draft, *map(recorded, others)]
        made: list[Any] = []
        for name, part in zip(PARTS, self._parts[own], strict=True):
            start = time.perf_counter()
            made.append(part(begin, *made))
            mx.eval(made[-1])
            self.seconds[name] = time.perf_counter() - start
        played: on_device.Played = made[-1]
        return played


OpenTexts = Callable[[on_device.Start], on_device.Texts]


def _layers(open_texts: OpenTexts, start: on_device.Start, block: on_device.Block) -> RanTarget:
    texts = open_texts(start)
    logits, hidden = on_device.run_target(texts, block)
    assert isinstance(logits, Logits)  # nobody reports log-probabilities here
    arena = [] if dispatch.in_place() else texts.each[0].cache.arena.arrays
    return RanTarget(logits.hidden, tuple(hidden), arena)


def _head(
    open_texts: OpenTexts, start: on_device.Start, block: on_device.Block, ran: RanTarget
) -> tuple[Filtered, ...]:
    texts = open_texts(start)
    return tuple(on_device.target_rows(texts, block, _logits(texts, ran)))


def _accept(
    open_texts: OpenTexts,
    start: on_device.Start,
    block: on_device.Block,
    ran: RanTarget,
    ps: tuple[Filtered, ...],
) -> on_device.Played:
    if ran.arena:  # beside which a drafter writes what it read of the rows
        start = start._replace(arena=start.arena._replace(arrays=ran.arena))
    texts = open_texts(start)
    return on_device.accept(texts, block, _logits(texts, ran), list(ran.hidden), list(ps))


def _logits(texts: on_device.Texts, ran: RanTarget) -> Logits:
    """Those of the rows, not made yet."""
    target: Any = texts.each[0].target
    return Logits(ran.rows, target.table, target.config.softcap)


class Matching(LookupDrafter):
    """Lookup that always has drafts: where it found none, tokens of the text's beginning."""

    def find(self, text: Sequence[int], k: int, shortest: int = SHORTEST) -> list[int]:
        found = super().find(text, k, shortest)
        return found or [text[i % len(text)] for i in range(k)]


class Setting(NamedTuple):
    """What is timed: plain decoding, or rounds of a drafter."""

    drafter: str | None
    block_size: int


PLAIN = Setting(None, 1)


@dataclass
class Times:
    """Seconds of the timed rounds of one setting."""

    whole: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # of these, what was not evaluation
    parts: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Measured:
    """What was timed; a prompt once, rounds often."""

    prompt_tokens: int
    prefill_s: float
    times: dict[Setting, Times]  # plain decoding first
    context: int  # positions in the cache when the last round began
    cache_bytes: int  # of the first drafter's texts
    peak_bytes: int  # that MLX had at most
    resident_bytes: int  # that the process had at most


def check_settings(
    prompt_tokens: int,
    block_sizes: Sequence[int],
    rounds: int,
    acceptance: Sequence[float],
    drafters: Sequence[str] = ("assistant",),
) -> None:
    """Refuse what cannot be timed.

    Raises:
        ValueError: A setting is impossible or named twice.
    """
    for name, value in (("--prompt-tokens", prompt_tokens), ("--rounds", rounds)):
        if value < 1:
            raise ValueError(f"[bench] {name} must be at least 1 but got {value}.")
    for block in block_sizes:
        if not 2 <= block <= MAX_BLOCK:
            raise ValueError(f"[bench] --block-sizes must be 2 to {MAX_BLOCK} but got {block}.")
    for share in acceptance:
        if not 0 <= share <= 1:
            raise ValueError(f"[bench] --acceptance must be 0 to 1 but got {share}.")
    for drafter in drafters:
        if not is_name(drafter) or first_of(drafter) != drafter:
            raise ValueError(
                "[bench] --drafter must be of assistant, dflash, lookup, early:N but got "
                f"{drafter!r}."
            )
    every: tuple[tuple[str, Sequence[object]], ...] = (
        ("--block-sizes", block_sizes),
        ("--acceptance", acceptance),
        ("--drafter", drafters),
    )
    for name, values in every:
        if len(set(values)) < len(values):
            raise ValueError(f"[bench] {name} must name each once but got {list(values)}.")


def measure(
    pair: Pair,
    *,
    prompt_tokens: int,
    block_sizes: Sequence[int],
    rounds: int,
    drafters: Sequence[str] = ("assistant",),
    on_run: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> Measured:
    """Time a prompt, then plain steps and rounds by turns, whole and in parts.

    Each drafter and block size has two texts behind the same prompt, one for whole rounds and one
    for rounds in parts; the prompt is processed once per drafter. A turn plays one round of each;
    the next begins one further in their list. Two rounds of each come first and do not count.

    Args:
        pair: Target and assistant, and the DFlash drafter where it is one of ``drafters``.
        prompt_tokens: Length of the prompt; its tokens mean nothing.
        block_sizes: Beside plain decoding.
        rounds: Timed rounds of each.
        drafters: Whose rounds; plain decoding's texts are the first one's.
        on_run: Called before the prompts and each turn with what is done, all, and what comes next.
    """
    settings = [PLAIN, *(Setting(name, block) for name in drafters for block in block_sizes)]
    turns = WARM_UP + rounds
    on_run(0, 1 + turns, f"a prompt of {prompt_tokens} tokens")
    vocab = pair.target.config.vocab_size
    prompt = [(i * 7919 + 11) % vocab for i in range(prompt_tokens)]
    mx.reset_peak_memory()
    # A cache holds the layers of one drafter
    shared = {name: Shared(2 * len(block_sizes) + 2 * (name == drafters[0])) for name in drafters}

    def text(setting: Setting) -> TokenSequence:
        name = setting.drafter or drafters[0]
        sequence = TokenSequence(
            pair.target,
            drafter_of(name, pair),
            prompt,
            sampling=SAMPLING,
            block_size=setting.block_size,
            shared=shared[name],
        )
        for _ in sequence.prefill():
            pass
        return sequence

    # A text that drafts comes first: what its drafter read of the prompt is there for all
    texts = [(setting, text(setting), text(setting)) for setting in [*settings[1:], PLAIN]]
    prefill_s = texts[0][1].stats.prefill_s
    # Of each its own: there may be more than are kept recorded
    players = {setting: (WholeRounds(), PartedRounds()) for setting in settings}
    times = {setting: Times() for setting in settings}
    for turn in range(turns):
        on_run(1 + turn, 1 + turns, "warm-up" if turn < WARM_UP else f"turn {turn - 1} of {rounds}")
        first = turn % len(texts)
        for setting, one, other in texts[first:] + texts[:first]:
            own, parted = players[setting]
            start = time.perf_counter()
            _play(own, one)
            whole_s = time.perf_counter() - start
            _play(parted, other)
            if turn >= WARM_UP:
                times[setting].whole.append(whole_s)
                times[setting].host.append(whole_s - own.device_s)
                times[setting].parts.append(dict(parted.seconds))
    on_run(1 + turns, 1 + turns, "done")
    cache = texts[0][1].parts.cache
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measured(
        prompt_tokens,
        prefill_s,
        times,
        cache.committed,
        cache.arena.nbytes,
        mx.get_peak_memory(),
        resident * (1 if sys.platform == "darwin" else 1024),
    )


def drafter_of(name: str, pair: Pair) -> Drafter | None:
    """The drafter of that name; lookup one that always drafts."""
    if name == "lookup":
        return Matching()
    return new_drafter(name, pair.target, pair.assistant, pair.dflash)


def _play(rounds: Rounds, sequence: TokenSequence) -> None:
    [done] = rounds.play([sequence])
    if isinstance(done, Exception):
        raise done


def rows_of(
    plan: Plan, measured: Measured, acceptance: Sequence[float], bandwidth_gb_s: float
) -> list[Row]:
    """A row per setting: milliseconds, bytes, and tokens per second at each acceptance.

    ``whole_model`` has what the published target would take, of which only some layers were
    timed: their time and a prompt's grow with the bytes of the layers, all else stays.
    """
    rows: list[Row] = []
    for (drafter, block), times in measured.times.items():
        parts = {
            name: 1e3 * statistics.median(turn[name] for turn in times.parts) for name in PARTS
        }
        round_ms = 1e3 * statistics.median(times.whole)
        experts = traffic.distinct_experts(plan.target, block)
        read = plan.bits, measured.context, block
        moved = traffic.step_bytes(plan.target, *read, experts)
        if drafter is not None:
            models = plan.assistant, plan.dflash
            moved += traffic.drafting_bytes(drafter, plan.target, models, *read)
        gb_s = moved / round_ms / 1e6
        row: Row = {
            "block_size": block,
            "drafter": drafter,
            "round_ms": round_ms,
            **{f"{name}_ms": took for name, took in parts.items()},
            "verify_ms": parts["layers"] + parts["head"],
            "host_ms": 1e3 * statistics.median(times.host),
            "bytes": moved,
            "gb_s": gb_s,
            "share_of_bandwidth": gb_s / bandwidth_gb_s,
        }
        row["whole_model"] = {"round_ms": round_ms + parts["layers"] * (plan.layers_share - 1)}
        rows.append(row)
    for row in rows:
        for figures, plain in ((row, rows[0]), (row["whole_model"], rows[0]["whole_model"])):
            took, drafts = figures["round_ms"], row["block_size"] - 1
            figures["round_cost_in_plain_steps"] = took / plain["round_ms"]
            figures["tok_s"] = {
                f"{share:g}": 1e3 * (1 + share * drafts) / took for share in acceptance
            }
    return rows


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of a table of rounds, under :data:`HEADS`."""
    return [
        (
            _name(row),
            *(f"{row[f'{name}_ms']:.1f}" for name in ("round", "draft", "verify", "head")),
            *(f"{row[f'{name}_ms']:.2f}" for name in ("accept", "host")),
            f"{row['round_cost_in_plain_steps']:.2f}",
            f"{row['gb_s']:.1f}",
            f"{100 * row['share_of_bandwidth']:.0f} %",
        )
        for row in rows
    ]


def rate_cells(rows: Sequence[Row], whole_model: bool) -> list[tuple[str, ...]]:
    """Cells of a table of tokens per second: block, round, and a column per acceptance."""
    return [
        (
            _name(row),
            f"{figures['round_ms']:.1f}",
            f"{figures['round_cost_in_plain_steps']:.2f}",
            *(f"{rate:.2f}" for rate in figures["tok_s"].values()),
        )
        for row in rows
        for figures in [row["whole_model"] if whole_model else row]
    ]


def _name(row: Row) -> str:
    drafter = row["drafter"]
    return "plain" if drafter is None else f"{row['block_size']} {drafter}"
