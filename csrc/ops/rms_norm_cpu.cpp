// rms_norm_cpu: two passes over a row, which the first leaves in the cache.

#include "ops/rms_norm_cpu.h"

#include "cpu/norm.h"

namespace pyengine::PYENGINE_ISA {

namespace {

template <typename T>
void norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  auto* weight = static_cast<const T*>(args.weight);
  for (int64_t row = begin; row < end; ++row) {
    auto* x = static_cast<const T*>(args.x) + row * args.D;
    auto* out = static_cast<T*>(args.out) + row * args.D;
    scale_row(x, inverse_rms(x, args.D, args.eps), weight, args.D, out);
  }
}

} // namespace

void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  with_storage(
      args.storage, [&]<typename T>(T*) { norm_rows<T>(args, begin, end); });
}

} // namespace pyengine::PYENGINE_ISA
