"""A target and its drafters: find them, check, load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, cast

import mlx.core as mx

from pyengine import forked
from pyengine.arguments import flag, token_ids, whole
from pyengine.checkpoint import memory, on_metal
from pyengine.checkpoint.config_json import (
    read_assistant_config,
    read_dflash_config,
    read_target_config,
)
from pyengine.checkpoint.defaults import GenerationDefaults, read_generation
from pyengine.checkpoint.hub import locate
from pyengine.checkpoint.manifest import bundle_parts, check_folder, read_manifest
from pyengine.checkpoint.published import check_dflash, check_pair, published_name
from pyengine.checkpoint.safetensors import sampled
from pyengine.checkpoint.weights import (
    assistant_layout,
    dflash_layout,
    load_assistant_weights,
    load_dflash_weights,
    load_target_weights,
    target_layout,
)
from pyengine.drafters.assistant import AssistantDrafter
from pyengine.drafters.drafter import Asked
from pyengine.model.assistant import POSITIONS, Assistant, Position
from pyengine.model.dflash import DFlash
from pyengine.model.head import candidates
from pyengine.model.linear import Weights
from pyengine.model.memory import cache_bytes
from pyengine.model.target import Target, check_ids
from pyengine.ranks.group import joined
from pyengine.ranks.split import shares
from pyengine.ranks.start import begin, check_same, share_target
from pyengine.text.tokenizer import Tokenizer, load_tokenizer
from pyengine.untrusted import shown

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

_log = logging.getLogger("pyengine")


@dataclass(frozen=True, repr=False)
class Pair:
    """A loaded target with its assistant and its DFlash drafter, None where there is none, and what
    belongs to them. Without either it decodes plainly, or drafts by itself.

    ``verified`` means that the geometry is that of one of the five published pairs, ``embedded``
    that this is the pair inside the package. ``path`` is the bundle, or the target's folder.
    """

    target: Target
    assistant: Assistant | None
    generation: GenerationDefaults
    path: Path
    target_path: Path
    name: str
    verified: bool
    embedded: bool
    manifest: dict[str, Any]
    dflash: DFlash | None = None
    dflash_path: Path | None = None

    def __repr__(self) -> str:
        config, dtype = self.target.config, str(self.target.dtype).rpartition(".")[2]
        with_ = "with" if self.assistant else "without"
        with_ = f"{with_} assistant" + (" and with DFlash" if self.dflash else "")
        return (
            f"<Pair {self.name}: {len(config.layers)} layers, {dtype}, {with_}, from {self.path}>"
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The target's tokenizer, read when first asked for."""
        return load_tokenizer(self.target_path)

    def logits(self, ids: Sequence[int]) -> mx.array:
        """The target's logits after each of these tokens.

        Args:
            ids: T token ids; at most the context.

        Returns:
            ``[T, V]``, float32, after the softcap and before any sampling filter.

        Raises:
            ValueError: No ids, too many, or one outside the vocabulary.
        """
        forked.check("logits")
        tokens = token_ids("logits", "ids", ids)
        self._check_room("logits", len(tokens))
        return self.target.logits(tokens)

    def draft(self, ids: Sequence[int], k: int) -> list[int]:
        """Draft k tokens greedily after these.

        As in a round, the target processes all but the last token. Evaluates.

        Args:
            ids: At least two token ids.
            k: Number of drafts, at least 1.

        Returns:
            k token ids.

        Raises:
            ValueError: The pair has no assistant, or an argument breaks a rule above.
        """
        if self.assistant is None:
            raise ValueError("[draft] the pair must have an assistant; load one with assistant=.")
        forked.check("draft")
        tokens, count = token_ids("draft", "ids", ids), whole("draft", "k", k)
        if len(tokens) < 2:
            raise ValueError(f"[draft] ids must hold at least 2 tokens but got {len(tokens)}.")
        if count < 1:
            raise ValueError(f"[draft] k must be at least 1 but got {count}.")
        self._check_room("draft", len(tokens))
        check_ids("draft", tokens, self.target.config.vocab_size)
        cache = self.target.new_cache()
        drafter = AssistantDrafter(self.target, self.assistant)
        self.target.prefill(tokens[:-1], cache, reader=drafter)
        drafts = [mx.array(tokens[-1:], dtype=mx.int32)]
        for i in range(count):
            asked = Asked(drafts[i], [cache], lambda row: [candidates(row, top_k=1)], [count])
            [row] = drafter.propose(i, [drafter], asked)
            drafts.append(row.ids[:, 0])
        return cast("list[int]", mx.concatenate(drafts[1:]).tolist())

    def _check_room(self, what: str, count: int) -> None:
        if count > self.target.context:
            raise ValueError(
                f"[{what}] ids must fit the context of {self.target.context} tokens but got "
                f"{count}."
            )


