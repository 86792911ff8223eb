#pragma once
// blocked.h: the processor's matmuls from a few rows on. A block of weights is
// unpacked once, to float32, and multiplied with all rows of the slice, whose k
// of this block are in the first or the second cache too.
//
// The order of every sum is that of tiles.h: sixteen lanes over k in ascending
// order, then a fixed tree. Only where the lanes wait differs: between two
// blocks of k they lie in memory. Lanes never meet before the end, so a tile
// takes those of one register (all, half or a quarter of the sixteen) through
// its block before it takes the next.

#include "cpu/tiles.h"

namespace pyengine::PYENGINE_ISA {

constexpr int block_columns = 32;
constexpr int panel_columns = 4;

// A block of sixteen rows of x takes 16 KB of the first cache, a panel of
// weights 4 KB; with AVX-512 twice that, for sets of lanes to be written half
// as often. The lanes of a block of columns stay in the second. Zen 4
// multiplies 512 bits once a cycle, not twice, and so the second cache keeps
// up: many rows have longer blocks there.
constexpr int most_block_k = native == 16 ? 4096 : 256;

inline int block_k_of([[maybe_unused]] int M) {
#if defined(__AVX512F__)
  return M > max_rows / 2 && __builtin_cpu_is("amd") ? most_block_k : 512;
#else
  return most_block_k;
#endif
}

// Rows of a tile: there is a register, of 32 or 16, for each of its sums, for
// each row and for one weight.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int panel_rows = 6;
#else
constexpr int panel_rows = 3;
#endif

// Rows that are multiplied while a panel is unpacked: as many as leave
// registers for that. They cost no more than without, for what converts and
// stores works beside what multiplies.
constexpr int first_rows = native == 16 ? 4 : 0;

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

// Unpacks a panel for the other rows, and multiplies the first ones meanwhile.
// Returns how many times sixteen k it has.
template <int rows, typename Unpack>
PYENGINE_INLINE int multiply_first(
    const Unpack& unpack, // (take)
    float* panel,
    const float* x,
    int pitch,
    bool from_zero,
    float* sums) {
  constexpr int count = rows * panel_columns;
  F32x16 acc[count > 0 ? count : 1] = {};
  if (!from_zero) {
    PYENGINE_UNROLL
    for (int i = 0; i < count; ++i) {
      acc[i] = load(sums + lanes * i);
    }
  }
  int steps = 0;
  unpack([&](const F32x16(&weights)[panel_columns]) {
    PYENGINE_UNROLL
    for (int c = 0; c < panel_columns; ++c) {
      store(panel + lanes * c, weights[c]);
    }
    if constexpr (rows > 0) {
      multiply_step<rows, panel_columns>(weights, x, acc);
    }
    panel += lanes * panel_columns;
    x += pitch;
    ++steps;
  });
  PYENGINE_UNROLL
  for (int i = 0; i < count; ++i) {
    store(sums + lanes * i, acc[i]);
  }
  return steps;
}

// Sums of M rows and columns [begin, end) to `sums` [M, end - begin].
// unpack(n, k, count, ahead, take) hands take() weights [k, k + count) of
// columns n[panel_columns] as float32, sixteen of each at a time. It prefetches
// what lies `ahead` weights further on.
template <typename Unpack>
PYENGINE_INLINE void multiply_blocks(
    int M,
    int K,
    const float* x,
    int begin,
    int end,
    float* sums,
    const Unpack& unpack) {
  alignas(64) float panel[panel_columns * most_block_k];
  alignas(64) float acc[block_columns * max_rows * lanes];
  int block_k = block_k_of(M);
  // 8 K weights or more
  int panels_ahead = block_k > 512 ? 1 : block_columns / panel_columns;
  // Shorter tiles, then from a row on some that are one row taller. Divided
  // here: within the loops a division holds up all that follows it.
  int others = M - first_rows;
  int tiles = (others + panel_rows - 1) / panel_rows;
  int shorter = others / tiles;
  int taller_from = M - others % tiles * (shorter + 1);
  int wide = end - begin;
  for (int from = begin; from < end; from += block_columns) {
    int columns = end - from < block_columns ? end - from : block_columns;
    int panels = (columns + panel_columns - 1) / panel_columns;
    if (K == 0) { // sums of nothing, which no block begins
      memset(acc, 0, sizeof(acc));
    }
    for (int k = 0; k < K; k += block_k) {
      int count = K - k < block_k ? K - k : block_k;
      for (int p = 0; p < panels; ++p) {
        int n[panel_columns];
        PYENGINE_UNROLL
        for (int c = 0; c < panel_columns; ++c) {
          n[c] = from + p * panel_columns + c;
          n[c] = n[c] < end ? n[c] : end - 1;
        }
        // What is due soon arrives while this panel is multiplied: one of these
        // columns' other panels, or one of the next k or of the next columns.
        int next = p + panels_ahead;
        int64_t ahead = (next % panels - p) * panel_columns * int64_t(K);
        if (next >= panels) {
          ahead += k + block_k < K ? block_k : columns * int64_t(K) - k;
        }
        auto columns_of = [&](const auto& take) {
          unpack(n, k, count, ahead, take);
        };
        const float* values = x + int64_t(k) * M;
        float* at = acc + p * M * panel_columns * lanes;
        int steps = multiply_first<first_rows>(
            columns_of, panel, values, lanes * M, k == 0, at);
        for (int m = first_rows, rows; m < M; m += rows) {
          rows = m < taller_from ? shorter : shorter + 1;
          with_constant<panel_rows>(rows, [&](auto constant) {
            multiply_panel<constant.value>(
                panel,
                values + lanes * m,
                lanes * M,
                steps,
                k == 0,
                at + m * panel_columns * lanes);
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
