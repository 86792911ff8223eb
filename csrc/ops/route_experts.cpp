// route_experts: checks and primitive; the arithmetic is in
// route_experts_cpu.cpp.

#include "ops/route_experts.h"

#include <nanobind/stl/pair.h>

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/route_experts_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "route_experts";

} // namespace

bool route_experts_has_launch(int used) {
  return used <= 32;
}

Launch route_experts_launch(int T, int X, int used) {
  using Role = Buffer::Role;
  Launch launch;
  launch.library = op;
  launch.kernel = op;
  launch.grid = {T, 1, 1};
  launch.threadgroup = {32, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "logits", {T, X}, mx::float32),
      Buffer::array(Role::in, "scales", {X}, mx::float32),
      Buffer::array(Role::out, "ids", {T, used}, mx::int32),
      Buffer::array(Role::out, "weights", {T, used}, mx::float32),
      Buffer::scalar("X", uint32_t(X)),
      Buffer::scalar("used", uint32_t(used))};
  return launch;
}

std::pair<mx::array, mx::array>
route_experts(const mx::array& logits, const mx::array& scales, Integer used) {
  check_dtype(op, "logits", logits, mx::float32, "be float32");
  check(logits.ndim() == 2, op, "logits", "have shape [T, X]", logits.shape());
  int T = logits.shape(0), X = logits.shape(1);
  check_dtype(op, "scales", scales, mx::float32, "be float32");
  check_shape(op, "scales", scales, {X});
  check(
      1 <= used && used <= X, op, "used", "be at least 1 and at most X", used);
  auto stream = mx::to_stream({});
  auto outs = mx::array::make_arrays(
      {{T, used}, {T, used}},
      {mx::int32, mx::float32},
      std::make_shared<RouteExperts>(stream, used),
      {packed_on_gpu(logits, stream), packed_on_gpu(scales, stream)});
  return {outs[0], outs[1]};
}

void RouteExperts::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    encoder.set_output_array(out);
  }
  RouteExpertsArgs args = {
      nullptr,
      nullptr,
      outputs[0].data<int32_t>(),
      outputs[1].data<float>(),
      inputs[0].shape(1),
      used_};
  encoder.dispatch([logits = Packed(inputs[0]),
                    scales = Packed(inputs[1]),
                    rows = int64_t(inputs[0].shape(0)),
                    args]() mutable {
    args.logits = static_cast<const float*>(logits.get());
    args.scales = static_cast<const float*>(scales.get());
    split_rows(rows, 16 * int64_t(args.X), [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(route_experts_rows)(args, begin, end);
    });
  });
}

void RouteExperts::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!route_experts_has_launch(used_)) {
    throw std::runtime_error(
        "[route_experts] has no Metal kernel for more than 32 experts a row; "
        "pyengine.ops.route_experts runs plain MLX there.");
  }
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  int T = inputs[0].shape(0), X = inputs[0].shape(1);
  if (T > 0) {
    auto launch = route_experts_launch(T, X, used_);
    run_on_gpu(launch, stream(), inputs, outputs);
  }
}

void bind_route_experts(nb::module_& m) {
  m.def(
      "route_experts",
      &route_experts,
      nb::arg("logits"),
      nb::arg("scales"),
      nb::arg("used"));
  m.def("route_experts_has_launch", &route_experts_has_launch, nb::arg("used"));
  m.def(
      "route_experts_launch",
      &route_experts_launch,
      nb::arg("T"),
      nb::arg("X"),
      nb::arg("used"));
}

} // namespace pyengine
