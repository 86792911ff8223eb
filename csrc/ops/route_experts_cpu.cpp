// route_experts_cpu: every expert counts those ahead of it.

#include "ops/route_experts_cpu.h"

#include "cpu/lanes.h"
#include "cpu/mathfn.h"

namespace pyengine::PYENGINE_ISA {

namespace {

// Experts ahead of expert x: a higher logit, or the same and a lower id. A NaN
// is ahead of nothing and behind nothing, so at least `used` are chosen.
int ahead_of(const float* logits, int X, int x) {
  float mine = logits[x];
  int ahead = 0;
  for (int i = 0; i < x; ++i) {
    ahead += logits[i] >= mine;
  }
  for (int i = x + 1; i < X; ++i) {
    ahead += logits[i] > mine;
  }
  return ahead;
}

} // namespace

void route_experts_rows(
    const RouteExpertsArgs& args,
    int64_t begin,
    int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* logits = args.logits + row * args.X;
    int32_t* ids = args.ids + row * args.used;
    float* weights = args.weights + row * args.used;
    int found = 0;
    for (int x = 0; x < args.X && found < args.used; ++x) {
      if (ahead_of(logits, args.X, x) < args.used) {
        ids[found++] = x;
      }
    }
    float largest = logits[ids[0]];
    for (int slot = 1; slot < args.used; ++slot) {
      float own = logits[ids[slot]];
      largest = own > largest ? own : largest;
    }
    for (int slot = 0; slot < args.used; ++slot) {
      weights[slot] = logits[ids[slot]] - largest;
    }
    for_lanes(args.used, [&](int64_t slot, int some) {
      F32x16 gaps = load_some(weights + slot, some);
      store_some(weights + slot, exp(gaps), some);
    });
    float total = weights[0];
    for (int slot = 1; slot < args.used; ++slot) {
      total += weights[slot];
    }
    for (int slot = 0; slot < args.used; ++slot) {
      weights[slot] = weights[slot] / total * args.scales[ids[slot]];
    }
  }
}

} // namespace pyengine::PYENGINE_ISA
