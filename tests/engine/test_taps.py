"""What leaves inner layers, as a drafter gets it: every row once, bit for bit; no text changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest
from assistants import Scripted, wrong_places
from models import decode as plain_decode
from tiny_pairs import FLAVOURS, greedy_text, tiny_pair

from pyengine import ops
from pyengine.drafters.assistant import AssistantDrafter
from pyengine.engine.loop import decode
from pyengine.engine.prefix import Prefix
from pyengine.model.target import Processed, Target
from pyengine.ops import dispatch
from pyengine.sampling.settings import Sampling

if TYPE_CHECKING:
    from typing import Self

pytestmark = pytest.mark.engine

GREEDY = Sampling(temperature=0.0)
TAPS = (1, 0)  # in the drafter's order, not the layers'


def left_by(target: Target, tap: int, ids: Sequence[int]) -> np.ndarray:
    """What layer ``tap`` leaves, normed, of a target that ends there: [T, E]."""
    short = copy.copy(target)
    short.layers = target.layers[: tap + 1]
    vars(short)["_per_layer_inputs"] = target._per_layer_inputs  # cut into all layers' slices
    cache = short.new_cache()
    _, normed = short.forward([mx.array(ids, dtype=mx.int32)], [cache])
    return np.array(normed)


def normed(target: Target, rows: mx.array) -> np.ndarray:
    return np.array(ops.rms_norm(rows, target.norm, target.config.eps))


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Bit for bit where ops are row-stable, which the reference is not."""
    if dispatch.chosen() == "reference":
        return np.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    return np.array_equal(found, wanted)


class Tapping(AssistantDrafter):
    """The assistant's drafts; beside them it carries the newest row of its taps."""

    taps = TAPS

    def __init__(self, target: Any, assistant: Any) -> None:
        super().__init__(target, assistant)
        self.width = target.config.hidden_size
        self.prompt: list[mx.array] = []

    @property
    def arrays(self) -> list[mx.array]:
        return [*super().arrays, self.row]

    def take_results(self, arrays: list[mx.array]) -> None:
        super().take_results(arrays[:1])
        self.row = arrays[1]

    @classmethod
    def read(cls, readers: Sequence[Self], rows: Sequence[Processed]) -> None:
        for reader, own in zip(readers, rows, strict=True):
            assert own.hidden.shape[1] == (1 + len(TAPS)) * reader.width
            alone = own._replace(hidden=own.hidden[:, : reader.width])
            super().read([reader], [alone])
            tapped = own.hidden[:, reader.width :]
            reader.prompt.append(tapped)
            reader.row = mx.take(tapped, own.accepted[None], axis=0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_taps_are_what_left_the_layer(flavour: str) -> None:
    """Of a prefill in chunks and of a block; what is not tapped stays as it is."""
    target, text = tiny_pair(flavour).target, greedy_text(flavour)
    E, drafter = target.config.hidden_size, Tapping(target, None)
    cache = target.new_cache()
    target.prefill(text[:19], cache, chunk=8, reader=drafter)
    assert [rows.shape[0] for rows in drafter.prompt] == [8, 8, 3]
    block = mx.array(text[19:23], dtype=mx.int32)
    _, with_taps = target.forward([block], [cache], TAPS)
    _, without = target.forward([block], [cache])
    assert same(np.array(with_taps[:, :E]), np.array(without))
    rows = mx.concatenate([*drafter.prompt, with_taps[:, E:]])
    for place, tap in enumerate(TAPS):
        found = normed(target, rows[:, place * E : (place + 1) * E])
        assert same(found, left_by(target, tap, text[:23])), tap


@pytest.mark.parametrize("flavour", ["dense31", "e2b"])
def test_a_drafter_with_taps_reads_each_committed_row(flavour: str) -> None:
    """After each round it carries the row of the newest processed token, and the text is plain
    decoding's. A prefix gives it nothing, and keeps what it has."""
    pair, prompt = tiny_pair(flavour), greedy_text(flavour)[:20]
    target, prefix = pair.target, Prefix()
    E = target.config.hidden_size
    settings: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 24}
    plain = plain_decode(target, None, prompt, block_size=1, **settings)
    wanted = prompt + [token for done in plain for token in done.tokens]
    rows = {tap: left_by(target, tap, wanted) for tap in TAPS}
    vocab, wrong = target.config.vocab_size, wrong_places(len(prompt), len(wanted))
    # One without taps leaves a prefix that a block of this size could use
    script, other = (Scripted(wanted, wrong, vocab, 3) for _ in range(2))
    list(plain_decode(target, other, prompt, block_size=4, prefix=prefix, **settings))
    kept, text, drafter = prefix.tokens, list(prompt), Tapping(target, script)
    accepted = set()
    for done in decode(target, drafter, prompt, block_size=4, prefix=prefix, **settings):
        text += done.tokens
        accepted |= {done.num_accepted} if done.num_drafted else set()
        if done.finish_reason is None:  # the last round's tokens are cut where the room ends
            for place, tap in enumerate(TAPS):
                found = normed(target, drafter.row[:, place * E : (place + 1) * E])
                assert same(found[0], rows[tap][len(text) - 2]), (len(text), tap)
    assert text == wanted and prefix.tokens == kept and accepted >= {0, 1, 3}
    assert [a.shape[0] for a in drafter.prompt[:1]] == [len(prompt)]
