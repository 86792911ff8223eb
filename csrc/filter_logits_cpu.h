#pragma once
// filter_logits_cpu.h: arguments of the processor kernel.

#include "kernel.h"

namespace pyengine {

constexpr int max_candidates = 256;

// One logit, to be sorted: higher logits have lower keys.
struct SortKey {
  uint32_t key;
  int32_t id;
};

struct FilterLogitsArgs {
  const float* logits; // [rows, V]
  int32_t* ids; // [rows, count], best first
  float* probs; // [rows, count]
  int32_t* flags; // [rows]
  int V;
  int count; // candidates kept, at most max_candidates, or V
  int edits; // L
  const int32_t* edit_ids; // [L]
  const float* edit_factors; // [rows, L]
  const float* edit_deltas; // [rows, L]
  const int32_t* edit_order; // [L], positions in edit_ids, lowest id first
  SortKey* scratch; // [2 * V] where count is more than max_candidates
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
