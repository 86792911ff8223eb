#pragma once
// rows_cpu.h: one row of a matmul's input, made ready for its kernel; and rows
// of NaN.

#include "cpu/kernel.h"

namespace pyengine {

// How many consecutive elements a byte group of packed weights holds. Unpacking
// it gives every first element, then every second, and so on; permuting x once
// is cheaper than permuting every weight.
enum class Order : uint8_t { plain = 1, pairs = 2, quads = 4 };

// Scratch holds whole chunks of 64 elements, the rest of the last one 0.
constexpr int padded_width(int width) {
  return (width + 63) / 64 * 64;
}

// Writes a row as float32 for a slice of `rows` rows: 16 elements, then a gap
// for those of the other rows. So a kernel that takes 16 elements of each row
// at a time walks through scratch in one line.
PYENGINE_DECLARE_KERNEL(
    load_row,
    const void* from,
    Storage storage,
    int64_t stride,
    int width,
    Order order,
    int rows,
    float* to)

// NaN in elements [at, at + count): what rows without a meaning give.
PYENGINE_DECLARE_KERNEL(
    store_nan,
    void* to,
    Storage storage,
    int64_t at,
    int64_t count)

} // namespace pyengine
