// random_uniform: checks and primitive; the generator is in rng.h.

#include "ops/random_uniform.h"

#include <nanobind/stl/pair.h>

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/random_uniform_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "random_uniform";

} // namespace

Launch random_uniform_launch(int count, uint32_t key0, uint32_t key1) {
  using Role = Buffer::Role;
  constexpr int threads = 256;
  Launch launch;
  launch.library = op;
  launch.kernel = op;
  launch.grid = {(count + threads - 1) / threads, 1, 1};
  launch.threadgroup = {threads, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "counters", {count, 4}, mx::uint32),
      Buffer::array(Role::out, "out", {count}, mx::float32),
      Buffer::scalar("count", uint32_t(count)),
      Buffer::scalar("key0", key0),
      Buffer::scalar("key1", key1)};
  return launch;
}

mx::array
random_uniform(const mx::array& counters, uint32_t key0, uint32_t key1) {
  check_dtype(op, "counters", counters, mx::uint32, "be uint32");
  check(
      counters.ndim() >= 1 && counters.shape(-1) == 4,
      op,
      "counters",
      "have shape [..., 4]",
      counters.shape());
  auto shape = counters.shape();
  shape.pop_back();
  auto stream = mx::to_stream({});
  return mx::array(
      std::move(shape),
      mx::float32,
      std::make_shared<RandomUniform>(stream, key0, key1),
      {packed_on_gpu(counters, stream)});
}

void RandomUniform::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& counters = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));

  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(counters);
  encoder.set_output_array(out);
  encoder.dispatch(
      [packed = Packed(counters),
       args = RandomUniformArgs{nullptr, out.data<float>(), key0_, key1_},
       count = int64_t(out.size())]() mutable {
        args.counters = static_cast<const uint32_t*>(packed.get());
        split_rows(count, 16, [&](int64_t begin, int64_t end) {
          PYENGINE_PICK_KERNEL(random_uniform_rows)(args, begin, end);
        });
      });
}

void RandomUniform::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  check_launch_size(op, out.size());
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  auto launch = random_uniform_launch(int(out.size()), key0_, key1_);
  run_on_gpu(launch, stream(), inputs, outputs);
}

bool RandomUniform::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const RandomUniform&>(other);
  return key0_ == o.key0_ && key1_ == o.key1_;
}

void bind_random_uniform(nb::module_& m) {
  m.def(
      "random_uniform",
      [](const mx::array& counters, std::pair<Integer, Integer> key) {
        for (Integer word : {key.first, key.second}) {
          check(
              word.wide() >= 0 && word.wide() <= int64_t(UINT32_MAX),
              op,
              "key",
              "hold integers in 0..2**32 - 1",
              word);
        }
        return random_uniform(
            counters, uint32_t(key.first.wide()), uint32_t(key.second.wide()));
      },
      nb::arg("counters"),
      nb::arg("key"));
  m.def(
      "random_uniform_launch",
      &random_uniform_launch,
      nb::arg("count"),
      nb::arg("key0"),
      nb::arg("key1"));
}

} // namespace pyengine
