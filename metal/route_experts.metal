// route_experts: the experts of a row and their weights, one simdgroup per row.
//
// Every expert counts those ahead of it: a higher logit, or the same and a
// lower id. The chosen ones are lined up by id, 32 at a time; then every lane
// has one of them, and adds all weights in the order of the slots.
// Limits: at most 32 experts of a row.
#include "ordered_sum.h"

namespace pyengine {

[[host_name(
    "route_experts")]] [[kernel, max_total_threads_per_threadgroup(32)]] void
route_experts(
    const device float* logits [[buffer(0)]], // [T, X]
    const device float* scales [[buffer(1)]], // [X]
    device int* ids [[buffer(2)]], // [T, used]
    device float* weights [[buffer(3)]], // [T, used]
    constant uint& X [[buffer(4)]],
    constant uint& used [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup int slots[32];
  const device float* row = logits + ulong(group.x) * X;

  uint found = 0;
  for (uint begin = 0; begin < X; begin += 32) {
    uint mine = begin + lane;
    uint ahead = used;
    if (mine < X) {
      float own = row[mine];
      ahead = 0;
      for (uint other = 0; other < X; ++other) {
        float theirs = row[other];
        ahead += theirs > own || (theirs == own && other < mine);
      }
    }
    ushort chosen = ahead < used;
    uint slot = found + simd_prefix_exclusive_sum(chosen);
    if (chosen && slot < used) { // more are chosen where logits are NaN
      slots[slot] = int(mine);
    }
    found += simd_sum(chosen);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  bool live = lane < used;
  int id = live ? slots[lane] : slots[0];
  float own = row[id];
  float largest = own;
  for (ushort i = 0; i < ushort(used); ++i) {
    float other = simd_shuffle(own, i);
    largest = other > largest ? other : largest;
  }
  float e = live ? pyengine::exp(own - largest) : 0.0f;
  float total = simd_shuffle(e, 0);
  for (ushort i = 1; i < ushort(used); ++i) {
    total += simd_shuffle(e, i);
  }
  if (live) {
    ids[ulong(group.x) * used + lane] = id;
    weights[ulong(group.x) * used + lane] = e / total * scales[id];
  }
}

} // namespace pyengine
