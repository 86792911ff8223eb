#pragma once
// norm_launch.h: the threadgroups of metal/norm.h and metal/rope.h, for the ops
// that norm whole rows and heads.

#include "launch.h"

namespace pyengine {

// A simdgroup holds 1024 elements of a row, a threadgroup has at most 16.
constexpr int norm_piece = 1024;
constexpr int norm_max_pieces = 16;

inline bool norm_fits(int width) {
  return 0 < width && width <= norm_piece * norm_max_pieces;
}

// Rows of an even width are read in pairs of elements.
inline int pair_alignment(int width, mx::Dtype dtype) {
  return int(mx::size_of(dtype)) * (width % 2 == 0 ? 2 : 1);
}

// Without buffers: one threadgroup per row.
inline Launch
norm_launch(const std::string& op, int rows, int width, mx::Dtype dtype) {
  Launch launch(
      op,
      op + "_" + dtype_name(dtype),
      {rows, 1, 1},
      {32 * ((width + norm_piece - 1) / norm_piece), 1, 1});
  return launch;
}

// Without buffers: one threadgroup per four heads of a row, one simdgroup per
// head, with the head's floats in threadgroup memory.
inline Launch heads_launch(
    const std::string& op,
    int heads,
    int rows,
    int D,
    mx::Dtype dtype) {
  constexpr int simds = 4;
  Launch launch(
      op,
      op + "_" + dtype_name(dtype),
      {(heads + simds - 1) / simds, rows, 1},
      {32 * simds, 1, 1});
  launch.threadgroup_memory = {{0, simds * D * int(sizeof(float))}};
  return launch;
}

} // namespace pyengine
