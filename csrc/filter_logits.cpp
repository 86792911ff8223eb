// filter_logits: checks and primitive; the filter is in filter_logits_cpu.cpp.

#include "filter_logits.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "filter_logits_cpu.h"
#include "isa.h"
#include "mlx/backend/cpu/encoder.h"
#include "packed.h"
#include "split.h"

namespace pyengine {

namespace {

constexpr const char* op = "filter_logits";

// Positions in a list of ids, lowest id first.
std::vector<int32_t> by_id(const int32_t* ids, int count) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  auto lower = [&](int32_t a, int32_t b) { return ids[a] < ids[b]; };
  // Lists come sorted but for the block's own drafts at the end
  auto sorted = std::is_sorted_until(order.begin(), order.end(), lower);
  std::sort(sorted, order.end(), lower);
  std::inplace_merge(order.begin(), sorted, order.end(), lower);
  return order;
}

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
  check(temperature >= 0, op, "temperature", "be 0 or more", temperature);
  check(
      top_k >= 0 && top_k <= max_candidates,
      op,
      "top_k",
      "be 0 (off) to 256",
      top_k);
  check(
      top_p > 0 && top_p <= 1, op, "top_p", "be above 0 and at most 1", top_p);
  check(
      min_p >= 0 && min_p < 1, op, "min_p", "be 0 or more and below 1", min_p);
  std::vector<mx::array> inputs = {logits};
  if (edit_ids || edit_factors || edit_deltas) {
    check(
        edit_ids && edit_factors && edit_deltas,
        op,
        "edits",
        "be ids, factors and deltas together",
        "a part");
    check_dtype(op, "edit ids", *edit_ids, mx::int32, "be int32");
    check(
        edit_ids->ndim() == 1,
        op,
        "edit ids",
        "have shape [L]",
        edit_ids->shape());
    check_dtype(op, "edit factors", *edit_factors, mx::float32, "be float32");
    check_dtype(op, "edit deltas", *edit_deltas, mx::float32, "be float32");
    mx::Shape shape = {rows, edit_ids->shape(0)};
    check_shape(op, "edit factors", *edit_factors, shape);
    check_shape(op, "edit deltas", *edit_deltas, shape);
    inputs.insert(inputs.end(), {*edit_ids, *edit_factors, *edit_deltas});
  }
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
  auto& encoder = mx::cpu::get_command_encoder(stream());
  std::vector<Packed> packed;
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
    packed.emplace_back(input);
  }
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    encoder.set_output_array(out);
  }
  FilterLogitsArgs args = {};
  args.ids = outputs[0].data<int32_t>();
  args.probs = outputs[1].data<float>();
  args.flags = outputs[2].data<int32_t>();
  args.V = inputs[0].shape(1);
  args.count = outputs[0].shape(1);
  args.edits = inputs.size() > 1 ? inputs[1].shape(0) : 0;
  args.temperature = temperature_;
  args.top_p = top_p_;
  args.min_p = min_p_;
  encoder.dispatch([packed = std::move(packed),
                    rows = int64_t(inputs[0].shape(0)),
                    args]() mutable {
    args.logits = static_cast<const float*>(packed[0].get());
    std::vector<int32_t> order;
    if (args.edits) {
      args.edit_ids = static_cast<const int32_t*>(packed[1].get());
      args.edit_factors = static_cast<const float*>(packed[2].get());
      args.edit_deltas = static_cast<const float*>(packed[3].get());
      order = by_id(args.edit_ids, args.edits);
      args.edit_order = order.data();
    }
    bool sorts = args.count > max_candidates;
    split_rows(rows, args.V, [&](int64_t begin, int64_t end) {
      auto own = args;
      std::vector<SortKey> scratch(sorts ? 2 * size_t(args.V) : 0);
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
