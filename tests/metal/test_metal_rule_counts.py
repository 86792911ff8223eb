"""bench kernels --count: bytes of the sampling rules, and the launches of a round."""

import json

import pytest

from pyengine.ops import dispatch
from pyengine.rule_counts import count_round, count_rules, markdown
from pyengine.sampling.settings import Sampling


@pytest.fixture(scope="module")
def rules():
    return list(count_rules(vocab=65536, rows=(1, 6)))


def test_logits_are_read_once_and_little_lies_between(rules):
    filters = [c for c in rules if c.op == "filter_logits"]
    assert [(c.M, c.N, c.launches) for c in filters] == [(1, 65536, 2), (6, 65536, 2)]
    for c in filters:
        assert c.logits_ratio <= 1.02
        lists = c.M * (65536 // 4096) * 64 * 8  # a list for every slice, written and read
        assert 2 * lists <= c.between_bytes <= 2.2 * lists
        assert c.threadgroup_bytes <= 12 * 1024


def test_the_fused_head_reads_weights_once_and_leaves_no_logits(rules):
    heads = [c for c in rules if c.op == "quantized_filter_logits"]
    assert [(c.M, c.N, c.launches) for c in heads] == [(1, 2048, 2), (6, 2048, 2)]
    for c in heads:
        lists = c.M * (2048 // 128) * 64 * 8  # of slices of 128 at so small a vocabulary
        assert 2 * lists <= c.between_bytes <= 2.1 * lists and c.logits_ratio is None
        # Weights and factors of 2048 rows; x again for every 128 of them
        assert c.ratio < 1 + (c.between_bytes + 20 * c.M * 1536 * 2) / (2048 * 1536)
        assert c.threadgroup_bytes <= 15 * 1024


def test_small_ops_move_what_they_must(rules):
    """One launch each; a table of 512 bytes is touched as a whole or not at all."""
    small = {c.op: c for c in rules if "filter_logits" not in c.op}
    assert set(small) == {"draw_token", "accept_block"}
    for c in small.values():
        assert c.launches == 1 and c.between_bytes == 0 and c.logits_ratio is None
        assert 0.5 < c.ratio < 1.3


def test_launches_of_a_round():
    """Five drafts: five filters and draws of the assistant, one filter of the target's rows."""
    rows = {row.op: row for row in count_round()}
    assert not {"filter_logits", "softcap"} & set(rows)
    assert (rows["quantized_filter_logits"].calls, rows["quantized_filter_logits"].launches) == (
        6,
        12,
    )
    assert (rows["draw_token"].calls, rows["draw_token"].launches) == (5, 5)
    assert (rows["accept_block"].calls, rows["accept_block"].launches) == (1, 1)
    for op, row in rows.items():
        assert (row.launches is None) == (op not in dispatch.OPS)
    assert rows["MLX"].calls > 0
    fewer = {row.op: row for row in count_round(drafts=2, sampling=Sampling(temperature=0.0))}
    assert fewer["quantized_filter_logits"].calls == 3 and "draw_token" not in fewer


def test_table_and_json(rules, count_command):
    rounds = count_round(drafts=1)
    text = markdown(rules, rounds)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == (
        4 + len(rules) + len(rounds)
    )
    shown, listed = count_command(rules=rules, round_=rounds)
    rows = json.loads(listed)
    assert text in shown and rows == [row.to_dict() for row in (*rules, *rounds)]
    assert [row["source"] for row in rows] == ["ours"] * len(rules) + ["round"] * len(rounds)
