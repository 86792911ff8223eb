"""README's tables are what bench/bounds.py computes; links lead somewhere, lines are short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from pyengine.bench import traffic
from pyengine.checkpoint.published import published

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _script(path: Path) -> ModuleType:
    """A file of the bench folder, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bounds = _script(ROOT / "bench" / "bounds.py")


def test_tables_are_computed() -> None:
    for table in (bounds.memory_table(), bounds.bounds_table()):
        assert "\n".join(table) in README
    prose = " ".join(README.split())
    plain, block = (bounds.round_bytes("31B", 8, 8192, size) / 1e9 for size in (1, 6))
    assert f"must read {plain:.1f} GB per plain step, {block:.1f} GB per round at block 6" in prose
    assert f"about {bounds.pair_bytes('31B', 8) / 1e9:.0f} GB, once" in prose


def test_the_table_of_prefill_is_computed() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert "\n".join(bounds.prefill_table()) in design


def test_the_table_of_ranks_is_computed() -> None:
    page = (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8")
    assert "\n".join(_script(ROOT / "bench" / "ranks.py").table(6)) in page


def test_the_tables_of_drafters_are_computed() -> None:
    sweep = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    for table in (bounds.drafters_table(), bounds.long_blocks_table()):
        assert "\n".join(table) in sweep
    page = (ROOT / "docs" / "drafters.md").read_text(encoding="utf-8")
    assert "\n".join(bounds.rounds_table()) in page
    # Of the mixture, two rows read the experts of both: 15.5 of 128 in each of 30 layers
    more = bounds.verify_bytes(1, "26B-A4B") - bounds.verify_bytes(0, "26B-A4B")
    assert more == pytest.approx(7.5 * 3 * 2816 * 704 * 30 * 8.5 / 8, rel=1e-3)
    # A verify call of 16 rows reads each weight once, one of 17 twice
    target, _ = published("31B")
    more = bounds.verify_bytes(16) - bounds.verify_bytes(15)
    assert traffic.target_bytes(target, 8) < more < 1.001 * traffic.target_bytes(target, 8)
    drafts = bounds.drafts_bytes("assistant", 5)
    assert bounds.verify_bytes(5) + drafts == bounds.round_bytes("31B", 8, 8192, 6)
    # 1.632 GB of the block model's own at 8 bit, of it 5 x 2 x 1024 x 5376 twice, a head of 262144
    # x 5376, and keys and values of 8192 positions in one layer and of 2047 in four
    own = bounds.drafts_bytes("dflash", 15)
    twice, kept = 5 * 2 * 1024 * 5376, 4096 * (8192 + 16 + 4 * (2047 + 16))
    weights = (1_535_967_488 + twice + 262_144 * 5376) * (1 + 4 / 64)
    assert own == pytest.approx(weights + kept, rel=1e-3)
    assert bounds.drafts_bytes("dflash", 16) is None and bounds.drafts_bytes("lookup", 9) == 0
    layer = traffic.target_bytes(target, 8) - traffic.head_bytes(target, 8)
    early = bounds.drafts_bytes("early:12", 1) - traffic.head_bytes(target, 8)
    assert early == pytest.approx(layer * 12 / 60, rel=0.06)  # and keys and values


def test_the_table_of_rounds_is_computed() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert "\n".join(bounds.round_table()) in design
    ratios = {row.split("|")[-2].strip() for row in bounds.round_table()[2:]}
    assert f"must cost {ratios.pop()} plain steps" in " ".join(README.split()) and not ratios


@pytest.mark.parametrize(
    ("kernel", "used"),
    [
        ("quantized_matmul", bounds.CLOCKS_PER_BYTE),
        ("quantized_expert_matmul", bounds.EXPERT_CLOCKS_PER_BYTE),
    ],
)
def test_clocks_are_those_that_were_counted(kernel: str, used: dict[int, dict[int, float]]) -> None:
    counted = {}
    for line in (ROOT / "docs" / "isa.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"| `{kernel}` |"):
            cells = [cell.strip() for cell in line.split("|")]
            counted[int(cells[2]), int(cells[3])] = float(cells[8])
    for bits, clocks in used.items():
        assert clocks == {rows: counted[bits, rows] for rows in clocks}


def test_the_table_of_all_pairs_is_computed() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for bits in (8, 4):
        rows = bounds.pairs_table(bits)
        assert "\n".join(rows) in page
        assert len(rows) == 2 + 6 * len(bounds.PAIR_CHIPS)
    # At 8k, what README says of the 31B
    chip = "| 31B | M1 Max | "
    [row] = [row for row in bounds.pairs_table() if row.startswith(chip)]
    assert [cell.strip() for cell in row.split("|")][-4:-1] == ["12", "32", "54"]


def test_what_rounds_of_the_others_read_by_hand() -> None:
    """Of E2B neither the second table, of which rows are read, nor tokens of far centroids; of the
    mixture the experts that are chosen."""
    target, assistant = bounds.published("E2B")
    shapes = bounds.target_layout(target).matrices
    table = bounds.prod(shapes["embed_tokens_per_layer"])
    read = (sum(map(bounds.prod, shapes.values())) - table) * 8.5 / 8
    assert bounds.traffic.target_bytes(target, 8) == pytest.approx(read)
    shapes = bounds.assistant_layout(assistant).matrices
    far = (2048 - 32) * 128 * 256  # of 2048 centroids 32 are looked at, of 128 tokens each
    read = (sum(map(bounds.prod, shapes.values())) - far) * 8.5 / 8
    assert bounds.traffic.assistant_bytes(assistant, 8) == pytest.approx(read)
    mixture, _ = bounds.published("26B-A4B")
    expert = 3 * 2816 * 704 * 30 * 8.5 / 8  # gate, up and down of 30 layers
    more = bounds.traffic.target_bytes(mixture, 8, 20.0) - bounds.traffic.target_bytes(mixture, 8)
    assert more == pytest.approx(12 * expert)
    assert bounds.traffic.expert_bytes(mixture, 8) == pytest.approx(8 * expert)
    assert bounds.traffic.distinct_experts(mixture, 1) == pytest.approx(8)
    two = 16 - 8 * 8 / 128  # of the second row's eight, 8 / 128 were the first one's each
    assert bounds.traffic.distinct_experts(mixture, 2) == pytest.approx(two)
    assert bounds.traffic.distinct_experts(target, 6) == 0
    # Routers have 8 bits in a bundle of 4
    [router] = {s for p, s in bounds.target_layout(mixture).matrices.items() if "router" in p}
    assert bounds.traffic.matrix_bytes("layers.0.router.proj", router, 4) == 128 * 2816 * 8.5 / 8
    # A text shorter than the window has its own keys alone
    one = bounds.traffic.kept_bytes(target, 100, 6)
    assert one == 2 * 2 * 256 * 12 * 106 + 2 * 2 * 512 * 3 * 100


def test_a_mixtures_round_by_hand() -> None:
    """With a memory that costs nothing: experts have clocks of their own, by their rows."""
    chip = bounds.Chip(10**9, 1, 1.0)
    expert = 3 * 2816 * 704 * 30

    def seconds(experts: float | None) -> float:
        return bounds.round_seconds("26B-A4B", chip, 8192, 6, 8, experts)

    same, apart = seconds(None), seconds(48.0)
    assert apart - same == pytest.approx(expert * (48 * 5.56 - 8 * 13.83) / 128e9)
    slow = bounds.Chip(1, 1, 10**6)
    moved = bounds.round_bytes("26B-A4B", 4, 8192, 6, 20.0)
    assert bounds.round_seconds("26B-A4B", slow, 8192, 6, 4, 20.0) == pytest.approx(moved / 1e9)


def test_a_round_by_hand() -> None:
    """With a memory that costs nothing, only instructions and multiplications count, and with slow
    memory only bytes: the same as without arithmetic."""
    target, assistant = bounds.published("31B")
    layouts = bounds.target_layout(target), bounds.assistant_layout(assistant)
    numbers = [sum(map(bounds.prod, layout.matrices.values())) for layout in layouts]
    chip = bounds.Chip(10**9, 1, 1.0)
    seen = [50 * 256 * 1024 + 10 * 512 * 8192, 3 * 256 * 1024 + 512 * 8192]
    work = [4 * heads * s for heads, s in zip((32, assistant.num_heads), seen, strict=True)]
    want = numbers[0] * 11.94 / 128e9 + 6 * work[0] / 256e9
    want += 5 * (numbers[1] * 5.43 / 128e9 + work[1] / 256e9)
    assert bounds.round_seconds("31B", chip, 8192, 6) == pytest.approx(want)
    slow = bounds.Chip(1, 1, 10**6)
    moved = bounds.round_bytes("31B", 8, 8192, 6)
    assert bounds.round_seconds("31B", slow, 8192, 6) == pytest.approx(moved / 1e9)


def test_a_call_of_a_prefill_by_hand() -> None:
    """A chip with one core at 1 GHz: 256e9 operations per second. All layers' matrices of the 31B
    have 5376 rows or columns; a third chunk sees 1535 keys in 50 layers and 1536 in 10."""
    columns = 50 * (2 * 8192 + 2 * 4096) + 10 * (2 * 16384 + 2048) + 60 * 3 * 21504
    seen = 50 * 256 * 1535 + 10 * 512 * 1536
    attention = 4 * 32 * 512 * seen
    call = bounds.Call(1024, 512, "mlx")
    chip = bounds.Chip(10**6, 1, 1.0)
    want = (2 * 5376 * columns * 512 + attention) / 256e9
    assert bounds.call_seconds("31B", chip, call) == pytest.approx(want)
    # On tensor units that much faster; with a slow memory, its bytes once
    quick = bounds.Chip(10**6, 1, 1.0, tensor=4)
    assert bounds.call_seconds("31B", quick, call) == pytest.approx(want / 4)
    slow = bounds.call_seconds("31B", bounds.Chip(1, 1, 1000.0), call)
    assert slow == pytest.approx(5376 * columns * 8.5 / 8 / 1e9 + attention / 256e12)
    # Ours: 32 slices of 16 rows, a weight byte of each takes a lane 25.2 clocks
    own = bounds.call_seconds("31B", chip, call._replace(kernel="own"))
    assert own == pytest.approx(32 * 5376 * columns * 25.2 / 128e9 + attention / 256e9)
    whole = bounds.prefill_seconds("31B", chip, 0, 1100)
    parts = [bounds.prefill_seconds("31B", chip, a, b) for a, b in ((0, 512), (512, 1100))]
    assert whole == pytest.approx(sum(parts))


def test_bytes_of_the_31b_by_hand() -> None:
    """Parameters as published models count them, 8.5 bits each, and keys and values per token."""
    target, assistant = bounds.published("31B")
    both = (bounds.target_layout(target), bounds.assistant_layout(assistant))
    counts = [sum(map(bounds.prod, layout.matrices.values())) for layout in both]
    # Per column of width 5376: 50 sliding layers' q, k, v, o; 10 full ones' q, k, o; all gate, up,
    # down; and the table, which is the head too
    columns = 50 * (2 * 8192 + 2 * 4096) + 10 * (2 * 16384 + 2048) + 60 * 3 * 21504 + 262144
    assert counts[0] == 5376 * columns
    assert round(counts[1] / 1e6, 1) == 469.5
    assert bounds.pair_bytes("31B", 8) == pytest.approx(sum(counts) * 8.5 / 8, rel=1e-4)
    assert bounds.pair_bytes("31B", 16) == pytest.approx(sum(counts) * 2, rel=1e-4)
    # By pages of 64 places: 50 sliding layers keep 18, of 2 x 16 x 256 numbers a place, 10 full
    # ones all 8192 places and the block's five others
    page, full_page = 64 * 2 * 16 * 256 * 2, 64 * 2 * 4 * 512 * 2
    assert bounds.cache_bytes(target, 8192, 6, 2) == 50 * 18 * page + 10 * 129 * full_page
    # A round reads 1023 + 6 places of the ones, all 8192 of the others
    sliding, full = 1029 * 2 * 16 * 256 * 2, 8192 * 2 * 4 * 512 * 2
    weights = [bounds.traffic.layout_bytes(layout, 8) for layout in both]
    # The assistant has three sliding layers and a full one, which read the target's cache
    draft = weights[1] + 3 * sliding + full
    assert bounds.round_bytes("31B", 8, 8192, 6) == pytest.approx(
        weights[0] + 50 * sliding + 10 * full + 5 * draft
    )
    # 100 GB/s and 50 GB per round: two rounds, each with 1 + 0.8 * 5 tokens
    assert bounds.bound(100, 50e9, 6, 0.8) == pytest.approx(10)


def test_a_mixtures_prefill_has_no_bound() -> None:
    call, chip = bounds.Call(0, 512, "mlx"), bounds.PREFILL_CHIPS["M1 Max"]
    with pytest.raises(ValueError, match=r"\[bounds\] name must be a dense pair but got 26B-A4B"):
        bounds.call_seconds("26B-A4B", chip, call)


def test_geometries_are_the_published_ones() -> None:
    """What parameters the published models are said to have, text alone, in billions."""
    written = {"31B": 30.70, "26B-A4B": 25.23, "12B": 11.91, "E4B": 7.46, "E2B": 4.63}
    for name, billions in written.items():
        layout = bounds.target_layout(bounds.published(name)[0])
        shapes = [*layout.matrices.values(), *layout.vectors.values()]
        assert sum(map(bounds.prod, shapes)) / 1e9 == pytest.approx(billions, abs=0.006), name


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/design.md",
    "docs/ops.md",
    "docs/isa.md",
    "docs/serve.md",
    "docs/speed.md",
    "docs/sweep.md",
    "docs/tools.md",
)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_and_lines_are_short(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    here = (ROOT / name).parent
    places = [(here / link).resolve() for link in links]
    assert not [place for place in places if not place.exists()]
    prose = [line for line in text.splitlines() if not line.startswith(("    ", "|", "!["))]
    assert max(map(len, prose)) <= 110
