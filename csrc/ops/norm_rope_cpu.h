#pragma once
// norm_rope_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

constexpr int rope_max_width = 1024;

struct NormRopeArgs {
  const void* x; // [B, T, H, D], storage
  const void* weight; // [D], storage
  const float* inv_freq; // [D / 2]
  void* out; // [B, T, H, D], storage
  Storage storage;
  int T;
  int H;
  int D;
  int offset;
  float eps;
};

// Rows are the B * T positions, all heads of each.
PYENGINE_DECLARE_ROWS(norm_rope_rows, NormRopeArgs)

} // namespace pyengine
