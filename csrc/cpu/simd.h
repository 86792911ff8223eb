#pragma once
// simd.h: sixteen float32 lanes, the same in every instruction set.
//
// F32x16 is one AVX-512 register, two of AVX2 or four of NEON. Since lanes,
// fused multiply-adds and the order of sum() are the same everywhere, a kernel
// written with it gives equal bits on AVX-512, AVX2 and NEON; only `portable`,
// which multiplies and adds, rounds differently.
//
// Included by kernel files only (see kernel.h): everything here lives in the
// namespace of one instruction set.

#include <stdint.h>
#include <string.h>

#include "cpu/kernel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(PYENGINE_ISA)
#define PYENGINE_ISA portable // for editors; the build always defines it
#endif

#if defined(__AMX_INT8__) || defined(PYENGINE_EMULATE_TILES)
#define PYENGINE_TILES // tiles of bytes (plane_tiles.h)
#endif

#define PYENGINE_INLINE inline __attribute__((always_inline))
#define PYENGINE_UNROLL _Pragma("GCC unroll 16")

namespace pyengine::PYENGINE_ISA {

constexpr int lanes = 16;

#if defined(__AVX512F__)
constexpr int native = 16;
#elif defined(__AVX2__)
constexpr int native = 8;
#else
constexpr int native = 4;
#endif
constexpr int parts = lanes / native;

using NativeFloat = float __attribute__((vector_size(4 * native)));
using NativeInt = int32_t __attribute__((vector_size(4 * native)));
using NativeShort = uint16_t __attribute__((vector_size(2 * native)));

// Storage formats, as bits.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

struct F32x16 {
  NativeFloat part[parts];
};

// ---- Construction, loads and stores

namespace detail {

PYENGINE_INLINE NativeFloat splat(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return NativeFloat{value, value, value, value};
#endif
}

} // namespace detail

PYENGINE_INLINE F32x16 broadcast(float value) {
  F32x16 r;
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    r.part[i] = detail::splat(value);
  }
  return r;
}

// `low` in lanes 0..7, `high` in lanes 8..15.
PYENGINE_INLINE F32x16 broadcast(float low, float high) {
  F32x16 r;
#if defined(__AVX512F__)
  __m512 both = _mm512_castps256_ps512(_mm256_set1_ps(low));
  r.part[0] = _mm512_insertf32x8(both, _mm256_set1_ps(high), 1);
#else
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    r.part[i] = detail::splat(i < parts / 2 ? low : high);
  }
#endif
  return r;
}

PYENGINE_INLINE F32x16 zero() {
  return broadcast(0.0f);
}

namespace detail {

PYENGINE_INLINE NativeFloat load_part(const float* from) {
  NativeFloat r;
  memcpy(&r, from, sizeof(r));
  return r;
}

PYENGINE_INLINE void store_part(float* to, NativeFloat a) {
  memcpy(to, &a, sizeof(a));
}

} // namespace detail

PYENGINE_INLINE F32x16 load(const float* from) {
  F32x16 r;
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    r.part[i] = detail::load_part(from + native * i);
  }
  return r;
}

PYENGINE_INLINE void store(float* to, F32x16 a) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    detail::store_part(to + native * i, a.part[i]);
  }
}

namespace detail {

PYENGINE_INLINE NativeInt as_int(NativeFloat a) {
  NativeInt r;
  memcpy(&r, &a, sizeof(r));
  return r;
}

PYENGINE_INLINE NativeFloat as_float(NativeInt a) {
  NativeFloat r;
  memcpy(&r, &a, sizeof(r));
  return r;
}

// a + b of the bits of any floats, NaN included: wraps around.
PYENGINE_INLINE NativeInt add_bits(NativeInt a, NativeInt b) {
  using Unsigned = uint32_t __attribute__((vector_size(4 * native)));
  return NativeInt(Unsigned(a) + Unsigned(b));
}

// Where `mask` is all ones, a; elsewhere b.
PYENGINE_INLINE NativeInt select(NativeInt mask, NativeInt a, NativeInt b) {
  return (mask & a) | (~mask & b);
}

PYENGINE_INLINE NativeInt widen(const uint16_t* from) {
#if defined(__AVX512F__)
  return NativeInt(_mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i*)from)));
#elif defined(__AVX2__)
  return NativeInt(_mm256_cvtepu16_epi32(_mm_loadu_si128((__m128i*)from)));
#else
  NativeShort s;
  memcpy(&s, from, sizeof(s));
  return __builtin_convertvector(s, NativeInt);
#endif
}

PYENGINE_INLINE void narrow(uint16_t* to, NativeInt a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(__m512i(a)));
#elif defined(__AVX2__)
  __m128i low = _mm256_castsi256_si128(__m256i(a));
  __m128i high = _mm256_extracti128_si256(__m256i(a), 1);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(low, high));
