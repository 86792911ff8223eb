// dense_matmul_cpu: out[m, n] = sum over k of x[m, k] * w[n, k].
//
// Tiles, blocks and the order of the sums are those of
// quantized_matmul_cpu.cpp: sixteen lanes over k in ascending order, then a
// fixed tree, whatever the number of rows or threads.

#include "ops/dense_matmul_cpu.h"

#include "cpu/blocked.h"
#include "cpu/lanes.h"
#include "cpu/tiles.h"

namespace pyengine::PYENGINE_ISA {

namespace {

// The columns that a thread works on, [begin, end), and their float32 sums.
struct Group {
  int begin;
  int end;
  float* sums; // [M, end - begin]
};

// All rows of `columns` columns from n on. At the end of the group
// the last column is computed again in place of those that are missing.
template <typename T, int rows, int columns>
void multiply_tile(const DenseMatmulArgs& args, const Group& group, int n) {
  int K = args.K;
  const float* x = args.x;
  int column[columns];
  const T* w[columns];
  PYENGINE_UNROLL
  for (int c = 0; c < columns; ++c) {
    column[c] = n + c < group.end ? n + c : group.end - 1;
    w[c] = static_cast<const T*>(args.w) + column[c] * int64_t(K);
  }
  // As in quantized_matmul_cpu.cpp: the next tile's weights arrive meanwhile.
  int64_t ahead = n + 2 * columns <= group.end ? columns * int64_t(K) : 0;
  F32x16 acc[rows * columns] = {};
  F32x16 weights[columns];

  int k = 0;
  for (; k + lanes <= K; k += lanes, x += lanes * rows) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      weights[c] = load(w[c] + k);
      prefetch(w[c] + k + ahead);
    }
    multiply_step<rows, columns>(weights, x, acc);
  }
  if (k < K) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      weights[c] = load(w[c] + k, K - k);
    }
    multiply_step<rows, columns>(weights, x, acc);
  }

  float results[rows * columns];
  sums(acc, results);
  float* to = group.sums - group.begin;
  PYENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      to[r * (group.end - group.begin) + column[c]] = results[r * columns + c];
    }
  }
}

// Weights [k, k + count) of some columns for multiply_blocks().
template <typename T, typename Take>
PYENGINE_INLINE void widen_columns(
    const DenseMatmulArgs& args,
    const int (&n)[panel_columns],
    int k,
    int count,
    int64_t ahead,
    const Take& take) {
  const T* w[panel_columns];
  PYENGINE_UNROLL
  for (int c = 0; c < panel_columns; ++c) {
    w[c] = static_cast<const T*>(args.w) + n[c] * int64_t(args.K) + k;
  }
  F32x16 weights[panel_columns];
  int done = 0;
  for (; done + lanes <= count; done += lanes) {
    PYENGINE_UNROLL
    for (int c = 0; c < panel_columns; ++c) {
      weights[c] = load(w[c] + done);
      prefetch(w[c] + done + ahead);
    }
    take(weights);
  }
  if (done < count) {
    PYENGINE_UNROLL
    for (int c = 0; c < panel_columns; ++c) {
      weights[c] = load(w[c] + done, count - done);
    }
    take(weights);
  }
}

} // namespace

void dense_matmul_columns(
    const DenseMatmulArgs& args,
    int begin,
    int end,
    float* scratch) {
  Group group = {begin, end, scratch};
  with_storage(args.storage, [&]<typename T>(T*) {
    if (args.M > tile_rows) {
      return multiply_blocks(
          args.M, args.K, args.x, begin, end, scratch, [&](auto&&... block) {
            widen_columns<T>(args, block...);
          });
    }
    for_tiles(args.M, begin, end, [&](auto tile, int n) {
      multiply_tile<T, tile.rows, tile.columns>(args, group, n);
    });
  });
  store_columns(args, begin, end, scratch);
}

} // namespace pyengine::PYENGINE_ISA
