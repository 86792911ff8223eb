"""Distil the assistant from the trained target.

    python nano/train_assistant.py RUN --stage 1 --minutes 28
    python nano/train_assistant.py RUN --stage 2 --minutes 28
    python nano/train_assistant.py RUN --stage 3 --minutes 26
    python nano/train_assistant.py RUN --stage 4 --minutes 24

Every position t of a row starts a round: bonus token t + 1, the target's hidden state at t, its
keys and values up to t, query position t + 1. K draft steps are unrolled, each fed the
assistant's own hidden state and the row's tokens. Loss per step: KL(target || assistant) plus
1 - sum min(p, q), over unfiltered distributions; in stage 4 the sum is over the card's filtered
ones, which is what acceptance is, and the divergence counts little.

Part of the rows is text that the target sampled itself: Python in stages 1 and 2, from stage 2 on
also what it writes after mixtures (games.py), pages unlike any it knows; from stage 3 on there are
rows of mixtures too. Stage 1 starts from the target's table, final norm and identity projections,
the others from the stage before. Each resumes from its last checkpoint. Writes
assistant.{stage}.pt, assistant.pt, assistant.{stage}.json and own.{stage}.{kind}.npy (the sampled
text).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from data import Rows
from decode import filtered, sample_batch
from export import load_assistant, load_target
from model import (
    FULL,
    KINDS,
    SLIDING,
    Assistant,
    Layer,
    Target,
    assistant_config,
    banded_mask,
    compile_layer,
    full_mask,
    head_width,
    rope_angles,
)
from optim import Optimiser

torch._dynamo.config.recompile_limit = 64
ROWS, T, STEPS = 3, 768, 4
STEP_DISCOUNT = 0.85
SAMPLE_ROWS = 96
# Of the sampled text: positions of the prompt, share of prompts at the start of a document.
PROMPTS = {"python": (64, 0.3), "mixtures": (320, 0.5)}
WARMUP_STEPS = 30
CHECKPOINT_SECONDS = 150
MATRIX_RATE, OTHER_RATE = 0.04, 0.008


@dataclass(frozen=True)
class Stage:
    own: tuple[str, ...]  # kinds of text sampled from the target
    own_share: float  # of the batches
    mixtures_share: float  # of the batches; the others are corpus rows
    games_share: float  # of the corpus rows
    rate: float
    decay_share: float
    divergence: float = 1.0  # weight of KL(target || assistant)
    filtered: bool = False  # sum min(p, q) over filtered distributions


STAGES = {
    1: Stage(("python",), 0.4, 0.0, 0.45, 1.0, 0.6),
    2: Stage(("python", "mixtures"), 0.65, 0.0, 0.35, 0.5, 1.0),
    3: Stage(("mixtures",), 0.2, 0.55, 0.3, 0.7, 1.0),
    4: Stage(("mixtures",), 0.2, 0.55, 0.3, 0.4, 1.0, divergence=0.1, filtered=True),
}


def sample_own(
    target: Target, run: Path, stage: int, kind: str, minutes: float, T: int = T
) -> np.ndarray:
    """Text of the target's own, [rows, T], after prompts of one kind."""
    path = run / f"own.{stage}.{kind}.npy"
    if path.exists():
        return np.load(path)
    prompt, at_start = PROMPTS[kind]
    source, batches = Rows(run, "train", 30 + stage, extra=("mixtures",)), []
    started = time.time()
    while time.time() - started < minutes * 60:
        prompts = source.draw(kind, SAMPLE_ROWS, prompt - 1, at_start)
        batches.append(sample_batch(target, prompts, T).numpy().astype(np.uint16))
        print(f"sampled {len(batches)} batches, {time.time() - started:.0f} s", flush=True)
    np.save(path, np.concatenate(batches))
    return np.concatenate(batches)


def inherit(assistant: Assistant, target: Target) -> None:
    """Equal widths: start from the target's table and final norm, and pass hidden through."""
    E = target.config["hidden_size"]
    with torch.no_grad():
        assistant.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        assistant.model.norm.weight.copy_(target.model.norm.weight)
        assistant.post_projection.weight.copy_(torch.eye(E))
        assistant.pre_projection.weight.copy_(0.5 * torch.cat([torch.eye(E)] * 2, 1))


def geometry_of(config: dict) -> dict:
    """Row t queries from position t + 1 and sees keys up to t, the newest W - 1 if sliding."""
    window, at = config["sliding_window"], torch.arange(T) + 1
    masks = {SLIDING: banded_mask(T, window, window - 1), FULL: full_mask(T)}
    return {kind: (*rope_angles(kind, head_width(config, kind), at), masks[kind]) for kind in KINDS}


def rounds(
    target: Target, assistant: Assistant, ids: torch.Tensor, geometry: dict
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """ids [B, T]: per draft step (assistant logits, target logits) of the rounds that fit."""
    with torch.no_grad():
        hidden, kv = target.hidden(ids)
        logits, embedding = target.head(hidden), target.embed(ids)
    g, out, valid = hidden, [], T - STEPS - 1
    for s in range(STEPS):
        shifted = torch.nn.functional.pad(embedding[:, 1 + s :], (0, 0, 0, 1 + s))
        q, g = assistant.step(shifted, g, geometry, kv)
        out.append((q[:, :valid], logits[:, 1 + s : 1 + s + valid]))
    return out


def loss_of(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], stage: Stage
) -> tuple[torch.Tensor, list[float]]:
    """The loss and sum min(p, q) of each step."""
    total, overlaps = torch.zeros(()), []
    for s, (q_logits, p_logits) in enumerate(pairs):
        log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(-1)
        if stage.filtered:
            overlap = torch.minimum(filtered(p_logits), filtered(q_logits)).sum(-1)
        else:
            overlap = torch.minimum(p, log_q.exp()).sum(-1)
        total = total + STEP_DISCOUNT**s * (stage.divergence * kl + 1 - overlap).mean()
        overlaps.append(float(overlap.detach().mean()))
    return total, overlaps


