// quantized_matmul: checks, primitive and the two plans; the arithmetic is in
// quantized_matmul_cpu.cpp.

#include "ops/quantized_matmul.h"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <memory>

#include "bindings.h"
#include "check.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/quantized_matmul_cpu.h"
#include "quantized.h"

namespace pyengine {

namespace {

constexpr const char* op = "quantized_matmul";

} // namespace

Plan quantized_matmul_plan(int M, int N, int K, int group_size, int bits) {
  Plan plan = matmul_plan(M, N, K, int64_t(K) * bits / 8);
  plan.group_scratch += 2 * size_t(plan.columns) * (K / group_size);
  return plan;
}

Launch quantized_matmul_launch(
    int M,
    int N,
    int K,
    mx::Dtype dtype,
    mx::Dtype out_dtype,
    int group_size,
    int bits) {
  using Role = Buffer::Role;
  auto launch = packed_launch(op, M, N, dtype, out_dtype, group_size, bits);
  launch.buffers = {Buffer::array(Role::in, "x", {M, K}, dtype, 16)};
  add_matrix(launch, "", {N}, K, dtype, group_size, bits);
  launch.buffers.push_back(Buffer::array(Role::out, "out", {M, N}, out_dtype));
  add_scalars(launch, {{"M", M}, {"N", N}, {"K", K}});
  return launch;
}

mx::array quantized_matmul(
    const mx::array& x,
    const mx::array& w,
    const mx::array& scales,
    const mx::array& biases,
    Integer group_size,
    Integer bits,
    std::optional<mx::Dtype> out_dtype) {
  check_packed(op, x, {{"", w, scales, biases}}, group_size, bits);
  mx::Dtype dtype = check_out_dtype(op, x, out_dtype);

  auto stream = mx::to_stream({});
  auto shape = x.shape();
  shape.back() = w.shape(0);
  return mx::array(
      std::move(shape),
      dtype,
      std::make_shared<QuantizedMatmul>(stream, group_size, bits),
      {rows_of(x, stream),
       whole(w, stream),
       whole(scales, stream),
       whole(biases, stream)});
}

void QuantizedMatmul::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }

  Rows rows(inputs[0]);
  auto args = packed_args(&inputs[1], inputs[0], group_size_, bits_);
  args.out = out.data<void>();
  args.out_storage = storage_of(out.dtype());
  auto plan =
      quantized_matmul_plan(rows.count(), args.N, args.K, group_size_, bits_);
  Order order = packed_order(bits_);

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  encoder.dispatch([rows = std::move(rows), plan, args, order] {
    auto kernel = PYENGINE_PICK_KERNEL(quantized_matmul_columns);
    run_matmul(rows, plan, args, order, kernel);
  });
}

void QuantizedMatmul::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  int N = inputs[1].shape(0), K = x.shape(-1);
  int M = int(out.size() / N);
  auto launch = quantized_matmul_launch(
      M, N, K, x.dtype(), out.dtype(), group_size_, bits_);
  run_on_gpu(launch, stream(), inputs, outputs);
}

bool QuantizedMatmul::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const QuantizedMatmul&>(other);
  return group_size_ == o.group_size_ && bits_ == o.bits_;
}

void bind_quantized_matmul(nb::module_& m) {
  m.def(
      "quantized_matmul",
      &quantized_matmul,
      nb::arg("x"),
      nb::arg("w"),
      nb::arg("scales"),
      nb::arg("biases"),
      nb::arg("group_size"),
      nb::arg("bits"),
      nb::arg("out_dtype").none());
  m.def(
      "quantized_matmul_plan",
      &quantized_matmul_plan,
      nb::arg("M"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("group_size"),
      nb::arg("bits"));
  m.def(
      "quantized_matmul_launch",
      &quantized_matmul_launch,
      nb::arg("M"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("dtype"),
      nb::arg("out_dtype"),
      nb::arg("group_size"),
      nb::arg("bits"));
}

} // namespace pyengine
