#pragma once
// gated.h: some columns of gelu_tanh(x @ gate.T) * (x @ up.T), or of that with
// silu, on the processor, from the kernels of quantized_matmul and glu: the
// bits are those of three ops, but what lies between them stays in the cache.

#include "cpu/isa.h"
#include "ops/glu_cpu.h"
#include "ops/quantized_matmul_cpu.h"

namespace pyengine {

// Floats of scratch for `columns` columns of `rows` rows: what the kernel needs
// for its sums and factors, and its result, twice if gated.
inline size_t
gated_scratch(int rows, int columns, int K, int group_size, bool gated) {
  size_t sums = size_t(rows) * columns;
  return (gated ? 3 : 2) * sums + factors_of(columns, K, group_size);
}

// The same matrix from row `begin` on.
inline QuantizedMatmulArgs from_row(QuantizedMatmulArgs args, int64_t begin) {
  int64_t size = args.storage == Storage::float32 ? 4 : 2;
  int64_t factors = begin * (args.K / args.group_size) * size;
  args.w += begin * (int64_t(args.K) * args.bits / 8);
  args.scales = static_cast<const char*>(args.scales) + factors;
  args.biases = static_cast<const char*>(args.biases) + factors;
  return args;
}

// Columns [begin, end) of all rows into out [M, end - begin] of the storage
// dtype. `gate` and `up` are alike but for their matrices.
inline void gated_columns(
    const QuantizedMatmulArgs& gate,
    const QuantizedMatmulArgs& up,
    int begin,
    int end,
    void* out,
    float* scratch,
    Activation activation = Activation::gelu) {
  int columns = end - begin;
  int64_t size = int64_t(gate.M) * columns;
  float* gates = scratch;
  float* ups = gates + size;
  auto multiply = [&](const QuantizedMatmulArgs& matrix, float* to) {
    auto args = from_row(matrix, begin);
    args.out = to;
    args.out_storage = args.storage;
    args.N = columns;
    PYENGINE_PICK_KERNEL(quantized_matmul_columns)(
        args, 0, columns, ups + size);
  };
  multiply(gate, gates);
  multiply(up, ups);
  PYENGINE_PICK_KERNEL(glu_range)
  ({gates, ups, out, gate.storage, activation}, 0, size);
}

// Rows of out [M, columns], one after the other, to where they belong.
inline void copy_rows(
    const char* from,
    int rows,
    size_t row_bytes,
    char* to,
    size_t pitch) {
  for (int m = 0; m < rows; ++m) {
    std::memcpy(to + m * pitch, from + m * row_bytes, row_bytes);
  }
}

} // namespace pyengine
