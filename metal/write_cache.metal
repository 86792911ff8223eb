// write_cache: T rows of keys or values into a linear or ring cache, one
// element per thread. Rows go to slots of their own; nothing else is touched.
//
// Only prefill has use for it: a block's rows are written by prepare_qkv.
#include "common.h"
#include "positions.h"

namespace pyengine {

template <typename T> // an unsigned integer as wide as an element
[[kernel, max_total_threads_per_threadgroup(256)]] void write_cache(
    const device T* rows [[buffer(0)]], // [B, T, K, D]
    const device int* offset [[buffer(1)]], // []
    device T* cache [[buffer(2)]], // [B, K, C, D]
    constant uint& size [[buffer(3)]], // of rows
    constant uint& positions [[buffer(4)]], // T
    constant uint& K [[buffer(5)]],
    constant uint& C [[buffer(6)]],
    constant uint& D [[buffer(7)]],
    uint index [[thread_position_in_grid]]) {
  if (index >= size) {
    return;
  }
  uint row = index / D;
  uint head = row % K;
  uint t = row / K % positions;
  uint b = row / K / positions;
  int slot = slot_of_row(*offset, t, C);
  ulong to = ((ulong(b) * K + head) * C + slot) * D + index % D;
  cache[to] = rows[index];
}

INSTANTIATE("write_cache_uint16", write_cache, ushort)
INSTANTIATE("write_cache_uint32", write_cache, uint)

} // namespace pyengine
