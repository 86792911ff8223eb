#pragma once
// quantized.h: MLX's affine quantisation: a chunk of four columns, and one
// threadgroup's part of x times a matrix.

#include "matmul.h"

constant bool float_out [[function_constant(2)]];
constant int group_size [[function_constant(3)]];

namespace pyengine {

// Whether registers are left for words and factors on their way.
inline bool rows_leave_room() {
  return launch_rows <= 8;
}

// Whether weights are converted where they lie: see Quantized.
inline bool in_place() {
  return launch_rows <= 3;
}

// How a lane's share of a chunk is packed: `run` weights in `words` words. 8
// and 4 bits fill 16 bytes; 6 bits would need 48 for whole weights in whole
// loads, so a lane takes 12.
//
// quad(words, j): quad j as floats, each weight times 2^p, p the place of its
// lowest bit in what is converted. factor(scale, j): scale times 2^-p for each
// of them, so their product is exact. Conversions and shifts share a pipe of a
// quarter of the rate. While it is the slower one, few rows, bits stay in their
// places; then registers are worth more than shifts.
template <ushort bits>
struct Quantized;

template <>
struct Quantized<8> {
  enum { run = 16, words = 4 };
  static void load(thread uint (&to)[4], const device uchar* from) {
    uint4 raw = *(const device uint4*)from;
    for (ushort i = 0; i < 4; ++i) {
      to[i] = raw[i];
    }
  }
  static float4 quad(thread const uint (&from)[4], ushort j) {
    uint v = from[j];
    uchar4 bytes = as_type<uchar4>(v);
    return in_place() ? float4(bytes[0], v & 0xff00u, bytes[2], v & 0xff000000u)
                      : float4(bytes);
  }
  static float4 factor(float scale, ushort) {
    return in_place()
        ? scale * float4(1.0f, 1.0f / (1 << 8), 1.0f, 1.0f / (1 << 24))
        : float4(scale);
  }
};

template <>
struct Quantized<6> {
  enum { run = 16, words = 3 };
  static void load(thread uint (&to)[3], const device uchar* from) {
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
    return in_place()
        ? float4(uint4(v, v, v, v) & uint4(63u, 63u << 6, 63u << 12, 63u << 18))
        : float4(uint4(v, v >> 6, v >> 12, v >> 18) & 63u);
  }
  static float4 factor(float scale, ushort) {
    return in_place() ? scale *
            float4(1.0f, 1.0f / (1 << 6), 1.0f / (1 << 12), 1.0f / (1 << 18))
                      : float4(scale);
  }
};

template <>
struct Quantized<4> {
  enum { run = 32, words = 4 };
  static void load(thread uint (&to)[4], const device uchar* from) {
    Quantized<8>::load(to, from);
  }
  static float4 quad(thread const uint (&from)[4], ushort j) {
    uint v = from[j / 2];
    if (in_place()) {
      uint even = v & 0x0f0f0f0fu, odd = v & 0xf0f0f0f0u;
      ushort i = j % 2 * 2; // of the quad's two bytes
      uint second = 0xff00u << (8 * i);
      return float4(
          as_type<uchar4>(even)[i],
          as_type<uchar4>(odd)[i],
          even & second,
          odd & second);
    }
    v >>= j % 2 * 16;
    return float4(uint4(v, v >> 4, v >> 8, v >> 12) & 15u);
  }
  static float4 factor(float scale, ushort j) {
    float second = j % 2 == 0 ? 1.0f / (1 << 8) : 1.0f / (1 << 24);
    return in_place()
        ? scale * float4(1.0f, 1.0f / (1 << 4), second, second / (1 << 4))
        : float4(scale);
  }
};

// A quantised matrix, or a stack of them.
template <typename T>
struct Matrix {
  const device uint* w; // [rows, K * bits / 32]
  const device T* scales; // [rows, K / group_size]
  const device T* biases;
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

// The four columns of a lane. Those of a threadgroup start at `row`, a lane's
// own `first` rows on. Columns c and c + 2 lie `stride` rows apart, 0 and 2 in
// matrix `even`, 1 and 3 in `odd`; with a stride of 2 the two are the same
// matrix, and 1 and 3 the rows behind 0 and 2. The last row, `end` - 1, stands
// for those that do not exist.
template <typename T, ushort bits>
struct Columns {
  // Of scales and biases a lane loads one kind of one column; with 8 lanes
  // both, one after the other.
  enum { lanes = chunk / Quantized<bits>::run, kinds = 16 / lanes };

