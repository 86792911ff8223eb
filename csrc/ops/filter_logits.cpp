// filter_logits: a row of logits to the candidates that are sampled from. The
// filter is in filter_logits_cpu.cpp.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/integer.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "filter.h"
#include "op.h"
#include "ops/filter_logits_cpu.h"

namespace pyengine {

namespace {

// The tiles of metal/filter_logits.metal.
constexpr int slice_size = 4096;

// Inputs: logits, then settings, mask and edits (add_filter).
struct FilterLogits {
  static constexpr const char* op = "filter_logits";
  bool operator==(const FilterLogits&) const = default;

  // Two: the candidates of slices of logits, which are merged.
  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int R = in[0].shape(0), V = in[0].shape(1), n = out[0].shape(1);
    FilterInputs at(in, 1);
    int Q = in[at.temperature].shape(0), slices = (V - 1) / slice_size + 1;
    if (n > max_candidates || slices * n > max_merged) {
      return {};
    }
    // Every row of logits starts on 16 bytes
    bool aligned = V % 4 == 0 && in[0].offset() % 16 == 0;
    Launch launch(
        op, op, {slices, R, 1}, {slice_size / filter_thread_items, 1, 1});
    launch.constants = {{0, at.edited}, {1, aligned}, {2, at.masked}};
    launch.buffers = {
        Buffer::array(
            Role::in, "logits", {R, V}, mx::float32, aligned ? 16 : 1),
        Buffer::array(Role::out, "candidates", {R, slices, n}, mx::uint64),
        Buffer::array(Role::out, "slice_flags", {R, slices}, mx::uint32),
        Buffer::scalar("V", uint32_t(V)),
        Buffer::scalar("n", uint32_t(n)),
        Buffer::scalar("Q", uint32_t(Q))};
    add_rows(launch, in, at, V);
    launch.threadgroup_memory = {{0, at.edited ? slice_size * 4 : 16}};
    return {launch, merge_candidates_launch(R, Q, slices, n)};
  }

  auto task(const Arrays& in, Arrays& out) const {
    return [logits = Contiguous(in[0]),
            state = FilterState(in, 1, in[0].shape(1), out),
            rows = int64_t(in[0].shape(0)),
            V = in[0].shape(1)]() mutable {
      FilterLogitsArgs args = {state.get(), logits.get<float>(), nullptr};
      bool sorts = args.filter.n > max_candidates;
      split_rows(rows, V, [&](int64_t begin, int64_t end) {
        auto with_scratch = args;
        std::vector<SortKey> scratch(sorts ? 2 * size_t(V) : 0);
        with_scratch.scratch = scratch.data();
        PYENGINE_PICK_KERNEL(filter_logits_rows)(with_scratch, begin, end);
      });
    };
  }
};

// ids int32 [R, n], probabilities float32 [R, n] and flags int32 [R]; n is
// min(width, V), V for width 0.
Arrays filter_logits(
    const mx::array& logits, // [R, V]
    const mx::array& temperature, // [Q]
    const mx::array& top_k, // [Q]
    const mx::array& top_p, // [Q]
    const mx::array& min_p, // [Q]
    const mx::array& owner, // [R]
    Integer width,
    const std::optional<mx::array>& mask, // [R, ceil(V / 32)]
    const std::optional<mx::array>& edit_ids, // [Q, L]
    const std::optional<mx::array>& edit_factors, // [R, L]
    const std::optional<mx::array>& edit_deltas) { // [R, L]
  constexpr auto op = FilterLogits::op;
  check_dtype(op, "logits", logits, mx::float32, "be float32");
  check(
      logits.ndim() == 2 && logits.shape(1) > 0,
      op,
      "logits",
      "have shape [R, V]",
      logits.shape());
  int rows = logits.shape(0), vocab = logits.shape(1);
  FilterSettings settings = {temperature, top_k, top_p, min_p, owner};
  check_filter(op, rows, settings, 0, width);
  int Q = temperature.shape(0);
  auto edits = checked_edits(op, rows, Q, edit_ids, edit_factors, edit_deltas);
  Arrays inputs = {logits};
  add_filter(settings, checked_mask(op, rows, vocab, mask), edits, inputs);
  mx::Shape shape = {rows, width == 0 ? vocab : std::min<int>(width, vocab)};
  return lazy_results(
      FilterLogits{},
      {shape, shape, {rows}},
      {mx::int32, mx::float32, mx::int32},
      inputs);
}

} // namespace

void bind_filter_logits(nb::module_& m) {
  m.def(
      "filter_logits",
      &filter_logits,
      "logits"_a,
      "temperature"_a,
      "top_k"_a,
      "top_p"_a,
      "min_p"_a,
      "owner"_a,
      "width"_a,
      "mask"_a.none() = nb::none(),
      "edit_ids"_a.none() = nb::none(),
      "edit_factors"_a.none() = nb::none(),
      "edit_deltas"_a.none() = nb::none());
}

} // namespace pyengine
