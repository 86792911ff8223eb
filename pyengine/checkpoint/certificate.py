"""What a calibration found of an early exit: a file that is bound to what was calibrated."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.arguments import is_whole
from pyengine.checkpoint.fingerprint import content_hash, files_of, weight_files
from pyengine.risk import METRICS, Metric, check_bounds, p_value
from pyengine.sampling.settings import Sampling
from pyengine.untrusted import kind, parse, read_text, shown, write_whole

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

KIND, VERSION = "early-exit", 1
MAX_BYTES = 1 << 20
MOST_TESTED = 1000  # thresholds
MOST_N = 10_000_000  # prompts, and tokens of an answer
MOST_DECAY = 1e6
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
GENERATION = ("generation_config.json",)  # which has the ids that end an answer
# What may differ from text to text: none changes how likely a text is
FREE = {"seed": None, "verify": "residual", "logprobs": None}
_HASH = re.compile(r"[0-9a-f]{64}")

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class Trial:
    """One threshold: what it cost, and what it saved.

    Attributes:
        threshold: The paper's lambda.
        total: Sum of the n losses.
        p_value: Of "the mean loss is above delta".
        mean_layers: Layers per token behind the first of an answer; None where there was none.
    """

    threshold: float
    total: float
    p_value: float
    mean_layers: float | None


@dataclass(frozen=True)
class Certificate:
    """An early exit that passed, or did not: ``tested`` has every threshold up to the first that
    failed, safest first.

    Attributes:
        target: SHA-256 of the target's files.
        tokenizer: Of its tokenizer's, with the chat template.
        prompts: Of the token ids of the prompts, in order.
        dtype: Of activations.
        sampling: Without a seed.
        max_tokens: Tokens of an answer at most.
        layer: A token may leave behind so many layers.
        decay: How fast the threshold falls along an answer, the paper's tau.
        n: Prompts.
        delta: The loss is at most so much on average.
        epsilon: That is wrong with this probability at most.
        metric: Of a text and the full model's: how they differ.
    """

    target: str
    tokenizer: str
    prompts: str
    dtype: str
    sampling: Sampling
    max_tokens: int
    layer: int
    decay: float
    n: int
    delta: float
    epsilon: float
    metric: Metric
    tested: tuple[Trial, ...]

    @property
    def threshold(self) -> float | None:
        """The last one that passed; None where none did."""
        passed = [one.threshold for one in self.tested if one.p_value <= self.epsilon]
        return passed[-1] if passed else None

    @property
    def label(self) -> str:
        """What stands where an answer stands."""
        return (
            f"approximate: on prompts like the {self.n} calibrated ones, answers differ from the "
            f"full model's by at most {self.delta:g} on average, with confidence "
            f"{1 - self.epsilon:g}"
        )

    def told(self) -> dict[str, Any]:
        """What goes with an answer, ready for JSON."""
        return {
            "label": self.label,
            **{name: getattr(self, name) for name in ("delta", "epsilon", "n", "metric")},
            "exit_layer": self.layer,
            "lambda": self.threshold,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        rows = [
            {
                "lambda": one.threshold,
                "loss_sum": one.total,
                "risk": one.total / self.n,
                "p_value": one.p_value,
                "mean_layers": one.mean_layers,
            }
            for one in self.tested
        ]
        own = {key: value for key, value in asdict(self).items() if key != "tested"}
        sampling = {k: v for k, v in self.sampling.to_dict().items() if k not in FREE}
        return {
            "certificate": KIND,
            "version": VERSION,
            "lambda": self.threshold,
            "confidence": "softmax response",
            **own,
            "sampling": sampling,
            "tested": rows,
        }

    def write(self, path: Path) -> None:
        """Write it as JSON: whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def check_pair(self, pair: Pair, on_progress: OnBytes = lambda done, total: None) -> None:
        """Refuse another pair. Reads its files, once for a pair.

        Raises:
            ValueError: Weights, dtype or tokenizer are others than those that were calibrated, or
                other processes have a part of the target.
        """
        pair.target.check_alone("early_exit")
        layers = len(pair.target.layers)
        if self.layer >= layers:
            raise ValueError(
                f"[early-exit] layer must leave a layer of the target's {layers} out but got "
                f"{self.layer}."
            )
        for name in ("target", "dtype", "tokenizer"):
            wanted, got = getattr(self, name), bound(pair, on_progress)[name]
            if got != wanted:
                raise ValueError(
                    f"[early-exit] {name} must be the calibrated one, {wanted[:12]}, but got "
                    f"{got[:12]}."
                )

    def check_settings(self, sampling: Sampling, max_tokens: int | None, has_stops: bool) -> int:
        """Refuse other settings than those that were calibrated.

        Returns:
            Tokens of the answer at most: where none are asked for, as many as were calibrated.

        Raises:
            ValueError: The answer would be drawn otherwise, or be longer; or, since under ``lcs``
                the first part of a text may differ more than all of it, end elsewhere.
        """
        wanted, got = self.sampling.to_dict(), without_seed(sampling).to_dict()
        for name, value in got.items():
            if value != wanted[name]:
                raise ValueError(
                    f"[early-exit] {name} must be {shown(wanted[name])} as calibrated but got "
                    f"{shown(value)}."
                )
        if sampling.logprobs is not None:
            raise ValueError(
                f"[early-exit] logprobs must be None, since those of an exit are not the model's, "
                f"but got {sampling.logprobs}."
            )
        most = self.max_tokens if max_tokens is None else max_tokens
        if most > self.max_tokens:
            raise ValueError(
                f"[early-exit] max_tokens must be at most {self.max_tokens} as calibrated but got "
                f"{most}."
            )
        if self.metric != "differs" and most < self.max_tokens:
            raise ValueError(
                f"[early-exit] max_tokens must be {self.max_tokens} under {self.metric} but got "
                f"{most}."
            )
        if self.metric != "differs" and has_stops:
            raise ValueError(
                f"[early-exit] stop must be none under {self.metric}, which judged whole answers, "
                "but got some."
            )
        return most