  const device uchar* w[2]; // where the threadgroup's rows start
  uint at[lane_columns]; // bytes to a lane's share of its columns
  bool idle; // none of them exists
  const device T* factors[kinds]; // of the row of such a column
  int left; // of them to the end of the matrix
  int ahead; // of them from the first to the next sector; this lane's half

  Columns(
      Matrix<T> even,
      Matrix<T> odd,
      uint row,
      uint first_row,
      ushort stride,
      uint end_row,
      uint K,
      ushort p) {
    idle = !whole && row + first_row >= end_row;
    uint bytes = K / 8 * bits;
    w[0] = (const device uchar*)even.w + ulong(row) * bytes;
    w[1] = (const device uchar*)odd.w + ulong(row) * bytes;
    uint rows[lane_columns];
#pragma unroll
    for (ushort c = 0; c < lane_columns; ++c) {
      rows[c] = first_row + c / 2 * stride + c % 2 * (stride - 1);
      if (!whole) {
        rows[c] = min(row + rows[c], end_row - 1) - row;
      }
      at[c] = rows[c] * bytes + p * Quantized<bits>::words * 4;
    }
    ushort c = p / 2 % lane_columns;
    uint own =
        c < 2 ? (c == 0 ? rows[0] : rows[1]) : (c == 2 ? rows[2] : rows[3]);
    uint first = (row + own) * (K / group_size);
    left = end_row * (K / group_size) - first;
    ahead = -first % Factors<T>::sector + p % 2 * Factors<T>::piece;
#pragma unroll
    for (ushort i = 0; i < kinds; ++i) {
      bool bias = kinds == 1 ? p / 8 : i;
      factors[i] = first +
          (bias ? (c % 2 ? odd.biases : even.biases)
                : (c % 2 ? odd.scales : even.scales));
    }
  }
};

// A lane's way through K: the words of its columns and 16 bytes of factors of
// each kind, both asked for long before they are needed.
//
// Factors come in whole sectors: two lanes load one of one column. Rows of
// factors start anywhere in a sector, so groups [b, b + sector) may begin in
// the one that came before, and the first time two are loaded. Numbers of
// factors are below 2^32: the weights of more would fill 128 GiB.
template <typename T, ushort bits>
struct Walk {
  typedef Quantized<bits> P;
  enum {
    run = P::run,
    lanes = chunk / run,
    kinds = 16 / lanes,
    piece = Factors<T>::piece,
    sector = Factors<T>::sector
  };

  const device uchar* w[2]; // of the chunk that is asked for next
  uint packed[lane_columns][P::words];
  uint4 asked[kinds];
  ushort p;

  // Asks for chunk k0.
  void ask(thread const Columns<T, bits>& columns, uint K, uint k0) {
    uint beyond = 0; // bytes from the last run to one past K
    if (!whole && k0 + p * run >= K) {
      beyond = (k0 + p * run - (K - run)) / run * (P::words * 4);
    }
    if (columns.idle) {
      return; // with any words
    }
#pragma unroll
    for (ushort c = 0; c < lane_columns; ++c) {
      P::load(packed[c], w[c % 2] + (columns.at[c] - beyond));
    }
    w[0] += chunk / 8 * bits;
    w[1] += chunk / 8 * bits;
  }