#else
  NativeShort s = __builtin_convertvector(a, NativeShort);
  memcpy(to, &s, sizeof(s));
#endif
}

PYENGINE_INLINE NativeFloat widen_half(const uint16_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((__m256i*)from));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128((__m128i*)from));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
  // The exponent moves by 112, which a multiplication does for subnormals too;
  // infinities and NaNs get the largest exponent afterwards.
  NativeInt h = widen(from);
  NativeInt magnitude = (h & 0x7fff) << 13;
  NativeFloat f = as_float(magnitude) * 0x1p112f;
  NativeInt special = (h & 0x7c00) == 0x7c00;
  NativeInt bits = as_int(f) | (special & 0x7f800000);
  return as_float(bits | ((h & 0x8000) << 16));
#endif
}

PYENGINE_INLINE void narrow_half(uint16_t* to, NativeFloat a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      (__m256i*)to,
      _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(a)));
#else
  NativeInt bits = as_int(a);
  NativeInt sign = (bits >> 16) & 0x8000;
  NativeInt magnitude = bits & 0x7fffffff;
  // Normal results: round the 13 dropped bits to nearest, ties to even.
  NativeInt odd = (magnitude >> 13) & 1;
  NativeInt normal = (add_bits(magnitude, 0xfff + odd) >> 13) - (112 << 10);
  // Subnormal results: adding 0.5 leaves the rounded fraction in the low bits.
  NativeInt small = as_int(as_float(magnitude) + 0.5f) - 0x3f000000;
  NativeInt h = select(magnitude < (113 << 23), small, normal);
  h = select(magnitude >= (143 << 23), NativeInt{} + 0x7c00, h);
  h = select(magnitude > 0x7f800000, NativeInt{} + 0x7e00, h);
  narrow(to, h | sign);
#endif
}

PYENGINE_INLINE NativeInt round_bfloat(NativeFloat a) {
  NativeInt bits = as_int(a);
  // Nearest, ties to even; a NaN would otherwise round to infinity.
  NativeInt rounded = add_bits(bits, 0x7fff + ((bits >> 16) & 1)) >> 16;
  NativeInt nan = (bits & 0x7fffffff) > 0x7f800000;
  return select(nan, NativeInt{} + 0x7fc0, rounded) & 0xffff;
}

} // namespace detail

PYENGINE_INLINE F32x16 load(const BFloat* from) {
  F32x16 r;
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    r.part[i] = detail::as_float(detail::widen(&from[i * native].bits) << 16);
  }
  return r;
}

PYENGINE_INLINE F32x16 load(const Half* from) {
  F32x16 r;
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    r.part[i] = detail::widen_half(&from[i * native].bits);
  }
  return r;
}

PYENGINE_INLINE void store(BFloat* to, F32x16 a) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    detail::narrow(&to[i * native].bits, detail::round_bfloat(a.part[i]));
  }
}

PYENGINE_INLINE void store(Half* to, F32x16 a) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    detail::narrow_half(&to[i * native].bits, a.part[i]);
  }
}

// The first `count` < 16 elements; the other lanes are 0.
template <typename T>
PYENGINE_INLINE F32x16 load(const T* from, int count) {
  T padded[lanes] = {};
  memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <typename T>
PYENGINE_INLINE void store(T* to, F32x16 a, int count) {
  T padded[lanes];
  store(padded, a);
  memcpy(to, padded, count * sizeof(T));
}

template <typename T>
PYENGINE_INLINE float to_float(T value) {
  float r[lanes];
  store(r, load(&value, 1));
  return r[0];
}

PYENGINE_INLINE float to_float(float value) {
  return value;
}

PYENGINE_INLINE float to_float(BFloat value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float r;
  memcpy(&r, &bits, sizeof(r));
  return r;
}

// Sixteen results to index `at` of an array in any storage format.
PYENGINE_INLINE void
store(void* to, Storage storage, int64_t at, F32x16 a, int count) {
  switch (storage) {
    case Storage::float32:
      return store(static_cast<float*>(to) + at, a, count);
    case Storage::float16:
      return store(static_cast<Half*>(to) + at, a, count);
    case Storage::bfloat16:
      return store(static_cast<BFloat*>(to) + at, a, count);
  }
}

// The same for a run of floats.
PYENGINE_INLINE void
store(void* to, Storage storage, int64_t at, const float* from, int count) {
  int i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(to, storage, at + i, load(from + i), lanes);
  }
  if (i < count) {
    store(to, storage, at + i, load(from + i, count - i), count - i);
  }
}

// ---- Small integers, as packed weights hold them

struct I32x16 {
  NativeInt part[parts];
};

PYENGINE_INLINE I32x16 operator&(I32x16 a, int32_t mask) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    a.part[i] &= mask;
  }
  return a;
}

