#pragma once
// block_attention_params.h: what the launches of block_attention are told about
// the call, for metal/block_attention.metal and csrc/ops/block_attention.cpp.

namespace pyengine {

struct BlockAttentionParams {
  int H;
  int P;
  int K;
  int D;
  int N;
  int tiles; // threadgroups that share the rows of an item, at most
  int keys; // that one threadgroup of scores takes
  int spans; // states of a row, at most
  int window; // 2^31 - 1 for none
  int ancestors; // entries of each row's line of them; 0 where there is no tree
  float scale;
  float minus_zero; // see product() in ordered_sum.h
};

// A slice of a piece. Those of a call stand in one list, 24 bytes each: 128 of
// them are within the 4096 that a launch may be given as constants.
struct BlockAttentionItem {
  int piece;
  int count; // rows of the piece
  int row; // of q, where the slice begins
  int first; // the same within the piece
  int positions; // at most 16
  int rows; // of positions * H / K that one threadgroup takes
};

} // namespace pyengine
