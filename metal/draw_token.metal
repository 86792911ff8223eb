// draw_token: one token from each row of candidates, one simdgroup per row,
// each with the counter, the key and the way to draw of its own sequence.
//
// Shared noise is a race, whose candidates are independent. An inversion adds
// masses in the order of the candidates: shuffles bring them, and every lane
// keeps the sum that belongs to its own.
#include "rng.h"

namespace pyengine {

[[host_name(
    "draw_token")]] [[kernel, max_total_threads_per_threadgroup(32)]] void
draw_token(
    const device int* ids [[buffer(0)]], // [R, count]
    const device float* probs [[buffer(1)]], // [R, count]
    const device int* position [[buffer(2)]], // [R]
    const device int* index [[buffer(3)]], // [R]
    const device uint* seed [[buffer(4)]], // [R]
    const device bool* shared [[buffer(5)]], // [R]
    device int* out [[buffer(6)]], // [R]
    constant uint& count [[buffer(7)]],
    constant float& minus_zero [[buffer(8)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]]) {
  uint row = group.x;
  uint at = uint(position[row]);
  uint within = uint(index[row]);
  const device int* own = ids + ulong(row) * count;
  const device float* weights = probs + ulong(row) * count;
  int token;
  if (shared[row]) {
    token = race(own, weights, count, at + within, seed[row], minus_zero, lane);
  } else {
    float u = uniform_at(at, within, seed[row], Purpose::draft);
    token = invert(own, weights, count, u, lane);
  }
  if (lane == 0) {
    out[row] = token;
  }
}

} // namespace pyengine
