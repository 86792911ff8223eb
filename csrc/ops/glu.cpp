// glu: gelu_tanh(gate) * up, or silu(gate) * up. The arithmetic is in
// glu_cpu.cpp.

#include <nanobind/stl/string.h>

#include <algorithm>

#include "activation.h"
#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "op.h"
#include "ops/glu_cpu.h"

namespace pyengine {

namespace {

struct Glu {
  static constexpr const char* op = "glu";
  Activation activation;
  bool operator==(const Glu&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    if (!fits_grid(out[0].size())) {
      return {};
    }
    int size = int(out[0].size());
    auto dtype = out[0].dtype();
    auto launch =
        elementwise_launch(op, std::string(op) + "_" + dtype_name(dtype), size);
    launch.constants = {{0, activation == Activation::silu}};
    launch.buffers = {
        Buffer::array(Role::in, "gate", {size}, dtype),
        Buffer::array(Role::in, "up", {size}, dtype),
        Buffer::array(Role::out, "out", {size}, dtype),
        Buffer::scalar("size", uint32_t(size))};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    GluArgs args = {};
    args.out = out[0].data<void>();
    args.storage = storage_of(out[0].dtype());
    args.activation = activation;
    return [gate = Contiguous(in[0]),
            up = Contiguous(in[1]),
            size = int64_t(out[0].size()),
            args]() mutable {
      args.gate = gate.get();
      args.up = up.get();
      // Elements are independent: rows of 16 keep every piece whole vectors.
      split_rows((size + 15) / 16, 64, [&](int64_t begin, int64_t end) {
        PYENGINE_PICK_KERNEL(glu_range)
        (args, 16 * begin, std::min(16 * end, size));
      });
    };
  }
};

mx::array
glu(const mx::array& gate, const mx::array& up, const std::string& activation) {
  constexpr auto op = Glu::op;
  check_storage_dtype(op, "gate", gate);
  check_shape(op, "up", up, gate.shape());
  check_dtype(op, "up", up, gate.dtype(), "have the dtype of gate");
  return lazy_result(
      Glu{activation_of(op, activation)},
      gate.shape(),
      gate.dtype(),
      {gate, up});
}

} // namespace

void bind_glu(nb::module_& m) {
  m.def("glu", &glu, "gate"_a, "up"_a, "activation"_a);
}

} // namespace pyengine
