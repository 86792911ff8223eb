"""The sampling rules on their Metal kernels, in whole rounds: the very text of the processor's."""

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import FIXTURES, tiny_pair

from pyengine import _ext, ops
from pyengine.ops import workbench
from pyengine.ops.accept_block import RULES
from pyengine.sampling.settings import Sampling

KERNELS = ("accept_block", "draw_token", "filter_logits")


def text(sampling: Sampling, block_size: int) -> list[int]:
    pair = tiny_pair("dense31", "bfloat16")
    prompt = mx.load(str(FIXTURES / "dense31" / "ref.safetensors"))["21.ids"].tolist()[-4:]
    rounds = decode(
        pair.target,
        pair.assistant,
        prompt,
        sampling=sampling,
        block_size=block_size,
        max_tokens=12,
    )
    return [token for r in rounds for token in r.tokens]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.2, "suppress_tokens": (3, 9)}])
def test_sampled_text_is_the_processors(rule, penalties, monkeypatch):
    """The matmuls stay the processor's, so every bit before the rules is the same."""
    launches_of = _ext.launches_of

    def of_rules(result):
        launches, inputs = launches_of(result)
        return launches if launches and launches[0].library in KERNELS else None, inputs

    monkeypatch.setattr(_ext, "launches_of", of_rules)
    ran = set()
    run = workbench.run

    def record(launches, *arrays):
        ran.update(launch.library for launch in launches)
        return run(launches, *arrays)

    monkeypatch.setattr(workbench, "run", record)
    for block_size in (1, 5):
        sampling = Sampling(temperature=1.3, seed=block_size, verify=rule, **penalties)
        native = text(sampling, block_size)
        ops.use("workbench")
        try:
            assert text(sampling, block_size) == native
        finally:
            ops.use("native")
    assert ran == {*KERNELS, "merge_candidates"}
