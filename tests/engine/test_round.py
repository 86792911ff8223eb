"""A round's two halves, played as one or with the host in between; what the host reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import FLAVOURS, bits, greedy_text, tiny_pair

from pyengine.drafters import new_drafter
from pyengine.engine import loop
from pyengine.engine import round as on_device
from pyengine.engine.report import Report
from pyengine.engine.sequence import Round
from pyengine.sampling.sampler import Logprob
from pyengine.sampling.settings import Sampling

pytestmark = pytest.mark.engine


class Apart(on_device.RecordedRound):
    """Plays the halves one after the other; between them the host reads the block."""

    def __init__(
        self,
        each: Sequence[on_device.Parts],
        ks: Sequence[int],
        groups: Sequence[on_device.Group],
        blocks: list[list[int]],
    ) -> None:
        super().__init__(each, ks, groups)
        self.blocks = blocks
        self.together = self.halves

    def halves(self, start: on_device.Start) -> on_device.Played:
        block = self.draft(start)
        mx.eval(block)
        self.blocks.append(block.ids.tolist())
        return self.verify(start, block)


def played(flavour: str, drafter: str, sampling: Sampling) -> tuple[list[Round], list[Any]]:
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


@pytest.mark.parametrize("drafter", ["assistant", "lookup", "early:1"])
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
    flavour: str, drafter: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, stored = played(flavour, drafter, sampling)
    blocks: list[list[int]] = []
    monkeypatch.setattr(on_device, "RecordedRound", lambda *made: Apart(*made, blocks))
    got, stored_apart = played(flavour, drafter, sampling)
    assert got == want  # log-probabilities too: they are float32, compared as they are
    for a, b in zip(stored_apart, stored, strict=True):
        assert np.array_equal(a, b)
    # The host did read the blocks: their beginnings are what was committed
    assert len(blocks) == len(want) - 1
    for block, before, committed in zip(blocks, want, want[1:], strict=False):
        kept = block[1 : 1 + committed.num_accepted]
        kept = kept[: len(committed.tokens)]  # the room may end within them
        assert block[0] == before.tokens[-1] and kept == committed.tokens[: len(kept)]
        assert len(block) == 1 + committed.num_drafted


def test_what_is_packed_is_unpacked() -> None:
    """Drafts 7, 8, 9 of which two are kept, then 5, with two best tokens per row; and in the same
    round a plain step that gives 6."""
    values = np.array([[-0.5, -0.25, -4.0], [-1.5, -0.5, -2.0], [-2.5, -1.0, -8.0], [9, 9, 9]])
    floats = values.astype(np.float32).view(np.int32)
    ids = np.array([[7, 1], [8, 2], [3, 4], [0, 0]], np.int32)
    logprobs = mx.array(np.concatenate([floats[:, :1], ids, floats[:, 1:]], axis=1))
    drafts, q_flags = mx.array([7, 8, 9]), mx.array([0, 1, 0])
    want = Report(
        accepted=2,
        tokens=[7, 8, 5],
        finite=True,
        logprobs=[
            Logprob(7, -0.5, [(7, -0.25), (1, -4.0)]),
            Logprob(8, -1.5, [(8, -0.5), (2, -2.0)]),
            Logprob(5, -2.5, [(3, -1.0), (4, -8.0)]),
        ],
    )
    p_flags = mx.zeros(4, mx.int32)
    alone = Report.pack(mx.array([2]), mx.array([5]), p_flags, drafts, [q_flags], [logprobs])
    assert Report.unpack(alone.tolist(), [3], [2]) == [want]
    p_flags, plain = mx.zeros(5, mx.int32), Report(0, [6], True, None)
    both = Report.pack(mx.array([2, 0]), mx.array([5, 6]), p_flags, drafts, [q_flags], [logprobs])
    assert Report.unpack(both.tolist(), [3, 0], [2, None]) == [want, plain]
    none = mx.zeros(0, mx.int32)
    row = Report.pack(mx.array([0]), mx.array([6]), mx.array([0]), none, [], [])
    assert row.tolist() == [0, 6, 0]
    assert Report.unpack(row.tolist(), [0], [None]) == [plain]


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
def test_flags_of_every_row_count_for_their_own(
    target: list[int], drafter: list[int], finite: bool
) -> None:
    """Of the middle one of three sequences."""
    zeros, drafts = mx.zeros(3, mx.int32), mx.array([1, 4, 4, 1])
    p_flags, q_flags = mx.array([0, 0, *target, 0, 0]), mx.array([0, *drafter, 0])
    row = Report.pack(zeros, zeros, p_flags, drafts, [q_flags], [])
    found = Report.unpack(row.tolist(), [1, 2, 1], [None] * 3)
    assert [report.finite for report in found] == [True, finite, True]
