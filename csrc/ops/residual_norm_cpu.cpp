// residual_norm_cpu: one row at a time, so that the second norm finds in the
// cache what the sum has just written there.

#include "ops/residual_norm_cpu.h"

#include "cpu/norm.h"

namespace pyengine::PYENGINE_ISA {

namespace {

template <typename T>
void add_rows(const ResidualNormArgs& args, int64_t begin, int64_t end) {
  int E = args.E;
  auto* weight = static_cast<const T*>(args.weight);
  auto* next_weight = static_cast<const T*>(args.next_weight);
  auto* scalar = static_cast<const T*>(args.scalar);
  F32x16 scale = broadcast(scalar ? to_float(*scalar) : 1.0f);

  for (int64_t row = begin; row < end; ++row) {
    auto* h = static_cast<const T*>(args.h) + row * E;
    auto* y = static_cast<const T*>(args.y) + row * E;
    auto* sum = static_cast<T*>(args.sum) + row * E;
    F32x16 inverse = broadcast(inverse_rms(y, E, args.eps));
    for_lanes(E, [&](int64_t k, int count) {
      // Rounded as rms_norm rounds, so that the two agree bit for bit.
      F32x16 normed = load_some(y + k, count) * inverse;
      normed = normed * load_some(weight + k, count);
      F32x16 total = (load_some(h + k, count) + normed) * scale;
      store_some(sum + k, total, count);
    });
    if (next_weight) {
      auto* next = static_cast<T*>(args.next) + row * E;
      scale_row(sum, inverse_rms(sum, E, args.eps), next_weight, E, next);
    }
  }
}

} // namespace

void residual_norm_rows(
    const ResidualNormArgs& args,
    int64_t begin,
    int64_t end) {
  with_storage(
      args.storage, [&]<typename T>(T*) { add_rows<T>(args, begin, end); });
}

} // namespace pyengine::PYENGINE_ISA
