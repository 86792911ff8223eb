// residual_norm: sum = (h + norm(y) * weight) * scalar and, where it is wanted,
// the next norm of the rounded sum. h and y are read once, and the sum is not
// read back.
//
// Two launches of rms_norm and three of plain arithmetic would read five rows;
// this reads two. A threadgroup owns a row, each of its simdgroups a piece of
// 1024 elements: of y, then of the sum, in the same registers.
//
// Limits: E at most 16384; for an even E all arrays start on whole pairs.
#include "norm.h"
#include "ordered_sum.h"

constant bool has_next [[function_constant(0)]];

namespace pyengine {

template <typename T>
[[kernel, max_total_threads_per_threadgroup(512)]] void residual_norm(
    const device T* h [[buffer(0)]], // [rows, E]
    const device T* y [[buffer(1)]], // [rows, E]
    const device T* weight [[buffer(2)]], // [E]
    const device T* scalar [[buffer(3)]], // [1]
    device T* sum [[buffer(4)]], // [rows, E]
    constant uint& E [[buffer(5)]],
    constant uint& scaled [[buffer(6)]], // else scalar is not read
    constant float& eps [[buffer(7)]],
    constant float& minus_zero [[buffer(8)]],
    const device T* next_weight [[buffer(9), function_constant(has_next)]],
    device T* next [[buffer(10), function_constant(has_next)]], // [rows, E]
    uint row [[threadgroup_position_in_grid]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[2][max_pieces];
  Piece piece(simd, E, lane);
  ulong begin = ulong(row) * E;
  float scale = scaled ? float(*scalar) : 1.0f;

  // All that the sum needs is asked for before the first wait
  Pairs<T> loaded = piece.load(y + begin);
  Pairs<T> stream = piece.load(h + begin);
  Pairs<T> factors = piece.load(weight);
  float2 values[pairs];
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    values[i] = loaded.pair(i);
  }
  float inverse = inverse_rms(values, sums[0], E, eps, simd, simds, lane);

  // Add
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    if (piece.live(i)) {
      float2 factor = factors.pair(i), before = stream.pair(i);
      float2 normed = values[i] * inverse;
      float2 total;
#pragma unroll
      for (ushort c = 0; c < 2; ++c) {
        // A product of its own, as in rms_norm: no compiler may fuse it
        float branch = product(normed[c], factor[c], minus_zero);
        total[c] = float(T((before[c] + branch) * scale));
      }
      piece.store(sum + begin, i, total);
      values[i] = total;
    }
  }

  // Norm what was written
  if (has_next) {
    factors = piece.load(next_weight);
    inverse = inverse_rms(values, sums[1], E, eps, simd, simds, lane);
#pragma unroll
    for (ushort i = 0; i < pairs; ++i) {
      if (piece.live(i)) {
        float2 normed = values[i] * inverse * factors.pair(i);
        piece.store(next + begin, i, normed);
      }
    }
  }
}

INSTANTIATE("residual_norm_float32", residual_norm, float)
INSTANTIATE("residual_norm_float16", residual_norm, half)
INSTANTIATE("residual_norm_bfloat16", residual_norm, bfloat)

} // namespace pyengine
