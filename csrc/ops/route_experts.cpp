// route_experts: which experts a row uses, and their weights. The arithmetic is
// in route_experts_cpu.cpp.

#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/integer.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "op.h"
#include "ops/route_experts_cpu.h"

namespace pyengine {

namespace {

constexpr int max_launch_used = 32; // experts that a simdgroup chooses

// Inputs: logits, scales. Outputs: ids, weights.
struct RouteExperts {
  static constexpr const char* op = "route_experts";
  int used;
  bool operator==(const RouteExperts&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int T = in[0].shape(0), X = in[0].shape(1);
    if (used > max_launch_used) {
      return {};
    }
    Launch launch(op, op, {T, 1, 1}, {32, 1, 1});
    launch.buffers = {
        Buffer::array(Role::in, "logits", {T, X}, mx::float32),
        Buffer::array(Role::in, "scales", {X}, mx::float32),
        Buffer::array(Role::out, "ids", {T, used}, mx::int32),
        Buffer::array(Role::out, "weights", {T, used}, mx::float32),
        Buffer::scalar("X", uint32_t(X)),
        Buffer::scalar("used", uint32_t(used))};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    RouteExpertsArgs args = {};
    args.ids = out[0].data<int32_t>();
    args.weights = out[1].data<float>();
    args.X = in[0].shape(1);
    args.used = used;
    return [logits = Contiguous(in[0]),
            scales = Contiguous(in[1]),
            rows = int64_t(in[0].shape(0)),
            args]() mutable {
      args.logits = logits.get<float>();
      args.scales = scales.get<float>();
      split_rows(
          rows,
          16 * int64_t(args.X),
          PYENGINE_PICK_KERNEL(route_experts_rows),
          args);
    };
  }
};

Arrays route_experts(
    const mx::array& logits, // [T, X]
    const mx::array& scales, // [X]
    Integer used) {
  constexpr auto op = RouteExperts::op;
  check_dtype(op, "logits", logits, mx::float32, "be float32");
  check(logits.ndim() == 2, op, "logits", "have shape [T, X]", logits.shape());
  int T = logits.shape(0), X = logits.shape(1);
  check_array(op, "scales", scales, mx::float32, {X});
  check(
      1 <= used && used <= X, op, "used", "be at least 1 and at most X", used);
  return lazy_results(
      RouteExperts{used},
      {{T, used}, {T, used}},
      {mx::int32, mx::float32},
      {logits, scales});
}

} // namespace

void bind_route_experts(nb::module_& m) {
  m.def("route_experts", &route_experts, "logits"_a, "scales"_a, "used"_a);
}

} // namespace pyengine
