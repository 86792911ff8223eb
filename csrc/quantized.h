#pragma once
// quantized.h: checks of MLX's affine quantised matrices, and how the processor
// reads them.

#include <string>

#include "check.h"
#include "q8_matmul_cpu.h"
#include "rows_cpu.h"
#include "storage.h"

namespace pyengine {

inline void check_packing(const char* op, int group_size, int bits) {
  check(bits == 4 || bits == 6 || bits == 8, op, "bits", "be 4, 6 or 8", bits);
  check(
      group_size == 32 || group_size == 64 || group_size == 128,
      op,
      "group_size",
      "be 32, 64 or 128",
      group_size);
}

inline void check_width(const char* op, const mx::array& x, int group_size) {
  if (x.shape(-1) % group_size != 0) {
    fail(
        op,
        "the last dimension of x",
        "be a multiple of group_size " + std::to_string(group_size),
        x.shape(-1));
  }
}

// `matrix` in front of the names in messages; `shape` is the packed weights'.
inline void check_matrix(
    const char* op,
    const std::string& matrix,
    mx::Dtype dtype,
    const mx::array& w,
    const mx::array& scales,
    const mx::array& biases,
    mx::Shape shape,
    int factors) {
  check_shape(op, (matrix + "w").c_str(), w, shape);
  shape.back() = factors;
  check_shape(op, (matrix + "scales").c_str(), scales, shape);
  check_shape(op, (matrix + "biases").c_str(), biases, shape);
  for (auto [what, a] : {std::pair{"scales", &scales}, {"biases", &biases}}) {
    check_dtype(op, (matrix + what).c_str(), *a, dtype, "have the dtype of x");
  }
}

inline int packed_width(int K, int bits) {
  return int(int64_t(K) * bits / 32);
}

// The order in which a row lies beside weights of this width.
inline Order packed_order(int bits) {
  return bits == 8 ? Order::plain : bits == 6 ? Order::quads : Order::pairs;
}

// What a kernel needs to know of a matrix: w, scales and biases.
inline Q8MatmulArgs packed_args(
    const mx::array* matrix,
    const mx::array& x,
    int group_size,
    int bits) {
  Q8MatmulArgs args = {};
  args.w = matrix[0].data<uint8_t>();
  args.scales = matrix[1].data<void>();
  args.biases = matrix[2].data<void>();
  args.storage = storage_of(x.dtype());
  args.N = matrix[0].shape(-2);
  args.K = x.shape(-1);
  args.group_size = group_size;
  args.bits = bits;
  return args;
}

} // namespace pyengine
