"""What rounds of a pair cost on this machine, and how many drafts are kept: measured once.

Rules whose text depends on where rounds begin need one block size for a whole text. A profile gives
it, and it stays as it is until its file is deleted: seed and profile give the text. One small JSON
file per machine, build, pair and drafter, in the user's cache folder. Where none can be kept none
is made.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from pyengine.checkpoint.defaults import OURS
from pyengine.checkpoint.pair import Pair
from pyengine.doctor import device, first_use, machine, quarantine
from pyengine.drafters import new_drafter
from pyengine.drafters.drafter import Drafter
from pyengine.engine import round as on_device
from pyengine.engine.controller import AUTO_BLOCK, MOST_DRAFTS, Acceptance, Costs, Known, Shape
from pyengine.engine.known import known_of
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import TokenSequence
from pyengine.ops import dispatch
from pyengine.sampling.sampler import Choices
from pyengine.sampling.settings import Sampling
from pyengine.text.prompt import encode_prompt
from pyengine.untrusted import parse, read_text, shown, write_whole

FORMAT = 2
LONGEST_S = 10.0  # that measuring may take; what is slower has no profile
ORDER = (3, 0, 7, 1, 5, 2, 6, 4)  # drafts of the rounds, over and over; the first time records
TURNS = 6
TOKENS = 64  # of a text
PROMPTS = (
    "Write a short Python program that counts the words of a file, and explain it.",
    "Describe a walk through a town by the sea.",
    "Create a single-file HTML5 canvas Snake game.",
)
AS_SEEN = 20.0  # drafts that a profile's acceptance counts for

_lock = threading.Lock()
# By target, and then by drafter
_profiles: WeakKeyDictionary[Any, dict[str, Profile | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Profile:
    """What was measured, of one text alone; seconds.

    Attributes:
        pair: Its name.
        round_s: Of rounds with 0 to 7 drafts; the first is a plain step.
        draft_s: Of a step of the drafter; of DFlash, which has one per round, with 7 drafts.
        drafted: Drafts by depth, those behind a refused one not counted.
        accepted: Of those, the ones that were kept.
        drafter: Its name.
    """

    pair: str
    round_s: tuple[float, ...]
    draft_s: float
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    drafter: str = "assistant"

    @property
    def verify_s(self) -> list[float]:
        """Of verifying 1 to 8 rows: what a round takes beside its drafts."""
        most = _steps(self.drafter)
        return [took - min(k, most) * self.draft_s for k, took in enumerate(self.round_s)]

    @property
    def acceptance(self) -> list[float]:
        """By depth, where all before it were kept."""
        found = Acceptance(forget=1.0)
        found.made[:], found.kept[:] = map(float, self.drafted), map(float, self.accepted)
        return found.rates()

    @property
    def best_block(self) -> int:
        """Of most expected tokens per second, 1 to 8."""
        reach = list(accumulate(self.acceptance, mul))
        rates = [(1 + sum(reach[:k])) / took for k, took in enumerate(self.round_s)]
        return 1 + rates.index(max(rates))

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        made = {name: getattr(self, name) for name in ("verify_s", "acceptance", "best_block")}
        return {**asdict(self), **made}

    def line(self) -> str:
        """For a reader."""
        plain, draft, verify = (1e3 * s for s in (self.round_s[0], self.draft_s, self.verify_s[-1]))
        kept = " ".join(f"{rate:.2f}" for rate in self.acceptance)
        own = "" if self.drafter == "assistant" else f" with {self.drafter}"
        return (
            f"block size {self.best_block} for {shown(self.pair)}{own}: plain step {plain:.2f} ms, "
            f"draft {draft:.2f}, verify of {AUTO_BLOCK} rows {verify:.2f}; acceptance {kept}"
        )

    def teach(self, known: Known) -> None:
        """Begin with it what a process knows of the pair's rounds."""
        for k, took in enumerate(self.round_s):
            known.costs.note(Shape(1, k, k), took)
        for depth, rate in enumerate(self.acceptance):
            made = min(AS_SEEN, self.drafted[depth])
            known.acceptance.made[depth], known.acceptance.kept[depth] = made, made * rate


