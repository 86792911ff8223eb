"""What a checkpoint or bundle is, what it needs, and what would be refused: without loading it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyengine.checkpoint import memory
from pyengine.checkpoint.config_json import (
    read_assistant_config,
    read_dflash_config,
    read_target_config,
)
from pyengine.checkpoint.convert import part_of
from pyengine.checkpoint.defaults import OURS, read_generation
from pyengine.checkpoint.hub import OnProgress, headers
from pyengine.checkpoint.manifest import bundle_parts, read_manifest
from pyengine.checkpoint.published import check_dflash, check_pair, published_name
from pyengine.checkpoint.weights import (
    Layout,
    assistant_layout,
    check_tensors,
    dflash_layout,
    target_layout,
)
from pyengine.model.config import (
    AssistantConfig,
    DFlashConfig,
    LayerConfig,
    TargetConfig,
    TextConfig,
)
from pyengine.model.memory import cache_bytes, prompt_bytes
from pyengine.ranks.cost import kept
from pyengine.ranks.split import shares
from pyengine.text.tokenizer import load_tokenizer
from pyengine.untrusted import optional

CONTEXT, BLOCK = 8192, 8  # of the cache whose size is told
PARTS = ("target", "assistant", "dflash")
Config = TextConfig | DFlashConfig
MOST_RANKS = 64


def inspect(
    path: str | Path,
    context: int | None = None,
    *,
    ranks: int = 1,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Any]:
    """Read configs, headers, tokenizer and settings of a checkpoint folder or bundle.

    Args:
        path: The folder, or a name on the hub, of which no weights are fetched.
        context: Context length for the cache estimate; None is 8192, or a smaller model's context.
        ranks: Processes that share the target; with more than one the report tells what each of
            them needs.
        on_progress: Called with headers read and headers in all, where they come from the hub.

    Returns:
        A report ready for JSON; ``refused`` lists every sentence with which loading would end.

    Raises:
        ValueError: path is no folder, or context or ranks is impossible.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise ValueError(f"[inspect] ranks must be from 1 to {MOST_RANKS} but got {ranks}.")
    if context is not None and context < 1:
        raise ValueError(f"[inspect] context must be at least 1 but got {context}.")
    with headers(path, on_progress) as folder:
        if not folder.is_dir():
            raise ValueError(f"[inspect] path must be a folder but got {folder}.")
        report = _report(folder, context, ranks)
    return report if folder == Path(path) else _renamed(report, str(folder), str(path))


def _renamed(value: Any, folder: str, place: str) -> Any:
    """A report that speaks of the place that was asked for, and not of a folder that is gone."""
    if isinstance(value, str):
        return value.replace(folder, place)
    if isinstance(value, dict):
        return {key: _renamed(inner, folder, place) for key, inner in value.items()}
    return [_renamed(x, folder, place) for x in value] if isinstance(value, list) else value


def _report(path: Path, context: int | None, ranks: int) -> dict[str, Any]:
    report: dict[str, Any] = {"path": str(path), "kind": None, "name": None, "refused": []}
    with _refusals(report):
        parts = _parts(path)
        report["kind"] = "pair" if len(parts) > 1 else next(iter(parts))
        configs: dict[str, Config] = {}
        for part, folder in parts.items():
            with _refusals(report):
                configs[part] = _read(part, folder)
                report[part] = {"path": str(folder), **_describe(configs[part])}
            if part in configs:
                with _refusals(report):
                    layout = _layout(configs[part])
                    report[part]["tensors"] = _tensors(folder, layout, configs[part])
        target, assistant = configs.get("target"), configs.get("assistant")
        if isinstance(target, TargetConfig) and isinstance(assistant, AssistantConfig):
            with _refusals(report):
                check_pair(target, assistant)
                report["name"] = published_name(target, assistant)
        dflash = configs.get("dflash")
        if isinstance(target, TargetConfig) and isinstance(dflash, DFlashConfig):
            with _refusals(report):
                check_dflash(target, dflash)
        if isinstance(target, TargetConfig):
            with _refusals(report):
                report["text"] = _text(path, parts, target)
            beside = dflash.kept if isinstance(dflash, DFlashConfig) else ()
            report["memory"] = memory_of = _memory(report, target, context, beside)
            with _refusals(report):
                least = memory_of["weights"] + cache_bytes(target, 1, 1, 2)
                memory.check(least, "the weights and the smallest cache")
            if ranks > 1:
                with _refusals(report):
                    report["ranks"] = _of_ranks(parts["target"], target, report, ranks)
            if context is not None and context > target.context_limit:
                report["refused"].append(
                    f"[inspect] context must be at most the model's {target.context_limit} tokens "
                    f"but got {context}."
                )
    return report


def _parts(path: Path) -> dict[str, Path]:
    if optional(path, "config.json", "inspect"):
        return {part_of(path): path}
    return bundle_parts(path)


def _read(part: str, folder: Path) -> Config:
    if part == "dflash":
        return read_dflash_config(folder)
    return read_target_config(folder) if part == "target" else read_assistant_config(folder)


