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
struct Quantized;

template <>
struct Quantized<8> {
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
struct Quantized<6> {
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
struct Quantized<4> {
  enum { run = 32, words = 4 };
  static void load(thread uint (&to)[4], const device uint* from) {
    Quantized<8>::load(to, from);
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
  const device uint* w[2]; // where columns 0 and 1 start
  const device T* scales[2]; // of their whole matrices
  const device T* biases[2];
  uint row[2]; // of columns 0 and 1 in those
  uint rows; // of each of those
  ushort stride;
  ushort live; // bit c: column c exists
};

// Scales and biases of a set of lanes with the same columns lie in threadgroup
// memory: 8 numbers a group, 4 scales and 4 biases, for as many groups as two
// sectors of 32 bytes hold of a row.
template <typename T>
struct Factors {
  enum {
    piece = Loaded<T>::elements, // 16 bytes
    sector = 2 * piece,
    groups = 2 * sector,
    loads = 8 * groups / piece // 512 bytes as uint4
  };
};

// Brings the factors of groups [begin, begin + sector), `begin` a multiple of a
// sector. Two lanes load a sector of one column, so no load asks for part of
// one. Rows of factors start anywhere in a sector: these groups may begin in
// one that came with the last ones, and the first time two sectors are loaded.
// Numbers of factors are below 2^32: the weights of more would fill 128 GiB.
template <typename T, ushort lanes>
inline void load_factors(
    thread const Columns<T>& columns,
    threadgroup T* held,
    uint pitch,
    uint begin,
    ushort p) {
  constexpr ushort piece = Factors<T>::piece;
  constexpr ushort sector = Factors<T>::sector;
  ushort c = p / 2 % lane_columns;
  bool live = columns.live >> c & 1;
  uint row = (c & 1 ? columns.row[1] : columns.row[0]) + c / 2 * columns.stride;
  uint first = row * pitch;
  uint ending = (first + begin + sector - 1) / sector * sector;

  simdgroup_barrier(mem_flags::mem_threadgroup); // all have read the last ones
  for (ushort turn = begin == 0 ? 0 : 1; turn < 2; ++turn) {
    // Before the matrix's first sector this wraps around to a large number.
    uint sector_at = ending + turn * sector - sector;
    bool mine = sector_at < first + pitch && sector_at + sector > first;
    uint at = sector_at + p % 2 * piece;
    // 16 lanes load scales and biases together, 8 one after the other.
#pragma unroll
    for (ushort i = 0; i < 16 / lanes; ++i) {
      bool bias = lanes == 16 ? p / 8 : i;
      const device T* from = bias
          ? (c & 1 ? columns.biases[1] : columns.biases[0])
          : (c & 1 ? columns.scales[1] : columns.scales[0]);
      T values[piece];
      if (mine && live && at + piece <= columns.rows * pitch) {
        uint4 raw = *(const device uint4*)(from + at);
#pragma unroll
        for (ushort e = 0; e < piece; ++e) {
          values[e] = Loaded<T>::element(raw, e);
        }
      } else { // nothing, or the matrix ends within the piece
#pragma unroll
        for (ushort e = 0; e < piece; ++e) {
          bool own = mine && live && at + e - first < pitch;
          values[e] = own ? from[at + e] : T(0.0f);
        }
      }
#pragma unroll
      for (ushort e = 0; e < piece; ++e) {
        uint group = at + e - first;
        if (mine && group < pitch) {
          held[group % Factors<T>::groups * 8 + 4 * bias + c] = values[e];
        }
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Adds chunk k0 of the lane's columns to the sums. x is the chunk's first quad;
// the factors that are held are those of the lane's set.
template <typename T, ushort bits>
inline void multiply_chunk(
    thread float (&sums)[max_rows][lane_columns],
    thread const Columns<T>& columns,
    const threadgroup float4* x,
    threadgroup uint4* held,
    uint K,
    uint k0,
    ushort rows,
    ushort p) {
  typedef Quantized<bits> P;
  constexpr ushort run = P::run;
  constexpr ushort lanes = chunk / run;
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
  // The weights are under way; every few chunks factors are, too.
  if (k0 % (Factors<T>::sector * group_size) == 0) {
    load_factors<T, lanes>(
        columns, (threadgroup T*)held, K / group_size, k0 / group_size, p);
  }
  float4 scale = 0.0f, bias = 0.0f;
  if (inside) {
    constexpr ushort last = 8 / Factors<T>::piece - 1;
    const threadgroup uint4* at =
        held + k / group_size % Factors<T>::groups * (last + 1);
    scale = Loaded<T>::quad(at[0], 0);
    bias = Loaded<T>::quad(at[last], 1);
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
    thread float (&sums)[max_rows][lane_columns],
    thread const Columns<T>& columns,
    const device T* x,
    threadgroup float4* staged,
    threadgroup uint4* factors,
    Rows rows_of,
    ushort rows,
    uint K,
    ushort thread_index,
    ushort threads) {
  constexpr ushort run = Quantized<bits>::run;
  constexpr ushort lanes = chunk / run;
  ushort p = thread_index % lanes;
  threadgroup uint4* held = factors + thread_index / lanes * Factors<T>::loads;
  for (uint k0 = 0; k0 < K; k0 += chunks * chunk) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<T, lanes, run>(
        x, staged, rows_of, K, k0, rows, true, thread_index, threads);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = k0; k < K && k < k0 + chunks * chunk; k += chunk) {
      multiply_chunk<T, bits>(
          sums, columns, staged + (k - k0) / 4, held, K, k, rows, p);
    }
  }
  add_lanes<lanes>(sums, rows, p);
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
inline uint tile_columns(ushort simds) {
  constexpr ushort lanes = chunk / Quantized<bits>::run;
  return simds * (32 / lanes) * lane_columns;
}

// One threadgroup's part of x [M, K] times a matrix: the 16 rows of `slice`,
// the columns of `tile`.
template <typename T, ushort bits>
inline void multiply_tile(
    Product<T> product,
    const device T* x,
    uint M,
    uint K,
    threadgroup float4* staged,
    threadgroup uint4* factors,
    uint tile,
    uint slice,
    ushort thread_index,
    ushort simds) {
  constexpr ushort lanes = chunk / Quantized<bits>::run;
  ushort p = thread_index % lanes;
  // A simdgroup has 32 / lanes sets of four columns side by side.
  uint n =
      tile * tile_columns<bits>(simds) + thread_index / lanes * lane_columns;

  ulong at = ulong(n) * (K / 32 * bits);
  Columns<T> columns = {
      {product.w + at, product.w + at + K / 32 * bits},
      {product.scales, product.scales},
      {product.biases, product.biases},
      {n, n + 1},
      product.N,
      2,
      0};
  for (ushort c = 0; c < lane_columns; ++c) {
    columns.live |= ushort(n + c < product.N) << c;
  }

  Sums sums = {};
  Consecutive rows_of = {slice * max_rows, M};
  multiply_columns<T, bits>(
      sums,
      columns,
      x,
      staged,
      factors,
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
