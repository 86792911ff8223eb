#pragma once
// filter.h: what filter_logits and quantized_filter_logits take alike: settings
// of several sequences, a mask and edits, their checks, how the kernels get
// them; and the launch that merges the candidates of slices of a row.

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/integer.h"
#include "launch.h"
#include "ops/filter_logits_cpu.h"

namespace pyengine {

// Settings of Q sequences as arrays, and which of them each row belongs to.
struct FilterSettings {
  mx::array temperature; // float32 [Q]
  mx::array top_k; // int32 [Q]
  mx::array top_p; // float32 [Q]
  mx::array min_p; // float32 [Q]
  mx::array owner; // int32 [R]
};

// Checks the values that the host knows.
template <typename T, typename Rule>
void check_values(
    const char* op,
    const char* what,
    const mx::array& a,
    const Rule& rule,
    const std::string& text) {
  if (!a.is_available() || !a.flags().row_contiguous) {
    return;
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (T value = a.data<T>()[i]; !rule(value)) [[unlikely]] {
      fail(op, what, text, value);
    }
  }
}

// `width`: the largest top_k, 0: all.
inline void check_filter(
    const char* op,
    int rows,
    const FilterSettings& s,
    int least_width,
    Integer width) {
  check(
      width >= least_width && width <= max_candidates,
      op,
      "top_k",
      least_width == 0 ? "be 0 (off) to 256" : "be 1 to 256",
      width);
  check(
      s.temperature.ndim() == 1 && s.temperature.size() > 0,
      op,
      "temperature",
      "have shape [Q]",
      s.temperature.shape());
  mx::Shape shape = s.temperature.shape();
  check_array(op, "temperature", s.temperature, mx::float32, shape);
  check_array(op, "top_k", s.top_k, mx::int32, shape);
  check_array(op, "top_p", s.top_p, mx::float32, shape);
  check_array(op, "min_p", s.min_p, mx::float32, shape);
  check_array(op, "owner", s.owner, mx::int32, {rows});
  int least = width == 0 ? 0 : 1;
  int most = width == 0 ? max_candidates : int(width);
  int Q = shape[0];
  check_values<float>(
      op,
      "temperature",
      s.temperature,
      [](float t) { return t > 0; },
      "be above 0");
  check_values<int32_t>(
      op,
      "top_k",
      s.top_k,
      [=](int k) { return k >= least && k <= most; },
      "be " + std::to_string(least) + " to " + std::to_string(most));
  check_values<float>(
      op,
      "top_p",
      s.top_p,
      [](float p) { return p > 0 && p <= 1; },
      "be above 0 and at most 1");
  check_values<float>(
      op,
      "min_p",
      s.min_p,
      [](float p) { return p >= 0 && p < 1; },
      "be 0 or more and below 1");
  check_values<int32_t>(
      op,
      "owner",
      s.owner,
      [=](int q) { return q >= 0 && q < Q; },
      "be 0 to " + std::to_string(Q - 1));
}

// Checks the edits of R rows of Q sequences; none where there is nothing to
// edit.
inline Arrays checked_edits(
    const char* op,
    int R,
    int Q,
    const std::optional<mx::array>& ids, // [Q, L]
    const std::optional<mx::array>& factors, // [R, L]
    const std::optional<mx::array>& deltas) { // [R, L]
  if (!ids && !factors && !deltas) {
    return {};
  }
  check(
      ids && factors && deltas,
      op,
      "edits",
      "be ids, factors and deltas together",
      "a part");
  check_dtype(op, "edit ids", *ids, mx::int32, "be int32");
  check(
      ids->ndim() == 2 && ids->shape(0) == Q,
      op,
      "edit ids",
      "have shape [Q, L]",
      ids->shape());
  check_dtype(op, "edit factors", *factors, mx::float32, "be float32");
  check_dtype(op, "edit deltas", *deltas, mx::float32, "be float32");
  mx::Shape shape = {R, ids->shape(1)};
  check_shape(op, "edit factors", *factors, shape);
  check_shape(op, "edit deltas", *deltas, shape);
  return ids->size() > 0 ? Arrays{*ids, *factors, *deltas} : Arrays{};
}

// Checks the mask of R rows; none where every token stays.
inline Arrays checked_mask(
    const char* op,
    int R,
    int V,
    const std::optional<mx::array>& mask) { // [R, ceil(V / 32)]
  if (!mask) {
    return {};
  }
  check_array(op, "mask", *mask, mx::uint32, {R, mask_words(V)});
  return {*mask};
}

// Appends them to a node's inputs, in the order in which two launches name
// them: the second knows nothing of a mask and edits.
inline void add_filter(
    const FilterSettings& s,
    const Arrays& mask,
    const Arrays& edits,
    Arrays& inputs) {
  inputs.insert(inputs.end(), {s.owner, s.temperature});
  inputs.insert(inputs.end(), mask.begin(), mask.end());
  inputs.insert(inputs.end(), edits.begin(), edits.end());
  inputs.insert(inputs.end(), {s.top_k, s.top_p, s.min_p});
}

// Where the inputs of a filter stand in a node's; its settings begin with
// input `first`.
struct FilterInputs {
  FilterInputs(const Arrays& inputs, size_t first)
      : owner(first),
        temperature(first + 1),
        top_k(inputs.size() - 3) {
    size_t more = top_k - (first + 2); // the mask is one, edits are three
    masked = more % 3 == 1;
    edited = more >= 3;
    mask = first + 2;
    edits = mask + masked;
  }

