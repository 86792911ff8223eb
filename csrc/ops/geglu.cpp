// geglu: checks and primitive; the arithmetic is in geglu_cpu.cpp.

#include "ops/geglu.h"

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/geglu_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "geglu";

} // namespace

Launch geglu_launch(int64_t size, mx::Dtype dtype) {
  using Role = Buffer::Role;
  constexpr int threads = 256;
  mx::Shape shape = {int(size)};
  Launch launch;
  launch.library = op;
  launch.kernel = std::string(op) + "_" + dtype_name(dtype);
  launch.grid = {int((size + threads - 1) / threads), 1, 1};
  launch.threadgroup = {threads, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "gate", shape, dtype),
      Buffer::array(Role::in, "up", shape, dtype),
      Buffer::array(Role::out, "out", shape, dtype),
      Buffer::scalar("size", uint32_t(size))};
  return launch;
}

mx::array geglu(const mx::array& gate, const mx::array& up) {
  check_storage_dtype(op, "gate", gate);
  check_shape(op, "up", up, gate.shape());
  check_dtype(op, "up", up, gate.dtype(), "have the dtype of gate");
  auto stream = mx::to_stream({});
  return mx::array(
      gate.shape(),
      gate.dtype(),
      std::make_shared<Geglu>(stream),
      {packed_on_gpu(gate, stream), packed_on_gpu(up, stream)});
}

void Geglu::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& gate = inputs[0];
  const auto& up = inputs[1];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));

  GegluArgs args;
  args.out = out.data<void>();
  args.storage = storage_of(out.dtype());

  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(gate);
  encoder.set_input_array(up);
  encoder.set_output_array(out);
  encoder.dispatch([gate = Packed(gate),
                    up = Packed(up),
                    size = int64_t(out.size()),
                    args]() mutable {
    args.gate = gate.get();
    args.up = up.get();
    // Elements are independent: rows of 16 keep every piece whole vectors.
    split_rows((size + 15) / 16, 64, [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(geglu_range)
      (args, 16 * begin, std::min(16 * end, size));
    });
  });
}

void Geglu::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  check_launch_size(op, out.size());
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() > 0) {
    auto launch = geglu_launch(int64_t(out.size()), out.dtype());
    run_on_gpu(launch, stream(), inputs, outputs);
  }
}

void bind_geglu(nb::module_& m) {
  m.def("geglu", &geglu, nb::arg("gate"), nb::arg("up"));
  m.def("geglu_launch", &geglu_launch, nb::arg("size"), nb::arg("dtype"));
}

} // namespace pyengine
