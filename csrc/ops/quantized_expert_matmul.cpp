// quantized_expert_matmul: checks, primitive and the launch of the Metal
// kernel. On the processor rows are grouped by expert, then run through the
// kernels of quantized_matmul and geglu.

#include "ops/quantized_expert_matmul.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>

#include "bindings.h"
#include "cpu/gated.h"
#include "cpu/packed.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "mlx/backend/cpu/encoder.h"
#include "quantized.h"

namespace pyengine {

namespace {

constexpr const char* op = "quantized_expert_matmul";

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
  static thread_local Scratch shared;
  int K = args.matrix.K;
  Plan plan = matmul_plan(
      count,
      args.N,
      K,
      (args.gated ? 2 : 1) * (int64_t(K) * args.matrix.bits / 8));
  float* x = shared.floats(plan.scratch);
  for (int m = 0; m < count; ++m) {
    rows.load(pairs[m] / args.per_row, args.order, count, x + 16 * m);
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
  run_groups(plan, [&](int group) {
    static thread_local Scratch own;
    int begin = group * plan.columns;
    int columns = std::min(begin + plan.columns, args.N) - begin;
    float* sums = own.floats(
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
  });
}

} // namespace

bool quantized_expert_matmul_has_launch(int U) {
  return U <= 32;
}

Launch quantized_expert_matmul_launch(
    int T,
    int U,
    int X,
    int N,
    int K,
    bool gated,
    bool shared,
    mx::Dtype dtype,
    mx::Dtype out_dtype,
    int group_size,
    int bits) {
  using Role = Buffer::Role;
  auto launch = packed_launch(
      op, T, N, dtype, out_dtype, group_size, bits, gated ? 2 : 1);
  launch.grid = {launch.grid[0], X, launch.grid[1]};
  launch.constants[4] = gated;
  launch.constants[5] = shared;
  // The pairs of 16 tokens and their number, in whole 16 bytes.
  int list = 2 * (max_rows * U + 1);
  launch.threadgroup_memory.emplace_back(2, (list + 15) / 16 * 16);
  mx::Shape rows = shared ? mx::Shape{T, K} : mx::Shape{T, U, K};
  launch.buffers = {Buffer::array(Role::in, "x", rows, dtype, 16)};
  for (std::string matrix : {"", "up_"}) {
    // Without a gate the kernel's second matrix is the first again.
    add_matrix(launch, gated ? matrix : "", {X, N}, K, dtype, group_size, bits);
  }
  launch.buffers.push_back(Buffer::array(Role::in, "ids", {T, U}, mx::int32));
  launch.buffers.push_back(
      Buffer::array(Role::out, "out", {T, U, N}, out_dtype));
  add_scalars(launch, {{"tokens", T}, {"slots", U}, {"N", N}, {"K", K}});
  return launch;
}

mx::array quantized_expert_matmul(
    const mx::array& x,
    const std::vector<mx::array>& stack,
    const std::vector<mx::array>& up,
    const mx::array& ids,
    Integer group_size,
    Integer bits,
    std::optional<mx::Dtype> out_dtype) {
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
  std::vector<PackedMatrix> stacks = {{"", stack[0], stack[1], stack[2]}};
  if (!up.empty()) {
    stacks.push_back({"up_", up[0], up[1], up[2]});
  }
  check_packed(op, x, stacks, group_size, bits, 3);
  int X = stack[0].shape(0), N = stack[0].shape(1);
  check(X > 0, op, "w", "have at least 1 expert", X);
  mx::Dtype dtype = check_out_dtype(op, x, out_dtype);
  check(
      up.empty() || dtype == x.dtype(),
      op,
      "out_dtype",
      "be the dtype of x where up is given",
      dtype);

  auto stream = mx::to_stream({});
  std::vector<mx::array> inputs = {rows_of(x, stream)};
  for (const auto* matrix : {&stack, &up}) {
    for (const auto& a : *matrix) {
      inputs.push_back(whole(a, stream));
    }
  }
  inputs.push_back(packed_on_gpu(ids, stream));
  return mx::array(
      {T, U, N},
      dtype,
      std::make_shared<QuantizedExpertMatmul>(stream, group_size, bits),
      std::move(inputs));
}

void QuantizedExpertMatmul::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }

  Rows rows(inputs[0]);
  Args args = {};
  args.gated = inputs.size() == 8;
  args.matrix = packed_args(&inputs[1], inputs[0], group_size_, bits_);
  args.matrix.out_storage = storage_of(out.dtype());
  args.up = args.matrix;
  if (args.gated) {
    args.up = packed_args(&inputs[4], inputs[0], group_size_, bits_);
  }
  args.pairs = int(inputs.back().size());
  args.per_row = inputs[0].ndim() == 2 ? out.shape(1) : 1;
  args.experts = inputs[1].shape(0);
  args.N = out.shape(2);
  args.out = out.data<char>();
  args.order = packed_order(bits_);

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  encoder.dispatch(
      [rows = std::move(rows), ids = Packed(inputs.back()), args]() mutable {
        args.ids = static_cast<const int32_t*>(ids.get());
        auto groups = group_pairs(args);
        spoil(args, groups.back());
        for (int expert = 0; expert < args.experts; ++expert) {
          const auto& pairs = groups[expert];
          for (int first = 0; first < int(pairs.size()); first += max_rows) {
            int count = std::min(int(pairs.size()) - first, max_rows);
            run_expert(args, rows, expert, pairs.data() + first, count);
          }
        }
      });
}

void QuantizedExpertMatmul::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  if (!quantized_expert_matmul_has_launch(out.shape(1))) {
    throw std::runtime_error(
        "[quantized_expert_matmul] has no Metal kernel for more than 32 experts a "
        "token; pyengine.ops.quantized_expert_matmul runs plain MLX there.");
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  bool gated = inputs.size() == 8;
  auto launch = quantized_expert_matmul_launch(
      out.shape(0),
      out.shape(1),
      inputs[1].shape(0),
      out.shape(2),
      x.shape(-1),
      gated,
      x.ndim() == 2,
      x.dtype(),
      out.dtype(),
      group_size_,
      bits_);
  std::vector<mx::array> bound(inputs.begin(), inputs.begin() + 4);
  int second = gated ? 4 : 1;
  bound.insert(
      bound.end(), inputs.begin() + second, inputs.begin() + second + 3);
  bound.push_back(inputs.back());
  run_on_gpu(launch, stream(), bound, outputs);
}

bool QuantizedExpertMatmul::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const QuantizedExpertMatmul&>(other);
  return group_size_ == o.group_size_ && bits_ == o.bits_;
}

void bind_quantized_expert_matmul(nb::module_& m) {
  m.def(
      "quantized_expert_matmul",
      &quantized_expert_matmul,
      nb::arg("x"),
      nb::arg("stack"),
      nb::arg("up"),
      nb::arg("ids"),
      nb::arg("group_size"),
      nb::arg("bits"),
      nb::arg("out_dtype").none());
  m.def(
      "quantized_expert_matmul_has_launch",
      &quantized_expert_matmul_has_launch,
      nb::arg("U"));
  m.def(
      "quantized_expert_matmul_launch",
      &quantized_expert_matmul_launch,
      nb::arg("T"),
      nb::arg("U"),
      nb::arg("X"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("gated"),
      nb::arg("shared"),
      nb::arg("dtype"),
      nb::arg("out_dtype"),
      nb::arg("group_size"),
      nb::arg("bits"));
}

} // namespace pyengine