def _layout(config: Config) -> Layout:
    if isinstance(config, DFlashConfig):
        return dflash_layout(config)
    if isinstance(config, TargetConfig):
        return target_layout(config)
    assert isinstance(config, AssistantConfig)
    return assistant_layout(config)


def _describe(config: Config) -> dict[str, Any]:
    layers = config.layers
    out: dict[str, Any] = {
        "layers": len(layers),
        "sliding_layers": sum(layer.sliding for layer in layers),
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "head_widths": sorted({layer.head_dim for layer in layers}),
        "feed_forward": sorted({layer.ffn_width for layer in layers}),
        "window": config.window,
        "vocabulary": config.vocab_size,
    }
    if isinstance(config, DFlashConfig):
        own = {"taps": list(config.taps), "block_size": config.block_size}
        return {**out, **own, "mask_token": config.mask_id}
    out = {"model_type": config.model_type, **out, "context": config.context_limit}
    if isinstance(config, TargetConfig):
        shared = sum(layer.kv_source != i for i, layer in enumerate(layers))
        out |= {"shared_layers": shared, "experts": config.num_experts}
        out |= {"per_layer_width": config.per_layer_width}
    if isinstance(config, AssistantConfig):
        out |= {"backbone_size": config.backbone_size, "centroids": config.num_centroids}
    return out


def _tensors(folder: Path, layout: Layout, config: Config) -> dict[str, Any]:
    """Parameters, bytes, dtype, and how many matrices are stored in which way."""
    matrices, storage = check_tensors(folder, layout, config.quantization)
    ways = Counter(
        f"{m.bits} bit, group {m.group_size}" if m.bits else storage for m in matrices.values()
    )
    shapes = [*layout.matrices.values(), *layout.vectors.values()]
    return {
        "parameters": sum(map(math.prod, shapes)),
        "bytes": memory.weight_bytes(folder, layout),
        "dtype": storage,
        "matrices": dict(ways),
    }


def _text(path: Path, parts: dict[str, Path], target: TargetConfig) -> dict[str, Any]:
    """Tokenizer, template and sampling defaults."""
    manifest = read_manifest(path) if len(parts) > 1 else {}
    settings = read_generation(parts["target"], parts.get("assistant"), target, manifest)
    tokenizer = load_tokenizer(parts["target"])
    stop_ids = list(dict.fromkeys((*settings.stop_ids, *tokenizer.answer_ends())))
    return {
        "tokens": tokenizer.vocab_size,
        "chat_template": tokenizer.has_chat_template,
        "thinking": bool(tokenizer.channel_ids()),
        "stop_ids": stop_ids,
        "answer_ends": [f"{tokenizer.spelling(token)} ({token})" for token in stop_ids],
        **{key: getattr(settings, key) for key in OURS},
        "notes": [*settings.notes, *filter(None, [tokenizer.chat_template_error])],
    }


def _memory(
    report: dict[str, Any],
    target: TargetConfig,
    context: int | None,
    beside: tuple[LayerConfig, ...],
) -> dict[str, Any]:
    """``beside`` are the layers of a DFlash drafter, which keep keys and values where it drafts."""
    known = [report.get(part, {}).get("tensors") for part in PARTS]
    weights = sum(tensors["bytes"] for tensors in known if tensors)
    size = 4 if (known[0] or {}).get("dtype") == "float32" else 2
    context = min(CONTEXT if context is None else context, target.context_limit)
    cache = cache_bytes(target, context, BLOCK, size, beside)
    work = prompt_bytes(target, context, BLOCK, 0, size, beside) - cache
    free = memory.available_bytes()
    return {
        "weights": weights,
        "context": context,
        "cache": cache,
        "prompt": work,
        "available": free,
        "fits": None if free is None else weights + cache + work <= free,
    }


def _of_ranks(
    folder: Path, target: TargetConfig, report: dict[str, Any], size: int
) -> list[dict[str, int]]:
    """What each rank keeps of the weights, and its keys and values; rank 0 has the assistant."""
    matrices, storage = check_tensors(folder, target_layout(target), target.quantization)
    nbytes = {path: sum(a.nbytes for a in matrix.arrays) for path, matrix in matrices.items()}
    other = report["target"]["tensors"]["bytes"] - sum(nbytes.values())
    assistant = report.get("assistant", {}).get("tensors", {}).get("bytes", 0)
    number, context = 4 if storage == "float32" else 2, report["memory"]["context"]
    found = []
    for rank in range(size):
        weights = kept(target, rank, size, nbytes, other).held + (0 if rank else assistant)
        cache = cache_bytes(shares(target, rank, size).config, context, BLOCK, number)
        found.append({"rank": rank, "weights": weights, "cache": cache})
    return found


@contextmanager
def _refusals(report: dict[str, Any]) -> Iterator[None]:
    """Note what is refused and go on: the reader wants all of it."""
    try:
        yield
    except ValueError as error:
        if str(error) not in report["refused"]:
            report["refused"].append(str(error))
