// dense_matmul_cpu: out[m, n] = sum over k of x[m, k] * w[n, k].
//
// A few columns at a time stream through their weights once, for all rows of
// the slice. The sums run as in q8_matmul_cpu.cpp: sixteen lanes over k in
// ascending order, then a fixed tree, whatever the number of rows or threads.

#include "dense_matmul_cpu.h"

#include "simd.h"

namespace pyengine::PYENGINE_ISA {

namespace {

template <int rows, int columns>
PYENGINE_INLINE void multiply_step(
    const F32x16 (&weights)[columns],
    const float* x,
    F32x16 (&acc)[rows][columns]) {
  PYENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    F32x16 values = load(x + lanes * r);
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      acc[r][c] = fma(values, weights[c], acc[r][c]);
    }
  }
}

// Rows [m, m + rows) of columns [n, n + columns); sums of a row are `pitch`
// apart.
template <typename T, int rows, int columns>
void multiply_tile(
    const DenseMatmulArgs& args,
    int m,
    int n,
    float* sums,
    int pitch) {
  int K = args.K;
  const float* x = args.x + lanes * m;
  const T* w = static_cast<const T*>(args.w) + int64_t(n) * K;
  F32x16 acc[rows][columns] = {};
  F32x16 weights[columns];
  int k = 0;
  for (; k + lanes <= K; k += lanes, x += lanes * args.M) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      weights[c] = load(w + c * int64_t(K) + k);
    }
    multiply_step<rows, columns>(weights, x, acc);
  }
  if (k < K) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      weights[c] = load(w + c * int64_t(K) + k, K - k);
    }
    multiply_step<rows, columns>(weights, x, acc);
  }
  PYENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      sums[r * pitch + c] = sum(acc[r][c]);
    }
  }
}

// Accumulators fill the registers: 16 of 32 for AVX-512, 8 of 16 for AVX2.
constexpr int tile_rows = native == 16 ? 8 : 4;
constexpr int tile_columns(int rows) {
  return native == 16 ? (rows <= 4 ? 4 : 2) : native == 8 && rows <= 2 ? 2 : 1;
}

template <typename T>
void multiply(const DenseMatmulArgs& args, int begin, int end, float* sums) {
  int pitch = end - begin;
  // Rows beyond one tile read the group's weights again, from the cache.
  int tiles = (args.M + tile_rows - 1) / tile_rows;
  for (int tile = 0; tile < tiles; ++tile) {
    int m = args.M * tile / tiles;
    int rows = args.M * (tile + 1) / tiles - m;
    with_constant<tile_rows>(rows, [&](auto constant) {
      constexpr int tall = constant.value;
      constexpr int wide = tile_columns(tall);
      float* to = sums + m * pitch;
      int n = begin;
      for (; n + wide <= end; n += wide) {
        multiply_tile<T, tall, wide>(args, m, n, to + n - begin, pitch);
      }
      for (; n < end; ++n) {
        multiply_tile<T, tall, 1>(args, m, n, to + n - begin, pitch);
      }
    });
  }
  for (int m = 0; m < args.M; ++m) {
    int64_t at = int64_t(m) * args.N + begin;
    store(args.out, args.out_storage, at, sums + m * pitch, pitch);
  }
}

} // namespace

void dense_matmul_columns(
    const DenseMatmulArgs& args,
    int begin,
    int end,
    float* scratch) {
  switch (args.storage) {
    case Storage::float32:
      return multiply<float>(args, begin, end, scratch);
    case Storage::float16:
      return multiply<Half>(args, begin, end, scratch);
    case Storage::bfloat16:
      return multiply<BFloat>(args, begin, end, scratch);
  }
}

} // namespace pyengine::PYENGINE_ISA