def without_seed(sampling: Sampling) -> Sampling:
    """The same, without what may differ from text to text."""
    return replace(sampling, seed=None, verify="residual", logprobs=None)


def bound(pair: Pair, on_progress: OnBytes = lambda done, total: None) -> dict[str, str]:
    """What a certificate says of a pair: hashes of its files, which are read once."""
    known: dict[str, str] | None = vars(pair).get("_bound")
    if known is None:
        files = [*weight_files(pair), *files_of(pair, GENERATION)]
        known = {
            "target": content_hash(files, on_progress),
            "tokenizer": content_hash(files_of(pair, TOKENIZER)),
            "dtype": str(pair.target.dtype).rpartition(".")[2],
        }
        vars(pair)["_bound"] = known  # as a cached_property would: the pair is frozen
    return known


def read_certificate(path: Path) -> Certificate:
    """A certificate that passed.

    Raises:
        ValueError: The file cannot be read, is none, or does not pass by its own figures.
    """
    where = f"[early-exit] {path}"
    found = parse(read_text(path, "early-exit", MAX_BYTES), where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} must hold a JSON object but got {kind(found)}.")
    read = _Reader(where, found)
    for name, value in (("certificate", KIND), ("version", VERSION)):
        if type(found.get(name)) is not type(value) or found[name] != value:
            raise read.wrong(name, f"be {value}")
    sampling = read.value("sampling", dict, "be an object")
    try:
        biases = sampling.pop("logit_bias", {})
        own = Sampling(**sampling, logit_bias={int(token): bias for token, bias in biases.items()})
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{where}: sampling must hold settings of Sampling but does not."
        ) from None
    metric = read.value("metric", str, "be a text")
    if metric not in METRICS:
        raise read.wrong("metric", f"be one of {', '.join(METRICS)}")
    certificate = Certificate(
        target=read.hash("target"),
        tokenizer=read.hash("tokenizer"),
        prompts=read.hash("prompts"),
        dtype=read.value("dtype", str, "be a text"),
        sampling=without_seed(own),
        max_tokens=read.whole("max_tokens", 1, MOST_N),
        layer=read.whole("layer", 1, MOST_N),
        decay=read.number("decay", 0, MOST_DECAY),
        n=read.whole("n", 1, MOST_N),
        delta=read.number("delta", 0, 1),
        epsilon=read.number("epsilon", 0, 1),
        metric=metric,
        tested=tuple(_tested(where, read.value("tested", list, "be a list"))),
    )
    check_bounds("early-exit", certificate.delta, certificate.epsilon)
    _check_passed(where, certificate, found.get("lambda"))
    return certificate


