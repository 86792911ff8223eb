"""Distil the DFlash drafter from the target of the bundle, as it is shipped.

    python nano/train_dflash.py RUN --minutes 40

Random anchors of a row start blocks: the row's token there, then masks, with what the target's
tapped layers left at the positions before as context. Blocks do not see each other, so anchors may
overlap. Slot k predicts the token at anchor + k, for which the target's distribution, given the
row's own tokens, stands at anchor + k - 1. Loss of a slot: exp(-(k - 1) / 4) times KL(target ||
drafter) plus 1 - sum min(p, q), over unfiltered distributions; in the last third the sum is over
the card's filtered ones, which is what acceptance is, and the divergence counts little.

The target's pass costs several times a step's own work, so what it made of the newest rows is
kept and each pass serves several steps, with new anchors. Half of the rows is Python; part of
the rows is text that the target sampled itself. Starts from the last tap passed through, half the
target's final norm, and layers that add nothing. Minutes are of processor time, so that the rates
fall as planned on a machine that others use. Resumes from its last checkpoint, dflash.resume.pt,
which can be exported at any time. Writes dflash.pt, dflash.json and own.5.{kind}.npy (the sampled
text).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from data import Rows
from decode import filtered
from dflash import BLOCK, MASK_ID, DFlash, dflash_config, features
from export import BUNDLE, load_shipped
from model import Layer, Target, compile_layer
from optim import Optimiser
from train_assistant import CHECKPOINT_SECONDS, PROMPTS, sample_own

ROWS, T, ANCHORS = 2, 640, 48  # of a step
PASS_ROWS, KEPT_ROWS, STEPS_PER_PASS = 4, 512, 8
# Of the passes: corpus and what the target writes after prompts of it
SHARES = {"python": 0.3, "own python": 0.2, "mixtures": 0.2, "own mixtures": 0.15, "games": 0.15}
AT_START = {"games": 0.5, "python": 0.25, "mixtures": PROMPTS["mixtures"][1]}
# Of the steps: the last layer sees the whole block, so drafts depend on how long it is
SIZES = {BLOCK: 0.75, 4: 0.25}
WARMUP_STEPS, GAMMA, DIVERGENCE, FILTERED_FROM = 10, 4.0, 0.1, 2 / 3
MATRIX_RATE, OTHER_RATE, DECAY_SHARE = 0.04, 0.008, 0.6
OWN_STAGE = 5  # the assistant's stages have sampled rows of their own


@dataclass
class Kept:
    """The newest rows that the target has read: ids, tapped layers and hidden, in bfloat16 as the
    engine has them."""

    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, target: Target, ids: torch.Tensor, taps: list[int]) -> None:
        made = (x.bfloat16() for x in features(target, ids, taps))
        self.rows = [*self.rows, *zip(ids, *made, strict=True)][-KEPT_ROWS:]

    def draw(self, random: np.random.Generator) -> tuple[torch.Tensor, ...]:
        chosen = [self.rows[i] for i in random.integers(len(self.rows), size=ROWS)]
        ids, tapped, hidden = (torch.stack(parts) for parts in zip(*chosen, strict=True))
        return ids, tapped.float(), hidden.float()


def blocks_of(ids: torch.Tensor, anchors: torch.Tensor, N: int) -> torch.Tensor:
    """Blocks [B, A, N]: the row's token at each anchor, then masks."""
    blocks = torch.full((*anchors.shape, N), MASK_ID)
    blocks[..., 0] = ids.gather(1, anchors)
    return blocks


def drafts(
    target: Target,
    drafter: DFlash,
    row: tuple[torch.Tensor, ...],
    anchors: torch.Tensor,
    N: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, A, N - 1, V] of drafter and target of the blocks at anchors [B, A]."""
    ids, tapped, hidden = row
    x = drafter(target, tapped, blocks_of(ids, anchors, N), anchors)[:, :, 1:]
    at = (anchors[..., None] + torch.arange(N - 1)).flatten(1)
    known = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1])).view_as(x)
    with torch.no_grad():
        p = target.head(known)
    return target.head(x), p


def draw_anchors(random: np.random.Generator, rows: int) -> torch.Tensor:
    """[rows, A], a block before the end and with something to read before them."""
    fitting = np.arange(BLOCK, T - BLOCK)
    return torch.from_numpy(
        np.stack([random.choice(fitting, ANCHORS, replace=False) for _ in range(rows)])
    )


def loss_of(
    q_logits: torch.Tensor, p_logits: torch.Tensor, late: bool
) -> tuple[torch.Tensor, list[float]]:
    """The loss and sum min(p, q) of each slot."""
    log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    pair = (filtered(p_logits), filtered(q_logits)) if late else (p, log_q.exp())
    overlap = torch.minimum(*pair).sum(-1)
    discount = torch.exp(-torch.arange(kl.shape[-1]) / GAMMA)
    loss = (discount * ((DIVERGENCE if late else 1.0) * kl + 1 - overlap)).mean()
    return loss, overlap.detach().mean((0, 1)).tolist()


@torch.no_grad()
def evaluate(target: Target, drafter: DFlash, held: dict[str, list]) -> dict[str, dict]:
    """Of the filtered distributions on held-back text, by slot: the mean overlap, and the chance
    that a sampled draft is kept, which is the product of overlaps so far."""
    result = {}
    for kind, rows in held.items():
        random, overlaps = np.random.default_rng(5), []
        for row in rows:
            pair = drafts(target, drafter, row, draw_anchors(random, PASS_ROWS), BLOCK)
            overlaps.append(torch.minimum(*map(filtered, pair)).sum(-1).flatten(0, 1))
        overlap = torch.cat(overlaps)
        result[kind] = {
            "overlap": [round(x, 3) for x in overlap.mean(0).tolist()],
            "chain": [round(x, 3) for x in overlap.cumprod(-1).mean(0).tolist()],
        }
    return result


def inherit(drafter: DFlash, target: Target) -> None:
    """Pass the last tap through and end in half the target's norm; layers add nothing yet."""
    E = target.config["hidden_size"]
    with torch.no_grad():
        drafter.fc.weight.zero_()[:, -E:] = torch.eye(E)
        drafter.norm.weight.copy_(0.5 * target.model.norm.weight)
        for layer in drafter.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


