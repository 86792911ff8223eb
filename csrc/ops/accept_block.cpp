// accept_block: checks and primitive; the rules are in accept_block_cpu.cpp.

#include "ops/accept_block.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/accept_block_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "accept_block";

constexpr const char* rule_names[] = {"residual", "block", "coupled"};

Rule rule_of(const std::string& name) {
  auto found = std::find(std::begin(rule_names), std::end(rule_names), name);
  check(
      found != std::end(rule_names),
      op,
      "rule",
      "be residual, block or coupled",
      name);
  return Rule(found - std::begin(rule_names));
}

void check_rows(
    const char* ids_name,
    const mx::array& ids,
    const char* probs_name,
    const mx::array& probs,
    const char* shape) {
  check_dtype(op, ids_name, ids, mx::int32, "be int32");
  check(ids.ndim() == 2 && ids.size() > 0, op, ids_name, shape, ids.shape());
  check_dtype(op, probs_name, probs, mx::float32, "be float32");
  check_shape(op, probs_name, probs, ids.shape());
}

} // namespace

bool accept_block_has_launch(int k, int n, int m) {
  return k <= 128 && std::max(n, m) <= max_scanned;
}

Launch accept_block_launch(int k, int n, int m, Rule rule, int vocab) {
  using Role = Buffer::Role;
  Launch launch;
  launch.library = op;
  launch.kernel = std::string(op) + "_" + rule_names[int(rule)];
  launch.grid = {1, 1, 1};
  launch.threadgroup = {32 * std::min(k + 1, 32), 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "p_ids", {k + 1, n}, mx::int32),
      Buffer::array(Role::in, "p_probs", {k + 1, n}, mx::float32),
      Buffer::array(Role::in, "q_ids", {k, m}, mx::int32),
      Buffer::array(Role::in, "q_probs", {k, m}, mx::float32),
      Buffer::array(Role::in, "drafts", {k}, mx::int32),
      Buffer::array(Role::in, "position", {}, mx::int32),
      Buffer::array(Role::in, "seed", {}, mx::uint32),
      Buffer::array(Role::out, "accepted", {}, mx::int32),
      Buffer::array(Role::out, "next", {1}, mx::int32),
      Buffer::scalar("k", uint32_t(k)),
      Buffer::scalar("n", uint32_t(n)),
      Buffer::scalar("m", uint32_t(m)),
      Buffer::scalar("vocab", uint32_t(vocab)),
      Buffer::scalar("minus_zero", -0.0f)};
  return launch;
}

std::pair<mx::array, mx::array> accept_block(
    const mx::array& p_ids,
    const mx::array& p_probs,
    const mx::array& q_ids,
    const mx::array& q_probs,
    const mx::array& drafts,
    const mx::array& position,
    const mx::array& seed,
    const std::string& rule,
    Integer vocab) {
  check_rows("q_ids", q_ids, "q_probs", q_probs, "have shape [k, m]");
  check_rows("p_ids", p_ids, "p_probs", p_probs, "have shape [k + 1, n]");
  int k = q_ids.shape(0);
  check_shape(op, "p_ids", p_ids, {k + 1, p_ids.shape(1)});
  check_dtype(op, "drafts", drafts, mx::int32, "be int32");
  check_shape(op, "drafts", drafts, {k});
  check_dtype(op, "position", position, mx::int32, "be int32");
  check_shape(op, "position", position, {});
  check_dtype(op, "seed", seed, mx::uint32, "be uint32");
  check_shape(op, "seed", seed, {});
  check(
      vocab > 0 && vocab <= max_vocab,
      op,
      "vocab",
      "be positive and at most 2097152",
      vocab);
  auto stream = mx::to_stream({});
  auto outputs = mx::array::make_arrays(
      {{}, {1}},
      {mx::int32, mx::int32},
      std::make_shared<AcceptBlock>(stream, rule_of(rule), vocab),
      {packed_on_gpu(p_ids, stream),
       packed_on_gpu(p_probs, stream),
       packed_on_gpu(q_ids, stream),
       packed_on_gpu(q_probs, stream),
       packed_on_gpu(drafts, stream),
       position,
       seed});
  return {outputs[0], outputs[1]};
}

void AcceptBlock::eval_cpu(
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
  AcceptBlockArgs args = {};
  args.accepted = outputs[0].data<int32_t>();
  args.next = outputs[1].data<int32_t>();
  args.k = inputs[4].shape(0);
  args.n = inputs[0].shape(1);
  args.m = inputs[2].shape(1);
  args.vocab = vocab_;
  encoder.dispatch([packed = std::move(packed), rule = rule_, args]() mutable {
    args.p_ids = static_cast<const int32_t*>(packed[0].get());
    args.p_probs = static_cast<const float*>(packed[1].get());
    args.q_ids = static_cast<const int32_t*>(packed[2].get());
    args.q_probs = static_cast<const float*>(packed[3].get());
    args.drafts = static_cast<const int32_t*>(packed[4].get());
    args.position = uint32_t(*static_cast<const int32_t*>(packed[5].get()));
    args.seed = *static_cast<const uint32_t*>(packed[6].get());
    std::vector<float> weights(args.n);
    // Long rows find their partners through a table, short ones by looking
    std::vector<float> by_id(args.m > max_scanned ? args.vocab : 0);
    args.weights = weights.data();
    args.by_id = by_id.empty() ? nullptr : by_id.data();
    switch (rule) {
      case Rule::residual:
        return PYENGINE_PICK_KERNEL(accept_residual)(args);
      case Rule::block:
        return PYENGINE_PICK_KERNEL(accept_whole_block)(args);
      case Rule::coupled:
        return PYENGINE_PICK_KERNEL(accept_coupled)(args);
    }
  });
}

void AcceptBlock::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  int k = inputs[4].shape(0), n = inputs[0].shape(1), m = inputs[2].shape(1);
  if (!accept_block_has_launch(k, n, m)) {
    throw std::runtime_error(
        "[accept_block] has no Metal kernel for more than 128 drafts or 256 "
        "candidates; pyengine.ops.accept_block runs plain MLX there.");
  }
  for (auto& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  auto launch = accept_block_launch(k, n, m, rule_, vocab_);
  run_on_gpu(launch, stream(), inputs, outputs);
}

bool AcceptBlock::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const AcceptBlock&>(other);
  return rule_ == o.rule_ && vocab_ == o.vocab_;
}

void bind_accept_block(nb::module_& m) {
  m.def(
      "accept_block",
      &accept_block,
      nb::arg("p_ids"),
      nb::arg("p_probs"),
      nb::arg("q_ids"),
      nb::arg("q_probs"),
      nb::arg("drafts"),
      nb::arg("position"),
      nb::arg("seed"),
      nb::arg("rule"),
      nb::arg("vocab"));
  m.def(
      "accept_block_has_launch",
      &accept_block_has_launch,
      nb::arg("k"),
      nb::arg("n"),
      nb::arg("m"));
  m.def(
      "accept_block_launch",
      [](int k, int n, int m, const std::string& rule, int vocab) {
        return accept_block_launch(k, n, m, rule_of(rule), vocab);
      },
      nb::arg("k"),
      nb::arg("n"),
      nb::arg("m"),
      nb::arg("rule"),
      nb::arg("vocab"));
}

} // namespace pyengine
