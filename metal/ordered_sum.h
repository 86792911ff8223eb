#pragma once
// ordered_sum.h: sums that run over candidates one after the other, as the
// definition has them, and products that stay products.

#include "common.h"

namespace pyengine {

// sum plus the values of lanes 0, 1, ... 31, in this order. `before`: the sum
// that this lane's value was added to. The shuffles do not wait for the sum, so
// 32 values cost 32 additions.
inline float
add_in_order(float sum, float value, thread float& before, ushort lane) {
  for (ushort i = 0; i < 32; ++i) {
    before = i == lane ? sum : before;
    sum += simd_shuffle(value, i);
  }
  return sum;
}

// a * b, rounded, for sums where the definition has no fused product. A
// compiler may contract a plain one, pragmas or not; this it cannot, as long as
// it does not see that minus_zero is -0: so kernels are given it in a buffer.
inline float product(float a, float b, float minus_zero) {
  return fma(a, b, minus_zero);
}

inline float4 product(float4 a, float b, float minus_zero) {
  return fma(a, float4(b), float4(minus_zero));
}

} // namespace pyengine
