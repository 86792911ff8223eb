"""`pyengine bench card`: every figure of a card by hand, its picture, and what the command refuses.

The timed runs are those of scripted_runs.py, whose figures test_bench_numbers.py works out.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from scripted_runs import BLOCK, CASES, MAX_TOKENS, REPEATS, SEED, Clock, Stage
from typer.testing import CliRunner

from pyengine import cli
from pyengine.bench import bandwidth, gemma_mtp, kernels, picture
from pyengine.bench.bandwidth import Bandwidth
from pyengine.bench.card import heading, make_card, stem, typed
from pyengine.bench.kernels import Call, Shapes
from pyengine.sampling.settings import Sampling

ROOT = Path(__file__).parents[2]
PAIR: Any = object()
MACHINE = {
    "chip": "Chip 9 (fast)",
    "model": "Mac99,9",
    "device": "Device(gpu, 0)",
    "architecture": "arm65",
    "os": "system-7",
    "cores": 11,
    "memory_bytes": 24 << 30,
    "load_average": [0.25, 2.5, 3.5],
}
TIMED = [
    {"rows": 1, "place": "down", "op": "one", "shape": "2 x 3", "bytes": 600, "us": 2.0}
    | {"gb_s": 300.0, "mlx_us": 4.0, "mlx_gb_s": 150.0, "speedup": 2.0},
    {"rows": 6, "place": "down", "op": "one", "shape": "2 x 3", "bytes": 600, "us": 8.0}
    | {"gb_s": 75.0, "mlx_us": 4.0, "mlx_gb_s": 150.0, "speedup": 0.5},
]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The report of the scripted runs."""
    Stage(monkeypatch)
    rows, summary = gemma_mtp.gemma_mtp(
        PAIR,
        CASES,
        max_tokens=MAX_TOKENS,
        block_sizes=[BLOCK],
        sampling=Sampling(seed=SEED),
        repeats=REPEATS,
        rules=["block"],
    )
    return {
        "bench": "gemma-mtp",
        "started_at": "2031-02-03T04:05:06.789+00:00",
        "machine": MACHINE,
        "versions": {"pyengine": "1.2.3", "mlx": "4.5.6", "python": "7.8.9"},
        "commit": "0123456789abcdef",
        "pair": {
            "name": "A pair/of mine",
            "path": "/home/somebody/pair",
            "verified": True,
            "embedded": False,
            "dtype": "bfloat16",
            "position": "n-1",
            "quantization": {"target": {"bits": 6, "group_size": 64}, "assistant": None},
            "manifest": {"secret": 1},
        },
        "ops": [],
        "sampler": {"temperature": 1.0, "top_p": 0.95, "top_k": 64},
        "settings": {
            "command": ["--target", "/home/somebody/pair"],
            "max_tokens": MAX_TOKENS,
            "repeats": REPEATS,
            "draft_block_sizes": [BLOCK],
            "kernel_rounds": 5,
        },
        "complete": True,
        "prompts": [{"id": "one"}, {"id": "two"}],
        "summary": summary,
        "rows": rows,
    }


@pytest.fixture
def card(whole: dict[str, Any]) -> dict[str, Any]:
    limit = Bandwidth(400.0, True, "published by somebody")
    return make_card(whole, TIMED, Shapes("31B", 8, 64), limit, ["bench", "card"], False)


