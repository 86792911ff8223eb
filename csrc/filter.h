#pragma once
// filter.h: what filter_logits and quantized_filter_logits take alike: settings
// and edits, their checks, how the kernels get them; and the launch that merges
// the candidates of slices of a row.

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/contiguous.h"
#include "launch.h"
#include "ops/filter_logits_cpu.h"

namespace pyengine {

inline void
check_filter(const char* op, float temperature, float top_p, float min_p) {
  check(temperature >= 0, op, "temperature", "be 0 or more", temperature);
  check(
      top_p > 0 && top_p <= 1, op, "top_p", "be above 0 and at most 1", top_p);
  check(
      min_p >= 0 && min_p < 1, op, "min_p", "be 0 or more and below 1", min_p);
}

// Checks the edits of `rows` rows and appends them, if any, to a node's inputs.
inline void add_edits(
    const char* op,
    int rows,
    const std::optional<mx::array>& ids, // [L]
    const std::optional<mx::array>& factors, // [rows, L]
    const std::optional<mx::array>& deltas, // [rows, L]
    Arrays& inputs) {
  if (!ids && !factors && !deltas) {
    return;
  }
  check(
      ids && factors && deltas,
      op,
      "edits",
      "be ids, factors and deltas together",
      "a part");
  check_dtype(op, "edit ids", *ids, mx::int32, "be int32");
  check(ids->ndim() == 1, op, "edit ids", "have shape [L]", ids->shape());
  check_dtype(op, "edit factors", *factors, mx::float32, "be float32");
  check_dtype(op, "edit deltas", *deltas, mx::float32, "be float32");
  mx::Shape shape = {rows, ids->shape(0)};
  check_shape(op, "edit factors", *factors, shape);
  check_shape(op, "edit deltas", *deltas, shape);
  if (ids->size() > 0) {
    auto edits = Arrays{*ids, *factors, *deltas};
    inputs.insert(inputs.end(), edits.begin(), edits.end());
  }
}

// ids, probabilities and flags, which have their memory.
inline FilterArgs filter_args(
    Arrays& outputs,
    int vocab,
    float temperature,
    float top_p,
    float min_p) {
  FilterArgs args = {};
  args.ids = outputs[0].data<int32_t>();
  args.probs = outputs[1].data<float>();
  args.flags = outputs[2].data<int32_t>();
  args.V = vocab;
  args.count = outputs[0].shape(1);
  args.temperature = temperature;
  args.top_p = top_p;
  args.min_p = min_p;
  return args;
}

// The edits of a call, whose inputs end with them or have none. Copies live as
// long as this object.
class ContiguousEdits {
 public:
  // `first`: index of the edits if there are any
  ContiguousEdits(const Arrays& inputs, size_t first) {
    for (size_t i = first; i < inputs.size(); ++i) {
      arrays_.emplace_back(inputs[i]);
    }
    count_ = arrays_.empty() ? 0 : inputs[first].shape(0);
  }

  // To be called inside the task.
  void get(FilterArgs& args) {
    args.edits = count_;
    if (count_) {
      args.edit_ids = arrays_[0].get<int32_t>();
      args.edit_factors = arrays_[1].get<float>();
      args.edit_deltas = arrays_[2].get<float>();
      sort(args.edit_ids);
      args.edit_order = order_.data();
    }
  }

 private:
  void sort(const int32_t* ids) {
    order_.resize(count_);
    std::iota(order_.begin(), order_.end(), 0);
    auto lower = [&](int32_t a, int32_t b) { return ids[a] < ids[b]; };
    // Lists come sorted but for the block's own drafts at the end
    auto sorted = std::is_sorted_until(order_.begin(), order_.end(), lower);
    std::sort(sorted, order_.end(), lower);
    std::inplace_merge(order_.begin(), sorted, order_.end(), lower);
  }

  std::vector<Contiguous> arrays_;
  int count_;
  std::vector<int32_t> order_; // positions in ids, lowest id first
};

// The tiles of metal/filter_logits.metal and metal/merge_candidates.metal.
constexpr int filter_thread_items = 16;
constexpr int max_merged = 16384; // of a row
constexpr int merge_threads = 512;

// The buffers of L edits of T rows.
inline void add_edits(Launch& launch, int T, int L) {
  launch.buffers.insert(
      launch.buffers.end(),
      {Buffer::array(Role::in, "edit_ids", {L}, mx::int32),
       Buffer::array(Role::in, "factors", {T, L}, mx::float32),
       Buffer::array(Role::in, "deltas", {T, L}, mx::float32),
       Buffer::scalar("L", uint32_t(L))});
}

// Candidates uint64 [T, slices, count] and flags uint32 [T, slices], as
// metal/filter.h has them; slices * count at most max_merged.
inline Launch merge_candidates_launch(
    int T,
    int slices,
    int count,
    float top_p,
    float min_p) {
  // No more threads than entries
  int threads = std::min((slices * count + 31) / 32 * 32, merge_threads);
  Launch launch(
      "merge_candidates", "merge_candidates", {T, 1, 1}, {threads, 1, 1});
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
