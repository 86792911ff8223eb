"""What Metal would be told for a pair; there is none here, so MLX's answers are given."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_pairs import FIXTURES

from pyengine.checkpoint import on_metal
from pyengine.checkpoint.config_json import read_target_config
from pyengine.checkpoint.memory import weight_bytes
from pyengine.checkpoint.pair import load
from pyengine.checkpoint.weights import target_layout
from pyengine.cli.generate import print_stats
from pyengine.engine.stats import Stats
from pyengine.task import Result

GB = 10**9


class Metal:
    """MLX on a Mac with 24 GB for the GPU, as far as it is asked."""

    gpu = "gpu"

    def __init__(self) -> None:
        self.metal = SimpleNamespace(is_available=lambda: True)
        self.limit = 0

    def default_device(self) -> str:
        return self.gpu

    def device_info(self) -> dict[str, int]:
        return {"max_recommended_working_set_size": 24 * GB}

    def set_wired_limit(self, limit: int) -> int:
        assert 0 <= limit <= 24 * GB
        self.limit, before = limit, self.limit
        return before


class Owner:
    pass


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Metal:
    fake = Metal()
    monkeypatch.setattr(on_metal, "mx", fake)
    return fake


def test_memory_is_wired_while_pairs_are_loaded(metal: Metal) -> None:
    assert on_metal.wired_line() == "nothing is wired until a pair is loaded"
    one, two = Owner(), Owner()
    on_metal.wire(one, 3 * GB)
    assert metal.limit == on_metal.wired_bytes() == 7 * GB
    assert on_metal.wired_line() == "up to 7.0 GB stay resident while a pair is loaded"
    on_metal.wire(two, 2 * GB)
    assert metal.limit == 9 * GB
    del one
    assert metal.limit == 6 * GB
    del two
    assert metal.limit == on_metal.wired_bytes() == 0


def test_no_more_is_wired_than_the_device_recommends(metal: Metal) -> None:
    owner = Owner()
    on_metal.wire(owner, 21 * GB)
    assert metal.limit == 24 * GB
    del owner


@pytest.mark.parametrize("own, during", [(5 * GB, 7 * GB), (20 * GB, 20 * GB)])
def test_a_limit_of_the_process_is_given_back_and_never_lowered(metal, own, during) -> None:
    metal.limit = own
    owner = Owner()
    on_metal.wire(owner, 3 * GB)
    assert metal.limit == during
    del owner
    assert metal.limit == own


def test_a_processor_wires_nothing(metal: Metal) -> None:
    owner = Owner()
    metal.default_device = lambda: "cpu"  # type: ignore[method-assign]
    on_metal.wire(owner, GB)
    metal.metal.is_available = lambda: False
    on_metal.wire(owner, GB)
    assert metal.limit == on_metal.wired_bytes() == 0
    assert on_metal.wired_line() == "no Metal here: nothing is wired"


def test_loading_wires_weights_and_the_longest_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, int]] = []
    monkeypatch.setattr(on_metal, "wire", lambda pair, needed: asked.append((pair, needed)))
    pair = load(FIXTURES / "dense31" / "target")
    config = pair.target.config
    ((owner, needed),) = asked
    assert owner is pair
    cache = needed - weight_bytes(FIXTURES / "dense31" / "target", target_layout(config))
    full = [layer for layer in config.layers if not layer.sliding]
    size = pair.target.dtype.size
    at_least = sum(2 * n.num_kv_heads * n.head_dim for n in full) * config.context_limit * size
    assert at_least <= cache < 1.1 * at_least + 10**6


def test_stats_tell_what_is_wired(metal, capsys) -> None:
    result = Result("text", [1], None, Stats())
    print_stats(result)
    assert "wired" not in capsys.readouterr().err
    owner = Owner()
    on_metal.wire(owner, 3 * GB)
    print_stats(result)
    assert "up to 7.0 GB stay resident" in capsys.readouterr().err
    del owner


@pytest.mark.parametrize(
    "flavour, generation, longer",
    [
        ("e2b", 1, True),
        ("moe26", 4, True),
        ("dense31", 4, False),
        ("e2b", 5, False),
        ("e2b", 0, False),
    ],
)
def test_command_buffers(metal, monkeypatch, flavour, generation, longer) -> None:
    """Longer for small and mixture models on an M1 to M4; what the process has set stays."""
    monkeypatch.setattr(on_metal, "_generation", lambda: generation)
    monkeypatch.setattr(os, "environ", {"MLX_MAX_OPS_PER_BUFFER": "7"})
    on_metal.lengthen_command_buffers(read_target_config(FIXTURES / flavour / "target"))
    expected = {"MLX_MAX_OPS_PER_BUFFER": "7"}
    assert os.environ == expected | ({"MLX_MAX_MB_PER_BUFFER": "400"} if longer else {})


@pytest.mark.parametrize(
    "system, name, generation",
    [
        ("Darwin", "Apple M3 Ultra\n", 3),
        ("Darwin", "Apple M10\n", 10),
        ("Darwin", "Intel(R) Core(TM) i9\n", 0),
        ("Linux", "Apple M1", 0),
    ],
)
def test_generations(monkeypatch, system, name, generation) -> None:
    monkeypatch.setattr(on_metal.platform, "system", lambda: system)
    monkeypatch.setattr(on_metal.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=name))
    assert on_metal._generation() == generation


def test_buffers_are_set_before_the_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX reads the variables when it makes its device, which a question about memory does."""
    order: list[str] = []

    def note(what: str) -> Any:
        return lambda *_: order.append(what)

    monkeypatch.setattr(on_metal, "lengthen_command_buffers", note("buffers"))
    monkeypatch.setattr("pyengine.checkpoint.memory.available_bytes", note("memory"))
    load(FIXTURES / "e2b" / "target")
    assert order == ["buffers", "memory"]
