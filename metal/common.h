#pragma once
// common.h: arithmetic of all kernels, spelled out.
//
// A compiler may contract a * b + c, reorder a sum or bring its own exp: then
// the bits of a result would depend on its version. So every fused product is
// an explicit fma, sums run in a written order, and exp, tanh, sin and cos are
// those of csrc/cpu/mathfn.h, step by step.

#include <metal_stdlib>

#define INSTANTIATE(name, kernel_, ...)   \
  template [[host_name(name)]] [[kernel]] \
  decltype(kernel_<__VA_ARGS__>) kernel_<__VA_ARGS__>;

namespace pyengine {

// Here and not outside: a name that some version of Metal's library adds is
// then hidden by ours of that name.
using namespace metal;

// Two elements of 16 bits as floats. A bfloat is the upper half of a float, so
// it widens without arithmetic.
template <typename T>
inline float2 widen(uint word);

template <>
inline float2 widen<half>(uint word) {
  return float2(as_type<half2>(word));
}

template <>
inline float2 widen<bfloat>(uint word) {
  return float2(as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));
}

// What a 16-byte load of T brings, as float4s.
template <typename T>
struct Loaded {
  enum { quads = 2, elements = 8 };
  static float4 quad(uint4 raw, ushort i) {
    uint2 words = i == 0 ? raw.xy : raw.zw;
    return float4(widen<T>(words.x), widen<T>(words.y));
  }
  static T element(uint4 raw, ushort i) {
    return as_type<T>(ushort(raw[i / 2] >> (i % 2 * 16)));
  }
  // Where the element is zero.
  static void set(thread uint4& raw, ushort i, T value) {
    raw[i / 2] |= uint(as_type<ushort>(value)) << (i % 2 * 16);
  }
};

template <>
struct Loaded<float> {
  enum { quads = 1, elements = 4 };
  static float4 quad(uint4 raw, ushort) {
    return as_type<float4>(raw);
  }
  static float element(uint4 raw, ushort i) {
    return as_type<float>(raw[i]);
  }
  static void set(thread uint4& raw, ushort i, float value) {
    raw[i] = as_type<uint>(value);
  }
};

// Rounds once and writes, as float or as T.
template <typename T>
inline void write(device uchar* out, ulong at, float value, bool as_float) {
  if (as_float) {
    ((device float*)out)[at] = value;
  } else {
    ((device T*)out)[at] = T(value);
  }
}

// Added to a number below 2^22, leaves the nearest integer in the low bits.
constant constexpr float round_magic = 12582912.0f; // 1.5 * 2^23

// e^x within 1.1 units in the last place; 0 below the smallest normal result.
inline float exp(float x) {
  float shifted = fma(x, 1.44269502f, round_magic);
  float n = shifted - round_magic; // x / log(2), rounded
  float r = fma(n, -0.693147182f, x); // log(2) in two floats
  r = fma(n, 1.90465421e-09f, r);
  float p = fma(0.00138205197f, r, 0.00836925209f);
  p = fma(p, r, 0.0416682847f);
  p = fma(p, r, 0.166665167f);
  p = fma(p, r, 0.49999994f);
  float y = fma(r * r, p, r) + 1.0f; // e^r
  y = as_type<float>(as_type<int>(y) + (as_type<int>(shifted) << 23));
  y = fma(0.0f, x, y); // NaN survives the integer step
  y = x < -87.3365402f ? 0.0f : y; // log(2^-126)
  return 88.7228317f < x ? INFINITY : y; // log(2^128), rounded down
}

// tanh(x) within 1.5 units in the last place.
inline float tanh(float x) {
  float size = x < 0.0f ? 0.0f - x : x;
  float x2 = x * x;
  float p = fma(-0.00589796621f, x2, 0.0207986254f);
  p = fma(p, x2, -0.0537847169f);
  p = fma(p, x2, 0.133319363f);
  p = fma(p, x2, -0.333332986f);
  float small = fma(x2 * x, p, x);
  // 1 - 2 / (e^2x + 1) would cancel near 0, where the polynomial serves.
  float large = 1.0f - 2.0f / (pyengine::exp(size + size) + 1.0f);
  large = x < 0.0f ? 0.0f - large : large;
  return size < 0.6f ? small : large;
}

// Bends x so that it stays between -cap and cap.
inline float capped(float x, float cap) {
  return cap * pyengine::tanh(x / cap);
}

// (sin(x), cos(x)) within 1.7 units in the last place for |x| <= 2^18.
inline float2 sincos(float x) {
  float shifted = fma(x, 0.636619747f, round_magic);
  float n = shifted - round_magic; // x / (pi / 2), rounded
  float r = fma(n, -1.57079637f, x); // pi / 2 in three floats
  r = fma(n, 4.37113883e-08f, r);
  r = fma(n, 1.71512451e-15f, r);
  float r2 = r * r;
  float s = fma(-0.000195078464f, r2, 0.00833210628f);
  s = fma(s, r2, -0.166666538f);
  float along = fma(r2 * r, s, r);
  float c = fma(2.44300845e-05f, r2, -0.00138872978f);
  c = fma(c, r2, 0.0416666456f);
  float across = fma(r2 * r2, c, fma(r2, -0.5f, 1.0f));
  int quadrant = as_type<int>(shifted);
  int sine = as_type<int>(quadrant & 1 ? across : along);
  int cosine = as_type<int>(quadrant & 1 ? along : across);
  return float2(
      as_type<float>(sine ^ ((quadrant & 2) << 30)),
      as_type<float>(cosine ^ (((quadrant + 1) & 2) << 30)));
}

// gelu_tanh(g): (1 + tanh(u)) / 2 is 1 / (1 + e^-2u), which keeps its digits
// where the first form cancels: for g below about -3.
inline float gelu(float g) {
  float u = g * fma(g * g, -0.0713548163f, -1.59576912f); // -2u
  return g / (1.0f + pyengine::exp(u));
}

inline float activated(float g, bool with_silu) {
  return with_silu ? g / (1.0f + pyengine::exp(-g)) : gelu(g);
}

} // namespace pyengine
