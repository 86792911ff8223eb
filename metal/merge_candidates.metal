// merge_candidates: the candidates of a row's slices to the row's own, with
// their probabilities; the second launch of filter_logits.
//
// A threadgroup takes the lists of a row, which are in order, so that a thread
// need hold none of them: it looks at the first entry of a list, or of each
// second one of a list and so on where there are more threads than lists. The
// `count` best of those bound what the rest is searched for: of 256 lists of 64
// random logits some 65 entries are left. 512 threads thus take few registers
// each; 1024 that held 16 entries each would take twice those that an M1 has.
//
// The first simdgroup turns the best into probabilities. The sums run over the
// candidates one after the other, as the definition has them, by shuffles: 256
// additions take less time than a tree of barriers would.
//
// Rows of several sequences have settings of their own: past the top_k of its
// sequence a row has the id -1 and probability 0.
//
// Limits: count at most 256.
#include "filter.h"
#include "ordered_sum.h"

namespace pyengine {

constant constexpr ushort max_threads = 512;
constant constexpr ushort max_count = 256;

// What a thread looks at: of lists `first`, first + hop, ... of `count` entries
// each, in order, those at part, part + parts, ...
struct Lists {
  const device ulong* entries; // [lists, count]
  threadgroup uint4* heads; // one number per thread
  uint lists;
  uint count;
  uint parts;
  uint first;
  uint hop;
  uint part;

  Lists(
      const device ulong* entries,
      threadgroup uint4* heads,
      uint lists,
      uint count,
      uint thread_index,
      uint threads)
      : entries(entries),
        heads(heads),
        lists(lists),
        count(count) {
    parts = clamp(threads / lists, 1u, count);
    first = thread_index / parts;
    hop = threads / parts;
    part = thread_index % parts;
  }

  // Entries of a list that are this thread's.
  uint size() const {
    return (count - part + parts - 1) / parts;
  }
  ulong at(uint list, uint i) const {
    return entries[list * count + i * parts + part];
  }

  // Of one list, how many come before a trial one.
  uint below(uint list, ulong trial) const {
    uint low = 0, high = size();
    while (low < high) {
      uint middle = (low + high) / 2;
      bool before = at(list, middle) < trial;
      low = before ? middle + 1 : low;
      high = before ? high : middle;
    }
    return low;
  }
  uint below(ulong trial) const {
    uint found = 0;
    for (uint list = first; list < lists; list += hop) {
      found += below(list, trial);
    }
    return found;
  }

  // Writes those up to a limit to to[at], to[at + 1], ...
  void write(ulong limit, threadgroup ulong* to, uint at, ushort room) const {
    for (uint list = first; list < lists; list += hop) {
      for (uint i = 0; i < size(); ++i) {
        ulong entry = this->at(list, i);
        if (entry > limit || entry == no_entry) {
          break;
        }
        if (at < room) {
          to[at] = entry;
        }
        ++at;
      }
    }
  }

  // A key that at least `count` entries do not exceed, and few others: so many
  // threads have their best one there.
  uint bound(
      uint,
      threadgroup uint* parts_of_group,
      ushort simd,
      ushort simds,
      ushort lane) const {
    uint own = 0xffffffffu;
    for (uint list = first; list < lists; list += hop) {
      own = min(own, uint(at(list, 0) >> 32));
    }
    ushort threads = simds * 32;
    ((threadgroup uint*)heads)[simd * 32 + lane] = own;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint4 better = 0;
    for (ushort i = 0; i < threads / 4; ++i) {
      better += select(uint4(0), uint4(1), heads[i] < uint4(own));
    }
    uint rank = (better.x + better.y) + (better.z + better.w);
    bool enough = min(threads / parts, lists) * parts >= count;
    uint highest = enough ? simd_max(rank < count ? own : 0) : 0xffffffffu;
    return group_max(highest, parts_of_group, simd, simds, lane);
  }
};

// Adds the weights of all candidates, of which a lane has lane, lane + 32, ...;
// `before`: what was added before each.
inline float sum_of(
    thread const float (&weights)[max_count / 32],
    thread float (&before)[max_count / 32],
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
[[kernel, max_total_threads_per_threadgroup(512)]] void
merge_candidates(
    const device ulong* candidates [[buffer(0)]], // [R, slices, count]
    const device uint* slice_flags [[buffer(1)]], // [R, slices]
    const device int* owners [[buffer(2)]], // [R]
    const device int* top_k [[buffer(3)]], // [Q]
    const device float* top_ps [[buffer(4)]], // [Q]
    const device float* min_ps [[buffer(5)]], // [Q]
    device int* ids [[buffer(6)]], // [R, count]
    device float* probs [[buffer(7)]], // [R, count]
    device int* flags [[buffer(8)]], // [R]
    constant uint& slices [[buffer(9)]],
    constant uint& count [[buffer(10)]],
    constant uint& Q [[buffer(11)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup Selection<1024> shared;
  threadgroup ulong best[max_count];
  threadgroup uint4 heads[max_threads / 4];
  uint row = group.x;
  Lists entries(
      candidates + ulong(row) * slices * count,
      heads,
      slices,
      count,
      thread_index,
      simds * 32);
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

  // The row's own settings, and as many candidates as it wants
  uint owner = owner_of(owners, row, Q);
  float top_p = top_ps[owner], min_p = min_ps[owner];
  uint kept = top_k[owner] > 0 ? min(uint(top_k[owner]), count) : count;

  // Softmax
  float weights[max_count / 32], before[max_count / 32];
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    uint i = 32 * j + lane;
    weights[j] = 0.0f;
    if (i < kept) {
      weights[j] = pyengine::exp(logit_of(uint(best[i] >> 32)) - first);
    }
  }
  float sum = sum_of(weights, before, kept, lane);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    weights[j] /= sum;
  }

  // The smallest prefix whose preceding mass is below top_p; then min_p
  sum_of(weights, before, kept, lane);
  float least = min_p * simd_shuffle(weights[0], 0);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    bool keep = (top_p >= 1.0f || before[j] < top_p) && weights[j] >= least;
    weights[j] = keep ? weights[j] : 0.0f;
  }
  sum = sum_of(weights, before, kept, lane);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    uint i = 32 * j + lane;
    if (i < count) {
      ids[row * count + i] = i < kept ? int(uint(best[i])) : -1;
      probs[row * count + i] = i < kept ? weights[j] / sum : 0.0f;
    }
  }
}

} // namespace pyengine
