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

  char* to = at.x + at.piece() * chunk + 4 * row;
  __m512i totals[2];
  PYENGINE_UNROLL
  for (int part = 0; part < 4; ++part) {
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(a[part].part[0], factor));
    __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
    __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(whole, low), 8);
    auto put = [&](char* to, __m512i plane) { // four by four
      __m128i bytes = _mm512_cvtepi32_epi8(plane);
      int fours[4];
      memcpy(fours, &bytes, sizeof(fours));
      PYENGINE_UNROLL
      for (int i = 0; i < 4; ++i) {
        memcpy(to + i * at.pitch(), &fours[i], 4);
      }
    };
    put(to, high);
    put(to + at.plane(), low);
    to += 4 * at.pitch();
    auto& total = totals[part / 2];
    total = part % 2 ? _mm512_add_epi32(total, whole) : whole;
  }
  float* sums = at.sums(chunk) + row;
  int first = _mm512_reduce_add_epi32(totals[0]);
  int second = _mm512_reduce_add_epi32(totals[1]);
  sums[0] = unit * float(first);
  sums[at.rows] = unit * float(second);
  sums[2 * at.rows] = unit * float(first + second);
  sums[3 * at.rows] = unit;
}

} // namespace pyengine::PYENGINE_ISA

#endif