  // Factors of groups from `group` on, if the row has any in their sector.
  void ask_factors(thread const Columns<T, bits>& columns, int group, uint K) {
    if (columns.idle || group - p % 2 * piece >= int(K / group_size)) {
      return;
    }
#pragma unroll
    for (ushort i = 0; i < kinds; ++i) {
      if (whole || group + piece <= columns.left) {
        asked[i] = *(const device uint4*)(columns.factors[i] + group);
      } else { // the matrix ends within the piece
        asked[i] = 0;
        for (ushort e = 0; e < piece; ++e) {
          if (group + e < columns.left) {
            Loaded<T>::set(asked[i], e, columns.factors[i][group + e]);
          }
        }
      }
    }
  }

  // Those of no group of the row have places where nobody reads.
  void keep_factors(threadgroup T* held, int group) const {
    // Whole chunks have groups by fours, and so have rows and pieces.
    ushort together = whole && group_size <= 64 ? 4 : 1;
    ushort c = p / 2 % lane_columns;
#pragma unroll
    for (ushort i = 0; i < kinds; ++i) {
      ushort kind = kinds == 1 ? p / 8 : i;
#pragma unroll
      for (ushort e = 0; e < piece; ++e) {
        ushort slot =
            ushort(group + e / together * together) % Factors<T>::groups +
            e % together;
        held[slot * 8 + 4 * kind + c] = Loaded<T>::element(asked[i], e);
      }
    }
  }

  // If `ahead`, asks for the first words and factors.
  void start(
      thread const Columns<T, bits>& columns,
      threadgroup T* held,
      uint K,
      bool ahead) {
    w[0] = columns.w[0];
    w[1] = columns.w[1];
    if (ahead) {
      ask(columns, K, 0);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup); // all are done with others
    if (columns.ahead != p % 2 * piece) {
      ask_factors(columns, columns.ahead - sector, K);
      keep_factors(held, columns.ahead - sector);
    }
    if (ahead) {
      ask_factors(columns, columns.ahead, K);
    }
  }

