#pragma once
// norm_launch.h: the threadgroups of metal/norm.h, for the ops that norm whole
// rows.

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

// Without buffers: a threadgroup a row.
inline Launch
norm_launch(const std::string& op, int rows, int width, mx::Dtype dtype) {
  Launch launch;
  launch.library = op;
  launch.kernel = op + "_" + dtype_name(dtype);
  launch.grid = {rows, 1, 1};
  launch.threadgroup = {32 * ((width + norm_piece - 1) / norm_piece), 1, 1};
  return launch;
}

} // namespace pyengine
