// norm_rope: RMSNorm over each head, then half-split rotary embedding. The
// arithmetic is in norm_rope_cpu.cpp.

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "norm_launch.h"
#include "op.h"
#include "ops/norm_rope_cpu.h"

namespace pyengine {

namespace {

// Inputs: x, weight, positions, inv_freq.
struct NormRope {
  static constexpr const char* op = "norm_rope";
  float eps;
  bool operator==(const NormRope&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    auto shape = out[0].shape(); // [R, H, D]
    auto dtype = out[0].dtype();
    int R = shape[0], H = shape[1], D = shape[2];
    int alignment = pair_alignment(D, dtype);
    Launch launch = heads_launch(op, H, R, D, dtype);
    launch.buffers = {
        Buffer::array(Role::in, "x", shape, dtype, alignment),
        Buffer::array(Role::in, "weight", {D}, dtype, alignment),
        Buffer::array(Role::in, "positions", {R}, mx::int32),
        Buffer::array(Role::in, "inv_freq", {D / 2}, mx::float32),
        Buffer::array(Role::out, "out", shape, dtype, alignment),
        Buffer::scalar("H", uint32_t(H)),
        Buffer::scalar("D", uint32_t(D)),
        Buffer::scalar("eps", eps)};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    NormRopeArgs args = {};
    args.out = out[0].data<void>();
    args.storage = storage_of(out[0].dtype());
    args.H = out[0].shape(1);
    args.D = out[0].shape(2);
    args.eps = eps;
    return [x = Contiguous(in[0]),
            weight = Contiguous(in[1]),
            positions = Contiguous(in[2]),
            inv_freq = Contiguous(in[3]),
            rows = out[0].shape(0),
            args]() mutable {
      args.x = x.get();
      args.weight = weight.get();
      args.positions = positions.get<int32_t>();
      args.inv_freq = inv_freq.get<float>();
      int64_t width = int64_t(args.H) * args.D;
      split_rows(rows, width, PYENGINE_PICK_KERNEL(norm_rope_rows), args);
    };
  }
};

mx::array norm_rope(
    const mx::array& x, // [R, H, D]
    const mx::array& weight, // [D]
    const mx::array& positions, // int32 [R]
    const mx::array& inv_freq, // float32 [D / 2]
    float eps) {
  constexpr auto op = NormRope::op;
  check_storage_dtype(op, "x", x);
  check(x.ndim() == 3, op, "x", "have shape [R, H, D]", x.shape());
  int D = x.shape(2);
  check(
      D % 2 == 0 && D <= rope_max_width,
      op,
      "D",
      "be even and at most 1024",
      D);
  check_shape(op, "weight", weight, {D});
  check_dtype(op, "weight", weight, x.dtype(), "have the dtype of x");
  check_array(op, "positions", positions, mx::int32, {x.shape(0)});
  check_shape(op, "inv_freq", inv_freq, {D / 2});
  check_dtype(op, "inv_freq", inv_freq, mx::float32, "be float32");
  check(eps > 0, op, "eps", "be positive", eps);
  return lazy_result(
      NormRope{eps}, x.shape(), x.dtype(), {x, weight, positions, inv_freq});
}

} // namespace

void bind_norm_rope(nb::module_& m) {
  m.def(
      "norm_rope",
      &norm_rope,
      "x"_a,
      "weight"_a,
      "positions"_a,
      "inv_freq"_a,
      "eps"_a);
}

} // namespace pyengine
