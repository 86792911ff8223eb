#pragma once
// turn.h: weights, scales and biases of sixteen columns, turned so that a lane
// is a column: for the sets that multiply bytes (planes.h).

#include "cpu/simd.h"

#if defined(__AVX512VNNI__)

namespace pyengine::PYENGINE_ISA {

// 64 weights, or 32, as bytes in the order of x (load_row).
template <int bits>
PYENGINE_INLINE __m512i unpack_bytes(const uint8_t* from, int count) {
  __mmask64 there = ~0ull >> (64 - count * bits / 8);
  __m512i packed = _mm512_maskz_loadu_epi8(there, from);
  if constexpr (bits == 8) {
    return packed;
  }
  __m512i bytes;
  if constexpr (bits == 4) {
    const __m512i twice = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
    const __m512i nibble = _mm512_setr_epi64(
        0x3830282018100800,
        0x3830282018100800,
        0x3c342c241c140c04,
        0x3c342c241c140c04,
        0x3830282018100800,
        0x3830282018100800,
        0x3c342c241c140c04,
        0x3c342c241c140c04);
    packed = _mm512_permutexvar_epi64(twice, packed);
    bytes = _mm512_multishift_epi64_epi8(nibble, packed);
    bytes = _mm512_and_si512(bytes, _mm512_set1_epi8(0x0f));
  } else if constexpr (bits == 6) {
    // Eight weights lie in six bytes.
    const __m512i sixes = _mm512_setr_epi64(
        0x0706050403020100,
        0x0d0c0b0a09080706,
        0x131211100f0e0d0c,
        0x1918171615141312,
        0x1f1e1d1c1b1a1918,
        0x2524232221201f1e,
        0x2b2a292827262524,
        0x31302f2e2d2c2b2a);
    packed = _mm512_permutexvar_epi8(sixes, packed);
    bytes = _mm512_multishift_epi64_epi8(
        _mm512_set1_epi64(0x2a241e18120c0600), packed);
    bytes = _mm512_and_si512(bytes, _mm512_set1_epi8(0x3f));
  }
  return bytes;
}

// Four rows of four become four columns, within every 128 bits.
PYENGINE_INLINE void turn_four(__m512i (&a)[4]) {
  __m512i b[4] = {
      _mm512_unpacklo_epi32(a[0], a[1]),
      _mm512_unpackhi_epi32(a[0], a[1]),
      _mm512_unpacklo_epi32(a[2], a[3]),
      _mm512_unpackhi_epi32(a[2], a[3])};
  a[0] = _mm512_unpacklo_epi64(b[0], b[2]);
  a[1] = _mm512_unpackhi_epi64(b[0], b[2]);
  a[2] = _mm512_unpacklo_epi64(b[1], b[3]);
  a[3] = _mm512_unpackhi_epi64(b[1], b[3]);
}

// Sixteen rows of sixteen become sixteen columns.
PYENGINE_INLINE void transpose(__m512 (&a)[lanes]) {
  __m512 b[lanes];
  PYENGINE_UNROLL
  for (int i = 0; i < 16; i += 2) { // pairs within 128 bits
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  PYENGINE_UNROLL
  for (int i = 0; i < 16; i += 4) { // fours
    for (int j = 0; j < 2; ++j) {
      __m512d low = _mm512_castps_pd(b[i + j]);
      __m512d high = _mm512_castps_pd(b[i + 2 + j]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 i + j] holds column j + 4 q of rows 4 i to 4 i + 3 in quarter q.
  PYENGINE_UNROLL
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44);
    b[4 + j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xee);
    b[8 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44);
    b[12 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xee);
  }
  PYENGINE_UNROLL
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88);
    a[4 + j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd);
    a[8 + j] = _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0x88);
    a[12 + j] = _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0xdd);
  }
}

// A chunk of sixteen columns, `pitch` bytes apart: four weights of each column
// to a vector. Asks for those that lie `ahead` bytes further on.
template <int bits>
PYENGINE_INLINE void turn_chunk(
    const uint8_t* from,
    int64_t pitch,
    int count, // weights of the chunk that are there
    int64_t ahead,
    __m512i* to) {
  __m512 columns[lanes];
  PYENGINE_UNROLL
  for (int n = 0; n < lanes; ++n) {
    prefetch(from + n * pitch + ahead);
    columns[n] =
        _mm512_castsi512_ps(unpack_bytes<bits>(from + n * pitch, count));
  }
  transpose(columns);
  PYENGINE_UNROLL
  for (int i = 0; i < lanes; ++i) {
    to[i] = _mm512_castps_si512(columns[i]);
  }
}

PYENGINE_INLINE __m512 widen_some(const BFloat* from, __mmask16 some) {
  __m256i bits = _mm256_maskz_loadu_epi16(some, from);
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Scales or biases of `columns` <= 16 columns [columns, groups] to
// [groups, 16]; those of columns that are missing are 0.
PYENGINE_INLINE void
turn_factors(const BFloat* from, int columns, int groups, float* to) {
  if (groups == 2 && columns == lanes) { // they lie side by side
    __m512i both = _mm512_loadu_si512(from);
    __m512i odd = _mm512_set1_epi32(int(0xffff0000));
    _mm512_storeu_si512(to, _mm512_slli_epi32(both, 16));
    _mm512_storeu_si512(to + lanes, _mm512_and_si512(both, odd));
    return;
  }
  for (int g = 0; g < groups; g += lanes) {
    int count = groups - g < lanes ? groups - g : lanes;
    __mmask16 some = __mmask16(0xffff >> (lanes - count));
    __m512 square[lanes];
    PYENGINE_UNROLL
    for (int n = 0; n < lanes; ++n) {
      square[n] = widen_some(
          from + int64_t(n) * groups + g, n < columns ? some : __mmask16(0));
    }
    transpose(square);
    PYENGINE_UNROLL
    for (int i = 0; i < lanes; ++i) {
      if (i < count) {
        _mm512_storeu_ps(to + (g + i) * lanes, square[i]);
      }
    }
  }
}

} // namespace pyengine::PYENGINE_ISA

#endif
