"""`bench model`: generated weights as in a bundle, cuts, rounds in parts, figures, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from pyengine import cli
from pyengine.bench import bandwidth, generated, model, traffic
from pyengine.checkpoint import memory, published
from pyengine.checkpoint.published import check_dflash
from pyengine.checkpoint.weights import assistant_layout, dflash_layout, target_layout
from pyengine.engine.loop import decode
from pyengine.engine.rounds import Rounds
from pyengine.ops import dispatch
from pyengine.sampling.settings import Sampling

# The published pairs' layers and heads in narrow matrices, so that a test makes one in no time
NARROW = {
    "E2B": ((35, 128, 8, 1, 1, 512, 256, 64, 20, 0), (64, 4, 128, 64)),
    "26B-A4B": ((30, 128, 16, 8, 2, 1024, 64, 0, 0, 16), (64, 16, 128, 0)),
    "31B": ((60, 128, 32, 16, 4, 1024, 256, 0, 0, 0), (64, 32, 128, 0)),
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sizes in NARROW.items():
        monkeypatch.setitem(published.PUBLISHED, name, sizes)
    monkeypatch.setitem(published.DFLASH, "31B", (8, 256, (1, 12, 23, 35, 46, 57)))
    monkeypatch.setattr(published, "VOCABULARY", 2048)
    monkeypatch.setattr(published, "EXPERT_WIDTH", 64)
    monkeypatch.setattr(
        bandwidth, "measure", lambda: bandwidth.Bandwidth(20.0, False, "measured: by nobody")
    )


@pytest.mark.parametrize("bits", generated.BITS)
def test_a_generated_matrix_is_packed_as_a_bundles(bits: int) -> None:
    words = mx.arange(1009, dtype=mx.uint32) * 4256249  # every bit of a word comes up
    made = generated.matrix(words, (3, 50, 128), bits, 2)
    assert made.packing == (64, bits)
    assert made.weight.shape == (3, 50, 4 * bits) and made.weight.dtype == mx.uint32
    assert made.scales is not None and made.scales.shape == (3, 50, 2)
    values = made.values().reshape(-1, 128)
    limit = (3 / 128) ** 0.5
    assert 0.93 * limit < mx.abs(values).max().item() < 1.02 * limit  # scales are bfloat16
    assert abs(values.mean().item()) < 0.05 * limit
    # A row of it times a normal vector is normal
    assert 0.9 < (values.square().mean() * 128).item() < 1.1
    assert len({tuple(row) for row in made.weight.reshape(150, -1).tolist()}) == 150
    again, other = (generated.matrix(words, (3, 50, 128), bits, number) for number in (2, 3))
    assert mx.array_equal(made.weight, again.weight)
    assert not mx.array_equal(made.weight, other.weight)


@pytest.mark.parametrize("shape", generated.SHAPES)
def test_cuts_keep_the_kinds_of_layers(shape: str) -> None:
    whole = generated.plan(shape).whole
    step = generated.period(whole)
    assert generated.cut(whole, len(whole.layers)) == whole
    for count in range(step, len(whole.layers), step):
        layers = generated.cut(whole, count).layers
        assert len(layers) == count
        assert [n.sliding for n in layers] == [n.sliding for n in whole.layers[:count]]
        for i, layer in enumerate(layers):
            source = layers[layer.kv_source]
            assert layer.kv_source <= i and source.kv_source == layer.kv_source
            assert (source.sliding, source.head_dim) == (layer.sliding, layer.head_dim)
        own = sum(layer.kv_source == i for i, layer in enumerate(layers))
        of_whole = sum(layer.kv_source == i for i, layer in enumerate(whole.layers))
        assert abs(own - count * of_whole / len(whole.layers)) < step
        assert {n.ffn_width for n in layers} <= {n.ffn_width for n in whole.layers}


def test_cuts_of_e2b_by_hand() -> None:
    """Three of seven periods have keys of their own; the four others are twice as wide."""
    layers = generated.plan("e2b", 10).target.layers
    assert [n.kv_source for n in layers] == [0, 1, 2, 3, 4, 3, 3, 3, 3, 4]
    assert [n.ffn_width for n in layers] == [6144] * 5 + [12288] * 5


@pytest.mark.parametrize(
    ("shape", "layers", "message"),
    [
        ("31b", 7, r"\[bench\] --layers must be a multiple of 6 up to 60 but got 7\."),
        ("31b", 66, r"\[bench\] --layers must be a multiple of 6 up to 60 but got 66\."),
        ("e2b", 0, r"\[bench\] --layers must be a multiple of 5 up to 35 but got 0\."),
        ("e2b", -5, r"\[bench\] --layers must be a multiple of 5 up to 35 but got -5\."),
        ("9b", None, r"\[bench\] --shape must be of e2b, e4b, 12b, 26b, 31b but got '9b'\."),
    ],
)
def test_what_has_no_such_shape_is_refused(shape: str, layers: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generated.plan(shape, layers)


@pytest.mark.parametrize(
    ("shape", "layers", "drafters", "message"),
    [
        ("e4b", None, "dflash", r"--shape must be of 12b, 26b, 31b for dflash but got 'e4b'\."),
        ("31b", 6, "early:6", r"--drafter must leave a layer of the target's 6 out but got early"),
    ],
)
def test_a_drafter_that_a_shape_has_not_is_refused(
    shape: str, layers: int | None, drafters: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generated.plan(shape, layers, 8, (drafters,))


def test_a_cut_target_is_tapped_where_it_has_layers() -> None:
    whole = generated.plan("31b", None, 8, ("dflash",)).dflash
    assert whole is not None and whole.taps == (1, 12, 23, 35, 46, 57)
    for count, taps in ((6, (0, 1, 2, 3, 4, 5)), (12, (0, 2, 4, 6, 8, 10))):
        plan = generated.plan("31b", count, 8, ("assistant", "dflash"))
        assert plan.dflash is not None and plan.dflash.taps == taps
        check_dflash(plan.target, plan.dflash)
    assert generated.plan("31b", 6).dflash is None


def test_the_12bs_dflash_has_the_size_of_its_file() -> None:
    """Its config was not seen; 727,496,960 numbers and a header are the file."""
    layout = dflash_layout(published.published_dflash("12B"))
    shapes = [*layout.matrices.values(), *layout.vectors.values()]
    assert len(shapes) == 58 and sum(map(prod, shapes)) == 727_496_960


@pytest.mark.parametrize(
    ("shape", "layers", "bits", "drafters"),
    [("e2b", 35, 8, "assistant"), ("26b", 6, 4, "lookup"), ("31b", 6, 6, "dflash,assistant")],
)
def test_a_pair_takes_the_memory_that_was_said(
    narrow: None, shape: str, layers: int, bits: int, drafters: str
) -> None:
    plan, told = generated.plan(shape, layers, bits, tuple(drafters.split(","))), []
    pair = generated.make(plan, 64, 4, lambda *now: told.append(now))
    layouts = [target_layout(plan.target), assistant_layout(plan.assistant)]
    if "dflash" in drafters:
        layouts.append(dflash_layout(published.published_dflash(plan.name)))
    assert told[-1] == (len(told) - 1, len(told) - 1, "done")
    assert len(told) - 1 == sum(len(layout.matrices) for layout in layouts)
    words = mx.zeros(8, mx.uint32)
    arrays = [
        array.nbytes
        for layout in layouts
        for path, shape in layout.matrices.items()
        for array in generated.matrix(words, shape, 8 if "router" in path else bits, 0).arrays
    ]
    vectors = sum(
        generated.vector(name, layout).nbytes for layout in layouts for name in layout.vectors
    )
    assert plan.nbytes == sum(arrays) + vectors
    assert pair.verified == (layers == 35) and pair.name.startswith(f"{plan.name} at {bits} bit")
    assert pair.target.config.quantization == pair.assistant.config.quantization  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused_with_a_way_out(
    narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = generated.plan("31b")
    smaller = generated.plan("31b", 12).needs(512, 6)
    monkeypatch.setattr(memory, "available_bytes", lambda: smaller)
    needs = plan.needs(512, 6) / 1e9
    with pytest.raises(
        ValueError,
        match=rf"\[bench\] 31B at 8 bit, generated weights must fit the free memory of "
        rf"{smaller / 1e9:.1f} GB but needs {needs:.1f} GB; --layers 12 would fit\.",
    ):
        generated.make(plan, 512, 6)
    generated.check_memory(generated.plan("31b", 12), 512, 6)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    with pytest.raises(ValueError, match=r"a smaller shape may fit\."):
        generated.check_memory(plan, 512, 6)


@pytest.mark.parametrize(
    ("shape", "layers", "drafter", "name"),
    [
        ("e2b", 10, "assistant", "native"),
        ("26b", 6, "assistant", "native"),
        ("31b", 6, "assistant", "native"),
        ("31b", 6, "dflash", "native"),
        ("31b", 6, "dflash", "reference"),
        ("26b", 6, "early:2", "native"),
        ("31b", 6, "lookup", "native"),
    ],
)
def test_rounds_in_parts_are_the_rounds(
    narrow: None,
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    layers: int,
    drafter: str,
    name: str,
) -> None:
    """Token for token: what is timed in parts is what a generation does. Of the two rules one has a
    text that tells what was drafted. Caches are written in place, and by the reference are not."""
    pair = generated.make(generated.plan(shape, layers, 8, (drafter,)), 64, 4)
    monkeypatch.setattr(dispatch, "_chosen", name)

    def played(sampling: Sampling, rounds: Rounds | None) -> list[tuple[list[int], int, int]]:
        """Tokens of each round, its drafts, and how many of them were kept."""
        told = decode(
            pair.target,
            model.drafter_of(drafter, pair),
            [5, 1, 4, 3, 2],
            sampling=sampling,
            block_size=4,
            max_tokens=20 if name == "native" else 4,
            rounds=rounds,
        )
        return [(done.tokens, done.num_drafted, done.num_accepted) for done in told]

    greedy = replace(model.SAMPLING, temperature=0.0)
    for sampling in (model.SAMPLING, greedy) if name == "native" else (model.SAMPLING,):
        want = played(sampling, None)
        assert {drafted for _, drafted, _ in want[1:]} == {3}
        for rounds in (model.WholeRounds(), model.PartedRounds()):
            assert played(sampling, rounds) == want, type(rounds)
            if isinstance(rounds, model.PartedRounds):
                assert list(rounds.seconds) == list(model.PARTS)
                assert all(took > 0 for took in rounds.seconds.values())
            else:
                assert rounds.device_s > 0


def test_lookup_has_drafts_where_nothing_matches() -> None:
    drafter = model.Matching()
    assert drafter.find([7, 8, 9], 5) == [7, 8, 9, 7, 8]
    assert drafter.find([7, 8, 9, 7, 8, 9, 7, 8, 9], 4) == [7, 8, 9, 7]
    assert drafter.wants_to_draft([1, 2, 3, 4], 2) and drafter.arrays[0].tolist() == [1, 2]


def test_turns_are_counted(narrow: None) -> None:
    drafters, told = ("dflash", "early:3"), []
    pair = generated.make(generated.plan("31b", 6, 8, drafters), 64, 4)
    measured = model.measure(
        pair,
        prompt_tokens=9,
        block_sizes=[3, 2],
        rounds=2,
        drafters=drafters,
        on_run=lambda *now: told.append(now),
    )
    assert list(measured.times) == [(None, 1)] + [(d, b) for d in drafters for b in (3, 2)]
    assert {len(own.whole) for own in measured.times.values()} == {2}
    for own in measured.times.values():
        assert len(own.host) == len(own.parts) == 2
        assert all(0 < host < took for host, took in zip(own.host, own.whole, strict=True))
    assert measured.prefill_s > 0 and measured.prompt_tokens == 9
    # The first token and some of four rounds' tokens stand behind the prompt
    assert 9 + model.WARM_UP + 2 <= measured.context <= 9 + 3 * (model.WARM_UP + 2)
    assert told[0] == (0, 5, "a prompt of 9 tokens") and told[-1] == (5, 5, "done")
    assert [label for _, _, label in told[1:5]] == ["warm-up"] * 2 + ["turn 1 of 2", "turn 2 of 2"]
    assert measured.peak_bytes > 0 and measured.resident_bytes > measured.cache_bytes > 0


def test_figures_by_hand() -> None:
    plan = generated.plan("31b", 6)
    parts = {"draft": 0.01, "layers": 0.06, "head": 0.02, "accept": 0.001}
    plain = {**parts, "draft": 0.0}
    measured = model.Measured(
        512,
        10.0,
        {
            model.PLAIN: model.Times([0.08, 0.5, 0.07], [0.002, 0.001, 0.1], [plain] * 3),
            model.Setting("assistant", 6): model.Times(
                [0.1, 0.12, 0.3], [0.003] * 3, [{**parts, "layers": 9.9}, parts, parts]
            ),
        },
        600,
        1,
        2,
        3,
    )
    first, row = model.rows_of(plan, measured, [0.4, 1.0], 50.0)
    assert (first["block_size"], row["block_size"]) == (1, 6)
    assert row["round_ms"] == pytest.approx(120) and first["round_ms"] == pytest.approx(80)
    assert row["verify_ms"] == pytest.approx(80) and row["layers_ms"] == pytest.approx(60)
    assert row["host_ms"] == pytest.approx(3) and first["host_ms"] == pytest.approx(2)
    assert row["round_cost_in_plain_steps"] == pytest.approx(1.5)
    # 1 + 0.4 * 5 tokens in 120 ms; plain steps are one token whatever is assumed
    assert row["tok_s"] == pytest.approx({"0.4": 25.0, "1": 50.0})
    assert first["tok_s"] == pytest.approx({"0.4": 12.5, "1": 12.5})
    moved = traffic.round_bytes(plan.target, plan.assistant, 8, 600, 6)
    assert row["gb_s"] == pytest.approx(moved / 0.12 / 1e9)
    assert row["share_of_bandwidth"] == pytest.approx(row["gb_s"] / 50)
    # Ten times the layers: 60 ms become 600; the head, drafts and the host stay
    assert plan.layers_share == pytest.approx(10)
    assert row["whole_model"]["round_ms"] == pytest.approx(120 + 540)
    assert row["whole_model"]["round_cost_in_plain_steps"] == pytest.approx(660 / 620)
    assert row["whole_model"]["tok_s"]["1"] == pytest.approx(6 / 0.66)
    assert [len(line) for line in model.cells([first, row])] == [len(model.HEADS)] * 2
    assert [line[0] for line in model.cells([first, row])] == ["plain", "6 assistant"]


@pytest.mark.parametrize("drafter", ["dflash", "early:2", "lookup"])
def test_bytes_of_each_drafters_rounds_by_hand(drafter: str) -> None:
    plan = generated.plan("31b", 6, 8, (drafter,))
    parts = dict.fromkeys(model.PARTS, 0.01)
    times = {
        one: model.Times([0.1], [0.1], [parts]) for one in (model.PLAIN, model.Setting(drafter, 6))
    }
    measured = model.Measured(16, 1.0, times, 600, 1, 2, 3)
    first, row = model.rows_of(plan, measured, [0.5], 50.0)
    head, whole = traffic.head_bytes(plan.target, 8), traffic.target_bytes(plan.whole, 8)
    own = {
        # All of it once, keys' and values' matrices twice, the target's head
        "dflash": (1_535_967_488 + 10 * 1024 * 5376 + 262_144 * 5376) * (1 + 4 / 64),
        "early:2": 5 * ((whole - head) * 2 / 60 + head),  # a full layer is a little larger
        "lookup": 0,
    }
    assert first["bytes"] == traffic.step_bytes(plan.target, 8, 600, 1)
    verify = traffic.step_bytes(plan.target, 8, 600, 6)
    assert row["bytes"] - verify == pytest.approx(own[drafter], rel=0.03)  # and the caches


def run(words: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "model", *words.split()])


def test_the_command_reports(narrow: None) -> None:
    done = run("--shape e2b --layers 5 --rounds 1 --prompt-tokens 9 --block-sizes 2 --json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["shape"], report["layers"], report["layers_of_whole_model"]) == ("E2B", 5, 35)
    assert [row["block_size"] for row in report["rows"]] == [1, 2]
    assert report["prefill_tok_s"] == pytest.approx(9 / report["prefill_s"])
    assert report["made_s"] > 0 and report["weight_bytes"] == generated.plan("e2b", 5).nbytes
    text = " ".join(done.stdout.split())
    assert "E2B at 8 bit, 5 of 35 layers, generated weights" in text
    assert "tok/s from the round and an assumed acceptance" in text
    assert "extrapolated to all 35 layers by the bytes of layers, not measured" in text
    assert "tok/s at 0.4 tok/s at 0.8" in text and "[2/4] warm-up" in done.stderr
    whole = run("--shape e2b --rounds 1 --prompt-tokens 9 --block-sizes 2 --acceptance 1")
    assert whole.exit_code == 0 and "extrapolated" not in whole.stdout
    assert "tok/s at 1" in whole.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 4", "--layers must be a multiple of 5 up to 35 but got 4."),
        ("--bits 5", "--bits must be of 8, 6, 4 but got 5."),
        ("--prompt-tokens 0", "--prompt-tokens must be at least 1 but got 0."),
        ("--rounds 0", "--rounds must be at least 1 but got 0."),
        ("--block-sizes 1,2", "--block-sizes must be 2 to 128 but got 1."),
        ("--drafter lookup,lookup", "--drafter must name each once but got"),
        ("--drafter assistant+lookup", "--drafter must be of assistant, dflash, lookup, early:N"),
        ("--drafter dflash", "--shape must be of 12b, 26b, 31b for dflash but got 'e2b'."),
        ("--block-sizes 2,2", "--block-sizes must name each once but got [2, 2]."),
        ("--block-sizes two", "--block-sizes must be whole numbers like 2,4,6 but got 'two'."),
        ("--acceptance 1.5", "--acceptance must be 0 to 1 but got 1.5."),
        ("--acceptance 1,1", "--acceptance must name each once but got [1.0, 1.0]."),
        ("--acceptance much", "--acceptance must be numbers like 0.4,0.8 but got 'much'."),
    ],
)
def test_what_cannot_be_timed_is_refused(options: str, message: str) -> None:
    done = run(f"--shape e2b {options}")
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


def test_too_little_memory_is_one_sentence(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**6)
    done = run("--shape 31b")
    assert done.exit_code == 2 and done.stdout == ""
    said = done.stderr.splitlines()
    assert said[-1].startswith("pyengine: [bench] 31B at 8 bit, generated weights must fit")
    assert len(said) == 1


@pytest.mark.parametrize("where", ["make", "measure"])
def test_ctrl_c_ends_it(narrow: None, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generated if where == "make" else model, where, interrupt)
    done = run("--shape e2b --layers 5 --rounds 1")
    assert done.exit_code == 130 and done.stderr.endswith("Interrupted.\n")
    assert "Traceback" not in done.output
