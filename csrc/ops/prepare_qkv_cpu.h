#pragma once
// prepare_qkv_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct PrepareQkvArgs {
  const void* q; // [R, H, D], storage
  const void* k; // [R, K, D]
  const void* v; // [R, K, D]
  const void* q_weight; // [D]
  const void* k_weight; // [D]
  const float* inv_freq; // [D / 2]
  const int32_t* positions; // [R]
  const int32_t* slots; // [R]: whose place a row's keys and values go to
  const int32_t* owners; // [R]
  const int32_t* tables; // [Q, N]
  void* out; // [R, H, D]
  void* keys; // [P, K, 64, D]
  void* values; // [P, K, 64, D]
  Storage storage;
  int H;
  int K;
  int D;
  int P;
  int Q;
  int N;
  float eps;
  bool norm_values;
};

// Rows are positions.
PYENGINE_DECLARE_ROWS(prepare_qkv_rows, PrepareQkvArgs)

} // namespace pyengine
