"""Checkpoint names to arrays.

A checkpoint is data from somewhere else: names, shapes and dtypes are checked before a byte of a
tensor is read, and whatever is unknown, missing or misshapen is refused by name. Tensors are then
read one at a time, so that memory stays near the size of the result.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from pyengine import mapped
from pyengine.checkpoint.safetensors import read_headers, stale_index
from pyengine.model.config import (
    AssistantConfig,
    DFlashConfig,
    LayerConfig,
    Quantization,
    TargetConfig,
)
from pyengine.model.linear import Linear, Weights

Shape = tuple[int, ...]

# Every rename there is. Left: how published files, text-only exports and MLX conversions spell it;
# right: the name below the text model, which is how the rest of pyengine spells it.
RENAMES = [
    (re.compile(r"^model\.language_model\."), ""),
    (re.compile(r"^language_model\.model\."), ""),
    (re.compile(r"^model\."), ""),
    (re.compile(r"\.experts\.switch_glu\."), ".experts."),
    (re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)$"), r".experts.\1.weight"),
]

# Not text: other towers and their clipping bounds. A head on file repeats the embedding table.
SKIPPED = re.compile(
    r"^(model\.)?(vision_tower|embed_vision|audio_tower|embed_audio|vision_embedder|"
    r"multi_modal_projector)\.|\.(input|output)_(min|max)$|^((language_)?model\.)?lm_head\."
)

FLOATS = (mx.bfloat16, mx.float16, mx.float32)


OnRead = Callable[[int], None]


@dataclass(frozen=True)
class Layout:
    """What a checkpoint must hold: matrices by module path, everything else by full name."""

    matrices: dict[str, Shape]
    vectors: dict[str, Shape]
    dead: re.Pattern[str] | None = None
    integers: frozenset[str] = frozenset()
    skipped: re.Pattern[str] | None = SKIPPED
    model: str = "Gemma 4"

    @property
    def first(self) -> str:
        """The matrix whose dtype is that of all."""
        return next(iter(self.matrices))


def load_target_weights(
    folder: Path,
    config: TargetConfig,
    dtype: mx.Dtype | None = None,
    on_read: OnRead = lambda count: None,
    part: Callable[[str, Linear], Linear] = lambda path, matrix: matrix,
) -> Weights:
    """Read a target's tensors; `dtype` None keeps the checkpoint's. Evaluates.

    `on_read` is called after each tensor with its bytes. Of each matrix what `part` makes of it is
    kept; the rest is not read where it is mapped.

    Raises:
        ValueError: A file is damaged, or a tensor unknown, missing, or of wrong shape or dtype.
    """
    return _load(folder, target_layout(config), config.quantization, dtype, on_read, part)


def load_assistant_weights(
    folder: Path,
    config: AssistantConfig,
    dtype: mx.Dtype | None = None,
    on_read: OnRead = lambda count: None,
) -> Weights:
    """Read an assistant's tensors; as :func:`load_target_weights`."""
    weights = _load(folder, assistant_layout(config), config.quantization, dtype, on_read)
    if config.num_centroids:
        name = "masked_embedding.token_ordering"
        check_ordering(name, weights.vectors[name])
    return weights


def load_dflash_weights(
    folder: Path,
    config: DFlashConfig,
    dtype: mx.Dtype | None = None,
    on_read: OnRead = lambda count: None,
) -> Weights:
    """Read a DFlash drafter's tensors; as :func:`load_target_weights`."""
    return _load(folder, dflash_layout(config), config.quantization, dtype, on_read)


