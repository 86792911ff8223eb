// softcap: cap * tanh(x / cap). The arithmetic is in softcap_cpu.cpp.

#include <algorithm>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "op.h"
#include "ops/softcap_cpu.h"

namespace pyengine {

namespace {

struct Softcap {
  static constexpr const char* op = "softcap";
  float cap;
  bool operator==(const Softcap&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    if (!fits_grid(out[0].size())) {
      return {};
    }
    int size = int(out[0].size());
    auto launch = elementwise_launch(op, op, size);
    launch.buffers = {
        Buffer::array(Role::in, "x", {size}, mx::float32),
        Buffer::array(Role::out, "out", {size}, mx::float32),
        Buffer::scalar("size", uint32_t(size)),
        Buffer::scalar("cap", cap)};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    return [x = Contiguous(in[0]),
            to = out[0].data<float>(),
            size = int64_t(out[0].size()),
            cap = cap] {
      auto* from = x.get<float>();
      // Elements are independent: rows of 16 keep every piece whole vectors.
      split_rows((size + 15) / 16, 64, [&](int64_t begin, int64_t end) {
        int64_t first = 16 * begin, last = std::min(16 * end, size);
        PYENGINE_PICK_KERNEL(softcap_range)
        (from + first, to + first, last - first, cap);
      });
    };
  }
};

mx::array softcap(const mx::array& x, float cap) {
  constexpr auto op = Softcap::op;
  check_dtype(op, "x", x, mx::float32, "be float32");
  check(cap > 0, op, "cap", "be above 0", cap);
  return lazy_result(Softcap{cap}, x.shape(), mx::float32, {x});
}

} // namespace

void bind_softcap(nb::module_& m) {
  m.def("softcap", &softcap, "x"_a, "cap"_a);
}

} // namespace pyengine
