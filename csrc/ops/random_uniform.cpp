// random_uniform: one Philox number per counter. The generator is in rng.h.

#include <nanobind/stl/pair.h>

#include <utility>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/integer.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "op.h"
#include "ops/random_uniform_cpu.h"

namespace pyengine {

namespace {

struct RandomUniform {
  static constexpr const char* op = "random_uniform";
  uint32_t key0;
  uint32_t key1;
  bool operator==(const RandomUniform&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    if (!fits_grid(out[0].size())) {
      return {};
    }
    int count = int(out[0].size());
    auto launch = elementwise_launch(op, op, count);
    launch.buffers = {
        Buffer::array(Role::in, "counters", {count, 4}, mx::uint32),
        Buffer::array(Role::out, "out", {count}, mx::float32),
        Buffer::scalar("count", uint32_t(count)),
        Buffer::scalar("key0", key0),
        Buffer::scalar("key1", key1)};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    RandomUniformArgs args = {nullptr, out[0].data<float>(), key0, key1};
    return [counters = Contiguous(in[0]),
            count = int64_t(out[0].size()),
            args]() mutable {
      args.counters = counters.get<uint32_t>();
      split_rows(count, 16, PYENGINE_PICK_KERNEL(random_uniform_rows), args);
    };
  }
};

mx::array random_uniform(
    const mx::array& counters, // [..., 4]
    std::pair<Integer, Integer> key) {
  constexpr auto op = RandomUniform::op;
  for (Integer word : {key.first, key.second}) {
    check(
        word.wide() >= 0 && word.wide() <= int64_t(UINT32_MAX),
        op,
        "key",
        "hold integers in 0..2**32 - 1",
        word);
  }
  check_dtype(op, "counters", counters, mx::uint32, "be uint32");
  check(
      counters.ndim() >= 1 && counters.shape(-1) == 4,
      op,
      "counters",
      "have shape [..., 4]",
      counters.shape());
  auto shape = counters.shape();
  shape.pop_back();
  return lazy_result(
      RandomUniform{uint32_t(key.first.wide()), uint32_t(key.second.wide())},
      std::move(shape),
      mx::float32,
      {counters});
}

} // namespace

void bind_random_uniform(nb::module_& m) {
  m.def("random_uniform", &random_uniform, "counters"_a, "key"_a);
}

} // namespace pyengine
