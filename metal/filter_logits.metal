// filter_logits: rows of logits to the candidates of slices, which
// merge_candidates.metal merges; both together read the logits once.
//
// A threadgroup owns a slice of 4096 logits of a row, in registers, and writes
// its best `count`: loads of 16 bytes, side by side. The lists are written and
// read again, each count / 2048 of the bytes of the logits: 3 % at a count of
// 64. Rows are independent, and the candidates of a row do not depend on how it
// is cut.
//
// Edits are applied in threadgroup memory. Each threadgroup looks through all
// their ids, which are few, and nothing needs them sorted. A mask is read
// beside the logits, a bit for each: a 32nd of their bytes.
//
// Limits: count at most 256.
#include "filter.h"

constant bool has_edits [[function_constant(0)]];
constant bool aligned [[function_constant(1)]]; // rows start on 16 bytes
constant bool has_mask [[function_constant(2)]];

namespace pyengine {

constant constexpr ushort slice_items = 16;
constant constexpr ushort slice_threads = 256;
constant constexpr uint slice_size = slice_items * slice_threads;

// Where item i of a thread lies in the slice.
inline uint item_at(ushort i, ushort thread_index) {
  return (i / 4 * slice_threads + thread_index) * 4 + i % 4;
}

[[host_name(
    "filter_logits")]] [[kernel, max_total_threads_per_threadgroup(256)]] void
filter_logits(
    const device float* logits [[buffer(0)]], // [R, V]
    device ulong* candidates [[buffer(1)]], // [R, slices, count]
    device uint* slice_flags [[buffer(2)]], // [R, slices]
    constant uint& V [[buffer(3)]],
    constant uint& count [[buffer(4)]],
    constant uint& Q [[buffer(5)]],
    const device int* owners [[buffer(6)]], // [R]
    const device float* temperatures [[buffer(7)]], // [Q]
    const device uint* mask [[buffer(8), function_constant(has_mask)]],
    const device int* edit_ids [[buffer(9), function_constant(has_edits)]],
    const device float* factors [[buffer(10), function_constant(has_edits)]],
    const device float* deltas [[buffer(11), function_constant(has_edits)]],
    constant uint& L [[buffer(12), function_constant(has_edits)]],
    threadgroup float4* staged [[threadgroup(0)]], // a slice; with edits only
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup Selection<512> shared;
  threadgroup uint flags[slice_threads / 32];
  uint begin = group.x * slice_size; // first id of the slice
  const device float* row = logits + ulong(group.y) * V;
  uint owner = owner_of(owners, group.y, Q);
  float temperature = temperatures[owner];

  // Load
  float4 quads[slice_items / 4];
  uint flag = 0;
  if (aligned && begin + slice_size <= V) {
#pragma unroll
    for (ushort j = 0; j < slice_items / 4; ++j) {
      uint id = begin + item_at(4 * j, thread_index);
      quads[j] = *(const device float4*)(row + id);
    }
  } else {
#pragma unroll
    for (ushort j = 0; j < slice_items / 4; ++j) {
#pragma unroll
      for (ushort c = 0; c < 4; ++c) {
        uint id = begin + item_at(4 * j, thread_index) + c;
        quads[j][c] = id < V ? row[id] : 0.0f;
      }
    }
  }
#pragma unroll
  for (ushort i = 0; i < slice_items; ++i) {
    flag = max(flag, flag_of(quads[i / 4][i % 4]));
  }
  flag = simd_max(flag);
  if (lane == 0) {
    flags[simd] = flag;
  }

  // Edit. The same edit may stand twice, so it starts from the logit in memory.
  if (has_edits) {
#pragma unroll
    for (ushort j = 0; j < slice_items / 4; ++j) {
      staged[item_at(4 * j, thread_index) / 4] = quads[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = thread_index; e < L; e += slice_threads) {
      uint id = edit_ids[ulong(owner) * L + e];
      if (id >= begin && id < min(begin + slice_size, V)) {
        ulong at = ulong(group.y) * L + e;
        float value = edited(row[id], factors[at], deltas[at]);
        atomic_store_explicit(
            (threadgroup atomic_uint*)staged + (id - begin),
            as_type<uint>(value),
            memory_order_relaxed);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (ushort j = 0; j < slice_items / 4; ++j) {
      quads[j] = staged[item_at(4 * j, thread_index) / 4];
    }
  }

  // Select. A quad of logits has its bits in one word.
  const device uint* words = has_mask ? mask_of(mask, group.y, V) : nullptr;
  Held<slice_items> entries;
#pragma unroll
  for (ushort j = 0; j < slice_items / 4; ++j) {
    uint quad = begin + item_at(4 * j, thread_index);
    uint allowed = has_mask && quad < V ? allowed_from(words, quad) : 15;
#pragma unroll
    for (ushort c = 0; c < 4; ++c) {
      uint id = quad + c;
      float scaled = quads[j][c] / temperature;
      ulong entry = entry_of(allowed >> c & 1 ? scaled : -INFINITY, id);
      entries.of[4 * j + c] = id < V ? entry : no_entry;
    }
  }
  uint slice = group.y * groups.x + group.x;
  select_best(
      entries,
      count,
      candidates + ulong(slice) * count,
      shared,
      thread_index,
      simd,
      simds,
      lane);
  if (thread_index == 0) { // flags were written before a barrier
    for (ushort s = 0; s < slice_threads / 32; ++s) {
      flag = max(flag, flags[s]);
    }
    slice_flags[slice] = flag;
  }
}

} // namespace pyengine
