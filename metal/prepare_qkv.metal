// prepare_qkv: norm and rotary embedding of queries and keys, norm of values
// where it is asked for, keys and values straight to their place in a page: one
// launch for the rows of all sequences.
//
// One simdgroup per head (rope.h), one threadgroup per four heads of a row: the
// queries, then each key head and its value head, which are neighbours because
// both read the same bytes where keys double as values. Rows of a call have
// places of their own, so no two threads write the same byte; the arenas are
// never read. A simdgroup that writes looks its page up itself: two loads of
// one number each, next to a head.
//
// Limits: D even, at most 1024; all arrays on two elements.
#include "rope.h"

namespace pyengine {

// Whether rows go to other places than those of their positions.
constant bool has_slots [[function_constant(0)]];

template <typename T>
[[kernel, max_total_threads_per_threadgroup(128)]] void prepare_qkv(
    const device T* q [[buffer(0)]], // [R, H, D]
    const device T* k [[buffer(1)]], // [R, K, D]
    const device T* v [[buffer(2)]], // [R, K, D]
    const device T* q_norm [[buffer(3)]], // [D]
    const device T* k_norm [[buffer(4)]], // [D]
    const device float* inv_freq [[buffer(5)]], // [D / 2]
    const device int* positions [[buffer(6)]], // [R]
    const device int* owners [[buffer(7)]], // [R]
    const device int* tables [[buffer(8)]], // [Q, N]
    device T* out [[buffer(9)]], // [R, H, D]
    device T* keys [[buffer(10)]], // [P, K, 64, D]
    device T* values [[buffer(11)]], // [P, K, 64, D]
    constant uint& H [[buffer(12)]],
    constant uint& K [[buffer(13)]],
    constant uint& D [[buffer(14)]],
    constant uint& P [[buffer(15)]],
    constant uint& Q [[buffer(16)]],
    constant uint& N [[buffer(17)]],
    constant float& eps [[buffer(18)]],
    constant uint& norm_values [[buffer(19)]],
    const device int* slots [[buffer(20), function_constant(has_slots)]], // [R]
    threadgroup float* normed [[threadgroup(0)]], // [heads of a group, D]
    uint2 group [[threadgroup_position_in_grid]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  uint row = group.y;
  uint task = group.x * simds + simd;
  int position = positions[row];
  normed += simd * D;

  if (task < H) {
    ulong begin = (ulong(row) * H + task) * D;
    device T* to = out + begin;
    rotate_head(
        q + begin, q_norm, inv_freq, to, normed, position, D, eps, lane);
    return;
  }
  uint head = (task - H) / 2;
  if (head >= K) {
    return;
  }
  ulong from = (ulong(row) * K + head) * D;
  int slot = has_slots ? slots[row] : position;
  int page = page_of(tables, Q, N, P, owners[row], slot);
  if (page < 0) {
    return;
  }
  ulong line = (ulong(page) * K + head) * page_size;
  ulong place = (line + slot % page_size) * D;
  if ((task - H) % 2 == 0) {
    device T* to = keys + place;
    rotate_head(k + from, k_norm, inv_freq, to, normed, position, D, eps, lane);
    return;
  }
  Piece piece(0, D, lane);
  float2 head_values[pairs];
  float inverse = load_head(v + from, head_values, piece, eps);
  float scale = norm_values ? inverse : 1.0f;
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    if (piece.live(i)) {
      piece.store(values + place, i, head_values[i] * scale);
    }
  }
}

INSTANTIATE("prepare_qkv_float32", prepare_qkv, float)
INSTANTIATE("prepare_qkv_float16", prepare_qkv, half)
INSTANTIATE("prepare_qkv_bfloat16", prepare_qkv, bfloat)

} // namespace pyengine
