#pragma once
// emulated_tiles.h: the six tile instructions of AMX that plane_tiles.h uses,
// in portable C++, so that its kernels can be tested on a processor with
// AVX-512 but no tiles (PYENGINE_EMULATE_TILES; .ci/tiles.sh).
//
// The functions have the names of the intrinsics, and every thread has its own
// eight tiles. What the instructions refuse ends the process with a sentence.
// One rule is stricter than the processor's: nothing interrupts a function, so
// start_row is 0.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume
// 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBUSD.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Those of <immintrin.h>, which are macros.
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd

namespace pyengine::PYENGINE_ISA {

constexpr int emulated_tile_count = 8, emulated_rows = 16;
constexpr int emulated_row_bytes = 64;

// Without a shape until a configuration gives it one. What lies beyond its
// shape is 0: a configuration clears all tiles, and nothing is written there.
struct EmulatedTile {
  int rows;
  int row_bytes;
  uint8_t at[emulated_rows][emulated_row_bytes];
};

inline constinit thread_local EmulatedTile emulated_tiles[emulated_tile_count] =
    {};

inline void tile_rule(bool holds, const char* what, const char* rule, int got) {
  if (!holds) {
    fprintf(stderr, "[amx] %s must %s but got %d.\n", what, rule, got);
    abort();
  }
}

// A tile that an instruction names.
inline EmulatedTile& emulated_tile(int tile) {
  tile_rule(0 <= tile && tile < emulated_tile_count, "tile", "be 0 to 7", tile);
  EmulatedTile& found = emulated_tiles[tile];
  tile_rule(found.rows > 0, "tile", "be configured", tile);
  tile_rule(
      found.row_bytes % 4 == 0,
      "bytes of a row",
      "be a multiple of 4",
      found.row_bytes);
  return found;
}

inline void _tile_release() {
  memset(emulated_tiles, 0, sizeof(emulated_tiles));
}

inline void _tile_loadconfig(const void* from) {
  uint8_t config[64];
  memcpy(config, from, sizeof(config));
  _tile_release();
  if (config[0] == 0) { // as if released
    return;
  }
  tile_rule(config[0] == 1, "palette", "be 0 or 1", config[0]);
  tile_rule(config[1] == 0, "start_row", "be 0", config[1]);
  for (int i = 2; i < 64; ++i) {
    bool used = (16 <= i && i < 32) || (48 <= i && i < 56);
    tile_rule(used || config[i] == 0, "a reserved byte", "be 0", config[i]);
  }
  for (int i = 0; i < emulated_tile_count; ++i) {
    int rows = config[48 + i];
    int row_bytes = config[16 + 2 * i] + 256 * config[17 + 2 * i];
    tile_rule(rows <= emulated_rows, "rows", "be at most 16", rows);
    tile_rule(
        row_bytes <= emulated_row_bytes,
        "bytes of a row",
        "be at most 64",
        row_bytes);
    tile_rule(
        (rows == 0) == (row_bytes == 0),
        "a tile",
        "have both rows and bytes or neither",
        i);
    emulated_tiles[i].rows = rows;
    emulated_tiles[i].row_bytes = row_bytes;
  }
}

inline void _tile_zero(int to) {
  EmulatedTile& tile = emulated_tile(to);
  memset(tile.at, 0, sizeof(tile.at));
}

inline void _tile_loadd(int to, const void* from, int64_t pitch) {
  EmulatedTile& tile = emulated_tile(to);
  for (int m = 0; m < tile.rows; ++m) {
    memcpy(
        tile.at[m],
        static_cast<const char*>(from) + m * pitch,
        size_t(tile.row_bytes));
  }
}

inline void _tile_stored(int from, void* to, int64_t pitch) {
  const EmulatedTile& tile = emulated_tile(from);
  for (int m = 0; m < tile.rows; ++m) {
    memcpy(
        static_cast<char*>(to) + m * pitch, tile.at[m], size_t(tile.row_bytes));
  }
}

// sums [M, N] int32 += a [M, K, 4] of unsigned bytes times b [K, N, 4] of
// signed ones, over K and the four. Sums wrap around.
inline void _tile_dpbusd(int to, int first, int second) {
  EmulatedTile& sums = emulated_tile(to);
  const EmulatedTile& a = emulated_tile(first);
  const EmulatedTile& b = emulated_tile(second);
  tile_rule(to != first && to != second, "sums", "be a tile of their own", to);
  tile_rule(first != second, "factors", "be two tiles", first);
  tile_rule(a.rows == sums.rows, "rows of a", "be those of the sums", a.rows);
  tile_rule(a.row_bytes == 4 * b.rows, "rows of b", "be columns of a", b.rows);
  tile_rule(
      b.row_bytes == sums.row_bytes,
      "bytes of b's rows",
      "be those of the sums'",
      b.row_bytes);
  int columns = sums.row_bytes / 4;
  for (int m = 0; m < sums.rows; ++m) {
    uint32_t row[emulated_row_bytes / 4]; // unsigned, for these may wrap
    memcpy(row, sums.at[m], sizeof(row));
    for (int k = 0; k < b.rows; ++k) {
      for (int n = 0; n < columns; ++n) {
        for (int i = 0; i < 4; ++i) {
          int left = a.at[m][4 * k + i], right = int8_t(b.at[k][4 * n + i]);
          row[n] += uint32_t(left * right);
        }
      }
    }
    memcpy(sums.at[m], row, sizeof(row));
  }
}

} // namespace pyengine::PYENGINE_ISA