def test_every_field_of_a_card(card: dict[str, Any], whole: dict[str, Any]) -> None:
    plain, block = card.pop("decoding")
    assert card.pop("dflash") == []
    assert card == {
        "card": "pyengine",
        "card_version": 1,
        "command": "pyengine bench card",
        **{key: whole[key] for key in ("started_at", "machine", "versions", "commit", "sampler")},
        "prompts": whole["prompts"],
        "pair": {
            "name": "A pair/of mine",
            "verified": True,
            "embedded": False,
            "dtype": "bfloat16",
            "position": "n-1",
            "quantization": {"target": {"bits": 6, "group_size": 64}, "assistant": None},
        },
        "settings": {
            "max_tokens": MAX_TOKENS,
            "repeats": REPEATS,
            "draft_block_sizes": [BLOCK],
            "kernel_rounds": 5,
            "quick": False,
        },
        "bandwidth": {"gb_s": 400.0, "published": True, "source": "published by somebody"},
        "kernel_shapes": "31B, 8 bit",
        "kernels": [{**TIMED[0], "share": 0.75}, {**TIMED[1], "share": 0.1875}],
    }
    # Of repeats: 10 + 4 tokens in 2 + 1, 5 + 2 and 4 + 0.5 s; the medians 4 and 1 s are the row's
    assert plain == {
        "block_size": 1,
        "tok_s": pytest.approx(14 / 5),
        "speedup_vs_ar": 1.0,
        "acceptance_rate": None,
        "tokens_per_round": pytest.approx(1.4),
        "round_cost_in_plain_steps": pytest.approx(1.4),
        "tok_s_slowest_repeat": pytest.approx(14 / 7),
        "tok_s_fastest_repeat": pytest.approx(14 / 3),
        "drafted_by_depth": [],
        "accepted_by_depth": [],
        "acceptance_by_depth": [],
        "peak_memory_bytes": 3000,
    }
    # 12 + 8 tokens in 3 + 0.25 s, 16 + 8 in 1 + 0.5, 12 + 8 in 1.5 + 1
    assert block == {
        "block_size": 3,
        "tok_s": pytest.approx(10.0),
        "speedup_vs_ar": pytest.approx(25 / 7),
        "acceptance_rate": pytest.approx(11 / 15),
        "tokens_per_round": pytest.approx(2.0),
        "round_cost_in_plain_steps": pytest.approx(0.56),
        "tok_s_slowest_repeat": pytest.approx(20 / 3.25),
        "tok_s_fastest_repeat": pytest.approx(24 / 1.5),
        "drafted_by_depth": [15, 15],
        "accepted_by_depth": [13, 9],
        "acceptance_by_depth": [pytest.approx(13 / 15), pytest.approx(9 / 15)],
        "peak_memory_bytes": 70,
    }
    assert "somebody/pair" not in json.dumps([card, plain, block])


def test_depths_that_a_prompt_never_saw(whole: dict[str, Any]) -> None:
    """Of two drafts in the second prompt, none came to be the second; nobody made a third."""
    for row in whole["rows"]:
        if row["block_size"] == BLOCK and row["prompt_id"] == "two":
            row |= {"drafted_by_depth": [2], "accepted_by_depth": [1]}
        elif row["block_size"] == BLOCK:
            row |= {"drafted_by_depth": [5, 5, 0], "accepted_by_depth": [4, 3, 0]}
    whole["summary"] = gemma_mtp.summarise(whole["rows"])
    made = make_card(whole, [], Shapes("E2B", 16, 0), Bandwidth(1.0, False, "x"), [], True)
    block = made["decoding"][1]
    assert block["drafted_by_depth"] == [7, 5, 0] and block["accepted_by_depth"] == [5, 3, 0]
    assert block["acceptance_by_depth"] == [5 / 7, 3 / 5, None]
    assert made["kernel_shapes"] == "E2B, bfloat16" and made["settings"]["quick"]
    assert picture.draw({**made, "kernels": TIMED_WITH_SHARE})


TIMED_WITH_SHARE = [{**row, "share": 0.5} for row in TIMED]


def test_names_and_lines(card: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert stem(card) == "chip-9-fast-a-pair-of-mine-2031-02-03"
    assert heading(card) == [
        "pyengine on Chip 9 (fast)",
        "Mac99,9  ·  11 cores, 24 GiB memory  ·  system-7  ·  2031-02-03  ·  load average at the "
        "start 0.25",
        "A pair/of mine, 6 bit  ·  pyengine 1.2.3 at 0123456  ·  MLX 4.5.6 on the GPU  ·  "
        "Python 7.8.9",
    ]
    card["pair"]["quantization"]["target"] = card["commit"] = card["machine"]["model"] = None
    card["machine"]["device"] = "Device(cpu, 0)"
    said = heading(card)
    assert said[1].startswith("11 cores, ") and "on the processor" in said[2]
    assert said[2].startswith("A pair/of mine, bfloat16  ·  pyengine 1.2.3  ·")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    words = ["bench", "card", "--target", "/home/somebody/a pair"]
    assert typed(words) == "pyengine bench card --target '~/a pair'"


# ---- The picture


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_a_picture_is_the_same_whoever_draws_it(card: dict[str, Any]) -> None:
    import matplotlib

    drawn = picture.draw(card)
    assert size_of(drawn) == (1920, 1080)
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "black"}):
        assert picture.draw(card) == drawn
    other = {**card, "bandwidth": {**card["bandwidth"], "gb_s": 900.0}}
    assert picture.draw(other) != drawn


