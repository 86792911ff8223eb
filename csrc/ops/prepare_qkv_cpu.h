#pragma once
// prepare_qkv_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct PrepareQkvArgs {
  const void* q; // [T, H, D], storage
  const void* k; // [T, K, D]
  const void* v; // [T, K, D]
  const void* q_weight; // [D]
  const void* k_weight; // [D]
  const float* inv_freq; // [D / 2]
  void* out; // [T, H, D]
  void* keys; // [K, C, D]
  void* values; // [K, C, D]
  Storage storage;
  int T;
  int H;
  int K;
  int D;
  int C;
  int offset; // position of row 0
  float eps;
};

// Rows are positions.
PYENGINE_DECLARE_ROWS(prepare_qkv_rows, PrepareQkvArgs)

} // namespace pyengine
