#pragma once
// block_attention_params.h: what the launches of block_attention are told about
// the call, for metal/block_attention.metal and csrc/ops/block_attention.cpp.

namespace pyengine {

struct BlockAttentionParams {
  int T; // positions of the call
  int H;
  int K;
  int C;
  int D;
  int first; // of the slice that this launch is for
  int positions; // of the slice, at most 16
  int rows; // of positions * H / K that one threadgroup takes
  int keys; // that one threadgroup of scores takes
  int spans; // states of a head, at most
  int window; // 2^31 - 1 for none
  float scale;
  float minus_zero; // see product() in ordered_sum.h
};

} // namespace pyengine
