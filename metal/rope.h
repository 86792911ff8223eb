#pragma once
// rope.h: norm and rotary embedding of one head, as csrc/cpu/rope.h.
//
// A simdgroup owns a head. It reads it once, as norm.h does, and meets its
// other half in threadgroup memory: element i turns with i + D / 2, which
// mostly is another lane's. Angles are computed for every head anew: 2 or 3 of
// them a lane cost less than a barrier with the other heads.

#include "norm.h"
#include "positions.h"

namespace pyengine {

// A head and 1 / sqrt(mean + eps) of it. D is even, at most piece_width.
template <typename T>
inline float load_head(
    const device T* x,
    thread float2 (&values)[pairs],
    Piece piece,
    float eps) {
  Pairs<T> loaded = piece.load(x);
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    values[i] = loaded.pair(i);
  }
  return inverse_root(square_sum(values), piece.width, eps);
}

// What a lane loads of the frequencies at a time: those of i, i + 32, ...
struct Frequencies {
  enum { count = 4 };
  float of[count];

  Frequencies(const device float* inv_freq, uint first, uint half_width) {
#pragma unroll
    for (ushort j = 0; j < count; ++j) {
      of[j] = inv_freq[min(first + 32 * j, half_width - 1)];
    }
  }
};

// out = x normed and turned to a position. x, weight and out have D elements.
template <typename T>
inline void rotate_head(
    const device T* x,
    const device T* weight,
    const device float* inv_freq, // [D / 2]
    device T* out,
    threadgroup float* normed, // [D], no other simdgroup's
    int position,
    uint D,
    float eps,
    ushort lane) {
  Piece piece(0, D, lane);
  Pairs<T> factors = piece.load(weight);
  Frequencies frequencies(inv_freq, lane, D / 2);
  float2 values[pairs];
  float inverse = load_head(x, values, piece, eps);
#pragma unroll
  for (ushort i = 0; i < pairs; ++i) {
    if (piece.live(i)) {
      *(threadgroup float2*)(normed + piece.at(i)) =
          values[i] * inverse * factors.pair(i);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint first = lane; first < D / 2; first += 32 * Frequencies::count) {
    if (first != lane) {
      frequencies = Frequencies(inv_freq, first, D / 2);
    }
#pragma unroll
    for (ushort j = 0; j < Frequencies::count; ++j) {
      uint i = first + 32 * j;
      if (i < D / 2) {
        float2 turn = sincos(float(position) * frequencies.of[j]);
        float low = normed[i], high = normed[i + D / 2];
        out[i] = T(fma(low, turn.y, 0.0f - high * turn.x));
        out[i + D / 2] = T(fma(high, turn.y, low * turn.x));
      }
    }
  }
}

} // namespace pyengine
