// mathfn_cpu: what tests/ops/test_mathfn.py measures.

#include "cpu/mathfn_cpu.h"

#include "cpu/lanes.h"
#include "cpu/mathfn.h"

namespace pyengine::PYENGINE_ISA {

void apply_function(
    Function function,
    const float* x,
    float* out,
    int64_t count) {
  for_lanes(count, [&](int64_t k, int some) {
    F32x16 a = load_some(x + k, some);
    F32x16 sine, cosine;
    switch (function) {
      case Function::exp:
        return store_some(out + k, exp(a), some);
      case Function::tanh:
        return store_some(out + k, tanh(a), some);
      case Function::sin:
        sincos(a, sine, cosine);
        return store_some(out + k, sine, some);
      case Function::cos:
        sincos(a, sine, cosine);
        return store_some(out + k, cosine, some);
    }
  });
}

} // namespace pyengine::PYENGINE_ISA
