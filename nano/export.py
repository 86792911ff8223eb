"""Write the pair as an MLX 8-bit bundle.

    python nano/export.py RUN OUT                  # the trained pair, with its DFlash drafter
    python nano/export.py RUN OUT --untrained both # random weights of the final shape
    python nano/export.py RUN OUT --dflash dflash.pt  # it alone, into a bundle that is there

OUT gets target/, assistant/, dflash/ and mtplx_pair.json in the layout of published MLX
conversions. The drafter is written in its published form into RUN/dflash and from there by
`pyengine convert`. `--untrained assistant` takes the trained target only. MODEL_CARD.md is kept by
hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from data import BOS, EOS, PAD
from dflash import DFlash, dflash_config
from model import Assistant, Target, assistant_config, target_config
from tokenizer_files import write_tokenizer

from pyengine.checkpoint.convert import convert

BUNDLE = Path(__file__).parents[1] / "pyengine/nano"
QUANTIZATION = {"group_size": 64, "bits": 8, "mode": "affine"}
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}


def quantized(state: dict[str, torch.Tensor]) -> dict[str, mx.array]:
    """Every matrix in 8 bits (weight, scales, biases), the rest in bfloat16."""
    out = {}
    for name, tensor in state.items():
        value = mx.array(tensor.detach().float().numpy()).astype(mx.bfloat16)
        if value.ndim == 2:
            w, scales, biases = mx.quantize(
                value, group_size=QUANTIZATION["group_size"], bits=QUANTIZATION["bits"]
            )
            path = name.removesuffix(".weight")
            out |= {f"{path}.weight": w, f"{path}.scales": scales, f"{path}.biases": biases}
        else:
            out[name] = value
    return out


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_model(folder: Path, config: dict, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {"quantization": QUANTIZATION, "quantization_config": QUANTIZATION}
    write_json(folder / "config.json", config | quantization)
    weights = quantized(state)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def write_dflash(run: Path, out: Path, drafter: DFlash) -> int:
    """Write RUN/dflash, OUT/dflash, and their place in the manifest; returns the bytes of the
    second."""
    published, folder = run / "dflash", out / "dflash"
    published.mkdir(exist_ok=True)
    write_json(published / "config.json", drafter.config)
    state = {
        name: mx.array(tensor.numpy()).astype(mx.bfloat16)
        for name, tensor in drafter.state_dict().items()
    }
    mx.save_safetensors(str(published / "model.safetensors"), state, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    size = convert(published, folder).weight_bytes
    manifest = json.loads((out / "mtplx_pair.json").read_text())
    manifest["layout"]["dflash"] = "dflash"
    # Behind the assistant, where it stands from the first time on
    benchmark = manifest.pop("benchmark")
    write_json(
        out / "mtplx_pair.json",
        manifest | {"dflash": {"quantization": QUANTIZATION}, "benchmark": benchmark},
    )
    return size


def write_bundle(run: Path, out: Path, target: Target, assistant: Assistant, block: int) -> int:
    """Write target, assistant and manifest; returns the size in bytes."""
    config = {"architectures": ["Gemma4ForCausalLM"], "dtype": "bfloat16"} | target.config
    write_model(out / "target", config, target.state_dict())
    write_tokenizer(run / "tokenizer.model", out / "target")
    pieces = json.loads((out / "target/tokenizer.json").read_text())["model"]["vocab"]
    stop = [EOS, pieces["<turn|>"], pieces["<|tool_response>"]]
    ids = {"bos_token_id": BOS, "pad_token_id": PAD}
    write_json(out / "target/generation_config.json", SAMPLING | ids | {"eos_token_id": stop})
    config = {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "dtype": "bfloat16",
        "backbone_hidden_size": assistant.backbone,
        "use_ordered_embeddings": False,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "tie_word_embeddings": True,
        "text_config": assistant.config,
    }
    write_model(out / "assistant", config, assistant.state_dict())
    write_json(
        out / "assistant/generation_config.json",
        SAMPLING | ids | {"eos_token_id": stop, "num_assistant_tokens": block - 1},
    )
    write_json(
        out / "mtplx_pair.json",
        {
            "name": "pyengine-nano",
            "variant": "gemma4-nano",
            "layout": {"target": "target", "assistant": "assistant"},
            "target": {"quantization": QUANTIZATION},
            "assistant": {"quantization": QUANTIZATION},
            "benchmark": {
                "best_block_size": block,
                "temperature": SAMPLING["temperature"],
                "top_p": SAMPLING["top_p"],
                "top_k": SAMPLING["top_k"],
            },
        },
    )
    files = [p for part in ("target", "assistant") for p in (out / part).iterdir()]
    return sum(p.stat().st_size for p in files)


def load_shipped(folder: Path) -> Target:
    """The target of a bundle, its 8-bit matrices made whole again."""
    stored = mx.load(str(folder / "model.safetensors"))
    target = Target(json.loads((folder / "config.json").read_text()))
    state = target.state_dict()
    for name in state:
        value, path = stored[name], name.removesuffix(".weight")
        if f"{path}.scales" in stored:
            parts = (stored[f"{path}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            group, bits = QUANTIZATION["group_size"], QUANTIZATION["bits"]
            value = mx.dequantize(value, *parts, group_size=group, bits=bits)
        state[name] = torch.from_numpy(np.array(value.astype(mx.float32)))
    target.load_state_dict(state)
    return target.eval().requires_grad_(False)


def load_target(run: Path, name: str = "target.pt") -> Target:
    saved = torch.load(run / name)
    target = Target(saved["config"])
    target.load_state_dict(saved["state"])
    return target.eval().requires_grad_(False)


def load_assistant(run: Path, name: str = "assistant.pt") -> Assistant:
    saved = torch.load(run / name)
    assistant = Assistant(saved["config"], saved["backbone"])
    assistant.load_state_dict(saved["state"])
    return assistant.eval().requires_grad_(False)


def load_dflash(run: Path, name: str = "dflash.pt") -> DFlash:
    saved = torch.load(run / name)
    drafter = DFlash(saved["config"])
    drafter.load_state_dict(saved["state"])
    return drafter.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="target.pt", help="checkpoint name in RUN")
    parser.add_argument("--block", type=int, default=4, help="block size the bundle recommends")
    parser.add_argument("--untrained", choices=("both", "assistant"))
    parser.add_argument("--dflash", metavar="NAME", help="only the DFlash drafter of this name")
    args = parser.parse_args()
    vocab = json.loads((args.run / "data.json").read_text())["vocab"]
    torch.manual_seed(0)
    if args.dflash:
        size = write_dflash(args.run, args.out, load_dflash(args.run, args.dflash))
        print(f"DFlash drafter, {size / 1e6:.2f} MB")
        return
    trained = args.untrained != "both"
    target = load_target(args.run, args.target) if trained else Target(target_config(24, vocab))
    if args.untrained:
        assistant = Assistant(assistant_config(vocab), target.config["hidden_size"])
        drafter = DFlash(dflash_config(target.config)).requires_grad_(False)
    else:
        assistant, drafter = load_assistant(args.run), load_dflash(args.run)
    size = write_bundle(args.run, args.out, target, assistant, args.block)
    size += write_dflash(args.run, args.out, drafter)
    counts = [sum(p.numel() for p in m.parameters()) for m in (target, assistant, drafter)]
    names = "target {:,}, assistant {:,} and DFlash drafter {:,} parameters"
    print(names.format(*counts) + f", {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
