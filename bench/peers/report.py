"""Figures and tables out of the outcomes of runs; computes, and knows no engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Outcome = dict[str, Any]  # of a worker, or {"error": one line}
Turns = list[dict[str, Outcome]]  # of each turn, by :func:`key`
Row = dict[str, Any]


def key(peer: str, drafts: int) -> str:
    return f"{peer} {drafts}"


def mode(drafts: int) -> str:
    return f"{drafts} drafts" if drafts else "plain"


def equal_texts(these: Sequence[Sequence[int]], those: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many of them are the same, and how many there are."""
    pairs = list(zip(these, those, strict=True))
    return sum(list(a) == list(b) for a, b in pairs), len(pairs)


def verdict(counts: Iterable[tuple[int, int]]) -> str:
    """ "yes" where all texts of all turns are equal, else how many are."""
    found = list(counts)
    equal, total = sum(a for a, _ in found), sum(b for _, b in found)
    if not total:
        return "-"
    return "yes" if equal == total else f"{equal} of {total}"


def common(these: Sequence[Sequence[int]], those: Sequence[Sequence[int]]) -> float:
    """The part of the tokens before two texts part, over all; 1 where none do."""
    same = total = 0
    for a, b in zip(these, those, strict=True):
        length = max(len(a), len(b))
        parting = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        same += parting[0] if parting else min(len(a), len(b))
        total += length
    return same / total if total else 1.0


def tok_s(outcome: Outcome) -> float:
    """Of all texts alone together; the first token of each belongs to its prompt."""
    seconds = sum(text["decode_s"] for text in outcome["texts"])
    return sum(len(text["tokens"]) - 1 for text in outcome["texts"]) / seconds


def prefill_tok_s(outcome: Outcome, length: int) -> float:
    return length / outcome["long_first_s"]


def processor_ms(outcome: Outcome) -> float | None:
    """Per token; that of the prompts is shared among them."""
    if outcome["processor_s"] is None:
        return None
    return 1e3 * outcome["processor_s"] / sum(len(text["tokens"]) for text in outcome["texts"])


def texts(outcome: Outcome) -> list[list[int]]:
    return [text["text"] for text in outcome["texts"]]


def median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(turns: Turns, own: str, other: str, figure: Callable[[Outcome], float]) -> Row | None:
    """Of each turn that both have: median, least and greatest."""
    found = [
        figure(turn[own]) / figure(turn[other])
        for turn in turns
        if done(turn, own) and done(turn, other)
    ]
    if not found:
        return None
    return {"median": statistics.median(found), "least": min(found), "greatest": max(found)}


def done(turn: dict[str, Outcome], name: str) -> bool:
    return name in turn and "error" not in turn[name]


def rows(turns: Turns, names: Sequence[tuple[str, int]], ours: str, long_prompt: int) -> list[Row]:
    """A row for each engine and mode that was tried."""
    made = []
    for peer, drafts in names:
        own = key(peer, drafts)
        row: Row = {"engine": peer, "drafts": drafts}
        good = [turn[own] for turn in turns if done(turn, own)]
        errors = [turn[own]["error"] for turn in turns if "error" in turn.get(own, {})]
        if errors:
            row["error"] = errors[0]
        if good:
            row |= _figures(turns, good, peer, drafts, ours, long_prompt)
        made.append(row)
    return made


def _figures(
    turns: Turns, good: list[Outcome], peer: str, drafts: int, ours: str, long_prompt: int
) -> Row:
    own, plain = key(peer, drafts), key(peer, 0)
    both = [turn for turn in turns if done(turn, own) and done(turn, plain)]
    with_ours = [turn for turn in turns if done(turn, own) and done(turn, key(ours, 0))]
    return {
        "turns": len(good),
        "versions": good[0]["versions"],
        "tok_s": median(map(tok_s, good)),
        "over_ours": ratio(turns, own, key(ours, drafts), tok_s),
        "over_plain": ratio(turns, own, plain, tok_s),
        "processor_ms": median(map(processor_ms, good)),
        "prefill_tok_s": median(prefill_tok_s(outcome, long_prompt) for outcome in good),
        "peak_bytes": max((o["peak_bytes"] for o in good if o["peak_bytes"]), default=None),
        "as_plain": verdict(equal_texts(texts(t[own]), texts(t[plain])) for t in both),
        "as_ours": median(common(texts(t[own]), texts(t[key(ours, 0)])) for t in with_ours),
        "together": _together(good),
    }


