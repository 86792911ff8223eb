"""A hostile checkpoint costs next to nothing: refused, or read, in bounded time and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pairs import FIXTURES

from pyengine import cli
from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.safetensors import INDEX, SINGLE

NANO = Path(cli.__file__).parents[1] / "nano"
M = 1 << 20
# Measured: a second and 100 MB at most. A machine may be busy, so the bounds are wider.
SECONDS, BYTES = 3.0, 200 * M

Lay = Callable[[Path], Any]


def put(name: str, content: str | bytes) -> Lay:
    data = content if isinstance(content, bytes) else content.encode()

    def lay(bundle: Path) -> None:
        (bundle / name).write_bytes(data)

    return lay


def weights(header: object, size: int = 100) -> Lay:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return put(f"target/{SINGLE}", len(raw).to_bytes(8, "little") + raw + bytes(size))


def sparse(name: str, size: int) -> Lay:
    def lay(bundle: Path) -> None:
        put(name, "")(bundle)
        os.truncate(bundle / name, size)

    return lay


def config(**values: Any) -> Lay:
    def lay(bundle: Path) -> None:
        whole = json.loads((bundle / "target" / "config.json").read_text()) | values
        put("target/config.json", json.dumps(whole))(bundle)

    return lay


def both(*lays: Lay) -> Lay:
    return lambda bundle: [lay(bundle) for lay in lays]


def tensor(shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}


def shards(count: int) -> str:
    return json.dumps({"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(count)}})


def layers(**values: Any) -> Lay:
    kinds = ["sliding_attention", "full_attention"] * 256
    return config(num_hidden_layers=512, layer_types=kinds, **values)


DEEP = b"[" * (250_000)
TABLE: dict[str, tuple[Lay, str]] = {
    "rank": (weights({"a": tensor([2] * 400_000)}), "at most 8 dimensions"),
    "rank of large numbers": (weights({"a": tensor([2**31 - 1] * 90_000)}), "at most 8 dimensions"),
    "rank of long numbers": (
        weights(
            b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[%s]}}'
            % b",".join([b"9" * 4000] * 8)
        ),
        "no sound shape and offsets",
    ),
    "numbers too long": (
        weights(b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[%s]}}' % (b"9" * 7 * M)),
        "is damaged",
    ),
    "notes": (weights({"__metadata__": {str(i): "x" * 20 for i in range(200_000)}}), "1000 notes"),
    "one long note": (weights({"__metadata__": {"x": "y" * 7 * M}}), "weights miss"),
    "a header of 128 MB": (weights({"__metadata__": {"x": "y" * 128 * M}}), "at most 8 MB"),
    "a header of wide characters": (
        weights(
            json.dumps(
                {"__metadata__": {"x": "\U0001f600" + "y" * 7 * M}}, ensure_ascii=False
            ).encode()
        ),
        "weights miss",
    ),
    "a header of lists": (weights(b"[" + b"[]," * 240_000 + b"[]]"), "an entry has a wrong form"),
    "a header of objects": (weights(b"[" + b'{"a":0},' * 160_000 + b"0]"), "a wrong form"),
    "a header of too many": (weights(b"[" + b"[]," * 2 * M + b"[]]"), "at most 500000 values"),
    "many tensors": (
        weights({f"model.layers.0.{i}.weight": tensor([0]) for i in range(40_000)}),
        "weights miss",
    ),
    "many tensors of one name": (
        weights(b"{" + b",".join([b'"a":{}'] * 120_000) + b"}"),
        "must name each key once",
    ),
    "a deep header": (weights(DEEP), "nested too deeply"),
    "a tensor of a terabyte": (
        both(
            weights(
                {
                    "model.embed_tokens.weight": {
                        "dtype": "U8",
                        "shape": [1 << 30, 1 << 10],
                        "data_offsets": [0, 1 << 40],
                    }
                }
            ),
            lambda bundle: os.truncate(bundle / "target" / SINGLE, (1 << 40) + 4096),
        ),
        "must fit the free memory",
    ),
    "a config of a terabyte": (sparse("target/config.json", 1 << 40), "must be at most 8 MB"),
    "a config of blanks": (put("target/config.json", " " * 9 * M), "must be at most 8 MB"),
    "a config of values": (
        put("target/config.json", b"[" + b"0," * 2 * M + b"0]"),
        "500000 values",
    ),
    "a config of texts": (
        put("target/config.json", json.dumps({"a": [str(i) for i in range(480_000)]})),
        "misses `model_type`",
    ),
    "a deep config": (put("target/config.json", DEEP), "nested too deeply"),
    "many layer types": (config(layer_types=["x"] * 400_000), "must list 24 times"),
    "many layers configured": (
        layers(per_layer_config={f"x{i}": {} for i in range(100_000)}),
        "are these two a pair",
    ),
    "a long layer index": (layers(per_layer_config={"0" * 7 * M: {}}), "are these two a pair"),
    "many overrides": (
        config(quantization={"bits": 8, "group_size": 64} | {f"x{i}": {} for i in range(100_000)}),
        "",
    ),
    "a long override": (
        config(quantization={"bits": 8, "group_size": 64, "model." * M: {"bits": 5}}),
        "",
    ),
    "many end ids": (config(eos_token_id=list(range(480_000))), ""),
    "many shards": (
        both(
            put(f"target/{INDEX}", shards(200_000)),
            lambda bundle: (bundle / "target" / SINGLE).unlink(),
        ),
        "misses the shard s0",
    ),
    "a stale index of many": (put(f"target/{INDEX}", shards(200_000)), ""),
    "a long shard": (
        put(f"target/{INDEX}", json.dumps({"weight_map": {"a": "s" * 7 * M}})),
        "leads nowhere",
    ),
    "a long layout": (put(MANIFEST, json.dumps({"layout": {"target": "a/" * M}})), "leads nowhere"),
    "a deep layout": (
        put(MANIFEST, json.dumps({"layout": {"target": "a/" * 2000}})),
        "target must be a folder",
    ),
    "many suppressed": (
        put("target/generation_config.json", json.dumps({"suppress_tokens": [*range(480_000)]})),
        "must hold ids from",
    ),
    "many settings": (
        put("target/generation_config.json", json.dumps({f"k{i}": 1 for i in range(200_000)})),
        "",
    ),
    "a long template": (
        put("target/chat_template.jinja", "x" * 64 * M),
        "chat_template.jinja must",
    ),
    "a long tokenizer config": (
        put("target/tokenizer_config.json", b"\xff" * 9 * M),
        "at most 8 MB",
    ),
}

MEASURE = """
import gc, json, logging, re, resource, sys, time
from pyengine.checkpoint.pair import load
logging.disable()
def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts there what the process that started this one had
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
load(text=True)
before = peak()
for line in sys.stdin:
    gc.collect()
    began = time.process_time()
    try:
        load(bundle=sys.argv[1], text=True)
        said = ""
    except ValueError as error:
        said = str(error)[:2000]
    print(json.dumps([said, time.process_time() - began, peak() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, int]]:
    """Every case loaded by one process: what it said, seconds, and the peak of memory so far."""
    bundle = tmp_path_factory.mktemp("hostile") / "bundle"
    rows: dict[str, tuple[str, float, int]] = {}
    command = [sys.executable, "-c", MEASURE, str(bundle)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=FIXTURES) as child:
        assert child.stdin is not None and child.stdout is not None
        for name, (lay, _) in TABLE.items():
            shutil.rmtree(bundle, ignore_errors=True)
            shutil.copytree(NANO, bundle)
            lay(bundle)
            child.stdin.write("next\n")
            child.stdin.flush()
            said, seconds, grown = json.loads(child.stdout.readline())
            rows[name] = (said, seconds, grown)
        child.stdin.close()
    return rows


@pytest.mark.parametrize("name", TABLE)
def test_a_hostile_file_is_dealt_with_at_once(
    name: str, measured: dict[str, tuple[str, float, int]]
) -> None:
    said, seconds, grown = measured[name]
    message = TABLE[name][1]
    assert bool(said) == bool(message) and message in said, said
    assert seconds < SECONDS and grown < BYTES, (seconds, grown / M)
