#pragma once
// filter_logits_cpu.h: arguments of the processor kernel.

#include "kernel.h"

namespace pyengine {

constexpr int max_candidates = 256;

struct FilterLogitsArgs {
  const float* logits; // [rows, V]
  int32_t* ids; // [rows, count], best first
  float* probs; // [rows, count]
  int V;
  int count; // candidates kept, at most max_candidates and V
  float temperature;
  float top_p;
  float min_p;
};

PYENGINE_DECLARE_KERNEL(
    filter_logits_rows,
    const FilterLogitsArgs& args,
    int64_t begin,
    int64_t end)

} // namespace pyengine
