"""The ``bench`` commands: what is timed, in which order, and the figures made of it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pyengine.bench.suite import Case
from pyengine.drafters import NAMES, is_name
from pyengine.drafters.drafter import MAX_BLOCK
from pyengine.engine.stats import add_all
from pyengine.generation import stream
from pyengine.ops.accept_block import RULES, Rule
from pyengine.risk import fixed_sequence, p_value
from pyengine.sampling.settings import MOST_NODES, Sampling
from pyengine.task import Result

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

PLAIN = 1  # the block size of plain decoding
GREEDY = "greedy"  # in place of a rule: temperature 0, where the rules are one
WARM_UP_TOKENS = 16

Row = dict[str, Any]


class Setting(NamedTuple):
    """What is compared: a block size, the rule that accepts its drafts, where these are from, and
    how many they are as a tree."""

    block_size: int | str
    verify: str  # a rule, or GREEDY
    drafter: str | None  # None for plain decoding
    tree: int | None = None  # drafts of each round's

    def is_measured_by(self, plain: Setting) -> bool:
        """Whether that is the plain decoding it is compared with: at the same temperature."""
        return plain.block_size == PLAIN and (plain.verify == GREEDY) == (self.verify == GREEDY)

    def __str__(self) -> str:
        if self.block_size == PLAIN:
            return "plain greedy" if self.verify == GREEDY else "plain"
        first = f"block {self.block_size}" if self.tree is None else f"tree {self.tree}"
        name = f"{first} {self.verify}".removesuffix(" residual")
        return f"{name} {self.drafter}".removesuffix(" assistant")


@dataclass(frozen=True)
class Sample:
    """One timed generation."""

    result: Result
    started_at: str
    ended_at: str
    elapsed_s: float

    @property
    def decode_tokens(self) -> int:
        """Tokens the decode clock covers: the first one belongs to the prefill."""
        return max(len(self.result.tokens) - 1, 0)


def gemma_mtp(
    pair: Pair,
    cases: Sequence[Case],
    *,
    max_tokens: int,
    block_sizes: Sequence[int | str],
    sampling: Sampling,
    repeats: int,
    rules: Sequence[str] = ("residual",),
    drafters: Sequence[str] = ("assistant",),
    trees: Sequence[int] = (),
    on_run: Callable[[int, int, str], None] = lambda done, total, label: None,
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
) -> tuple[list[Row], list[Row]]:
    """Time plain decoding and every block size on every case, alternating in this process.

    A repeat runs plain decoding and each block size once; the next repeat starts one further in
    that list, so that no setting always follows the same one. A short untimed run of each comes
    first. Case i uses seed ``sampling.seed + i`` in every repeat (0 + i where none is given), so
    repeats differ in time only.

    Args:
        pair: Target and assistant.
        cases: The suite.
        max_tokens: Token budget of a case, if its own is not lower.
        block_sizes: Block sizes to compare with plain decoding, 2 to 128 or "auto".
        sampling: Settings for every run.
        repeats: Timed runs of each setting; figures are medians over them.
        rules: Rules that accept drafts, or "greedy" for temperature 0, which has plain runs of its
            own; every block size runs with each.
        drafters: Where drafts come from; every block size and rule runs with each.
        trees: Drafts of trees, which run with each rule beside the block sizes.
        on_run: Called before each run with runs done, runs in all, and what comes next.
        on_rows: Called with the rows of each case once they are there. When a run fails or is
            interrupted, its case has rows too, of the repeats that every setting has finished.

    Returns:
        One row per case and setting, and one summary row per setting over all cases.

    Raises:
        ValueError: A block size, a rule, a drafter, the repeats or a prompt is impossible.
    """
    check_settings(block_sizes, repeats, max_tokens, rules, drafters, trees)
    first_seed = sampling.seed or 0  # drawn ones would not give the same text tomorrow
    ways_to_draft = [*((b, None) for b in block_sizes), *(("auto", tree) for tree in trees)]
    every = [
        Setting(block, rule, drafter, tree)
        for drafter, rule, (block, tree) in itertools.product(drafters, rules, ways_to_draft)
    ]
    ways = dict.fromkeys(GREEDY if rule == GREEDY else sampling.verify for rule in rules)
    settings = [*(Setting(PLAIN, way, None) for way in ways), *every]
    total = len(settings) * (1 + repeats * len(cases))
    done = 0

    def run(case: Case, index: int, setting: Setting, budget: int, label: str) -> Sample:
        nonlocal done
        on_run(done, total, f"{case.id}, {setting}, {label}")
        done += 1
        seeded = replace(sampling, seed=first_seed + index)
        return _time(pair, case, setting, budget, _under(seeded, setting.verify))

    for setting in settings:
        run(cases[0], 0, setting, min(WARM_UP_TOKENS, max_tokens, cases[0].max_tokens), "warm-up")
    rows: list[Row] = []
    for index, case in enumerate(cases):
        budget = min(max_tokens, case.max_tokens)
        samples: dict[Setting, list[Sample]] = {setting: [] for setting in settings}
        try:
            for repeat in range(repeats):
                turn = repeat % len(settings)
                for setting in settings[turn:] + settings[:turn]:
                    label = f"repeat {repeat + 1} of {repeats}"
                    samples[setting].append(run(case, index, setting, budget, label))
        finally:
            whole = min(map(len, samples.values()))
            if whole:
                done_of = {setting: own[:whole] for setting, own in samples.items()}
                seed = first_seed + index
                own_rows = []
                for setting, own in done_of.items():
                    [plain] = filter(setting.is_measured_by, settings)
                    told = setting.verify in ("coupled", GREEDY) or sampling.greedy
                    own_rows.append(_row(case, seed, budget, setting, own, done_of[plain], told))
                rows += own_rows
                on_rows(own_rows)
    on_run(total, total, "done")
    return rows, summarise(rows)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row per setting over all cases."""
    settings = dict.fromkeys(map(_setting, rows))
    return [_summary(setting, rows) for setting in settings]


