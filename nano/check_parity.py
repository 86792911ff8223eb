"""Compare the training models' logits with transformers', in float32.

    python nano/check_parity.py RUN              # the trained checkpoints
    python nano/check_parity.py RUN --untrained  # random weights, norms and scalars shaken
    python nano/check_parity.py RUN --dflash     # the trained drafter alone, on the bundle's target

Needs transformers 5.22.2. Fails above 5e-4. The text is held-back Python, 600 tokens, so that the
sliding window of 256 is passed twice; the assistant takes four steps from two places. The DFlash
drafter is compared with the layers of transformers' Qwen3, over a cache that holds its context.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from decode import AssistantDrafts
from dflash import MASK_ID, DFlash, dflash_config, features
from export import BUNDLE, load_assistant, load_dflash, load_shipped, load_target
from model import EPS, KINDS, SLIDING, Assistant, Target, assistant_config, target_config
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

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


@torch.no_grad()
def check_dflash(target: Target, drafter: DFlash, tokens: list[int]) -> dict[str, float]:
    """Blocks at three places: before, at and past the window; 4 and 8 long."""
    theirs = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**target.config))
    hidden = load_into(theirs, target)(
        input_ids=torch.tensor([tokens]), output_hidden_states=True
    ).hidden_states
    config = transformers.Qwen3Config(**drafter.config, attn_implementation="eager")
    layers = transformers.Qwen3Model(config).eval()
    missing, unexpected = layers.load_state_dict(drafter.state_dict(), strict=False)
    assert missing == ["embed_tokens.weight"], missing
    assert set(unexpected) == {"fc.weight", "hidden_norm.weight"}, unexpected
    ids, worst = torch.tensor([tokens[:512]]), 0.0
    tapped, _ = features(target, ids, drafter.taps)
    for n, N in ((1, 8), (200, 4), (256, 8), (500, 8)):
        block = torch.tensor([[tokens[n], *[MASK_ID] * (N - 1)]])
        anchors = torch.tensor([[n]])
        ours = target.head(drafter(target, tapped, block[:, None], anchors)[:, 0])
        taps = torch.cat([hidden[tap + 1][:, :n] for tap in drafter.taps], -1)
        out = dflash_by_qwen3(layers, drafter, taps, theirs.model.embed_tokens(block))
        out = theirs.lm_head(out) / 30
        worst = max(worst, gap(ours, out.tanh() * 30))
    return {"dflash logits": worst}


def dflash_by_qwen3(
    qwen3: transformers.Qwen3Model, drafter: DFlash, taps: torch.Tensor, h: torch.Tensor
) -> torch.Tensor:
    """What the head reads of a block of embeddings [1, N, E] behind taps [1, n, taps * E]."""
    (n, N), E = (taps.shape[1], h.shape[1]), h.shape[2]
    read = torch.nn.functional.linear(taps, drafter.fc.weight)
    read = torch.nn.functional.rms_norm(read, (E,), drafter.hidden_norm.weight, EPS)
    cache = transformers.DynamicCache()
    before, within = (qwen3.rotary_emb(h, x[None]) for x in torch.arange(n + N).split([n, N]))
    for i, layer in enumerate(qwen3.layers):
        attention, sliding = layer.self_attn, drafter.config["layer_types"][i] == SLIDING
        k, v = (p(read).view(1, n, -1, 64) for p in (attention.k_proj, attention.v_proj))
        k = attention.k_norm(k).transpose(1, 2)
        k = apply_rotary_pos_emb(k, k, *before)[0]
        cache.update(k, v.transpose(1, 2), i)
        seen = torch.ones(N, n + N, dtype=torch.bool)
        if sliding:
            seen = seen.tril(n).triu(n - drafter.config["sliding_window"] + 1)
        h = layer(
            h,
            attention_mask=torch.where(seen, 0.0, float("-inf"))[None, None],
            position_embeddings=within,
            past_key_values=cache,
        )
    return qwen3.norm(h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--untrained", action="store_true")
    parser.add_argument("--dflash", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = np.load(args.run / "python.held.npy")[:600].astype(int).tolist()
    gaps = {}
    if args.dflash:
        target, drafter = load_shipped(BUNDLE / "target"), load_dflash(args.run)
    elif args.untrained:
        vocab = json.loads((args.run / "data.json").read_text())["vocab"]
        target = Target(target_config(24, vocab)).eval()
        assistant = Assistant(assistant_config(vocab), 128).eval()
        shake(target)
        drafter = DFlash(dflash_config(target.config)).eval()
        shake(assistant)
        shake(drafter)
    else:
        target, assistant = load_target(args.run), load_assistant(args.run)
        drafter = load_dflash(args.run)
    if not args.dflash:
        gaps = check(target, assistant, tokens)
    gaps |= check_dflash(target, drafter, tokens)
    print("transformers", transformers.__version__, {k: f"{v:.1e}" for k, v in gaps.items()})
    if max(gaps.values()) > BOUND:
        raise SystemExit(f"[check_parity] gaps must be at most {BOUND}.")


if __name__ == "__main__":
    main()
