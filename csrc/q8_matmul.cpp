// q8_matmul: checks, primitive and the two plans; the arithmetic is in
// q8_matmul_cpu.cpp.

#include "q8_matmul.h"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <memory>

#include "bindings.h"
#include "check.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "mlx/backend/cpu/encoder.h"
#include "q8_matmul_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "q8_matmul";

} // namespace

Plan q8_matmul_plan(int M, int N, int K, int group_size, int bits) {
  Plan plan = matmul_plan(M, N, K, int64_t(K) * bits / 8);
  plan.group_scratch += 2 * size_t(plan.columns) * (K / group_size);
  return plan;
}

Launch q8_matmul_launch(
    int M,
    int N,
    int K,
    mx::Dtype dtype,
    mx::Dtype out_dtype,
    int group_size,
    int bits) {
  using Role = Buffer::Role;
  auto launch = matmul_launch(
      op,
      std::string(op) + "_" + dtype_name(dtype) + "_" + std::to_string(bits),
      M,
      N,
      bits == 4 ? 16 : 8,
      dtype);
  launch.constants[2] = out_dtype == mx::float32 && dtype != mx::float32;
  launch.constants[3] = group_size;
  launch.buffers = {
      Buffer::array(Role::in, "x", {M, K}, dtype, 16),
      Buffer::array(
          Role::in,
          "w",
          {N, int(int64_t(K) * bits / 32)},
          mx::uint32,
          bits == 6 ? 4 : 16),
      Buffer::array(Role::in, "scales", {N, K / group_size}, dtype),
      Buffer::array(Role::in, "biases", {N, K / group_size}, dtype),
      Buffer::array(Role::out, "out", {M, N}, out_dtype),
      Buffer::scalar("M", M),
      Buffer::scalar("N", N),
      Buffer::scalar("K", K)};
  return launch;
}

mx::array q8_matmul(
    const mx::array& x,
    const mx::array& w,
    const mx::array& scales,
    const mx::array& biases,
    int group_size,
    int bits,
    std::optional<mx::Dtype> out_dtype) {
  check(bits == 4 || bits == 6 || bits == 8, op, "bits", "be 4, 6 or 8", bits);
  check(
      group_size == 32 || group_size == 64 || group_size == 128,
      op,
      "group_size",
      "be 32, 64 or 128",
      group_size);
  check_storage_dtype(op, "x", x);
  check(x.ndim() >= 1, op, "x", "have at least 1 dimension", x.ndim());
  check_dtype(op, "w", w, mx::uint32, "be uint32");
  check(w.ndim() == 2, op, "w", "have shape [N, K * bits / 32]", w.shape());
  int K = x.shape(-1);
  int N = w.shape(0);
  if (K % group_size != 0) {
    fail(
        op,
        "the last dimension of x",
        "be a multiple of group_size " + std::to_string(group_size),
        K);
  }
  check_shape(op, "w", w, {N, int(int64_t(K) * bits / 32)});
  check_shape(op, "scales", scales, {N, K / group_size});
  check_shape(op, "biases", biases, {N, K / group_size});
  for (auto [what, a] : {std::pair{"scales", &scales}, {"biases", &biases}}) {
    check_dtype(op, what, *a, x.dtype(), "have the dtype of x");
  }
  mx::Dtype dtype = check_out_dtype(op, x, out_dtype);

  auto stream = mx::to_stream({});
  auto shape = x.shape();
  shape.back() = N;
  return mx::array(
      std::move(shape),
      dtype,
      std::make_shared<Q8Matmul>(stream, group_size, bits),
      {rows_of(x, stream),
       whole(w, stream),
       whole(scales, stream),
       whole(biases, stream)});
}

void Q8Matmul::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  const auto& w = inputs[1];
  const auto& scales = inputs[2];
  const auto& biases = inputs[3];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }

  Rows rows(x);
  Q8MatmulArgs args;
  args.w = w.data<uint8_t>();
  args.scales = scales.data<void>();
  args.biases = biases.data<void>();
  args.out = out.data<void>();
  args.storage = storage_of(x.dtype());
  args.out_storage = storage_of(out.dtype());
  args.N = w.shape(0);
  args.K = x.shape(-1);
  args.group_size = group_size_;
  args.bits = bits_;
  auto plan = q8_matmul_plan(rows.count(), args.N, args.K, group_size_, bits_);
  Order order = bits_ == 8 ? Order::plain
      : bits_ == 6         ? Order::quads
                           : Order::pairs;

  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(x);
  encoder.set_input_array(w);
  encoder.set_input_array(scales);
  encoder.set_input_array(biases);
  encoder.set_output_array(out);
  encoder.dispatch([rows = std::move(rows), plan, args, order] {
    auto kernel = PYENGINE_PICK_KERNEL(q8_matmul_columns);
    run_matmul(rows, plan, args, order, kernel);
  });
}

void Q8Matmul::eval_gpu(
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
  auto launch =
      q8_matmul_launch(M, N, K, x.dtype(), out.dtype(), group_size_, bits_);
  run_on_gpu(launch, stream(), inputs, outputs);
}

bool Q8Matmul::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const Q8Matmul&>(other);
  return group_size_ == o.group_size_ && bits_ == o.bits_;
}

void bind_q8_matmul(nb::module_& m) {
  m.def(
      "q8_matmul",
      &q8_matmul,
      nb::arg("x"),
      nb::arg("w"),
      nb::arg("scales"),
      nb::arg("biases"),
      nb::arg("group_size"),
      nb::arg("bits"),
      nb::arg("out_dtype").none());
  m.def(
      "q8_matmul_plan",
      &q8_matmul_plan,
      nb::arg("M"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("group_size"),
      nb::arg("bits"));
  m.def(
      "q8_matmul_launch",
      &q8_matmul_launch,
      nb::arg("M"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("dtype"),
      nb::arg("out_dtype"),
      nb::arg("group_size"),
      nb::arg("bits"));
}

} // namespace pyengine