PYENGINE_INLINE I32x16 operator>>(I32x16 a, int bits) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    a.part[i] >>= bits;
  }
  return a;
}

PYENGINE_INLINE F32x16 to_float(I32x16 a) {
  F32x16 r;
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    r.part[i] = __builtin_convertvector(a.part[i], NativeFloat);
  }
  return r;
}

// Sixteen bytes, one per lane.
PYENGINE_INLINE I32x16 widen(const uint8_t* from) {
  I32x16 r;
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
#if defined(__AVX512F__)
    r.part[i] =
        NativeInt(_mm512_cvtepu8_epi32(_mm_loadu_si128((__m128i*)from)));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((__m128i*)(from + 8 * i));
    r.part[i] = NativeInt(_mm256_cvtepu8_epi32(bytes));
#else
    using Bytes = uint8_t __attribute__((vector_size(native)));
    Bytes bytes;
    memcpy(&bytes, from + native * i, sizeof(bytes));
    r.part[i] = __builtin_convertvector(bytes, NativeInt);
#endif
  }
  return r;
}

// 48 bytes, three per lane, the first lowest.
PYENGINE_INLINE I32x16 widen_triples(const uint8_t* from) {
  I32x16 r;
#if defined(__AVX512F__)
  const __m512i quarters =
      _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
  const __m512i spread = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
  __m512i bytes = _mm512_maskz_loadu_epi32(0xfff, from);
  bytes = _mm512_permutexvar_epi32(quarters, bytes);
  r.part[0] = NativeInt(_mm512_shuffle_epi8(bytes, spread));
#elif defined(__AVX2__)
  // Twelve bytes fill four lanes. Every second load starts four bytes early, so
  // that the last does not reach past the 48.
  // clang-format off
  const __m256i spread = _mm256_setr_epi8(
      0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
      4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
  // clang-format on
  PYENGINE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint8_t* at = from + 24 * i;
    __m256i bytes = _mm256_set_m128i(
        _mm_loadu_si128((__m128i*)(at + 8)), _mm_loadu_si128((__m128i*)at));
    r.part[i] = NativeInt(_mm256_shuffle_epi8(bytes, spread));
  }
#else
  // Twelve bytes fill four lanes. The last load starts four bytes early, so as
  // not to reach past the 48.
  PYENGINE_UNROLL
  for (int i = 0; i < 4; ++i) {
    int early = i == 3 ? 4 : 0;
    int32_t lane[4];
    const uint8_t* at = from + 12 * i - early;
#if defined(__aarch64__)
    const uint8x16_t spread = {
        0, 1, 2, 99, 3, 4, 5, 99, 6, 7, 8, 99, 9, 10, 11, 99};
    uint8x16_t bytes =
        vqtbl1q_u8(vld1q_u8(at), vaddq_u8(spread, vdupq_n_u8(early)));
    memcpy(lane, &bytes, sizeof(lane));
#else
    for (int j = 0; j < 4; ++j) {
      const uint8_t* b = at + early + 3 * j;
      lane[j] = b[0] | b[1] << 8 | b[2] << 16;
    }
#endif
    memcpy(reinterpret_cast<char*>(&r) + 16 * i, lane, sizeof(lane));
  }
#endif
  return r;
}

namespace detail {

PYENGINE_INLINE void pin_part(NativeFloat& a) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(a));
#elif defined(__x86_64__)
  __asm__("" : "+x"(a));
#elif defined(__aarch64__)
  __asm__("" : "+w"(a));
#endif
}

} // namespace detail

// Keeps a value that several products share in its register. Left alone, gcc
// folds the load into each of them and the load ports become the limit.
PYENGINE_INLINE void pin(F32x16& a) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    detail::pin_part(a.part[i]);
  }
}

// Asks for the cache line at `address`, for use some microseconds later.
PYENGINE_INLINE void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

// ---- Arithmetic

#define PYENGINE_LANEWISE(op)                              \
  PYENGINE_INLINE F32x16 operator op(F32x16 a, F32x16 b) { \
    PYENGINE_UNROLL                                        \
    for (int i = 0; i < parts; ++i) {                      \
      a.part[i] = a.part[i] op b.part[i];                  \
    }                                                      \
    return a;                                              \
  }
PYENGINE_LANEWISE(+)
PYENGINE_LANEWISE(-)
PYENGINE_LANEWISE(*)
PYENGINE_LANEWISE(/)
#undef PYENGINE_LANEWISE

namespace detail {

PYENGINE_INLINE NativeFloat
fma_part(NativeFloat a, NativeFloat b, NativeFloat c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

} // namespace detail

// a * b + c with one rounding, or with two in `portable`, whose machines would
// have to emulate it.
PYENGINE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    c.part[i] = detail::fma_part(a.part[i], b.part[i], c.part[i]);
  }
  return c;
}

