#pragma once
// rows_cpu.h: one row of a matmul's input, made ready for its kernel; and rows
// of NaN.

#include "cpu/kernel.h"

namespace pyengine {

// The weights that a row is multiplied with, which say how it lies in scratch.
// Unpacking groups of bytes that hold two or four weights gives every first
// weight, then every second, and so on; permuting x once is cheaper than
// permuting every weight.
enum class Order : uint8_t { dense, bytes, pairs, quads };

// Scratch holds whole chunks of 64 elements, the rest of the last one 0.
constexpr int padded_width(int width) {
  return (width + 63) / 64 * 64;
}

// Writes row `row` of a slice of `rows` rows to x as float32: 16 elements, then
// a gap for those of the other rows. So a kernel that takes 16 elements of each
// row at a time walks through scratch in one line. `vnni` and `amx` write rows
// of bfloat16 beside quantised weights as planes of bytes (planes.h).
PYENGINE_DECLARE_KERNEL(
    load_row,
    const void* from,
    Storage storage,
    int64_t stride,
    int width,
    Order order,
    int rows,
    int row,
    float* x)

// NaN in elements [at, at + count): what rows without a meaning give.
PYENGINE_DECLARE_KERNEL(
    store_nan,
    void* to,
    Storage storage,
    int64_t at,
    int64_t count)

} // namespace pyengine
