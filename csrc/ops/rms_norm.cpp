// rms_norm: checks and primitive; the arithmetic is in norm.h.

#include "ops/rms_norm.h"

#include <nanobind/stl/optional.h>

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "mlx/backend/cpu/encoder.h"
#include "norm_launch.h"
#include "ops/rms_norm_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "rms_norm";

} // namespace

bool rms_norm_has_launch(int D) {
  return norm_fits(D);
}

Launch
rms_norm_launch(int rows, int D, mx::Dtype dtype, bool weighted, float eps) {
  using Role = Buffer::Role;
  int alignment = pair_alignment(D, dtype);
  Launch launch = norm_launch(op, rows, D, dtype);
  auto x = Buffer::array(Role::in, "x", {rows, D}, dtype, alignment);
  auto weight = Buffer::array(Role::in, "weight", {D}, dtype, alignment);
  launch.buffers = {
      x,
      weighted ? weight : x,
      Buffer::array(Role::out, "out", {rows, D}, dtype),
      Buffer::scalar("D", uint32_t(D)),
      Buffer::scalar("weighted", uint32_t(weighted)),
      Buffer::scalar("eps", eps)};
  return launch;
}

mx::array rms_norm(
    const mx::array& x,
    const std::optional<mx::array>& weight,
    float eps) {
  check_storage_dtype(op, "x", x);
  check(x.ndim() >= 1, op, "x", "have shape [..., D]", x.shape());
  check(eps > 0, op, "eps", "be positive", eps);
  auto stream = mx::to_stream({});
  std::vector<mx::array> inputs = {packed_on_gpu(x, stream)};
  if (weight) {
    check_shape(op, "weight", *weight, {x.shape(-1)});
    check_dtype(op, "weight", *weight, x.dtype(), "have the dtype of x");
    inputs.push_back(packed_on_gpu(*weight, stream));
  }
  return mx::array(
      x.shape(),
      x.dtype(),
      std::make_shared<RmsNorm>(stream, eps),
      std::move(inputs));
}

void RmsNorm::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  const auto& weight = inputs.back(); // x again when there is none
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }

  RmsNormArgs args;
  args.out = out.data<void>();
  args.storage = storage_of(x.dtype());
  args.D = x.shape(-1);
  args.eps = eps_;

  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(x);
  encoder.set_input_array(weight);
  encoder.set_output_array(out);
  encoder.dispatch([x = Packed(x),
                    weight = Packed(weight),
                    weighted = inputs.size() == 2,
                    rows = int64_t(out.size()) / args.D,
                    args]() mutable {
    args.x = x.get();
    args.weight = weighted ? weight.get() : nullptr;
    split_rows(rows, args.D, [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(rms_norm_rows)(args, begin, end);
    });
  });
}

void RmsNorm::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  int D = x.shape(-1);
  if (!rms_norm_has_launch(D)) {
    throw std::runtime_error(
        "[rms_norm] has no Metal kernel for rows of more than 16384 "
        "elements; pyengine.ops.rms_norm runs plain MLX there.");
  }
  auto launch = rms_norm_launch(
      int(out.size() / D), D, x.dtype(), inputs.size() == 2, eps_);
  run_on_gpu(launch, stream(), {x, inputs.back()}, outputs);
}

bool RmsNorm::is_equivalent(const mx::Primitive& other) const {
  return eps_ == static_cast<const RmsNorm&>(other).eps_;
}

void bind_rms_norm(nb::module_& m) {
  m.def(
      "rms_norm",
      &rms_norm,
      nb::arg("x"),
      nb::arg("weight").none(),
      nb::arg("eps"));
  m.def("rms_norm_has_launch", &rms_norm_has_launch, nb::arg("D"));
  m.def(
      "rms_norm_launch",
      &rms_norm_launch,
      nb::arg("rows"),
      nb::arg("D"),
      nb::arg("dtype"),
      nb::arg("weighted"),
      nb::arg("eps"));
}

} // namespace pyengine