PYENGINE_INLINE F32x16 max(F32x16 a, F32x16 b) {
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    NativeInt greater = a.part[i] > b.part[i];
    a.part[i] = detail::as_float(
        detail::select(
            greater, detail::as_int(a.part[i]), detail::as_int(b.part[i])));
  }
  return a;
}

// ---- Across lanes, in a fixed tree: lane i with i + 8, then + 4, + 2, + 1

PYENGINE_INLINE float sum(F32x16 a) {
  using Four = float __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  __m256 eight = _mm256_add_ps(
      _mm512_castps512_ps256(a.part[0]), _mm512_extractf32x8_ps(a.part[0], 1));
#elif defined(__AVX2__)
  __m256 eight = _mm256_add_ps(a.part[0], a.part[1]);
#endif
#if defined(__AVX2__)
  Four four = _mm_add_ps(
      _mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  Four four = (a.part[0] + a.part[2]) + (a.part[1] + a.part[3]);
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// sum() of four values at once: transposing shares the additions.
PYENGINE_INLINE void
sum(F32x16 a0, F32x16 a1, F32x16 a2, F32x16 a3, float* to) {
#if defined(__AVX512F__)
  // Eight lanes of two values, then four lanes of four values.
  __m512 b0 = _mm512_add_ps(
      _mm512_shuffle_f32x4(a0.part[0], a1.part[0], 0x44),
      _mm512_shuffle_f32x4(a0.part[0], a1.part[0], 0xee));
  __m512 b1 = _mm512_add_ps(
      _mm512_shuffle_f32x4(a2.part[0], a3.part[0], 0x44),
      _mm512_shuffle_f32x4(a2.part[0], a3.part[0], 0xee));
  __m512 c = _mm512_add_ps(
      _mm512_shuffle_f32x4(b0, b1, 0x88), _mm512_shuffle_f32x4(b0, b1, 0xdd));
  c = _mm512_add_ps(c, _mm512_permute_ps(c, 0x4e));
  c = _mm512_add_ps(c, _mm512_permute_ps(c, 0xb1));
  __m512i firsts = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 8, 12));
  c = _mm512_permutexvar_ps(firsts, c);
  _mm_storeu_ps(to, _mm512_castps512_ps128(c));
#elif defined(__AVX2__)
  // Four lanes of values 0 and 2, and of 1 and 3; then two lanes of each.
  __m256 s0 = a0.part[0] + a0.part[1], s1 = a1.part[0] + a1.part[1];
  __m256 s2 = a2.part[0] + a2.part[1], s3 = a3.part[0] + a3.part[1];
  __m256 b0 = _mm256_add_ps(
      _mm256_permute2f128_ps(s0, s2, 0x20),
      _mm256_permute2f128_ps(s0, s2, 0x31));
  __m256 b1 = _mm256_add_ps(
      _mm256_permute2f128_ps(s1, s3, 0x20),
      _mm256_permute2f128_ps(s1, s3, 0x31));
  __m256 c =
      _mm256_add_ps(_mm256_unpacklo_ps(b0, b1), _mm256_unpackhi_ps(b0, b1));
  c = _mm256_add_ps(c, _mm256_permute_ps(c, 0x4e));
  __m128 low = _mm256_castps256_ps128(c);
  _mm_storeu_ps(to, _mm_movelh_ps(low, _mm256_extractf128_ps(c, 1)));
#else
  to[0] = sum(a0);
  to[1] = sum(a1);
  to[2] = sum(a2);
  to[3] = sum(a3);
#endif
}

// sum() of all n values. A template and no loop: with a running index gcc would
// keep the array in memory.
template <int i = 0, int n>
PYENGINE_INLINE void sums(const F32x16 (&a)[n], float* to) {
  if constexpr (i + 4 <= n) {
    sum(a[i], a[i + 1], a[i + 2], a[i + 3], to + i);
    sums<i + 4>(a, to);
  } else if constexpr (i < n) {
    to[i] = sum(a[i]);
    sums<i + 1>(a, to);
  }
}

PYENGINE_INLINE float max(F32x16 a) {
  float t[lanes];
  store(t, a);
  PYENGINE_UNROLL
  for (int step = lanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) {
      t[i] = t[i] > t[i + step] ? t[i] : t[i + step];
    }
  }
  return t[0];
}

// Calls f with a compile-time `value` for the run-time number 1 <= n <= most.
template <int n>
struct Constant {
  static constexpr int value = n;
};

template <int most, typename F>
PYENGINE_INLINE void with_constant(int n, const F& f) {
  if (n == most) {
    f(Constant<most>{});
  } else if constexpr (most > 1) {
    with_constant<most - 1>(n, f);
  }
}

} // namespace pyengine::PYENGINE_ISA
