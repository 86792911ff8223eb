// mathfn: pyengine._ext.mathfn, so that tests can measure mathfn.h by itself.

#include <nanobind/stl/string.h>

#include <algorithm>
#include <iterator>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/mathfn_cpu.h"
#include "mlx/mlx.h"

namespace pyengine {

namespace {

// Evaluates x; no primitive, since nothing but a test calls it.
mx::array mathfn(const std::string& name, const mx::array& x) {
  constexpr const char* names[] = {"exp", "tanh", "sin", "cos"};
  auto found = std::find(std::begin(names), std::end(names), name);
  check(
      found != std::end(names),
      "mathfn",
      "name",
      "be one of exp, tanh, sin, cos",
      name);
  check_dtype("mathfn", "x", x, mx::float32, "be float32");
  auto in = mx::contiguous(x);
  in.eval();
  auto out = mx::zeros(x.shape(), mx::float32);
  out.eval();
  PYENGINE_PICK_KERNEL(apply_function)
  (Function(found - names),
   in.data<float>(),
   out.data<float>(),
   int64_t(x.size()));
  return out;
}

} // namespace

void bind_mathfn(nb::module_& m) {
  m.def("mathfn", &mathfn, "name"_a, "x"_a);
}

} // namespace pyengine
