// rms_norm: x / sqrt(mean(x^2) + eps) * weight. The arithmetic is in norm.h.

#include <nanobind/stl/optional.h>

#include <optional>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "norm_launch.h"
#include "op.h"
#include "ops/rms_norm_cpu.h"

namespace pyengine {

namespace {

// Inputs: x, and weight where there is one.
struct RmsNorm {
  static constexpr const char* op = "rms_norm";
  float eps;
  bool operator==(const RmsNorm&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int D = out[0].shape(-1);
    if (!norm_fits(D)) {
      return {};
    }
    int rows = int(out[0].size() / D);
    bool weighted = in.size() == 2;
    auto dtype = out[0].dtype();
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
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    RmsNormArgs args = {};
    args.out = out[0].data<void>();
    args.storage = storage_of(out[0].dtype());
    args.D = out[0].shape(-1);
    args.eps = eps;
    return [x = Contiguous(in[0]),
            weight = Contiguous(in.back()), // x again when there is none
            weighted = in.size() == 2,
            rows = int64_t(out[0].size()) / args.D,
            args]() mutable {
      args.x = x.get();
      args.weight = weighted ? weight.get() : nullptr;
      split_rows(rows, args.D, PYENGINE_PICK_KERNEL(rms_norm_rows), args);
    };
  }
};

mx::array rms_norm(
    const mx::array& x, // [..., D]
    const std::optional<mx::array>& weight, // [D]
    float eps) {
  constexpr auto op = RmsNorm::op;
  check_storage_dtype(op, "x", x);
  check(x.ndim() >= 1, op, "x", "have shape [..., D]", x.shape());
  check(eps > 0, op, "eps", "be positive", eps);
  Arrays inputs = {x};
  if (weight) {
    check_shape(op, "weight", *weight, {x.shape(-1)});
    check_dtype(op, "weight", *weight, x.dtype(), "have the dtype of x");
    inputs.push_back(*weight);
  }
  return lazy_result(RmsNorm{eps}, x.shape(), x.dtype(), std::move(inputs));
}

} // namespace

void bind_rms_norm(nb::module_& m) {
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a);
}

} // namespace pyengine
