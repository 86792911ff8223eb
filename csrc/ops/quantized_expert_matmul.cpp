// quantized_expert_matmul: each row times the quantised matrices of the experts
// that it was routed to. On the processor rows are grouped by expert, then run
// through the kernels of quantized_matmul and glu.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/gated.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "op.h"
#include "quantized.h"

namespace pyengine {

namespace {

struct Args {
  QuantizedMatmulArgs matrix; // of all experts: one below the other
  QuantizedMatmulArgs up;
  bool gated;
  const int32_t* ids; // [T, U]
  int pairs; // T * U
  int per_row; // pairs that share a row of x: U or 1
  int experts;
  int N;
  char* out; // [T, U, N]
  Order order;
};

// The (token, slot) pairs of every expert, in order, and at the end those whose
// id names none.
std::vector<std::vector<int>> group_pairs(const Args& args) {
  std::vector<std::vector<int>> groups(args.experts + 1);
  for (int pair = 0; pair < args.pairs; ++pair) {
    int id = args.ids[pair];
    bool known = id >= 0 && id < args.experts;
    groups[known ? id : args.experts].push_back(pair);
  }
  return groups;
}

// NaN in the rows of some pairs.
void spoil(const Args& args, const std::vector<int>& pairs) {
  Storage storage = args.matrix.out_storage;
  for (int pair : pairs) {
    PYENGINE_PICK_KERNEL(store_nan)
    (args.out, storage, int64_t(pair) * args.N, args.N);
  }
}

// Up to max_rows pairs of one expert.
void run_expert(
    const Args& args,
    const Rows& rows,
    int expert,
    const int* pairs,
    int count) {
  static thread_local Scratch of_slice;
  int K = args.matrix.K;
  Plan plan = matmul_plan(
      count,
      args.N,
      K,
      (args.gated ? 2 : 1) * (int64_t(K) * args.matrix.bits / 8));
  float* x = of_slice.floats(plan.scratch);
  for (int m = 0; m < count; ++m) {
    rows.load(pairs[m] / args.per_row, args.order, count, m, x);
  }
  auto matrix_of = [&](const QuantizedMatmulArgs& stack) {
    auto matrix = from_row(stack, int64_t(expert) * args.N);
    matrix.x = x;
    matrix.M = count;
    return matrix;
  };
  auto matrix = matrix_of(args.matrix);
  auto up = args.gated ? matrix_of(args.up) : matrix;
  size_t size = matrix.out_storage == Storage::float32 ? 4 : 2;
  auto work = [&](int group) {
    static thread_local Scratch of_group;
    int begin = group * plan.columns;
    int columns = std::min(begin + plan.columns, args.N) - begin;
    float* sums = of_group.floats(
        gated_scratch(count, columns, K, matrix.group_size, args.gated));
    if (args.gated) {
      gated_columns(matrix, up, begin, begin + columns, sums, sums);
    } else {
      auto part = from_row(matrix, begin);
      part.N = columns;
      part.out = sums;
      PYENGINE_PICK_KERNEL(quantized_matmul_columns)
      (part, 0, columns, sums + size_t(count) * columns);
    }
    auto* from = reinterpret_cast<const char*>(sums);
    for (int m = 0; m < count; ++m) {
      std::memcpy(
          args.out + (int64_t(pairs[m]) * args.N + begin) * size,
          from + m * columns * size,
          columns * size);
    }
  };
  Pool::shared().run(plan.groups, work, threads_for(plan.work));
}

constexpr int max_launch_slots = 32; // experts of a token that a kernel lists

// Inputs: x, w, scales, biases, then the three of up where given, then ids.
struct QuantizedExpertMatmul {
  static constexpr const char* op = "quantized_expert_matmul";
  int group_size;
  int bits;
  bool operator==(const QuantizedExpertMatmul&) const = default;

