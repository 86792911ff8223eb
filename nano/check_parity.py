"""Compare the training model's logits with transformers', target and assistant, in float32.

    python nano/check_parity.py RUN              # the trained checkpoints
    python nano/check_parity.py RUN --untrained  # random weights, norms and scalars shaken

Needs transformers 5.22.2. Fails above 5e-4. The text is held-back Python, 600 tokens, so that the
sliding window of 256 is passed twice; the assistant takes four steps from two places.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from decode import AssistantDrafts
from export import load_assistant, load_target
from model import KINDS, Assistant, Target, assistant_config, target_config

BOUND = 5e-4


def shake(model: torch.nn.Module) -> None:
    """Norms and layer scalars away from their initial values, which would hide mistakes."""
    for p in [*model.parameters(), *model.buffers()]:
        if p.dim() == 1:
            p.data.mul_(torch.empty_like(p).uniform_(0.7, 1.3))


def load_into(theirs: torch.nn.Module, ours: torch.nn.Module) -> torch.nn.Module:
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return theirs.eval()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def check(target: Target, assistant: Assistant, tokens: list[int]) -> dict[str, float]:
    config = transformers.Gemma4TextConfig(**target.config)
    theirs = load_into(transformers.Gemma4ForCausalLM(config), target)
    ids = torch.tensor([tokens])
    out = theirs(input_ids=ids, output_hidden_states=True)
    cache: list = [None] * len(target.model.layers)
    logits, hidden = target.decode(ids, cache, 0)
    whole = target.hidden(ids[:, :512])[0]
    gaps = {
        "target logits": gap(logits, out.logits),
        "target hidden": gap(hidden, out.hidden_states[-1]),
        "training forward": gap(whole, hidden[:, :512]),
    }
    config = transformers.Gemma4AssistantConfig(
        text_config=transformers.Gemma4TextConfig(**assistant.config),
        backbone_hidden_size=assistant.backbone,
        use_ordered_embeddings=False,
    )
    helper = load_into(transformers.Gemma4AssistantForCausalLM(config), assistant)
    gaps |= {"assistant logits": 0.0, "assistant hidden": 0.0}
    drafts = AssistantDrafts(target, assistant)
    for n in (200, 580):  # below and past the window
        known = [(k[:, : n - 1], v[:, : n - 1]) for k, v in cache]
        drafts.begin(tokens[:n], known, hidden[:, n - 2 : n - 1])
        shared = {kind: tuple(x[:, None] for x in drafts.kv[kind]) for kind in KINDS}
        for step in range(4):
            g = drafts.hidden
            ours = drafts.logits(tokens[: n + step])
            embedding = target.embed(ids[:, n + step - 1 : n + step])
            out = helper(
                inputs_embeds=torch.cat([embedding, g], -1),
                position_ids=torch.tensor([[n - 1]]),
                shared_kv_states=shared,
                attention_mask=None,
            )
            worst = max(gaps["assistant logits"], gap(out.logits[0, 0], ours))
            gaps["assistant logits"] = worst
            worst = max(gaps["assistant hidden"], gap(out.last_hidden_state, drafts.hidden))
            gaps["assistant hidden"] = worst
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--untrained", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.untrained:
        vocab = json.loads((args.run / "data.json").read_text())["vocab"]
        target = Target(target_config(24, vocab)).eval()
        assistant = Assistant(assistant_config(vocab), 128).eval()
        shake(target)
        shake(assistant)
    else:
        target, assistant = load_target(args.run), load_assistant(args.run)
    tokens = np.load(args.run / "python.held.npy")[:600].astype(int).tolist()
    gaps = check(target, assistant, tokens)
    print("transformers", transformers.__version__, {k: f"{v:.1e}" for k, v in gaps.items()})
    if max(gaps.values()) > BOUND:
        raise SystemExit(f"[check_parity] gaps must be at most {BOUND}.")


if __name__ == "__main__":
    main()
