// draw_token: one token from each row of candidates. The two ways to draw are
// in rng.h.

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/integer.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "op.h"
#include "ops/draw_token_cpu.h"

namespace pyengine {

namespace {

// Inputs: ids, probs, position, seed.
struct DrawToken {
  static constexpr const char* op = "draw_token";
  int index;
  bool shared;
  bool operator==(const DrawToken&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int T = in[0].shape(0), n = in[0].shape(1);
    Launch launch(op, op, {T, 1, 1}, {32, 1, 1});
    launch.constants = {{0, shared}};
    launch.buffers = {
        Buffer::array(Role::in, "ids", {T, n}, mx::int32),
        Buffer::array(Role::in, "probs", {T, n}, mx::float32),
        Buffer::array(Role::in, "position", {}, mx::int32),
        Buffer::array(Role::in, "seed", {}, mx::uint32),
        Buffer::array(Role::out, "out", {T}, mx::int32),
        Buffer::scalar("count", uint32_t(n)),
        Buffer::scalar("first_index", uint32_t(index)),
        Buffer::scalar("minus_zero", -0.0f)};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    DrawTokenArgs args = {};
    args.position = in[2].data<int32_t>();
    args.seed = in[3].data<uint32_t>();
    args.out = out[0].data<int32_t>();
    args.count = in[0].shape(1);
    args.index = index;
    args.shared = shared;
    return [ids = Contiguous(in[0]),
            probs = Contiguous(in[1]),
            rows = int64_t(out[0].size()),
            args]() mutable {
      args.ids = ids.get<int32_t>();
      args.probs = probs.get<float>();
      split_rows(rows, args.count, PYENGINE_PICK_KERNEL(draw_token_rows), args);
    };
  }
};

mx::array draw_token(
    const mx::array& ids, // [T, n]
    const mx::array& probs, // [T, n]
    const mx::array& position, // []
    const mx::array& seed, // []
    Integer index,
    bool shared) {
  constexpr auto op = DrawToken::op;
  check_dtype(op, "ids", ids, mx::int32, "be int32");
  check(
      ids.ndim() == 2 && ids.shape(1) > 0,
      op,
      "ids",
      "have shape [T, n]",
      ids.shape());
  check_array(op, "probs", probs, mx::float32, ids.shape());
  check_array(op, "position", position, mx::int32, {});
  check_array(op, "seed", seed, mx::uint32, {});
  check(
      index.wide() >= 0 && index.wide() < max_positions,
      op,
      "index",
      "be 0 or more and below 2**30",
      index);
  return lazy_result(
      DrawToken{index, shared},
      {ids.shape(0)},
      mx::int32,
      {ids, probs, position, seed});
}

} // namespace

void bind_draw_token(nb::module_& m) {
  m.def(
      "draw_token",
      &draw_token,
      "ids"_a,
      "probs"_a,
      "position"_a,
      "seed"_a,
      "index"_a,
      "shared"_a);
}

} // namespace pyengine
