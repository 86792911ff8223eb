#pragma once
// filter_logits_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

constexpr int max_candidates = 256;

// One logit, to be sorted: higher logits have lower keys.
struct SortKey {
  uint32_t key;
  int32_t id;
};

// What every filter is told: settings, edits, and where the result goes.
struct FilterArgs {
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
  float temperature;
  float top_p;
  float min_p;
};

struct FilterLogitsArgs {
  FilterArgs filter;
  const float* logits; // [rows, V]
  SortKey* scratch; // [2 * V] where count is more than max_candidates
};

struct Candidate {
  float value;
  int32_t id;
};

// The best candidates of a row among those of its logits that were seen.
struct Kept {
  int size; // a heap once there are `count` of them, the worst on top
  int next_edit; // in edit_order
  int32_t flag; // 0: all finite; 1: some -inf; 2: NaN or +inf
  Candidate heap[max_candidates];
};

PYENGINE_DECLARE_ROWS(filter_logits_rows, FilterLogitsArgs)

} // namespace pyengine
