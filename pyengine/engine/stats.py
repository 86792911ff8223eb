"""What one generation did: counts, seconds, and the ratios made of them; counts of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# Where a token comes from: the prefill, a kept draft, a grammar that allows nothing else, the
# target behind a block that was kept whole, in place of a draft, and where there was no draft.
Source = Literal["first", "draft", "forced", "bonus", "correction", "plain"]


class Nodes(NamedTuple):
    """What there is to know of a round's tree."""

    by_depth: list[int]  # drafts, down to where it ends
    ended: bool  # whether none of them followed the last that was kept


def nodes_of(row: Sequence[int], Q: int, k: int) -> list[Nodes]:
    """What a round's row of numbers says of Q trees of depth k: its end."""
    told = row[len(row) - Q * (k + 1) :]
    each = [told[n * (k + 1) : (n + 1) * (k + 1)] for n in range(Q)]
    return [Nodes([count for count in own[:k] if count], bool(own[k])) for own in each]


def last_source(drafted: int, accepted: int, nodes: Nodes | None = None) -> Source:
    """What a round's last token is, of whose drafts so many were judged and kept."""
    if not drafted:
        return "plain"
    whole = accepted == drafted if nodes is None else nodes.ended
    return "bonus" if whole else "correction"


@dataclass
class Stats:
    """Counts and seconds of one generation, filled while it runs.

    ``decode_s`` and ``tok_s`` are decode only: the first token belongs to the prefill. ``seed`` and
    ``block_size`` are those that were used, given or not; "auto" says that each round had a block
    size of its own, on which no text depends. What a round committed behind a stop string
    counts too. Of ``tree`` drafts that are a tree, several are at one depth, of which at most one
    is kept. ``forced`` tokens are those that a grammar left no choice about and that cost no
    draft: they are neither drafted nor accepted here, and ``tokens_per_round`` has them.
    ``by_drafter`` has rounds, drafted and accepted of each drafter of a mix; nothing for others.
    With an early exit ``exits`` has by layers how many tokens left behind so many, of those after
    the first; else it is empty.
    """

    block_size: int | str = 1
    seed: int | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    forced: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    bonus_tokens: int = 0
    correction_tokens: int = 0
    peak_memory_bytes: int = 0
    by_drafter: dict[str, dict[str, int]] = field(default_factory=dict)
    exits: dict[int, int] = field(default_factory=dict)
    tree: int | None = None

    @property
    def tok_s(self) -> float:
        """Decode tokens per second; 0 when nothing was decoded after the first token."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prefill_tok_s(self) -> float:
        processed = self.prompt_tokens - self.reused_tokens
        return processed / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Of the drafts at each depth, the share that was accepted."""
        return [a / d for a, d in zip(self.accepted_by_depth, self.drafted_by_depth, strict=True)]

    @property
    def kept_by_depth(self) -> list[float]:
        """Of the rounds, the share that kept a draft at each depth."""
        return [a / self.rounds for a in self.accepted_by_depth]

    @property
    def drafts_per_round(self) -> float:
        return self.drafted / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_round(self) -> float:
        return (self.generated_tokens - 1) / self.rounds if self.rounds else 0.0

    def count_round(
        self,
        drafted: int,
        accepted: int,
        forced: int = 0,
        drafter: str | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        """A round of so many drafts of a drafter, of which so many were kept, and forced tokens;
        the drafter's name where a mix has several; where the drafts are where they are a tree."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.forced += forced
        each = [1] * drafted if nodes is None else nodes.by_depth
        grow = len(each) - len(self.drafted_by_depth)
        self.drafted_by_depth += [0] * grow
        self.accepted_by_depth += [0] * grow
        for depth, count in enumerate(each):
            self.drafted_by_depth[depth] += count
            self.accepted_by_depth[depth] += depth < accepted
        if drafter is not None:
            add_counts(self.by_drafter, drafter, drafted, accepted)
        last = last_source(drafted, accepted, nodes)
        self.bonus_tokens += last == "bonus"
        self.correction_tokens += last == "correction"

    @property
    def mean_layers(self) -> float | None:
        """Layers per token where tokens may leave early; else None."""
        tokens = sum(self.exits.values())
        return sum(n * count for n, count in self.exits.items()) / tokens if tokens else None

    def count_exit(self, layers: int) -> None:
        """A token that left behind so many layers."""
        self.exits[layers] = self.exits.get(layers, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """Counts, seconds and the ratios made of them, ready for JSON."""
        ratios = (
            "tok_s",
            "prefill_tok_s",
            "acceptance",
            "acceptance_by_depth",
            "kept_by_depth",
            "drafts_per_round",
            "tokens_per_round",
            "mean_layers",
        )
        return {
            **self.__dict__,
            "exits": {str(layers): count for layers, count in self.exits.items()},
            **{name: getattr(self, name) for name in ratios},
        }


def add_counts(
    to: dict[str, dict[str, int]], drafter: str, drafted: int, accepted: int, rounds: int = 1
) -> None:
    """Add rounds of a drafter to what is kept by its name."""
    own = to.setdefault(drafter, {"rounds": 0, "drafted": 0, "accepted": 0})
    own["rounds"] += rounds
    own["drafted"] += drafted
    own["accepted"] += accepted


def add_all(to: dict[str, dict[str, int]], more: dict[str, dict[str, int]]) -> None:
    """Add what was counted by names to the same elsewhere."""
    for name, own in more.items():
        add_counts(to, name, own["drafted"], own["accepted"], own["rounds"])


@dataclass
class Totals:
    """Counts of all texts of an engine since it was made; they only grow.

    A round is one call of the target for a block of every text in it. ``prompt_tokens`` counts a
    prompt once for each of its texts, ``reused_tokens`` those of them that were not processed
    again. ``tokens`` are those that the texts have: none behind a stop string. ``by_drafter`` has
    blocks with drafts as rounds, drafted and accepted by the drafter's name.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    blocks: int = 0
    drafted: int = 0
    accepted: int = 0
    by_drafter: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def acceptance(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0
