"""What a model's config says, as frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rope:
    """Half-split rotary embedding of one attention kind.

    ``num_rotated`` pairs turn, the rest stand still: all of them for the default kind, the first
    quarter for the proportional one.
    """

    theta: float
    fraction: float
    factor: float

    def frequencies(self, head_dim: int) -> list[float]:
        """``inv_freq`` [D/2]; the exponent is over the whole head, not over the rotated part."""
        num_rotated = int(self.fraction * head_dim / 2)
        rotated = [self.theta ** (-2 * j / head_dim) / self.factor for j in range(num_rotated)]
        return rotated + [0.0] * (head_dim // 2 - num_rotated)


@dataclass(frozen=True)
class LayerConfig:
    """Geometry of one decoder layer.

    ``kv_source`` is the layer whose keys and values this one attends to: itself, or the last
    layer of its kind that has its own. ``key_is_value`` means there is no v_proj.
    """

    sliding: bool
    head_dim: int
    num_kv_heads: int
    ffn_width: int
    kv_source: int
    key_is_value: bool


@dataclass(frozen=True)
class Quantization:
    """MLX affine quantisation: defaults, and overrides by module path (None: not quantised).

    An override that is not offered is the sentence that refuses it. It is for whoever reads the
    module: towers for images and sound may be stored as they like.
    """

    bits: int
    group_size: int
    overrides: Mapping[str, tuple[int, int] | str | None]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What target and assistant have in common."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    window: int
    eps: float
    context_limit: int
    layers: tuple[LayerConfig, ...]
    rope_sliding: Rope
    rope_full: Rope
    eos_ids: tuple[int, ...]
    quantization: Quantization | None

    def rope(self, sliding: bool) -> Rope:
        return self.rope_sliding if sliding else self.rope_full


@dataclass(frozen=True, kw_only=True)
class TargetConfig(TextConfig):
    """A Gemma 4 text model. ``per_layer_width`` and ``num_experts`` are 0 where absent."""

    softcap: float | None
    per_layer_width: int
    num_experts: int
    num_experts_used: int
    expert_width: int

    def last_source(self, sliding: bool) -> int:
        """The layer whose keys and values the assistant's layers of that kind read."""
        return max(layer.kv_source for layer in self.layers if layer.sliding == sliding)


@dataclass(frozen=True, kw_only=True)
class AssistantConfig(TextConfig):
    """A Gemma 4 assistant. ``num_centroids`` is 0 where the head is the plain table."""

    backbone_size: int
    num_centroids: int
    num_centroids_used: int


@dataclass(frozen=True, kw_only=True)
class DFlashConfig:
    """A DFlash drafter.

    Attributes:
        taps: The target's layers, from 0, whose output it reads, rising.
        block_size: Rows of the blocks that it was trained with.
        mask_id: The token that stands where a draft is to come.
        target_layers: How many layers its target has; None where the file does not say.
        softcap: Of the target's logits; None where the file does not say.
        window: Of the sliding layers.
        embedding_scale: Multiplies rows of the target's table; None takes the target's own scale.
        is_causal: Whether rows of a block see no later ones of it in sliding layers.
        layers: As the target's; ``sliding`` says which mask a layer has.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    window: int
    eps: float
    layers: tuple[LayerConfig, ...]
    rope: Rope
    taps: tuple[int, ...]
    block_size: int
    mask_id: int
    target_layers: int | None
    softcap: float | None
    embedding_scale: float | None
    is_causal: bool
    quantization: Quantization | None

    @property
    def kept(self) -> tuple[LayerConfig, ...]:
        """The layers as an arena keeps them: each in the pages of full layers."""
        return tuple(replace(layer, sliding=False) for layer in self.layers)
