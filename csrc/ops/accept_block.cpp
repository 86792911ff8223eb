// accept_block: how many drafts of a block are kept, and what follows them. The
// rules are in accept_block_cpu.cpp.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/integer.h"
#include "cpu/isa.h"
#include "op.h"
#include "ops/accept_block_cpu.h"

namespace pyengine {

namespace {

enum class Rule : int { residual, block, coupled };

constexpr const char* rule_names[] = {"residual", "block", "coupled"};

// A simdgroup takes every 16th row: more threads would leave each fewer
// registers than it needs.
constexpr int max_simds = 16;

// Inputs: p_ids, p_probs, q_ids, q_probs, drafts, position, seed.
struct AcceptBlock {
  static constexpr const char* op = "accept_block";
  Rule rule;
  int vocab;
  bool operator==(const AcceptBlock&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int k = in[2].shape(0), n = in[0].shape(1), m = in[2].shape(1);
    if (k > max_launch_rows || std::max(n, m) > max_scanned) {
      return {};
    }
    Launch launch(
        op,
        std::string(op) + "_by_" + rule_names[int(rule)],
        {1, 1, 1},
        {32 * std::min(k + 1, max_simds), 1, 1});
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
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    AcceptBlockArgs args = {};
    args.accepted = out[0].data<int32_t>();
    args.next = out[1].data<int32_t>();
    args.k = in[2].shape(0);
    args.n = in[0].shape(1);
    args.m = in[2].shape(1);
    args.vocab = vocab;
    std::vector<Contiguous> arrays(in.begin(), in.end());
    return [arrays = std::move(arrays), rule = rule, args]() mutable {
      args.p_ids = arrays[0].get<int32_t>();
      args.p_probs = arrays[1].get<float>();
      args.q_ids = arrays[2].get<int32_t>();
      args.q_probs = arrays[3].get<float>();
      args.drafts = arrays[4].get<int32_t>();
      args.position = uint32_t(*arrays[5].get<int32_t>());
      args.seed = *arrays[6].get<uint32_t>();
      std::vector<float> weights(args.n);
      // Long rows find their partners through a table, short ones by looking
      std::vector<float> by_id(args.m > max_scanned ? args.vocab : 0);
      args.weights = weights.data();
      args.by_id = by_id.empty() ? nullptr : by_id.data();
      switch (rule) {
        case Rule::residual:
          return PYENGINE_PICK_KERNEL(accept_by_residual)(args);
        case Rule::block:
          return PYENGINE_PICK_KERNEL(accept_by_block)(args);
        case Rule::coupled:
          return PYENGINE_PICK_KERNEL(accept_by_coupled)(args);
      }
    };
  }
};

constexpr auto op = AcceptBlock::op;

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
  check_array(op, probs_name, probs, mx::float32, ids.shape());
}

// Drafts kept, int32 [], and the next token, int32 [1].
Arrays accept_block(
    const mx::array& p_ids, // [k + 1, n]
    const mx::array& p_probs, // [k + 1, n]
    const mx::array& q_ids, // [k, m]
    const mx::array& q_probs, // [k, m]
    const mx::array& drafts, // [k]
    const mx::array& position, // []
    const mx::array& seed, // []
    const std::string& rule,
    Integer vocab) {
  check_rows("q_ids", q_ids, "q_probs", q_probs, "have shape [k, m]");
  check_rows("p_ids", p_ids, "p_probs", p_probs, "have shape [k + 1, n]");
  int k = q_ids.shape(0);
  check_shape(op, "p_ids", p_ids, {k + 1, p_ids.shape(1)});
  check_array(op, "drafts", drafts, mx::int32, {k});
  check_array(op, "position", position, mx::int32, {});
  check_array(op, "seed", seed, mx::uint32, {});
  check(
      vocab > 0 && vocab <= max_vocab,
      op,
      "vocab",
      "be positive and at most 2097152",
      vocab);
  auto inputs = Arrays{p_ids, p_probs, q_ids, q_probs, drafts};
  inputs.insert(inputs.end(), {position, seed});
  return lazy_results(
      AcceptBlock{rule_of(rule), vocab},
      {{}, {1}},
      {mx::int32, mx::int32},
      inputs);
}

} // namespace

void bind_accept_block(nb::module_& m) {
  m.def(
      "accept_block",
      &accept_block,
      "p_ids"_a,
      "p_probs"_a,
      "q_ids"_a,
      "q_probs"_a,
      "drafts"_a,
      "position"_a,
      "seed"_a,
      "rule"_a,
      "vocab"_a);
}

} // namespace pyengine
