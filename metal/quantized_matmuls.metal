// quantized_matmuls: x times two or three matrices of one width K in one
// launch: q, k and v.
//
// The grid is that of quantized_matmul.metal for one matrix after the other: a
// threadgroup looks up whose columns its number falls on and multiplies as
// there, so the bits are those of a launch for each. Short matrices gain: a k
// of 256 columns would start 8 threadgroups alone.
//
// Limits: those of quantized_matmul; all matrices packed alike.
#include "quantized.h"

constant bool has_third [[function_constant(4)]];

namespace pyengine {

template <typename T, ushort bits>
[[kernel, max_total_threads_per_threadgroup(256)]] void quantized_matmuls(
    const device T* x [[buffer(0)]], // [M, K]
    constant uint& M [[buffer(1)]],
    constant uint& K [[buffer(2)]],
    const device uint* first_w [[buffer(3)]], // [first_N, K * bits / 32]
    const device T* first_scales [[buffer(4)]], // [first_N, K / group_size]
    const device T* first_biases [[buffer(5)]],
    device uchar* first_out [[buffer(6)]], // [M, first_N]
    constant uint& first_N [[buffer(7)]],
    const device uint* second_w [[buffer(8)]],
    const device T* second_scales [[buffer(9)]],
    const device T* second_biases [[buffer(10)]],
    device uchar* second_out [[buffer(11)]],
    constant uint& second_N [[buffer(12)]],
    const device uint* third_w [[buffer(13), function_constant(has_third)]],
    const device T* third_scales [[buffer(14), function_constant(has_third)]],
    const device T* third_biases [[buffer(15), function_constant(has_third)]],
    device uchar* third_out [[buffer(16), function_constant(has_third)]],
    constant uint& third_N [[buffer(17), function_constant(has_third)]],
    threadgroup float4* staged [[threadgroup(0)]],
    threadgroup uint4* factors [[threadgroup(1)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  uint columns = tile_columns<bits>();
  uint first_tiles = (first_N + columns - 1) / columns;
  uint second_tiles = (second_N + columns - 1) / columns;
  uint tile = group.x;
  Product<T> product = {
      first_w, first_scales, first_biases, first_out, first_N};
  if (tile >= first_tiles) {
    tile -= first_tiles;
    product = Product<T>{
        second_w, second_scales, second_biases, second_out, second_N};
    if (has_third && tile >= second_tiles) {
      tile -= second_tiles;
      product =
          Product<T>{third_w, third_scales, third_biases, third_out, third_N};
    }
  }
  multiply_tile<T, bits>(
      product, x, M, K, staged, factors, tile, group.y, thread_index);
}

INSTANTIATE("quantized_matmuls_float32_8", quantized_matmuls, float, 8)
INSTANTIATE("quantized_matmuls_float32_6", quantized_matmuls, float, 6)
INSTANTIATE("quantized_matmuls_float32_4", quantized_matmuls, float, 4)
INSTANTIATE("quantized_matmuls_float16_8", quantized_matmuls, half, 8)
INSTANTIATE("quantized_matmuls_float16_6", quantized_matmuls, half, 6)
INSTANTIATE("quantized_matmuls_float16_4", quantized_matmuls, half, 4)
INSTANTIATE("quantized_matmuls_bfloat16_8", quantized_matmuls, bfloat, 8)
INSTANTIATE("quantized_matmuls_bfloat16_6", quantized_matmuls, bfloat, 6)
INSTANTIATE("quantized_matmuls_bfloat16_4", quantized_matmuls, bfloat, 4)

} // namespace pyengine
