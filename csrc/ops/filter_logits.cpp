// filter_logits: checks and primitive; the filter is in filter_logits_cpu.cpp.

#include "ops/filter_logits.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "filter_inputs.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/filter_logits_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "filter_logits";

// The tiles of metal/filter_logits.metal and metal/merge_candidates.metal.
constexpr int slice_size = 4096;
constexpr int thread_items = 16;
static_assert(thread_items * 1024 == max_merged); // threads of a threadgroup

} // namespace

bool filter_logits_has_launch(int V, int count) {
  int64_t slices = (int64_t(V) + slice_size - 1) / slice_size;
  return count <= max_candidates && slices * count <= max_merged;
}

Launch merge_candidates_launch(
    int T,
    int slices,
    int count,
    float top_p,
    float min_p) {
  using Role = Buffer::Role;
  int simdgroup_items = 32 * thread_items;
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

std::vector<Launch> filter_logits_launches(
    int T,
    int V,
    int count,
    std::optional<int> edits,
    float temperature,
    float top_p,
    float min_p,
    bool aligned) {
  using Role = Buffer::Role;
  int slices = (V + slice_size - 1) / slice_size;
  Launch launch;
  launch.library = op;
  launch.kernel = op;
  launch.constants = {{0, edits.has_value()}, {1, aligned}};
  launch.grid = {slices, T, 1};
  launch.threadgroup = {slice_size / thread_items, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "logits", {T, V}, mx::float32, aligned ? 16 : 1),
      Buffer::array(Role::out, "candidates", {T, slices, count}, mx::uint64),
      Buffer::array(Role::out, "slice_flags", {T, slices}, mx::uint32),
      Buffer::scalar("V", uint32_t(V)),
      Buffer::scalar("count", uint32_t(count)),
      Buffer::scalar("temperature", temperature)};
  if (edits) {
    launch.buffers.insert(
        launch.buffers.end(),
        {Buffer::array(Role::in, "edit_ids", {*edits}, mx::int32),
         Buffer::array(Role::in, "factors", {T, *edits}, mx::float32),
         Buffer::array(Role::in, "deltas", {T, *edits}, mx::float32),
         Buffer::scalar("L", uint32_t(*edits))});
  }
  launch.threadgroup_memory = {{0, edits ? slice_size * 4 : 16}};
  return {launch, merge_candidates_launch(T, slices, count, top_p, min_p)};
}

std::tuple<mx::array, mx::array, mx::array> filter_logits(
    const mx::array& logits,
    float temperature,
    Integer top_k,
    float top_p,
    float min_p,
    const std::optional<mx::array>& edit_ids,
    const std::optional<mx::array>& edit_factors,
    const std::optional<mx::array>& edit_deltas) {
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
  std::vector<mx::array> inputs = {logits};
  add_edits(op, rows, edit_ids, edit_factors, edit_deltas, inputs);
  if (temperature == 0) { // greedy: the one best candidate, as it stands
    temperature = 1;
    top_k = 1;
  }
  mx::Shape shape = {rows, top_k == 0 ? vocab : std::min<int>(top_k, vocab)};
  auto stream = mx::to_stream({});
  for (auto& input : inputs) {
    input = packed_on_gpu(input, stream);
  }
  auto outputs = mx::array::make_arrays(
      {shape, shape, {rows}},
      {mx::int32, mx::float32, mx::int32},
      std::make_shared<FilterLogits>(stream, temperature, top_p, min_p),
      inputs);
  return {outputs[0], outputs[1], outputs[2]};
}

void FilterLogits::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  int V = inputs[0].shape(1);
  FilterLogitsArgs args = {};
  args.filter = filter_args(outputs, V, temperature_, top_p_, min_p_);
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  for (auto& out : outputs) {
    encoder.set_output_array(out);
  }
  encoder.dispatch([logits = Packed(inputs[0]),
                    edits = PackedEdits(inputs, 1),
                    rows = int64_t(inputs[0].shape(0)),
                    args]() mutable {
    args.logits = static_cast<const float*>(logits.get());
    edits.get(args.filter);
    int V = args.filter.V;
    bool sorts = args.filter.count > max_candidates;
    split_rows(rows, V, [&](int64_t begin, int64_t end) {
      auto own = args;
      std::vector<SortKey> scratch(sorts ? 2 * size_t(V) : 0);
      own.scratch = scratch.data();
      PYENGINE_PICK_KERNEL(filter_logits_rows)(own, begin, end);
    });
  });
}

void FilterLogits::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& logits = inputs[0];
  int T = logits.shape(0), V = logits.shape(1), count = outputs[0].shape(1);
  if (!filter_logits_has_launch(V, count)) {
    throw std::runtime_error(
        "[filter_logits] has no Metal kernel without top_k or for that many "
        "logits; pyengine.ops.filter_logits runs plain MLX there.");
  }
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  if (T == 0) {
    return;
  }
  std::optional<int> edits;
  if (inputs.size() > 1 && inputs[1].size() > 0) {
    edits = inputs[1].shape(0);
  }
  bool aligned = V % 4 == 0 && logits.offset() % 16 == 0;
  auto launches = filter_logits_launches(
      T, V, count, edits, temperature_, top_p_, min_p_, aligned);
  run_on_gpu(launches, stream(), inputs, outputs);
}

void bind_filter_logits(nb::module_& m) {
  m.def(
      "filter_logits",
      &filter_logits,
      nb::arg("logits"),
      nb::arg("temperature"),
      nb::arg("top_k"),
      nb::arg("top_p"),
      nb::arg("min_p"),
      nb::arg("edit_ids").none() = nb::none(),
      nb::arg("edit_factors").none() = nb::none(),
      nb::arg("edit_deltas").none() = nb::none());
  m.def(
      "filter_logits_has_launch",
      &filter_logits_has_launch,
      nb::arg("V"),
      nb::arg("count"));
  m.def(
      "filter_logits_launches",
      &filter_logits_launches,
      nb::arg("T"),
      nb::arg("V"),
      nb::arg("count"),
      nb::arg("edits").none(),
      nb::arg("temperature"),
      nb::arg("top_p"),
      nb::arg("min_p"),
      nb::arg("aligned"));
  m.def(
      "merge_candidates_launch",
      &merge_candidates_launch,
      nb::arg("T"),
      nb::arg("slices"),
      nb::arg("count"),
      nb::arg("top_p"),
      nb::arg("min_p"));
}

} // namespace pyengine
