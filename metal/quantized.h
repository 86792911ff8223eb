#pragma once
// quantized.h: MLX's affine quantisation: a chunk of four columns, and one
// threadgroup's part of x times a matrix.

#include "matmul.h"

constant bool float_out [[function_constant(2)]];
constant int group_size [[function_constant(3)]];

namespace pyengine {

// How a lane's share of a chunk is packed: `run` weights in `words` words, and
// its quad j as floats. 8 and 4 bits fill 16 bytes; 6 bits would need 48 for
// whole weights in whole loads, so a lane takes 12.
template <ushort bits>
struct Packed;

template <>
struct Packed<8> {
  enum { run = 16, words = 4 };
  static void load(thread uint (&to)[4], const device uint* from) {
    uint4 raw = *(const device uint4*)from;
    for (ushort i = 0; i < 4; ++i) {
      to[i] = raw[i];
    }
  }
  static float4 quad(thread const uint (&from)[4], ushort j) {
    return float4(as_type<uchar4>(from[j]));
  }
};

template <>
struct Packed<6> {
  enum { run = 16, words = 3 };
  static void load(thread uint (&to)[3], const device uint* from) {
    packed_uint3 raw = *(const device packed_uint3*)from;
    for (ushort i = 0; i < 3; ++i) {
      to[i] = raw[i];
    }
  }
  // Four weights lie in 24 bits, the first in the lowest.
  static float4 quad(thread const uint (&from)[3], ushort j) {
    uint v = j == 0 ? from[0]
        : j == 1    ? from[0] >> 24 | from[1] << 8
        : j == 2    ? from[1] >> 16 | from[2] << 16
                    : from[2] >> 8;
    return float4(uint4(v, v >> 6, v >> 12, v >> 18) & 63u);
  }
};

template <>
struct Packed<4> {
  enum { run = 32, words = 4 };
  static void load(thread uint (&to)[4], const device uint* from) {
    Packed<8>::load(to, from);
  }
  static float4 quad(thread const uint (&from)[4], ushort j) {
    uint v = from[j / 2] >> (j % 2 * 16);
    return float4(uint4(v, v >> 4, v >> 8, v >> 12) & 15u);
  }
};

// The four columns of a lane: c and c + 2 lie `stride` matrix rows apart, so
// that the two of a pair may come from two matrices.
template <typename T>
struct Columns {
  const device uint* w[2];
  const device T* scales[2];
  const device T* biases[2];
  uint stride;
  ushort live; // bit c: column c exists
};

// Scale and bias of the lane's four columns. `sharing` lanes lie in one group;
// each loads 8 / sharing of the eight numbers, so that none is read twice, and
// shuffles spread them.
template <typename T, ushort sharing>
inline void load_factors(
    thread const Columns<T>& columns,
    uint pitch,
    uint group,
    bool inside,
    ushort lane,
    thread float (&scale)[lane_columns],
    thread float (&bias)[lane_columns]) {
  ushort mine = lane % sharing;
  ushort base = lane - mine;
  float held[8 / sharing];
#pragma unroll
  for (ushort i = 0; i < 8 / sharing; ++i) {
    ushort f = i * sharing + mine; // scales of columns 0 to 3, then biases
    ushort c = f % 4;
    const device T* from = f < 4
        ? (c & 1 ? columns.scales[1] : columns.scales[0])
        : (c & 1 ? columns.biases[1] : columns.biases[0]);
    bool live = inside && (columns.live >> c & 1);
    held[i] = live ? float(from[ulong(c / 2) * columns.stride * pitch + group])
                   : 0.0f;
  }
#pragma unroll
  for (ushort c = 0; c < lane_columns; ++c) {
    ushort s = c, b = c + 4;
    scale[c] = simd_shuffle(held[s / sharing], base + s % sharing);
    bias[c] = simd_shuffle(held[b / sharing], base + b % sharing);
  }
}

// Adds chunk k0 of the lane's columns to the sums. x is the chunk's first quad.
template <typename T, ushort bits>
inline void multiply_chunk(
    thread Sums& sums,
    thread const Columns<T>& columns,
    const threadgroup float4* x,
    uint K,
    uint k0,
    ushort rows,
    ushort lane) {
  typedef Packed<bits> P;
  constexpr ushort run = P::run;
  constexpr ushort lanes = chunk / run;
  ushort p = lane % lanes;
  uint k = k0 + p * run;
  bool inside = k < K; // K is a multiple of 32, so all of a run is, or none

  uint packed[lane_columns][P::words];
#pragma unroll
  for (ushort c = 0; c < lane_columns; ++c) {
    const device uint* from = columns.w[c & 1] +
        (ulong(c / 2) * columns.stride * K + k) / 32 * bits +
        (bits == 8       ? k % 32 / 4
             : bits == 6 ? k % 32 * 3 / 16
                         : 0);
    if (inside && (columns.live >> c & 1)) {
      P::load(packed[c], from);
    } else {
      for (ushort i = 0; i < P::words; ++i) {
        packed[c][i] = 0;
      }
    }
  }
  float scale[lane_columns], bias[lane_columns];
  uint factors = K / group_size, group = k / group_size;
  if (group_size == 32) {
    load_factors<T, 32 / run>(
        columns, factors, group, inside, lane, scale, bias);
  } else if (group_size == 64) {
    load_factors<T, 64 / run>(
        columns, factors, group, inside, lane, scale, bias);
  } else {
    load_factors<T, 128 / run>(
        columns, factors, group, inside, lane, scale, bias);
  }

#pragma unroll
  for (ushort j = 0; j < run / 4; ++j) {
    float4 weights[lane_columns];
#pragma unroll
    for (ushort c = 0; c < lane_columns; ++c) {
      weights[c] =
          fma(P::quad(packed[c], j), float4(scale[c]), float4(bias[c]));
    }
    multiply_quad(sums, weights, x + j * lanes + p, rows);
  }
}

// Multiplies rows of x with the lane's columns over all of K and adds the
// lanes.
template <typename T, ushort bits, typename Rows>
inline void multiply_columns(
    thread Sums& sums,
    thread const Columns<T>& columns,
    const device T* x,
    threadgroup float4* staged,
    Rows rows_of,
    ushort rows,
    uint K,
    ushort thread_index,
    ushort threads) {
  constexpr ushort run = Packed<bits>::run;
  constexpr ushort lanes = chunk / run;
  ushort lane = thread_index % 32;
  for (uint k0 = 0; k0 < K; k0 += chunks * chunk) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<T, lanes, run>(
        x, staged, rows_of, K, k0, rows, true, thread_index, threads);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = k0; k < K && k < k0 + chunks * chunk; k += chunk) {
      multiply_chunk<T, bits>(
          sums, columns, staged + (k - k0) / 4, K, k, rows, lane);
    }
  }
  add_lanes<lanes>(sums, rows, lane % lanes);
}

