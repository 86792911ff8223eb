// embed: rows of a table by token id, dequantised and scaled. A thread makes
// four numbers of a row.
//
// A weight is q * scale + bias with both steps rounded, as the definition has
// it. An id outside of the table gives NaN: nothing is read there.
// Limits: none.
#include "ordered_sum.h"

constant bool float_out [[function_constant(0)]];
constant int bits [[function_constant(1)]]; // 0 for a table of floats
constant int group_size [[function_constant(2)]];

namespace pyengine {

template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void embed(
    const device int* ids [[buffer(0)]], // [T]
    const device uchar* w [[buffer(1)]], // [V, E * bits / 8] bytes, or T
    const device T* scales [[buffer(2)]], // [V, E / group_size]
    const device T* biases [[buffer(3)]],
    device uchar* out [[buffer(4)]], // [T, E], T or float
    constant uint& V [[buffer(5)]],
    constant uint& E [[buffer(6)]],
    constant float& scale [[buffer(7)]],
    constant float& minus_zero [[buffer(8)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 threads [[threads_per_threadgroup]],
    ushort index [[thread_index_in_threadgroup]]) {
  uint first = 4 * (group.x * threads.x + index);
  uint row = uint(ids[group.y]); // negative ids become large
  if (first >= E) {
    return;
  }
  float values[4];
  if (row >= V) {
    for (ushort i = 0; i < 4; ++i) {
      values[i] = NAN;
    }
  } else if (bits == 0) {
    const device T* from = (const device T*)w + ulong(row) * E + first;
    T loaded[4];
    for (ushort i = 0; i < 4; ++i) {
      loaded[i] = from[min(uint(i), E - 1 - first)];
    }
    for (ushort i = 0; i < 4; ++i) {
      values[i] = float(loaded[i]) * scale;
    }
  } else {
    // Four weights lie in bits / 2 bytes, the first in the lowest.
    const device uchar* from = w + (ulong(row) * E + first) / 8 * bits +
        (first % 8 == 4 ? bits / 2 : 0);
    uint packed;
    if (bits == 8) {
      packed = *(const device uint*)from;
    } else {
      packed = from[0] | uint(from[1]) << 8;
      packed |= bits == 6 ? uint(from[2]) << 16 : 0;
    }
    ulong at = (ulong(row) * E + first) / group_size;
    float factor = float(scales[at]), bias = float(biases[at]);
    for (ushort i = 0; i < 4; ++i) {
      float q = float(packed >> i * bits & ((1u << bits) - 1));
      values[i] = (product(q, factor, minus_zero) + bias) * scale;
    }
  }
  for (ushort i = 0; i < 4; ++i) {
    if (first + i < E) {
      write<T>(out, ulong(group.y) * E + first + i, values[i], float_out);
    }
  }
}

INSTANTIATE("embed_float32", embed, float)
INSTANTIATE("embed_float16", embed, half)
INSTANTIATE("embed_bfloat16", embed, bfloat)

} // namespace pyengine
