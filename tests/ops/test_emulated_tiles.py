"""AMX's tile instructions in portable C++, csrc/cpu/emulated_tiles.h, against the manual's words.

`.ci/tiles.sh` compares the bits of the kernels on them with those of a processor that has tiles.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from workbench import toolchain

CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = """
#include "cpu/emulated_tiles.h"

namespace portable = pyengine::portable;

extern "C" {
#pragma GCC visibility push(default)
void loadconfig(const void* from) { portable::_tile_loadconfig(from); }
void release() { portable::_tile_release(); }
void zero(int to) { portable::_tile_zero(to); }
void loadd(int to, const void* from, long pitch) { portable::_tile_loadd(to, from, pitch); }
void stored(int from, void* to, long pitch) { portable::_tile_stored(from, to, pitch); }
void dpbusd(int to, int a, int b) { portable::_tile_dpbusd(to, a, b); }
}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    source = folder / "tiles.cpp"
    source.write_text(SOURCE)
    options = ["-x", "c++", "-std=c++20", "-O2", f"-I{CSRC}", "-DPYENGINE_ISA=portable"]
    toolchain.compiler().build([source], folder / "tiles.so", options)
    return folder / "tiles.so"


@pytest.fixture
def tiles(path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.loadd.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_long]
    library.stored.argtypes = library.loadd.argtypes
    return library


def config(shapes: dict[int, tuple[int, int]], **at: int) -> bytes:
    """Rows and bytes of a row per tile, then single bytes as `b0=2`."""
    packed = np.zeros(64, np.uint8)
    packed[0] = 1
    for tile, (rows, row_bytes) in shapes.items():
        packed[16 + 2 * tile : 18 + 2 * tile] = (row_bytes % 256, row_bytes // 256)
        packed[48 + tile] = rows
    for place, value in at.items():
        packed[int(place[1:])] = value
    return packed.tobytes()


def load(tiles: ctypes.CDLL, tile: int, a: np.ndarray) -> None:
    tiles.loadd(tile, a.ctypes.data, a.strides[0])


@pytest.mark.parametrize(
    ("M", "K", "N"), [(16, 16, 16), (1, 1, 1), (5, 8, 3), (16, 8, 12), (3, 16, 16), (11, 2, 7)]
)
def test_products_are_of_unsigned_and_signed_bytes(tiles, M, K, N):
    """To whatever the sums hold, modulo 2^32, from rows that lie apart to rows that lie apart."""
    rng = np.random.default_rng(M * K * N)
    a = rng.integers(0, 256, (16, 80), np.uint8)
    b = rng.integers(-128, 128, (16, 96), np.int8)
    sums = rng.integers(-(2**31), 2**31, (16, 24), np.int64).astype(np.int32)
    a[0, :4], b[0, :4], sums[0, 0] = 255, 127, 2**31 - 1  # wraps around
    a[M - 1, 4 * K - 4 : 4 * K], b[K - 1, 4 * N - 4 : 4 * N] = 255, -128
    tiles.loadconfig(config({2: (M, 4 * N), 4: (M, 4 * K), 7: (K, 4 * N)}))
    load(tiles, 2, sums)
    load(tiles, 4, a)
    load(tiles, 7, b)
    tiles.dpbusd(2, 4, 7)
    out = np.full((16, 20), 77, np.int32)
    tiles.stored(2, out.ctypes.data, out.strides[0])

    expected = np.full((16, 20), 77, np.int32)  # nothing is written beside the tile
    left = a[:M, : 4 * K].astype(np.int64).reshape(M, K, 4)
    right = b[:K, : 4 * N].astype(np.int64).reshape(K, N, 4)
    products = sums[:M, :N] + np.einsum("mki,kni->mn", left, right)
    expected[:M, :N] = products.astype(np.int32)
    assert np.array_equal(out, expected)


def test_a_tile_is_zero_until_it_is_loaded_and_when_it_is_cleared(tiles):
    ones = np.ones((16, 16), np.int32)
    out = np.empty_like(ones)
    tiles.loadconfig(config({0: (16, 64), 1: (16, 64)}))
    load(tiles, 0, ones)
    load(tiles, 1, ones)
    tiles.zero(0)
    for tile, expected in ((0, 0 * ones), (1, ones)):
        tiles.stored(tile, out.ctypes.data, 64)
        assert np.array_equal(out, expected)
    tiles.loadconfig(config({1: (16, 64)}))
    tiles.stored(1, out.ctypes.data, 64)
    assert not out.any()


def test_a_thread_has_its_own_tiles(tiles):
    mine, others = np.full((2, 2), 5, np.int32), np.full((3, 1), 6, np.int32)
    out = np.zeros((2, 2), np.int32)
    tiles.loadconfig(config({0: (2, 8)}))
    load(tiles, 0, mine)

    def other() -> None:
        tiles.loadconfig(config({0: (3, 4)}))
        load(tiles, 0, others)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    tiles.stored(0, out.ctypes.data, 8)
    assert np.array_equal(out, mine)


FULL = dict.fromkeys(range(8), (16, 64))
REFUSED = {
    "palette must be 0 or 1 but got 2": (config(FULL, b0=2), ""),
    "start_row must be 0 but got 3": (config(FULL, b1=3), ""),
    "a reserved byte must be 0 but got 4": (config(FULL, b47=4), ""),
    "a reserved byte must be 0 but got 5": (config(FULL, b56=5), ""),
    "rows must be at most 16 but got 17": (config({0: (17, 64)}), ""),
    "bytes of a row must be at most 64 but got 260": (config({7: (16, 260)}), ""),
    "a tile must have both rows and bytes or neither but got 3": (config({3: (0, 4)}), ""),
    "tile must be 0 to 7 but got 8": (config(FULL), "zero(8)"),
    "tile must be configured but got 6": (config({0: (1, 4)}), "zero(6)"),
    "tile must be configured but got 0": (config(FULL), "release(), zero(0)"),
    "tile must be configured but got 5": (config(FULL), "loadconfig(bytes(64)), zero(5)"),
    "bytes of a row must be a multiple of 4 but got 6": (config({1: (1, 6)}), "zero(1)"),
    "sums must be a tile of their own but got 1": (config(FULL), "dpbusd(1, 2, 1)"),
    "factors must be two tiles but got 2": (config(FULL), "dpbusd(1, 2, 2)"),
    "rows of a must be those of the sums but got 15": (
        config(FULL | {1: (15, 64)}),
        "dpbusd(0, 1, 2)",
    ),
    "rows of b must be columns of a but got 8": (config(FULL | {2: (8, 64)}), "dpbusd(0, 1, 2)"),
    "bytes of b's rows must be those of the sums' but got 60": (
        config(FULL | {2: (16, 60)}),
        "dpbusd(0, 1, 2)",
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_instructions_refuse_ends_the_process(path, text):
    shape, then = REFUSED[text]
    program = f"""
import ctypes
tiles = ctypes.CDLL({str(path)!r})
loadconfig, release, zero, dpbusd = tiles.loadconfig, tiles.release, tiles.zero, tiles.dpbusd
loadconfig({shape!r}), {then}
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode < 0 and run.stderr == f"[amx] {text}.\n"