  size_t owner;
  size_t temperature;
  size_t top_k; // then top_p and min_p
  bool masked;
  bool edited;
  size_t mask;
  size_t edits;
};

// What a filter is told besides its logits: settings, mask and edits, which end
// the inputs of a node, and its results. Copies live as long as this object.
class FilterState {
 public:
  // `first`: index of the settings
  FilterState(const Arrays& inputs, size_t first, int vocab, Arrays& outputs)
      : at_(inputs, first),
        first_(first) {
    for (size_t i = first; i < inputs.size(); ++i) {
      arrays_.emplace_back(inputs[i]);
    }
    args_.ids = outputs[0].data<int32_t>();
    args_.probs = outputs[1].data<float>();
    args_.flags = outputs[2].data<int32_t>();
    args_.V = vocab;
    args_.n = outputs[0].shape(1);
    args_.Q = inputs[at_.temperature].shape(0);
    args_.words = mask_words(vocab);
    args_.edits = at_.edited ? inputs[at_.edits].shape(1) : 0;
  }

  int n() const {
    return args_.n;
  }

  // To be called inside the task.
  FilterArgs get() {
    args_.owner = get<int32_t>(at_.owner);
    args_.temperature = get<float>(at_.temperature);
    args_.top_k = get<int32_t>(at_.top_k);
    args_.top_p = get<float>(at_.top_k + 1);
    args_.min_p = get<float>(at_.top_k + 2);
    args_.mask = at_.masked ? get<uint32_t>(at_.mask) : nullptr;
    if (args_.edits) {
      args_.edit_ids = get<int32_t>(at_.edits);
      args_.edit_factors = get<float>(at_.edits + 1);
      args_.edit_deltas = get<float>(at_.edits + 2);
      order_.resize(size_t(args_.Q) * args_.edits);
      for (int q = 0; q < args_.Q; ++q) {
        size_t at = size_t(q) * args_.edits;
        sort(args_.edit_ids + at, order_.data() + at, args_.edits);
      }
      args_.edit_order = order_.data();
    }
    return args_;
  }

 private:
  static void sort(const int32_t* ids, int32_t* begin, int count) {
    int32_t* end = begin + count;
    std::iota(begin, end, 0);
    auto lower = [&](int32_t a, int32_t b) { return ids[a] < ids[b]; };
    // Lists come sorted but for the block's own drafts at the end
    auto sorted = std::is_sorted_until(begin, end, lower);
    std::sort(sorted, end, lower);
    std::inplace_merge(begin, sorted, end, lower);
  }

  template <typename T>
  const T* get(size_t input) {
    return arrays_[input - first_].get<T>();
  }

  FilterInputs at_;
  size_t first_;
  std::vector<Contiguous> arrays_; // the node's inputs from `first` on
  std::vector<int32_t> order_; // [Q, L], positions in ids, lowest id first
  FilterArgs args_ = {};
};

// The tiles of metal/filter_logits.metal and metal/merge_candidates.metal.
constexpr int filter_thread_items = 16;
constexpr int max_merged = 16384; // of a row
constexpr int merge_threads = 512;

// What the first launch is told of R rows: their owners, the temperatures of
// these, the mask, edits.
inline void
add_rows(Launch& launch, const Arrays& in, const FilterInputs& at, int V) {
  int R = in[at.owner].shape(0), Q = in[at.temperature].shape(0);
  launch.buffers.push_back(Buffer::array(Role::in, "owner", {R}, mx::int32));
  launch.buffers.push_back(
      Buffer::array(Role::in, "temperature", {Q}, mx::float32));
  if (at.masked) {
    launch.buffers.push_back(
        Buffer::array(Role::in, "mask", {R, mask_words(V)}, mx::uint32));
  } else if (at.edited) {
    // Keeps the place of what the kernel then does not take
    launch.buffers.push_back(Buffer::scalar("no_mask", uint32_t(0)));
  }
  if (!at.edited) {
    return;
  }
  int L = in[at.edits].shape(1);
  launch.buffers.insert(
      launch.buffers.end(),
      {Buffer::array(Role::in, "edit_ids", {Q, L}, mx::int32),
       Buffer::array(Role::in, "factors", {R, L}, mx::float32),
       Buffer::array(Role::in, "deltas", {R, L}, mx::float32),
       Buffer::scalar("L", uint32_t(L))});
}

// Candidates uint64 [R, slices, n] and flags uint32 [R, slices], as
// metal/filter.h has them; slices * n at most max_merged.
inline Launch merge_candidates_launch(int R, int Q, int slices, int n) {
  // No more threads than entries
  int threads = std::min((slices * n + 31) / 32 * 32, merge_threads);
  Launch launch(
      "merge_candidates", "merge_candidates", {R, 1, 1}, {threads, 1, 1});
  launch.buffers = {
      Buffer::array(Role::in, "candidates", {R, slices, n}, mx::uint64),
      Buffer::array(Role::in, "slice_flags", {R, slices}, mx::uint32),
      Buffer::array(Role::in, "owner", {R}, mx::int32),
      Buffer::array(Role::in, "top_k", {Q}, mx::int32),
      Buffer::array(Role::in, "top_p", {Q}, mx::float32),
      Buffer::array(Role::in, "min_p", {Q}, mx::float32),
      Buffer::array(Role::out, "ids", {R, n}, mx::int32),
      Buffer::array(Role::out, "probs", {R, n}, mx::float32),
      Buffer::array(Role::out, "flags", {R}, mx::int32),
      Buffer::scalar("slices", uint32_t(slices)),
      Buffer::scalar("n", uint32_t(n)),
      Buffer::scalar("Q", uint32_t(Q))};
  return launch;
}

} // namespace pyengine
