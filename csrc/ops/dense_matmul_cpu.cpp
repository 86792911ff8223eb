// dense_matmul_cpu: out[m, n] = sum over k of x[m, k] * w[n, k].
//
// A few columns at a time stream through their weights once, for all rows of
// the slice. The sums run as in quantized_matmul_cpu.cpp: sixteen lanes over k
// in ascending order, then a fixed tree, whatever the number of rows or
// threads.

#include "ops/dense_matmul_cpu.h"

#include "cpu/simd.h"

namespace pyengine::PYENGINE_ISA {

namespace {

// The columns that a thread works on, [begin, end), and their float32 sums.
struct Group {
  int begin;
  int end;
  float* sums; // [M, end - begin]
};

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

// Rows [m, m + rows) of `columns` columns from n on. At the end of the group
// the last column is computed again in place of those that are missing.
template <typename T, int rows, int columns>
void multiply_tile(
    const DenseMatmulArgs& args,
    const Group& group,
    int m,
    int n) {
  int K = args.K;
  const float* x = args.x + lanes * m;
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
  for (; k + lanes <= K; k += lanes, x += lanes * args.M) {
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
  float* to = group.sums + m * (group.end - group.begin) - group.begin;
  PYENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      to[r * (group.end - group.begin) + column[c]] = results[r * columns + c];
    }
  }
}

// Accumulators fill the registers: 16 of 32 for AVX-512, 8 of 16 for AVX2.
constexpr int tile_rows = native == 16 ? 8 : 4;
constexpr int tile_columns(int rows) {
  return native == 16 ? (rows <= 4 ? 4 : 2) : native == 8 && rows <= 2 ? 2 : 1;
}

template <typename T>
void multiply(const DenseMatmulArgs& args, const Group& group) {
  // Rows beyond one tile read the group's weights again, from the cache.
  int tiles = (args.M + tile_rows - 1) / tile_rows;
  for (int tile = 0; tile < tiles; ++tile) {
    int m = args.M * tile / tiles;
    int rows = args.M * (tile + 1) / tiles - m;
    with_constant<tile_rows>(rows, [&](auto constant) {
      constexpr int tall = constant.value;
      constexpr int wide = tile_columns(tall);
      for (int n = group.begin; n < group.end; n += wide) {
        multiply_tile<T, tall, wide>(args, group, m, n);
      }
    });
  }
}

} // namespace

void dense_matmul_columns(
    const DenseMatmulArgs& args,
    int begin,
    int end,
    float* scratch) {
  Group group = {begin, end, scratch};
  switch (args.storage) {
    case Storage::float32:
      multiply<float>(args, group);
      break;
    case Storage::float16:
      multiply<Half>(args, group);
      break;
    case Storage::bfloat16:
      multiply<BFloat>(args, group);
      break;
  }
  int columns = end - begin;
  for (int m = 0; m < args.M; ++m) {
    int64_t at = int64_t(m) * args.N + begin;
    store(args.out, args.out_storage, at, scratch + m * columns, columns);
  }
}

} // namespace pyengine::PYENGINE_ISA
