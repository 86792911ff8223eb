#pragma once
// quantized_matmul_cpu.h: arguments of the processor kernel.

#include <cstddef>

#include "cpu/kernel.h"

namespace pyengine {

struct QuantizedMatmulArgs {
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

// Scales and biases that a kernel keeps for `columns` columns: of 32 at least,
// which `vnni` and `amx` take together.
constexpr size_t factors_of(int columns, int K, int group_size) {
  return size_t(2) * (columns < 32 ? 32 : columns) * (K / group_size);
}

// Columns [begin, end) of every row into scratch, [M, end - begin]. Behind them
// it holds factors_of these columns.
PYENGINE_DECLARE_KERNEL(
    quantized_matmul_sums,
    const QuantizedMatmulArgs& args,
    int begin,
    int end,
    float* scratch)

// The same, and then writes them to out.
PYENGINE_DECLARE_KERNEL(
    quantized_matmul_columns,
    const QuantizedMatmulArgs& args,
    int begin,
    int end,
    float* scratch)

} // namespace pyengine
