"""Decoding with the training model: the filter, batched sampling, speculative rounds.

Slow and plain on purpose; the engine is the fast one. Batch 1 unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from model import (
    FULL,
    KINDS,
    SLIDING,
    Assistant,
    Target,
    additive,
    attend,
    head_width,
    rope_angles,
)

TOP_K, TOP_P = 64, 0.95  # the sampler of generation_config.json, at temperature 1


def filtered(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities after top-k, then top-p, at temperature 1."""
    values, ids = logits.topk(TOP_K, -1)
    p = values.softmax(-1)
    p = p * ((p.cumsum(-1) - p) < TOP_P)
    return torch.zeros_like(logits).scatter_(-1, ids, p / p.sum(-1, keepdim=True))


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Nats of distributions over the last axis."""
    return -(p * p.clamp_min(1e-20).log()).sum(-1)


@torch.no_grad()
def sample_batch(target: Target, prompts: torch.Tensor, T: int) -> torch.Tensor:
    """Continue B prompts of one length [B, P] to [B, T] with the card's sampler."""
    window = target.config["sliding_window"]
    B, known = prompts.shape
    widths = {kind: head_width(target.config, kind) for kind in KINDS}
    cache = [
        tuple(torch.zeros(B, T, widths[layer.kind]) for _ in "kv") for layer in target.model.layers
    ]
    angles = {kind: rope_angles(kind, widths[kind], torch.arange(T)) for kind in KINDS}
    out = torch.zeros(B, T, dtype=torch.long)
    out[:, :known] = prompts
    done = 0
    while True:
        at, j = torch.arange(done, known)[:, None], torch.arange(known)[None]
        h = target.embed(out[:, done:known])
        for layer, (k_cache, v_cache) in zip(target.model.layers, cache, strict=True):
            turn = tuple(a[done:known] for a in angles[layer.kind])
            x = layer.input_layernorm(h)
            k_cache[:, done:known], v_cache[:, done:known] = layer.self_attn.keys_values(x, turn)
            first = max(0, done - window + 1) if layer.kind == SLIDING else 0
            visible = j <= at
            if layer.kind == SLIDING:
                visible = visible & (j > at - window)
            q = layer.self_attn.queries(x, turn)
            k, v = k_cache[:, first:known], v_cache[:, first:known]
            h = layer.finish(h, attend(q, k, v, additive(visible[:, first:])))
        done = known
        if done == T:
            return out
        logits = target.head(target.model.norm(h[:, -1]))
        out[:, done] = torch.multinomial(filtered(logits), 1)[:, 0]
        known = done + 1


class AssistantDrafts:
    """Drafts from the assistant: position n - 1, the newest W - 1 sliding keys."""

    def __init__(self, target: Target, assistant: Assistant):
        self.target, self.assistant = target, assistant
        layers = target.config["layer_types"]
        self.last = {kind: max(i for i, k in enumerate(layers) if k == kind) for kind in KINDS}

    def begin(self, tokens: list[int], cache: list, hidden: torch.Tensor) -> None:
        config, at = self.target.config, torch.tensor([len(tokens) - 1])
        self.hidden, mask = hidden, torch.zeros(1, 1)
        newest = {SLIDING: config["sliding_window"] - 1, FULL: len(tokens)}
        self.kv = {
            kind: tuple(x[:, -newest[kind] :] for x in cache[self.last[kind]]) for kind in KINDS
        }
        self.geometry = {
            kind: (*rope_angles(kind, head_width(config, kind), at), mask) for kind in KINDS
        }

    def logits(self, tokens: list[int]) -> torch.Tensor:
        embedding = self.target.embed(torch.tensor([tokens[-1:]]))
        logits, self.hidden = self.assistant.step(embedding, self.hidden, self.geometry, self.kv)
        return logits[0, 0]

    def next(self, tokens: list[int]) -> torch.Tensor:
        return filtered(self.logits(tokens))


class BigramDrafts:
    """Drafts from the target's mean distribution after each token."""

    def __init__(self, table: torch.Tensor):
        self.table = table  # [V, V] log-probabilities

    def begin(self, tokens: list[int], cache: list, hidden: torch.Tensor) -> None:
        pass

    def next(self, tokens: list[int]) -> torch.Tensor:
        return filtered(self.table[tokens[-1]])