// A whole matrix and where x times it goes.
template <typename T>
struct Product {
  const device uint* w; // [N, K * bits / 32]
  const device T* scales; // [N, K / group_size]
  const device T* biases;
  device uchar* out; // [M, N], T or float
  uint N;
};

// Columns of a threadgroup that multiplies by one matrix.
template <ushort bits>
inline uint block_columns(ushort simds) {
  constexpr ushort lanes = chunk / Packed<bits>::run;
  return simds * (32 / lanes) * lane_columns;
}

// One threadgroup's part of x [M, K] times a matrix: the 16 rows of `slice`,
// the columns of `block`.
template <typename T, ushort bits>
inline void multiply_block(
    Product<T> product,
    const device T* x,
    uint M,
    uint K,
    threadgroup float4* staged,
    uint block,
    uint slice,
    ushort thread_index,
    ushort simds) {
  constexpr ushort lanes = chunk / Packed<bits>::run;
  ushort p = thread_index % lanes;
  // A simdgroup has 32 / lanes sets of four columns side by side.
  uint n =
      block * block_columns<bits>(simds) + thread_index / lanes * lane_columns;

  Columns<T> columns;
  columns.stride = 2;
  columns.live = 0;
  for (ushort c = 0; c < lane_columns; ++c) {
    columns.live |= ushort(n + c < product.N) << c;
  }
  for (ushort c = 0; c < 2; ++c) {
    columns.w[c] = product.w + ulong(n + c) * (K / 32 * bits);
    columns.scales[c] = product.scales + ulong(n + c) * (K / group_size);
    columns.biases[c] = product.biases + ulong(n + c) * (K / group_size);
  }

  Sums sums = {};
  Consecutive rows_of = {slice * max_rows, M};
  multiply_columns<T, bits>(
      sums,
      columns,
      x,
      staged,
      rows_of,
      launch_rows,
      K,
      thread_index,
      simds * 32);

  uint column = n + column_of(p);
#pragma unroll
  for (ushort m = 0; m < max_rows; ++m) {
    if (m < launch_rows && rows_of.live(m) && column < product.N &&
        writes<lanes>(m, p)) {
      ulong at = ulong(rows_of.row(m)) * product.N + column;
      write<T>(product.out, at, sums[m][0], float_out);
    }
  }
}

// gelu(gate) * up where, after add_lanes, even columns are of a gate and odd
// ones of up. Both are rounded first. Good in the lanes of even columns.
template <typename T>
inline float gate_with_partner(float sum, ushort p) {
  float own = float(T(sum));
  float partner = simd_shuffle_xor(own, 2);
  return column_of(p) % 2 == 0 ? gelu(own) * partner : 0.0f;
}

} // namespace pyengine
