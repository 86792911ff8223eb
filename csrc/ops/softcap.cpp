// softcap: checks and primitive; the arithmetic is in softcap_cpu.cpp.

#include "ops/softcap.h"

#include <algorithm>
#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/softcap_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "softcap";

} // namespace

mx::array softcap(const mx::array& x, float cap) {
  check_dtype(op, "x", x, mx::float32, "be float32");
  check(cap > 0, op, "cap", "be above 0", cap);
  auto stream = mx::to_stream({});
  return mx::array(
      x.shape(),
      mx::float32,
      std::make_shared<Softcap>(stream, cap),
      {packed_on_gpu(x, stream)});
}

Launch softcap_launch(int64_t size, float cap) {
  using Role = Buffer::Role;
  constexpr int threads = 256;
  mx::Shape shape = {int(size)};
  Launch launch;
  launch.library = op;
  launch.kernel = op;
  launch.grid = {int((size + threads - 1) / threads), 1, 1};
  launch.threadgroup = {threads, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "x", shape, mx::float32),
      Buffer::array(Role::out, "out", shape, mx::float32),
      Buffer::scalar("size", uint32_t(size)),
      Buffer::scalar("cap", cap)};
  return launch;
}

void Softcap::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));

  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(x);
  encoder.set_output_array(out);
  encoder.dispatch([x = Packed(x),
                    to = out.data<float>(),
                    size = int64_t(out.size()),
                    cap = cap_] {
    auto* from = static_cast<const float*>(x.get());
    // Elements are independent: rows of 16 keep every piece whole vectors.
    split_rows((size + 15) / 16, 64, [&](int64_t begin, int64_t end) {
      int64_t first = 16 * begin, last = std::min(16 * end, size);
      PYENGINE_PICK_KERNEL(softcap_range)
      (from + first, to + first, last - first, cap);
    });
  });
}

void Softcap::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  check_launch_size(op, out.size());
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() > 0) {
    auto launch = softcap_launch(int64_t(out.size()), cap_);
    run_on_gpu(launch, stream(), inputs, outputs);
  }
}

void bind_softcap(nb::module_& m) {
  m.def("softcap", &softcap, nb::arg("x"), nb::arg("cap"));
  m.def("softcap_launch", &softcap_launch, nb::arg("size"), nb::arg("cap"));
}

} // namespace pyengine
