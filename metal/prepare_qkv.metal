// prepare_qkv: norm and rotary embedding of queries and keys, norm of values,
// keys and values straight to their slot of the cache: one launch where there
// would be five of these kernels.
//
// One simdgroup per head (rope.h), one threadgroup per four heads of a
// position: the queries, then each key head and its value head, which are
// neighbours because both read the same bytes where keys double as values.
// Positions of a call have slots of their own, so no two threads write the same
// byte; the cache is never read.
//
// Limits: D even, at most 1024; T at most C; all arrays on two elements.
#include "rope.h"

namespace pyengine {

template <typename T>
[[kernel, max_total_threads_per_threadgroup(128)]] void prepare_qkv(
    const device T* q [[buffer(0)]], // [T, H, D]
    const device T* k [[buffer(1)]], // [T, K, D]
    const device T* v [[buffer(2)]], // [T, K, D]
    const device T* q_norm [[buffer(3)]], // [D]
    const device T* k_norm [[buffer(4)]], // [D]
    const device float* inv_freq [[buffer(5)]], // [D / 2]
    const device int* offset [[buffer(6)]], // []
    device T* out [[buffer(7)]], // [T, H, D]
    device T* keys [[buffer(8)]], // [K, C, D]
    device T* values [[buffer(9)]], // [K, C, D]
    constant uint& H [[buffer(10)]],
    constant uint& K [[buffer(11)]],
    constant uint& C [[buffer(12)]],
    constant uint& D [[buffer(13)]],
    constant float& eps [[buffer(14)]],
    threadgroup float* normed [[threadgroup(0)]], // [heads of a group, D]
    uint2 group [[threadgroup_position_in_grid]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  uint t = group.y;
  uint task = group.x * simds + simd;
  int position = position_at(*offset, t);
  normed += simd * D;

  if (task < H) {
    ulong begin = (ulong(t) * H + task) * D;
    device T* to = out + begin;
    rotate_head(
        q + begin, q_norm, inv_freq, to, normed, position, D, eps, lane);
    return;
  }
  uint head = (task - H) / 2;
  if (head >= K) {
    return;
  }
  ulong from = (ulong(t) * K + head) * D;
  ulong slot = (ulong(head) * C + slot_of_row(*offset, t, C)) * D;
  if ((task - H) % 2 == 0) {
    device T* to = keys + slot;
    rotate_head(k + from, k_norm, inv_freq, to, normed, position, D, eps, lane);
    return;
  }
  Piece piece(0, D, lane);
  float2 head_values[pairs];
  float inverse = load_head(v + from, head_values, piece, eps);
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    if (piece.live(i)) {
      piece.store(values + slot, i, head_values[i] * inverse);
    }
  }
}

INSTANTIATE("prepare_qkv_float32", prepare_qkv, float)
INSTANTIATE("prepare_qkv_float16", prepare_qkv, half)
INSTANTIATE("prepare_qkv_bfloat16", prepare_qkv, bfloat)

} // namespace pyengine
