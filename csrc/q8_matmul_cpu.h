#pragma once
// q8_matmul_cpu.h: arguments of the processor kernel.

#include "kernel.h"

namespace pyengine {

struct Q8MatmulArgs {
  const uint8_t* w; // [N, K * bits / 8]
  const void* scales; // [N, K / group_size], storage
  const void* biases;
  const float* x; // scratch of M rows (rows_cpu.h)
  void* out; // [M, N], out_storage
  Storage storage;
  Storage out_storage;
  int M; // 1..max_rows
  int N;
  int K;
  int group_size;
  int bits;
};

// Columns [begin, end) of every row into scratch, [M, end - begin]. Behind them
// it holds, for each of these columns, K / group_size scales and biases.
PYENGINE_DECLARE_KERNEL(
    q8_matmul_sums,
    const Q8MatmulArgs& args,
    int begin,
    int end,
    float* scratch)

// The same, and then writes them to out.
PYENGINE_DECLARE_KERNEL(
    q8_matmul_columns,
    const Q8MatmulArgs& args,
    int begin,
    int end,
    float* scratch)

} // namespace pyengine
