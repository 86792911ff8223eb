// filter_logits: checks and primitive; the filter is in filter_logits_cpu.cpp.

#include "filter_logits.h"

#include <nanobind/stl/pair.h>

#include <algorithm>
#include <memory>

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

} // namespace

std::pair<mx::array, mx::array> filter_logits(
    const mx::array& logits,
    float temperature,
    int top_k,
    float top_p,
    float min_p) {
  check_dtype(op, "logits", logits, mx::float32, "be float32");
  check(
      logits.ndim() == 2 && logits.shape(1) > 0,
      op,
      "logits",
      "have shape [T, V]",
      logits.shape());
  check(temperature > 0, op, "temperature", "be positive", temperature);
  check(
      top_k >= 1 && top_k <= max_candidates, op, "top_k", "be 1 to 256", top_k);
  check(
      top_p > 0 && top_p <= 1, op, "top_p", "be above 0 and at most 1", top_p);
  check(
      min_p >= 0 && min_p < 1, op, "min_p", "be 0 or more and below 1", min_p);
  mx::Shape shape = {logits.shape(0), std::min(top_k, logits.shape(1))};
  auto outputs = mx::array::make_arrays(
      {shape, shape},
      {mx::int32, mx::float32},
      std::make_shared<FilterLogits>(
          mx::to_stream({}), temperature, top_p, min_p),
      {logits});
  return {outputs[0], outputs[1]};
}

void FilterLogits::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& logits = inputs[0];
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(logits);
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    encoder.set_output_array(out);
  }
  FilterLogitsArgs args = {
      nullptr,
      outputs[0].data<int32_t>(),
      outputs[1].data<float>(),
      logits.shape(1),
      outputs[0].shape(1),
      temperature_,
      top_p_,
      min_p_};
  encoder.dispatch([packed = Packed(logits),
                    rows = int64_t(logits.shape(0)),
                    args]() mutable {
    args.logits = static_cast<const float*>(packed.get());
    split_rows(rows, args.V, [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(filter_logits_rows)(args, begin, end);
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
      nb::arg("min_p"));
}

} // namespace pyengine