def target_layout(config: TargetConfig) -> Layout:
    """Names and shapes of a target's tensors."""
    E, P, X = config.hidden_size, config.per_layer_width, config.num_experts
    matrices: dict[str, Shape] = {"embed_tokens": (config.vocab_size, E)}
    vectors: dict[str, Shape] = {"norm.weight": (E,)}
    if P:
        wide = len(config.layers) * P
        matrices["embed_tokens_per_layer"] = (config.vocab_size, wide)
        matrices["per_layer_model_projection"] = (wide, E)
        vectors["per_layer_projection_norm.weight"] = (P,)
    dead = []
    for i, layer in enumerate(config.layers):
        at = f"layers.{i}"
        _decoder_layer(matrices, vectors, at, E, config.num_heads * layer.head_dim, layer)
        if layer.kv_source == i:
            width = layer.num_kv_heads * layer.head_dim
            matrices[f"{at}.self_attn.k_proj"] = (width, E)
            if not layer.key_is_value:
                matrices[f"{at}.self_attn.v_proj"] = (width, E)
            vectors[f"{at}.self_attn.k_norm.weight"] = (layer.head_dim,)
        else:
            # Published E2B and E4B files still hold these; nothing reads them.
            dead.append(rf"{re.escape(at)}\.self_attn\.(k_proj|v_proj|k_norm)\.")
        if P:
            matrices[f"{at}.per_layer_input_gate"] = (P, E)
            matrices[f"{at}.per_layer_projection"] = (E, P)
            vectors[f"{at}.post_per_layer_input_norm.weight"] = (E,)
        if X:
            matrices[f"{at}.router.proj"] = (X, E)
            vectors[f"{at}.router.scale"] = (E,)
            vectors[f"{at}.router.per_expert_scale"] = (X,)
            for name in ("gate_proj", "up_proj"):
                matrices[f"{at}.experts.{name}"] = (X, config.expert_width, E)
            matrices[f"{at}.experts.down_proj"] = (X, E, config.expert_width)
            for name in (
                "pre_feedforward_layernorm_2",
                "post_feedforward_layernorm_1",
                "post_feedforward_layernorm_2",
            ):
                vectors[f"{at}.{name}.weight"] = (E,)
    return Layout(matrices, vectors, re.compile("|".join(dead)) if dead else None)


def assistant_layout(config: AssistantConfig) -> Layout:
    """Names and shapes of an assistant's tensors."""
    E, B = config.hidden_size, config.backbone_size
    matrices: dict[str, Shape] = {
        "embed_tokens": (config.vocab_size, E),
        "pre_projection": (E, 2 * B),
        "post_projection": (B, E),
    }
    vectors: dict[str, Shape] = {"norm.weight": (E,)}
    for i, layer in enumerate(config.layers):
        width = config.num_heads * layer.head_dim
        _decoder_layer(matrices, vectors, f"layers.{i}", E, width, layer)
    if not config.num_centroids:
        return Layout(matrices, vectors)
    matrices["masked_embedding.centroids"] = (config.num_centroids, E)
    vectors["masked_embedding.token_ordering"] = (config.vocab_size,)
    return Layout(matrices, vectors, integers=frozenset({"masked_embedding.token_ordering"}))


def dflash_layout(config: DFlashConfig) -> Layout:
    """Names and shapes of a DFlash drafter's tensors. It has neither table nor head, and whatever
    else a file of another kind has is refused."""
    E, taps = config.hidden_size, len(config.taps)
    matrices: dict[str, Shape] = {"fc": (E, taps * E)}
    vectors: dict[str, Shape] = {"hidden_norm.weight": (E,), "norm.weight": (E,)}
    for i, layer in enumerate(config.layers):
        at, D = f"layers.{i}", layer.head_dim
        queries, keys = config.num_heads * D, layer.num_kv_heads * D
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            matrices[f"{at}.self_attn.{name}_proj"] = (rows, E)
        matrices[f"{at}.self_attn.o_proj"] = (E, queries)
        matrices[f"{at}.mlp.gate_proj"] = matrices[f"{at}.mlp.up_proj"] = (layer.ffn_width, E)
        matrices[f"{at}.mlp.down_proj"] = (E, layer.ffn_width)
        vectors[f"{at}.self_attn.q_norm.weight"] = vectors[f"{at}.self_attn.k_norm.weight"] = (D,)
        vectors[f"{at}.input_layernorm.weight"] = (E,)
        vectors[f"{at}.post_attention_layernorm.weight"] = (E,)
    return Layout(matrices, vectors, skipped=None, model="DFlash")


