// weigh_experts_cpu: slot after slot, products and sums each rounded.

#include "ops/weigh_experts_cpu.h"

#include "cpu/lanes.h"

namespace pyengine::PYENGINE_ISA {

void weigh_experts_rows(
    const WeighExpertsArgs& args,
    int64_t begin,
    int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* parts = args.parts + row * args.used * args.E;
    const float* weights = args.weights + row * args.used;
    for_lanes(args.E, [&](int64_t k, int some) {
      F32x16 total = load_some(parts + k, some) * broadcast(weights[0]);
      for (int slot = 1; slot < args.used; ++slot) {
        F32x16 part = load_some(parts + int64_t(slot) * args.E + k, some);
        total = total + part * broadcast(weights[slot]);
      }
      store(args.out, args.storage, row * args.E + k, total, some);
    });
  }
}

} // namespace pyengine::PYENGINE_ISA
