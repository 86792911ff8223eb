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

// Inputs: logits, then edit ids, factors and deltas where there are any.
struct FilterLogits {
  static constexpr const char* op = "filter_logits";
  float temperature;
  float top_p;
  float min_p;
  bool operator==(const FilterLogits&) const = default;

  // Two: the candidates of slices of logits, which are merged.
  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int T = in[0].shape(0), V = in[0].shape(1), count = out[0].shape(1);
    int slices = (V - 1) / slice_size + 1;
    if (count > max_candidates || slices * count > max_merged) {
      return {};
    }
    bool edited = in.size() > 1;
    // Every row of logits starts on 16 bytes
    bool aligned = V % 4 == 0 && in[0].offset() % 16 == 0;
    Launch launch(
        op, op, {slices, T, 1}, {slice_size / filter_thread_items, 1, 1});
    launch.constants = {{0, edited}, {1, aligned}};
    launch.buffers = {
        Buffer::array(
            Role::in, "logits", {T, V}, mx::float32, aligned ? 16 : 1),
        Buffer::array(Role::out, "candidates", {T, slices, count}, mx::uint64),
        Buffer::array(Role::out, "slice_flags", {T, slices}, mx::uint32),
        Buffer::scalar("V", uint32_t(V)),
        Buffer::scalar("count", uint32_t(count)),
        Buffer::scalar("temperature", temperature)};
    if (edited) {
      add_edits(launch, T, in[1].shape(0));
    }
    launch.threadgroup_memory = {{0, edited ? slice_size * 4 : 16}};
    return {launch, merge_candidates_launch(T, slices, count, top_p, min_p)};
  }

  auto task(const Arrays& in, Arrays& out) const {
    FilterLogitsArgs args = {};
    args.filter = filter_args(out, in[0].shape(1), temperature, top_p, min_p);
    return [logits = Contiguous(in[0]),
            edits = ContiguousEdits(in, 1),
            rows = int64_t(in[0].shape(0)),
            args]() mutable {
      args.logits = logits.get<float>();
      edits.get(args.filter);
      int V = args.filter.V;
      bool sorts = args.filter.count > max_candidates;
      split_rows(rows, V, [&](int64_t begin, int64_t end) {
        auto with_scratch = args;
        std::vector<SortKey> scratch(sorts ? 2 * size_t(V) : 0);
        with_scratch.scratch = scratch.data();
        PYENGINE_PICK_KERNEL(filter_logits_rows)(with_scratch, begin, end);
      });
    };
  }
};

// ids int32 [T, n], probabilities float32 [T, n] and flags int32 [T]; n is
// min(top_k, V), V for top_k 0, 1 for temperature 0.
Arrays filter_logits(
    const mx::array& logits, // [T, V]
    float temperature,
    Integer top_k,
    float top_p,
    float min_p,
    const std::optional<mx::array>& edit_ids, // [L]
    const std::optional<mx::array>& edit_factors, // [T, L]
    const std::optional<mx::array>& edit_deltas) { // [T, L]
  constexpr auto op = FilterLogits::op;
  check_dtype(op, "logits", logits, mx::float32, "be float32");
  check(
      logits.ndim() == 2 && logits.shape(1) > 0,
      op,
      "logits",
      "have shape [T, V]",
      logits.shape());
  int rows = logits.shape(0);
  int vocab = logits.shape(1);
  check(
      top_k >= 0 && top_k <= max_candidates,
      op,
      "top_k",
      "be 0 (off) to 256",
      top_k);
  check_filter(op, temperature, top_p, min_p);
  Arrays inputs = {logits};
  add_edits(op, rows, edit_ids, edit_factors, edit_deltas, inputs);
  if (temperature == 0) { // greedy: the one best candidate, as it stands
    temperature = 1;
    top_k = 1;
  }
  mx::Shape shape = {rows, top_k == 0 ? vocab : std::min<int>(top_k, vocab)};
  return lazy_results(
      FilterLogits{temperature, top_p, min_p},
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
      "edit_ids"_a.none() = nb::none(),
      "edit_factors"_a.none() = nb::none(),
      "edit_deltas"_a.none() = nb::none());
}

} // namespace pyengine
