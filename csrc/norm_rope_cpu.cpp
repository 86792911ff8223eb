// norm_rope_cpu: sines and cosines once per position, for all its heads.

#include "norm_rope_cpu.h"

#include "mathfn.h"
#include "norm.h"

namespace pyengine::PYENGINE_ISA {

namespace {

template <typename T>
void rotate_head(
    const NormRopeArgs& args,
    const T* x,
    const float* sine,
    const float* cosine,
    T* out) {
  int half = args.D / 2;
  auto* weight = static_cast<const T*>(args.weight);
  F32x16 inverse = broadcast(inverse_rms(x, args.D, args.eps));
  for_lanes(half, [&](int64_t k, int count) {
    F32x16 low = load_some(x + k, count) * inverse;
    F32x16 high = load_some(x + half + k, count) * inverse;
    low = low * load_some(weight + k, count);
    high = high * load_some(weight + half + k, count);
    F32x16 s = load(sine + k);
    F32x16 c = load(cosine + k);
    store_some(out + k, fma(low, c, zero() - high * s), count);
    store_some(out + half + k, fma(high, c, low * s), count);
  });
}

template <typename T>
void rotate_rows(const NormRopeArgs& args, int64_t begin, int64_t end) {
  float sine[norm_rope_max_width / 2];
  float cosine[norm_rope_max_width / 2];
  for (int64_t row = begin; row < end; ++row) {
    F32x16 position = broadcast(float(args.offset + int(row % args.T)));
    for_lanes(args.D / 2, [&](int64_t k, int count) {
      F32x16 s, c;
      sincos(position * load_some(args.inv_freq + k, count), s, c);
      store(sine + k, s);
      store(cosine + k, c);
    });
    for (int64_t head = row * args.H; head < (row + 1) * args.H; ++head) {
      auto* x = static_cast<const T*>(args.x) + head * args.D;
      auto* out = static_cast<T*>(args.out) + head * args.D;
      rotate_head(args, x, sine, cosine, out);
    }
  }
}

} // namespace

void norm_rope_rows(const NormRopeArgs& args, int64_t begin, int64_t end) {
  with_storage(
      args.storage, [&]<typename T>(T*) { rotate_rows<T>(args, begin, end); });
}

} // namespace pyengine::PYENGINE_ISA
