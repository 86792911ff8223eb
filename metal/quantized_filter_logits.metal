// quantized_filter_logits: x times a vocabulary matrix, softcapped, edited,
// divided by the temperature, and of each slice of the vocabulary the best
// `count` logits: what merge_candidates.metal makes the row's candidates of. No
// logit reaches device memory.
//
// A threadgroup of 4 simdgroups walks over a slice of the vocabulary, up to 16
// rows at once, 32 columns at a time (64 for 4 bits): the tile of
// quantized_matmul, with the same bits, and each weight read once. A logit that
// may be among the best goes to its row's list in threadgroup memory; when a
// list might not hold the next columns, it is cut down to the best, and the
// worst of those is what later logits have to beat. Of n logits in random order
// some count * (1 + ln(n / count)) enter a list: at a count of 64 a quarter of
// 1024.
//
// Which entries stay follows from their order alone, never from that of the
// threads: no two entries are equal.
//
// Each row has the temperature and the edits of its sequence, and a mask of its
// own. The ids that are edited are looked for once per tile and sequence.
//
// Threadgroup memory: that of quantized_matmul and 6 * room bytes per row. Of
// the 60 KiB or so of a core it takes 15 at 6 rows and a count of 64, so a core
// holds 4 threadgroups, 16 simdgroups; and 30 at 16 rows: 2 and 8, whose
// weights in flight are 16 KiB, still enough by the figures in
// quantized_matmul.metal.
//
// Limits: as quantized_matmul; room at least count + the columns of a tile, at
// most 512; slices of at most 65536 columns.
#include "filter.h"
#include "quantized.h"

constant bool has_softcap [[function_constant(4)]];
constant bool has_edits [[function_constant(5)]];
constant int room [[function_constant(6)]]; // entries of a list
constant bool has_mask [[function_constant(10)]];

namespace pyengine {

constant constexpr ushort group_threads = 128;
constant constexpr ushort max_room = 512;

// What a threadgroup knows of its rows.
struct Rows {
  atomic_uint found[max_rows]; // entries of a list
  ulong limit[max_rows]; // a new one must not exceed it
  atomic_uint flag[max_rows];
  float temperature[max_rows];
  uint owner[max_rows];
};

// The list of a row, in no order. An entry is as in filter.h, but its id counts
// from the start of the slice: six bytes are enough.
struct List {
  threadgroup uint* keys; // [room]
  threadgroup ushort* ids;