def ready(
    pair: Pair, tell: first_use.Tell = first_use.warn, drafter: str = "assistant"
) -> Profile | None:
    """The profile of a pair and a drafter; measured where there is none, once. Evaluates.

    A process that had one, or none, goes on so. None where the pair has no such drafter, for
    lookup, whose rounds depend on the text, where ops are not ours, where no file can be written,
    and where measuring takes longer than ten seconds.
    """
    return _known_here(pair, drafter, tell, make=True)


def kept(
    pair: Pair, tell: first_use.Tell = first_use.warn, drafter: str = "assistant"
) -> Profile | None:
    """The profile of a pair and a drafter if there is one; nothing is measured."""
    return _known_here(pair, drafter, tell, make=False)


def _known_here(pair: Pair, drafter: str, tell: first_use.Tell, make: bool) -> Profile | None:
    if not isinstance(pair, Pair) or drafter == "lookup":
        return None
    own = _drafter(pair, drafter)
    if own is None or dispatch.chosen() != "native" or not dispatch.exact():
        return None
    with _lock:
        profiles = _profiles.setdefault(pair.target, {})
        if drafter in profiles:
            return profiles[drafter]
        found, there = None, False
        if _has_folder(make):
            found, there = read(pair, tell, drafter)
        if make and not there and os.access(quarantine.folder(), os.W_OK):
            found = measured(pair, drafter)
            _write(pair, drafter, found, tell)
        if found is not None:
            found.teach(known_of(pair.target, type(own)))
        if found is not None or make:
            profiles[drafter] = found
        return found


def _drafter(pair: Pair, name: str) -> Drafter | None:
    return new_drafter(name, pair.target, pair.assistant, pair.dflash)


def _steps(drafter: str) -> int:
    """How many it has in a round at most."""
    return 1 if drafter == "dflash" else MOST_DRAFTS


def key(pair: Pair, drafter: str = "assistant") -> dict[str, str]:
    """What a profile is of."""
    model = {"assistant": pair.assistant, "dflash": pair.dflash}.get(drafter)
    parts = pair.target.config, getattr(model, "config", None), pair.target.dtype
    text = repr((*parts, str(pair.target_path.resolve()), str(pair.path.resolve())))
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return {**machine.key(device.default()), "pair": digest, "drafter": drafter}


def path(pair: Pair, drafter: str = "assistant") -> Path:
    return quarantine.folder() / f"blocks-{machine.digest(key(pair, drafter))}.json"


def read(pair: Pair, tell: first_use.Tell, drafter: str) -> tuple[Profile | None, bool]:
    """What is kept of a pair, and whether anything is: that measuring took too long is kept too."""
    file = path(pair, drafter)
    try:
        if not file.is_file():
            return None, False
        found, own = _parsed(file)
        if found != key(pair, drafter):
            raise ValueError("it is of another pair, drafter, machine, system or build")
        return own, True
    except (ValueError, OSError) as error:
        text = str(error).removeprefix("[doctor] ").replace(str(file), "it").rstrip(".")
        tell(f"{file} is ignored: {text}.")
        return None, False


def here() -> list[Profile]:
    """All that are kept of this machine and build; a file that is none is left out."""
    own, found = machine.key(device.default()), []
    for file in sorted(quarantine.folder().glob("blocks-*.json")):
        try:
            of, profile = _parsed(file)
        except (ValueError, OSError):
            continue
        about = {name: of[name] for name in of if name not in ("pair", "drafter")}
        if profile is not None and about == own:
            found.append(profile)
    return found


