"""What pairs call their ops with: sizes of a pair, from which the modules of ops make shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.checkpoint.config_json import (
    read_assistant_config,
    read_dflash_config,
    read_target_config,
)
from pyengine.checkpoint.published import DFLASH, PUBLISHED, published, published_dflash
from pyengine.model.config import (
    AssistantConfig,
    DFlashConfig,
    LayerConfig,
    TargetConfig,
    TextConfig,
)
from pyengine.ops.dispatch import OPS
from pyengine.ops.example import Call
from pyengine.ops.sizes import Attended, Heads, Limits, Packing, Settings, Sizes, Stack

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

EMBEDDED = "embedded"
PROBE = "probe"  # in place of a pair: no shape of one, but the probe for hazards
FULL_LENGTH = 700  # positions before a piece in a full layer; two of block_attention's spans
TARGET_FILTERS, ASSISTANT_FILTERS = ("greedy", "64", "256"), ("64",)
Packings = set[Packing | None]  # None is not quantised


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: Its name.
        settings: What the `example` of its module takes: numbers, words and None.
        where: The pairs that have it.
        scaled: What was made smaller, with the true size.
    """

    op: str
    settings: Settings
    where: list[str]
    scaled: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        said = (f"{key}={value}" for key, value in self.settings.items() if value is not None)
        return f"{self.op} {' '.join(said)}"

    @property
    def call(self) -> Call:
        made: Call = import_module(f"pyengine.ops.{self.op}").example(**self.settings)
        return made


def embedded(limits: Limits) -> list[Case]:
    """Those of the pair inside the package; a small layer stands in for experts, which it lacks."""
    folder = Path(__file__).parents[1] / "nano"
    target = read_target_config(folder / "target")
    assistant = read_assistant_config(folder / "assistant")
    packings = _packings(target) | _packings(assistant)
    dflash = read_dflash_config(folder / "dflash")
    found = [
        _of_pair(target, assistant, packings, "bfloat16", limits),
        _of_dflash(dflash, _packings(dflash), "bfloat16", limits),
        _stand_in(limits),
    ]
    return _merged([(EMBEDDED, found)])


def real(limits: Limits) -> list[Case]:
    """Those of the five published pairs, at 8 bits; at 4 bits those of the smallest."""
    found = []
    for name in PUBLISHED:
        target, assistant = published(name)
        packings: Packings = {(64, 8), (64, 4)} if name == "E2B" else {(64, 8)}
        own = [_of_pair(target, assistant, packings, "bfloat16", limits)]
        if name in DFLASH:
            own.append(_of_dflash(published_dflash(name), packings, "bfloat16", limits))
        found.append((name, own))
    return _merged(found)


def of_loaded(pair: Pair, limits: Limits) -> list[Case]:
    """Those of a pair that is loaded."""
    target, assistant = pair.target, pair.assistant
    packings = _packings(target.config)
    if assistant is not None:
        packings |= _packings(assistant.config)
    dtype = str(target.dtype).rpartition(".")[2]
    own = None if assistant is None else assistant.config
    found = [_of_pair(target.config, own, packings, dtype, limits)]
    if pair.dflash is not None:
        dflash = pair.dflash.config
        found.append(_of_dflash(dflash, _packings(dflash), dtype, limits))
    return _merged([(pair.name, found)])


def _packings(config: TextConfig | DFlashConfig) -> Packings:
    stored = config.quantization
    if stored is None:
        return {None}
    others = {value for value in stored.overrides.values() if not isinstance(value, str)}
    return {(stored.group_size, stored.bits)} | {x and (x[1], x[0]) for x in others}


def _merged(found: Iterable[tuple[str, list[Sizes]]]) -> list[Case]:
    """By op each shape once, whichever pairs have it. Scaled down, several may be one."""
    cases: dict[str, Case] = {}
    for where, op, sizes in ((where, op, n) for where, own in found for op in OPS for n in own):
        for settings, scaled in import_module(f"pyengine.ops.{op}").shapes(sizes):
            case = Case(op, settings, [], scaled)
            kept = cases.setdefault(case.name, case)
            for name, true in scaled.items():
                kept.scaled[name] = max(true, kept.scaled.get(name, 0))
            if where not in kept.where:
                kept.where.append(where)
    return sorted(cases.values(), key=lambda case: case.op)


