// weigh_experts: the weighted sum of what a row's experts gave, one number
// per thread, slot after slot, products and sums each rounded.
#include "ordered_sum.h"

namespace pyengine {

constant constexpr ushort ahead = 8; // slots

template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void weigh_experts(
    const device float* parts [[buffer(0)]], // [T, used, E]
    const device float* weights [[buffer(1)]], // [T, used]
    device T* out [[buffer(2)]], // [T, E]
    constant uint& used [[buffer(3)]],
    constant uint& E [[buffer(4)]],
    constant float& minus_zero [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 threads [[threads_per_threadgroup]],
    ushort index [[thread_index_in_threadgroup]]) {
  uint k = group.x * threads.x + index;
  if (k >= E) {
    return;
  }
  const device float* own = weights + ulong(group.y) * used;
  const device float* from = parts + ulong(group.y) * used * E + k;
  float total = 0.0f;
  for (uint first = 0; first < used; first += ahead) {
    // Loads of some slots start together: beyond the last, that one again
    float part[ahead];
#pragma unroll
    for (ushort j = 0; j < ahead; ++j) {
      part[j] = from[ulong(min(first + j, used - 1)) * E];
    }
#pragma unroll
    for (ushort j = 0; j < ahead; ++j) {
      if (first + j < used) {
        float next = product(part[j], own[first + j], minus_zero);
        total = first + j == 0 ? next : total + next;
      }
    }
  }
  out[ulong(group.y) * E + k] = T(total);
}

INSTANTIATE("weigh_experts_float32", weigh_experts, float)
INSTANTIATE("weigh_experts_float16", weigh_experts, half)
INSTANTIATE("weigh_experts_bfloat16", weigh_experts, bfloat)

} // namespace pyengine
