// quantized_matmuls: checks, primitive and launch. The arithmetic is that of
// quantized_matmul_cpu.cpp, whose columns stand here one matrix behind the
// other.

#include "ops/quantized_matmuls.h"

#include <nanobind/stl/vector.h>

#include <memory>
#include <numeric>

#include "bindings.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "mlx/backend/cpu/encoder.h"
#include "quantized.h"

namespace pyengine {

namespace {

constexpr const char* op = "quantized_matmuls";

// Columns [begin, end) of all matrices side by side: of each the part that lies
// within.
void columns(
    const std::vector<QuantizedMatmulArgs>& matrices,
    int first,
    int count,
    const float* x,
    int begin,
    int end,
    float* scratch) {
  for (const auto& matrix : matrices) {
    int from = std::max(begin, 0), to = std::min(end, matrix.N);
    if (from < to) {
      PYENGINE_PICK_KERNEL(quantized_matmul_columns)
      (at_rows(matrix, first, count, x), from, to, scratch);
    }
    begin -= matrix.N;
    end -= matrix.N;
  }
}

} // namespace

Launch quantized_matmuls_launch(
    int M,
    const std::vector<int>& N,
    int K,
    mx::Dtype dtype,
    int group_size,
    int bits) {
  using Role = Buffer::Role;
  constexpr const char* names[] = {"first_", "second_", "third_"};
  auto launch = packed_launch(op, M, 0, dtype, dtype, group_size, bits);
  // The blocks of columns of each matrix, side by side.
  for (int n : N) {
    launch.grid[0] += packed_tile(dtype, bits).blocks(n);
  }
  launch.constants[4] = N.size() == 3;
  launch.buffers = {Buffer::array(Role::in, "x", {M, K}, dtype, 16)};
  add_scalars(launch, {{"M", M}, {"K", K}});
  for (size_t i = 0; i < N.size(); ++i) {
    std::string name = names[i];
    add_matrix(launch, name, {N[i]}, K, dtype, group_size, bits);
    launch.buffers.push_back(
        Buffer::array(Role::out, name + "out", {M, N[i]}, dtype));
    launch.buffers.push_back(Buffer::scalar(name + "N", uint32_t(N[i])));
  }
  return launch;
}

std::vector<mx::array> quantized_matmuls(
    const mx::array& x,
    const std::vector<std::vector<mx::array>>& matrices,
    Integer group_size,
    Integer bits) {
  check(
      matrices.size() == 2 || matrices.size() == 3,
      op,
      "matrices",
      "be 2 or 3",
      matrices.size());
  std::vector<PackedMatrix> packed;
  for (size_t i = 0; i < matrices.size(); ++i) {
    std::string name = "matrices[" + std::to_string(i) + "]";
    const auto& m = matrices[i];
    check(m.size() == 3, op, name.c_str(), "have 3 arrays", m.size());
    packed.push_back({name + " ", m[0], m[1], m[2]});
  }
  check_packed(op, x, packed, group_size, bits, 2, true);

  auto stream = mx::to_stream({});
  std::vector<mx::array> inputs = {rows_of(x, stream)};
  std::vector<mx::Shape> shapes;
  for (const auto& matrix : matrices) {
    for (const auto& a : matrix) {
      inputs.push_back(whole(a, stream));
    }
    shapes.push_back(x.shape());
    shapes.back().back() = matrix[0].shape(0);
  }
  return mx::array::make_arrays(
      std::move(shapes),
      std::vector<mx::Dtype>(matrices.size(), x.dtype()),
      std::make_shared<QuantizedMatmuls>(stream, group_size, bits),
      inputs);
}

void QuantizedMatmuls::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  int N = 0;
  std::vector<QuantizedMatmulArgs> matrices;
  for (size_t i = 0; i < outputs.size(); ++i) {
    auto& out = outputs[i];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto args = packed_args(&inputs[1 + 3 * i], inputs[0], group_size_, bits_);
    args.out = out.data<void>();
    args.out_storage = args.storage;
    matrices.push_back(args);
    N += args.N;
  }
  Rows rows(inputs[0]);
  if (N == 0 || rows.count() == 0) {
    return;
  }
  int K = inputs[0].shape(-1);
  auto plan = quantized_matmul_plan(rows.count(), N, K, group_size_, bits_);
  Order order = packed_order(bits_);

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  for (auto& out : outputs) {
    encoder.set_output_array(out);
  }
  encoder.dispatch([rows = std::move(rows), matrices, plan, N, order] {
    run_slices(
        rows, plan, N, order, [&](auto... at) { columns(matrices, at...); });
  });
}

void QuantizedMatmuls::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  std::vector<int> N;
  size_t size = 0;
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    N.push_back(out.shape(-1));
    size += out.size();
  }
  if (size == 0) {
    return;
  }
  int M = int(size / std::accumulate(N.begin(), N.end(), 0));
  auto launch = quantized_matmuls_launch(
      M, N, x.shape(-1), x.dtype(), group_size_, bits_);
  run_on_gpu(launch, stream(), inputs, outputs);
}

bool QuantizedMatmuls::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const QuantizedMatmuls&>(other);
  return group_size_ == o.group_size_ && bits_ == o.bits_;
}

void bind_quantized_matmuls(nb::module_& m) {
  m.def(
      "quantized_matmuls",
      &quantized_matmuls,
      nb::arg("x"),
      nb::arg("matrices"),
      nb::arg("group_size"),
      nb::arg("bits"));
  m.def(
      "quantized_matmuls_launch",
      &quantized_matmuls_launch,
      nb::arg("M"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("dtype"),
      nb::arg("group_size"),
      nb::arg("bits"));
}

} // namespace pyengine
