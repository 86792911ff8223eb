#pragma once
// dense_matmul_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct DenseMatmulArgs {
  const void* w; // [N, K], storage
  const float* x; // scratch of M rows (rows_cpu.h)
  void* out; // [M, N], out_storage
  Storage storage;
  Storage out_storage;
  int M; // 1..max_rows
  int N;
  int K;
};

// Writes columns [begin, end) of every row. Scratch holds M * (end - begin).
PYENGINE_DECLARE_KERNEL(
    dense_matmul_columns,
    const DenseMatmulArgs& args,
    int begin,
    int end,
    float* scratch)

} // namespace pyengine