def test_long_names_stay_in_the_picture(card: dict[str, Any]) -> None:
    import io

    from matplotlib.image import imread  # decodes it, through pillow

    card["machine"]["chip"] = card["pair"]["name"] = "$x^2$ name " * 60
    card["command"] = "pyengine bench card --target $HOME " + "long/" * 300
    line = card["decoding"][1]
    card["decoding"] += [{**line, "block_size": n} for n in (4, 6, 8, 12, 16)]
    pixels = imread(io.BytesIO(picture.draw(card)))
    assert pixels.shape[:2] == (1080, 1920)
    edges = [pixels[:12], pixels[-12:], pixels[:, :12], pixels[:, -12:]]
    assert all((edge[..., :3] > 0.99).all() for edge in edges), "something is cut at an edge"
    assert (pixels[..., :3].min(axis=2) < 0.5).mean() > 0.01, "it is empty"


# ---- Bandwidth


@pytest.mark.parametrize(
    ("chip", "cores", "gb_s"),
    [
        ("Apple M1", None, 68),
        ("Apple M1 Max", 24, 400),
        ("Apple M3 Max", 30, 300),
        ("Apple M3 Max", 40, 400),
        ("Apple M4 Max", 32, 410),
        ("Apple M5 Max", 40, 614),
        ("Apple M5 Max", None, None),
        ("Apple M5 Max", 36, None),
        ("Apple M1 (Virtual)", 8, None),
        ("Apple M99", 40, None),
        ("AMD EPYC", None, None),
        ("M1", None, None),
    ],
)
def test_published_bandwidths(chip: str, cores: int | None, gb_s: int | None) -> None:
    assert bandwidth.of_chip(chip, cores) == gb_s


def test_a_known_chip_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"SPDisplaysDataType": [{"_name": "a screen"}, {"sppci_cores": "30"}]}
    monkeypatch.setattr(bandwidth, "ask", lambda *words: json.dumps(said))
    found = bandwidth.bandwidth("Apple M3 Max")
    assert found == (300.0, True, "published by Apple for Apple M3 Max with 30 GPU cores")
    monkeypatch.setattr(bandwidth, "measure", lambda: "measured")
    assert bandwidth.bandwidth("AMD EPYC") == "measured"
    for nothing in (None, "no json", "[]", "{}", '{"SPDisplaysDataType": [{}]}'):
        monkeypatch.setattr(bandwidth, "ask", lambda *words, said=nothing: said)
        assert bandwidth.gpu_cores() is None and bandwidth.bandwidth("Apple M3 Max") == "measured"


def test_the_best_pass_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gigabyte read in 0.5 to 0.125 s; copied, each byte moves twice."""
    monkeypatch.setattr(bandwidth, "MEASURED_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth._ext, "threads", lambda: 3)
    monkeypatch.setattr(bandwidth, "READS", 4)
    ends = [0.5, 0.125, 0.25, 2.0] * 2
    times = iter([t for end in ends for t in (100.0, 100.0 + end)])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    found = bandwidth.measure()
    assert found == ((1 << 20) / 0.125 / 1e9, False, "measured: read by 3 threads")
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    found = bandwidth.measure()
    assert found == (2 * (1 << 20) / 0.125 / 1e9, False, "measured: a copy by the GPU")


# ---- Kernels


def scripted_call(clock: Clock, ours: list[float], theirs: list[float], log: list[str]) -> Call:
    """Each call of a side takes the next of its seconds; each list's last goes on."""

    def side(name: str, seconds: list[float]) -> Any:
        def run(turn: int) -> mx.array:
            clock.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]
            log.append(f"{name}{turn}")
            return mx.array([1.0, 2.0])

        return run

    turns = [(i,) for i in range(3)]
    return Call("down", "an_op", "2 x 3", 10**6, turns, side("k", ours), side("m", theirs))


