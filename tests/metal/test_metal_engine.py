"""The engine on its Metal kernels: the same text as on the processor's."""

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import FIXTURES, tiny_pair

from pyengine import ops
from pyengine.checkpoint.pair import Pair
from pyengine.engine.stats import Stats
from pyengine.ops import dispatch, workbench
from pyengine.sampling.settings import Sampling


def text(pair: Pair, flavour: str, block_size: int) -> tuple[list[int], Stats]:
    prompt = mx.load(str(FIXTURES / flavour / "ref.safetensors"))["21.ids"].tolist()[-4:]
    stats = Stats()
    rounds = decode(
        pair.target,
        pair.assistant,
        prompt,
        sampling=Sampling(temperature=0.0),
        block_size=block_size,
        max_tokens=6,
        stats=stats,
    )
    return [token for r in rounds for token in r.tokens], stats


@pytest.mark.slow  # compiles every kernel for every number of rows that a round has
@pytest.mark.parametrize(
    "flavour, form, own",  # and ops that such a pair has to run
    [
        ("dense31", "bfloat16-q8", {"quantized_matmuls", "quantized_gated_matmul"}),
        ("moe26", "float32-q8", {"quantized_expert_matmul", "route_experts"}),
        ("uni12", "bfloat16", {"dense_matmul", "glu"}),
    ],
)
def test_speculative_text_in_the_workbench(flavour, form, own, monkeypatch):
    pair = tiny_pair(flavour, form)
    native = {block_size: text(pair, flavour, block_size)[0] for block_size in (1, 4)}
    assert native[1] == native[4]
    ran, called = set(), set()
    run = workbench.run

    def record(launches, *arrays):
        given = launches if isinstance(launches, list) else [launches]
        ran.update(launch.library for launch in given)
        return run(launches, *arrays)

    def calling(name, op):
        def call(*args, **options):
            called.add(name)
            return op(*args, **options)

        return call

    monkeypatch.setattr(workbench, "run", record)
    for name in dispatch.OPS:
        monkeypatch.setattr(ops, name, calling(name, getattr(ops, name)))
    ops.use("workbench")
    try:
        kernels = {row["op"]: row["kernel"] for row in ops.status()}
        for block_size in (1, 4):
            out, stats = text(pair, flavour, block_size)
            assert out == native[1], block_size
        assert stats.rounds > 0 and stats.drafted > 0
    finally:
        ops.use("native")
    assert kernels == dict.fromkeys(dispatch.OPS, "Metal (workbench)")
    # What filter_logits and the head launch last is a library of its own
    assert ran - {"merge_candidates"} == called >= own