def _of_pair(
    target: TargetConfig,
    assistant: AssistantConfig | None,
    packings: Packings,
    dtype: str,
    limits: Limits,
) -> Sizes:
    E, H, V = target.hidden_size, target.num_heads, target.vocab_size
    sizes = Sizes(limits, dtype, _sorted(packings))
    layers = list({_geometry(n, i): n for i, n in enumerate(target.layers)}.items())
    matrices = [(n.ffn_width, E) for n in target.layers]  # K, N
    matrices += [(H * n.head_dim, E) for n in target.layers]
    sizes.streams, gates = [E], sorted({n.ffn_width for n in target.layers})
    sizes.lm_heads = [(V, E, target.softcap, TARGET_FILTERS)]
    gated = {(E, n.ffn_width) for n in target.layers}
    if target.per_layer_width:
        matrices += [(E, target.per_layer_width), (target.per_layer_width, E)]
        gates.append(target.per_layer_width)
        sizes.normed.append((target.per_layer_width, len(target.layers), "float32"))
    if assistant is not None:
        own, heads = assistant.hidden_size, assistant.num_heads
        sizes.streams.append(own)
        gates += sorted({n.ffn_width for n in assistant.layers})
        gated |= {(own, n.ffn_width) for n in assistant.layers}
        matrices += [(2 * E, own), *((n.ffn_width, own) for n in assistant.layers)]
        matrices += [(heads * n.head_dim, own) for n in assistant.layers]
        sizes.queries += [(heads, D) for D in sorted({n.head_dim for n in assistant.layers})]
        if own != E:
            sizes.lm_heads.append((V, own, None, ASSISTANT_FILTERS))
        if assistant.num_centroids:  # the logits of the nearest ones' tokens
            X, U = assistant.num_centroids, assistant.num_centroids_used
            N = assistant.vocab_size // X
            sizes.stacks.append(Stack(X, U, N, own, "one row", dtype))
    sizes.normed += [(width, 1, dtype) for width in sizes.streams]
    sizes.gates = [(F, "gelu") for F in gates]
    sizes.gated = [(K, N, "gelu") for K, N in sorted(gated)]

    for (sliding, D, K, own_keys, same), _ in layers:
        window = target.window if sliding else None
        length = target.window + 37 if sliding else FULL_LENGTH
        if own_keys:
            sizes.heads.append(Heads(H, K, D, same))
            columns = [H * D, K * D] if same else [H * D, K * D, K * D]
            sizes.together.append((E, columns))
        else:
            sizes.queries.append((H, D))
        sizes.attended += [Attended(H, K, D, length, window, tree) for tree in (False, True)]
        if assistant is not None:
            narrow = None if window is None else window - 1
            sizes.attended.append(Attended(assistant.num_heads, K, D, length, narrow))

    # What is fused where it is quantised
    apart = [(E, n.ffn_width) for n in target.layers]
    apart += [(E, n * D) for (_, D, K, _, _), _ in layers for n in (H, K)] + [(E, V)]
    _add_matrices(sizes, matrices, apart)
    sizes.tables, sizes.vocabularies = [(V, E)], [(V, target.softcap)]
    if target.num_experts:
        X, used = target.num_experts, target.num_experts_used
        _add_experts(sizes, E, target.expert_width, X, used)
        sizes.dense.append((E, X, "float32"))
    return sizes


def _of_dflash(config: DFlashConfig, packings: Packings, dtype: str, limits: Limits) -> Sizes:
    """What a DFlash drafter calls, the target's head for all rows of a block among it."""
    E, H, layers = config.hidden_size, config.num_heads, dict.fromkeys(config.layers)
    sizes = Sizes(limits, dtype, _sorted(packings), normed=[(E, 1, dtype)])
    matrices = [(len(config.taps) * E, E), (E, config.vocab_size)]
    apart = []
    for layer in layers:
        D, K, F = layer.head_dim, layer.num_kv_heads, layer.ffn_width
        window, length = None, FULL_LENGTH
        heads = H * config.block_size  # of a block whose rows see all of it: as one row
        if layer.sliding:
            window, length = config.window, config.window + 37
            heads = H if config.is_causal else heads
        matrices += [(H * D, E), (F, E)]
        apart += [(E, F), (E, H * D), (E, K * D)]
        sizes.heads.append(Heads(H, K, D, norm_values=False, has_trees=False))
        sizes.attended.append(Attended(heads, K, D, length, window))
        sizes.gates.append((F, "silu"))
        sizes.gated.append((E, F, "silu"))
        # Of a block, and of the context
        sizes.together += [(E, [H * D, K * D, K * D]), (E, [K * D, K * D])]
    _add_matrices(sizes, matrices, apart)
    return sizes


def _stand_in(limits: Limits) -> Sizes:
    """A small layer of experts, and a matrix that is not quantised."""
    sizes = Sizes(limits, "bfloat16", [(64, 8)], dense=[(128, 128, "bfloat16")])
    _add_experts(sizes, hidden=128, width=64, count=8, used=2)
    return sizes


def _add_experts(sizes: Sizes, hidden: int, width: int, count: int, used: int) -> None:
    sizes.routers.append((count, used, hidden))
    for K, N, form in ((hidden, width, "gated"), (width, hidden, "own rows")):
        sizes.stacks.append(Stack(count, used, N, K, form, "bfloat16"))


def _add_matrices(
    sizes: Sizes, matrices: Iterable[tuple[int, int]], apart: Iterable[tuple[int, int]]
) -> None:
    """Of width K and so many columns each; those `apart` only where nothing is quantised."""
    sizes.matrices = sorted(set(matrices))
    if None in sizes.packings:
        both = sorted({*matrices, *apart})
        sizes.dense += [(K, N, sizes.dtype) for K, N in both]


def _geometry(layer: LayerConfig, i: int) -> tuple[bool, int, int, bool, bool]:
    """Sliding, D, K, whether it has its own keys, and whether these are its values."""
    own = layer.kv_source == i
    return layer.sliding, layer.head_dim, layer.num_kv_heads, own, layer.key_is_value


def _sorted(packings: Iterable[Packing | None]) -> list[Packing | None]:
    return sorted(packings, key=lambda packing: packing or (0, 0))
