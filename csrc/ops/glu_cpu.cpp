// glu_cpu: gelu_tanh(gate) * up.
//
// (1 + tanh(u)) / 2 is 1 / (1 + e^-2u), which keeps its digits where the first
// form cancels: for gates below about -3.

#include "ops/glu_cpu.h"

#include "cpu/lanes.h"
#include "cpu/mathfn.h"

namespace pyengine::PYENGINE_ISA {

namespace {

PYENGINE_INLINE F32x16 gelu(F32x16 g) {
  constexpr float c1 = -1.59576912f; // -2 sqrt(2 / pi)
  constexpr float c3 = -0.0713548163f; // 0.044715 c1
  F32x16 u = g * fma(g * g, broadcast(c3), broadcast(c1)); // -2u
  return g / (broadcast(1.0f) + exp(u));
}

template <typename T>
void gate_range(const GluArgs& args, int64_t begin, int64_t end) {
  auto* gate = static_cast<const T*>(args.gate) + begin;
  auto* up = static_cast<const T*>(args.up) + begin;
  auto* out = static_cast<T*>(args.out) + begin;
  for_lanes(end - begin, [&](int64_t k, int count) {
    F32x16 g = load_some(gate + k, count);
    store_some(out + k, gelu(g) * load_some(up + k, count), count);
  });
}

} // namespace

void glu_range(const GluArgs& args, int64_t begin, int64_t end) {
  with_storage(
      args.storage, [&]<typename T>(T*) { gate_range<T>(args, begin, end); });
}

} // namespace pyengine::PYENGINE_ISA
