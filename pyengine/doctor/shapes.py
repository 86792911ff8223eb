"""What pairs call their ops with: of each op the shapes, as settings of a function in `calls`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

EMBEDDED = "embedded"
PROBE = "probe"  # in place of a pair: no shape of one, but the probe for hazards
PROBED = ("copy_pages", "move_rows", "prepare_qkv")
FULL_LENGTH = 700  # positions before a piece in a full layer; two of block_attention's spans
FILTERS = ("greedy", "64", "256")
Settings = dict[str, Any]
Packing = tuple[int, int] | None  # group size and bits; None is not quantised
Found = tuple[str, Settings, dict[str, int]]  # op, settings, what is scaled


class Limits(NamedTuple):
    """How large a call may be on a device; what is larger is scaled down, and says so."""

    matrix_bytes: float
    columns: int = 1 << 30

    def fitting(self, columns: int, row_bytes: float, least: int = 64) -> int:
        """Columns of a matrix with that many bytes per column: at least `least`, else multiples of
        64. Columns do not depend on each other, and only time grows with them."""
        most = int(min(self.columns, self.matrix_bytes / row_bytes))
        return columns if columns <= most else max(least, most // 64 * 64)


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: Its name.
        settings: What `calls` takes: numbers, words and None.
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


def embedded(limits: Limits) -> list[Case]:
    """Those of the pair inside the package; a small layer stands in for experts, which it lacks."""
    folder = Path(__file__).parents[1] / "nano"
    target = read_target_config(folder / "target")
    assistant = read_assistant_config(folder / "assistant")
    packings = _packings(target) | _packings(assistant)
    found = list(_of_pair(target, assistant, packings, "bfloat16", limits))
    dflash = read_dflash_config(folder / "dflash")
    found += _of_dflash(dflash, _packings(dflash), "bfloat16", limits)
    found += _experts(hidden=128, width=64, count=8, used=2, packings={(64, 8)}, limits=limits)
    found += _matrices([(128, 128)], {None}, "bfloat16", limits)
    return _merged([(EMBEDDED, found)])


def real(limits: Limits) -> list[Case]:
    """Those of the five published pairs, at 8 bits; at 4 bits those of the smallest."""
    found = []
    for name in PUBLISHED:
        target, assistant = published(name)
        packings: set[Packing] = {(64, 8), (64, 4)} if name == "E2B" else {(64, 8)}
        own = list(_of_pair(target, assistant, packings, "bfloat16", limits))
        if name in DFLASH:
            own += _of_dflash(published_dflash(name), packings, "bfloat16", limits)
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
    found = list(_of_pair(target.config, own, packings, dtype, limits))
    if pair.dflash is not None:
        dflash = pair.dflash.config
        found += _of_dflash(dflash, _packings(dflash), dtype, limits)
    return _merged([(pair.name, found)])


def _packings(config: TextConfig | DFlashConfig) -> set[Packing]:
    stored = config.quantization
    if stored is None:
        return {None}
    others = {value for value in stored.overrides.values() if not isinstance(value, str)}
    return {(stored.group_size, stored.bits)} | {x and (x[1], x[0]) for x in others}


def _merged(found: Iterable[tuple[str, list[Found]]]) -> list[Case]:
    """Each shape once, whichever pairs have it, by op. Scaled down, several may be one."""
    cases: dict[str, Case] = {}
    for where, own in found:
        for op, settings, scaled in own:
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
    packings: set[Packing],
    dtype: str,
    limits: Limits,
) -> Iterator[Found]:
    E, H, V = target.hidden_size, target.num_heads, target.vocab_size
    layers = list({_geometry(n, i): n for i, n in enumerate(target.layers)}.items())
    matrices = [(n.ffn_width, E) for n in target.layers]  # K, N
    matrices += [(H * n.head_dim, E) for n in target.layers]
    streams, activations = [E], sorted({n.ffn_width for n in target.layers})
    if target.per_layer_width:
        matrices += [(E, target.per_layer_width), (target.per_layer_width, E)]
        activations.append(target.per_layer_width)
        slices = {"D": target.per_layer_width, "heads": len(target.layers), "dtype": "float32"}
        yield "rms_norm", slices, {}
    if assistant is not None:
        own, heads = assistant.hidden_size, assistant.num_heads
        streams.append(own)
        activations += sorted({n.ffn_width for n in assistant.layers})
        matrices += [(2 * E, own), *((n.ffn_width, own) for n in assistant.layers)]
        matrices += [(heads * n.head_dim, own) for n in assistant.layers]
        for D in sorted({n.head_dim for n in assistant.layers}):
            yield "norm_rope", {"H": heads, "D": D, "dtype": dtype}, {}
    for size in streams:
        yield "rms_norm", {"D": size, "heads": 1, "dtype": dtype}, {}
        yield "residual_norm", {"E": size, "dtype": dtype}, {}
    for size in activations:
        yield "glu", {"F": size, "dtype": dtype}, {}

    for (sliding, D, K, own_keys, same), _ in layers:
        window = target.window if sliding else None
        length = target.window + 37 if sliding else FULL_LENGTH
        keys = {"K": K, "D": D, "length": length, "dtype": dtype}
        if own_keys:
            yield "copy_pages", {"K": K, "D": D, "dtype": dtype}, {}
            yield "move_rows", {"K": K, "D": D, "dtype": dtype}, {}
            qkv: Settings = {"H": H, "K": K, "D": D, "same": same, "dtype": dtype}
            yield "prepare_qkv", qkv, {}
            yield "prepare_qkv", {**qkv, "has_slots": True}, {}
        else:
            yield "norm_rope", {"H": H, "D": D, "dtype": dtype}, {}
        yield "block_attention", {"H": H, "window": window, **keys}, {}
        yield "block_attention", {"H": H, "window": window, **keys, "is_tree": True}, {}
        if assistant is not None:
            narrow = None if window is None else window - 1
            yield "block_attention", {"H": assistant.num_heads, "window": narrow, **keys}, {}

    yield from _matrices(matrices, packings - {None}, dtype, limits)
    if None in packings:  # what is fused where it is quantised
        apart = [(E, n.ffn_width) for n in target.layers]
        apart += [(E, n * D) for (_, D, K, _, _), _ in layers for n in (H, K)] + [(E, V)]
        yield from _matrices(matrices + apart, {None}, dtype, limits)
    for packing in _sorted(packings):
        yield from _embeddings(E, V, packing, dtype, limits)
        if packing is None:
            continue
        options = {"group": packing[0], "bits": packing[1], "dtype": dtype}
        for (_, D, K, own_keys, same), _ in layers:
            if own_keys:
                true = [H * D, K * D] if same else [H * D, K * D, K * D]
                yield _together(E, true, packing, dtype, limits)
        gates = {(E, n.ffn_width) for n in target.layers}
        heads_of: dict[int, tuple[str, ...]] = {E: FILTERS}
        if assistant is not None:
            gates |= {(assistant.hidden_size, n.ffn_width) for n in assistant.layers}
            heads_of.setdefault(assistant.hidden_size, ("64",))
        for K, N in sorted(gates):
            fit = limits.fitting(N, 2 * _row_bytes(K, packing))
            yield "quantized_gated_matmul", {"N": fit, "K": K, **options}, _scaled("N", N, fit)
        for K, filters in heads_of.items():
            fit = limits.fitting(V, _row_bytes(K, packing), 512)
            cap = target.softcap if K == E else None
            for name in filters:
                settings = {"V": fit, "K": K, "softcap": cap, "filter": name, **options}
                yield "quantized_filter_logits", settings, _scaled("V", V, fit)
    if assistant is not None and assistant.num_centroids:
        yield from _centroids(assistant, packings - {None}, dtype, limits)
    if target.num_experts:
        yield from _experts(
            hidden=E,
            width=target.expert_width,
            count=target.num_experts,
            used=target.num_experts_used,
            packings=packings - {None},
            limits=limits,
        )
        yield "dense_matmul", {"N": target.num_experts, "K": E, "dtype": "float32"}, {}
    yield from _sampling(V, target.softcap)


def _of_dflash(
    config: DFlashConfig, packings: set[Packing], dtype: str, limits: Limits
) -> Iterator[Found]:
    """What a DFlash drafter calls, the target's head for all rows of a block among it."""
    E, H, layers = config.hidden_size, config.num_heads, dict.fromkeys(config.layers)
    yield "rms_norm", {"D": E, "heads": 1, "dtype": dtype}, {}
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
        own: Settings = {"K": K, "D": D, "dtype": dtype}
        yield "copy_pages", own, {}
        yield "prepare_qkv", {"H": H, "same": False, **own, "norm_values": False}, {}
        yield "block_attention", {"H": heads, "window": window, "length": length, **own}, {}
        yield "glu", {"F": F, "dtype": dtype, "activation": "silu"}, {}
        for packing in _sorted(packings - {None}):
            assert packing is not None
            options = {"group": packing[0], "bits": packing[1], "dtype": dtype}
            for true in ([H * D, K * D, K * D], [K * D, K * D]):  # of a block, and of the context
                yield _together(E, true, packing, dtype, limits)
            fit = limits.fitting(F, 2 * _row_bytes(E, packing))
            gated: Settings = {"N": fit, "K": E, **options, "activation": "silu"}
            yield "quantized_gated_matmul", gated, _scaled("N", F, fit)
    yield from _matrices(matrices, packings - {None}, dtype, limits)
    if None in packings:
        yield from _matrices(matrices + apart, {None}, dtype, limits)