  static bool is_gated(const Arrays& in) {
    return in.size() == 8;
  }

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    const auto& x = in[0];
    int T = out[0].shape(0), U = out[0].shape(1), N = out[0].shape(2);
    int X = in[1].shape(0), K = x.shape(-1);
    if (T > max_launch_rows || U > max_launch_slots || !has_short_rows(x)) {
      return {};
    }
    bool gated = is_gated(in);
    bool one_row = x.ndim() == 2; // of x for all experts of a token
    auto dtype = x.dtype(), out_dtype = out[0].dtype();
    int matrices = gated ? 2 : 1;
    Tile tile =
        quantized_tile(T, int64_t(X) * N * matrices, dtype, bits, matrices);
    auto launch = quantized_launch(
        op, T, N, K, tile, dtype, out_dtype, group_size, bits, matrices);
    launch.grid = {launch.grid[0], X, launch.grid[1]};
    launch.constants[4] = gated;
    launch.constants[5] = one_row;
    // The pairs of 16 tokens and their number, in whole 16 bytes.
    int list = 2 * (max_rows * U + 1);
    launch.threadgroup_memory.emplace_back(2, (list + 15) / 16 * 16);
    launch.buffers = {Buffer::array(Role::in, "x", x.shape(), dtype, 16)};
    for (std::string matrix : {"", "up_"}) {
      // Without a gate the kernel's second matrix is the first again.
      auto name = gated ? matrix : "";
      add_matrix(launch, name, {X, N}, K, dtype, group_size, bits);
    }
    launch.buffers.push_back(Buffer::array(Role::in, "ids", {T, U}, mx::int32));
    launch.buffers.push_back(
        Buffer::array(Role::out, "out", {T, U, N}, out_dtype));
    add_scalars(launch, {{"tokens", T}, {"slots", U}, {"N", N}, {"K", K}});
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    Rows rows(in[0]);
    Args args = {};
    args.gated = is_gated(in);
    args.matrix = quantized_args(&in[1], in[0], group_size, bits);
    args.matrix.out_storage = storage_of(out[0].dtype());
    args.up = args.matrix;
    if (args.gated) {
      args.up = quantized_args(&in[4], in[0], group_size, bits);
    }
    args.pairs = int(in.back().size());
    args.per_row = in[0].ndim() == 2 ? out[0].shape(1) : 1;
    args.experts = in[1].shape(0);
    args.N = out[0].shape(2);
    args.out = out[0].data<char>();
    args.order = quantized_order(bits);
    return
        [rows = std::move(rows), ids = Contiguous(in.back()), args]() mutable {
          args.ids = ids.get<int32_t>();
          auto groups = group_pairs(args);
          spoil(args, groups.back());
          for (int expert = 0; expert < args.experts; ++expert) {
            const auto& pairs = groups[expert];
            for (int first = 0; first < int(pairs.size()); first += max_rows) {
              int count = std::min(int(pairs.size()) - first, max_rows);
              run_expert(args, rows, expert, pairs.data() + first, count);
            }
          }
        };
  }
};

mx::array quantized_expert_matmul(
    const mx::array& x, // [T, K] or [T, U, K]
    const Arrays& stack, // w, scales, biases [X, N, ...]
    const Arrays& up, // the same again, or empty
    const mx::array& ids, // int32 [T, U]
    Integer group_size,
    Integer bits,
    std::optional<mx::Dtype> out_dtype) {
  constexpr auto op = QuantizedExpertMatmul::op;
  check(
      x.ndim() == 2 || x.ndim() == 3,
      op,
      "x",
      "have shape [T, K] or [T, U, K]",
      x.shape());
  check_dtype(op, "ids", ids, mx::int32, "be int32");
  check(ids.ndim() == 2, op, "ids", "have shape [T, U]", ids.shape());
  check(ids.size() <= INT32_MAX, op, "ids", "be fewer than 2**31", ids.shape());
  int T = x.shape(0), U = ids.shape(1);
  check_shape(op, "ids", ids, {T, U});
  if (x.ndim() == 3) {
    check_shape(op, "x", x, {T, U, x.shape(-1)});
  }
  check(stack.size() == 3, op, "stack", "have 3 arrays", stack.size());
  check(
      up.empty() || up.size() == 3,
      op,
      "up",
      "have 3 arrays or none",
      up.size());
  std::vector<QuantizedMatrix> stacks = {{"", stack[0], stack[1], stack[2]}};
  if (!up.empty()) {
    stacks.push_back({"up_", up[0], up[1], up[2]});
  }
  check_quantized(op, x, stacks, group_size, bits, 3);
  int X = stack[0].shape(0), N = stack[0].shape(1);
  check(X > 0, op, "w", "have at least 1 expert", X);
  mx::Dtype dtype = check_out_dtype(op, x, out_dtype);
  check(
      up.empty() || dtype == x.dtype(),
      op,
      "out_dtype",
      "be the dtype of x where up is given",
      dtype);

  Arrays inputs = {x};
  for (const auto* matrix : {&stack, &up}) {
    for (const auto& a : *matrix) {
      inputs.push_back(made_contiguous(a));
    }
  }
  inputs.push_back(ids);
  return lazy_result(
      QuantizedExpertMatmul{group_size, bits},
      {T, U, N},
      dtype,
      std::move(inputs));
}

} // namespace

void bind_quantized_expert_matmul(nb::module_& m) {
  m.def(
      "quantized_expert_matmul",
      &quantized_expert_matmul,
      "x"_a,
      "stack"_a,
      "up"_a,
      "ids"_a,
      "group_size"_a,
      "bits"_a,
      "out_dtype"_a.none());
}

} // namespace pyengine