def _together(good: list[Outcome]) -> list[Row]:
    made = []
    for place, first in enumerate(good[0]["together"]):
        count = first["streams"]
        loads = [(outcome, outcome["together"][place]) for outcome in good]
        alone = [([texts(o)[i % len(o["texts"])] for i in range(count)], load) for o, load in loads]
        made.append(
            {
                "streams": count,
                "tok_s": median(sum(map(len, ld["texts"])) / ld["seconds"] for _, ld in loads),
                "as_alone": verdict(equal_texts(ld["texts"], one) for one, ld in alone),
            }
        )
    return made


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _ratio(value: Row | None) -> str:
    return "-" if value is None else "{median:.2f} ({least:.2f} to {greatest:.2f})".format(**value)


def table(heads: Sequence[str], cells: Iterable[Sequence[str]], names: int = 2) -> str:
    """In Markdown; all columns but the first `names` to the right."""
    rule = ["---" if place < names else "--:" for place in range(len(heads))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *cells))


def alone_table(made: Sequence[Row]) -> str:
    heads = ("engine", "mode", "tok/s", "over pyengine's", "over its plain")
    heads += ("processor ms per token", "prefill tok/s", "memory, MB", "text as plain")
    heads += ("tokens as pyengine's",)
    return table(
        heads,
        (
            (
                row["engine"],
                mode(row["drafts"]),
                _number(row["tok_s"]),
                _ratio(row["over_ours"]),
                _ratio(row["over_plain"]) if row["drafts"] else "",
                _number(row["processor_ms"], 2),
                _number(row["prefill_tok_s"]),
                _number(row["peak_bytes"] and row["peak_bytes"] / 1e6),
                row["as_plain"] if row["drafts"] else "",
                "-" if row["as_ours"] is None else f"{row['as_ours']:.0%}",
            )
            for row in made
            if "tok_s" in row
        ),
    )


def streams_table(made: Sequence[Row], streams: Sequence[int]) -> str:
    heads = ["engine", "mode", *(f"{count} at once, tok/s" for count in streams)]
    heads += [f"{streams[-1]} over {streams[0]}", "texts as alone"]
    cells = []
    for row in made:
        loads = row.get("together")
        if not loads:
            continue
        rates = [load["tok_s"] for load in loads]
        same = [load["as_alone"] for load in loads]
        each = "yes" if set(same) == {"yes"} else ", ".join(same)
        name = [row["engine"], mode(row["drafts"])]
        cells.append([*name, *map(_number, rates), f"{rates[-1] / rates[0]:.2f}", each])
    return table(heads, cells)


def markdown(report: dict[str, Any]) -> str:
    """All that a reader needs: machine, versions, tables, what is missing and why."""
    machine, settings, made = report["machine"], report["settings"], report["rows"]
    versions = {row["engine"]: row["versions"] for row in made if "versions" in row}
    lines = [
        f"{machine['chip']}, {machine['cores']} cores, {machine['os']}; load average "
        f"{machine['load_average'][0]:.1f} at the start. {report['started_at']}, commit "
        f"{report['commit']}. {report['turns']} turns; greedy, {settings['prompts']} prompts, at "
        f"most {settings['tokens']} tokens each; prefill of {settings['long_prompt']} tokens.",
        "",
        alone_table(made),
        "",
        streams_table(made, settings["streams"]),
        "",
    ]
    lines += [
        f"* {name} ({report['weights'][name]}): "
        + ", ".join(f"{package} {version}" for package, version in own.items())
        for name, own in versions.items()
    ]
    lines += [f"* {sentence}" for sentence in report["missing"]]
    lines += [
        f"* {row['engine']}, {mode(row['drafts'])}, failed: {row['error']}"
        for row in made
        if "error" in row
    ]
    return "\n".join(lines) + "\n"
