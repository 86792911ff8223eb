// glu: gelu_tanh(gate) * up, or silu(gate) * up, one element per thread.
//
// For gates that no matmul computes together with up; quantized_gated_matmul
// gates its own.
#include "common.h"

constant bool with_silu [[function_constant(0)]]; // in place of gelu

namespace pyengine {

template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void glu(
    const device T* gate [[buffer(0)]],
    const device T* up [[buffer(1)]],
    device T* out [[buffer(2)]],
    constant uint& size [[buffer(3)]],
    uint index [[thread_position_in_grid]]) {
  if (index < size) {
    out[index] = T(activated(float(gate[index]), with_silu) * float(up[index]));
  }
}

INSTANTIATE("glu_float32", glu, float)
INSTANTIATE("glu_float16", glu, half)
INSTANTIATE("glu_bfloat16", glu, bfloat)

} // namespace pyengine
