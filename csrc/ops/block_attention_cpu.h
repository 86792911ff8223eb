#pragma once
// block_attention_cpu.h: arguments and state of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

// Softmax partials are taken over chunks of absolute position, which are pages,
// and folded in order within a span, spans in order within a row. Both cuts are
// fixed, so the order of every sum is too; threads may share the spans of one
// head.
constexpr int attention_chunk = 64;
constexpr int attention_span = 512;
constexpr int attention_max_width = 512;

struct BlockAttentionArgs {
  const void* q; // [R, H, D], storage
  const void* k; // [P, K, 64, D], storage
  const void* v;
  void* out; // [R, H, D], storage
  int64_t k_strides[3]; // of P, K and 64, in elements
  int64_t v_strides[3];
  Storage storage;
  int H;
  int P;
  int K;
  int D;
  int N;
  int window;
  float scale;
};

// The rows of one key head in one slice of a piece: R = positions * H / K rows,
// position by position.
struct AttentionRows {
  int head; // of K
  int row; // of q
  int positions; // 1..max_rows
  int position; // of the first row
  const int32_t* table; // [N], pages: each that is seen is one of the P
  // Of a tree, else null. Row i sits at position + depths[i], and its position
  // + j has the key that is at position + ancestors[i * A + j].
  const int32_t* depths;
  const int32_t* ancestors;
  int A;
};

// Running softmax of R rows: largest score, sum of exp, weighted sum of values.
// A row that has seen nothing has sum 0.
constexpr int64_t attention_state_size(int64_t R, int64_t D) {
  return R * (D + 2);
}

// Reads R rows of q into q32 [R, D].
PYENGINE_DECLARE_KERNEL(
    attention_load,
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    float* q32)

// Sets state to the softmax over the visible positions of one span.
PYENGINE_DECLARE_KERNEL(
    attention_over_span,
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    const float* q32,
    int64_t span,
    float* state)

// total = total followed by next, which is used up.
PYENGINE_DECLARE_KERNEL(attention_fold, int R, int D, float* total, float* next)

// Divides and stores the rows.
PYENGINE_DECLARE_KERNEL(
    attention_finish,
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    float* state)

} // namespace pyengine
