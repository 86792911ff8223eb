// draw_token: one token from each row of candidates, one simdgroup per row.
//
// Shared noise is a race, whose candidates are independent. An inversion adds
// masses in the order of the candidates: shuffles bring them, and every lane
// keeps the sum that belongs to its own.
#include "rng.h"

constant bool shared_noise [[function_constant(0)]];

namespace pyengine {

[[host_name(
    "draw_token")]] [[kernel, max_total_threads_per_threadgroup(32)]] void
draw_token(
    const device int* ids [[buffer(0)]], // [T, count]
    const device float* probs [[buffer(1)]], // [T, count]
    const device int* position [[buffer(2)]], // []
    const device uint* seed [[buffer(3)]], // []
    device int* out [[buffer(4)]], // [T]
    constant uint& count [[buffer(5)]],
    constant uint& first_index [[buffer(6)]],
    constant float& minus_zero [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]]) {
  uint row = group.x;
  uint index = first_index + row;
  const device int* own = ids + ulong(row) * count;
  const device float* weights = probs + ulong(row) * count;
  int token;
  if (shared_noise) {
    uint at = uint(*position) + index;
    token = race(own, weights, count, at, *seed, minus_zero, lane);
  } else {
    float u = uniform_at(uint(*position), index, *seed, Purpose::draft);
    token = invert(own, weights, count, u, lane);
  }
  if (lane == 0) {
    out[row] = token;
  }
}

} // namespace pyengine
