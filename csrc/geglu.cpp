// geglu: checks and primitive; the arithmetic is in geglu_cpu.cpp.

#include "geglu.h"

#include <memory>

#include "bindings.h"
#include "check.h"
#include "geglu_cpu.h"
#include "isa.h"
#include "mlx/backend/cpu/encoder.h"
#include "packed.h"
#include "split.h"
#include "storage.h"

namespace pyengine {

namespace {

constexpr const char* op = "geglu";

} // namespace

mx::array geglu(const mx::array& gate, const mx::array& up) {
  check_storage_dtype(op, "gate", gate);
  check_shape(op, "up", up, gate.shape());
  check_dtype(op, "up", up, gate.dtype(), "have the dtype of gate");
  return mx::array(
      gate.shape(),
      gate.dtype(),
      std::make_shared<Geglu>(mx::to_stream({})),
      {gate, up});
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

void Geglu::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(
      "[geglu] has no Metal kernel yet; "
      "pyengine.ops.geglu runs plain MLX on a GPU.");
}

void bind_geglu(nb::module_& m) {
  m.def("geglu", &geglu, nb::arg("gate"), nb::arg("up"));
}

} // namespace pyengine
