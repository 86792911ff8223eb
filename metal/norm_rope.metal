// norm_rope: RMSNorm over each head, then half-split rotary embedding.
//
// One simdgroup per head (rope.h); four heads of a row share a
// threadgroup, and so what they read of weight and inv_freq.
//
// Limits: D even, at most 1024; x, weight and out on two elements.
#include "rope.h"

namespace pyengine {

template <typename T>
[[kernel, max_total_threads_per_threadgroup(128)]] void norm_rope(
    const device T* x [[buffer(0)]], // [R, H, D]
    const device T* weight [[buffer(1)]], // [D]
    const device int* positions [[buffer(2)]], // [R]
    const device float* inv_freq [[buffer(3)]], // [D / 2]
    device T* out [[buffer(4)]], // [R, H, D]
    constant uint& H [[buffer(5)]],
    constant uint& D [[buffer(6)]],
    constant float& eps [[buffer(7)]],
    threadgroup float* normed [[threadgroup(0)]], // [heads of a group, D]
    uint2 group [[threadgroup_position_in_grid]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  uint head = group.x * simds + simd;
  if (head >= H) {
    return;
  }
  uint row = group.y;
  ulong begin = (ulong(row) * H + head) * D;
  rotate_head(
      x + begin,
      weight,
      inv_freq,
      out + begin,
      normed + simd * D,
      positions[row],
      D,
      eps,
      lane);
}

INSTANTIATE("norm_rope_float32", norm_rope, float)
INSTANTIATE("norm_rope_float16", norm_rope, half)
INSTANTIATE("norm_rope_bfloat16", norm_rope, bfloat)

} // namespace pyengine