def test_both_sides_by_turns_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours: a call to check, one to learn that 1/32 s leaves two per turn, then turns of
    (2 + 4) / 2, (1 + 1) / 2 and (5 + 11) / 2 ms. MLX's: one to compile and check, one of 1 s, so
    that 2 s leave two turns of one call: 3 and 5 ms."""
    clock, log = Clock(), []
    monkeypatch.setattr("time.perf_counter", clock)
    ours = [9.0, 1 / 32, 0.002, 0.004, 0.001, 0.001, 0.005, 0.011]
    call = scripted_call(clock, ours, [1.5, 1.0, 0.003, 0.005, 7.0], log)
    row = kernels.compare(call, 3)
    approx = pytest.approx
    assert row == {
        "place": "down",
        "op": "an_op",
        "shape": "2 x 3",
        "bytes": 10**6,
        "us": approx(3000.0),
        "gb_s": approx(1 / 3),
        "mlx_us": approx(4000.0),
        "mlx_gb_s": approx(1 / 4),
        "speedup": approx(4 / 3),
    }
    assert log == ["m0", "k0", "k0", "m1", "m2", "k0", "k1", "m2", "k0", "k1", "k2", "k0"]


def test_a_baseline_that_takes_seconds_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(), []
    monkeypatch.setattr("time.perf_counter", clock)
    row = kernels.compare(scripted_call(clock, [0.5], [20.0], log), 2)
    assert (row["us"], row["mlx_us"], row["speedup"]) == (0.5e6, 20e6, 40.0)
    assert [name[0] for name in log] == ["m", "k", "k", "k", "k"]


@pytest.mark.parametrize("wrong", [0.0, -2.0, float("nan"), float("inf")])
def test_a_wrong_result_has_no_time(wrong: float) -> None:
    right, made = mx.array([1.0, 2.0]), mx.array([1.0, wrong])
    call = Call("down", "an_op", "2 x 3", 1, [()], lambda: [right, made], lambda: [right, right])
    with pytest.raises(RuntimeError, match=r"^\[card\] an_op must give what MLX gives but differ"):
        kernels.compare(call, 1)


def test_every_place_of_every_kind_of_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small where sizes are free; bytes of a matrix and of the cache by hand."""
    for name, value in {"VOCABULARY": 512, "CACHED": 64, "TURN_SECONDS": 0.0}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "MLX_SECONDS", 0.0)
    monkeypatch.setattr(kernels.arrays, "cold_copies", lambda nbytes: 1)
    small = (
        ((2, 128, 2, 2, 1, 16, 192, 0, 0, 0), None),
        ((2, 128, 2, 2, 1, 16, 192, 0, 0, 16), None),
    )
    monkeypatch.setitem(kernels.PUBLISHED, "E2B", small[0])
    monkeypatch.setitem(kernels.PUBLISHED, "26B-A4B", small[1])
    labels: list[tuple[int, int, str]] = []
    rows = kernels.time_kernels(
        Shapes("26B-A4B", 8, 64), [1, 6], 1, lambda *now: labels.append(now)
    )
    places = ["q, k, v", "attention, sliding", "attention, full", "attention out", "gate, up"]
    assert [row["place"] for row in rows] == [*places, "down", "LM head", "experts"] * 2
    assert [row["rows"] for row in rows] == [1] * 8 + [6] * 8
    assert labels[1] == (1, 16, "attention, sliding, 1 rows, 26B-A4B, 8 bit")
    assert labels[-1] == (16, 16, "done")
    of = {(row["place"], row["rows"]): row for row in rows}
    # A byte per weight and two bfloat16 per 64; six rows in and out
    down = of["down", 6]
    assert down["bytes"] == 128 * 192 + 128 * 192 // 64 * 4 + 6 * 192 * 2 + 6 * 128 * 2
    assert (down["op"], down["shape"]) == ("quantized_matmul", "128 x 192")
    # Keys and values of 15 + 6 places, two heads of 256; queries and results of two
    assert of["attention, sliding", 6]["bytes"] == 2 * 2 * 21 * 256 * 2 + 2 * 6 * 2 * 256 * 2
    assert of["attention, full", 1]["bytes"] == 2 * 64 * 512 * 2 + 2 * 2 * 512 * 2
    # Eight of sixteen experts, two matrices each; a row, its ids, and 8 x 704 results
    weights = 2 * 8 * (704 * 128 + 704 * 128 // 64 * 4)
    assert of["experts", 1]["bytes"] == weights + 128 * 2 + 8 * 4 + 8 * 704 * 2
    head = of["LM head", 6]["bytes"] - (512 * 128 + 512 * 128 // 64 * 4)
    assert head == 6 * 128 * 2 + 6 * 64 * 4  # rows in, probabilities out
    dense = kernels.time_kernels(Shapes("E2B", 16, 0), [2], 1)
    assert [row["place"] for row in dense] == [*places, "down", "LM head"]
    assert dense[5]["bytes"] == 2 * (128 * 192 + 2 * 192 + 2 * 128)
    assert {row["op"] for row in dense if row["place"] in ("q, k, v", "down")} == {"dense_matmul"}


# ---- The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without its minutes: kernels and bandwidth are given, prompts are short."""
    monkeypatch.setattr(kernels, "time_kernels", lambda shapes, rows, rounds, on_run: TIMED)
    monkeypatch.setattr(bandwidth, "bandwidth", lambda chip: Bandwidth(9.5, False, "measured: x"))
    monkeypatch.setattr("pyengine.cli.card.QUICK_TOKENS", 3)


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "card", *words])