def save(path: Path, **state: object) -> None:
    """Written beside and renamed, so that what lies there is whole."""
    torch.save(state, beside := path.with_suffix(".new"))
    beside.replace(path)


def train(run: Path, args: argparse.Namespace) -> None:
    target = load_shipped(BUNDLE / "target")
    own = {}
    for kind in PROMPTS:
        if args.sample_minutes or (run / f"own.{OWN_STAGE}.{kind}.npy").exists():
            sampled = sample_own(target, run, OWN_STAGE, kind, args.sample_minutes, T)
            own[f"own {kind}"] = torch.from_numpy(sampled.astype(np.int64))
    shares = {kind: share for kind, share in SHARES.items() if kind in own or "own" not in kind}
    chances = np.array([*shares.values()]) / sum(shares.values())
    data = Rows(run, "train", 10 + OWN_STAGE, extra=("mixtures",))
    random = np.random.default_rng(args.seed + OWN_STAGE)
    drafter = DFlash(dflash_config(target.config))
    inherit(drafter, target)
    target.compiled = compile_layer(Layer.whole)
    optimiser = Optimiser(drafter, MATRIX_RATE, OTHER_RATE)
    source, held = Rows(run, "held", 1, extra=("families",)), {}
    for kind in source.ids:
        kept = source.draw(kind, PASS_ROWS, T - 1, 0.3).split(PASS_ROWS)
        held[kind] = [(ids, *features(target, ids, drafter.taps)) for ids in kept]

    step, spent, log, resumable = 0, 0.0, [], run / "dflash.resume.pt"
    if resumable.exists():
        state = torch.load(resumable, weights_only=False)
        drafter.load_state_dict(state["state"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, log = state["progress"]
        data.random.bit_generator.state, random.bit_generator.state = state["random"]
        print(f"resumed at step {step}", flush=True)
    started, checked, recent, kept = time.process_time() - spent, time.time(), [], Kept()
    while (done := (time.process_time() - started) / (args.minutes * 60)) < 1.0:
        # A few at first, so that no step has the rows of one kind alone
        for _ in range(0 if kept.rows and step % STEPS_PER_PASS else 1 if kept.rows else 5):
            kind = str(random.choice([*shares], p=chances))
            if kind in own:
                ids = own[kind][torch.from_numpy(random.integers(len(own[kind]), size=PASS_ROWS))]
            else:
                ids = data.draw(kind, PASS_ROWS, T - 1, AT_START[kind])
            kept.add(target, ids, drafter.taps)
        N, late = int(random.choice([*SIZES], p=[*SIZES.values()])), done > FILTERED_FROM
        pair = drafts(target, drafter, kept.draw(random), draw_anchors(random, ROWS), N)
        loss, overlaps = loss_of(*pair, late)
        loss.backward()
        scale = min(1.0, (step + 1) / WARMUP_STEPS)
        scale *= min(1.0, max(0.02, (1 - done) / DECAY_SHARE))
        optimiser.step(scale)
        step += 1
        recent.append([float(loss.detach()), *overlaps[:3]])
        if step % 25 == 0:
            mean = np.mean(recent, 0).round(4).tolist()
            spent = round(time.process_time() - started)
            point = {"step": step, "processor_seconds": spent, "loss": mean[0]}
            point |= {"overlap": mean[1:], "rate": round(scale, 3)}
            if step % 100 == 0:
                point |= {"held": evaluate(target, drafter, held)}
            log.append(point)
            print(point, flush=True)
            recent = []
        if time.time() - checked > CHECKPOINT_SECONDS:
            save(
                resumable,
                config=drafter.config,
                state=drafter.state_dict(),
                optimiser=optimiser.state_dict(),
                progress=(step, time.process_time() - started, log),
                random=(data.random.bit_generator.state, random.bit_generator.state),
            )
            checked = time.time()
    final = evaluate(target, drafter, held)
    print("final", step, final, flush=True)
    save(run / "dflash.pt", config=drafter.config, state=drafter.state_dict())
    report = {
        "minutes": args.minutes,
        "sample_minutes": args.sample_minutes,
        "seed": args.seed,
        "threads": args.threads,
        "rows": [ROWS, T],
        "pass_rows": PASS_ROWS,
        "anchors": ANCHORS,
        "kept_rows": KEPT_ROWS,
        "steps_per_pass": STEPS_PER_PASS,
        "shares": SHARES,
        "sizes": SIZES,
        "own_rows": {kind: len(rows) for kind, rows in own.items()},
        "rates": [MATRIX_RATE, OTHER_RATE],
        "steps": step,
        "final": final,
        "log": log,
    }
    (run / "dflash.json").write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=40, help="of processor time")
    parser.add_argument("--sample-minutes", type=float, default=3, help="0: only what lies there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed + OWN_STAGE)
    train(args.run, args)


if __name__ == "__main__":
    main()
