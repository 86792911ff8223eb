// weigh_experts: the weighted sum of what a row's experts gave. The arithmetic
// is in weigh_experts_cpu.cpp.

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "op.h"
#include "ops/weigh_experts_cpu.h"

namespace pyengine {

namespace {

// Inputs: parts, weights.
struct WeighExperts {
  static constexpr const char* op = "weigh_experts";
  bool operator==(const WeighExperts&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    constexpr int threads = 256;
    int T = in[0].shape(0), used = in[0].shape(1), E = in[0].shape(2);
    auto out_dtype = out[0].dtype();
    Launch launch(
        op,
        std::string(op) + "_" + dtype_name(out_dtype),
        {(E + threads - 1) / threads, T, 1},
        {threads, 1, 1});
    launch.buffers = {
        Buffer::array(Role::in, "parts", {T, used, E}, mx::float32),
        Buffer::array(Role::in, "weights", {T, used}, mx::float32),
        Buffer::array(Role::out, "out", {T, E}, out_dtype),
        Buffer::scalar("used", uint32_t(used)),
        Buffer::scalar("E", uint32_t(E)),
        Buffer::scalar("minus_zero", -0.0f)};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    WeighExpertsArgs args = {};
    args.out = out[0].data<void>();
    args.storage = storage_of(out[0].dtype());
    args.used = in[0].shape(1);
    args.E = in[0].shape(2);
    return [parts = Contiguous(in[0]),
            weights = Contiguous(in[1]),
            rows = int64_t(out[0].shape(0)),
            args]() mutable {
      args.parts = parts.get<float>();
      args.weights = weights.get<float>();
      int64_t width = int64_t(args.used) * args.E;
      split_rows(rows, width, PYENGINE_PICK_KERNEL(weigh_experts_rows), args);
    };
  }
};

mx::array weigh_experts(
    const mx::array& parts, // [T, U, E]
    const mx::array& weights, // [T, U]
    mx::Dtype out_dtype) {
  constexpr auto op = WeighExperts::op;
  check_dtype(op, "parts", parts, mx::float32, "be float32");
  check(
      parts.ndim() == 3 && parts.shape(1) > 0,
      op,
      "parts",
      "have shape [T, U, E]",
      parts.shape());
  check_array(
      op, "weights", weights, mx::float32, {parts.shape(0), parts.shape(1)});
  check(
      is_storage_dtype(out_dtype),
      op,
      "out_dtype",
      "be float32, float16 or bfloat16",
      out_dtype);
  return lazy_result(
      WeighExperts{},
      {parts.shape(0), parts.shape(2)},
      out_dtype,
      {parts, weights});
}

} // namespace

void bind_weigh_experts(nb::module_& m) {
  m.def("weigh_experts", &weigh_experts, "parts"_a, "weights"_a, "out_dtype"_a);
}

} // namespace pyengine
