// dense_matmul: checks, primitive and the two plans; the arithmetic is in
// dense_matmul_cpu.cpp.

#include "ops/dense_matmul.h"

#include <nanobind/stl/optional.h>

#include <memory>

#include "bindings.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/dense_matmul_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "dense_matmul";

} // namespace

Plan dense_matmul_plan(int M, int N, int K, size_t itemsize) {
  return matmul_plan(M, N, K, K * itemsize);
}

Launch
dense_matmul_launch(int M, int N, int K, mx::Dtype dtype, mx::Dtype out_dtype) {
  using Role = Buffer::Role;
  Tile tile = {dtype == mx::float32 ? 8 : 4, 8};
  auto launch =
      matmul_launch(op, std::string(op) + "_" + dtype_name(dtype), M, N, tile);
  launch.constants[2] = out_dtype == mx::float32 && dtype != mx::float32;
  bool aligned = int64_t(K) * dtype.size() % 16 == 0;
  launch.constants[3] = aligned;
  launch.buffers = {
      Buffer::array(Role::in, "x", {M, K}, dtype, aligned ? 16 : 1),
      Buffer::array(Role::in, "w", {N, K}, dtype, aligned ? 16 : 1),
      Buffer::array(Role::out, "out", {M, N}, out_dtype)};
  add_scalars(launch, {{"M", M}, {"N", N}, {"K", K}});
  return launch;
}

mx::array dense_matmul(
    const mx::array& x,
    const mx::array& w,
    std::optional<mx::Dtype> out_dtype) {
  check_storage_dtype(op, "x", x);
  check(x.ndim() >= 1, op, "x", "have at least 1 dimension", x.ndim());
  check_rows(op, "x", x);
  check_dtype(op, "w", w, x.dtype(), "have the dtype of x");
  check(w.ndim() == 2, op, "w", "have shape [N, K]", w.shape());
  check_shape(op, "w", w, {w.shape(0), x.shape(-1)});
  mx::Dtype dtype = check_out_dtype(op, x, out_dtype);

  auto stream = mx::to_stream({});
  auto shape = x.shape();
  shape.back() = w.shape(0);
  return mx::array(
      std::move(shape),
      dtype,
      std::make_shared<DenseMatmul>(stream),
      {rows_of(x, stream), whole(w, stream)});
}

void DenseMatmul::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  const auto& w = inputs[1];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }

  Rows rows(x);
  DenseMatmulArgs args;
  args.w = w.data<void>();
  args.out = out.data<void>();
  args.storage = storage_of(x.dtype());
  args.out_storage = storage_of(out.dtype());
  args.N = w.shape(0);
  args.K = w.shape(1);
  auto plan = dense_matmul_plan(rows.count(), args.N, args.K, w.itemsize());

  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(x);
  encoder.set_input_array(w);
  encoder.set_output_array(out);
  encoder.dispatch([rows = std::move(rows), plan, args] {
    auto kernel = PYENGINE_PICK_KERNEL(dense_matmul_columns);
    run_matmul(rows, plan, args, Order::plain, kernel);
  });
}

void DenseMatmul::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  int N = inputs[1].shape(0), K = inputs[1].shape(1);
  int M = int(out.size() / N);
  auto launch = dense_matmul_launch(M, N, K, x.dtype(), out.dtype());
  run_on_gpu(launch, stream(), inputs, outputs);
}

void bind_dense_matmul(nb::module_& m) {
  m.def(
      "dense_matmul",
      &dense_matmul,
      nb::arg("x"),
      nb::arg("w"),
      nb::arg("out_dtype").none());
  m.def(
      "dense_matmul_plan",
      &dense_matmul_plan,
      nb::arg("M"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("itemsize"));
  m.def(
      "dense_matmul_launch",
      &dense_matmul_launch,
      nb::arg("M"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("dtype"),
      nb::arg("out_dtype"));
}

} // namespace pyengine
