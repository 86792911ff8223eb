#pragma once
// matmul_launch.h: the tile of metal/matmul.h, chosen here for all matmuls.
//
// Four simdgroups of 32 columns in all (64 for 4 bits) read x together: at 16
// rows of bfloat16 its bytes then equal those of 8-bit weights. float32 rows
// are twice as long, and get 64 columns. Few rows are staged many chunks at a
// time, so that barriers stay rare: at most 8 KiB up to 8 rows, 16 KiB at 16.
// Scales and biases take 4 KiB (8 with 64 columns). Few rows of few columns get
// half as many, so that there are threadgroups for all cores.

#include <algorithm>

#include "cpu/kernel.h"
#include "launch.h"

namespace pyengine {

constexpr int few_columns = 8192;
constexpr int few_rows = 6;

// The simdgroups of a threadgroup, and the columns that each owns.
struct Tile {
  int simds;
  int columns;

  // Threadgroups that share N columns.
  int threadgroups(int N) const {
    return (N + simds * columns - 1) / (simds * columns);
  }
  bool divides(int N) const {
    return N % (simds * columns) == 0;
  }
};

inline Launch matmul_launch(
    std::string library,
    std::string kernel,
    int M,
    int N,
    int K,
    Tile tile) {
  constexpr int chunk_bytes = 256 * 4; // of one staged row
  int rows = std::clamp(M, 1, max_rows);
  int chunks = std::max(1, (tile.simds < 4 ? 4 : 8) / rows);
  Launch launch(
      std::move(library),
      std::move(kernel),
      {tile.threadgroups(N), (M + max_rows - 1) / max_rows, 1},
      {32 * tile.simds, 1, 1});
  bool whole = K % 256 == 0 && tile.divides(N);
  launch.constants = {{0, rows}, {1, chunks}, {7, tile.simds}, {8, whole}};
  launch.constants[9] = M <= max_rows || M % max_rows == 0;
  launch.threadgroup_memory = {{0, rows * chunks * chunk_bytes}};
  return launch;
}

// Whether x has rows, and what a threadgroup reads of it and of its matrix is
// within 32 bits of where it starts.
inline bool has_short_rows(const mx::array& x) {
  int K = x.shape(-1);
  return K > 0 && K <= 1 << 24 && x.size() <= UINT32_MAX;
}

// Of M rows times one matrix, or two whose columns alternate; `columns` of all
// matrices together.
inline Tile quantized_tile(
    int M,
    int64_t columns,
    mx::Dtype dtype,
    int bits,
    int matrices = 1) {
  bool long_rows = dtype == mx::float32 && bits != 4;
  bool halve = columns <= few_columns && M <= few_rows;
  return {
      (long_rows ? 8 : 4) / (halve ? 2 : 1), (bits == 4 ? 16 : 8) / matrices};
}

// Without buffers.
inline Launch quantized_launch(
    const std::string& op,
    int M,
    int N,
    int K,
    Tile tile,
    mx::Dtype dtype,
    mx::Dtype out_dtype,
    int group_size,
    int bits,
    int matrices = 1) {
  auto launch = matmul_launch(
      op,
      op + "_" + dtype_name(dtype) + "_" + std::to_string(bits),
      M,
      N,
      K,
      tile);
  launch.constants[2] = out_dtype == mx::float32 && dtype != mx::float32;
  launch.constants[3] = group_size;
  // Scales and biases: 512 bytes for every four columns (metal/quantized.h).
  int bytes = tile.simds * tile.columns * matrices / 4 * 512;
  launch.threadgroup_memory.emplace_back(1, bytes);
  return launch;
}

// Buffers of a quantised matrix, or of a stack of them: `rows` is what stands
// before its last dimension. Weights of 6 bits are loaded in words, all else in
// 16 bytes.
inline void add_matrix(
    Launch& launch,
    const std::string& matrix,
    mx::Shape rows,
    int K,
    mx::Dtype dtype,
    int group_size,
    int bits) {
  mx::Shape weights = rows, factors = rows;
  weights.push_back(int(int64_t(K) * bits / 32));
  factors.push_back(K / group_size);
  launch.buffers.insert(
      launch.buffers.end(),
      {Buffer::array(
           Role::in, matrix + "w", weights, mx::uint32, bits == 6 ? 4 : 16),
       Buffer::array(Role::in, matrix + "scales", factors, dtype, 16),
       Buffer::array(Role::in, matrix + "biases", factors, dtype, 16)});
}

inline void add_scalars(
    Launch& launch,
    const std::vector<std::pair<const char*, int>>& scalars) {
  for (auto [name, value] : scalars) {
    launch.buffers.push_back(Buffer::scalar(name, uint32_t(value)));
  }
}

} // namespace pyengine