def _tested(where: str, rows: list[Any]) -> list[Trial]:
    if not 1 <= len(rows) <= MOST_TESTED:
        raise ValueError(f"{where}: tested must have 1 to {MOST_TESTED} rows but got {len(rows)}.")
    found = []
    for number, row in enumerate(rows, 1):
        place = f"{where}: row {number} of tested"
        if not isinstance(row, dict):
            raise ValueError(f"{place} must be an object but got {kind(row)}.")
        read = _Reader(place, row)
        layers = None if row.get("mean_layers") is None else read.number("mean_layers", 0, MOST_N)
        threshold, total = read.number("lambda", 0, 1), read.number("loss_sum", 0, MOST_N)
        found.append(Trial(threshold, total, read.number("p_value", 0, 1), layers))
    return found


def _check_passed(where: str, own: Certificate, threshold: Any) -> None:
    """Refuse what does not follow from its own figures."""
    thresholds = [one.threshold for one in own.tested]
    if thresholds != sorted(set(thresholds), reverse=True):
        raise ValueError(f"{where}: lambdas of tested must fall from row to row but do not.")
    for number, one in enumerate(own.tested, 1):
        known = one.total <= own.n and math.isclose(
            one.p_value,
            p_value(one.total, own.n, own.delta, own.metric == "differs"),
            rel_tol=1e-6,
            abs_tol=1e-300,
        )
        passed = one.p_value <= own.epsilon
        if not known or not (passed or number == len(own.tested)):
            raise ValueError(
                f"{where}: row {number} of tested must follow from its losses and the order but "
                "does not."
            )
    if own.threshold is None or threshold != own.threshold:
        raise ValueError(
            f"{where}: lambda must be the last one that passed but got {shown(threshold)}."
        )


class _Reader:
    """Fields of an object from a foreign hand."""

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        self._where, self._fields = where, fields

    def wrong(self, name: str, rule: str) -> ValueError:
        got = shown(self._fields[name]) if name in self._fields else "none"
        return ValueError(f"{self._where}: {name} must {rule} but got {got}.")

    def value(self, name: str, wanted: type, rule: str) -> Any:
        if not isinstance(self._fields.get(name), wanted):
            raise self.wrong(name, rule)
        return self._fields[name]

    def hash(self, name: str) -> str:
        value: str = self.value(name, str, "be a SHA-256")
        if not _HASH.fullmatch(value):
            raise self.wrong(name, "be a SHA-256")
        return value

    def whole(self, name: str, least: int, most: int) -> int:
        value = self._fields.get(name)
        if not is_whole(value) or not least <= value <= most:  # type: ignore[operator]
            raise self.wrong(name, f"be a whole number from {least} to {most}")
        return int(value)  # type: ignore[arg-type]

    def number(self, name: str, least: float, most: float) -> float:
        value = self._fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, f"be a number from {least} to {most:g}")
        if not least <= value <= most:  # NaN is neither
            raise self.wrong(name, f"be a number from {least} to {most:g}")
        return float(value)