def _decoder_layer(
    matrices: dict[str, Shape],
    vectors: dict[str, Shape],
    at: str,
    E: int,
    width: int,
    layer: LayerConfig,
) -> None:
    """What every decoder layer has, the assistant's included."""
    matrices[f"{at}.self_attn.q_proj"] = (width, E)
    matrices[f"{at}.self_attn.o_proj"] = (E, width)
    matrices[f"{at}.mlp.gate_proj"] = matrices[f"{at}.mlp.up_proj"] = (layer.ffn_width, E)
    matrices[f"{at}.mlp.down_proj"] = (E, layer.ffn_width)
    vectors[f"{at}.self_attn.q_norm.weight"] = (layer.head_dim,)
    vectors[f"{at}.layer_scalar"] = (1,)
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ):
        vectors[f"{at}.{name}.weight"] = (E,)


def canonical(name: str) -> str:
    """The name of a tensor or module path below the text model."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def is_text(name: str, layout: Layout) -> bool:
    """Whether a tensor of the file is one that the text model reads."""
    if layout.skipped is not None and layout.skipped.search(name):
        return False
    return layout.dead is None or not layout.dead.match(canonical(name))


def check_tensors(
    folder: Path, layout: Layout, quantization: Quantization | None
) -> tuple[dict[str, Linear], str]:
    """The matrices of a checkpoint, lazy, and its storage dtype's name, after every check but
    those of values; reads headers only.

    Raises:
        ValueError: As loading would.
    """
    matrices, vectors = _open_all(folder, layout, quantization)
    storage = matrices[layout.first].dtype
    for path, matrix in matrices.items():
        _check_dtype(path, matrix, storage)
    for name, vector in vectors.items():
        if name not in layout.integers and vector.dtype != storage:
            raise _wrong_dtype(name, vector.dtype, storage)
    return matrices, _dtype_name(storage)


def _open_all(
    folder: Path, layout: Layout, quantization: Quantization | None, maps: bool = False
) -> tuple[dict[str, Linear], dict[str, mx.array]]:
    """All matrices and vectors, lazy or mapped, their shapes and types checked."""
    tensors = Tensors(Path(folder), layout, maps)
    modes = _QuantizationModes(quantization)
    matrices = {
        path: _matrix(tensors, path, shape, modes) for path, shape in layout.matrices.items()
    }
    vectors = {
        name: tensors.take(name, shape, integer=name in layout.integers)
        for name, shape in layout.vectors.items()
    }
    tensors.check_all_used()
    return matrices, vectors


def _load(
    folder: Path,
    layout: Layout,
    quantization: Quantization | None,
    dtype: mx.Dtype | None,
    on_read: OnRead,
    part: Callable[[str, Linear], Linear] = lambda path, matrix: matrix,
) -> Weights:
    matrices, vectors = _open_all(folder, layout, quantization, maps=True)
    # One storage dtype for the whole model: the checkpoint's, or the one asked for
    storage = dtype or matrices[layout.first].dtype
    for path, matrix in matrices.items():
        if dtype is None:
            _check_dtype(path, matrix, storage)
        whole, matrix = matrix, part(path, matrix)
        maps = dtype is None and whole is matrix
        told = _read_mapped(path, matrix, on_read) if maps else 0
        matrices[path] = matrix = matrix.astype(storage)
        del whole
        mx.eval(matrix.arrays)
        # The weights between them are not looked at: a second pass over gigabytes, and a round
        # whose logits are not finite says so itself.
        if matrix.scales is not None and matrix.biases is not None:
            check_finite(f"{path}.scales", matrix.scales)
            check_finite(f"{path}.biases", matrix.biases)
        on_read(sum(array.nbytes for array in matrix.arrays) - told)
    for name, vector in vectors.items():
        integer = name in layout.integers
        if dtype is None and not integer and vector.dtype != storage:
            raise _wrong_dtype(name, vector.dtype, storage)
        vectors[name] = vector = vector.astype(mx.int32 if integer else storage)
        mx.eval(vector)
        if not integer:
            check_finite(name, vector)
        on_read(vector.nbytes)
    mapped.check("load")
    return Weights(matrices, vectors, storage)


def _read_mapped(path: str, matrix: Linear, on_read: OnRead) -> int:
    """Read what of a matrix is mapped; how many bytes that was."""
    try:
        return sum(mapped.read(array, on_read) for array in matrix.arrays)
    except RuntimeError as error:
        raise ValueError(f"[load] `{path}` cannot be read from its file: {error}.") from error


def _check_dtype(path: str, matrix: Linear, storage: mx.Dtype) -> None:
    if matrix.dtype != storage:
        part = "weight" if matrix.scales is None else "scales"
        raise _wrong_dtype(f"{path}.{part}", matrix.dtype, storage)


def _wrong_dtype(name: str, dtype: mx.Dtype, storage: mx.Dtype) -> ValueError:
    return ValueError(
        f"[load] `{name}` must be {_dtype_name(storage)} like the rest of the checkpoint but got "
        f"{_dtype_name(dtype)}; pass dtype= to convert it."
    )


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


class _QuantizationModes:
    """Bits and group size of a module, from config.json."""

    def __init__(self, quantization: Quantization | None) -> None:
        self.quantization = quantization
        overrides = quantization.overrides if quantization else {}
        self.overrides = {
            canonical(path).removesuffix(".weight"): value for path, value in overrides.items()
        }

    def of(self, path: str) -> tuple[int, int]:
        if self.quantization is None:
            raise ValueError(
                f"[load] `{path}.scales` is there, so config.json must have a `quantization` block."
            )
        default = (self.quantization.bits, self.quantization.group_size)
        # Gate and up of the experts may share one entry, named after the tensor they came from
        joint = re.sub(r"\.experts\.(gate|up)_proj$", ".experts.gate_up_proj", path)
        mode = self.overrides.get(path, self.overrides.get(joint, default))
        if isinstance(mode, str):
            raise ValueError(mode)
        if mode is None:
            raise ValueError(
                f"[load] `{path}.scales` is there, but config.json says `{path}` is not quantised."
            )
        return mode


def _matrix(tensors: "Tensors", path: str, shape: Shape, modes: _QuantizationModes) -> Linear:
    if not tensors.has(f"{path}.scales"):
        return Linear(tensors.take(f"{path}.weight", shape))
    bits, group_size = modes.of(path)
    *rows, columns = shape
    if columns % group_size:
        raise ValueError(
            f"[load] `{path}.scales` is there, but its {columns} inputs are no multiple of the "
            f"group size {group_size}."
        )
    groups = (*rows, columns // group_size)
    return Linear(
        tensors.take(f"{path}.weight", (*rows, columns * bits // 32), packed=True),
        tensors.take(f"{path}.scales", groups),
        tensors.take(f"{path}.biases", groups),
        bits,
        group_size,
    )


def _open(shard: Path) -> dict[str, mx.array]:
    """The lazy tensors of a file whose header was checked.

    The format is given because MLX would otherwise go by the name's ending, which the index chose.
    """
    try:
        loaded = mx.load(str(shard), format="safetensors")
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().rstrip(".")
        raise ValueError(f"[load] {shard} cannot be read by MLX: {reason}.") from error
    assert isinstance(loaded, dict)
    return loaded


@contextmanager
def _descriptor(shard: Path) -> Iterator[int]:
    """A file whose header was checked, open for maps.

    Raises:
        ValueError: It has become shorter since.
    """
    file = os.open(shard, os.O_RDONLY)
    try:
        yield file
    except ValueError as error:
        short = str(error) == "the file is cut off"
        raise ValueError(f"[load] {shard} is cut off.") if short else error from None
    finally:
        os.close(file)


def check_finite(name: str, array: mx.array) -> None:
    """Refuse NaN and infinity. Evaluates.

    Raises:
        ValueError: The array holds one.
    """
    if not mx.isfinite(array).all():
        out = "; float16 ends at 65504: load with dtype bfloat16 or float32"
        why = out if array.dtype == mx.float16 else ""
        raise ValueError(f"[load] `{name}` must be finite but holds NaN or infinity{why}.")


def check_ordering(name: str, order: mx.array) -> None:
    """A table of row numbers that reached past V would read foreign memory. Evaluates.

    Raises:
        ValueError: It is no permutation.
    """
    if not mx.array_equal(mx.sort(order), mx.arange(order.size, dtype=order.dtype)):
        raise ValueError(f"[load] `{name}` must hold every token id once.")


class Tensors:
    """The lazily loaded tensors of a folder, by canonical name, each taken once.

    With ``maps`` large ones are pages of their file, where that is possible.
    """

    def __init__(self, folder: Path, layout: Layout, maps: bool = False) -> None:
        self.arrays: dict[str, mx.array] = {}
        self.raw_names: dict[str, str] = {}
        self.used: set[str] = set()
        self.folder, self.model = folder, layout.model
        for shard, headers in read_headers(folder):
            loaded = _open(shard)
            with _descriptor(shard) as file:
                for raw, entry in headers.items():
                    if not is_text(raw, layout):
                        continue
                    name = canonical(raw)
                    if name in self.arrays:
                        raise ValueError(
                            f"[load] `{raw}` and `{self.raw_names[name]}` must not both be there: "
                            "they are the same tensor."
                        )
                    own = mapped.tensor(file, *entry) if maps else None
                    self.arrays[name] = loaded[raw] if own is None else own
                    self.raw_names[name] = raw

    def has(self, name: str) -> bool:
        return any(source in self.arrays for source in _sources(name))

    def take(
        self, name: str, shape: Shape, *, integer: bool = False, packed: bool = False
    ) -> mx.array:
        """One tensor, lazy; its shape and dtype checked, experts split or stacked as needed."""
        array = self._assemble(name, shape)
        if array is None:
            why = stale_index(self.folder) or f"is this a {self.model} checkpoint?"
            raise ValueError(f"[load] weights miss `{name}`; {why}")
        if array.shape != shape:
            raise ValueError(
                f"[load] `{name}` must have shape {list(shape)} but got {list(array.shape)}."
            )
        allowed = [mx.uint32] if packed else [mx.int32, mx.int64] if integer else list(FLOATS)
        if array.dtype not in allowed:
            names = " or ".join(_dtype_name(dtype) for dtype in allowed)
            raise ValueError(f"[load] `{name}` must be {names} but got {_dtype_name(array.dtype)}.")
        return array

    def _assemble(self, name: str, shape: Shape) -> mx.array | None:
        sources = _sources(name)
        if name in self.arrays:
            return self._use(name)
        if len(sources) == 1:
            return None
        _, joint, first = sources
        if joint in self.arrays:
            # The first half of the rows is the gate, the second half is up
            array = self._use(joint)
            half = array.shape[-2] // 2 if array.ndim == 3 else 0
            rows = slice(0, half) if ".gate_proj." in name else slice(half, None)
            return mx.contiguous(array[..., rows, :])
        if first in self.arrays:
            members = [first.replace(".experts.0.", f".experts.{x}.") for x in range(shape[0])]
            if all(member in self.arrays for member in members):
                return mx.stack([self._use(member) for member in members])
        return None

    def _use(self, name: str) -> mx.array:
        self.used.add(name)
        return self.arrays[name]

    def check_all_used(self) -> None:
        unknown = [self.raw_names[name] for name in self.arrays if name not in self.used]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise ValueError(
                f"[load] `{unknown[0]}`{more} is no tensor of this {self.model} model."
            )
        # Drop our handles, so that what is read as one dtype and kept as another is freed
        self.arrays.clear()


def _sources(name: str) -> list[str]:
    """Where a tensor may be: itself; experts also as a gate_up half, or one file entry each."""
    if ".experts." not in name:
        return [name]
    joint = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name)
    return [name, joint, name.replace(".experts.", ".experts.0.")]
