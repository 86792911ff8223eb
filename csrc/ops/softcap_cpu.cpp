// softcap_cpu: cap * tanh(x / cap).

#include "ops/softcap_cpu.h"

#include "cpu/lanes.h"
#include "cpu/mathfn.h"

namespace pyengine::PYENGINE_ISA {

void softcap_range(const float* x, float* out, int64_t count, float cap) {
  for_lanes(count, [&](int64_t k, int some) {
    store_some(out + k, capped(load_some(x + k, some), cap), some);
  });
}

} // namespace pyengine::PYENGINE_ISA
