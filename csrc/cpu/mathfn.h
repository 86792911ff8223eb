#pragma once
// mathfn.h: exp, tanh, sin and cos of sixteen float32 lanes.
//
// Nothing but multiplications, additions, fused multiply-adds, comparisons and
// integer steps in a written order, no tables: Metal can repeat it bit for bit.
// The coefficients are our own minimax fits, each good to 5e-9 of the result,
// so rounding is what is left. tests/ops/test_mathfn.py holds every function to
// its stated error, in units in the last place of the float64 result.

#include "cpu/simd.h"

namespace pyengine::PYENGINE_ISA {

namespace detail {

// a * b + c with one rounding, in `portable` too: an argument reduction is
// nothing without it. The product of two floats is exact in double.
PYENGINE_INLINE F32x16 fused(F32x16 a, F32x16 b, F32x16 c) {
#if defined(__AVX2__) || defined(__aarch64__)
  return fma(a, b, c);
#else
  float x[lanes], y[lanes], z[lanes];
  store(x, a);
  store(y, b);
  store(z, c);
  for (int i = 0; i < lanes; ++i) {
    z[i] = float(double(x[i]) * double(y[i]) + double(z[i]));
  }
  return load(z);
#endif
}

// x - n * (c0 + c1 + c2): x minus whole periods, without losing its low bits.
PYENGINE_INLINE F32x16
reduce(F32x16 x, F32x16 n, float c0, float c1, float c2 = 0.0f) {
  F32x16 r = fused(n, broadcast(-c0), x);
  r = fused(n, broadcast(-c1), r);
  return c2 == 0.0f ? r : fused(n, broadcast(-c2), r);
}

// c[0] + c[1] x + c[2] x^2 + ...
template <int N>
PYENGINE_INLINE F32x16 polynomial(F32x16 x, const float (&c)[N]) {
  F32x16 r = broadcast(c[N - 1]);
  PYENGINE_UNROLL
  for (int i = N - 2; i >= 0; --i) {
    r = fma(r, x, broadcast(c[i]));
  }
  return r;
}

// Added to a number below 2^22, leaves the nearest integer in the low bits.
constexpr float round_magic = 12582912.0f; // 1.5 * 2^23

} // namespace detail

// Lane by lane: x < y ? a : b.
PYENGINE_INLINE F32x16 select_less(F32x16 x, F32x16 y, F32x16 a, F32x16 b) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    NativeInt less = x.part[i] < y.part[i];
    a.part[i] = detail::as_float(
        detail::select(
            less, detail::as_int(a.part[i]), detail::as_int(b.part[i])));
  }
  return a;
}

// e^x within 1.1 units in the last place. Below the smallest normal result it
// is 0, as on a GPU; above the largest, infinity; NaN stays NaN.
PYENGINE_INLINE F32x16 exp(F32x16 x) {
  constexpr float smallest = -0x1.5d589ep6f; // log(2^-126)
  constexpr float largest = 0x1.62e42ep6f; // log(2^128), rounded down
  constexpr float c[] = {
      0.49999994f, 0.166665167f, 0.0416682847f, 0.00836925209f, 0.00138205197f};

  F32x16 magic = broadcast(detail::round_magic);
  F32x16 shifted = detail::fused(x, broadcast(0x1.715476p0f), magic);
  F32x16 n = shifted - magic; // x / log(2), rounded
  F32x16 r = detail::reduce(x, n, 0x1.62e43p-1f, -0x1.05c61p-29f);
  F32x16 y = fma(r * r, detail::polynomial(r, c), r) + broadcast(1.0f); // e^r

  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) { // y * 2^n
    NativeInt exponent = detail::as_int(shifted.part[i]) << 23;
    NativeInt bits = detail::as_int(y.part[i]);
    y.part[i] = detail::as_float(detail::add_bits(bits, exponent));
  }
  y = fma(zero(), x, y); // NaN survives the integer step
  y = select_less(x, broadcast(smallest), zero(), y);
  return select_less(broadcast(largest), x, broadcast(__builtin_inff()), y);
}

// tanh(x) within 1.5 units in the last place.
PYENGINE_INLINE F32x16 tanh(F32x16 x) {
  constexpr float c[] = {
      -0.333332986f,
      0.133319363f,
      -0.0537847169f,
      0.0207986254f,
      -0.00589796621f};

  F32x16 size = max(x, zero() - x);
  F32x16 x2 = x * x;
  F32x16 near = fma(x2 * x, detail::polynomial(x2, c), x);
  // 1 - 2 / (e^2x + 1) would cancel near 0, where the polynomial serves.
  F32x16 one = broadcast(1.0f);
  F32x16 far = one - broadcast(2.0f) / (exp(size + size) + one);
  far = select_less(x, zero(), zero() - far, far);
  return select_less(size, broadcast(0.6f), near, far);
}

// Bends x so that it stays between -cap and cap.
PYENGINE_INLINE F32x16 capped(F32x16 x, float cap) {
  return broadcast(cap) * tanh(x / broadcast(cap));
}

// sin(x) and cos(x) within 1.7 units in the last place for |x| <= 2^18, the
// longest context in radians; the error grows slowly beyond (5 units at 2^22).
//
// Pi / 2 in three floats: n times the first is exact in the fused product, and
// so is the difference from x, so a large x loses nothing.
PYENGINE_INLINE void sincos(F32x16 x, F32x16& sine, F32x16& cosine) {
  constexpr float s[] = {-0.166666538f, 0.00833210628f, -0.000195078464f};
  constexpr float c[] = {0.0416666456f, -0.00138872978f, 2.44300845e-05f};

  F32x16 magic = broadcast(detail::round_magic);
  F32x16 shifted = detail::fused(x, broadcast(0x1.45f306p-1f), magic);
  F32x16 n = shifted - magic; // x / (pi / 2), rounded
  F32x16 r =
      detail::reduce(x, n, 0x1.921fb6p0f, -0x1.777a5cp-25f, -0x1.ee59dap-50f);

  F32x16 r2 = r * r;
  F32x16 along = fma(r2 * r, detail::polynomial(r2, s), r);
  F32x16 across = fma(r2, broadcast(-0.5f), broadcast(1.0f));
  across = fma(r2 * r2, detail::polynomial(r2, c), across);

  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    NativeInt quadrant = detail::as_int(shifted.part[i]);
    NativeInt odd = -(quadrant & 1);
    NativeInt a = detail::as_int(along.part[i]);
    NativeInt b = detail::as_int(across.part[i]);
    NativeInt sine_sign = (quadrant & 2) << 30;
    NativeInt cosine_sign = ((quadrant + 1) & 2) << 30;
    sine.part[i] = detail::as_float(detail::select(odd, b, a) ^ sine_sign);
    cosine.part[i] = detail::as_float(detail::select(odd, a, b) ^ cosine_sign);
  }
}

} // namespace pyengine::PYENGINE_ISA
