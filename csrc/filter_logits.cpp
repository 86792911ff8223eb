// filter_logits: checks and primitive; the filter is in filter_logits_cpu.cpp.

#include "filter_logits.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "filter_inputs.h"
#include "filter_logits_cpu.h"
#include "isa.h"
#include "mlx/backend/cpu/encoder.h"
#include "packed.h"
#include "split.h"

namespace pyengine {

namespace {

constexpr const char* op = "filter_logits";

} // namespace

std::tuple<mx::array, mx::array, mx::array> filter_logits(
    const mx::array& logits,
    float temperature,
    int top_k,
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
  mx::Shape shape = {rows, top_k ? std::min(top_k, vocab) : vocab};
  auto outputs = mx::array::make_arrays(
      {shape, shape, {rows}},
      {mx::int32, mx::float32, mx::int32},
      std::make_shared<FilterLogits>(
          mx::to_stream({}), temperature, top_p, min_p),
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
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  throw std::runtime_error(
      "[filter_logits] has no Metal kernel yet; "
      "pyengine.ops.filter_logits runs plain MLX on a GPU.");
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
}

} // namespace pyengine
