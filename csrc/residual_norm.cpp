// residual_norm: checks and primitive; the arithmetic is in
// residual_norm_cpu.cpp.

#include "residual_norm.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <memory>

#include "bindings.h"
#include "check.h"
#include "isa.h"
#include "mlx/backend/cpu/encoder.h"
#include "packed.h"
#include "residual_norm_cpu.h"
#include "split.h"
#include "storage.h"

namespace pyengine {

namespace {

constexpr const char* op = "residual_norm";

} // namespace

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

  auto primitive = std::make_shared<ResidualNorm>(
      mx::to_stream({}), scalar.has_value(), next_weight.has_value(), eps);
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
    split_rows(rows, 2 * args.E, [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(residual_norm_rows)(args, begin, end);
    });
  });
}

void ResidualNorm::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  throw std::runtime_error(
      "[residual_norm] has no Metal kernel yet; "
      "pyengine.ops.residual_norm runs plain MLX on a GPU.");
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
}

} // namespace pyengine
