// glu_cpu: gelu_tanh(gate) * up, or silu(gate) * up.
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

PYENGINE_INLINE F32x16 silu(F32x16 g) {
  return g / (broadcast(1.0f) + exp(broadcast(0.0f) - g));
}

template <typename T, Activation activation>
void gate_range(const GluArgs& args, int64_t begin, int64_t end) {
  auto* gate = static_cast<const T*>(args.gate) + begin;
  auto* up = static_cast<const T*>(args.up) + begin;
  auto* out = static_cast<T*>(args.out) + begin;
  for_lanes(end - begin, [&](int64_t k, int count) {
    F32x16 g = load_some(gate + k, count);
    auto active = activation == Activation::gelu ? gelu(g) : silu(g);
    store_some(out + k, active * load_some(up + k, count), count);
  });
}

} // namespace

void glu_range(const GluArgs& args, int64_t begin, int64_t end) {
  with_storage(args.storage, [&]<typename T>(T*) {
    if (args.activation == Activation::gelu) {
      gate_range<T, Activation::gelu>(args, begin, end);
    } else {
      gate_range<T, Activation::silu>(args, begin, end);
    }
  });
}

} // namespace pyengine::PYENGINE_ISA
