// quantized_gated_matmul: out = gelu_tanh(x @ gate^T) * (x @ up^T), or that
// with silu, for up to 16 rows in one pass over the weights of both matrices.
//
// The tile of quantized_matmul.metal, whose header gives its reasons; of a
// lane's four columns two belong to the gate and the same two to up. So x is
// read once for both, and what they give never leaves the registers. Both sums
// are rounded to T before they meet, as when three ops write them to memory:
// the bits are theirs.
//
// Limits: those of quantized_matmul; both matrices packed alike.
#include "quantized.h"

constant bool with_silu [[function_constant(4)]]; // in place of gelu

namespace pyengine {

template <typename T, ushort bits>
[[kernel, max_total_threads_per_threadgroup(256)]] void quantized_gated_matmul(
    const device T* x [[buffer(0)]], // [M, K]
    const device uint* gate_w [[buffer(1)]], // [N, K * bits / 32]
    const device T* gate_scales [[buffer(2)]], // [N, K / group_size]
    const device T* gate_biases [[buffer(3)]],
    const device uint* up_w [[buffer(4)]],
    const device T* up_scales [[buffer(5)]],
    const device T* up_biases [[buffer(6)]],
    device uchar* out [[buffer(7)]], // [M, N]
    constant uint& M [[buffer(8)]],
    constant uint& N [[buffer(9)]],
    constant uint& K [[buffer(10)]],
    threadgroup float4* staged [[threadgroup(0)]],
    threadgroup uint4* factors [[threadgroup(1)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  constexpr ushort lanes = chunk / Quantized<bits>::run;
  ushort p = thread_index % lanes;
  uint row = group.x * (tile_columns<bits>() / 2);
  uint n = row + thread_index / lanes * 2;
  Matrix<T> gate = {gate_w, gate_scales, gate_biases};
  Matrix<T> up = {up_w, up_scales, up_biases};
  Columns<T, bits> columns(gate, up, row, n - row, 1, N, K, p);

  Sums sums = {};
  Consecutive rows_of = {group.y * max_rows, M};
  multiply_columns<T, bits>(
      sums, columns, x, staged, factors, rows_of, launch_rows, K, thread_index);

  uint column = n + column_of(p) / 2;
#pragma unroll
  for (ushort m = 0; m < max_rows; ++m) {
    if (m < launch_rows) {
      float gated = gate_with_partner<T>(sums[m][0], p, with_silu);
      if (rows_of.live(m) && column < N && column_of(p) % 2 == 0 &&
          writes<lanes>(m, p)) {
        write<T>(out, ulong(rows_of.row(m)) * N + column, gated, false);
      }
    }
  }
}

INSTANTIATE(
    "quantized_gated_matmul_float32_8",
    quantized_gated_matmul,
    float,
    8)
INSTANTIATE(
    "quantized_gated_matmul_float32_6",
    quantized_gated_matmul,
    float,
    6)
INSTANTIATE(
    "quantized_gated_matmul_float32_4",
    quantized_gated_matmul,
    float,
    4)
INSTANTIATE("quantized_gated_matmul_float16_8", quantized_gated_matmul, half, 8)
INSTANTIATE("quantized_gated_matmul_float16_6", quantized_gated_matmul, half, 6)
INSTANTIATE("quantized_gated_matmul_float16_4", quantized_gated_matmul, half, 4)
INSTANTIATE(
    "quantized_gated_matmul_bfloat16_8",
    quantized_gated_matmul,
    bfloat,
    8)
INSTANTIATE(
    "quantized_gated_matmul_bfloat16_6",
    quantized_gated_matmul,
    bfloat,
    6)
INSTANTIATE(
    "quantized_gated_matmul_bfloat16_4",
    quantized_gated_matmul,
    bfloat,
    4)

} // namespace pyengine
