"""bench kernels --count: what attention reads, writes and leaves between its launches."""

import json

import pytest

from pyengine.attention_counts import GEOMETRIES, ROWS, Geometry, count_attention, markdown

SMALL = (Geometry("sliding", 2, 256, 200), Geometry("full", 8, 512, None))


@pytest.fixture(scope="module")
def counts():
    return list(count_attention(SMALL, (1, 6, 16), 300))


def test_visible_keys_and_values_are_loaded_once(counts):
    assert [(c.layer, c.M, c.rows, c.keys) for c in counts] == [
        *(("sliding", 1, 2, 200), ("sliding", 6, 12, 205), ("sliding", 16, 32, 215)),
        *(("full", 1, 8, 301), ("full", 6, 48, 306), ("full", 16, 128, 316)),
    ]
    for c in counts:
        assert c.launches == 3 and c.threadgroup_bytes <= 28 * 1024
        if c.rows <= 64:
            assert c.kv_load_ratio == 1, c
        else:  # two tiles of rows, of which the first does not see the newest keys
            assert 1.9 < c.kv_load_ratio < 2, c


def test_ratios_are_over_what_must_move(counts):
    c = next(c for c in counts if (c.layer, c.M) == ("full", 6))
    keys, rows, D = 306, 48, 512
    assert c.compulsory_bytes == 2 * keys * D * 2 + 2 * rows * D * 2
    assert c.ratio == (c.read_bytes + c.written_bytes) / c.compulsory_bytes
    # Scores of whole chunks written, and by four slices of columns read; states of one span, twice
    scores, states = rows * 4 * (320 + 4 * keys), 2 * rows * (D + 2) * 4
    between = c.between_ratio * 2 * keys * D * 2
    assert 0.95 * (scores + states) < between < 1.1 * (scores + states)
    # q goes to each of ten threadgroups of 32 keys
    assert c.q_load_ratio == 10 * rows * D * 2 / (2 * keys * D * 2)


def test_what_a_mac_user_is_told_covers_the_models():
    assert [(g.group, g.D, g.window) for g in GEOMETRIES] == [
        *((2, 256, 1024), (8, 512, None), (8, 256, 512), (16, 512, None))
    ]
    assert ROWS == (1, 6, 16)


def test_table_and_json(counts, count_command):
    table = markdown(counts)
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 2 + len(counts)
    text, rows = count_command(attention=counts)
    assert table in text and json.loads(rows) == [c.to_dict() for c in counts]
