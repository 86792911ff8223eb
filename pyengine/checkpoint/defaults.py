"""How a checkpoint's authors want tokens chosen: generation_config.json, key by key.

What :class:`pyengine.sampling.Sampling` has is taken over. What it has not is noted, unless it
changes no text: a setting is honoured or told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.checkpoint.manifest import MANIFEST
from pyengine.drafters.drafter import MAX_BLOCK
from pyengine.model.config import TargetConfig
from pyengine.ops.filter_logits import MAX_TOP_K
from pyengine.sampling.settings import MAX_EDIT, Sampling
from pyengine.untrusted import optional, read_object, shown

FILE = "generation_config.json"
MAX_NOTES = 20

# Taken over, with our own values where nobody says anything
OURS: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 64,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
READ_ELSEWHERE = {"do_sample", "eos_token_id", "suppress_tokens"}

# Keys of transformers' GenerationConfig that change no text here: records, caches, what its own
# drafting does, and parts of strategies (beams) whose main key is noted.
WITHOUT_EFFECT = {
    *("_commit_hash", "_from_model_config", "transformers_version"),
    *("bos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("return_dict_in_generate", "output_attentions", "output_hidden_states"),
    *("output_scores", "output_logits", "compile_config", "disable_compile", "low_memory"),
    *("continuous_batching_config", "renormalize_logits", "remove_invalid_values"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("assistant_ensemble_weight", "target_lookbehind", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "speculation_type", "use_mtp"),
    *("early_stopping", "length_penalty", "diversity_penalty"),
}
# The values with which these are off
OFF: dict[str, Any] = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "token_healing": False,
}
# Where a caller may ask for the same
INSTEAD = {
    "max_new_tokens": "max_tokens bounds an answer",
    "max_length": "max_tokens bounds an answer",
    "stop_strings": "stop= takes them",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's authors recommend; ``num_draft`` is None where they say nothing.

    ``notes`` has a sentence for each of their settings that is not followed.
    """

    stop_ids: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int
    suppress_tokens: tuple[int, ...]
    num_draft: int | None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    notes: tuple[str, ...] = ()


def read_generation(
    target: Path, assistant: Path | None, config: TargetConfig, manifest: dict[str, Any]
) -> GenerationDefaults:
    """Settings a pair comes with: generation_config.json, else the manifest's, else ours."""
    own = _read_optional(target)
    theirs = _read_optional(assistant) if assistant else {}
    benchmark = manifest.get("benchmark", {})
    if not isinstance(benchmark, dict):
        raise ValueError(f"[load] `benchmark` of {MANIFEST} must be an object.")
    found, notes = sampling_defaults(own, benchmark, config.vocab_size)
    best = benchmark.get("best_block_size")
    if best is not None and (type(best) is not int or not 1 <= best <= MAX_BLOCK):
        raise ValueError(
            f"[load] `benchmark.best_block_size` of {MANIFEST} must be a whole number from 1 to "
            f"{MAX_BLOCK} but got {shown(best)}."
        )
    eos = own.get("eos_token_id")
    num_draft = theirs.get("num_assistant_tokens")
    if num_draft is not None and (type(num_draft) is not int or not 1 <= num_draft < MAX_BLOCK):
        raise ValueError(
            f"[load] num_assistant_tokens must be from 1 to {MAX_BLOCK - 1} but got "
            f"{shown(num_draft)}."
        )
    suppressed = _token_ids("suppress_tokens", own.get("suppress_tokens") or [], config)
    if len(set(suppressed)) == config.vocab_size:
        raise ValueError(f"[load] `suppress_tokens` of {FILE} must leave a token but names all.")
    return GenerationDefaults(
        stop_ids=config.eos_ids if eos is None else _token_ids("eos_token_id", eos, config),
        suppress_tokens=suppressed,
        num_draft=num_draft,
        notes=notes,
        **found,  # type: ignore[arg-type]
    )


def _token_ids(key: str, value: Any, config: TargetConfig) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise ValueError(
            f"[load] `{key}` of {FILE} must hold ids from 0 to "
            f"{config.vocab_size - 1} but got {shown(value)}."
        )
    return tuple(ids)


def _read_optional(folder: Path) -> dict[str, Any]:
    file = optional(folder, FILE, "load")
    return read_object(file, "load") if file else {}


def sampling_defaults(
    own: Mapping[str, Any], benchmark: Mapping[str, Any], vocab: int
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Fields of Sampling that a pair comes with, and notes on what is not taken over.

    Args:
        own: The object in the target's generation_config.json.
        benchmark: The manifest's, which has temperature, top_p and top_k where that file has none.
        vocab: V.

    Raises:
        ValueError: A value is no number, or one that no generation could use.
    """
    found: dict[str, float] = {}
    for key, ours in OURS.items():
        said = (place[key] for place in (own, benchmark) if place.get(key) is not None)
        value = next(said, ours)
        if type(value) not in (int, float) or not abs(value) <= MAX_EDIT:
            raise ValueError(f"[load] the default {key} must be a number but got {shown(value)}.")
        found[key] = value if key == "top_k" else float(value)
    do_sample = own.get("do_sample")
    if do_sample is not None and type(do_sample) is not bool:
        raise ValueError(
            f"[load] `do_sample` of {FILE} must be true or false but got {shown(do_sample)}."
        )
    if do_sample is False:
        found["temperature"] = 0.0
    notes = []
    top_k = found["top_k"]
    if top_k != int(top_k) or top_k < 0:
        raise ValueError(f"[load] the default top_k must be a count but got {shown(top_k)}.")
    found["top_k"] = int(top_k)
    if top_k > MAX_TOP_K:
        # Off is nearer to what was asked for than the most there is
        found["top_k"] = 0
        if top_k < vocab:
            notes.append(
                f"`top_k` {shown(top_k)} of {FILE} is more than {MAX_TOP_K}, the most there is: "
                "by default it is off."
            )
    try:
        Sampling(**found)  # type: ignore[arg-type]
    except ValueError as error:
        reason = str(error).removeprefix("[sampling] ")
        raise ValueError(f"[load] the default {reason}") from None
    return found, (*notes, *_unused(own))


def _unused(own: Mapping[str, Any]) -> list[str]:
    """A sentence for every key that may change the text elsewhere and does not here."""
    known = {*OURS, *READ_ELSEWHERE, *WITHOUT_EFFECT}
    keys = [
        key
        for key, value in own.items()
        if key not in known and value not in (None, [], {}) and OFF.get(key) != value
    ]
    notes = [
        f"`{shown(key)[1:-1]}` {shown(own[key])} of {FILE} is not used"
        + (f": {INSTEAD[key]}." if key in INSTEAD else ".")
        for key in keys[:MAX_NOTES]
    ]
    if len(keys) > MAX_NOTES:
        notes.append(f"{len(keys) - MAX_NOTES} more keys of {FILE} are not used.")
    return notes
