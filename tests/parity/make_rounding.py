"""What transformers computes in bfloat16 on the pairs of tests/helpers/odd_pairs.py.

    python tests/parity/make_rounding.py [FOLDER]     without it, into tests/fixtures/rounding

Eager attention and experts, whose every operation rounds where its text says; tensors are stored as
they are, in bfloat16.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import odd_pairs
import torch
import transformers
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
STEPS = 2  # of drafting: the second begins from what the first projected


def loaded(family: Any, folder: Path) -> Any:
    settings = {"attn_implementation": "eager", "dtype": torch.bfloat16}
    model = family.from_pretrained(folder, **settings).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    return model


def after_layers(model: Any, streams: list[torch.Tensor]) -> None:
    """Collect what each layer gives; the last one's is in no output of the model."""
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: streams.append(out[0].clone()))


@torch.no_grad()
def references(folder: Path) -> Tensors:
    """By the names that tests/model/test_rounding.py reads.

    ids; embedding, per_layer.i, layer.i (the stream after it), hidden, logits; k.{kind}, v.{kind};
    and of draft step s: s.embedding, s.hidden_in, s.layer.i, s.hidden, s.logits.
    """
    target = loaded(transformers.Gemma4ForCausalLM, folder / "target")
    if target.config.enable_moe_block:
        target.set_experts_implementation("eager")
    assistant = loaded(transformers.Gemma4AssistantForCausalLM, folder / "assistant")
    ids, streams = torch.tensor([odd_pairs.prompt()]), []
    after_layers(target, streams)
    out = target(
        input_ids=ids, use_cache=True, output_hidden_states=True, return_shared_kv_states=True
    )
    found: Tensors = {"ids": ids[0], "embedding": out.hidden_states[0][0]}
    found |= {f"layer.{i}": stream for i, stream in enumerate(streams)}
    found |= {"hidden": out.hidden_states[-1][0], "logits": out.logits[0]}
    if target.config.hidden_size_per_layer_input:
        rows = target.model.get_per_layer_inputs(ids)
        inputs = target.model.project_per_layer_inputs(out.hidden_states[0], rows)
        found |= {f"per_layer.{i}": inputs[0, :, i] for i in range(inputs.shape[2])}
    shared = {}
    for kind, (k, v) in out.shared_kv_states.items():
        if kind == odd_pairs.SLIDING:
            k, v = (a[:, :, -(odd_pairs.WINDOW - 1) :] for a in (k, v))
        shared[kind] = (k, v)
        found |= {f"k.{kind}": k[0], f"v.{kind}": v[0]}
    streams.clear()
    after_layers(assistant, streams)
    token, hidden = out.logits[:, -1:].argmax(-1), out.hidden_states[-1][:, -1:]
    for step in range(STEPS):
        embedding = target.get_input_embeddings()(token)
        found |= {f"{step}.embedding": embedding[0], f"{step}.hidden_in": hidden[0]}
        drafted = assistant(
            inputs_embeds=torch.cat([embedding, hidden], -1),
            position_ids=torch.tensor([[ids.shape[1]]]),
            shared_kv_states=shared,
            attention_mask=None,
        )
        token, hidden = drafted.logits.argmax(-1), drafted.last_hidden_state
        found |= {f"{step}.layer.{i}": stream for i, stream in enumerate(streams)}
        found |= {f"{step}.hidden": hidden[0], f"{step}.logits": drafted.logits[0]}
        streams.clear()
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else odd_pairs.REFERENCES
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for flavour in odd_pairs.FLAVOURS:
        with tempfile.TemporaryDirectory() as folder:
            odd_pairs.write_pair(flavour, Path(folder))
            save_file(references(Path(folder)), out / f"{flavour}.safetensors")


if __name__ == "__main__":
    main()
