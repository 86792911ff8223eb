// residual_norm: checks and primitive; the arithmetic is in
// residual_norm_cpu.cpp.

#include "ops/residual_norm.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "mlx/backend/cpu/encoder.h"
#include "norm_launch.h"
#include "ops/residual_norm_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "residual_norm";

} // namespace

bool residual_norm_has_launch(int E) {
  return norm_fits(E);
}

Launch residual_norm_launch(
    int rows,
    int E,
    mx::Dtype dtype,
    bool has_scalar,
    bool has_next,
    float eps) {
  using Role = Buffer::Role;
  int alignment = pair_alignment(E, dtype);
  auto array = [&](Role role, const char* name, mx::Shape shape) {
    return Buffer::array(role, name, std::move(shape), dtype, alignment);
  };
  Launch launch = norm_launch(op, rows, E, dtype);
  launch.constants = {{0, has_next}};
  auto weight = array(Role::in, "weight", {E});
  launch.buffers = {
      array(Role::in, "h", {rows, E}),
      array(Role::in, "y", {rows, E}),
      weight,
      has_scalar ? Buffer::array(Role::in, "scalar", {1}, dtype) : weight,
      array(Role::out, "sum", {rows, E}),
      Buffer::scalar("E", uint32_t(E)),
      Buffer::scalar("scaled", uint32_t(has_scalar)),
      Buffer::scalar("eps", eps),
      Buffer::scalar("minus_zero", -0.0f)};
  if (has_next) {
    launch.buffers.push_back(array(Role::in, "next_weight", {E}));
    launch.buffers.push_back(array(Role::out, "next", {rows, E}));
  }
  return launch;
}

std::pair<mx::array, std::optional<mx::array>> residual_norm(
    const mx::array& h,
    const mx::array& y,
    const mx::array& weight,
    const std::optional<mx::array>& scalar,
    const std::optional<mx::array>& next_weight,
    float eps) {
  check_storage_dtype(op, "h", h);
  check(h.ndim() >= 1, op, "h", "have shape [..., E]", h.shape());
  check(eps > 0, op, "eps", "be positive", eps);
  std::vector<mx::array> inputs = {h, y, weight};
  check_shape(op, "y", y, h.shape());
  check_shape(op, "weight", weight, {h.shape(-1)});
  if (scalar) {
    check_shape(op, "scalar", *scalar, {1});
    inputs.push_back(*scalar);
  }
  if (next_weight) {
    check_shape(op, "next_weight", *next_weight, {h.shape(-1)});
    inputs.push_back(*next_weight);
  }
  auto same = [&](const char* what, const mx::array& a) {
    check_dtype(op, what, a, h.dtype(), "have the dtype of h");
  };
  same("y", y);
  same("weight", weight);
  same("scalar", scalar.value_or(h));
  same("next_weight", next_weight.value_or(h));

  auto stream = mx::to_stream({});
  for (auto& input : inputs) {
    input = packed_on_gpu(input, stream);
  }
  auto primitive = std::make_shared<ResidualNorm>(
      stream, scalar.has_value(), next_weight.has_value(), eps);
  if (!next_weight) {
    return {
        mx::array(h.shape(), h.dtype(), primitive, std::move(inputs)),
        std::nullopt};
  }
  auto outputs = mx::array::make_arrays(
      {h.shape(), h.shape()}, {h.dtype(), h.dtype()}, primitive, inputs);
  return {outputs[0], outputs[1]};
}

void ResidualNorm::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  ResidualNormArgs args;
  args.sum = nullptr;
  args.next = nullptr;
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    encoder.set_output_array(out);
  }
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  const auto& h = inputs[0];
  if (h.size() == 0) {
    return;
  }

  args.sum = outputs[0].data<void>();
  args.next = has_next_ ? outputs[1].data<void>() : nullptr;
  args.storage = storage_of(h.dtype());
  args.E = h.shape(-1);
  args.eps = eps_;
  encoder.dispatch([h = Packed(h),
                    y = Packed(inputs[1]),
                    weight = Packed(inputs[2]),
                    scalar = Packed(inputs[has_scalar_ ? 3 : 2]),
                    next_weight = Packed(inputs.back()),
                    has_scalar = has_scalar_,
                    has_next = has_next_,
                    rows = int64_t(h.size()) / args.E,
                    args]() mutable {
    args.h = h.get();
    args.y = y.get();
    args.weight = weight.get();
    args.scalar = has_scalar ? scalar.get() : nullptr;
    args.next_weight = has_next ? next_weight.get() : nullptr;
    split_rows(rows, 2 * int64_t(args.E), [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(residual_norm_rows)(args, begin, end);
    });
  });
}

void ResidualNorm::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  const auto& h = inputs[0];
  if (h.size() == 0) {
    return;
  }
  int E = h.shape(-1);
  if (!residual_norm_has_launch(E)) {
    throw std::runtime_error(
        "[residual_norm] has no Metal kernel for rows of more than 16384 "
        "elements; pyengine.ops.residual_norm runs plain MLX there.");
  }
  auto launch = residual_norm_launch(
      int(h.size() / E), E, h.dtype(), has_scalar_, has_next_, eps_);
  auto given = inputs;
  if (!has_scalar_) {
    given.insert(given.begin() + 3, inputs[2]); // the launch names it twice
  }
  run_on_gpu(launch, stream(), given, outputs);
}

bool ResidualNorm::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const ResidualNorm&>(other);
  return has_scalar_ == o.has_scalar_ && has_next_ == o.has_next_ &&
      eps_ == o.eps_;
}

void bind_residual_norm(nb::module_& m) {
  m.def(
      "residual_norm",
      &residual_norm,
      nb::arg("h"),
      nb::arg("y"),
      nb::arg("weight"),
      nb::arg("scalar").none(),
      nb::arg("next_weight").none(),
      nb::arg("eps"));
  m.def("residual_norm_has_launch", &residual_norm_has_launch, nb::arg("E"));
  m.def(
      "residual_norm_launch",
      &residual_norm_launch,
      nb::arg("rows"),
      nb::arg("E"),
      nb::arg("dtype"),
      nb::arg("has_scalar"),
      nb::arg("has_next"),
      nb::arg("eps"));
}

} // namespace pyengine
