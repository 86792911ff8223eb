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

# What every greedy text runs beside its matmuls: embeddings, norms, heads and attention, and the
# rules; the first token has all logits
LAYERS = {
    *("block_attention", "embed", "norm_rope", "prepare_qkv"),
    *("residual_norm", "rms_norm", "write_cache"),
}
RULES = {"softcap", "filter_logits", "merge_candidates", "accept_block"}
# What a quantised pair without experts runs
Q8 = {"quantized_matmul", "quantized_matmuls", "quantized_gated_matmul", "quantized_filter_logits"}


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
    "flavour, form, expected",
    [
        ("dense31", "bfloat16-q8", Q8),
        ("moe26", "float32-q8", {*Q8, "quantized_expert_matmul", "route_experts", "weigh_experts"}),
        ("uni12", "bfloat16", {"dense_matmul", "geglu"}),
    ],
)
def test_speculative_text_in_the_workbench(flavour, form, expected, monkeypatch):
    pair = tiny_pair(flavour, form)
    native = {block_size: text(pair, flavour, block_size)[0] for block_size in (1, 4)}
    assert native[1] == native[4]
    ran = set()
    run = workbench.run

    def record(launches, *arrays):
        given = launches if isinstance(launches, list) else [launches]
        ran.update(launch.library for launch in given)
        return run(launches, *arrays)

    monkeypatch.setattr(workbench, "run", record)
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
    assert ran == expected | LAYERS | RULES
