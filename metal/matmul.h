#pragma once
// matmul.h: what the matmuls share: rows of x in threadgroup memory, the sums
// of one lane, and the tree in which lanes meet.
//
// K is cut into chunks of 256. `lanes` lanes of a simdgroup share a chunk of
// one column; a 16-byte load brings `run` consecutive k. Which k a lane adds,
// and in what order, follows from these two numbers; then a fixed tree adds the
// lanes. So a row's bits depend on K alone, never on how many rows there are.

#include "common.h"

constant int launch_rows [[function_constant(0)]]; // min(M, 16)
constant int chunks [[function_constant(1)]]; // of x staged together
constant int simds [[function_constant(7)]]; // of a threadgroup
constant bool whole [[function_constant(8)]]; // K ends a chunk, N a tile
constant bool even [[function_constant(9)]]; // M is launch_rows or 16 n

namespace pyengine {

constant constexpr ushort max_rows = 16;
constant constexpr ushort chunk = 256;
constant constexpr ushort chunk_quads = chunk / 4;
constant constexpr ushort lane_columns = 4;

// The sums of one lane. Rows that a launch does not have are never touched, so
// they take no registers.
typedef float Sums[max_rows][lane_columns];

// Where a quad of four k lies in a staged chunk: quad j of all lanes side by
// side, so that a simdgroup reads neighbouring addresses.
template <ushort lanes, ushort run>
inline ushort staged_at(ushort quad) {
  constexpr ushort quads = run / 4;
  ushort lane = quad / quads % lanes;
  ushort j = quad / (quads * lanes) * quads + quad % quads;
  return j * lanes + lane;
}

// Rows of x from `first` on; the last one stands for those from `count` on,
// which do not exist.
struct Consecutive {
  enum { known = 1 }; // how many there are when the kernel is compiled
  uint first;
  uint count;

  bool live(uint i) const {
    return even || first + i < count;
  }
  uint row(uint i) const {
    return even ? first + i : min(first + i, count - 1);
  }
};

// Converts x[row i, k0 ...] to float32 in threadgroup memory, once for all
// columns of the threadgroup; zeros beyond K. Each load of a simdgroup takes a
// row's chunk, or half of one of float32, and four are under way before it
// waits for one. `aligned`: rows start on 16 bytes.
template <typename T, ushort lanes, ushort run, typename Rows>
inline void stage(
    const device T* x,
    threadgroup float4* staged,
    Rows rows_of,
    uint K,
    uint k0,
    ushort rows,
    bool aligned,
    ushort thread_index) {
  constexpr ushort elements = Loaded<T>::elements;
  constexpr ushort quads = Loaded<T>::quads;
  constexpr ushort part = 32 * elements; // of a row, for one load
  constexpr ushort turns = 4;
  ushort parts = chunks * (chunk / part);
  ushort lane_k = thread_index % 32 * elements;
  const device T* from = x + k0;
  for (ushort start = 0; start < rows * parts; start += turns * simds) {
    uint4 raw[turns];
#pragma unroll
    for (ushort t = 0; t < turns; ++t) {
      ushort i = start + t * simds + thread_index / 32;
      uint k = i % parts * part + lane_k;
      if (start + (t + 1) * simds <= rows * parts ||
          (start + t * simds < launch_rows * parts && i < rows * parts)) {
        uint row = rows_of.row(i / parts) * K; // x has fewer than 2^32 elements
        if (aligned) {
          // Chunks behind K are staged with others, and nobody reads them.
          bool inside = whole && chunks == 1;
          uint at = inside ? k : min(k0 + k, K - elements) - k0;
          raw[t] = *(const device uint4*)(from + (row + at));
        } else {
          raw[t] = 0;
          for (ushort e = 0; e < elements; ++e) {
            if (k0 + k + e < K) {
              Loaded<T>::set(raw[t], e, from[row + k + e]);
            }
          }
        }
      }
    }
#pragma unroll
    for (ushort t = 0; t < turns; ++t) {
      ushort i = start + t * simds + thread_index / 32;
      ushort k = i % parts * part + lane_k;
      if (start + (t + 1) * simds <= rows * parts ||
          (start + t * simds < launch_rows * parts && i < rows * parts)) {
        bool exists = whole || k0 + k < K;
        threadgroup float4* to =
            staged + (i / parts * chunks + k / chunk) * chunk_quads;
#pragma unroll
        for (ushort q = 0; q < quads; ++q) {
          to[staged_at<lanes, run>(k % chunk / 4 + q)] =
              exists ? Loaded<T>::quad(raw[t], q) : float4(0.0f);
        }
      }
    }
  }
}

// Stages chunk k0 and those that go with it, if it is the first of them.
template <typename T, ushort lanes, ushort run, typename Rows>
inline void stage_chunks(
    const device T* x,
    threadgroup float4* staged,
    Rows rows_of,
    uint K,
    uint k0,
    ushort rows,
    bool aligned,
    ushort thread_index) {
  if (k0 % (chunks * chunk) == 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup); // all have read the last
    stage<T, lanes, run>(
        x, staged, rows_of, K, k0, rows, aligned, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Adds one quad of four columns to the sums of all rows, which lie `pitch`
// quads apart in x.
inline void multiply_quad(
    thread float (&sums)[max_rows][lane_columns],
    thread const float4 (&weights)[lane_columns],
    const threadgroup float4* x,
    ushort rows) {
#pragma unroll
  for (ushort m = 0; m < max_rows; ++m) {
    if (m < launch_rows && m < rows) {
      float4 values = x[m * chunks * chunk_quads];
#pragma unroll
      for (ushort c = 0; c < lane_columns; ++c) {
        float sum = fma(values.x, weights[c].x, sums[m][c]);
        sum = fma(values.y, weights[c].y, sum);
        sum = fma(values.z, weights[c].z, sum);
        sums[m][c] = fma(values.w, weights[c].w, sum);
      }
    }
  }
}

// Adds the lanes that share columns, in pairs 1, 2, 4, 8 apart, into
// sums[m][0]. In the first two steps a lane gives half of its columns away: 5
// shuffles per row instead of 16. Lane p ends with the column that column_of(p)
// names.
template <ushort lanes>
inline void
add_lanes(thread float (&sums)[max_rows][lane_columns], ushort rows, ushort p) {
  bool right = p & 1;
  bool lower = p & 2;
#pragma unroll
  for (ushort m = 0; m < max_rows; ++m) {
    if (m < launch_rows && m < rows) {
      float a = simd_shuffle_xor(right ? sums[m][0] : sums[m][2], 1);
      float b = simd_shuffle_xor(right ? sums[m][1] : sums[m][3], 1);
      a += right ? sums[m][2] : sums[m][0];
      b += right ? sums[m][3] : sums[m][1];
      float sum = simd_shuffle_xor(lower ? a : b, 2);
      sum += lower ? b : a;
#pragma unroll
      for (ushort step = 4; step < lanes; step *= 2) {
        sum += simd_shuffle_xor(sum, step);
      }
      sums[m][0] = sum;
    }
  }
}

inline ushort column_of(ushort p) {
  return 2 * (p & 1) + (p >> 1 & 1);
}

// After add_lanes lanes / 4 lanes hold the same sums: they take turns writing.
template <ushort lanes>
inline bool writes(ushort m, ushort p) {
  return m % (lanes / 4) == p / 4;
}

} // namespace pyengine
