// residual_norm: h' = (h + norm(y) * weight) * scalar and the next norm of h'.
// The arithmetic is in residual_norm_cpu.cpp.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "norm_launch.h"
#include "op.h"
#include "ops/residual_norm_cpu.h"

namespace pyengine {

namespace {

// Inputs: h, y, weight, then scalar and next_weight where given.
struct ResidualNorm {
  static constexpr const char* op = "residual_norm";
  bool has_scalar;
  bool has_next;
  float eps;
  bool operator==(const ResidualNorm&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int E = out[0].shape(-1);
    if (!norm_fits(E)) {
      return {};
    }
    int rows = int(out[0].size() / E);
    auto dtype = out[0].dtype();
    auto array = [&](Role role, const char* name, mx::Shape shape) {
      int alignment = pair_alignment(E, dtype);
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
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    ResidualNormArgs args = {};
    args.sum = out[0].data<void>();
    args.next = has_next ? out[1].data<void>() : nullptr;
    args.storage = storage_of(out[0].dtype());
    args.E = out[0].shape(-1);
    args.eps = eps;
    return [h = Contiguous(in[0]),
            y = Contiguous(in[1]),
            weight = Contiguous(in[2]),
            scalar = Contiguous(in[has_scalar ? 3 : 2]),
            next_weight = Contiguous(in.back()),
            has_scalar = has_scalar,
            has_next = has_next,
            rows = int64_t(out[0].size()) / args.E,
            args]() mutable {
      args.h = h.get();
      args.y = y.get();
      args.weight = weight.get();
      args.scalar = has_scalar ? scalar.get() : nullptr;
      args.next_weight = has_next ? next_weight.get() : nullptr;
      int64_t width = 2 * int64_t(args.E);
      split_rows(rows, width, PYENGINE_PICK_KERNEL(residual_norm_rows), args);
    };
  }
};

// h', and its norm where next_weight is given.
Arrays residual_norm(
    const mx::array& h, // [..., E]
    const mx::array& y, // [..., E]
    const mx::array& weight, // [E]
    const std::optional<mx::array>& scalar, // [1]
    const std::optional<mx::array>& next_weight, // [E]
    float eps) {
  constexpr auto op = ResidualNorm::op;
  check_storage_dtype(op, "h", h);
  check(h.ndim() >= 1, op, "h", "have shape [..., E]", h.shape());
  check(eps > 0, op, "eps", "be positive", eps);
  Arrays inputs = {h, y, weight};
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
  size_t outputs = next_weight ? 2 : 1;
  return lazy_results(
      ResidualNorm{scalar.has_value(), next_weight.has_value(), eps},
      std::vector(outputs, h.shape()),
      std::vector(outputs, h.dtype()),
      std::move(inputs));
}

} // namespace

void bind_residual_norm(nb::module_& m) {
  m.def(
      "residual_norm",
      &residual_norm,
      "h"_a,
      "y"_a,
      "weight"_a,
      "scalar"_a.none(),
      "next_weight"_a.none(),
      "eps"_a);
}

} // namespace pyengine
