// draw_token: checks and primitive; the two ways to draw are in rng.h.

#include "ops/draw_token.h"

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/draw_token_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "draw_token";

} // namespace

Launch draw_token_launch(int T, int n, int index, bool shared) {
  using Role = Buffer::Role;
  Launch launch;
  launch.library = op;
  launch.kernel = op;
  launch.constants = {{0, shared}};
  launch.grid = {T, 1, 1};
  launch.threadgroup = {32, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "ids", {T, n}, mx::int32),
      Buffer::array(Role::in, "probs", {T, n}, mx::float32),
      Buffer::array(Role::in, "position", {}, mx::int32),
      Buffer::array(Role::in, "seed", {}, mx::uint32),
      Buffer::array(Role::out, "out", {T}, mx::int32),
      Buffer::scalar("count", uint32_t(n)),
      Buffer::scalar("first_index", uint32_t(index)),
      Buffer::scalar("minus_zero", -0.0f)};
  return launch;
}

mx::array draw_token(
    const mx::array& ids,
    const mx::array& probs,
    const mx::array& position,
    const mx::array& seed,
    Integer index,
    bool shared) {
  check_dtype(op, "ids", ids, mx::int32, "be int32");
  check(
      ids.ndim() == 2 && ids.shape(1) > 0,
      op,
      "ids",
      "have shape [T, n]",
      ids.shape());
  check_dtype(op, "probs", probs, mx::float32, "be float32");
  check_shape(op, "probs", probs, ids.shape());
  check_dtype(op, "position", position, mx::int32, "be int32");
  check_shape(op, "position", position, {});
  check_dtype(op, "seed", seed, mx::uint32, "be uint32");
  check_shape(op, "seed", seed, {});
  check(
      index.wide() >= 0 && index.wide() < max_positions,
      op,
      "index",
      "be 0 or more and below 2**30",
      index);
  auto stream = mx::to_stream({});
  return mx::array(
      {ids.shape(0)},
      mx::int32,
      std::make_shared<DrawToken>(stream, index, shared),
      {packed_on_gpu(ids, stream),
       packed_on_gpu(probs, stream),
       position,
       seed});
}

void DrawToken::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  DrawTokenArgs args = {
      nullptr,
      nullptr,
      inputs[2].data<int32_t>(),
      inputs[3].data<uint32_t>(),
      out.data<int32_t>(),
      inputs[0].shape(1),
      index_,
      shared_};
  encoder.dispatch([ids = Packed(inputs[0]),
                    probs = Packed(inputs[1]),
                    rows = int64_t(out.size()),
                    args]() mutable {
    args.ids = static_cast<const int32_t*>(ids.get());
    args.probs = static_cast<const float*>(probs.get());
    split_rows(rows, args.count, [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(draw_token_rows)(args, begin, end);
    });
  });
}

void DrawToken::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& ids = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  auto launch = draw_token_launch(ids.shape(0), ids.shape(1), index_, shared_);
  run_on_gpu(launch, stream(), inputs, outputs);
}

bool DrawToken::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const DrawToken&>(other);
  return index_ == o.index_ && shared_ == o.shared_;
}

void bind_draw_token(nb::module_& m) {
  m.def(
      "draw_token",
      &draw_token,
      nb::arg("ids"),
      nb::arg("probs"),
      nb::arg("position"),
      nb::arg("seed"),
      nb::arg("index"),
      nb::arg("shared"));
  m.def(
      "draw_token_launch",
      &draw_token_launch,
      nb::arg("T"),
      nb::arg("n"),
      nb::arg("index"),
      nb::arg("shared"));
}

} // namespace pyengine
