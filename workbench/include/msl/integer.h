#pragma once
// integer: bits, high products and packed formats.

namespace metal {

template <class T>
MSL_INLINE enable_if_t<is_integral_v<T>, T> popcount(T x) {
  return (T)__builtin_popcountl((ulong)(make_unsigned_t<T>)x);
}
template <class T>
MSL_INLINE enable_if_t<is_integral_v<T>, T> clz(T x) {
  constexpr int bits = sizeof(T) * 8;
  return x == 0 ? T(bits)
                : T(__builtin_clzl((ulong)(make_unsigned_t<T>)x) - (64 - bits));
}
template <class T>
MSL_INLINE enable_if_t<is_integral_v<T>, T> ctz(T x) {
  return x == 0 ? T(sizeof(T) * 8) : T(__builtin_ctzl((ulong)x));
}
MSL_INLINE uint reverse_bits(uint x) {
  return __builtin_bitreverse32(x);
}
MSL_INLINE uint mulhi(uint a, uint b) {
  return (uint)(((ulong)a * b) >> 32);
}
MSL_INLINE int mulhi(int a, int b) {
  return (int)(((long)a * b) >> 32);
}
MSL_INLINE ulong mulhi(ulong a, ulong b) {
  return (ulong)(((unsigned __int128)a * b) >> 64);
}
template <int N>
MSL_INLINE vec<uint, N> mulhi(vec<uint, N> a, vec<uint, N> b) {
  vec<uint, N> result;
  for (int i = 0; i < N; ++i) {
    result[i] = mulhi(a[i], b[i]);
  }
  return result;
}
MSL_INLINE uint rotate(uint x, uint k) {
  k &= 31;
  return k ? x << k | x >> (32 - k) : x;
}
template <class T>
MSL_INLINE T extract_bits(T x, uint offset, uint bits) {
  constexpr uint all = sizeof(T) * 8;
  return bits == 0 ? T(0) : T(T(x << (all - offset - bits)) >> (all - bits));
}
template <class T>
MSL_INLINE T mul24(T a, T b) {
  return a * b;
}
template <class T>
MSL_INLINE T mad24(T a, T b, T c) {
  return a * b + c;
}
MSL_INLINE float4 unpack_unorm4x8_to_float(uint x) {
  float4 result;
  for (int i = 0; i < 4; ++i) {
    result[i] = (float)(x >> (8 * i) & 255) / 255.f;
  }
  return result;
}
MSL_INLINE float4 unpack_snorm4x8_to_float(uint x) {
  float4 result;
  for (int i = 0; i < 4; ++i) {
    float value = (float)(signed char)(x >> (8 * i) & 255) / 127.f;
    result[i] = value < -1.f ? -1.f : value;
  }
  return result;
}

} // namespace metal