class LookupDrafts:
    """Prompt lookup: the text that followed the last occurrence of the last 3, 2 or 1 tokens."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def begin(self, tokens: list[int], cache: list, hidden: torch.Tensor) -> None:
        self.found: list[int] = []
        for n in (3, 2, 1):
            tail = tokens[-n:]
            for i in range(len(tokens) - n - 1, -1, -1):
                if tokens[i : i + n] == tail:
                    self.found = tokens[i + n :]
                    return

    def next(self, tokens: list[int]) -> torch.Tensor | None:
        if not self.found:
            return None
        q = torch.zeros(self.vocab)
        q[self.found.pop(0)] = 1.0
        return q


@dataclass
class Tally:
    """What happened in the rounds of one setting."""

    rounds: int = 0
    slots: int = 0  # rounds times drafts per round
    drafted: int = 0
    accepted: int = 0
    tried: list[int] = field(default_factory=list)  # by depth: drafts that were looked at
    kept: list[int] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)  # entropies of the rows that gave tokens
    warped: list[float] = field(default_factory=list)

    def report(self) -> dict:
        return {
            "acceptance": round(self.accepted / self.slots, 3),
            "accepted_of_proposed": round(self.accepted / max(1, self.drafted), 3),
            "tokens_per_round": round(self.accepted / self.rounds + 1, 2),
            "rounds": self.rounds,
            "by_depth": [
                round(k / max(1, t), 3) for k, t in zip(self.kept, self.tried, strict=True)
            ],
            "entropy_raw": round(sum(self.raw) / len(self.raw), 3),
            "entropy_filtered": round(sum(self.warped) / len(self.warped), 3),
        }


@torch.no_grad()
def speculate(
    target: Target,
    drafts: AssistantDrafts | BigramDrafts | LookupDrafts,
    prompt: list[int],
    num_tokens: int,
    k: int,
    stop: set[int],
    tally: Tally,
) -> list[int]:
    """Sampled speculative decoding with the residual rule; returns prompt and continuation."""
    draw: Callable[[torch.Tensor], int] = lambda p: int(torch.multinomial(p, 1))  # noqa: E731
    tally.tried = tally.tried or [0] * k
    tally.kept = tally.kept or [0] * k
    cache: list = [None] * len(target.model.layers)
    logits, x = target.decode(torch.tensor([prompt]), cache, 0)
    tokens, hidden = [*prompt, draw(filtered(logits[0, -1]))], x[:, -1:]
    while len(tokens) - len(prompt) < num_tokens and tokens[-1] not in stop:
        start = len(tokens) - 1  # processed positions
        drafts.begin(tokens, cache, hidden)
        block, qs = tokens[-1:], []
        for _ in range(k):
            q = drafts.next(tokens + block[1:])
            if q is None:
                break
            qs.append(q)
            block.append(draw(q))
        logits, x = target.decode(torch.tensor([block]), cache, start)
        raw, p = logits[0].softmax(-1), filtered(logits[0])
        accepted, chosen = 0, None
        for i, (q, d) in enumerate(zip(qs, block[1:], strict=True)):
            tally.tried[i] += 1
            if torch.rand(()) * q[d] >= p[i, d]:
                chosen = draw((p[i] - q).clamp_min(0))
                break
            tally.kept[i] += 1
            accepted += 1
        if chosen is None:
            chosen = draw(p[accepted])
        tally.raw += entropy(raw[: accepted + 1]).tolist()
        tally.warped += entropy(p[: accepted + 1]).tolist()
        tally.rounds, tally.slots = tally.rounds + 1, tally.slots + k
        tally.drafted, tally.accepted = tally.drafted + len(qs), tally.accepted + accepted
        new = [*block[1 : accepted + 1], chosen]
        cut = next((i for i, t in enumerate(new) if t in stop), len(new) - 1)
        tokens += new[: cut + 1]
        cache = [(a[:, : start + 1 + accepted], b[:, : start + 1 + accepted]) for a, b in cache]
        hidden = x[:, accepted : accepted + 1]
    return tokens
