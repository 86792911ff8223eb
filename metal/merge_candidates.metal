// merge_candidates: the candidates of a row's slices to the row's own, with
// their probabilities; the second launch of filter_logits.
//
// A threadgroup takes the lists of a row, and its first simdgroup turns the
// best into probabilities. The sums run over the candidates one after the
// other, as the definition has them, by shuffles: 256 additions take less time
// than a tree of barriers would.
//
// Limits: count at most 256; slices * count at most 16384.
#include "filter.h"
#include "ordered_sum.h"

namespace pyengine {

constant constexpr ushort thread_items = 16;
constant constexpr ushort max_count = 256;

// Candidates of one lane: lane, lane + 32, ...
typedef float Weights[max_count / 32];

// Adds the weights of all candidates; `before`: what was added before each.
inline float sum_of(
    thread const Weights& weights,
    thread Weights& before,
    uint count,
    ushort lane) {
  float sum = 0.0f;
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    if (32u * j < count) {
      sum = add_in_order(sum, weights[j], before[j], lane);
    }
  }
  return sum;
}

[[host_name("merge_candidates")]]
[[kernel, max_total_threads_per_threadgroup(1024)]] void
merge_candidates(
    const device ulong* candidates [[buffer(0)]], // [T, slices, count]
    const device uint* slice_flags [[buffer(1)]], // [T, slices]
    device int* ids [[buffer(2)]], // [T, count]
    device float* probs [[buffer(3)]], // [T, count]
    device int* flags [[buffer(4)]], // [T]
    constant uint& slices [[buffer(5)]],
    constant uint& count [[buffer(6)]],
    constant float& top_p [[buffer(7)]],
    constant float& min_p [[buffer(8)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup Selection<1024> shared;
  threadgroup ulong best[max_count];
  uint row = group.x;
  uint total = slices * count;
  ulong entries[thread_items];
#pragma unroll
  for (ushort i = 0; i < thread_items; ++i) {
    uint at = i * simds * 32u + thread_index;
    entries[i] = at < total ? candidates[ulong(row) * total + at] : no_entry;
  }
  select_best(
      entries,
      count,
      (threadgroup ulong*)best,
      shared,
      thread_index,
      simd,
      simds,
      lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simd > 0) {
    return;
  }

  // Flags: of the logits as given, and of the best as it stands
  float first = logit_of(uint(best[0] >> 32));
  uint flag = flag_of(first) > 0 ? 2 : 0;
  for (uint s = lane; s < slices; s += 32) {
    flag = max(flag, slice_flags[row * slices + s]);
  }
  flag = simd_max(flag);
  if (lane == 0) {
    flags[row] = flag;
  }

  // Softmax
  Weights weights, before;
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    uint i = 32 * j + lane;
    weights[j] = 0.0f;
    if (i < count) {
      weights[j] = pyengine::exp(logit_of(uint(best[i] >> 32)) - first);
    }
  }
  float sum = sum_of(weights, before, count, lane);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    weights[j] /= sum;
  }

  // The smallest prefix whose preceding mass is below top_p; then min_p
  sum_of(weights, before, count, lane);
  float least = min_p * simd_shuffle(weights[0], 0);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    bool keep = (top_p >= 1.0f || before[j] < top_p) && weights[j] >= least;
    weights[j] = keep ? weights[j] : 0.0f;
  }
  sum = sum_of(weights, before, count, lane);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    uint i = 32 * j + lane;
    if (i < count) {
      ids[row * count + i] = int(uint(best[i]));
      probs[row * count + i] = weights[j] / sum;
    }
  }
}

} // namespace pyengine
