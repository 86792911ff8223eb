// geglu: gelu_tanh(gate) * up. The arithmetic is in geglu_cpu.cpp.

#include <algorithm>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "op.h"
#include "ops/geglu_cpu.h"

namespace pyengine {

namespace {

struct Geglu {
  static constexpr const char* op = "geglu";
  bool operator==(const Geglu&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    if (!fits_grid(out[0].size())) {
      return {};
    }
    int size = int(out[0].size());
    auto dtype = out[0].dtype();
    auto launch =
        elementwise_launch(op, std::string(op) + "_" + dtype_name(dtype), size);
    launch.buffers = {
        Buffer::array(Role::in, "gate", {size}, dtype),
        Buffer::array(Role::in, "up", {size}, dtype),
        Buffer::array(Role::out, "out", {size}, dtype),
        Buffer::scalar("size", uint32_t(size))};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    GegluArgs args = {};
    args.out = out[0].data<void>();
    args.storage = storage_of(out[0].dtype());
    return [gate = Contiguous(in[0]),
            up = Contiguous(in[1]),
            size = int64_t(out[0].size()),
            args]() mutable {
      args.gate = gate.get();
      args.up = up.get();
      // Elements are independent: rows of 16 keep every piece whole vectors.
      split_rows((size + 15) / 16, 64, [&](int64_t begin, int64_t end) {
        PYENGINE_PICK_KERNEL(geglu_range)
        (args, 16 * begin, std::min(16 * end, size));
      });
    };
  }
};

mx::array geglu(const mx::array& gate, const mx::array& up) {
  constexpr auto op = Geglu::op;
  check_storage_dtype(op, "gate", gate);
  check_shape(op, "up", up, gate.shape());
  check_dtype(op, "up", up, gate.dtype(), "have the dtype of gate");
  return lazy_result(Geglu{}, gate.shape(), gate.dtype(), {gate, up});
}

} // namespace

void bind_geglu(nb::module_& m) {
  m.def("geglu", &geglu, "gate"_a, "up"_a);
}

} // namespace pyengine
