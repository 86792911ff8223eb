// dense_matmul: out[m, n] = sum over k of x[m, k] * w[n, k], for up to 16 rows
// in one pass over the weights.
//
// The tile of quantized_matmul.metal, whose header gives its reasons. 16 lanes
// share a column; a chunk of 256 is two 16-byte loads per lane for 16-bit
// weights and four for float32. A weight is two or four bytes here, so there is
// less work per byte (16 bits, by `python -m workbench isa`: 4.3 instructions
// at M = 6, 9.8 at 16) and every M is bound by bytes. All loads of a chunk are
// under way before the first is widened.
//
// Limits: where rows do not start on 16 bytes (K odd, say) elements are loaded
// one by one, in the same order of addition.
#include "matmul.h"

constant bool float_out [[function_constant(2)]];
constant bool aligned [[function_constant(3)]]; // rows of x and w on 16 bytes

namespace pyengine {

// Adds chunk k0 of four columns to the sums.
template <typename T, ushort lanes>
inline void multiply_chunk(
    thread float (&sums)[max_rows][lane_columns],
    const device T* w, // of the threadgroup's first column
    thread const uint (&at)[lane_columns], // from there to the lane's columns
    const threadgroup float4* x,
    uint K,
    uint k0,
    ushort p) {
  constexpr ushort run = Loaded<T>::elements;
  constexpr ushort quads = Loaded<T>::quads;
  constexpr ushort loads = chunk / (lanes * run);
  uint4 raw[loads][lane_columns];
#pragma unroll
  for (ushort i = 0; i < loads; ++i) {
    uint k = k0 + (i * lanes + p) * run;
#pragma unroll
    for (ushort c = 0; c < lane_columns; ++c) {
      if (aligned) {
        raw[i][c] =
            *(const device uint4*)(w + (at[c] + (whole ? k : min(k, K - run))));
        if (!whole && k >= K) {
          raw[i][c] = 0;
        }
      } else {
        raw[i][c] = 0;
        for (ushort e = 0; e < run; ++e) {
          if (k + e < K) {
            Loaded<T>::set(raw[i][c], e, w[at[c] + k + e]);
          }
        }
      }
    }
  }
#pragma unroll
  for (ushort i = 0; i < loads; ++i) {
#pragma unroll
    for (ushort q = 0; q < quads; ++q) {
      float4 weights[lane_columns];
#pragma unroll
      for (ushort c = 0; c < lane_columns; ++c) {
        weights[c] = Loaded<T>::quad(raw[i][c], q);
      }
      multiply_quad(
          sums, weights, x + (i * quads + q) * lanes + p, launch_rows);
    }
  }
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void dense_matmul(
    const device T* x [[buffer(0)]], // [M, K]
    const device T* w [[buffer(1)]], // [N, K]
    device uchar* out [[buffer(2)]], // [M, N], T or float
    constant uint& M [[buffer(3)]],
    constant uint& N [[buffer(4)]],
    constant uint& K [[buffer(5)]],
    threadgroup float4* staged [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  constexpr ushort lanes = 16;
  constexpr ushort run = Loaded<T>::elements;
  ushort p = thread_index % lanes;
  uint row = group.x * simds * (32 / lanes) * lane_columns;
  uint n = row + thread_index / lanes * lane_columns;
  const device T* from = w + ulong(row) * K;
  uint at[lane_columns];
#pragma unroll
  for (ushort c = 0; c < lane_columns; ++c) {
    at[c] = ((whole ? n + c : min(n + c, N - 1)) - row) * K;
  }

  Sums sums = {};
  Consecutive rows_of = {group.y * max_rows, M};
  for (uint k0 = 0; k0 < K; k0 += chunk) {
    stage_chunks<T, lanes, run>(
        x, staged, rows_of, K, k0, launch_rows, aligned, thread_index);
    const threadgroup float4* chunk_of_x =
        staged + k0 / chunk % chunks * chunk_quads;
    multiply_chunk<T, lanes>(sums, from, at, chunk_of_x, K, k0, p);
  }

  add_lanes<lanes>(sums, launch_rows, p);
  uint column = n + column_of(p);
#pragma unroll
  for (ushort m = 0; m < max_rows; ++m) {
    if (m < launch_rows && rows_of.live(m) && column < N &&
        writes<lanes>(m, p)) {
      write<T>(out, ulong(rows_of.row(m)) * N + column, sums[m][0], float_out);
    }
  }
}

INSTANTIATE("dense_matmul_float32", dense_matmul, float)
INSTANTIATE("dense_matmul_float16", dense_matmul, half)
INSTANTIATE("dense_matmul_bfloat16", dense_matmul, bfloat)

} // namespace pyengine
