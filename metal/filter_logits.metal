// filter_logits: rows of logits to their candidates, in two launches that read
// the logits once.
//
// filter_logits: a threadgroup owns a slice of 4096 logits of a row, in
// registers, and writes its best `count`: loads of 16 bytes, side by side.
// merge_candidates: a threadgroup takes the lists of a row's slices, and the
// first simdgroup turns the best into probabilities. Its sums run over the
// candidates one after the other, as the definition has them, by shuffles: 256
// additions take less time than a tree of barriers would.
//
// The lists cost count / 4096 of the bytes of the logits twice over, written
// and read: 6 % at a count of 64. Rows are independent; so are the candidates
// of a row of how it is cut.
//
// Edits are applied in threadgroup memory. Each threadgroup looks through all
// their ids, which are few, and nothing needs them sorted.
//
// Limits: count at most 256; slices * count at most 16384.
#include "filter.h"

using namespace pyengine;

constant bool has_edits [[function_constant(0)]];
constant bool aligned [[function_constant(1)]]; // rows start on 16 bytes

constant constexpr ushort slice_items = 16;
constant constexpr ushort slice_threads = 256;
constant constexpr uint slice_size = slice_items * slice_threads;
constant constexpr ushort max_count = 256;

// Where item i of a thread lies in the slice.
inline uint item_at(ushort i, ushort thread_index) {
  return (i / 4 * slice_threads + thread_index) * 4 + i % 4;
}

[[kernel]] void filter_logits(
    const device float* logits [[buffer(0)]], // [T, V]
    const device int* edit_ids [[buffer(1)]], // [L]
    const device float* factors [[buffer(2)]], // [T, L]
    const device float* deltas [[buffer(3)]], // [T, L]
    device ulong* candidates [[buffer(4)]], // [T, slices, count]
    device uint* slice_flags [[buffer(5)]], // [T, slices]
    constant uint& V [[buffer(6)]],
    constant uint& L [[buffer(7)]],
    constant uint& count [[buffer(8)]],
    constant float& temperature [[buffer(9)]],
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

  // Load
  float4 quads[slice_items / 4];
  uint flag = 0;
#pragma unroll
  for (ushort j = 0; j < slice_items / 4; ++j) {
    uint id = begin + item_at(4 * j, thread_index);
    quads[j] = 0.0f;
    if (aligned) {
      if (id < V) {
        quads[j] = *(const device float4*)(row + id);
      }
    } else {
      for (ushort c = 0; c < 4; ++c) {
        if (id + c < V) {
          quads[j][c] = row[id + c];
        }
      }
    }
    for (ushort c = 0; c < 4; ++c) {
      flag = max(flag, flag_of(quads[j][c]));
    }
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
      uint id = edit_ids[e];
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

  // Select
  ulong entries[slice_items];
#pragma unroll
  for (ushort i = 0; i < slice_items; ++i) {
    uint id = begin + item_at(i, thread_index);
    ulong entry = entry_of(quads[i / 4][i % 4] / temperature, id);
    entries[i] = id < V ? entry : no_entry;
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

// Candidates of one lane: lane, lane + 32, ...
typedef float Weights[max_count / 32];

// Adds the weights of a simdgroup's candidates one after the other, from 0 on.
// `before`: what was added before each.
inline float sum_in_order(
    thread const Weights& weights,
    thread Weights& before,
    uint count,
    ushort lane) {
  float sum = 0.0f;
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    if (32u * j < count) {
      for (ushort i = 0; i < 32; ++i) {
        before[j] = i == lane ? sum : before[j];
        sum += simd_shuffle(weights[j], i);
      }
    }
  }
  return sum;
}

[[kernel]] void merge_candidates(
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
  ulong entries[slice_items];
#pragma unroll
  for (ushort i = 0; i < slice_items; ++i) {
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
  float sum = sum_in_order(weights, before, count, lane);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    weights[j] /= sum;
  }

  // The smallest prefix whose preceding mass is below top_p; then min_p
  sum_in_order(weights, before, count, lane);
  float least = min_p * simd_shuffle(weights[0], 0);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    bool keep = (top_p >= 1.0f || before[j] < top_p) && weights[j] >= least;
    weights[j] = keep ? weights[j] : 0.0f;
  }
  sum = sum_in_order(weights, before, count, lane);
#pragma unroll
  for (ushort j = 0; j < max_count / 32; ++j) {
    uint i = 32 * j + lane;
    if (i < count) {
      ids[row * count + i] = int(uint(best[i]));
      probs[row * count + i] = weights[j] / sum;
    }
  }
}
