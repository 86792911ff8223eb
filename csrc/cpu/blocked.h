#pragma once
// blocked.h: the processor's matmuls from a few rows on. A block of weights is
// unpacked once, to float32, and then multiplied with all rows of the slice,
// whose k of this block are in the first cache too.
//
// The order of every sum is that of tiles.h: sixteen lanes over k in ascending
// order, then a fixed tree. Only where the lanes wait differs: between two
// blocks of k they lie in memory. Lanes never meet before the end, so a tile
// takes those of one register (all, half or a quarter of the sixteen) through
// its block before it takes the next.

#include "cpu/simd.h"

namespace pyengine::PYENGINE_ISA {

// 16 rows of x take 16 KB of the first cache, a panel of weights 4 KB; twice
// that fits where AVX-512 is, and sets of lanes are written half as often. The
// lanes of a block of columns stay in the second.
constexpr int block_k = native == 16 ? 512 : 256;
constexpr int block_columns = 32;
constexpr int panel_columns = 4;

// Rows of a tile: there is a register, of 32 or 16, for each of its sums, for
// each row and for one weight.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int panel_rows = 6;
#else
constexpr int panel_rows = 3;
#endif

// Adds `steps` times 16 k to the lanes [rows, panel_columns, 16], or to 0.
template <int rows>
PYENGINE_INLINE void multiply_panel(
    const float* panel, // [k / 16, panel_columns, 16]
    const float* x,
    int pitch,
    int steps,
    bool from_zero,
    float* sums) {
#pragma GCC unroll 1
  for (int part = 0; part < parts; ++part) {
    const float* w = panel + native * part;
    const float* values = x + native * part;
    float* at = sums + native * part;
    NativeFloat acc[rows][panel_columns] = {};
    if (!from_zero) {
      PYENGINE_UNROLL
      for (int r = 0; r < rows; ++r) {
        PYENGINE_UNROLL
        for (int c = 0; c < panel_columns; ++c) {
          acc[r][c] = detail::load_part(at + lanes * (r * panel_columns + c));
        }
      }
    }
    int left = steps;
    do {
      NativeFloat row[rows];
      PYENGINE_UNROLL
      for (int r = 0; r < rows; ++r) {
        // Pinned in the array, gcc would also write it to memory.
        NativeFloat value = detail::load_part(values + lanes * r);
        detail::pin_part(value);
        row[r] = value;
      }
      PYENGINE_UNROLL
      for (int c = 0; c < panel_columns; ++c) {
        NativeFloat weight = detail::load_part(w + lanes * c);
        detail::pin_part(weight);
        PYENGINE_UNROLL
        for (int r = 0; r < rows; ++r) {
          acc[r][c] = detail::fma_part(row[r], weight, acc[r][c]);
        }
      }
      w += lanes * panel_columns;
      values += pitch;
    } while (--left > 0);
    PYENGINE_UNROLL
    for (int r = 0; r < rows; ++r) {
      PYENGINE_UNROLL
      for (int c = 0; c < panel_columns; ++c) {
        detail::store_part(at + lanes * (r * panel_columns + c), acc[r][c]);
      }
    }
  }
}

// Sums of M rows and columns [begin, end) to `sums` [M, end - begin].
// unpack(n, k, count, ahead, panel) writes weights [k, k + count) of column n
// as float32, every sixteen of them panel_columns * 16 floats after the last,
// and returns how many times sixteen these are. It prefetches what lies `ahead`
// weights further on.
template <typename Unpack>
PYENGINE_INLINE void multiply_blocks(
    int M,
    int K,
    const float* x,
    int begin,
    int end,
    float* sums,
    const Unpack& unpack) {
  alignas(64) float panel[panel_columns * block_k];
  alignas(64) float acc[block_columns * max_rows * lanes];
  // Shorter tiles, then from a row on some that are one row taller. Divided
  // here: within the loops a division holds up all that follows it.
  int tiles = (M + panel_rows - 1) / panel_rows;
  int shorter = M / tiles;
  int taller_from = shorter * (tiles - M % tiles);
  int wide = end - begin;
  for (int from = begin; from < end; from += block_columns) {
    int columns = end - from < block_columns ? end - from : block_columns;
    int panels = (columns + panel_columns - 1) / panel_columns;
    if (K == 0) { // sums of nothing, which no block begins
      memset(acc, 0, sizeof(acc));
    }
    for (int k = 0; k < K; k += block_k) {
      int count = K - k < block_k ? K - k : block_k;
      // The column's next block, or the first one of a column that follows, is
      // due when this one has been multiplied with all rows, and so have those
      // of the other columns.
      int64_t ahead =
          k + block_k < K ? block_k : block_columns * int64_t(K) - k;
      for (int p = 0; p < panels; ++p) {
        int steps = 0;
        PYENGINE_UNROLL
        for (int c = 0; c < panel_columns; ++c) {
          int n = from + p * panel_columns + c;
          n = n < end ? n : end - 1;
          steps = unpack(n, k, count, ahead, panel + lanes * c);
        }
        for (int m = 0, rows; m < M; m += rows) {
          rows = m < taller_from ? shorter : shorter + 1;
          with_constant<panel_rows>(rows, [&](auto constant) {
            multiply_panel<constant.value>(
                panel,
                x + (int64_t(k) * M + lanes * m),
                lanes * M,
                steps,
                k == 0,
                acc + (p * M + m) * panel_columns * lanes);
          });
        }
      }
    }
    for (int p = 0; p < panels; ++p) {
      for (int m = 0; m < M; ++m) {
        const float* at = acc + (p * M + m) * panel_columns * lanes;
        F32x16 lane_sums[panel_columns];
        PYENGINE_UNROLL
        for (int c = 0; c < panel_columns; ++c) {
          lane_sums[c] = load(at + lanes * c);
        }
        float results[panel_columns];
        pyengine::PYENGINE_ISA::sums(lane_sums, results);
        int first = from - begin + p * panel_columns;
        for (int c = 0; c < panel_columns && first + c < wide; ++c) {
          sums[m * wide + first + c] = results[c];
        }
      }
    }
  }
}

} // namespace pyengine::PYENGINE_ISA
