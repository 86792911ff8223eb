// quantized_expert_matmul: each row times the matrices of the experts it was
// routed to; for 16 tokens the weights of an expert are read once, however many
// chose it, and those of the others not at all.
//
// A threadgroup owns an expert and the columns of quantized_matmul.metal's
// tile. It looks through the ids of the 16 tokens, lists those that name its
// expert (a few hundred bytes against an expert's megabytes) and ends where
// there are none. So rows are grouped on the device and the host learns
// nothing. `gated`: two matrices as in quantized_gated_matmul.metal.
//
// An id of no expert gives NaN, which the threadgroups of expert 0 write.
//
// Limits: those of quantized_matmul; 32 slots.
#include "quantized.h"

constant bool gated [[function_constant(4)]];
constant bool one_row [[function_constant(5)]]; // of x for all of a token

namespace pyengine {

// The pairs of a token and a slot that chose this expert. An entry is the
// number of its pair, below 512, and its token, both of 16 tokens.
struct Listed {
  enum { known = 0 };
  const threadgroup ushort* list;
  uint first_pair;
  uint first_row; // of x

  uint pair(uint i) const {
    return first_pair + list[i] % 512;
  }
  uint row(uint i) const {
    return first_row + (one_row ? list[i] / 512 : list[i] % 512);
  }
};

// Lists the pairs that name the expert, in order; run by one simdgroup.
inline ushort list_pairs(
    const device int* ids,
    threadgroup ushort* list,
    uint pairs,
    uint slots,
    int expert,
    ushort lane) {
  ushort found = 0;
  for (uint base = 0; base < pairs; base += 32) {
    uint i = base + lane;
    ushort named = i < pairs && ids[i] == expert;
    ushort before = named; // inclusive prefix sum over the lanes
    for (ushort step = 1; step < 32; step *= 2) {
      ushort left = simd_shuffle_up(before, step);
      before += lane >= step ? left : 0;
    }
    if (named) {
      list[found + before - 1] = i + i / slots * 512;
    }
    found += simd_shuffle(before, 31);
  }
  return found;
}

template <typename T, ushort bits>
[[kernel, max_total_threads_per_threadgroup(256)]] void quantized_expert_matmul(
    const device T* x [[buffer(0)]], // [tokens, K] or [tokens, slots, K]
    const device uint* w [[buffer(1)]], // [experts, N, K * bits / 32]
    const device T* scales [[buffer(2)]], // [experts, N, K / group_size]
    const device T* biases [[buffer(3)]],
    const device uint* up_w [[buffer(4)]], // as w; the same again if not gated
    const device T* up_scales [[buffer(5)]],
    const device T* up_biases [[buffer(6)]],
    const device int* ids [[buffer(7)]], // [tokens, slots]
    device uchar* out [[buffer(8)]], // [tokens, slots, N], T or float
    constant uint& tokens [[buffer(9)]],
    constant uint& slots [[buffer(10)]],
    constant uint& N [[buffer(11)]],
    constant uint& K [[buffer(12)]],
    threadgroup float4* staged [[threadgroup(0)]],
    threadgroup uint4* factors [[threadgroup(1)]],
    threadgroup ushort* list [[threadgroup(2)]], // 16 * slots + 1
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr ushort lanes = chunk / Quantized<bits>::run;
  ushort p = lane % lanes;
  uint token = group.z * max_rows;
  uint pairs = min(tokens - token, uint(max_rows)) * slots;
  threadgroup ushort* listed = list + 1;
  if (simd == 0) {
    ushort found =
        list_pairs(ids + token * slots, listed, pairs, slots, group.y, lane);
    if (lane == 0) {
      list[0] = found;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint found = list[0];

  // Four columns of one matrix, or two of each of two.
  ushort wide = gated ? lane_columns / 2 : lane_columns;
  uint tile = simds * (32 / lanes) * wide; // columns of a threadgroup
  if (group.y == 0) {
    uint begin = group.x * tile, end = min(begin + tile, N);
    for (uint pair = token * slots; pair < token * slots + pairs; ++pair) {
      if (uint(ids[pair]) >= groups.y) { // negative ids become large
        for (uint c = begin + thread_index; c < end; c += simds * 32) {
          write<T>(out, ulong(pair) * N + c, NAN, float_out);
        }
      }
    }
  }
  uint before = group.y * N; // rows of other experts
  uint n = group.x * tile + thread_index / lanes * wide;
  Matrix<T> first = {w, scales, biases};
  Matrix<T> second = {up_w, up_scales, up_biases};
  Columns<T, bits> columns(
      first,
      gated ? second : first,
      before + group.x * tile,
      n - group.x * tile,
      wide / 2,
      before + N,
      K,
      p);

  // More than launch_rows pairs come only from ids that name an expert twice.
  for (uint start = 0; start < found; start += launch_rows) {
    ushort rows = min(found - start, uint(launch_rows));
    Listed rows_of = {
        listed + start, token * slots, one_row ? token : token * slots};
    Sums sums = {};
    multiply_columns<T, bits>(
        sums, columns, x, staged, factors, rows_of, rows, K, thread_index);

    uint column = n + (gated ? column_of(p) / 2 : column_of(p));
    bool mine = (whole || column < N) && !(gated && column_of(p) % 2);
#pragma unroll
    for (ushort m = 0; m < max_rows; ++m) {
      if (m < launch_rows && m < rows) {
        float value = sums[m][0];
        if (gated) {
          value = gate_with_partner<T>(value, p);
        }
        if (mine && writes<lanes>(m, p)) {
          write<T>(out, ulong(rows_of.pair(m)) * N + column, value, float_out);
        }
      }
    }
  }
}

INSTANTIATE(
    "quantized_expert_matmul_float32_8",
    quantized_expert_matmul,
    float,
    8)
INSTANTIATE(
    "quantized_expert_matmul_float32_6",
    quantized_expert_matmul,
    float,
    6)
INSTANTIATE(
    "quantized_expert_matmul_float32_4",
    quantized_expert_matmul,
    float,
    4)
INSTANTIATE(
    "quantized_expert_matmul_float16_8",
    quantized_expert_matmul,
    half,
    8)
INSTANTIATE(
    "quantized_expert_matmul_float16_6",
    quantized_expert_matmul,
    half,
    6)
INSTANTIATE(
    "quantized_expert_matmul_float16_4",
    quantized_expert_matmul,
    half,
    4)
INSTANTIATE(
    "quantized_expert_matmul_bfloat16_8",
    quantized_expert_matmul,
    bfloat,
    8)
INSTANTIATE(
    "quantized_expert_matmul_bfloat16_6",
    quantized_expert_matmul,
    bfloat,
    6)
INSTANTIATE(
    "quantized_expert_matmul_bfloat16_4",
    quantized_expert_matmul,
    bfloat,
    4)

} // namespace pyengine
