"""A round's two halves, played as one or with the host in between; what the host reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import FLAVOURS, bits, greedy_text, tiny_pair

from pyengine.drafters import NAMES, Name, new_drafter
from pyengine.engine import loop
from pyengine.engine import round as on_device
from pyengine.engine.report import Report
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Logprob
from pyengine.sampling.settings import Sampling

pytestmark = pytest.mark.engine


class Apart(on_device.RecordedRound):
    """Plays the halves one after the other; between them the host reads the block."""

    def __init__(
        self, each: Sequence[on_device.Parts], ks: Sequence[int], blocks: list[list[int]]
    ) -> None:
        super().__init__(each, ks)
        self.blocks = blocks
        self.together = self.halves

    def halves(self, states: on_device.States) -> on_device.Played:
        blocks = self.draft(states)
        mx.eval(blocks)
        self.blocks += [block.ids.tolist() for block in blocks]
        return self.verify(states, blocks)


def played(flavour: str, drafter: Name, sampling: Sampling) -> tuple[list[loop.Round], list[Any]]:
    """The rounds of a text, and the bits of what its cache holds in the end."""
    pair, caches = tiny_pair(flavour, "bfloat16-q8"), []
    target = pair.target

    class Watched:
        """The target; tells which cache it made."""

        def __getattr__(self, name: str) -> Any:
            return getattr(target, name)

        def new_cache(self) -> Any:
            caches.append(target.new_cache())
            return caches[-1]

    watched: Any = Watched()
    text = greedy_text(flavour)
    rounds = loop.decode(
        watched,
        new_drafter(drafter, target, pair.assistant),
        [*text[:12], *text[:5]],
        sampling=sampling,
        block_size=4,
        max_tokens=16,
    )
    return list(rounds), [bits(a) for a in caches[0].arena.arrays]


@pytest.mark.parametrize("drafter", NAMES)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0, logprobs=2),
        Sampling(seed=3, verify="block", repetition_penalty=1.3, presence_penalty=0.5, logprobs=1),
        Sampling(seed=4, verify="coupled", top_k=0, logprobs=0, suppress_tokens=(3,)),
    ],
    ids=["greedy", "penalties", "dense"],
)
def test_halves_with_the_host_in_between_give_the_same_tokens_and_bits(
    flavour: str, drafter: Name, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, stored = played(flavour, drafter, sampling)
    blocks: list[list[int]] = []
    monkeypatch.setattr(on_device, "RecordedRound", lambda each, ks: Apart(each, ks, blocks))
    got, stored_apart = played(flavour, drafter, sampling)
    assert got == want  # log-probabilities too: they are float32, compared as they are
    for a, b in zip(stored_apart, stored, strict=True):
        assert np.array_equal(a, b)
    # The host did read the blocks: their beginnings are what was committed
    assert len(blocks) == len(want) - 1
    for block, before, committed in zip(blocks, want, want[1:], strict=False):
        kept = block[1 : 1 + committed.num_accepted]
        assert block[0] == before.tokens[-1] and kept == committed.tokens[: len(kept)]
        assert len(block) == 1 + committed.num_drafted


def filtered(flags: list[int]) -> Filtered:
    return Filtered(mx.zeros((len(flags), 1)), mx.ones((len(flags), 1)), mx.array(flags))


def test_what_is_packed_is_unpacked() -> None:
    """Drafts 7, 8, 9 of which two are kept; then 5, with two best tokens per row."""
    values = np.array([[-0.5, -0.25, -4.0], [-1.5, -0.5, -2.0], [-2.5, -1.0, -8.0], [9, 9, 9]])
    floats = values.astype(np.float32).view(np.int32)
    ids = np.array([[7, 1], [8, 2], [3, 4], [0, 0]], np.int32)
    logprobs = mx.array(np.concatenate([floats[:, :1], ids, floats[:, 1:]], axis=1))
    drafts, q = mx.array([7, 8, 9]), filtered([0, 1, 0])
    row = Report.pack(mx.array(2), mx.array([5]), filtered([0] * 4), drafts, q, logprobs)
    report = Report.unpack(row.tolist(), 3, 2)
    assert report == Report(
        accepted=2,
        tokens=[7, 8, 5],
        finite=True,
        logprobs=[
            Logprob(7, -0.5, [(7, -0.25), (1, -4.0)]),
            Logprob(8, -1.5, [(8, -0.5), (2, -2.0)]),
            Logprob(5, -2.5, [(3, -1.0), (4, -8.0)]),
        ],
    )
    plain = Report.pack(
        mx.array(0), mx.array([6]), filtered([0]), mx.zeros(0, mx.int32), None, None
    )
    assert plain.tolist() == [0, 6, 0]
    assert Report.unpack(plain.tolist(), 0, None) == Report(0, [6], True, None)


@pytest.mark.parametrize(
    ("target", "drafter", "finite"),
    [
        ([0, 0, 0], [0, 0], True),
        ([0, 0, 0], [1, 1], True),  # a drafter may leave tokens out
        ([0, 0, 1], [0, 0], False),  # a target may not
        ([2, 0, 0], [0, 0], False),
        ([0, 0, 0], [0, 2], False),
        ([0, 0, 0], [3, 0], False),
    ],
)
def test_flags_of_every_row_count(target: list[int], drafter: list[int], finite: bool) -> None:
    row = Report.pack(
        mx.array(0), mx.array([6]), filtered(target), mx.array([4, 4]), filtered(drafter), None
    )
    assert Report.unpack(row.tolist(), 2, None).finite is finite