class Certified(NamedTuple):
    """Whether a setting is not slower than plain decoding on prompts like these.

    Attributes:
        slower: Prompts on which it was.
        p_value: Of "more than a share delta of such prompts is slower"; None where one before it in
            the order had failed, so that it was not tested.
        passed: Whether it holds with confidence 1 - epsilon.
    """

    setting: Setting
    slower: int
    p_value: float | None
    passed: bool


def certify(rows: Sequence[Row], delta: float, epsilon: float) -> list[Certified]:
    """Learn then Test of every setting in the order that was given, which must be fixed before any
    time is seen: the chance that one of those that pass is false is at most epsilon.

    A prompt counts as slower where tokens per second of decoding, medians over the repeats, are
    below plain decoding's.
    """
    settings = [s for s in dict.fromkeys(map(_setting, rows)) if s.block_size != PLAIN]
    slower = {
        setting: [row["tok_s"] < row["ar_tok_s"] for row in rows if _setting(row) == setting]
        for setting in settings
    }

    def test(setting: Setting) -> float:
        return p_value(sum(slower[setting]), len(slower[setting]), delta, binary=True)

    ps = dict(fixed_sequence(settings, test, epsilon))
    return [
        Certified(one, sum(slower[one]), ps.get(one), one in ps and ps[one] <= epsilon)
        for one in settings
    ]


