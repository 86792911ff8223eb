// quantized_matmul: out[m, n] = sum over k of x[m, k] * (q[n, k] * scale +
// bias), for up to 16 rows in one pass over the weights.
//
// A threadgroup of 4 simdgroups (8 for float32 of 8 or 6 bits) owns 8 columns a
// simdgroup (16 for 4 bits) and walks over K in chunks of 256. 16 lanes (8)
// share a chunk of a column, 16 bytes each: a simdgroup's load takes 512 bytes,
// whole 128-byte lines. Scales and biases come in whole sectors of 32 bytes,
// the next 1024 k of a column (16-bit factors, groups of 64) by two lanes, and
// wait in threadgroup memory. So each weight is loaded by one lane, once, and
// so is each factor but for sectors that two rows of factors share. x is
// converted to float32 in threadgroup memory once for all columns of the
// threadgroup. A row's order of addition is in matmul.h; neither M nor the tile
// changes it.
//
// Loads have no conditions: where there is no row, column or k, they read the
// last one again, and a zero scale or nobody's column takes it out. Up to 8
// rows the next chunk's words are asked for before the present one is all
// multiplied, and factors 1024 k before they are needed. `whole` takes all
// that is left of this out where N ends with a tile and K with a chunk.
//
// Why this tile. Figures of one core, from published measurements of M1 to M4:
// 128 float32 lanes, 208 KiB of registers, some 60 KiB of threadgroup memory,
// 32 of them at most for a threadgroup; an M4 Max feeds each of its 40
// cores 13.7 bytes per ns. Counts are of `python -m workbench isa`: of another
// GPU's compiler, bfloat16, 8 bits.
// * Registers: 75 at M = 1, 99 at 6, 105 at 8, 128 at 16, with 40 bytes that
//   find none, used once in 1024 k. 208 KiB hold 22, 16, 15 and 13 simdgroups.
// * Threadgroup memory: M KiB for x (8 for fewer rows), 1 KiB per simdgroup for
//   factors (2 for 4 bits): 20 KiB at M = 16, of which a core holds 3, 12
//   simdgroups; 10 KiB at M = 6, 6 of them, more than the registers.
// * Bytes in flight: a lane starts 4 loads of 16 bytes before it needs one,
//   2 KiB per simdgroup, 24 KiB per core. 13.7 bytes per ns times 1 us would
//   need 14 KiB.
// * Instructions per 8-bit weight, which is a byte: 4.5 at M = 1, 10.0 at 6,
//   21.0 at 16. Of those at M = 6 are 7 fma, one of them to dequantise, 1 to
//   convert, 0.5 to bring a byte to where it can be, and 0.4 that load x from
//   threadgroup memory; staging and factors take 0.35 each, loops 0.25. At 1.2
//   cycles an instruction, 128 lanes of 1.6 GHz have 12.5 for each byte of an
//   M4 Max: it is bound by bytes to about M = 8, by arithmetic above.
// * Columns: x costs M * itemsize / columns bytes a weight. 32 columns make it
//   0.4 at M = 6 and 1.0 at M = 16 (bfloat16), from the cache; 64 would leave
//   an N of 2048 only 32 threadgroups. Up to 6 rows and 8192 columns half of
//   the simdgroups make a tile: an N of 5376 then has 336 threadgroups, which
//   40 cores share to 93 % instead of 84, for 0.2 instructions a byte. Its K
//   cannot be cut instead: that would be another order of addition.
//
// Limits: K a multiple of group_size; group_size 32, 64 or 128; x, w, scales
// and biases on 16 bytes.
#include "quantized.h"

namespace pyengine {

template <typename T, ushort bits>
[[kernel, max_total_threads_per_threadgroup(256)]] void quantized_matmul(
    const device T* x [[buffer(0)]], // [M, K]
    const device uint* w [[buffer(1)]], // [N, K * bits / 32]
    const device T* scales [[buffer(2)]], // [N, K / group_size]
    const device T* biases [[buffer(3)]],
    device uchar* out [[buffer(4)]], // [M, N], T or float
    constant uint& M [[buffer(5)]],
    constant uint& N [[buffer(6)]],
    constant uint& K [[buffer(7)]],
    threadgroup float4* staged [[threadgroup(0)]],
    threadgroup uint4* factors [[threadgroup(1)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  multiply_tile<T, bits>(
      {w, scales, biases, out, N},
      x,
      M,
      K,
      staged,
      factors,
      group.x,
      group.y,
      thread_index);
}

INSTANTIATE("quantized_matmul_float32_8", quantized_matmul, float, 8)
INSTANTIATE("quantized_matmul_float32_6", quantized_matmul, float, 6)
INSTANTIATE("quantized_matmul_float32_4", quantized_matmul, float, 4)
INSTANTIATE("quantized_matmul_float16_8", quantized_matmul, half, 8)
INSTANTIATE("quantized_matmul_float16_6", quantized_matmul, half, 6)
INSTANTIATE("quantized_matmul_float16_4", quantized_matmul, half, 4)
INSTANTIATE("quantized_matmul_bfloat16_8", quantized_matmul, bfloat, 8)
INSTANTIATE("quantized_matmul_bfloat16_6", quantized_matmul, bfloat, 6)
INSTANTIATE("quantized_matmul_bfloat16_4", quantized_matmul, bfloat, 4)

} // namespace pyengine
