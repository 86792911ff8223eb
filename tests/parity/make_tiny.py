"""Tiny random Gemma 4 pairs with reference activations from transformers, on the processor.

    python tests/parity/make_tiny.py OUT [FLAVOUR ...]           as the live suite makes them
    python tests/parity/make_tiny.py --fixtures [FLAVOUR ...]    smaller, into tests/fixtures

Fresh transformers weights leave norms, layer scalars and router scales at one and the centroid
order at zero, which hides most mistakes, so every tensor is drawn anew. Weights are rounded to
bfloat16 and saved so, and references are computed in float32 from the rounded weights: one
checkpoint then serves both dtypes. A random assistant would never be right, so it is fitted to most
of one greedy text: rounds accept anything from none to all.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

SLIDING, FULL = "sliding_attention", "full_attention"
FLAVOURS = ("dense31", "e2b", "moe26", "uni12")
# Shorter than the window, past two windows, past four
PROMPTS = {5: 11, 21: 3, 40: 12}  # length: seed
WINDOW = 8
NUM_DRAFTS = 4
TEXT_LENGTH = 100
FIXTURES = Path(__file__).parents[1] / "fixtures"
# Factors on norm weights. Twelve random layers of sharp attention amplify float32 rounding until
# transformers is up to 6e-4 away from itself in float64; a shallow 26B leaves the tied embedding in
# charge and the text one repeated token.
GAINS = {
    "dense31": {"q_norm": 0.5},
    "moe26": {"q_norm": 0.5, "post_attention_layernorm": 2.0, "post_feedforward_layernorm": 2.0},
}
Pair = tuple[Any, Any]
Tensors = dict[str, torch.Tensor]


def settings(flavour: str, small: bool) -> tuple[dict, dict, dict]:
    """Keyword arguments: target text config, assistant text config, assistant's own."""
    common = {
        "vocab_size": 256 if small else 512,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": WINDOW,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
            },
        },
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    }
    # Every input width is a multiple of 64, so that 8-bit conversion reaches every module.
    sliding_run, repeats = {
        "dense31": (2, 2) if small else (5, 2),
        "e2b": (2, 2) if small else (4, 2),
        "moe26": (1, 1) if small else (5, 1),
        "uni12": (2, 1) if small else (5, 1),
    }[flavour]
    target = {
        **common,
        "hidden_size": 64 if small else 128,
        "intermediate_size": 64 if small else 192,
        "num_hidden_layers": (sliding_run + 1) * repeats,
        "layer_types": ([SLIDING] * sliding_run + [FULL]) * repeats,
        "final_logit_softcapping": 30.0,
    }
    assistant = {
        **common,
        "hidden_size": 64,
        "intermediate_size": 64 if small else 128,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": [SLIDING] * 3 + [FULL],
        "final_logit_softcapping": None,
    }
    own: dict[str, Any] = {"use_ordered_embeddings": False}
    if flavour != "uni12":
        target["hidden_size_per_layer_input"] = 0
        assistant |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    if flavour == "e2b":
        few = {
            "attention_k_eq_v": False,
            "num_key_value_heads": 1,
            "num_global_key_value_heads": None,
        }
        target |= few | {
            "hidden_size_per_layer_input": 64,
            "vocab_size_per_layer_input": common["vocab_size"],
            "num_kv_shared_layers": target["num_hidden_layers"] // 2,
            "use_double_wide_mlp": True,
        }
        assistant |= few
        own = {
            "use_ordered_embeddings": True,
            "num_centroids": 16,
            "centroid_intermediate_top_k": 4,
        }
    if flavour == "moe26":
        target |= {
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        }
    return target, assistant, own


def build(flavour: str, small: bool) -> Pair:
    """Target and assistant in float32, every tensor drawn anew and rounded to bfloat16."""
    target, assistant, own = settings(flavour, small)
    family = "Gemma4Unified" if flavour == "uni12" else "Gemma4"
    text_config = getattr(transformers, f"{family}TextConfig")
    config = getattr(transformers, f"{family}AssistantConfig")(
        text_config=text_config(**assistant), backbone_hidden_size=target["hidden_size"], **own
    )
    pair = (
        getattr(transformers, f"{family}ForCausalLM")(text_config(**target)),
        getattr(transformers, f"{family}AssistantForCausalLM")(config),
    )
    for seed, model in enumerate(pair, 1):
        randomise(model, seed, GAINS.get(flavour, {}))
        model.float().eval()
    return pair


