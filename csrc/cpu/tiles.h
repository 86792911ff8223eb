#pragma once
// tiles.h: what the processor's matmuls share: rows and columns are multiplied
// a tile at a time.

#include "cpu/simd.h"

namespace pyengine::PYENGINE_ISA {

// Rows that are multiplied with a weight in the register it was unpacked in,
// while the columns stream past. More rows go block by block (blocked.h).
constexpr int tile_rows = native == 16 ? 8 : 4;
// Sums, weights and one row have to fit the registers, with two to unpack in.
constexpr int tile_columns(int rows) {
  if (native == 16) {
    return rows <= 5 ? 4 : 3;
  }
  return native == 8 && rows <= 2 ? 2 : 1;
}

template <int height, int width>
struct TileSize {
  static constexpr int rows = height;
  static constexpr int columns = width;
};

// Calls work(TileSize, n) for the tiles of M <= tile_rows rows and columns
// [begin, end).
template <typename Work>
PYENGINE_INLINE void for_tiles(int M, int begin, int end, const Work& work) {
  with_constant<tile_rows>(M, [&](auto constant) {
    TileSize<constant.value, tile_columns(constant.value)> size;
    for (int n = begin; n < end; n += size.columns) {
      work(size, n);
    }
  });
}

// Adds sixteen k of a tile to its sums.
template <int rows, int columns>
PYENGINE_INLINE void multiply_step(
    const F32x16 (&weights)[columns],
    const float* x,
    F32x16 (&acc)[rows * columns]) {
  PYENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    F32x16 values = load(x + lanes * r);
    pin(values);
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      acc[r * columns + c] = fma(values, weights[c], acc[r * columns + c]);
    }
  }
}

// Sums [M, end - begin] to columns [begin, end) of the result.
template <typename Args>
PYENGINE_INLINE void
store_columns(const Args& args, int begin, int end, const float* sums) {
  int columns = end - begin;
  for (int m = 0; m < args.M; ++m) {
    int64_t at = int64_t(m) * args.N + begin;
    store(args.out, args.out_storage, at, sums + m * columns, columns);
  }
}

} // namespace pyengine::PYENGINE_ISA