def check_settings(
    block_sizes: Sequence[int | str],
    repeats: int,
    max_tokens: int,
    rules: Sequence[str] = ("residual",),
    drafters: Sequence[str] = ("assistant",),
    trees: Sequence[int] = (),
) -> None:
    """Refuse settings of :func:`gemma_mtp` before anything is loaded.

    Raises:
        ValueError: As there.
    """
    if not block_sizes:
        raise ValueError("[bench] block sizes must name at least one but got none.")
    for block in block_sizes:
        if isinstance(block, int) and not 2 <= block <= MAX_BLOCK:
            raise ValueError(f"[bench] block sizes must be 2 to {MAX_BLOCK} but got {block}.")
    if len(set(block_sizes)) < len(block_sizes):
        raise ValueError(f"[bench] block sizes must differ but got {list(block_sizes)}.")
    for rule in rules:
        if rule not in (*RULES, GREEDY):
            raise ValueError(
                f"[bench] verify must be of {', '.join(RULES)}, {GREEDY} but got {rule!r}."
            )
    if len(set(rules)) < len(rules):
        raise ValueError(f"[bench] verify must name a rule once but got {','.join(rules)}.")
    for drafter in drafters:
        if not is_name(drafter):
            raise ValueError(f"[bench] drafter must be of {', '.join(NAMES)} but got {drafter!r}.")
    if len(set(drafters)) < len(drafters):
        raise ValueError(f"[bench] drafter must name one once but got {','.join(drafters)}.")
    for tree in trees:
        if not 1 <= tree <= MOST_NODES:
            raise ValueError(f"[bench] tree must be 1 to {MOST_NODES} but got {tree}.")
    if len(set(trees)) < len(trees):
        raise ValueError(f"[bench] tree must name a number once but got {list(trees)}.")
    if trees and (other := [name for name in drafters if name != "dflash"]):
        raise ValueError(
            "[bench] drafter must be dflash with a tree, for it judges all places of a block at "
            f"once, but got {other[0]}."
        )
    if trees and (other := [rule for rule in rules if rule not in ("coupled", GREEDY)]):
        raise ValueError(
            f"[bench] verify must be coupled or {GREEDY} with a tree, whose drafts are ranked and "
            f"not drawn, but got {other[0]}."
        )
    if repeats < 1:
        raise ValueError(f"[bench] repeats must be at least 1 but got {repeats}.")
    if max_tokens < 2:  # the first token belongs to the prefill
        raise ValueError(f"[bench] max tokens must be at least 2 but got {max_tokens}.")


def _setting(row: Row) -> Setting:
    return Setting(*(row[name] for name in Setting._fields))


def _under(sampling: Sampling, verify: str) -> Sampling:
    """The settings under a rule, or greedily."""
    if verify == GREEDY:
        return replace(sampling, temperature=0.0)
    return replace(sampling, verify=cast(Rule, verify))


def _time(pair: Pair, case: Case, setting: Setting, budget: int, sampling: Sampling) -> Sample:
    started_at, start = now(), time.perf_counter()
    running = stream(
        case.content,
        pair=pair,
        max_tokens=budget,
        sampling=sampling,
        block_size=setting.block_size,
        drafter=setting.drafter,
        tree=setting.tree,
        raw=case.raw,
    )
    for _ in running:
        pass
    return Sample(running.result, started_at, now(), time.perf_counter() - start)


def _row(
    case: Case,
    seed: int,
    budget: int,
    setting: Setting,
    own: list[Sample],
    plain: list[Sample],
    alike: bool,
) -> Row:
    """Figures of one case and setting; seconds and rates are medians over the repeats. ``alike``
    says that the text must be that of plain decoding."""
    result, stats = own[0].result, own[0].result.stats
    tok_s, ar_tok_s = _median(_tok_s(s) for s in own), _median(_tok_s(s) for s in plain)
    whole, ar_whole = _median(_whole(s) for s in own), _median(_whole(s) for s in plain)
    decode_s = _median(s.result.stats.decode_s for s in own)
    return {
        "prompt_id": case.id,
        "category": case.category,
        "prompt_sha256": case.sha256,
        "prompt_tokens": stats.prompt_tokens,
        "seed": seed,
        **setting._asdict(),
        "token_budget": budget,
        "hit_token_budget": len(result.tokens) >= budget,
        "finish_reason": result.finish_reason,
        "generated_tokens": len(result.tokens),
        "generation_started_at": own[0].started_at,
        "generation_ended_at": own[-1].ended_at,
        "elapsed_s": _median(s.elapsed_s for s in own),
        "prompt_eval_time_s": _median(s.result.stats.prefill_s for s in own),
        "decode_elapsed_s": decode_s,
        "tok_s": tok_s,
        "ar_tok_s": ar_tok_s,
        "speedup_vs_ar": _ratio(tok_s, ar_tok_s),
        "end_to_end_tok_s": whole,
        "end_to_end_speedup_vs_ar": _ratio(whole, ar_whole),
        "verify_calls": stats.rounds,
        "tokens_per_round": _ratio(own[0].decode_tokens, stats.rounds),
        "drafts_per_round": stats.drafts_per_round,
        "round_cost_in_plain_steps": _ratio(decode_s * ar_tok_s or None, stats.rounds),
        "drafted_tokens": stats.drafted,
        "accepted_drafts": stats.accepted,
        "rejected_drafts": stats.drafted - stats.accepted,
        "acceptance_rate": _ratio(stats.accepted, stats.drafted),
        "drafted_by_depth": stats.drafted_by_depth,
        "accepted_by_depth": stats.accepted_by_depth,
        "acceptance_by_depth": stats.acceptance_by_depth,
        "kept_by_depth": stats.kept_by_depth,
        "by_drafter": stats.by_drafter,
        "bonus_tokens": stats.bonus_tokens,
        "correction_tokens": stats.correction_tokens,
        "peak_memory_bytes": max(s.result.stats.peak_memory_bytes for s in own),
        "repeats_agree": all(s.result.tokens == result.tokens for s in own),
        "exact_match": result.tokens == plain[0].result.tokens if alike else None,
        "samples": [
            {
                "started_at": s.started_at,
                "tok_s": _tok_s(s),
                "prefill_s": s.result.stats.prefill_s,
                "decode_s": s.result.stats.decode_s,
                "elapsed_s": s.elapsed_s,
            }
            for s in own
        ],
        "tokens": result.tokens,
        "text": result.text,
    }


