#pragma once
// matmul_launch.h: the tile of metal/matmul.h, chosen here for all matmuls.
//
// Four simdgroups of 32 columns (64 for 4 bits) read x together: at 16 rows of
// bfloat16 its bytes then equal those of 8-bit weights. float32 rows are twice
// as long, and get twice the columns. Few rows are staged many chunks at a
// time, so that barriers stay rare: at most 8 KiB up to 8 rows, 16 KiB at 16.

#include <algorithm>

#include "kernel.h"
#include "launch.h"

namespace pyengine {

inline int matmul_simds(mx::Dtype dtype) {
  return dtype == mx::float32 ? 8 : 4;
}

// Threadgroups that share the N columns of a matrix, a simdgroup owning
// `simd_columns` of them.
inline int column_blocks(int N, int simd_columns, mx::Dtype dtype) {
  int columns = matmul_simds(dtype) * simd_columns;
  return (N + columns - 1) / columns;
}

inline Launch matmul_launch(
    std::string library,
    std::string kernel,
    int M,
    int N,
    int simd_columns,
    mx::Dtype dtype) {
  constexpr int chunk_bytes = 256 * 4; // of one staged row
  int rows = std::clamp(M, 1, max_rows);
  int chunks = std::max(1, 8 / rows);
  Launch launch;
  launch.library = std::move(library);
  launch.kernel = std::move(kernel);
  launch.constants = {{0, rows}, {1, chunks}};
  launch.grid = {
      column_blocks(N, simd_columns, dtype), (M + max_rows - 1) / max_rows, 1};
  launch.threadgroup = {32 * matmul_simds(dtype), 1, 1};
  launch.threadgroup_memory = {{0, rows * chunks * chunk_bytes}};
  return launch;
}

// Buffers of a quantised matrix, or of a stack of them: `rows` is what stands
// before its last dimension. 6 bits are loaded in words, the others in 16
// bytes.
inline void add_matrix(
    Launch& launch,
    const std::string& matrix,
    mx::Shape rows,
    int K,
    mx::Dtype dtype,
    int group_size,
    int bits) {
  using Role = Buffer::Role;
  mx::Shape packed = rows, factors = rows;
  packed.push_back(int(int64_t(K) * bits / 32));
  factors.push_back(K / group_size);
  launch.buffers.insert(
      launch.buffers.end(),
      {Buffer::array(
           Role::in, matrix + "w", packed, mx::uint32, bits == 6 ? 4 : 16),
       Buffer::array(Role::in, matrix + "scales", factors, dtype),
       Buffer::array(Role::in, matrix + "biases", factors, dtype)});
}

inline void add_scalars(
    Launch& launch,
    const std::vector<std::pair<const char*, int>>& scalars) {
  for (auto [name, value] : scalars) {
    launch.buffers.push_back(Buffer::scalar(name, uint32_t(value)));
  }
}

} // namespace pyengine
