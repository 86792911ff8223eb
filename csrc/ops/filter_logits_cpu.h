#pragma once
// filter_logits_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

constexpr int max_candidates = 256;

// Words of a row's mask: token t is bit t % 32 of word t / 32.
constexpr int mask_words(int V) {
  return (V - 1) / 32 + 1;
}

// One logit, to be sorted: higher logits have lower keys.
struct SortKey {
  uint32_t key;
  int32_t id;
};

// What every filter is told: settings of Q sequences, which of them each row
// belongs to, mask, edits, and where the result goes.
struct FilterArgs {
  int32_t* ids; // [R, n], best first; -1 past the row's own
  float* probs; // [R, n]
  int32_t* flags; // [R]
  int V;
  int n; // most candidates of a row: at most max_candidates, or V
  int Q;
  const int32_t* owner; // [R]
  const float* temperature; // [Q]
  const int32_t* top_k; // [Q], 0: all
  const float* top_p; // [Q]
  const float* min_p; // [Q]
  const uint32_t* mask; // [R, words], tokens that stay; null: all do
  int words;
  int edits; // L
  const int32_t* edit_ids; // [Q, L]
  const float* edit_factors; // [R, L]
  const float* edit_deltas; // [R, L]
  const int32_t* edit_order; // [Q, L], positions in edit_ids, lowest id first

  // Sequence of a row; no number leads out of the settings.
  int owner_of(int64_t row) const {
    int q = owner[row];
    return q < 0 ? 0 : q < Q ? q : Q - 1;
  }

  // Candidates of a row.
  int count_of(int64_t row) const {
    int k = top_k[owner_of(row)];
    return k > 0 && k < n ? k : n;
  }
};

struct FilterLogitsArgs {
  FilterArgs filter;
  const float* logits; // [rows, V]
  SortKey* scratch; // [2 * V] where n is more than max_candidates
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
