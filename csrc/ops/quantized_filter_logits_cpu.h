#pragma once
// quantized_filter_logits_cpu.h: arguments of the processor kernels.

#include "ops/filter_logits_cpu.h"
#include "ops/quantized_matmul_cpu.h"

namespace pyengine {

struct QuantizedFilterLogitsArgs {
  QuantizedMatmulArgs matmul; // of a slice; no out
  FilterArgs filter; // of all rows
  int first; // row of the slice's first
  float softcap; // 0: none
};

// Takes logits [begin, end) of the slice's rows into kept, one heap a row.
// Scratch as quantized_matmul_sums wants it.
PYENGINE_DECLARE_KERNEL(
    quantized_filter_logits_columns,
    const QuantizedFilterLogitsArgs& args,
    int begin,
    int end,
    float* scratch,
    Kept* kept)

// Results of the slice's rows from all heaps, [heaps, M].
PYENGINE_DECLARE_KERNEL(
    quantized_filter_logits_finish,
    const QuantizedFilterLogitsArgs& args,
    Kept* kept,
    int heaps)

} // namespace pyengine
