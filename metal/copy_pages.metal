// copy_pages: whole pages of keys or values within an arena.
//
// One thread per 16 bytes, whatever the dtype: 64 places of any of them are a
// multiple of that. A row of threadgroups copies one page, which no other
// writes and, as the op's rule is, none reads. Pairs with a page that is none
// of the P are left out.
//
// Only a fork has use for it: rows are written by prepare_qkv.
#include "common.h"
#include "positions.h"

namespace pyengine {

[[host_name(
    "copy_pages")]] [[kernel, max_total_threads_per_threadgroup(256)]] void
copy_pages(
    const device int* sources [[buffer(0)]], // [n]
    const device int* targets [[buffer(1)]], // [n]
    device uint4* arena [[buffer(2)]], // [P, words]
    constant uint& P [[buffer(3)]],
    constant uint& words [[buffer(4)]], // of a page
    uint2 at [[thread_position_in_grid]]) {
  int source = sources[at.y], target = targets[at.y];
  bool known = is_page(source, P) && is_page(target, P);
  if (at.x < words && known && source != target) {
    arena[ulong(target) * words + at.x] = arena[ulong(source) * words + at.x];
  }
}

} // namespace pyengine
