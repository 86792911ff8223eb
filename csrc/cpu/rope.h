#pragma once
// rope.h: norm and rotary embedding of one head, for every op that turns heads.

#include "cpu/mathfn.h"
#include "cpu/norm.h"
#include "ops/norm_rope_cpu.h"

namespace pyengine::PYENGINE_ISA {

// Sines and cosines of one position: the same for all its heads.
struct Angles {
  float sine[rope_max_width / 2];
  float cosine[rope_max_width / 2];

  void set(int position, const float* inv_freq, int D) {
    F32x16 p = broadcast(float(position));
    for_lanes(D / 2, [&](int64_t k, int count) {
      F32x16 s, c;
      sincos(p * load_some(inv_freq + k, count), s, c);
      store(sine + k, s);
      store(cosine + k, c);
    });
  }
};

// out = x normed and turned. x, weight and out have D elements.
template <typename T>
void rotate_head(
    const T* x,
    const T* weight,
    const Angles& angles,
    int D,
    float eps,
    T* out) {
  int half = D / 2;
  F32x16 inverse = broadcast(inverse_rms(x, D, eps));
  for_lanes(half, [&](int64_t k, int count) {
    F32x16 low = load_some(x + k, count) * inverse;
    F32x16 high = load_some(x + half + k, count) * inverse;
    low = low * load_some(weight + k, count);
    high = high * load_some(weight + half + k, count);
    F32x16 s = load(angles.sine + k);
    F32x16 c = load(angles.cosine + k);
    store_some(out + k, fma(low, c, zero() - high * s), count);
    store_some(out + half + k, fma(high, c, low * s), count);
  });
}

} // namespace pyengine::PYENGINE_ISA
