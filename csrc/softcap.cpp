// softcap: checks and primitive; the arithmetic is in softcap_cpu.cpp.

#include "softcap.h"

#include <algorithm>
#include <memory>

#include "bindings.h"
#include "check.h"
#include "isa.h"
#include "mlx/backend/cpu/encoder.h"
#include "packed.h"
#include "softcap_cpu.h"
#include "split.h"

namespace pyengine {

namespace {

constexpr const char* op = "softcap";

} // namespace

mx::array softcap(const mx::array& x, float cap) {
  check_dtype(op, "x", x, mx::float32, "be float32");
  check(cap > 0, op, "cap", "be above 0", cap);
  return mx::array(
      x.shape(),
      mx::float32,
      std::make_shared<Softcap>(mx::to_stream({}), cap),
      {x});
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

void Softcap::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(
      "[softcap] has no Metal kernel yet; "
      "pyengine.ops.softcap runs plain MLX on a GPU.");
}

void bind_softcap(nb::module_& m) {
  m.def("softcap", &softcap, nb::arg("x"), nb::arg("cap"));
}

} // namespace pyengine
