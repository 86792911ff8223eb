// rms_norm: x / sqrt(mean(x^2) + eps) * weight, each row read once.
//
// A threadgroup owns a row, each of its simdgroups a piece of 1024 elements,
// which stay in registers between the sum and the product.
//
// Limits: D at most 16384; for an even D all arrays start on whole pairs.
#include "norm.h"

namespace pyengine {

template <typename T>
[[kernel, max_total_threads_per_threadgroup(512)]] void rms_norm(
    const device T* x [[buffer(0)]], // [rows, D]
    const device T* weight [[buffer(1)]], // [D]
    device T* out [[buffer(2)]], // [rows, D]
    constant uint& D [[buffer(3)]],
    constant uint& weighted [[buffer(4)]], // else weight is not read
    constant float& eps [[buffer(5)]],
    uint row [[threadgroup_position_in_grid]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[max_pieces];
  Piece piece(simd, D, lane);
  x += ulong(row) * D;
  out += ulong(row) * D;

  Pairs<T> loaded = piece.load(x), factors;
  if (weighted) {
    factors = piece.load(weight);
  }
  float2 values[pairs];
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    values[i] = loaded.pair(i);
  }
  float inverse = inverse_rms(values, sums, D, eps, simd, simds, lane);
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    if (piece.live(i)) {
      float2 normed = values[i] * inverse;
      if (weighted) {
        normed *= factors.pair(i);
      }
      piece.store(out, i, normed);
    }
  }
}

INSTANTIATE("rms_norm_float32", rms_norm, float)
INSTANTIATE("rms_norm_float16", rms_norm, half)
INSTANTIATE("rms_norm_bfloat16", rms_norm, bfloat)

} // namespace pyengine
