#pragma once
// accept_block_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

// A row's scratch, and a model's vocabulary, are no larger (config_json.py).
constexpr int max_vocab = 1 << 21;

// Longest row of q that is searched for every candidate of p.
constexpr int max_scanned = 256;

// Of a sequence, as int32. A block without drafts is a plain draw under each.
enum class Rule : int32_t { residual, block, coupled };

// One block.
struct AcceptBlockArgs {
  const int32_t* p_ids; // [k + 1, n]
  const float* p_probs; // [k + 1, n]
  const int32_t* q_ids; // [k, m]
  const float* q_probs; // [k, m]
  const int32_t* drafts; // [k]
  int32_t* accepted; // []
  int32_t* next; // []
  float* weights; // [n], scratch
  float* by_id; // [vocab], scratch of zeros where m > max_scanned, else null
  int k;
  int n;
  int m;
  int vocab;
  Rule rule;
  uint32_t position;
  uint32_t seed;
};

PYENGINE_DECLARE_KERNEL(accept_one_block, const AcceptBlockArgs& args)

} // namespace pyengine
