#pragma once
// norm.h: the root mean square of a row, one way for every op that norms.

#include "cpu/lanes.h"

namespace pyengine::PYENGINE_ISA {

// A row is summed in pieces: metal/norm.h gives each to a simdgroup.
constexpr int piece = 1024;

// The squares of one piece. Element k is summed in lane k % 16 of accumulator
// k / 16 % 4, then accumulators, then lanes: a tree that width alone decides.
template <typename T>
PYENGINE_INLINE float square_sum(const T* x, int width) {
  F32x16 total[4] = {zero(), zero(), zero(), zero()};
  int k = 0;
  for (; k + 4 * lanes <= width; k += 4 * lanes) {
    PYENGINE_UNROLL
    for (int i = 0; i < 4; ++i) {
      F32x16 v = load(x + k + i * lanes);
      total[i] = fma(v, v, total[i]);
    }
  }
  PYENGINE_UNROLL
  for (int i = 0; i < 4; ++i, k += lanes) {
    if (k < width) {
      F32x16 v = load_some(x + k, width - k < lanes ? width - k : lanes);
      total[i] = fma(v, v, total[i]);
    }
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// 1 / sqrt(mean(x^2) + eps); pieces are added in their order.
template <typename T>
PYENGINE_INLINE float inverse_rms(const T* x, int width, float eps) {
  float square = 0.0f;
  int k = 0;
  for (; k + piece <= width; k += piece) {
    square += square_sum(x + k, piece);
  }
  if (k < width) {
    square += square_sum(x + k, width - k);
  }
  return 1.0f / __builtin_sqrtf(square / float(width) + eps);
}

// out = x * inverse * weight, each product rounded; weight may be null.
template <typename T>
PYENGINE_INLINE void
scale_row(const T* x, float inverse, const T* weight, int width, T* out) {
  for_lanes(width, [&](int64_t k, int count) {
    F32x16 v = load_some(x + k, count) * broadcast(inverse);
    if (weight) {
      v = v * load_some(weight + k, count);
    }
    store_some(out + k, v, count);
  });
}

} // namespace pyengine::PYENGINE_ISA
