"""Pairs of the published shapes with generated weights: for times and memory, not for text.

Matrices are packed as a bundle's are, from one pattern of random words over and over: no second is
lost on random numbers, and each matrix has memory of its own, so that its bytes must be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

import mlx.core as mx

from pyengine.bench import traffic
from pyengine.checkpoint import memory, on_metal
from pyengine.checkpoint.defaults import OURS, GenerationDefaults
from pyengine.checkpoint.memory import GB
from pyengine.checkpoint.pair import Pair
from pyengine.checkpoint.published import DFLASH, PUBLISHED, published, published_dflash
from pyengine.checkpoint.weights import Layout, assistant_layout, dflash_layout, target_layout
from pyengine.drafters import exit_depth
from pyengine.model.assistant import Assistant
from pyengine.model.config import AssistantConfig, DFlashConfig, Quantization, TargetConfig
from pyengine.model.dflash import DFlash
from pyengine.model.linear import Linear, Weights
from pyengine.model.memory import cache_bytes, prompt_bytes
from pyengine.model.target import Target

SHAPES = {name.partition("-")[0].lower(): name for name in PUBLISHED}
BITS = (8, 6, 4)
GROUP = traffic.GROUP
# Words of the pattern. A prime: it ends nowhere with a row, so that rows of a matrix differ
PATTERN = 1048573

OnMatrix = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """A pair to make: its shape, and how many of the target's layers.

    Attributes:
        name: The published pair's.
        bits: Per weight.
        whole: The published target.
        target: The same, with its layers or some of them.
        assistant: As published.
        drafters: Names of those that draft, each in a cache of its own.
        dflash: The published DFlash drafter, where it is one of them; on some of the layers its
            taps are spread over these.
    """

    name: str
    bits: int
    whole: TargetConfig
    target: TargetConfig
    assistant: AssistantConfig
    drafters: tuple[str, ...] = ("assistant",)
    dflash: DFlashConfig | None = None

    @property
    def is_whole(self) -> bool:
        return self.target == self.whole

    @property
    def title(self) -> str:
        count, all_of_them = len(self.target.layers), len(self.whole.layers)
        layers = "" if self.is_whole else f", {count} of {all_of_them} layers"
        return f"{self.name} at {self.bits} bit{layers}, generated weights"

    @property
    def nbytes(self) -> int:
        """Memory of the models' weights."""
        return ceil(sum(traffic.layout_bytes(layout, self.bits) for layout in self.layouts))

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of target, assistant and, where it is there, DFlash."""
        both = target_layout(self.target), assistant_layout(self.assistant)
        return both if self.dflash is None else (*both, dflash_layout(self.dflash))

    @property
    def layers_share(self) -> float:
        """What the layers of the published target read, over what these read."""
        whole, own = (
            traffic.target_bytes(config, self.bits) - traffic.head_bytes(config, self.bits)
            for config in (self.whole, self.target)
        )
        return whole / own

    def needs(self, context: int, block_size: int) -> int:
        """Memory with the caches of that context and the work on a prompt."""
        beside = () if self.dflash is None else self.dflash.kept
        sizes = context, block_size
        work = prompt_bytes(self.target, *sizes, 0, mx.bfloat16.size, beside)
        further = cache_bytes(self.target, *sizes, mx.bfloat16.size)
        return self.nbytes + work + (len(self.drafters) - 1) * further


def plan(
    shape: str,
    layers: int | None = None,
    bits: int = 8,
    drafters: tuple[str, ...] = ("assistant",),
) -> Plan:
    """A pair of that shape, a key of ``SHAPES``; ``layers`` None: whole.

    Raises:
        ValueError: There is no such shape, or it has no such cut or drafter.
    """
    if shape not in SHAPES:
        raise ValueError(f"[bench] --shape must be of {', '.join(SHAPES)} but got {shape!r}.")
    if bits not in BITS:
        raise ValueError(f"[bench] --bits must be of {', '.join(map(str, BITS))} but got {bits}.")
    name = SHAPES[shape]
    target, assistant = published(name)
    packing = Quantization(bits, GROUP, {})
    target = replace(target, quantization=packing)
    own = target if layers is None else cut(target, layers)
    count, dflash = len(own.layers), None
    for drafter in drafters:
        if (depth := exit_depth(drafter)) is not None and depth >= count:
            raise ValueError(
                f"[bench] --drafter must leave a layer of the target's {count} out but got "
                f"{drafter}."
            )
    if "dflash" in drafters:
        if name not in DFLASH:
            known = ", ".join(at for at, known in SHAPES.items() if known in DFLASH)
            raise ValueError(f"[bench] --shape must be of {known} for dflash but got {shape!r}.")
        dflash = replace(published_dflash(name), quantization=packing, target_layers=count)
        if own != target:
            taps = len(dflash.taps)
            dflash = replace(dflash, taps=tuple(i * count // taps for i in range(taps)))
    return Plan(name, bits, target, own, replace(assistant, quantization=packing), drafters, dflash)


def period(config: TargetConfig) -> int:
    """Layers from one full layer to the next."""
    return 1 + next(i for i, layer in enumerate(config.layers) if not layer.sliding)


def cut(config: TargetConfig, count: int) -> TargetConfig:
    """The target with so many of its layers: first ones, and where some have no keys of their own,
    last ones in the same proportion.

    Raises:
        ValueError: Not whole periods of sliding layers and a full one, or more than there are.
    """
    step, total = period(config), len(config.layers)
    if not step <= count <= total or count % step:
        raise ValueError(
            f"[bench] --layers must be a multiple of {step} up to {total} but got {count}."
        )
    owning = sum(layer.kv_source == i for i, layer in enumerate(config.layers)) // step
    owned = max(1, round(count // step * owning / (total // step)))
    kept = [*range(owned * step), *range(total - count + owned * step, total)]
    source = {i: at for at, i in enumerate(kept[: owned * step])}
    newest = {config.layers[i].sliding: at for i, at in source.items()}
    layers = tuple(
        replace(layer, kv_source=source.get(i, newest[layer.sliding]))
        for i, layer in ((i, config.layers[i]) for i in kept)
    )
    return replace(config, layers=layers)


def check_memory(plan: Plan, context: int, block_size: int) -> None:
    """Refuse a pair that would not fit.

    Raises:
        ValueError: The memory that is free is smaller; the message says how many layers fit.
    """
    there, needed = memory.available_bytes(), plan.needs(context, block_size)
    if there is None or needed <= there:
        return
    step = period(plan.whole)
    fitting = 0
    for count in range(step, len(plan.target.layers), step):
        smaller = replace(plan, target=cut(plan.whole, count))
        fitting = count if smaller.needs(context, block_size) <= there else fitting
    way = f"--layers {fitting} would fit" if fitting else "a smaller shape may fit"
    raise ValueError(
        f"[bench] {plan.title} must fit the free memory of {there / GB:.1f} GB but needs "
        f"{needed / GB:.1f} GB; {way}."
    )


def make(
    plan: Plan, context: int, block_size: int, on_matrix: OnMatrix = lambda done, total, name: None
) -> Pair:
    """The pair, in memory. Evaluates.

    Raises:
        ValueError: It would not fit.
    """
    check_memory(plan, context, block_size)
    on_metal.lengthen_command_buffers(plan.target)
    layouts = plan.layouts
    total = sum(len(layout.matrices) for layout in layouts)
    made = 0
    halves = mx.random.randint(0, 2**16, (2 * PATTERN,), key=mx.random.key(0))
    words = halves.astype(mx.uint16).view(mx.uint32)

    def weights(layout: Layout) -> Weights:
        nonlocal made
        matrices = {}
        for path, shape in layout.matrices.items():
            on_matrix(made, total, path)
            matrices[path] = matrix(words, shape, traffic.bits_of(path, plan.bits), made)
            made += 1
        vectors = {name: vector(name, layout) for name in layout.vectors}
        mx.eval(list(vectors.values()))
        return Weights(matrices, vectors, mx.bfloat16)

    target = Target(plan.target, weights(layouts[0]))
    assistant = Assistant(plan.assistant, plan.target, weights(layouts[1]))
    dflash = None if plan.dflash is None else DFlash(plan.dflash, target, weights(layouts[2]))
    on_matrix(total, total, "done")
    pair = Pair(
        target=target,
        assistant=assistant,
        generation=GenerationDefaults(
            stop_ids=(),
            temperature=OURS["temperature"],
            top_p=OURS["top_p"],
            top_k=int(OURS["top_k"]),
            suppress_tokens=(),
            num_draft=None,
        ),
        path=Path("generated"),
        target_path=Path("generated"),
        name=plan.title,
        verified=plan.is_whole,
        embedded=False,
        manifest={},
        dflash=dflash,
    )
    on_metal.wire(pair, plan.needs(context, block_size))
    return pair


def matrix(words: mx.array, shape: tuple[int, ...], bits: int, number: int) -> Linear:
    """A quantised matrix or stack of the pattern's words, from a place of its own on, with values
    as large as keep a normal vector normal. Evaluates."""
    *rows, K = shape
    count = prod(rows) * K * bits // 32
    start = number * 7919 % words.size  # another prime, so that no two matrices begin alike
    first = words[start : start + count]
    whole, rest = divmod(count - first.size, words.size)
    packed = mx.concatenate([first, *[words] * whole, words[:rest]]).reshape(*rows, -1)
    scale = (12 / K / (4**bits - 1)) ** 0.5  # so that their variance is 1 / K
    groups = (*rows, K // GROUP)
    scales = mx.full(groups, scale, mx.bfloat16)
    biases = mx.full(groups, -scale * (2**bits - 1) / 2, mx.bfloat16)
    mx.eval(packed, scales, biases)
    return Linear(packed, scales, biases, bits, GROUP)


def vector(name: str, layout: Layout) -> mx.array:
    """Norms and scales of one; tables of tokens in order."""
    shape = layout.vectors[name]
    if name in layout.integers:
        return mx.arange(prod(shape), dtype=mx.int32).reshape(shape)
    return mx.ones(shape, mx.bfloat16)