@torch.no_grad()
def evaluate(
    target: Target, assistant: Assistant, held: dict[str, torch.Tensor], geometry: dict
) -> dict[str, list[float]]:
    """Mean overlap of the filtered distributions on held-back text, by draft step."""
    result = {}
    for kind, ids in held.items():
        parts = [
            [float(torch.minimum(filtered(p), filtered(q)).sum(-1).mean()) for q, p in pairs]
            for pairs in (rounds(target, assistant, x, geometry) for x in ids.split(ROWS))
        ]
        result[kind] = np.mean(parts, 0).round(3).tolist()
    return result


def train(run: Path, args: argparse.Namespace) -> None:
    target = load_target(run)
    stage = STAGES[args.stage]
    sampled = [sample_own(target, run, args.stage, kind, args.sample_minutes) for kind in stage.own]
    own = torch.from_numpy(np.concatenate(sampled).astype(np.int64))
    data = Rows(run, "train", 10 + args.stage, extra=("mixtures",))
    random = np.random.default_rng(args.seed + 2 + args.stage)
    source = Rows(run, "held", 1)
    held = {kind: source.draw(kind, 2 * ROWS, T - 1, 0.5) for kind in source.kinds}
    vocab = target.config["vocab_size"]
    if args.stage == 1:
        assistant = Assistant(assistant_config(vocab), target.config["hidden_size"])
        inherit(assistant, target)
    else:
        assistant = (
            load_assistant(run, f"assistant.{args.stage - 1}.pt").train().requires_grad_(True)
        )
    target.compiled, assistant.compiled = compile_layer(Layer.whole), compile_layer(Layer.borrow)
    optimiser = Optimiser(assistant, stage.rate * MATRIX_RATE, stage.rate * OTHER_RATE)
    geometry = geometry_of(target.config)
    step, spent, log, resumable = 0, 0.0, [], run / f"assistant.resume.{args.stage}.pt"
    if resumable.exists():
        state = torch.load(resumable, weights_only=False)
        assistant.load_state_dict(state["state"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, log = state["progress"]
        data.random.bit_generator.state, random.bit_generator.state = state["random"]
        print(f"resumed at step {step}", flush=True)
    started, checked, recent = time.time() - spent, time.time(), []
    while (done := (time.time() - started) / (args.minutes * 60)) < 1.0:
        drawn = random.random()
        if drawn < stage.own_share:
            ids = own[torch.from_numpy(random.integers(len(own), size=ROWS))]
        elif drawn < stage.own_share + stage.mixtures_share:
            ids = data.draw("mixtures", ROWS, T - 1, PROMPTS["mixtures"][1])
        else:
            ids = data.batch(ROWS, T - 1, stage.games_share)
        loss, overlaps = loss_of(rounds(target, assistant, ids, geometry), stage)
        loss.backward()
        scale = min(1.0, (step + 1) / WARMUP_STEPS)
        scale *= min(1.0, max(0.02, (1 - done) / stage.decay_share))
        optimiser.step(scale)
        step += 1
        recent.append([float(loss.detach()), *overlaps])
        if step % 50 == 0:
            mean = np.mean(recent, 0).round(4).tolist()
            point = {"step": step, "seconds": round(time.time() - started), "loss": mean[0]}
            point |= {"overlap": mean[1:], "rate": round(scale, 3)}
            if step % 200 == 0:
                point |= {"held": evaluate(target, assistant, held, geometry)}
            log.append(point)
            print(point, flush=True)
            recent = []
        if time.time() - checked > CHECKPOINT_SECONDS:
            progress = (step, time.time() - started, log)
            states = (data.random.bit_generator.state, random.bit_generator.state)
            torch.save(
                {
                    "state": assistant.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "progress": progress,
                    "random": states,
                },
                resumable,
            )
            checked = time.time()
    final = evaluate(target, assistant, held, geometry)
    print("final", step, final, flush=True)
    saved = {
        "config": assistant.config,
        "backbone": assistant.backbone,
        "state": assistant.state_dict(),
    }
    for name in (f"assistant.{args.stage}.pt", "assistant.pt"):
        torch.save(saved, run / name)
    report = {
        "minutes": args.minutes,
        "stage": args.stage,
        "sample_minutes": args.sample_minutes,
        "seed": args.seed,
        "threads": args.threads,
        "rows": [ROWS, T],
        "unrolled": STEPS,
        "own_rows": len(own),
        "settings": asdict(stage),
        "rates": [MATRIX_RATE, OTHER_RATE],
        "steps": step,
        "final": final,
        "log": log,
    }
    (run / f"assistant.{args.stage}.json").write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", type=int, choices=STAGES, default=1)
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--sample-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed + args.stage)
    train(args.run, args)


if __name__ == "__main__":
    main()
