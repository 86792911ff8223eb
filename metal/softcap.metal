// softcap: cap * tanh(x / cap), one number per thread.
//
// For those who want all logits; quantized_filter_logits caps its own.
#include "common.h"

namespace pyengine {

[[host_name("softcap")]] [[kernel, max_total_threads_per_threadgroup(256)]] void
softcap(
    const device float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    constant uint& size [[buffer(2)]],
    constant float& cap [[buffer(3)]],
    uint index [[thread_position_in_grid]]) {
  if (index < size) {
    out[index] = capped(x[index], cap);
  }
}

} // namespace pyengine