def _together(E: int, true: list[int], packing: Packing, dtype: str, limits: Limits) -> Found:
    """Matrices of so many columns each, on the same rows."""
    assert packing is not None
    share = limits.fitting(sum(true), _row_bytes(E, packing)) / sum(true)
    columns = true if share == 1 else [max(64, int(n * share) // 64 * 64) for n in true]
    settings: Settings = {"K": E, "columns": columns}
    settings |= {"group": packing[0], "bits": packing[1], "dtype": dtype}
    return "quantized_matmuls", settings, _scaled("columns", sum(true), sum(columns))


def _geometry(layer: LayerConfig, i: int) -> tuple[bool, int, int, bool, bool]:
    """Sliding, D, K, whether it has its own keys, and whether these are its values."""
    own = layer.kv_source == i
    return layer.sliding, layer.head_dim, layer.num_kv_heads, own, layer.key_is_value


def _row_bytes(K: int, packing: Packing) -> float:
    return 2 * K if packing is None else K * packing[1] / 8 + 4 * K / packing[0]


def _scaled(name: str, true: int, fit: int) -> dict[str, int]:
    return {} if true == fit else {name: true}


def _sorted(packings: Iterable[Packing]) -> list[Packing]:
    return sorted(packings, key=lambda packing: packing or (0, 0))


def _matrices(
    matrices: Iterable[tuple[int, int]], packings: set[Packing], dtype: str, limits: Limits
) -> Iterator[Found]:
    """Of width K and so many columns each."""
    for packing in _sorted(packings):
        for K, N in sorted(set(matrices)):
            fit = limits.fitting(N, _row_bytes(K, packing))
            settings: Settings = {"N": fit, "K": K, "dtype": dtype}
            if packing is None:
                yield "dense_matmul", settings, _scaled("N", N, fit)
            elif K % packing[0] == 0:
                packed = {"group": packing[0], "bits": packing[1]}
                yield "quantized_matmul", settings | packed, _scaled("N", N, fit)


def _embeddings(E: int, V: int, packing: Packing, dtype: str, limits: Limits) -> Iterator[Found]:
    fit = limits.fitting(V, _row_bytes(E, packing))
    group, bits = packing or (64, 16)
    settings = {"V": fit, "E": E, "group": group, "bits": bits, "dtype": dtype}
    yield "embed", settings, _scaled("V", V, fit)


def _experts(
    *, hidden: int, width: int, count: int, used: int, packings: set[Packing], limits: Limits
) -> Iterator[Found]:
    yield "route_experts", {"X": count, "used": used}, {}
    yield "weigh_experts", {"U": used, "E": hidden, "dtype": "bfloat16"}, {}
    for packing in _sorted(packings):
        assert packing is not None
        for K, N, form in ((hidden, width, "gated"), (width, hidden, "own rows")):
            if K % packing[0]:
                continue
            matrices = 2 if form == "gated" else 1
            fit = limits.fitting(N, matrices * count * _row_bytes(K, packing), 32)
            options = {"group": packing[0], "bits": packing[1], "dtype": "bfloat16"}
            settings = {"X": count, "U": used, "N": fit, "K": K, "form": form, **options}
            yield "quantized_expert_matmul", settings, _scaled("N", N, fit)


def _centroids(
    assistant: AssistantConfig, packings: set[Packing], dtype: str, limits: Limits
) -> Iterator[Found]:
    """The logits of the nearest ones' tokens."""
    K, count, used = assistant.hidden_size, assistant.num_centroids, assistant.num_centroids_used
    N = assistant.vocab_size // count
    for packing in _sorted(packings):
        assert packing is not None
        if K % packing[0]:
            continue
        options = {"group": packing[0], "bits": packing[1], "dtype": dtype}
        fit = limits.fitting(N, count * _row_bytes(K, packing), 32)
        settings = {"X": count, "U": used, "N": fit, "K": K, "form": "one row", **options}
        yield "quantized_expert_matmul", settings, _scaled("N", N, fit)


def _sampling(V: int, softcap: float | None) -> Iterator[Found]:
    if softcap is not None:
        yield "softcap", {"V": V, "cap": softcap}, {}
    for name in FILTERS:
        yield "filter_logits", {"V": V, "filter": name}, {}
    for n in (64, 256):
        for shared in (False, True):
            yield "draw_token", {"n": n, "shared": shared}, {}
    for n, rule in ((64, "residual"), (64, "block"), (64, "coupled"), (256, "block")):
        yield "accept_block", {"n": n, "rule": rule, "vocab": V}, {}
    yield "random_uniform", {"each": 64}, {}