def test_the_command_writes_both_files(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--quick", "--block-sizes", "2,3", "--json", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pyengine", "bench", "card", *words])
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    png, path = sorted(tmp_path.iterdir(), key=lambda p: p.suffix, reverse=True)
    assert (png.suffix, path.suffix) == (".png", ".json") and png.stem == path.stem
    card = json.loads(path.read_text())
    assert json.loads(done.stdout) == card and size_of(png.read_bytes()) == (1920, 1080)
    assert picture.draw(card) == png.read_bytes()
    assert card["command"] == typed(sys.argv[1:]) and card["settings"]["quick"]
    assert [line["block_size"] for line in card["decoding"]] == [1, 2, 3]
    assert [line["block_size"] for line in card["dflash"]] == [2, 3]
    for line, other in zip(card["dflash"], card["decoding"][1:], strict=True):
        assert line["tok_s"] > 0 and line["drafted_by_depth"] != [] and line != other
    assert card["pair"]["embedded"] and card["kernel_shapes"] == "E2B, 8 bit"
    assert card["settings"]["max_tokens"] == 3 and len(card["prompts"]) == 5
    assert f"Card: {path}" in done.stderr and f"Picture: {png}" in done.stderr


def test_without_a_picture(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "available", lambda: False)
    done = run("--quick", "--no-plot", "--block-sizes", "2", "--output", str(tmp_path))
    assert done.exit_code == 0 and [p.suffix for p in tmp_path.iterdir()] == [".json"]
    for word in ("all 5 prompts", "2 dflash", "shapes of E2B, 8 bit", "measured: x", "down"):
        assert word in " ".join(done.stdout.split())


def test_what_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(cli.common, "load_pair", load)
    file = tmp_path / "file"
    file.write_text("")
    for words, code, text in (
        (["--block-sizes", "x"], 2, "[bench] --block-sizes must be whole numbers like 2,4,6"),
        (["--block-sizes", "1"], 2, "[bench] block sizes must be 2 to 128 but got 1."),
        (["--block-sizes", "2,3,4,5,6,7,8"], 2, "[card] block sizes must be at most 6, to be"),
        (["--output", str(file)], 2, "[card] output must be a folder that exists but got"),
        (["--output", "no/where"], 2, "[card] output must be a folder that exists but got"),
        (["--output", "/proc"], 2, "[card] output must be writable but /proc is not."),
    ):
        done = run(*words)
        assert done.exit_code == code and done.stderr.startswith(f"pyengine: {text}"), done.stderr
    monkeypatch.setattr(picture, "available", lambda: False)
    done = run("--output", str(tmp_path))
    assert done.exit_code == 1 and done.stderr == (
        'pyengine: [card] the picture needs matplotlib: pip install "pyengine-mlx[plot]", or give '
        "--no-plot for the JSON alone.\n"
    )


@pytest.mark.parametrize("where", ["gemma_mtp.gemma_mtp", "picture.draw"])
def test_ctrl_c_leaves_nothing(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pyengine.bench.{where}", interrupt)
    done = run("--quick", "--block-sizes", "2", "--output", str(tmp_path))
    assert done.exit_code == 130 and done.stderr.endswith("Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_cards_that_are_kept() -> None:
    """Each with its picture and its command, and drawn from nothing but its JSON."""
    folder = ROOT / "bench" / "cards"
    cards = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert cards and {path.stem for path in folder.glob("*.png")} == set(cards)
    for name, card in cards.items():
        assert stem(card) == name and card["command"].startswith("pyengine bench card")
        assert card["card_version"] == 1 and not card["settings"]["quick"]
        assert size_of((folder / f"{name}.png").read_bytes()) == (1920, 1080)
        assert size_of(picture.draw(card)) == (1920, 1080)
