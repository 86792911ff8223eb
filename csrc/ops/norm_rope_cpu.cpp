// norm_rope_cpu: sines and cosines once per position, for all its heads.

#include "ops/norm_rope_cpu.h"

#include "cpu/rope.h"

namespace pyengine::PYENGINE_ISA {

namespace {

template <typename T>
void rotate_rows(const NormRopeArgs& args, int64_t begin, int64_t end) {
  auto* weight = static_cast<const T*>(args.weight);
  Angles angles;
  for (int64_t row = begin; row < end; ++row) {
    angles.set(args.positions[row], args.inv_freq, args.D);
    for (int64_t head = row * args.H; head < (row + 1) * args.H; ++head) {
      auto* x = static_cast<const T*>(args.x) + head * args.D;
      auto* out = static_cast<T*>(args.out) + head * args.D;
      rotate_head(x, weight, angles, args.D, args.eps, out);
    }
  }
}

} // namespace

void norm_rope_rows(const NormRopeArgs& args, int64_t begin, int64_t end) {
  with_storage(
      args.storage, [&]<typename T>(T*) { rotate_rows<T>(args, begin, end); });
}

} // namespace pyengine::PYENGINE_ISA
