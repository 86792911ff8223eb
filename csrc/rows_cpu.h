#pragma once
// rows_cpu.h: one row of a matmul's input, made ready for its kernel.

#include "kernel.h"

namespace pyengine {

// How many consecutive elements a byte group of packed weights holds. Unpacking
// it gives every first element, then every second, and so on; permuting x once
// is cheaper than permuting every weight.
enum class Order : uint8_t { plain = 1, pairs = 2, quads = 4 };

// Rows in scratch are this many floats apart: whole blocks of 64, the rest 0.
constexpr int padded_width(int width) {
  return (width + 63) / 64 * 64;
}

PYENGINE_DECLARE_KERNEL(
    load_row,
    const void* from,
    Storage storage,
    int64_t stride,
    int width,
    Order order,
    float* to)

} // namespace pyengine
