#pragma once
// quantized.h: checks of MLX's affine quantised matrices, and how the processor
// reads and shares them.

#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/integer.h"
#include "cpu/plan.h"
#include "cpu/rows_cpu.h"
#include "cpu/storage.h"
#include "matmul.h"
#include "ops/quantized_matmul_cpu.h"

namespace pyengine {

// A quantised matrix, or a stack of them, as an op is given it.
struct QuantizedMatrix {
  std::string name; // stands before w, scales and biases in messages
  const mx::array& w;
  const mx::array& scales;
  const mx::array& biases;
};

inline int quantized_width(int K, int bits) {
  return int(int64_t(K) * bits / 32);
}

inline void
check_quantisation(const char* op, Integer group_size, Integer bits) {
  check(bits == 4 || bits == 6 || bits == 8, op, "bits", "be 4, 6 or 8", bits);
  check(
      group_size == 32 || group_size == 64 || group_size == 128,
      op,
      "group_size",
      "be 32, 64 or 128",
      group_size);
}

// What all ops ask of x [..., K] and of their matrices [N, ...] or, with `ndim`
// 3, stacks [X, N, ...]. They have the shape of the first unless `own_rows`.
inline void check_quantized(
    const char* op,
    const mx::array& x,
    const std::vector<QuantizedMatrix>& matrices,
    Integer group_size,
    Integer bits,
    int ndim = 2,
    bool own_rows = false) {
  check_quantisation(op, group_size, bits);
  check_storage_dtype(op, "x", x);
  check(x.ndim() >= 1, op, "x", "have at least 1 dimension", x.ndim());
  check_rows(op, "x", x);
  for (const auto& [name, w, scales, biases] : matrices) {
    check_dtype(op, (name + "w").c_str(), w, mx::uint32, "be uint32");
  }
  const char* rule = ndim == 2 ? "have shape [N, K * bits / 32]"
                               : "have shape [X, N, K * bits / 32]";
  for (const auto& [name, w, scales, biases] : matrices) {
    bool first = &w == &matrices.front().w;
    if (first || own_rows) {
      check(int(w.ndim()) == ndim, op, (name + "w").c_str(), rule, w.shape());
    }
  }
  int K = x.shape(-1);
  if (K % group_size != 0) {
    fail(
        op,
        "the last dimension of x",
        "be a multiple of group_size " + std::to_string(group_size),
        K);
  }
  for (const auto& [name, w, scales, biases] : matrices) {
    auto shape = (own_rows ? w : matrices.front().w).shape();
    shape.back() = quantized_width(K, bits);
    check_shape(op, (name + "w").c_str(), w, shape);
    shape.back() = K / group_size;
    for (auto [what, a] : {std::pair{"scales", &scales}, {"biases", &biases}}) {
      check_shape(op, (name + what).c_str(), *a, shape);
    }
    for (auto [what, a] : {std::pair{"scales", &scales}, {"biases", &biases}}) {
      const char* same = "have the dtype of x";
      check_dtype(op, (name + what).c_str(), *a, x.dtype(), same);
    }
  }
}

// The order in which a row lies beside weights of this width.
inline Order quantized_order(int bits) {
  return bits == 8 ? Order::bytes : bits == 6 ? Order::quads : Order::pairs;
}

// How threads share a matrix: beside its sums a group keeps its factors.
inline Plan
quantized_matmul_plan(int M, int N, int K, int group_size, int bits) {
  Plan plan = matmul_plan(M, N, K, int64_t(K) * bits / 8);
  plan.group_scratch += factors_of(plan.columns, K, group_size);
  return plan;
}

// What a kernel needs to know of a matrix: w, scales and biases.
inline QuantizedMatmulArgs quantized_args(
    const mx::array* matrix,
    const mx::array& x,
    int group_size,
    int bits) {
  QuantizedMatmulArgs args = {};
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