def _summary(setting: Setting, rows: Sequence[Row]) -> Row:
    """One setting over all cases, pooled: every token and every second weighs the same."""
    own = [row for row in rows if _setting(row) == setting]
    plain = [row for row in rows if setting.is_measured_by(_setting(row))]

    def total(key: str, of: list[Row] = own) -> float:
        return float(sum(row[key] for row in of))

    def rate(of: list[Row]) -> float | None:
        return _ratio(total("generated_tokens", of) - len(of), total("decode_elapsed_s", of))

    tok_s, ar_tok_s = rate(own), rate(plain)
    rounds, drafted = total("verify_calls"), total("drafted_tokens")
    made, kept = (_by_depth(own, f"{what}_by_depth") for what in ("drafted", "accepted"))
    of_mix: dict[str, dict[str, int]] = {}
    for row in own:
        add_all(of_mix, row["by_drafter"])
    matches = [row["exact_match"] for row in own]
    return {
        **setting._asdict(),
        "tok_s": tok_s,
        "acceptance_rate": _ratio(total("accepted_drafts"), drafted),
        "tokens_per_round": _ratio(total("generated_tokens") - len(own), rounds),
        "drafts_per_round": _ratio(drafted, rounds),
        "speedup_vs_ar": _ratio(tok_s, ar_tok_s),
        "round_cost_in_plain_steps": _ratio(
            total("decode_elapsed_s") * (ar_tok_s or 0) or None, rounds
        ),
        "drafted_by_depth": made,
        "accepted_by_depth": kept,
        "acceptance_by_depth": [a / d if d else None for a, d in zip(kept, made, strict=True)],
        "kept_by_depth": [a / rounds for a in kept],
        "by_drafter": of_mix,
        "generated_tokens": int(total("generated_tokens")),
        "decode_elapsed_s": total("decode_elapsed_s"),
        "prompt_eval_time_s": total("prompt_eval_time_s"),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in own),
        "repeats_agree": all(row["repeats_agree"] for row in own),
        "exact_match": None if None in matches else all(matches),
    }


def _by_depth(rows: Sequence[Row], key: str) -> list[int]:
    """Sums over prompts; a prompt that ended early may have seen fewer depths."""
    deepest = max(len(row[key]) for row in rows)
    return [sum(row[key][i] for row in rows if i < len(row[key])) for i in range(deepest)]


def _tok_s(sample: Sample) -> float:
    return _ratio(sample.decode_tokens, sample.result.stats.decode_s) or 0.0


def _whole(sample: Sample) -> float:
    return _ratio(len(sample.result.tokens), sample.elapsed_s) or 0.0


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
