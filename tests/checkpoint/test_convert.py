"""Conversion of pairs: what comes out, that it loads and agrees, and what failures leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import FIXTURES, greedy_text, mirrored, norm
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint import quantize
from pyengine.checkpoint.config_json import read_assistant_config, read_target_config
from pyengine.checkpoint.convert import convert
from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.pair import load
from pyengine.checkpoint.safetensors import INDEX, SINGLE
from pyengine.checkpoint.weights import load_assistant_weights, load_target_weights, target_layout

SRC = FIXTURES / "e2b"


HALVES = (
    ("target", read_target_config, load_target_weights),
    ("assistant", read_assistant_config, load_assistant_weights),
)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_pair_becomes_a_bundle(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    done = convert(SRC, tmp_path / "out", on_progress=lambda *row: seen.append(row))
    assert (done.kind, done.name) == ("pair", "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["layout"] == {"target": "target", "assistant": "assistant"}
    assert manifest["target"]["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    pair = load(bundle=tmp_path / "out")
    assert pair.assistant is not None and pair.target.config.quantization is not None
    assert names(tmp_path)[0] == "out"  # and nothing beside it
    # Progress rises to the end, once
    assert [row[0] for row in seen] == sorted(row[0] for row in seen)
    assert seen[0][0] == 0 and seen[-1] == (done.weight_bytes, done.weight_bytes, "done")
    size = sum((tmp_path / "out" / p / SINGLE).stat().st_size for p in ("target", "assistant"))
    assert 0 < size - done.weight_bytes < 60_000  # headers


def test_two_folders_and_single_ones(tmp_path: Path) -> None:
    parts = {part: SRC / part for part in ("target", "assistant")}
    assert convert(parts["target"], tmp_path / "a", assistant=parts["assistant"]).kind == "pair"
    assert convert(parts["target"], tmp_path / "b").kind == "target"
    assert convert(parts["assistant"], tmp_path / "c").kind == "assistant"
    for one, part in (("b", "target"), ("c", "assistant")):
        same = (tmp_path / "a" / part / SINGLE).read_bytes()
        assert (tmp_path / one / SINGLE).read_bytes() == same
        assert not (tmp_path / one / MANIFEST).exists()


@pytest.mark.parametrize("flavour", ["dense31", "moe26"])
def test_slices_do_not_change_a_byte(
    flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(FIXTURES / flavour / "target", tmp_path / "whole")
    monkeypatch.setattr(quantize, "SLICE_BYTES", 1000)
    convert(FIXTURES / flavour / "target", tmp_path / "sliced")
    assert (tmp_path / "whole" / SINGLE).read_bytes() == (tmp_path / "sliced" / SINGLE).read_bytes()


def test_every_form_of_source_gives_the_same(tmp_path: Path) -> None:
    """Shards, and experts as halves of one tensor or as a tensor each."""
    plain = FIXTURES / "moe26" / "target"
    convert(plain, tmp_path / "plain")
    tensors = mx.load(str(plain / SINGLE))
    for form in ("single", "sharded"):
        src = tmp_path / f"src-{form}"
        shutil.copytree(plain, src)
        (src / SINGLE).unlink()
        out = dict(tensors)
        if form == "single":
            for name, array in tensors.items():
                if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:
                    del out[name]
                    for x in range(array.shape[0]):
                        at = name.replace(".experts.", f".experts.{x}.")
                        if "gate_up" in name:
                            gate, up = mx.split(array[x], 2)
                            out[at.replace("gate_up_proj", "gate_proj") + ".weight"] = gate
                            out[at.replace("gate_up_proj", "up_proj") + ".weight"] = up
                        else:
                            out[at + ".weight"] = array[x]
            mx.save_safetensors(str(src / SINGLE), out)
        else:
            halves = [dict(list(out.items())[i::2]) for i in (0, 1)]
            where = {}
            for i, half in enumerate(halves):
                mx.save_safetensors(str(src / f"{i}.safetensors"), half)
                where |= dict.fromkeys(half, f"{i}.safetensors")
            (src / INDEX).write_text(json.dumps({"weight_map": where}))
        convert(src, tmp_path / form)
        assert (tmp_path / form / SINGLE).read_bytes() == (tmp_path / "plain" / SINGLE).read_bytes()
        assert not (tmp_path / form / INDEX).exists()


@pytest.mark.parametrize("flavour", ["dense31", "e2b", "moe26", "uni12"])
def test_values_stay_within_half_a_step(flavour: str, tmp_path: Path) -> None:
    convert(FIXTURES / flavour, tmp_path / "q")
    for part, read, get in HALVES:
        small = get(tmp_path / "q" / part, read(tmp_path / "q" / part), mx.float32)
        exact = get(FIXTURES / flavour / part, read(FIXTURES / flavour / part), mx.float32)
        for path, ours in small.matrices.items():
            a, b = ours.values(), exact.matrices[path].values()
            error = mx.abs(a - b).reshape(*ours.scales.shape, ours.group_size)
            # Scale and bias are rounded to bfloat16, 8 bits of fraction, at up to 255 steps
            rounding = mx.abs(b).reshape(error.shape).max(axis=-1) * 2.0**-7
            assert bool((error.max(axis=-1) <= 0.51 * mx.abs(ours.scales) + rounding).all()), path
        for name, vector in small.vectors.items():
            assert mx.array_equal(vector, exact.vectors[name]), name


@pytest.mark.parametrize("flavour", ["dense31", "e2b", "moe26", "uni12"])
def test_logits_move_as_far_as_the_weights_do(flavour: str, tmp_path: Path) -> None:
    """The error of the logits against one computed from the weights: of the mirrored model.

    Its weights are off by as much as the converted ones, to the other side. To first order the
    logits move by as much; a wrong scale, name or row would move them by far more.
    """
    convert(FIXTURES / flavour, tmp_path / "q")
    ours = load(bundle=tmp_path / "q", dtype=mx.float32)
    ids = greedy_text(flavour)[:60]
    exact = load(FIXTURES / flavour / "target", dtype=mx.float32).logits(ids)
    off = norm(ours.logits(ids) - exact)
    assert 0 < off < 2 * norm(mirrored(FIXTURES / flavour, tmp_path / "q").logits(ids) - exact)
    assert off < norm(exact) / 3


# Failures


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    done = run(SRC, tmp_path / "out", "--bits", "4", "--group-size", "32", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["kind"] == "pair" and said["path"] == str(tmp_path / "out")
    assert said["weight_bytes"] > 0 and (said["bits"], said["group_size"]) == (4, 32)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("converting: 0 % target ") and lines[-1] == "converting: 100 % done"
    assert 5 < len(lines) <= 11
    text = run(SRC / "target", tmp_path / "one")
    assert text.exit_code == 0 and str(tmp_path / "one") in text.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SRC, "{tmp}/x", "--bits", "5"], "[convert] bits must be 4, 6 or 8 but got 5."),
        ([SRC, "{tmp}/x", "--group-size", "7"], "[convert] group_size must be 32, 64 or 128"),
        ([SRC, "{tmp}"], "[convert] dst must not exist yet"),
        ([SRC, "{tmp}/no/where"], "[convert] dst must lie in a folder that exists"),
        (["/absent", "{tmp}/x"], "must be a folder but got /absent"),
        ([FIXTURES, "{tmp}/x"], "must be a bundle with the folders target and assistant, or a"),
        ([SRC / "target", "{tmp}/x", "--assistant", FIXTURES / "uni12" / "assistant"], "a pair?"),
        ([SRC / "assistant", "{tmp}/x", "--assistant", SRC / "assistant"], "`model_type` must be"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[Any], message: str) -> None:
    done = run(*[str(a).format(tmp=tmp_path) for a in arguments])
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("pyengine: [") and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and names(tmp_path) == []


def test_a_source_that_is_quantised_or_damaged(tmp_path: Path) -> None:
    convert(SRC / "target", tmp_path / "q")
    before = names(tmp_path)
    done = run(tmp_path / "q", tmp_path / "again")
    assert done.exit_code == 2 and "must not be quantised already" in done.stderr
    src = tmp_path / "src"
    shutil.copytree(SRC / "target", src)
    tensors = mx.load(str(src / SINGLE))
    name = next(n for n in tensors if n.endswith("layers.3.mlp.up_proj.weight"))
    array = np.array(tensors[name].astype(mx.float32))
    array[-1, -1] = np.nan
    tensors[name] = mx.array(array).astype(mx.bfloat16)
    mx.save_safetensors(str(src / SINGLE), tensors)
    done = run(src, tmp_path / "again")
    assert done.exit_code == 2 and "layers.3.mlp.up_proj` must be finite" in done.stderr
    shutil.rmtree(src)
    assert names(tmp_path) == before


def test_a_disk_too_small_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    done = run(SRC, tmp_path / "x")
    assert done.exit_code == 2 and "must fit the free 0.0 GB of its disk" in done.stderr
    assert names(tmp_path) == []


FULL = """
import resource, sys
from pyengine.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["pyengine", "convert", *sys.argv[1:]]
main()
"""


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the same call fails the same way."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(SRC), str(tmp_path / "x")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=FIXTURES,
    )
    assert done.returncode == 2 and done.stdout == ""
    # Known before anything is converted, which would be told by a line of progress
    assert done.stderr.startswith("pyengine: [file] ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and names(tmp_path) == []


HELD = """
import sys
from pyengine.__main__ import main
from pyengine.checkpoint import quantize
whole, calls = quantize._converted, 0
def held(*arguments):
    global calls
    calls += 1
    if calls == 3:  # something is written
        print("held", flush=True)
        sys.stdin.read()
    return whole(*arguments)
