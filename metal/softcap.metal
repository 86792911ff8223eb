// softcap: cap * tanh(x / cap), one number per thread.
//
// For those who want all logits; quantized_filter_logits caps its own.
#include "common.h"

using namespace pyengine;

[[kernel]] void softcap(
    const device float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    constant uint& size [[buffer(2)]],
    constant float& cap [[buffer(3)]],
    uint index [[thread_position_in_grid]]) {
  if (index < size) {
    out[index] = capped(x[index], cap);
  }
}