def load(
    target: str | Path | None = None,
    assistant: str | Path | None = None,
    bundle: str | Path | None = None,
    *,
    dflash: str | Path | None = None,
    dtype: mx.Dtype | str | None = None,
    position: Position = "n-1",
    text: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pair:
    """Load a pair: two checkpoint folders, a bundle, or (nothing given) the embedded pair.

    Args:
        target: Folder of a Gemma 4 checkpoint in Hugging Face or MLX form. All four may also be
            names on the hub (``owner/name``, extra ``hub``).
        assistant: Folder of its assistant; without one the pair can only decode plainly.
        bundle: Folder with all, with or without ``mtplx_pair.json``; replaces the others.
        dflash: Folder of a DFlash drafter of the target, beside its assistant or without one.
        dtype: Convert to float32, float16 or bfloat16 (MLX's type or its name); None keeps the
            checkpoint's.
        position: Where the assistant's query sits, ``"n-1"`` or ``"n-2"``. Changes acceptance at
            most, never the output's distribution.
        text: Read the tokenizer too, before the weights, so that a wrong one is reported at once.
        on_progress: Called after each tensor with bytes read and bytes in all.

    Returns:
        The pair; its tokenizer is read when first used, if not already. Settings that its authors
        recommend and pyengine does not follow are listed in ``generation.notes`` and logged as
        warnings of the logger ``pyengine``.

    Raises:
        ValueError: A folder is not what it should be, or a drafter is another target's.
        RuntimeError: The process was forked from one that had used MLX.
    """
    forked.check("load")
    given = {"target": target, "assistant": assistant, "bundle": bundle, "dflash": dflash}
    for what, place in given.items():
        if not isinstance(place, (str, Path, NoneType)):
            raise ValueError(f"[load] {what} must be a folder or a name but got {shown(place)}.")
    dtype = _dtype(dtype)
    if not isinstance(position, str) or position not in POSITIONS:
        raise ValueError(f"[load] position must be n-1 or n-2 but got {shown(position)}.")
    flag("load", "text", text)
    beside = [what for what, place in given.items() if what != "bundle" and place is not None]
    if bundle is not None and beside:
        raise ValueError(f"[load] bundle must stand alone but {beside[0]} is given too.")
    if beside and target is None:
        raise ValueError(f"[load] {beside[0]} must come with a target but got none.")

    embedded = bundle is None and target is None
    manifest: dict[str, Any] = {}
    if target is None:
        path = check_folder(_embedded_path() if bundle is None else locate(bundle), "bundle")
        parts: dict[str, Path] = bundle_parts(path)
        manifest = read_manifest(path)
    else:
        path = check_folder(locate(target), "target")
        parts = {"target": path}
        for what, place in (("assistant", assistant), ("dflash", dflash)):
            if place is not None:
                parts[what] = check_folder(locate(place), what)
    target_path = parts["target"]
    assistant_path, dflash_path = parts.get("assistant"), parts.get("dflash")

    # All configs are read and compared before the first gigabyte is
    target_config = read_target_config(target_path)
    name, verified = path.name, False
    loaded: Assistant | None = None
    if assistant_path is not None:
        assistant_config = read_assistant_config(assistant_path)
        check_pair(target_config, assistant_config)
        published = published_name(target_config, assistant_config)
        name, verified = published or name, published is not None
    if dflash_path is not None:
        dflash_config = read_dflash_config(dflash_path)
        check_dflash(target_config, dflash_config)
    generation = read_generation(target_path, assistant_path, target_config, manifest)
    for note in generation.notes:
        _log.warning("[load] %s", note)
    needed = memory.weight_bytes(target_path, target_layout(target_config), dtype)
    if assistant_path is not None:
        needed += memory.weight_bytes(assistant_path, assistant_layout(assistant_config), dtype)
    if dflash_path is not None:
        needed += memory.weight_bytes(dflash_path, dflash_layout(dflash_config), dtype)
    on_metal.lengthen_command_buffers(target_config)  # before the GPU is first asked anything
    smallest = cache_bytes(target_config, 1, 1, 2)
    memory.check(needed + smallest, "the weights and the smallest cache")
    tokenizer = load_tokenizer(target_path) if text else None
    read = 0

    def on_read(count: int) -> None:
        nonlocal read
        read += count
        on_progress(read, needed)

    ranks = joined()
    share = None if ranks is None else shares(target_config, ranks.rank, ranks.size)
    if ranks is not None:
        begin(ranks)
        check_same(ranks, sampled(target_path))
    part = (lambda path, matrix: matrix) if share is None else share.part
    weights = load_target_weights(target_path, target_config, dtype, on_read, part)
    if assistant_path is not None and (ranks is None or ranks.leads):
        own = load_assistant_weights(assistant_path, assistant_config, dtype, on_read)
        _check_dtype("assistant", weights, own)
        loaded = Assistant(assistant_config, target_config, own, position)
    if ranks is None or share is None:
        model = Target(target_config, weights)
    else:  # ranks but the first stay there
        model = share_target(target_config, weights, share, ranks)
    flash: DFlash | None = None
    if dflash_path is not None:
        own = load_dflash_weights(dflash_path, dflash_config, dtype, on_read)
        _check_dtype("DFlash drafter", weights, own)
        flash = DFlash(dflash_config, model, own)
    # A lazy array belongs to the thread that made it, an evaluated one to all
    mx.eval([*_arrays(model), *_arrays(loaded), *_arrays(flash)])
    pair = Pair(
        target=model,
        assistant=loaded,
        generation=generation,
        path=path,
        target_path=target_path,
        name=manifest.get("name", name),
        verified=verified,
        embedded=embedded,
        manifest=manifest,
        dflash=flash,
        dflash_path=dflash_path,
    )
    longest = cache_bytes(target_config, target_config.context_limit, 1, weights.dtype.size)
    on_metal.wire(pair, needed + longest)
    if tokenizer is not None:
        vars(pair)["tokenizer"] = tokenizer  # where its cached_property looks
    return pair


def _check_dtype(part: str, target: Weights, own: Weights) -> None:
    if own.dtype != target.dtype:
        raise ValueError(
            f"[load] the {part}'s dtype must equal the target's {target.dtype} but got "
            f"{own.dtype}; pass dtype= to convert both."
        )


def _dtype(given: object) -> mx.Dtype | None:
    """A storage type, from itself or its name."""
    if given is None:
        return None
    found = DTYPES.get(given) if isinstance(given, str) else given
    if isinstance(found, mx.Dtype) and found in DTYPES.values():
        return found
    raise ValueError(f"[load] dtype must be {', '.join(DTYPES)} or None but got {shown(given)}.")


def _arrays(value: object) -> Iterator[mx.array]:
    """Every array inside a model."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _arrays(inner)
    elif type(value).__module__.startswith("pyengine."):
        for inner in vars(value).values():
            yield from _arrays(inner)


def _embedded_path() -> Path:
    return Path(__file__).parents[1] / "nano"