  ulong entry(uint i) const {
    return ulong(keys[i]) << 32 | ids[i];
  }
  void set(uint i, ulong entry) {
    keys[i] = uint(entry >> 32);
    ids[i] = ushort(entry);
  }
};

inline uint found_in(threadgroup const Rows& known, ushort m) {
  return atomic_load_explicit(&known.found[m], memory_order_relaxed);
}

// Leaves the best `count` of row m's list, in order, and lowers its limit. All
// threads must come, and none may add entries meanwhile.
inline void cut(
    List list,
    threadgroup Rows& known,
    ushort m,
    uint count,
    ushort thread_index) {
  uint found = found_in(known, m);
  ulong own[max_room / group_threads];
  uint rank[max_room / group_threads];
#pragma unroll
  for (ushort i = 0; i < max_room / group_threads; ++i) {
    uint at = i * group_threads + thread_index;
    if (at < found) {
      own[i] = list.entry(at);
      rank[i] = 0;
      for (uint j = 0; j < found; ++j) {
        rank[i] += list.entry(j) < own[i];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (ushort i = 0; i < max_room / group_threads; ++i) {
    uint at = i * group_threads + thread_index;
    if (at < found && rank[i] < count) {
      list.set(rank[i], own[i]);
      if (rank[i] == count - 1) {
        known.limit[m] = own[i];
      }
    }
  }
  if (thread_index == 0) {
    atomic_store_explicit(
        &known.found[m], min(found, count), memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <typename T, ushort bits>
[[kernel, max_total_threads_per_threadgroup(128)]] void quantized_filter_logits(
    const device T* x [[buffer(0)]], // [M, K]
    const device uint* w [[buffer(1)]], // [N, K * bits / 32]
    const device T* scales [[buffer(2)]], // [N, K / group_size]
    const device T* biases [[buffer(3)]],
    device ulong* candidates [[buffer(4)]], // [M, slices, count]
    device uint* slice_flags [[buffer(5)]], // [M, slices]
    constant uint& M [[buffer(6)]],
    constant uint& N [[buffer(7)]],
    constant uint& K [[buffer(8)]],
    constant uint& slice_columns [[buffer(9)]],
    constant uint& count [[buffer(10)]],
    constant uint& Q [[buffer(11)]],
    constant float& cap [[buffer(12)]],
    const device int* owners [[buffer(13)]], // [M]
    const device float* temperatures [[buffer(14)]], // [Q]
    const device uint* mask [[buffer(15), function_constant(has_mask)]],
    const device int* edit_ids [[buffer(16), function_constant(has_edits)]],
    const device float* factors [[buffer(17), function_constant(has_edits)]],
    const device float* deltas [[buffer(18), function_constant(has_edits)]],
    constant uint& L [[buffer(19), function_constant(has_edits)]],
    threadgroup float4* staged [[threadgroup(0)]],
    threadgroup uint4* held [[threadgroup(1)]],
    threadgroup uint* keys [[threadgroup(2)]], // [rows, room]
    threadgroup ushort* ids [[threadgroup(3)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  threadgroup Rows known;
  constexpr ushort lanes = chunk / Quantized<bits>::run;
  constexpr ushort tile = group_threads / lanes * lane_columns;
  ushort p = thread_index % lanes;
  ushort own_column = thread_index / lanes * lane_columns; // of four
  Consecutive rows_of = {group.y * max_rows, M};
  uint begin = group.x * slice_columns;
  uint end = min(begin + slice_columns, N);

  if (thread_index < max_rows) {
    atomic_store_explicit(&known.found[thread_index], 0, memory_order_relaxed);
    atomic_store_explicit(&known.flag[thread_index], 0, memory_order_relaxed);
    known.limit[thread_index] = no_entry;
    uint own = group.y * max_rows + thread_index;
    uint owner = owner_of(owners, min(own, M - 1), Q);
    known.owner[thread_index] = owner;
    known.temperature[thread_index] = temperatures[owner];
  }
  // Edits of a tile's columns have a place per sequence, or per row where there
  // are more sequences than rows
  bool by_owner = Q <= uint(launch_rows);
  ushort places = by_owner ? Q : launch_rows;
  auto edits = (threadgroup atomic_int*)staged; // [places, tile]
  for (uint first = begin; first < end; first += tile) {
    // Multiply
    Matrix<T> matrix = {w, scales, biases};
    Columns<T, bits> columns(matrix, matrix, first, own_column, 2, end, K, p);
    Sums sums = {};
    multiply_columns<T, bits>(
        sums, columns, x, staged, held, rows_of, launch_rows, K, thread_index);

    // Find the edits of this tile, where x was staged
    if (has_edits) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint i = thread_index; i < places * tile; i += group_threads) {
        atomic_store_explicit(&edits[i], -1, memory_order_relaxed);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (ushort place = 0; place < places; ++place) {
        uint owner = by_owner ? place : known.owner[place];
        const device int* own = edit_ids + ulong(owner) * L;
        for (uint e = thread_index; e < L; e += group_threads) {
          uint column = uint(own[e]) - first;
          if (column < tile) { // the same edit may stand twice
            atomic_store_explicit(
                &edits[place * tile + column], int(e), memory_order_relaxed);
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    // List
    ushort column = own_column + column_of(p);
#pragma unroll
    for (ushort m = 0; m < max_rows; ++m) {
      if (m < launch_rows && rows_of.live(m) && first + column < end &&
          writes<lanes>(m, p)) {
        float logit = sums[m][0];
        if (has_softcap) {
          logit = capped(logit, cap);
        }
        uint flag = flag_of(logit);
        if (flag > 0) {
          atomic_fetch_max_explicit(&known.flag[m], flag, memory_order_relaxed);
        }
        if (has_edits) {
          ushort place = by_owner ? known.owner[m] : m;
          int edit = atomic_load_explicit(
              &edits[place * tile + column], memory_order_relaxed);
          if (edit >= 0) {
            ulong at = ulong(rows_of.row(m)) * L + edit;
            logit = edited(logit, factors[at], deltas[at]);
          }
        }
        float scaled = logit / known.temperature[m];
        if (has_mask) {
          auto row = mask_of(mask, rows_of.row(m), N);
          scaled = allowed_from(row, first + column) & 1 ? scaled : -INFINITY;
        }
        ulong entry = entry_of(scaled, first - begin + column);
        if (entry <= known.limit[m]) {
          uint at = atomic_fetch_add_explicit(
              &known.found[m], 1, memory_order_relaxed);
          List{keys + m * room, ids + m * room}.set(at, entry);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    bool last = first + tile >= end;
    for (ushort m = 0; m < launch_rows; ++m) {
      if (last || found_in(known, m) + tile > uint(room)) {
        List list = {keys + m * room, ids + m * room};
        cut(list, known, m, count, thread_index);
      }
    }
  }

  for (ushort m = 0; m < launch_rows && rows_of.live(m); ++m) {
    ulong at = ulong(rows_of.row(m)) * groups.x + group.x;
    uint found = found_in(known, m);
    List list = {keys + m * room, ids + m * room};
    for (uint i = thread_index; i < count; i += group_threads) {
      candidates[at * count + i] = i < found ? list.entry(i) + begin : no_entry;
    }
    if (thread_index == 0) {
      slice_flags[at] =
          atomic_load_explicit(&known.flag[m], memory_order_relaxed);
    }
  }
}

INSTANTIATE(
    "quantized_filter_logits_float32_8",
    quantized_filter_logits,
    float,
    8)
INSTANTIATE(
    "quantized_filter_logits_float32_6",
    quantized_filter_logits,
    float,
    6)
INSTANTIATE(
    "quantized_filter_logits_float32_4",
    quantized_filter_logits,
    float,
    4)
INSTANTIATE(
    "quantized_filter_logits_float16_8",
    quantized_filter_logits,
    half,
    8)
INSTANTIATE(
    "quantized_filter_logits_float16_6",
    quantized_filter_logits,
    half,
    6)
INSTANTIATE(
    "quantized_filter_logits_float16_4",
    quantized_filter_logits,
    half,
    4)
INSTANTIATE(
    "quantized_filter_logits_bfloat16_8",
    quantized_filter_logits,
    bfloat,
    8)
INSTANTIATE(
    "quantized_filter_logits_bfloat16_6",
    quantized_filter_logits,
    bfloat,
    6)
INSTANTIATE(
    "quantized_filter_logits_bfloat16_4",
    quantized_filter_logits,
    bfloat,
    4)

} // namespace pyengine
