#pragma once
// filter_launch.h: the second launch of filter_logits and
// quantized_filter_logits, which merges the candidates of slices of a row.

#include "launch.h"

namespace pyengine {

// The tiles of metal/filter_logits.metal and metal/merge_candidates.metal.
constexpr int filter_thread_items = 16;
constexpr int max_merged = filter_thread_items * 1024; // of a threadgroup

// Candidates uint64 [T, slices, count] and flags uint32 [T, slices], as
// metal/filter.h has them; slices * count at most max_merged.
inline Launch merge_candidates_launch(
    int T,
    int slices,
    int count,
    float top_p,
    float min_p) {
  using Role = Buffer::Role;
  int simdgroup_items = 32 * filter_thread_items;
  int simds = (slices * count + simdgroup_items - 1) / simdgroup_items;
  Launch launch;
  launch.library = "merge_candidates";
  launch.kernel = "merge_candidates";
  launch.grid = {T, 1, 1};
  launch.threadgroup = {32 * simds, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "candidates", {T, slices, count}, mx::uint64),
      Buffer::array(Role::in, "slice_flags", {T, slices}, mx::uint32),
      Buffer::array(Role::out, "ids", {T, count}, mx::int32),
      Buffer::array(Role::out, "probs", {T, count}, mx::float32),
      Buffer::array(Role::out, "flags", {T}, mx::int32),
      Buffer::scalar("slices", uint32_t(slices)),
      Buffer::scalar("count", uint32_t(count)),
      Buffer::scalar("top_p", top_p),
      Buffer::scalar("min_p", min_p)};
  return launch;
}

} // namespace pyengine