quantize._converted = held
sys.argv = ["pyengine", "convert", *sys.argv[1:]]
main()
"""


def start(dst: Path) -> subprocess.Popen[str]:
    """A conversion that stands still midway."""
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, str(SRC), str(dst)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=FIXTURES,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert (dst.with_name(f".{dst.name}.partial") / "target" / SINGLE).exists()
    return process


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path / "x")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("Interrupted.\n")
    assert "Traceback" not in err and names(tmp_path) == []


def test_a_killed_run_is_no_hindrance_and_a_running_one_is(tmp_path: Path) -> None:
    process = start(tmp_path / "x")
    done = run(SRC, tmp_path / "x")
    assert done.exit_code == 2 and "dst must not be in the making" in done.stderr
    process.kill()
    process.communicate(timeout=60)
    assert ".x.partial" in names(tmp_path)
    assert run(SRC, tmp_path / "x").exit_code == 0
    assert os.listdir(tmp_path) == ["x"] and load(bundle=tmp_path / "x").assistant


PEAK = """
import resource, sys
import mlx.core as mx
from pyengine.checkpoint.convert import convert
mx.eval(*mx.quantize(mx.ones((64, 64)), 64, 8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.soak
def test_peak_memory_on_two_gigabytes(tmp_path: Path) -> None:
    """No tensor is ever whole in memory: half a gigabyte of embeddings costs some slices."""
    src = tmp_path / "src"
    shutil.copytree(FIXTURES / "dense31" / "target", src)
    path = src / "config.json"
    config = json.loads(path.read_text())
    config["vocab_size"] = 262144
    text = config.get("text_config", config)
    text |= {"vocab_size": 262144, "hidden_size": 1024, "intermediate_size": 39936}
    path.write_text(json.dumps(config))
    layout = target_layout(read_target_config(src))
    shapes = {f"{name}.weight": shape for name, shape in layout.matrices.items()} | layout.vectors
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        span = [end, end + size]
        full = f"model.language_model.{name}"
        header[full] = {"dtype": "BF16", "shape": list(shape), "data_offsets": span}
        end += size
    assert 1.9e9 < end < 2.3e9
    head = json.dumps(header).encode()
    noise = np.random.default_rng(0).integers(0x3B00, 0x3D00, 1 << 22, dtype=np.uint16).tobytes()
    with (src / SINGLE).open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _ in range(end // len(noise)):
            file.write(noise)
        file.write(noise[: end % len(noise)])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(src), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=FIXTURES,
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    largest = max(2 * int(np.prod(shape)) for shape in shapes.values())
    print(f"{end / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, grown {grown / 1e6:.0f} MB")
    assert grown < 0.5 * largest