@torch.no_grad()
def randomise(model: Any, seed: int, gains: dict[str, float]) -> None:
    """Norms and scales around one, matrices of unit gain, the centroid order a permutation."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("token_ordering"):
            tensor.copy_(torch.randperm(tensor.numel(), generator=generator))
        elif name.endswith("layer_scalar"):
            tensor.copy_(0.6 + 0.5 * torch.rand(tensor.shape, generator=generator))
        elif "norm" in name or name.endswith(("router.scale", "per_expert_scale")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            tensor.mul_(gains.get(name.split(".")[-2], 1.0))
        elif tensor.dim() >= 2:
            gain = tensor.shape[-1] ** -0.5
            tensor.copy_(gain * torch.randn(tensor.shape, generator=generator))
    to_bfloat16(model)


@torch.no_grad()
def to_bfloat16(model: Any) -> None:
    """Round parameters and the tensors that are saved with them; derived buffers stay exact."""
    saved = model.state_dict()
    for tensor in saved.values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())


def prompt(vocab_size: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(PROMPTS[length])
    return torch.randint(5, vocab_size, (1, length), generator=generator)


@torch.no_grad()
def greedy(target: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    return target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )


@torch.no_grad()
def run(target: Any, ids: torch.Tensor) -> Any:
    return target(
        input_ids=ids, use_cache=True, output_hidden_states=True, return_shared_kv_states=True
    )


def fit(target: Any, assistant: Any, text: torch.Tensor, share: float = 0.7) -> float:
    """Overfit the assistant to `share` of the positions of one greedy text, three drafts deep.

    It sees what it will see when drafting: keys up to t (sliding: the newest window - 1), the
    target's hidden vector at t and then its own, and its query stands at t + 1.
    """
    depth = 3
    ids = text[:, :-1]
    out = run(target, ids)
    T = ids.shape[1] - 1 - depth
    query, key = torch.arange(T)[:, None], torch.arange(ids.shape[1])[None]
    causal = key <= query
    near = causal & (key > query - (WINDOW - 1))
    masks = {
        kind: torch.where(seen, 0.0, -1e9)[None, None]
        for kind, seen in ((FULL, causal), (SLIDING, near))
    }
    kept = torch.rand(T, generator=torch.Generator().manual_seed(5)) < share
    centroids = assistant.masked_embedding
    if centroids is not None:
        cluster = torch.empty(centroids.token_ordering.numel(), dtype=torch.long)
        members = torch.arange(cluster.numel()) // centroids.vocab_size_per_centroid
        cluster[centroids.token_ordering] = members
    cross_entropy = torch.nn.functional.cross_entropy
    optimizer = torch.optim.Adam(assistant.parameters(), lr=3e-3)
    for _ in range(150):
        hidden, loss = out.hidden_states[-1][:, :T], torch.zeros(())
        for step in range(depth):
            embedding = target.get_input_embeddings()(text[:, 1 + step : 1 + step + T]).detach()
            x = assistant.model(
                inputs_embeds=assistant.pre_projection(torch.cat([embedding, hidden], -1)),
                shared_kv_states=dict(out.shared_kv_states),
                position_ids=torch.arange(1, T + 1)[None],
                attention_mask=masks,
                use_cache=False,
                output_hidden_states=True,
            ).last_hidden_state
            hidden, wanted = assistant.post_projection(x), text[0, 2 + step : 2 + step + T]
            loss = loss + cross_entropy(assistant.lm_head(x)[0][kept], wanted[kept])
            if centroids is not None:
                scores = centroids.centroids(x)[0][kept]
                loss = loss + cross_entropy(scores, cluster[wanted][kept])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    to_bfloat16(assistant)
    return loss.item()


@torch.no_grad()
def references(target: Any, assistant: Any, layers_of: int = 21) -> Tensors:
    """What an engine must reproduce, by prompt length n:

    n.ids, n.logits [n, V], n.hidden [n, E] after the last norm; at `layers_of` also n.layer.i, the
    stream after layer i - 1, and n.kv.{kind}.{k,v}, the shared keys and values [1, K, n, D];
    n.{n-1,n-2}.s.{embedding,hidden_in,logits,hidden,token}: draft step s at either position, over
    sliding keys cut to the newest window - 1.
    """
    found: Tensors = {}
    for n in PROMPTS:
        ids = prompt(target.config.vocab_size, n)
        out = run(target, ids)
        hidden = out.hidden_states[-1]
        found |= {f"{n}.ids": ids[0], f"{n}.logits": out.logits[0], f"{n}.hidden": hidden[0]}
        shared = {kind: tuple(kv) for kind, kv in out.shared_kv_states.items()}
        if n == layers_of:
            for i, layer in enumerate(out.hidden_states[:-1]):
                found[f"{n}.layer.{i}"] = layer[0]
            for kind, (k, v) in shared.items():
                found |= {f"{n}.kv.{kind}.k": k, f"{n}.kv.{kind}.v": v}
        shared[SLIDING] = tuple(a[:, :, -(WINDOW - 1) :] for a in shared[SLIDING])
        for name, position in (("n-1", n), ("n-2", n - 1)):
            token, g = out.logits[:, -1:].argmax(-1), hidden[:, -1:]
            found[f"{n}.bonus"] = token[0]
            for step in range(NUM_DRAFTS):
                at = f"{n}.{name}.{step}"
                embedding = target.get_input_embeddings()(token)
                found |= {f"{at}.embedding": embedding[0], f"{at}.hidden_in": g[0]}
                drafted = assistant(
                    inputs_embeds=torch.cat([embedding, g], -1),
                    position_ids=torch.tensor([[position]]),
                    shared_kv_states=shared,
                    attention_mask=None,
                )
                token, g = drafted.logits.argmax(-1), drafted.last_hidden_state
                found |= {f"{at}.logits": drafted.logits[0], f"{at}.hidden": g[0]}
                found[f"{at}.token"] = token[0]
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def save(pair: Pair, flavour: str, small: bool, folder: Path, multimodal: bool) -> None:
    """Write target/, assistant/ and ref.safetensors as published checkpoints are laid out."""
    target, assistant = pair
    tensors = references(target, assistant)
    text = greedy(target, prompt(target.config.vocab_size, 21), TEXT_LENGTH)
    tensors["greedy"] = text[0]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "ref.safetensors")
    text_config, assistant_config, _ = settings(flavour, small)
    assistant.generation_config.num_assistant_tokens = NUM_DRAFTS
    saved = with_towers(target, flavour) if multimodal else target
    for model, path, config in (
        (saved, folder / "target", text_config),
        (assistant, folder / "assistant", assistant_config),
    ):
        state = model.state_dict()
        rounded = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
            if name != "lm_head.weight"  # tied, and in no published file
        }
        model.save_pretrained(path, state_dict=rounded)
        publish(path, config, flavour)


def with_towers(target: Any, flavour: str) -> Any:
    """The same text model inside the multimodal class, which changes names and config."""
    family = "Gemma4Unified" if flavour == "uni12" else "Gemma4"
    config = getattr(transformers, f"{family}Config")(
        text_config=target.config, vision_config=None, audio_config=None
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    model.model.language_model.load_state_dict(target.model.state_dict())
    model.tie_weights()
    return model


def publish(path: Path, config: dict, flavour: str) -> None:
    """Give a saved folder the form of published ones: E2B and E4B keep unused k and v tensors."""
    file = path / "config.json"
    values = json.loads(file.read_text())
    text = values.get("text_config", values)
    if flavour != "uni12":  # which keeps the form transformers writes today
        text.pop("per_layer_config", None)
        text["global_head_dim"] = config["global_head_dim"]
        text["num_global_key_value_heads"] = config["num_global_key_value_heads"]
    values["dtype"] = "bfloat16"
    file.write_text(json.dumps(values, indent=1) + "\n")
    first = config["num_hidden_layers"] - config.get("num_kv_shared_layers", 0)
    if first in (0, config["num_hidden_layers"]):
        return
    weights = load_file(path / "model.safetensors")
    q_name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    prefix = q_name.split("layers.0.")[0]
    for i in range(first, config["num_hidden_layers"]):
        full = config["layer_types"][i] == FULL
        head_dim = config["global_head_dim"] if full else config["head_dim"]
        at = f"{prefix}layers.{i}.self_attn"
        rows = config["num_key_value_heads"] * head_dim
        for name in ("k_proj", "v_proj"):
            weights[f"{at}.{name}.weight"] = torch.randn(rows, config["hidden_size"]).bfloat16()
        weights[f"{at}.k_norm.weight"] = torch.randn(head_dim).bfloat16()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def make(
    flavour: str, folder: Path, small: bool = False, multimodal: bool = True, fitted: bool = True
) -> Pair:
    """Build, fit and save one flavour; returns the transformers models."""
    torch.manual_seed(0)
    pair = build(flavour, small)
    if fitted:
        ids = prompt(pair[0].config.vocab_size, 21)
        fit(*pair, greedy(pair[0], ids, TEXT_LENGTH))
    save(pair, flavour, small, folder, multimodal)
    return pair


def main() -> None:
    small = sys.argv[1] == "--fixtures"
    out = FIXTURES if small else Path(sys.argv[1])
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    for flavour in sys.argv[2:] or FLAVOURS:
        # Half of the committed ones are text-only exports, so that both forms have a fixture
        make(flavour, out / flavour, small, flavour in ("dense31", "e2b"))
        size = sum(f.stat().st_size for f in (out / flavour).rglob("*.*") if f.is_file())
        print(f"{flavour}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
