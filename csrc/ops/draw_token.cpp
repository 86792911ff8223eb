// draw_token: one token from each row of candidates, each of a sequence of its
// own. The two ways to draw are in rng.h.

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "op.h"
#include "ops/draw_token_cpu.h"

namespace pyengine {

namespace {

// Inputs: ids, probs, position, index, seed, shared.
struct DrawToken {
  static constexpr const char* op = "draw_token";
  bool operator==(const DrawToken&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int R = in[0].shape(0), n = in[0].shape(1);
    Launch launch(op, op, {R, 1, 1}, {32, 1, 1});
    launch.buffers = {
        Buffer::array(Role::in, "ids", {R, n}, mx::int32),
        Buffer::array(Role::in, "probs", {R, n}, mx::float32),
        Buffer::array(Role::in, "position", {R}, mx::int32),
        Buffer::array(Role::in, "index", {R}, mx::int32),
        Buffer::array(Role::in, "seed", {R}, mx::uint32),
        Buffer::array(Role::in, "shared", {R}, mx::bool_),
        Buffer::array(Role::out, "out", {R}, mx::int32),
        Buffer::scalar("count", uint32_t(n)),
        Buffer::scalar("minus_zero", -0.0f)};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    DrawTokenArgs args = {};
    args.out = out[0].data<int32_t>();
    args.count = in[0].shape(1);
    return [ids = Contiguous(in[0]),
            probs = Contiguous(in[1]),
            position = Contiguous(in[2]),
            index = Contiguous(in[3]),
            seed = Contiguous(in[4]),
            shared = Contiguous(in[5]),
            rows = int64_t(out[0].size()),
            args]() mutable {
      args.ids = ids.get<int32_t>();
      args.probs = probs.get<float>();
      args.position = position.get<int32_t>();
      args.index = index.get<int32_t>();
      args.seed = seed.get<uint32_t>();
      args.shared = shared.get<bool>();
      split_rows(rows, args.count, PYENGINE_PICK_KERNEL(draw_token_rows), args);
    };
  }
};

mx::array draw_token(
    const mx::array& ids, // [R, n]
    const mx::array& probs, // [R, n]
    const mx::array& position, // [R], as all below
    const mx::array& index,
    const mx::array& seed,
    const mx::array& shared) {
  constexpr auto op = DrawToken::op;
  check_dtype(op, "ids", ids, mx::int32, "be int32");
  check(
      ids.ndim() == 2 && ids.shape(1) > 0,
      op,
      "ids",
      "have shape [R, n]",
      ids.shape());
  check_array(op, "probs", probs, mx::float32, ids.shape());
  mx::Shape rows = {ids.shape(0)};
  check_array(op, "position", position, mx::int32, rows);
  check_array(op, "index", index, mx::int32, rows);
  check_array(op, "seed", seed, mx::uint32, rows);
  check_array(op, "shared", shared, mx::bool_, rows);
  return lazy_result(
      DrawToken{},
      rows,
      mx::int32,
      {ids, probs, position, index, seed, shared});
}

} // namespace

void bind_draw_token(nb::module_& m) {
  m.def(
      "draw_token",
      &draw_token,
      "ids"_a,
      "probs"_a,
      "position"_a,
      "index"_a,
      "seed"_a,
      "shared"_a);
}

} // namespace pyengine