def _parsed(file: Path) -> tuple[dict[str, str], Profile | None]:
    """A file as it is written, and no other: what the profile is of, and the profile.

    Raises:
        ValueError: It is none.
    """
    value = parse(read_text(file, "doctor", 1 << 16), f"[doctor] {file}")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"it must have format {FORMAT}")
    of, own = value.get("key"), value.get("profile")
    if not isinstance(of, dict):
        raise ValueError("it must have a key")
    if own is None:
        return of, None
    if not isinstance(own, dict) or {*own} != {field.name for field in fields(Profile)}:
        raise ValueError("it must hold a profile")
    lists = {
        "round_s": (AUTO_BLOCK, 1e-9),
        "drafted": (MOST_DRAFTS, 0),
        "accepted": (MOST_DRAFTS, 0),
    }
    for name, (count, least) in lists.items():
        if not isinstance(own[name], list) or len(own[name]) != count:
            raise ValueError(f"`{name}` must hold {count} numbers")
        if not all(_is_number(x) and x >= least for x in own[name]):
            raise ValueError(f"`{name}` must hold numbers that can be")
    if not all(isinstance(own[name], str) for name in ("pair", "drafter")):
        raise ValueError("`pair` and `drafter` must be names")
    if not _is_number(own["draft_s"]):
        raise ValueError("`draft_s` must be a number")
    if any(a > d for a, d in zip(own["accepted"], own["drafted"], strict=True)):
        raise ValueError("`accepted` must be at most `drafted`")
    round_s, drafted, accepted = (tuple(own[name]) for name in lists)
    return of, Profile(own["pair"], round_s, own["draft_s"], drafted, accepted, own["drafter"])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _has_folder(make: bool) -> bool:
    """Whether there is a folder for profiles; it is made where one is to be."""
    folder = quarantine.folder()
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        return folder.is_dir()
    except OSError:
        return False


def _write(pair: Pair, drafter: str, profile: Profile | None, tell: first_use.Tell) -> None:
    file = path(pair, drafter)
    own = None if profile is None else asdict(profile)
    try:
        write_whole(
            file,
            json.dumps({"format": FORMAT, "key": key(pair, drafter), "profile": own}, indent=1)
            + "\n",
        )
    except OSError as error:
        tell(f"{file} could not be written: {error.strerror}.")


def measured(
    pair: Pair, drafter: str, clock: Callable[[], float] = time.perf_counter
) -> Profile | None:
    """Time rounds of all block sizes while a few texts are made. Evaluates.

    Returns:
        None where that takes longer than ten seconds.
    """
    end, costs, acceptance = clock() + LONGEST_S, Costs(), Acceptance(forget=1.0)
    rounds, count = Rounds(), 0
    for number in itertools.count():
        sequence = _text(pair, number, drafter)
        for _ in sequence.prefill():
            if clock() > end:
                return None
        while sequence.finish_reason is None:
            k, before = ORDER[count % len(ORDER)], sequence.stats.decode_s
            sequence.drafts = k
            [done] = rounds.play([sequence])
            if isinstance(done, Exception):
                raise done
            acceptance.note(k, done.num_accepted)
            took = sequence.stats.decode_s - before
            costs.note(Shape(1, k, k), took, recorded=count < len(ORDER))
            count += 1
            if count == TURNS * len(ORDER):
                return Profile(
                    pair.name,
                    tuple(costs.estimate(Shape(1, k, k)) for k in range(AUTO_BLOCK)),
                    _draft_seconds(sequence, clock) / _steps(drafter),
                    tuple(map(int, acceptance.made)),
                    tuple(map(int, acceptance.kept)),
                    drafter,
                )
            if clock() > end:
                return None
    raise AssertionError  # there is always another text


def _text(pair: Pair, number: int, drafter: str) -> TokenSequence:
    """A text of the pair's own settings."""
    own = pair.generation
    ids = encode_prompt(
        PROMPTS[number % len(PROMPTS)],
        pair.tokenizer,
        context=pair.target.context,
        vocab=pair.target.config.vocab_size,
    )
    return TokenSequence(
        pair.target,
        _drafter(pair, drafter),
        ids,
        sampling=Sampling(
            **{name: getattr(own, name) for name in OURS},
            suppress_tokens=own.suppress_tokens,
            seed=number,
        ),
        block_size=AUTO_BLOCK,
        max_tokens=TOKENS,
        stop_ids=frozenset(own.stop_ids),
    )


def _draft_seconds(sequence: TokenSequence, clock: Callable[[], float]) -> float:
    """Of all drafts of a round, behind a text as it stands."""
    groups = on_device.groups_of([sequence.sampler])
    choices = tuple([Choices.of([sequence.sampler], form) for _, form in groups])
    draft = on_device.RecordedRound([sequence.parts], [MOST_DRAFTS], groups).draft
    cache, took = sequence.parts.cache, []
    for _ in range(TURNS):
        start = clock()
        placed = cache.arena.place([cache])
        mx.eval(draft(on_device.Start(placed, (sequence.state,), choices)))
        took.append(clock() - start)
    return statistics.median(took[1:])  # the first one records
