#pragma once
// planes.h: rows of bfloat16 as whole numbers, which instruction sets multiply
// with quantised weights byte by byte (plane_dots.h, plane_tiles.h).
//
// Every 64 elements of a row, a chunk, become whole numbers of 15 bits and a
// sign, fixed point under the chunk's largest magnitude, cut into two planes of
// signed bytes. Products of bytes are added without rounding. The sum over a
// piece, which is a chunk or the half of one that a group of 32 weights meets,
// is rounded to float32; scale and bias come to it there, piece after piece in
// ascending order. So neither the number of rows nor what adds up a piece can
// change a row's bits, and all sets that use planes have the same.
//
// What is rounded is x alone: an element loses what lies below 2^-15 of its
// chunk's largest magnitude, a sixty-fourth of what an element as large as that
// has lost as a bfloat16. One down to 2^-6 of it stays what it is.

#include "cpu/simd.h"

#if defined(__AVX512VNNI__)

namespace pyengine::PYENGINE_ISA {

// Others have bits that planes would drop.
constexpr bool takes_planes(Storage storage) {
  return storage == Storage::bfloat16;
}

constexpr int plane_count = 2;
constexpr int chunk_k = 64; // elements that share a unit
constexpr int plane_columns = 16; // that are multiplied side by side

// Four elements of a plane are four bytes, those of all rows lie side by side.
// Both planes of one, two, four or eight rows do too, [16, 2, rows, 4] bytes:
// there one instruction of AMX does the work of two. Those of other numbers of
// rows follow each other, [2, 16, rows, 4].
constexpr bool planes_share(int rows) {
  return rows == 1 || rows == 2 || rows == 4 || rows == 8;
}

// Scratch of `rows` rows: for every chunk the planes, higher first, and behind
// them [4, rows] float32: sums of the elements of the first half, of the second
// and of both, and what one unit of the whole numbers is worth.
struct PlanesAt {
  char* x;
  int rows;

  constexpr int64_t piece() const { // from one chunk to the next
    return int64_t(192) * rows;
  }
  constexpr int plane() const {
    return planes_share(rows) ? 4 * rows : 64 * rows;
  }
  constexpr int pitch() const { // from four elements of a row to the next four
    return planes_share(rows) ? 4 * plane_count * rows : 4 * rows;
  }
  float* sums(int chunk) const {
    return reinterpret_cast<float*>(x + piece() * chunk + 128 * rows);
  }
  float* units(int chunk) const {
    return sums(chunk) + 3 * rows;
  }
};

// Where bytes `first`, `first` + 2, ... of two vectors are.
template <int first>
struct EverySecond {
  alignas(64) uint8_t at[chunk_k];

  constexpr EverySecond() : at() {
    for (int i = 0; i < chunk_k; ++i) {
      at[i] = uint8_t(2 * i + first);
    }
  }
};

template <int first>
PYENGINE_INLINE __m512i every_second_byte(__m512i a, __m512i b) {
  static constexpr EverySecond<first> places;
  return _mm512_permutex2var_epi8(a, _mm512_load_si512(places.at), b);
}

// Writes chunk `chunk` of one row.
PYENGINE_INLINE void put_chunk(
    const PlanesAt& at,
    int row,
    int chunk,
    const F32x16 (&a)[chunk_k / lanes]) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (const auto& part : a) {
    __m512i bits = _mm512_castps_si512(part.part[0]);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
  }
  // The unit: two signed bytes hold up to 127 * 256 + 127, so what begins with
  // eight ones counts as the next power of two. A chunk that holds an infinity
  // or NaN makes every result NaN; one whose largest element is below 2^-112 is
  // scaled as if that were larger.
  int bits = _mm512_reduce_max_epi32(largest);
  bool finite = bits < 0x7f800000;
  int exponent = (bits + 0x10000) >> 23;
  exponent = exponent < 15 ? 15 : exponent;
  auto power = [](int exponent) { // 2 to the power of exponent - 127
    int32_t bits = exponent << 23;
    float r;
    memcpy(&r, &bits, sizeof(r));
    return r;
  };
  __m512 factor = _mm512_set1_ps(finite ? power(268 - exponent) : 0.0f);
  float unit = finite ? power(exponent - 14) : __builtin_nanf("");

  // Whole numbers of sixteen bits: the lower byte, as a signed one, and what is
  // left are the planes.
  __m512i words[2];
  PYENGINE_UNROLL
  for (int half = 0; half < 2; ++half) {
    __m256i parts[2];
    PYENGINE_UNROLL
    for (int i = 0; i < 2; ++i) {
      __m512 scaled = _mm512_mul_ps(a[2 * half + i].part[0], factor);
      parts[i] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(scaled));
    }
    words[half] =
        _mm512_inserti64x4(_mm512_castsi256_si512(parts[0]), parts[1], 1);
  }
  const __m512i round = _mm512_set1_epi16(128);
  __m512i high = every_second_byte<1>(
      _mm512_add_epi16(words[0], round), _mm512_add_epi16(words[1], round));
  __m512i low = every_second_byte<0>(words[0], words[1]);

  const int pitch = at.pitch();
  char* to = at.x + at.piece() * chunk + 4 * row;
  alignas(64) int32_t fours[2][lanes];
  _mm512_store_si512(fours[0], high);
  _mm512_store_si512(fours[1], low);
  PYENGINE_UNROLL
  for (int i = 0; i < lanes; ++i) {
    memcpy(to + i * pitch, &fours[0][i], 4);
    memcpy(to + i * pitch + at.plane(), &fours[1][i], 4);
  }

  const __m512i ones = _mm512_set1_epi8(1), none = _mm512_setzero_si512();
  high = _mm512_dpbusd_epi32(none, ones, high);
  low = _mm512_dpbusd_epi32(none, ones, low);
  __m512i totals = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  // Neighbours, then every second, then 128 bits within each half.
  totals =
      _mm512_add_epi32(totals, _mm512_shuffle_epi32(totals, _MM_PERM_CDAB));
  totals =
      _mm512_add_epi32(totals, _mm512_shuffle_epi32(totals, _MM_PERM_BADC));
  totals = _mm512_add_epi32(totals, _mm512_shuffle_i32x4(totals, totals, 0xb1));
  float first = unit * float(_mm512_cvtsi512_si32(totals));
  float second =
      unit * float(_mm256_cvtsi256_si32(_mm512_extracti64x4_epi64(totals, 1)));
  float* sums = at.sums(chunk) + row;
  sums[0] = first;
  sums[at.rows] = second;
  sums[2 * at.rows] = first + second;
  sums[3 * at.rows] = unit;
}

} // namespace pyengine::PYENGINE_ISA

#endif
