// weigh_experts: checks and primitive; the arithmetic is in
// weigh_experts_cpu.cpp.

#include "ops/weigh_experts.h"

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/weigh_experts_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "weigh_experts";

} // namespace

Launch weigh_experts_launch(int T, int used, int E, mx::Dtype out_dtype) {
  using Role = Buffer::Role;
  constexpr int threads = 256;
  Launch launch;
  launch.library = op;
  launch.kernel = std::string(op) + "_" + dtype_name(out_dtype);
  launch.grid = {(E + threads - 1) / threads, T, 1};
  launch.threadgroup = {threads, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "parts", {T, used, E}, mx::float32),
      Buffer::array(Role::in, "weights", {T, used}, mx::float32),
      Buffer::array(Role::out, "out", {T, E}, out_dtype),
      Buffer::scalar("used", uint32_t(used)),
      Buffer::scalar("E", uint32_t(E)),
      Buffer::scalar("minus_zero", -0.0f)};
  return launch;
}

mx::array weigh_experts(
    const mx::array& parts,
    const mx::array& weights,
    mx::Dtype out_dtype) {
  check_dtype(op, "parts", parts, mx::float32, "be float32");
  check(
      parts.ndim() == 3 && parts.shape(1) > 0,
      op,
      "parts",
      "have shape [T, U, E]",
      parts.shape());
  check_dtype(op, "weights", weights, mx::float32, "be float32");
  check_shape(op, "weights", weights, {parts.shape(0), parts.shape(1)});
  check(
      is_storage_dtype(out_dtype),
      op,
      "out_dtype",
      "be float32, float16 or bfloat16",
      out_dtype);
  auto stream = mx::to_stream({});
  return mx::array(
      {parts.shape(0), parts.shape(2)},
      out_dtype,
      std::make_shared<WeighExperts>(stream),
      {packed_on_gpu(parts, stream), packed_on_gpu(weights, stream)});
}

void WeighExperts::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  WeighExpertsArgs args = {
      nullptr,
      nullptr,
      out.data<void>(),
      storage_of(out.dtype()),
      inputs[0].shape(1),
      inputs[0].shape(2)};
  encoder.dispatch([parts = Packed(inputs[0]),
                    weights = Packed(inputs[1]),
                    rows = int64_t(out.shape(0)),
                    args]() mutable {
    args.parts = static_cast<const float*>(parts.get());
    args.weights = static_cast<const float*>(weights.get());
    int64_t width = int64_t(args.used) * args.E;
    split_rows(rows, width, [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(weigh_experts_rows)(args, begin, end);
    });
  });
}

void WeighExperts::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& parts = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() > 0) {
    auto launch = weigh_experts_launch(
        parts.shape(0), parts.shape(1), parts.shape(2), out.dtype());
    run_on_gpu(launch, stream(), inputs, outputs);
  }
}

void bind_weigh_experts(nb::module_& m) {
  m.def(
      "weigh_experts",
      &weigh_experts,
      nb::arg("parts"),
      nb::arg("weights"),
      nb::arg("out_dtype"));
  m.def(
      "weigh_experts_launch",
      &weigh_experts_launch,
      nb::arg("T"),
      nb::arg("used"),
      nb::arg("E"),
      nb::arg("out_dtype"));
}

} // namespace pyengine
