"""Train the target, deepening it 6 -> 12 -> 24 layers on the way.

    python nano/train_target.py RUN --minutes 60

RUN is the folder that data.py filled. Growing inserts copies of each six-layer block whose post
norms are zero, so the deeper model starts as the same function. Plain float32; one decoder layer
is compiled per kind. The schedule follows the clock: a short warmup
per stage, then flat, then linear to 0. A checkpoint every few minutes; started again, the command
resumes from it. Writes target.pt and target.json (options, curve).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as fn
from data import Rows
from model import Layer, Target, compile_layer, target_config
from optim import Optimiser

torch._dynamo.config.recompile_limit = 64
# Layers, share of the time, rows per batch, positions per row.
STAGES = ((6, 0.30, 4, 512), (12, 0.22, 4, 512), (24, 0.48, 2, 1280))
GAMES_SHARE = 0.35
WARMUP_STEPS = 40
DECAY_SHARE = 0.5
CHECKPOINT_SECONDS = 180
MATRIX_RATE, OTHER_RATE = 0.04, 0.008


def grow(old: Target | None, num_layers: int, vocab: int) -> Target:
    """A deeper target that computes what `old` computes; a fresh one if there is no old."""
    new = Target(target_config(num_layers, vocab))
    if old is None:
        return new
    factor = num_layers // old.config["num_hidden_layers"]
    new.model.embed_tokens.load_state_dict(old.model.embed_tokens.state_dict())
    new.model.norm.load_state_dict(old.model.norm.state_dict())
    for i, layer in enumerate(new.model.layers):
        block, j = divmod(i, 6)
        layer.load_state_dict(old.model.layers[(block // factor) * 6 + j].state_dict())
        if block % factor:
            layer.post_attention_layernorm.weight.data.zero_()
            layer.post_feedforward_layernorm.weight.data.zero_()
    return new


def loss_of(target: Target, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats per token; ids [B, T + 1]."""
    hidden, _ = target.hidden(ids[:, :-1])
    return fn.cross_entropy(target.head(hidden).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(target: Target, held: dict[str, torch.Tensor], rows: int) -> dict[str, float]:
    # Rows in the training batch's shape, so that nothing is compiled twice.
    return {
        kind: float(np.mean([float(loss_of(target, part)) for part in ids.split(rows)]))
        for kind, ids in held.items()
    }


class Training:
    """What a checkpoint holds: model, optimiser, random state, stage, steps and seconds spent."""

    def __init__(self, run: Path, args: argparse.Namespace):
        self.run, self.args = run, args
        self.rows = Rows(run, "train", args.seed)
        self.vocab = self.rows.vocab
        self.stage, self.step, self.stage_step, self.tokens, self.spent = -1, 0, 0, 0, 0.0
        self.target: Target | None = None
        self.log: list[dict] = []

    def enter(self, stage: int) -> None:
        self.target = grow(self.target, STAGES[stage][0], self.vocab)
        self.attach(stage, 0)

    def attach(self, stage: int, stage_step: int) -> None:
        self.stage, self.stage_step = stage, stage_step
        self.target.compiled = compile_layer(Layer.whole)
        self.optimiser = Optimiser(self.target, MATRIX_RATE, OTHER_RATE)

    def save(self, path: Path, resumable: bool = True) -> None:
        state = {"config": self.target.config, "state": self.target.state_dict()}
        if resumable:
            state |= {
                "optimiser": self.optimiser.state_dict(),
                "rows": self.rows.random.bit_generator.state,
                "progress": (self.stage, self.step, self.stage_step, self.tokens, self.spent),
                "log": self.log,
            }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=False)
        stage, self.step, stage_step, self.tokens, self.spent = state["progress"]
        self.target = Target(state["config"])
        self.target.load_state_dict(state["state"])
        self.attach(stage, stage_step)
        self.optimiser.load_state_dict(state["optimiser"])
        self.rows.random.bit_generator.state = state["rows"]
        self.log = state["log"]
        print(f"resumed at step {self.step}, {self.spent:.0f} s", flush=True)


def train(run: Path, args: argparse.Namespace) -> None:
    t = Training(run, args)
    resumable = run / "target.resume.pt"
    if resumable.exists():
        t.resume(resumable)
    ends = np.cumsum([share for _, share, _, _ in STAGES])
    held_rows = Rows(run, "held", 1)
    held = {
        T: {k: held_rows.draw(k, 12, T, 0.5) for k in held_rows.kinds}
        for T in {T for _, _, _, T in STAGES}
    }
    started = time.time() - t.spent
    total, saved, next_eval = args.minutes * 60, time.time(), t.spent / (args.minutes * 60)
    losses: list[float] = []
    tick, tick_tokens = time.time(), t.tokens
    while (done := (time.time() - started) / total) < 1.0:
        if t.stage < 0 or done >= ends[t.stage]:
            if t.stage >= 0:
                t.save(run / f"target.{STAGES[t.stage][0]}.pt", resumable=False)
            t.enter(t.stage + 1)
            print(f"-- {STAGES[t.stage][0]} layers at step {t.step}", flush=True)
        _, _, B, T = STAGES[t.stage]
        loss = loss_of(t.target, t.rows.batch(B, T, GAMES_SHARE))
        loss.backward()
        scale = min(1.0, (t.stage_step + 1) / WARMUP_STEPS)
        scale *= min(1.0, max(0.02, (1 - done) / DECAY_SHARE))
        t.optimiser.step(scale)
        t.step, t.stage_step, t.tokens = t.step + 1, t.stage_step + 1, t.tokens + B * T
        losses.append(float(loss.detach()))
        if len(losses) == 100 or done >= next_eval:
            point = {
                "step": t.step,
                "seconds": round(time.time() - started),
                "layers": STAGES[t.stage][0],
                "tokens": t.tokens,
                "loss": round(float(np.mean(losses)), 4),
                "rate": round(scale, 3),
                "tokens_per_second": round((t.tokens - tick_tokens) / (time.time() - tick)),
            }
            if done >= next_eval:
                point |= {"held": evaluate(t.target, held[T], B)}
                next_eval += 0.05
            t.log.append(point)
            print(point, flush=True)
            losses, tick, tick_tokens = [], time.time(), t.tokens
        if time.time() - saved > CHECKPOINT_SECONDS:
            t.spent = time.time() - started
            t.save(resumable)
            saved = time.time()
    t.spent = time.time() - started
    t.save(resumable)
    t.save(run / "target.pt", resumable=False)
    _, _, B, T = STAGES[-1]
    final = evaluate(t.target, held[T], B)
    print("final", t.step, t.tokens, final, flush=True)
    report = {
        "minutes": args.minutes,
        "seed": args.seed,
        "threads": args.threads,
        "stages": STAGES,
        "games_share": GAMES_SHARE,
        "rates": [MATRIX_RATE, OTHER_RATE],
        "steps": t.step,
        "tokens": t.tokens,
        "final": final,
        "log": t.log,
    }
    (run / "target.json").write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train(args.run, args)


if __name__ == "__main__":
    main()
