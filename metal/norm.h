#pragma once
// norm.h: the root mean square of a row, in the order of csrc/cpu/norm.h, so
// that both give the same bits.
//
// A row is cut into pieces of 1024, one per simdgroup. Lane l holds elements
// 64 i + 2 l of a piece and their right neighbours, in registers: a load of the
// simdgroup is one line of 128 bytes (16-bit elements), and a row is read once.
// The 16 loads of a lane are all under way before it waits for one
// (docs/isa.md). A lane adds the squares of its 16 pairs, one tree of shuffles
// adds the lanes, and pieces are added in their order. Width alone decides all
// of it.

#include "common.h"

namespace pyengine {

constant constexpr ushort piece_width = 1024;
constant constexpr ushort pairs = 16; // of a lane
// A thread keeps 32 numbers of its row and needs as many for the rest: half of
// what the registers of a core leave to each of 512 threads.
constant constexpr ushort max_pieces = 16;

// A lane's pairs of a row as they are in memory: loads come first, and what is
// done with them later, so that none waits for another.
template <typename T>
struct Pairs {
  vec<T, 2> both[pairs];

  float2 pair(ushort i) const {
    return float2(float(both[i].x), float(both[i].y));
  }
};

// Where a lane's pairs of a row lie. Of an odd width a pair is two elements
// that need not start where a pair may be loaded, and the last may be one.
struct Piece {
  uint first;
  uint width; // of the row
  bool whole; // the row does not end in it

  Piece(ushort index, uint width, ushort lane)
      : first(index * piece_width + 2 * lane),
        width(width),
        whole((index + 1u) * piece_width <= width && width % 2 == 0) {}

  uint at(ushort i) const {
    return first + 64 * i;
  }
  bool live(ushort i) const {
    return at(i) < width;
  }

  // All pairs, zeros past the end of the row.
  template <typename T>
  Pairs<T> load(const device T* row) const {
    Pairs<T> loaded;
    if (whole) {
      const device vec<T, 2>* from = (const device vec<T, 2>*)(row + first);
#pragma unroll
      for (ushort i = 0; i < pairs; ++i) {
        loaded.both[i] = from[32 * i];
      }
    } else if (width % 2 == 0) {
#pragma unroll
      for (ushort i = 0; i < pairs; ++i) {
        loaded.both[i] = T(0.0f);
        if (live(i)) {
          loaded.both[i] = *(const device vec<T, 2>*)(row + at(i));
        }
      }
    } else {
#pragma unroll
      for (ushort i = 0; i < pairs; ++i) {
        uint k = at(i);
        loaded.both[i].x = k < width ? row[k] : T(0.0f);
        loaded.both[i].y = k + 1 < width ? row[k + 1] : T(0.0f);
      }
    }
    return loaded;
  }

  // Rounds pair i once and writes it. The pair is live.
  template <typename T>
  void store(device T* row, ushort i, float2 values) const {
    uint k = at(i);
    if (width % 2 == 0) {
      *(device vec<T, 2>*)(row + k) = vec<T, 2>(T(values.x), T(values.y));
      return;
    }
    row[k] = T(values.x);
    if (k + 1 < width) {
      row[k + 1] = T(values.y);
    }
  }
};

// The squares of a piece, in all lanes. The processor adds its accumulators
// first, elements 16 and then 32 apart, and then its lanes, 8, 4, 2 and 1.
inline float square_sum(thread const float2 (&values)[pairs]) {
  float2 total = 0.0f;
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    total = fma(values[i], values[i], total);
  }
  total += simd_shuffle_xor(total, 8);
  total += simd_shuffle_xor(total, 16);
  total += simd_shuffle_xor(total, 4);
  total += simd_shuffle_xor(total, 2);
  total += simd_shuffle_xor(total, 1);
  return total.x + total.y;
}

// 1 / sqrt(mean + eps), each step rounded correctly.
inline float inverse_root(float square, uint width, float eps) {
  return 1.0f / precise::sqrt(square / float(width) + eps);
}

// The same of a row whose pieces the simdgroups of a threadgroup hold. `sums`
// must not be in use by an earlier call.
inline float inverse_rms(
    thread const float2 (&values)[pairs],
    threadgroup float* sums, // [max_pieces]
    uint width,
    float eps,
    ushort simd,
    ushort simds,
    ushort lane) {
  float own = square_sum(values);
  if (lane == 0) {
    sums[simd] = own;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float square = 0.0f;
  for (ushort i = 0; i < simds; ++i) {
    square += sums[i];
  }
  return inverse_root(square, width, eps);
}

} // namespace pyengine
