#pragma once
// filter_inputs.h: what filter_logits and quantized_filter_logits take alike:
// settings and edits, their checks, and how the processor kernels get them.

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/contiguous.h"
#include "mlx/mlx.h"
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
    std::vector<mx::array>& inputs) {
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
    inputs.insert(inputs.end(), {*ids, *factors, *deltas});
  }
}

// ids, probabilities and flags, which have their memory.
inline FilterArgs filter_args(
    std::vector<mx::array>& outputs,
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
  ContiguousEdits(const std::vector<mx::array>& inputs, size_t first) {
    for (size_t i = first; i < inputs.size(); ++i) {
      arrays_.emplace_back(inputs[i]);
    }
    count_ = arrays_.empty() ? 0 : inputs[first].shape(0);
  }

  // To be called inside the task.
  void get(FilterArgs& args) {
    args.edits = count_;
    if (count_) {
      args.edit_ids = static_cast<const int32_t*>(arrays_[0].get());
      args.edit_factors = static_cast<const float*>(arrays_[1].get());
      args.edit_deltas = static_cast<const float*>(arrays_[2].get());
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

} // namespace pyengine
