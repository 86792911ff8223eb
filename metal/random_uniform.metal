// random_uniform: one Philox number per counter and thread.
#include "rng.h"

namespace pyengine {

[[host_name(
    "random_uniform")]] [[kernel, max_total_threads_per_threadgroup(256)]] void
random_uniform(
    const device uint* counters [[buffer(0)]], // [count, 4]
    device float* out [[buffer(1)]], // [count]
    constant uint& count [[buffer(2)]],
    constant uint& key0 [[buffer(3)]],
    constant uint& key1 [[buffer(4)]],
    uint i [[thread_position_in_grid]]) {
  if (i < count) {
    const device uint* c = counters + 4 * ulong(i);
    out[i] =
        uniform_of(philox(uint4(c[0], c[1], c[2], c[3]), uint2(key0, key1)));
  }
}

} // namespace pyengine