  // Lets the factors of chunk k0 and later take the place of those that all
  // lanes have used.
  void turn(
      thread const Columns<T, bits>& columns,
      threadgroup T* held,
      uint K,
      uint k0,
      bool ahead) {
    int group = k0 / group_size + columns.ahead;
    if (!ahead) {
      ask_factors(columns, group, K);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    keep_factors(held, group);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (ahead) {
      ask_factors(columns, group + sector, K);
    }
  }

  void dequantize(
      thread float4 (&weights)[lane_columns],
      ushort j,
      float4 scale,
      float4 bias) const {
#pragma unroll
    for (ushort c = 0; c < lane_columns; ++c) {
      weights[c] =
          fma(P::quad(packed[c], j), P::factor(scale[c], j), float4(bias[c]));
    }
  }
};

// Adds chunk k0 of the lane's columns to the sums. Its words were asked for; if
// there are `more`, those of the next chunk are before the last quad is
// multiplied, when their registers are free. `ahead`: so were factors.
template <typename T, ushort bits, bool more>
inline void multiply_chunk(
    thread float (&sums)[max_rows][lane_columns],
    thread Walk<T, bits>& walk,
    thread const Columns<T, bits>& columns,
    const threadgroup float4* staged,
    threadgroup uint4* held,
    uint K,
    uint k0,
    ushort rows,
    bool ahead) {
  constexpr ushort run = Quantized<bits>::run;
  constexpr ushort lanes = chunk / run;
  constexpr ushort quads = run / 4;
  uint k = k0 + walk.p * run;
  if (k0 % (Factors<T>::sector * group_size) == 0) {
    walk.turn(columns, (threadgroup T*)held, K, k0, ahead);
  }
  constexpr ushort last = 8 / Factors<T>::piece - 1;
  const threadgroup uint4* from =
      held + k / group_size % Factors<T>::groups * (last + 1);
  float4 scale = Loaded<T>::quad(from[0], 0);
  float4 bias = Loaded<T>::quad(from[last], 1);
  if (!whole && k >= K) { // K is a multiple of 32: all of a run is, or none
    scale = bias = 0.0f;
  }
  const threadgroup float4* x =
      staged + k0 / chunk % chunks * chunk_quads + walk.p;
  float4 weights[lane_columns];
#pragma unroll
  for (ushort j = 0; j < quads - 1; ++j) {
    walk.dequantize(weights, j, scale, bias);
    multiply_quad(sums, weights, x + j * lanes, rows);
  }
  walk.dequantize(weights, quads - 1, scale, bias);
  if (more) {
    walk.ask(columns, K, k0 + chunk);
  }
  multiply_quad(sums, weights, x + (quads - 1) * lanes, rows);
}

// Multiplies rows of x with the lane's columns over all of K and adds the
// lanes.
template <typename T, ushort bits, typename Rows>
inline void multiply_columns(
    thread float (&sums)[max_rows][lane_columns],
    thread const Columns<T, bits>& columns,
    const device T* x,
    threadgroup float4* staged,
    threadgroup uint4* factors,
    Rows rows_of,
    ushort rows,
    uint K,
    ushort thread_index) {
  constexpr ushort run = Quantized<bits>::run;
  constexpr ushort lanes = chunk / run;
  bool ahead = Rows::known && rows_leave_room();
  threadgroup uint4* held = factors + thread_index / lanes * Factors<T>::loads;
  Walk<T, bits> walk;
  walk.p = thread_index % lanes;
  walk.start(columns, (threadgroup T*)held, K, ahead);
  uint last = ahead ? (K - 1) / chunk * chunk : 0;
  for (uint k0 = 0; k0 < last; k0 += chunk) {
    stage_chunks<T, lanes, run>(
        x, staged, rows_of, K, k0, rows, true, thread_index);
    multiply_chunk<T, bits, true>(
        sums, walk, columns, staged, held, K, k0, rows, ahead);
  }
  for (uint k0 = last; k0 < K; k0 += chunk) {
    stage_chunks<T, lanes, run>(
        x, staged, rows_of, K, k0, rows, true, thread_index);
    if (!ahead) {
      walk.ask(columns, K, k0);
    }
    multiply_chunk<T, bits, false>(
        sums, walk, columns, staged, held, K, k0, rows, ahead);
    if (ahead) {
      break;
    }
  }
  add_lanes<lanes>(sums, rows, walk.p);
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
inline uint tile_columns() {
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
    ushort thread_index) {
  constexpr ushort lanes = chunk / Quantized<bits>::run;
  ushort p = thread_index % lanes;
  // A simdgroup has 32 / lanes sets of four columns side by side.
  uint row = tile * tile_columns<bits>();
  uint n = thread_index / lanes * lane_columns;
  Matrix<T> matrix = {product.w, product.scales, product.biases};
  Columns<T, bits> columns(matrix, matrix, row, n, 2, product.N, K, p);

  Sums sums = {};
  Consecutive rows_of = {slice * max_rows, M};
  multiply_columns<T, bits>(
      sums, columns, x, staged, factors, rows_of, launch_rows, K, thread_index);

  uint column = row + n + column_of(p);
#pragma unroll
  for (ushort m = 0; m < max_rows; ++m) {
    if (m < launch_rows && rows_of.live(m) && (whole || column < product.N) &&
        writes<lanes>(m, p)) {
      ulong at = ulong(rows_of.row(m)) * product.N + column;
      write<T>(product.out, at, sums[m][0], float_out);
    }
  }
}

// activated(gate) * up where, after add_lanes, even columns are of a gate and
// odd ones of up. Both are rounded first. Good in the lanes of even columns.
template <typename T>
inline float gate_with_partner(float sum, ushort p, bool with_silu = false) {
  float own = float(T(sum));
  float partner = simd_shuffle_xor(own, 2);
  return column_of(p) % 2 == 0 ? activated(own, with_silu) * partner : 0.0f;
}

} // namespace pyengine
