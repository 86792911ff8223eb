#pragma once
// q8_filter_logits_cpu.h: arguments of the processor kernels.

#include "filter_logits_cpu.h"
#include "q8_matmul_cpu.h"

namespace pyengine {

struct Q8FilterLogitsArgs {
  Q8MatmulArgs matmul; // of a slice; no out
  FilterArgs filter; // of all rows
  int first; // row of the slice's first
  float softcap; // 0: none
};

// Takes logits [begin, end) of the slice's rows into kept, one heap a row.
// Scratch as q8_matmul_sums wants it.
PYENGINE_DECLARE_KERNEL(
    q8_filter_logits_columns,
    const Q8FilterLogitsArgs& args,
    int begin,
    int end,
    float* scratch,
    Kept* kept)

// Results of the slice's rows from all heaps, [heaps, M].
PYENGINE_DECLARE_KERNEL(
    q8_filter_logits_finish,
    const Q8FilterLogitsArgs& args,
    Kept* kept,
    int heaps)

} // namespace pyengine
