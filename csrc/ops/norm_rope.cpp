// norm_rope: checks and primitive; the arithmetic is in norm_rope_cpu.cpp.

#include "ops/norm_rope.h"

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "mlx/backend/cpu/encoder.h"
#include "norm_launch.h"
#include "ops/norm_rope_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "norm_rope";

} // namespace

Launch
norm_rope_launch(int B, int T, int H, int D, mx::Dtype dtype, float eps) {
  using Role = Buffer::Role;
  auto array = [&](Role role, const char* name, mx::Shape shape) {
    int alignment = pair_alignment(D, dtype);
    return Buffer::array(role, name, std::move(shape), dtype, alignment);
  };
  Launch launch = heads_launch(op, H, T, B, D, dtype);
  launch.buffers = {
      array(Role::in, "x", {B, T, H, D}),
      array(Role::in, "weight", {D}),
      Buffer::array(Role::in, "offset", {}, mx::int32),
      Buffer::array(Role::in, "inv_freq", {D / 2}, mx::float32),
      array(Role::out, "out", {B, T, H, D}),
      Buffer::scalar("H", uint32_t(H)),
      Buffer::scalar("D", uint32_t(D)),
      Buffer::scalar("eps", eps)};
  return launch;
}

mx::array norm_rope(
    const mx::array& x,
    const mx::array& weight,
    const mx::array& offset,
    const mx::array& inv_freq,
    float eps) {
  check_storage_dtype(op, "x", x);
  check(x.ndim() == 4, op, "x", "have shape [B, T, H, D]", x.shape());
  int D = x.shape(3);
  check(
      D % 2 == 0 && D <= rope_max_width,
      op,
      "D",
      "be even and at most 1024",
      D);
  check_shape(op, "weight", weight, {D});
  check_dtype(op, "weight", weight, x.dtype(), "have the dtype of x");
  check_offset(op, offset, x.shape(1));
  check_shape(op, "inv_freq", inv_freq, {D / 2});
  check_dtype(op, "inv_freq", inv_freq, mx::float32, "be float32");
  check(eps > 0, op, "eps", "be positive", eps);
  auto stream = mx::to_stream({});
  return mx::array(
      x.shape(),
      x.dtype(),
      std::make_shared<NormRope>(stream, eps),
      {packed_on_gpu(x, stream),
       packed_on_gpu(weight, stream),
       offset,
       packed_on_gpu(inv_freq, stream)});
}

void NormRope::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }

  NormRopeArgs args;
  args.out = out.data<void>();
  args.storage = storage_of(x.dtype());
  args.T = x.shape(1);
  args.H = x.shape(2);
  args.D = x.shape(3);
  args.eps = eps_;

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  encoder.dispatch([x = Packed(x),
                    weight = Packed(inputs[1]),
                    offset = inputs[2].data<int32_t>(),
                    inv_freq = Packed(inputs[3]),
                    rows = int64_t(x.shape(0)) * args.T,
                    args]() mutable {
    args.x = x.get();
    args.weight = weight.get();
    args.inv_freq = static_cast<const float*>(inv_freq.get());
    args.offset = *offset;
    split_rows(rows, int64_t(args.H) * args.D, [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(norm_rope_rows)(args, begin, end);
    });
  });
}

void NormRope::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  auto launch = norm_rope_launch(
      x.shape(0), x.shape(1), x.shape(2), x.shape(3), x.dtype(), eps_);
  run_on_gpu(launch, stream(), inputs, outputs);
}

bool NormRope::is_equivalent(const mx::Primitive& other) const {
  return eps_ == static_cast<const NormRope&>(other).eps_;
}

void bind_norm_rope(nb::module_& m) {
  m.def(
      "norm_rope",
      &norm_rope,
      nb::arg("x"),
      nb::arg("weight"),
      nb::arg("offset"),
      nb::arg("inv_freq"),
      nb::arg("eps"));
  m.def(
      "norm_rope_launch",
      &norm_rope_launch,
      nb::arg("B"),
      nb::arg("T"),
      nb::arg("H"),
      nb::arg("D"),
      nb::arg("dtype"),
      nb::arg("eps"));
}

} // namespace pyengine
