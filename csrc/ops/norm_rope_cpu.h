#pragma once
// norm_rope_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

constexpr int rope_max_width = 1024;

struct NormRopeArgs {
  const void* x; // [R, H, D], storage
  const void* weight; // [D], storage
  const int32_t* positions; // [R]
  const float* inv_freq; // [D / 2]
  void* out; // [R, H, D], storage
  Storage storage;
  int H;
  int D;
  float eps;
};

// Rows are positions, all heads of each.
PYENGINE_DECLARE_ROWS(norm_rope_rows, NormRopeArgs)

} // namespace pyengine
